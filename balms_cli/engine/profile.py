"""Where the time of a training step goes: a few real steps under ``torch.profiler``, summed by the phases that they mark.

A step marks its parts with :func:`phase`. On a CPU a phase took the wall time of its marks. A GPU works behind the host's
back, so there a phase took the time of the kernels and copies that were launched inside its marks, and what is left of the
step the GPU stood idle; how long the host was in each phase then says what it waited for.
"""

import json
import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function, schedule

from ..data.aside import replace_file, write_error
from ..errors import ConfigError
from .loop import Job
from .optim import Guard
from .run_dir import check_place

WARM_UP, STEPS = 5, 30
PREFIX = "balms: "
_STEP, _OTHER, _IDLE = "step", "other", "idle"
_ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
_UNMARKED = nullcontext()


def phase(name: str) -> AbstractContextManager:
    """Marks a part of a step. Phases of a step follow each other, or the inner one would be counted twice.

    Without a profiler this is a question and nothing more (0.2 microseconds; ``record_function`` alone takes 4).
    """
    return record_function(PREFIX + name) if torch.autograd._profiler_enabled() else _UNMARKED


@dataclass(frozen=True)
class Profile:
    """Milliseconds a step by phase, in the order of the step, then "other" (on a GPU also "idle") and the whole "step".

    ``host_milliseconds``: how long the host was at it; less than the GPU, where it runs ahead. On a CPU both are one.
    """

    milliseconds: dict[str, float]
    host_milliseconds: dict[str, float]
    images_per_second: float
    steps: int
    trace: Path

    def rows(self) -> list[list[str]]:
        """Phase, milliseconds, share of the step; on a GPU the host's milliseconds, too."""
        whole = self.milliseconds[_STEP]
        rows = [[name, f"{ms:.2f}", f"{100 * ms / whole:.1f} %"] for name, ms in self.milliseconds.items()]
        if _IDLE in self.milliseconds:
            for row in rows:
                row.append(f"{self.host_milliseconds[row[0]]:.2f}" if row[0] in self.host_milliseconds else "")
        return rows


def trace_path(label: str, *, workspace: Path, out: Path | None, overwrite: bool) -> Path:
    """``trace.json`` in ``out``, or a new ``profile-LABEL.json`` in the workspace. Nothing is made yet.

    Raises ConfigError (exit 2) for a place that cannot be written, and for a trace in ``out`` that may not be replaced.
    """
    check_place(out or workspace)
    if out is not None:
        path = out / "trace.json"
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists; add --overwrite to replace it, or choose another folder")
        return path
    base, n = workspace / f"profile-{label}.json", 1
    path = base
    while path.exists():
        n += 1
        path = base.with_stem(f"{base.stem}-{n}")
    return path


def profile_steps(job: Job, device: torch.device, trace: Path, *, warm_up: int = WARM_UP, steps: int = STEPS) -> Profile:
    """Take ``warm_up`` + ``steps`` steps of ``job`` from its first on, record the last ``steps``, write them to ``trace``.

    Shorter jobs begin again. The weights move as in training; no run is written. Raises DivergedError, and ConfigError or
    DataError where the trace cannot be written.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the library under torch.profiler writes to stderr on its own
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    guard = Guard(device)
    plan = schedule(wait=0, warmup=warm_up, active=steps, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=plan, acc_events=True) as recorder:
        for i in range(warm_up + steps):
            with phase(_STEP):
                job.take(i % job.steps, guard)
            if device.type == "cuda" and i + 1 in (warm_up, warm_up + steps):
                torch.cuda.synchronize(device)  # no kernel of another step is recorded, none of these is missed
            recorder.step()
    guard.check()
    content = _chrome_trace(recorder)
    device_ms, host_ms = sum_phases(json.loads(content)["traceEvents"], on_gpu=device.type == "cuda")
    try:
        trace.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, trace) from None
    replace_file(trace, content)
    return Profile(device_ms, host_ms, round(job.images_per_step / (device_ms[_STEP] / 1000), 1), steps, trace)


def sum_phases(events: Iterable[dict[str, Any]], *, on_gpu: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds a step by phase, on the device and on the host, from the events of a Chrome trace (microseconds)."""
    events = list(events)
    marks = sorted((e["ts"], e["ts"] + e["dur"], e["name"].removeprefix(PREFIX)) for e in events
                   if e.get("cat") == "user_annotation" and e["name"].startswith(PREFIX))  # fmt: skip
    whole, parts = [m for m in marks if m[2] == _STEP], [m for m in marks if m[2] != _STEP]
    begin, end = whole[0][0], whole[-1][1]
    host = dict.fromkeys(name for *_, name in parts) | {_OTHER: 0.0}  # in the order of the step
    host = {name: sum(stop - start for start, stop, n in parts if n == name) for name in host}
    host[_OTHER] = end - begin - sum(host.values())
    host = _a_step(host, end - begin, len(whole))
    if not on_gpu:
        return host, host

    # A backward pass launches its kernels from a thread of autograd's: they are known by when, not by where.
    launches = {e["args"]["correlation"]: e["ts"] for e in events
                if e.get("cat") in _LAUNCHES and "correlation" in e.get("args", {})}  # fmt: skip
    starts = [start for start, *_ in parts]
    device, free = dict.fromkeys([n for n in host if n != _STEP], 0.0), begin
    for work in sorted((e for e in events if e.get("cat") in _ON_GPU), key=lambda e: e["ts"]):
        launched = launches.get(work["args"].get("correlation"), -1.0)
        at = bisect_right(starts, launched) - 1
        name = parts[at][2] if at >= 0 and launched < parts[at][1] else _OTHER
        done = work["ts"] + work["dur"]
        device[name] += max(0.0, done - max(free, work["ts"]))  # streams may overlap: each moment counts once
        free = max(free, done)
    end = max(end, free)
    device[_IDLE] = end - begin - sum(device.values())
    return _a_step(device, end - begin, len(whole)), host


def _a_step(microseconds: dict[str, float], whole: float, steps: int) -> dict[str, float]:
    return {name: round(us / steps / 1000, 4) for name, us in (microseconds | {_STEP: whole}).items()}


def _chrome_trace(recorder: torch.profiler.profile) -> bytes:
    """What chrome://tracing and ui.perfetto.dev open."""
    with tempfile.TemporaryDirectory() as scratch:
        recorder.export_chrome_trace(str(Path(scratch) / "trace.json"))
        return (Path(scratch) / "trace.json").read_bytes()
