"""Several processes of torchrun: the same steps as one process, one writer, one voice."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from balms_cli.cli.execute import in_world
from balms_cli.engine import distributed
from balms_cli.engine.distributed import World, local_device
from balms_cli.errors import ConfigError

from .conftest import SMALL
from .test_stages import FEW

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(*arguments, processes: int = 2, **more) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        *more.pop("run", []),
    ]
    return subprocess.run([*command, "-m", "balms_cli", *map(str, arguments)], capture_output=True, text=True, env=ENV,
                          timeout=240, check=False)  # fmt: skip


def test_shares_of_a_batch_and_parts_of_the_rows_cover_each_place_once():
    for size in (1, 2, 3, 8):
        worlds = [World(rank, size) for rank in range(size)]
        assert [i for w in worlds for i in range(*w.share(24).indices(24))] == list(range(24))
        for count in (0, 1, 7, 24, 25):
            assert [i for w in worlds for i in range(*w.rows(count).indices(count))] == list(range(count))
            sizes = [len(range(*w.rows(count).indices(count))) for w in worlds]
            assert max(sizes) - min(sizes) <= 1
    with pytest.raises(ConfigError, match=r"--batch-size 10 .* 3 processes; try 9"):
        World(0, 3).share(10)


def test_alone_everything_is_what_it_was():
    world, value = World(), torch.tensor([1.0, 2.0])
    assert world.mean(value) is value and world.gather(value, 2) is value and world.agree("x") == "x"
    assert world.any(True, torch.device("cpu")) and not world.any(False, torch.device("cpu"))
    model = torch.nn.Linear(2, 2)
    assert world.wrap(model, torch.device("cpu")) is model


def test_every_process_takes_its_own_gpu_also_where_a_resumed_run_names_that_of_process_0(monkeypatch):
    assert local_device("cuda:1") == "cuda:1" and local_device("auto") == "auto"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [local_device(n) for n in ("cuda", "cuda:0", "cpu")] == ["cuda:2", "cuda:2", "cpu"]


def test_a_world_size_without_torchrun_is_one_line(balms, chain, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = balms("pretrain", chain.manifest, *SMALL)
    assert told.code == 2 and "RANK expected" in told.err and told.err.count("\n") == 1


def test_process_0_speaks_for_all_and_none_reads_stdin(balms, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in ("pretrain", "retrain", "evaluate", "detect evaluate"):
        assert "no stdin to read" in balms(*command.split(), "-", stdin="x").err
    for rank, told in ((0, "False spoken\n"), (1, "")):
        monkeypatch.setattr(distributed, "join", lambda device, rank=rank: nullcontext(World(rank, 2)))
        in_world(lambda params, world: print(params["quiet"], "spoken"), {"quiet": False})
        assert capsys.readouterr().out == told
    quiet = []
    in_world(lambda params, world: quiet.append(params["quiet"]), {"quiet": False})
    assert quiet == [True]


MICRO = """
import sys, torch
from pathlib import Path
from balms_cli.stages import end_to_end, pretrain
from balms_cli.cli.app import main

def micro_batches(model, optimizer, loss, read, runtime, world):
    def step(i, guard):
        inputs, targets = read(i)
        optimizer.zero_grad()
        terms, half = [], len(targets) // 2
        whole = loss.denominator(targets)
        for part in (slice(0, half), slice(half, None)):
            terms.append(loss.per_example(model(inputs[part]), targets[part]).sum() / whole)
            terms[-1].backward()
        value = sum(terms).detach()
        guard.step(value, optimizer)
        return value
    return step

pretrain.plain_step = micro_batches
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["softmax", "cost-sensitive", "ldam"])
def test_two_processes_equal_one_with_two_half_batches(chain, tmp_path, loss):
    """BatchNorm sees half a batch in both; weighted losses divide by the weights of the whole batch in both."""
    options = ["pretrain", chain.manifest, *SMALL, "--loss", loss, "--precision", "fp32"]
    options += ["--set", "loading=disk"] if loss == "ldam" else []  # each process reads its share of the files
    options += ["--out"]
    two = torchrun(*options, tmp_path / "two")
    assert two.returncode == 0, two.stderr
    assert two.stdout.strip() == str(tmp_path / "two")  # one process prints
    one = subprocess.run([sys.executable, "-c", MICRO, *map(str, options), str(tmp_path / "one")], capture_output=True,
                         text=True, env=ENV, check=False)  # fmt: skip
    assert one.returncode == 0, one.stderr
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("two", "one"))
    for name, tensor in ours.items():
        if "running" not in name and "num_batches" not in name:  # statistics are those of process 0's half
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("two", "one")
    ]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4) and len(logs[0]) == 12


