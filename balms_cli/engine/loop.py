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

from ..errors import CheckpointError, Interrupted, one_line
from ..reporter import Reporter
from .checkpoint import load_resume, save_resume
from .distributed import ALONE, STOP_STRIDE, World
from .optim import Guard
from .run_dir import RESUME, RunDir

LOGS_A_RUN = 100
ONE_STOP_SECONDS = 1.0  # signals in this time are one: a scheduler and torchrun, or `timeout`, may both send one


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
    done and saved; a second signal stops at once, at the last checkpoint. CheckpointError (exit 4) where ``resume.pt`` is
    not of this job, ConfigError (exit 2) where another process trains in the same folder.
    """
    with run.alone():
        try:
            return _train(job, run, device, reporter, resume, checkpoint_seconds, world)
        except KeyboardInterrupt:
            told = f"stopped at once, with the last checkpoint as it was; go on with: {run.resume_command(job.stage)}"
            raise Interrupted(told) from None


def _train(job: Job, run: RunDir, device: torch.device, reporter: Reporter, resume: bool, checkpoint_seconds: float,
           world: World) -> float:  # fmt: skip
    start, spent, window = 0, 0.0, torch.zeros((), device=device)
    recipe = run.recipe(job.stage)
    if resume and (run / RESUME).exists():  # without one it was stopped before its first checkpoint: from the start
        start, spent, window = _restore(job, run, recipe, device)
    elif resume:
        reporter.warn(f"{run / RESUME} is not there (none was written yet, or it was deleted): training starts from step 0")
        run.trim_metrics(0)
    guard = Guard(device, run / RESUME)
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
                fresh = min(count, done - start)  # the others were taken in an earlier sitting
                clock = time.monotonic()
                record = {"step": done, "loss": window.item() / count, "lr": job.schedule(step), **job.extras()}
                rate = fresh * job.images_per_step / max(clock - logged, 1e-9)
                run.append_metrics(record | {"images_per_second": round(rate, 1)})
                paces = {name: value for name, value in record.items() if name.endswith("_per_second")}
                task.advance(fresh, loss=record["loss"], images_per_second=rate, **paces)
                window.zero_()
                logged = clock
            stopping = stop.requested if world.size == 1 else _together(stop.requested, done, world, device)
            if stopping or time.monotonic() - saved > checkpoint_seconds:
                guard.check()
                _save(job, run, done, spent + time.monotonic() - began, window, recipe)
                saved = time.monotonic()
            if stopping and done < job.steps:
                raise Interrupted(f"stopped after step {done} of {job.steps}; go on with: {run.resume_command(job.stage)}")

    guard.check()
    _save(job, run, job.steps, spent + time.monotonic() - began, window, recipe)
    return spent + time.monotonic() - began


def _together(requested: bool, done: int, world: World, device: torch.device) -> bool:
    """Was any process asked to stop? On GPUs, where the answer stalls the queue, only now and then."""
    return (device.type == "cpu" or done % STOP_STRIDE == 0) and world.any(requested, device)


def _save(job: Job, run: RunDir, step: int, spent: float, window: Tensor, recipe: dict[str, Any] | None) -> None:
    """``window``, the sum of the losses not yet logged, is part of the state: the log too goes on as if never stopped."""
    if not run.writes:
        return
    parts = {name: part.state_dict() for name, part in job.parts.items()}
    save_resume(run / RESUME, {"step": step, "seconds": spent, "window": window.clone(), "parts": parts,
                               "recipe": recipe})  # fmt: skip


def _restore(job: Job, run: RunDir, recipe: dict[str, Any] | None, device: torch.device) -> tuple[int, float, Tensor]:
    """Raises CheckpointError for a state of another job, and where ``config.toml`` says something else than it did."""
    state = load_resume(run / RESUME)
    before = state.get("recipe")
    if isinstance(before, dict) and recipe is not None and recipe != before:
        changed = sorted(k for k in before.keys() | recipe.keys() if before.get(k) != recipe.get(k))
        raise CheckpointError(f"{run.path} cannot go on: its config.toml was changed ({', '.join(changed)}); put back what it "
                              "said, or begin a new run with it: --config")  # fmt: skip
    try:
        step, spent, window = int(state["step"]), float(state["seconds"]), state["window"].to(device)
        if not 0 <= step <= job.steps:
            raise ValueError(f"step {step} of {job.steps}")
        for name, part in job.parts.items():
            part.load_state_dict(state["parts"][name])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{run / RESUME} is not of this run: {one_line(error)}") from None
    run.trim_metrics(step)
    return step, spent, window


class StopFlag:
    requested = False
    since = 0.0


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """SIGINT and SIGTERM ask for a stop at the end of the step; one that comes later raises KeyboardInterrupt."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def ask(signum: int, frame: Any) -> None:
        if not flag.requested:
            flag.requested, flag.since = True, time.monotonic()
        elif time.monotonic() - flag.since > ONE_STOP_SECONDS:
            raise KeyboardInterrupt

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
