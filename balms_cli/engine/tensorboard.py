"""TensorBoard event files beside ``metrics.jsonl``: the same numbers at the same steps, for who would rather watch curves.

An extra (``pip install 'balms[tensorboard]'``), turned on by ``--tensorboard``. The loop knows nothing of it: ``RunDir``
hands each record that it appends to ``metrics.jsonl`` on to what watches the run.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from ..config import DetectSGDConfig, TrainConfig
from ..data.aside import write_error
from ..errors import ConfigError
from .run_dir import EVENTS, METRICS, RunDir

_TEXT_CLASSES = 200  # a text with thousands of rows is no longer read, and slows the page


def require_tensorboard(config: TrainConfig | DetectSGDConfig) -> None:
    """Told before anything is computed. Raises ConfigError (exit 2) where event files are asked for and cannot be written."""
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard needs a package that is not installed: pip install 'balms[tensorboard]'")


class Events:
    """What a run may tell beside its records; this one says nothing."""

    def rates(self, step: int, rates_C: Tensor, classes: list[str], class_counts: list[int]) -> None:
        """The learned rates or weights of the classes, at the end of the run."""


class EventFiles(Events):
    """Writes to ``RUN/tensorboard/``. Nothing is opened before there is something to write.

    A resumed run logs again what came after its checkpoint. Its first record's step is told to TensorBoard, which then
    forgets what the files of earlier sittings hold from there on (``purge_step``): every step stands there once.
    """

    def __init__(self, run: RunDir):
        self.run, self.writer = run, None

    def __call__(self, record: dict[str, Any]) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.run / EVENTS), purge_step=record["step"])
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()  # 100 records a run: a killed run has on disk what its log has

    def rates(self, step: int, rates_C: Tensor, classes: list[str], class_counts: list[int]) -> None:
        if self.writer is None:  # every step was taken in an earlier sitting: the last record again, then what belongs to it
            self(json.loads((self.run / METRICS).read_text(encoding="utf-8").splitlines()[-1]))
        self.writer.add_histogram("class_rates", rates_C.cpu(), step)
        order = sorted(range(len(classes)), key=lambda c: -class_counts[c])
        lines = ["| class | training images | rate |", "|---|--:|--:|"]
        lines += [f"| {_cell(classes[c])} | {class_counts[c]} | {rates_C[c]:.4f} |" for c in order[:_TEXT_CLASSES]]
        if len(order) > _TEXT_CLASSES:
            lines.append(f"\n{len(order) - _TEXT_CLASSES} rarer classes are left out here.")
        self.writer.add_text("class_rates", "\n".join(lines), step)

    def close(self) -> None:
        try:
            if self.writer is not None:
                self.writer.close()
        except OSError as error:
            raise write_error(error, self.run / EVENTS) from None


@contextmanager
def event_files(config: TrainConfig | DetectSGDConfig, run: RunDir) -> Iterator[Events]:
    """While the block runs, the records of ``run`` go to TensorBoard too, where ``config`` asks for it. One process writes.

    Raises ConfigError or DataError where the files cannot be written.
    """
    require_tensorboard(config)
    if not (config.tensorboard and run.writes):
        yield Events()
        return
    events = EventFiles(run)
    run.watch = events
    try:
        yield events
    finally:
        run.watch = None
        events.close()


def _cell(name: str) -> str:
    """A class name in a Markdown table: nothing in it is markup."""
    return "".join(f"&#{ord(c)};" if c in "|`*_~<>[]()&\\#!" else c for c in name)