@pytest.mark.slow
@pytest.mark.parametrize("bank", ["memory", "disk"])
def test_two_processes_extract_train_and_score_as_one_does(chain, tmp_path, bank):
    """Each process writes shards of its own, every row of the bank is there once, and it is the bank of one process bit for
    bit, so the head that comes out is the same, and so are the scores."""
    from .conftest import invoke

    options = ["retrain", chain.pretrained, *FEW, "--meta-sampler", "--precision", "fp32", "--set", "views=64"]
    options += ["--set", f"bank={bank}", "--out"]
    for kept in (chain.pretrained / "features").glob("*"):
        kept.unlink()
    wrote = tmp_path / "wrote.py"
    wrote.write_text(
        "import os\nfrom balms_cli.data import bank\nmark = bank.ShardWriter.mark\n"
        "def told(self, shard):\n    mark(self, shard)\n"
        f"    open(r'{tmp_path}/' + f'shard-{{shard}}-by-' + os.environ['RANK'], 'x')\n"
        "bank.ShardWriter.mark = told\nfrom balms_cli.cli.app import main\nmain()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(wrote)]
    two = subprocess.run([*command, *map(str, options), str(tmp_path / "two")], capture_output=True, text=True, env=ENV,
                         timeout=240, check=False)  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert sorted(p.name for p in tmp_path.glob("shard-*")) == ["shard-0-by-0", "shard-1-by-1"]
    (kept,) = (chain.pretrained / "features").iterdir()
    together = load_file(kept)["features"].clone()
    kept.unlink()
    assert invoke(*options, tmp_path / "one").code == 0
    assert len(together) > 2048 and torch.equal(together, load_file(kept)["features"])
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("two", "one"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    scored = torchrun("evaluate", tmp_path / "one", "--json", "--precision", "fp32")
    alone = invoke("evaluate", tmp_path / "one", "--json", "--precision", "fp32")
    found, known = json.loads(scored.stdout), json.loads(alone.out)
    assert found["per_class"] == known["per_class"] and found["images"] == known["images"]


@pytest.mark.slow
def test_interrupted_together_and_resumed_together(chain, tmp_path):
    """SIGTERM to torchrun: all stop at one step, process 0 saves; --resume gives the uninterrupted run."""
    import signal
    import time

    options = ["pretrain", str(chain.manifest), *SMALL, "--steps", "400", "--precision", "fp32"]
    whole = torchrun(*options, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "balms_cli"]
    process = subprocess.Popen([*command, *options, "--out", tmp_path / "cut"], env=ENV, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    log = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.is_file() and log.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert "--resume" in told and (tmp_path / "cut" / "resume.pt").is_file(), told
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    again = torchrun("pretrain", "--resume", tmp_path / "cut")
    assert again.returncode == 0, again.stderr
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("cut", "whole"))
    assert all(
        torch.equal(tensor, theirs[name]) for name, tensor in ours.items() if "running" not in name and "num_b" not in name
    )


@pytest.mark.slow
def test_a_mistake_is_told_once(chain, tmp_path):
    done = torchrun("pretrain", chain.manifest, *SMALL, "--batch-size", "15", "--out", tmp_path / "r")
    told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and len(told) == 1 and "does not divide among 2 processes; try 16" in told[0]
    assert not Path(tmp_path / "r").exists()


@pytest.mark.slow
def test_after_a_restart_of_torchrun_the_run_goes_on(chain, tmp_path):
    """A process dies for good once; with --max-restarts the same command resumes what is in --out."""
    crash = tmp_path / "crash.py"
    crash.write_text(
        "import os\nfrom balms_cli.engine import loop\nsave = loop._save\n"
        "def save_and_die(job, run, step, *rest):\n    save(job, run, step, *rest)\n"
        "    if step == 6 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and run.writes:\n        os._exit(9)\n"
        "loop._save = save_and_die\nfrom balms_cli.cli.app import main\nmain()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    options = [
        "pretrain",
        chain.manifest,
        *SMALL,
        "--precision",
        "fp32",
        "--set",
        "checkpoint_seconds=1e-9",
        "--out",
        tmp_path / "r",
    ]
    done = subprocess.run([*command, str(crash), *map(str, options)], capture_output=True, text=True, env=ENV, timeout=240,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13)) and (tmp_path / "r" / "model.safetensors").is_file()
