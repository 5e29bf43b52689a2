"""``pretrain --profile``: where a step's time goes, by marks in the step itself, and nothing left but the trace."""

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from balms_cli.engine.loop import Job
from balms_cli.engine.profile import phase, profile_steps, sum_phases
from balms_cli.stages import pretrain

from .conftest import SMALL

PHASES = ["input", "augment", "forward", "backward", "optimizer"]


def one_error(outcome) -> str:
    assert outcome.code == 2 and outcome.out == "", outcome.err
    lines = [line for line in outcome.err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    return lines[0]


@pytest.fixture
def brief(monkeypatch):
    """Fewer steps than a user gets."""
    monkeypatch.setattr(pretrain, "profile_steps", partial(profile_steps, warm_up=1, steps=4))


def test_a_table_for_people_a_trace_for_perfetto_and_no_run(balms, chain, tmp_path, capfd, request):
    command = ["pretrain", chain.manifest, *SMALL, "--batch-size", "4", "--profile"]
    shown = balms(*command)
    assert shown.code == 0, shown.err
    trace = Path(shown.out.removesuffix("\n"))
    assert list(tmp_path.rglob("*")) == [tmp_path / "ws", trace]
    assert trace.name.startswith("profile-") and trace.suffix == ".json"
    table = [line.split("│")[1].strip() for line in shown.err.splitlines() if line.startswith("│")]
    assert table == [*PHASES, "other", "step"] and "images/s" in shown.err
    names = [e["name"] for e in json.loads(trace.read_text())["traceEvents"] if e.get("cat") == "user_annotation"]
    assert all(names.count(f"balms: {name}") == 30 for name in ("input", "augment", "forward", "backward", "optimizer", "step"))
    request.getfixturevalue("brief")
    assert balms(*command).out.strip() == str(trace.with_stem(trace.stem + "-2"))
    assert capfd.readouterr() == ("", "")  # the profiler's own library is chatty


def test_json_is_one_object_and_out_says_where(balms, chain, tmp_path, brief):
    command = ["pretrain", chain.manifest, *SMALL, "--reweight", "l2rw", "--set", "meta_batch_size=4", "--profile", "--json"]
    told = balms(*command, "--quiet", "--out", tmp_path / "mine")
    assert told.code == 0 and told.err == "", told.err
    found = json.loads(told.out)
    assert set(found) == {"trace", "milliseconds", "images_per_second", "device"} and found["device"].startswith("cpu")
    assert found["trace"] == str(tmp_path / "mine" / "trace.json")
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == [Path("mine"), Path("mine/trace.json")]
    ms = found["milliseconds"]
    assert list(ms) == ["input", "augment", "look ahead", "forward", "backward", "optimizer", "other", "step"]
    assert sum(ms.values()) - ms["step"] == pytest.approx(ms["step"], abs=0.01) and ms["other"] < 0.3 * ms["step"]
    assert ms["forward"] > 0 and ms["backward"] > 0
    assert found["images_per_second"] == pytest.approx(16 / (ms["step"] / 1000), rel=1e-3)
    assert "--overwrite" in one_error(balms(*command, "--quiet", "--out", tmp_path / "mine"))


def test_what_it_cannot_be_combined_with(balms, chain, tmp_path, monkeypatch):
    profile = ["pretrain", "--quiet", "--profile"]
    assert "--resume" in one_error(balms(*profile, "--resume", chain.pretrained))
    assert "--dry-run" in one_error(balms(*profile, chain.manifest, "--dry-run"))
    assert "--frozen" in one_error(balms(*profile, chain.manifest, *SMALL, "--frozen"))
    (tmp_path / "file").write_text("")
    assert "cannot write" in one_error(balms(*profile, chain.manifest, *SMALL, "--out", tmp_path / "file" / "x"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "torchrun" in one_error(balms(*profile, chain.manifest, *SMALL))
    assert not (tmp_path / "ws").exists()


def test_phases_add_up_to_the_wall_time_of_the_steps(tmp_path):
    """A job of naps, timed by a clock of its own."""
    taken, rates = [], []

    def step(i, guard):
        began = time.perf_counter()
        with phase("forward"):
            time.sleep(0.004)
        time.sleep(0.002)
        with phase("backward"):
            time.sleep(0.008)
        taken.append(1000 * (time.perf_counter() - began))
        rates.append((i, guard.step_now, optimizer.param_groups[0]["lr"]))
        return torch.zeros(())

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    job = Job("naps", 4, {}, optimizer, lambda i: 0.1 * i, step, images_per_step=10)
    found = profile_steps(job, torch.device("cpu"), tmp_path / "new" / "t.json", warm_up=1, steps=5)
    assert rates == [(i, i, 0.1 * i) for i in (0, 1, 2, 3, 0, 1)]
    ms = found.milliseconds
    assert list(ms) == ["forward", "backward", "other", "step"] and found.host_milliseconds == ms
    assert ms["forward"] >= 4 and ms["backward"] >= 8 and ms["other"] >= 2
    mean = sum(taken[1:]) / 5
    assert mean <= ms["step"] <= mean + 5  # between steps the profiler itself takes a moment
    assert found.rows()[0] == ["forward", f"{ms['forward']:.2f}", f"{100 * ms['forward'] / ms['step']:.1f} %"]


def test_a_gpus_time_is_that_of_its_kernels_by_when_they_were_launched():
    """Two steps of 100 us by hand: the second stream overlaps, one copy is launched outside every mark."""

    def mark(name, ts, dur):
        return {"cat": "user_annotation", "name": f"balms: {name}", "ts": ts, "dur": dur}

    def kernel(launched, ts, dur, number, cat="kernel"):
        launch = {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": launched, "dur": 1, "args": {"correlation": number}}
        return [launch, {"cat": cat, "name": "k", "ts": ts, "dur": dur, "args": {"correlation": number}}]

    events = [mark("step", 1000, 40), mark("forward", 1000, 10), mark("backward", 1012, 20),
              {"cat": "gpu_user_annotation", "name": "balms: forward", "ts": 1020, "dur": 30}, {"ph": "M", "name": "x"},
              *kernel(1005, 1020, 30, 1), *kernel(1015, 1040, 40, 2), *kernel(1035, 1085, 5, 3, "gpu_memcpy"),
              mark("step", 1100, 40), mark("forward", 1100, 10), mark("backward", 1112, 20),
              *kernel(1109, 1120, 30, 4), *kernel(1131, 1150, 50, 5)]  # fmt: skip
    device, host = sum_phases(events, on_gpu=True)
    # forward 30 + 30; backward 30 (10 of its 40 the GPU was at forward) + 50; busy 145 of 200
    assert device == {"forward": 0.03, "backward": 0.04, "other": 0.0025, "idle": 0.0275, "step": 0.1}
    assert host == {"forward": 0.01, "backward": 0.02, "other": 0.04, "step": 0.07}
    assert sum_phases(events, on_gpu=False)[0] == host


def test_without_a_profiler_a_mark_is_nothing():
    assert phase("forward") is phase("backward")
