"""The one loop that trains everything. A stage supplies the step; here are pace, records, checkpoints and stopping.

Read top to bottom: set the learning rate, take the step, keep the loss; at times log, at times write ``resume.pt``. Every
draw of every step is a function of (seed, step), so the state to save is weights, optimizers and the step alone, and a
resumed run goes on bit for bit as if it had never stopped.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import Interrupted
from ..reporter import Reporter
from .checkpoint import load_resume, save_resume
from .distributed import ALONE, STOP_STRIDE, World
from .optim import Guard
from .run_dir import RESUME, RunDir

LOGS_A_RUN = 100


@dataclass
class Job:
    """What is trained: named parts with ``state_dict``, the optimizer on schedule, and the step itself.

    ``step(i, guard)`` draws batch i, sets gradients, steps its optimizers through ``guard`` and returns the loss (detached).
    """

    stage: str
    steps: int
    parts: dict[str, Any]
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    step: Callable[[int, Guard], Tensor]
    images_per_step: int
    extras: Callable[[], dict[str, float]] = dict  # more to log, read at log points only

    def take(self, step: int, guard: Guard) -> Tensor:
        """One step at its own learning rate; the loss."""
        lr = self.schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        guard.step_now = step
        return self.step(step, guard)


def train(job: Job, run: RunDir, device: torch.device, reporter: Reporter, *, resume: bool, checkpoint_seconds: float,
          world: World = ALONE) -> float:  # fmt: skip
    """Run ``job`` to its last step. Returns the seconds spent, over all its sittings.

    Several processes (``world``) go step by step together, stop at the same step, and process 0 writes for all.

    Raises DivergedError (exit 5) for a non-finite loss, Interrupted (exit 130) after SIGINT or SIGTERM, when the step is
    done and saved. A second signal stops at once.
    """
    start, spent, window = 0, 0.0, torch.zeros((), device=device)
    if resume and (run / RESUME).exists():  # without one it was stopped before its first checkpoint: from the start
        start, spent, window = _restore(job, run, device)
    elif resume:
        run.trim_metrics(0)
    guard = Guard(device)
    log_every = max(1, job.steps // LOGS_A_RUN)
    began = saved = logged = time.monotonic()

    with stop_signals() as stop, reporter.task(job.stage, job.steps) as task:
        task.skip(start)
        for step in range(start, job.steps):
            window += job.take(step, guard)

            done = step + 1
            if done % log_every == 0 or done == job.steps:
                guard.check()
                count = done % log_every or log_every
                clock = time.monotonic()
                record = {"step": done, "loss": window.item() / count, "lr": job.schedule(step), **job.extras()}
                rate = count * job.images_per_step / max(clock - logged, 1e-9)
                run.append_metrics(record | {"images_per_second": round(rate, 1)})
                paces = {name: value for name, value in record.items() if name.endswith("_per_second")}
                task.advance(min(count, done - start), loss=record["loss"], images_per_second=rate, **paces)
                window.zero_()
                logged = clock
            stopping = stop.requested if world.size == 1 else _together(stop.requested, done, world, device)
            if stopping or time.monotonic() - saved > checkpoint_seconds:
                guard.check()
                _save(job, run, done, spent + time.monotonic() - began, window)
                saved = time.monotonic()
            if stopping and done < job.steps:
                raise Interrupted(f"stopped after step {done} of {job.steps}; go on with: {run.resume_command(job.stage)}")

    guard.check()
    _save(job, run, job.steps, spent + time.monotonic() - began, window)
    return spent + time.monotonic() - began


def _together(requested: bool, done: int, world: World, device: torch.device) -> bool:
    """Was any process asked to stop? On GPUs, where the answer stalls the queue, only now and then."""
    return (device.type == "cpu" or done % STOP_STRIDE == 0) and world.any(requested, device)


def _save(job: Job, run: RunDir, step: int, spent: float, window: Tensor) -> None:
    """``window``, the sum of the losses not yet logged, is part of the state: the log too goes on as if never stopped."""
    if not run.writes:
        return
    parts = {name: part.state_dict() for name, part in job.parts.items()}
    save_resume(run / RESUME, {"step": step, "seconds": spent, "window": window.clone(), "parts": parts})


def _restore(job: Job, run: RunDir, device: torch.device) -> tuple[int, float, Tensor]:
    state = load_resume(run / RESUME)
    for name, part in job.parts.items():
        part.load_state_dict(state["parts"][name])
    run.trim_metrics(state["step"])
    return state["step"], state["seconds"], state["window"].to(device)


class StopFlag:
    requested = False


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """SIGINT and SIGTERM ask for a stop at the end of the step; a second one raises KeyboardInterrupt."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def ask(signum: int, frame: Any) -> None:
        if flag.requested:
            raise KeyboardInterrupt
        flag.requested = True

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
