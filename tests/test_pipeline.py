"""Real processes: pipes between stages, signals, a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .conftest import SMALL, invoke

BALMS = [sys.executable, "-m", "balms_cli"]


def environment(tmp_path):
    return os.environ | {"BALMS_WORKSPACE": str(tmp_path / "ws"), "OMP_NUM_THREADS": "1"}


def test_the_whole_chain_as_a_shell_pipe(chain, tmp_path):
    small = " ".join(SMALL)
    few = "--steps 20 --batch-size 16 --set meta_batch_size=16"
    balms = " ".join(BALMS)
    line = (f"{balms} make-lt '{chain.photos}' --as-is | {balms} pretrain - {small} | {balms} retrain - {few} --loss balanced "
            f"--meta-sampler | {balms} evaluate - --json")  # fmt: skip
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=environment(tmp_path), check=False)
    assert done.returncode == 0, done.stderr
    assert 0 <= json.loads(done.stdout)["top1"] <= 1
    assert "Traceback" not in done.stderr


def test_a_broken_first_stage_stops_the_pipe_with_one_line_each(tmp_path):
    balms = " ".join(BALMS)
    line = f"set -o pipefail; {balms} make-lt ./nowhere --as-is | {balms} pretrain -"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment(tmp_path), check=False)
    assert done.returncode == 3 and done.stdout == ""
    told = done.stderr.splitlines()
    assert len(told) == 2 and "nowhere" in told[0] + told[1] and any("printed no path" in line for line in told)


def start(arguments, tmp_path):
    """A balms process with its streams captured."""
    return subprocess.Popen([*BALMS, *map(str, arguments)], env=environment(tmp_path), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def start_long_run(chain, out, tmp_path, steps=4000):
    options = [*SMALL[:4], "--steps", str(steps), "--batch-size", "16", "--set", "checkpoint_seconds=0.1"]
    process = start(["pretrain", chain.manifest, *options, "--out", out], tmp_path)
    deadline = time.monotonic() + 60
    while not (out / "resume.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_130_and_the_command_to_resume(chain, tmp_path, signum):
    out = tmp_path / "run"
    process = start_long_run(chain, out, tmp_path)
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stdout == ""
    assert f"balms pretrain --resume {out}" in stderr and "Traceback" not in stderr
    assert not (out / "model.safetensors").exists()


def test_a_killed_run_is_resumed_to_what_it_would_have_been(chain, tmp_path):
    out = tmp_path / "run"
    process = start_long_run(chain, out, tmp_path, steps=300)
    process.kill()
    process.communicate()
    assert not (out / "model.safetensors").exists()
    resumed = start(["pretrain", "--resume", out, "-q"], tmp_path)
    whole = tmp_path / "whole"
    once = start(["pretrain", chain.manifest, *SMALL[:4], "--steps", 300, "--batch-size", "16", "--out", whole, "-q"], tmp_path)
    for process in (resumed, once):
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
    ours, theirs = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.slow
def test_killed_again_and_again_it_still_ends_where_it_would_have(chain, tmp_path):
    """kill -9 at odd moments, among them while resume.pt is being written (every few milliseconds here)."""
    import random

    out, rng, kills = tmp_path / "run", random.Random(0), 0
    options = [*SMALL[:4], "--steps", "900", "--batch-size", "16", "-q"]
    whole = start(["pretrain", chain.manifest, *options, "--out", tmp_path / "whole"], tmp_path)
    assert whole.wait(300) == 0
    begin = ["pretrain", chain.manifest, *options, "--set", "checkpoint_seconds=0.001", "--out", out]
    go_on = ["pretrain", "--resume", out, "-q"]
    while not (out / "model.safetensors").exists():
        process = start(go_on if (out / "config.toml").exists() else begin, tmp_path)
        before = (out / "resume.pt").stat().st_mtime_ns if (out / "resume.pt").exists() else 0
        while process.poll() is None and kills < 8:
            if (out / "resume.pt").exists() and (out / "resume.pt").stat().st_mtime_ns != before:
                time.sleep(rng.uniform(0, 0.3))
                process.kill()
                kills += 1
                break
            time.sleep(0.01)
        _, told = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL), told
    assert kills >= 3
    ours, theirs = load_file(out / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    logs = [(run / "metrics.jsonl").read_text().splitlines() for run in (out, tmp_path / "whole")]
    assert [json.loads(line)["loss"] for line in logs[0]] == [json.loads(line)["loss"] for line in logs[1]]
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]  # nothing half-written is left


def test_completion_offers_subcommands_and_values():
    def complete(words, count):
        env = os.environ | {
            "_BALMS_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(count),
            "_TYPER_COMPLETE_TESTING": "1",
        }
        code = "import sys; sys.argv = ['balms']; from balms_cli.cli.app import app; app(prog_name='balms')"
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False).stdout.split()

    assert {"make-lt", "pretrain", "retrain", "meta-sample", "evaluate"} <= set(complete("balms ", 1))
    assert complete("balms retrain --loss b", 3) == ["balanced", "balanced-sigmoid"]


def test_the_demo_needs_a_place_that_can_be_its_own(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place, told in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "under", "Not a directory"),
                        (tmp_path, "not the demo's own")):  # fmt: skip
        done = invoke("demo", "--workspace", place)
        assert done.code == 2 and told in done.err and len(done.err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_the_demo_ends_in_its_table_and_chart(tmp_path):
    began = time.monotonic()
    done = subprocess.run([*BALMS, "demo", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    methods = json.loads(done.stdout)["methods"]
    assert list(methods) == ["softmax", "balanced", "balms"] and all(m["few"] is not None for m in methods.values())
    assert methods["balanced"]["few"] > methods["softmax"]["few"]
    assert (tmp_path / "balms-demo" / "demo.png").stat().st_size > 10_000 and time.monotonic() - began < 600
    again = subprocess.run([*BALMS, "demo", "-q"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and again.stdout.strip() == "balms-demo"  # writes over its own result
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").write_text("mine")
    refused = subprocess.run([*BALMS, "demo", "--workspace", "else"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "not the demo's own" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif("BALMS_TEST_DATA" not in os.environ, reason="BALMS_TEST_DATA names no folder with cifar10.zip")
def test_balanced_softmax_finds_the_rare_classes_of_cifar10(tmp_path):
    """A third of the quick preset is enough to see the shape: the three rarest classes gain, and CBS over-balances."""
    balms = " ".join(BALMS)
    root = Path(os.environ["BALMS_TEST_DATA"])
    env = os.environ | {"BALMS_WORKSPACE": str(tmp_path / "ws"), "BALMS_CACHE": str(tmp_path / "cache")}

    def shell(line):
        return subprocess.run(line, shell=True, capture_output=True, text=True, env=env, check=True).stdout.strip()

    data = shell(f"{balms} make-lt cifar10 --imbalance 200 --data-root '{root}' -q")
    first = shell(f"{balms} pretrain {data} --steps 900 -q")
    rows = ("--loss softmax", "--loss balanced", "--loss balanced --sampler class", "--loss balanced --meta-sampler")
    runs = [shell(f"{balms} retrain {first} {options} --steps 500 -q") for options in rows]
    found = json.loads(shell(f"{balms} evaluate {' '.join(runs)} --json -q"))["runs"]
    softmax, balanced, over, meta = (r["rarest3"] for r in found)
    # 700 steps gave 0.0, 0.20, 0.70, 0.22; the whole preset gives 0.04, 0.58, 0.81, 0.56.
    assert min(balanced, meta) > softmax + 0.1
    assert over > balanced + 0.1 and found[2]["many"] < found[1]["many"] - 0.1  # over-balance: the head pays for it
