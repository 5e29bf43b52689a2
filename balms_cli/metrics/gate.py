"""Quality gates: what ``--require`` holds a result to."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .accuracy import SCALARS

METRICS = (*SCALARS, "ece")


@dataclass(frozen=True)
class Gate:
    """``metric op value``, for instance ``few>=0.30`` or ``ece<=5%``: an accuracy, or the expected calibration error."""

    metric: str
    op: str
    value: float

    @staticmethod
    def parse(text: str, metrics: Sequence[str] = METRICS, examples: str = "'few>=0.30' or 'top1>=45%'") -> "Gate":
        """Raises ConfigError for anything but one of ``metrics``, a comparison and a number (a fraction, or percent)."""
        match = re.fullmatch(r"\s*([\w.]+)\s*(>=|<=|>|<)\s*([0-9.]+)(%?)\s*", text)
        try:
            metric, op, number, percent = match.groups()
            value = float(number) / (100 if percent else 1)
        except (AttributeError, ValueError):
            raise ConfigError(f"--require {text!r}: write it as {examples}") from None
        if metric not in metrics:
            from ..config import suggest

            raise ConfigError(f"--require {text!r}: no metric '{metric}'; {suggest(metric, metrics)}")
        if not 0 <= value <= 1:
            raise ConfigError(f"--require {text!r}: values are fractions from 0 to 1 (or write {value:g}%)")
        return Gate(metric, op, value)

    def met_by(self, result: dict[str, Any]) -> bool:
        """Raises ConfigError where the metric is empty for this data: such a gate says nothing, so it never passes."""
        found = result[self.metric]
        if found is None:
            raise ConfigError(f"--require {self}: '{self.metric}' is empty for this data (no class of that kind was tested)")
        return {">=": found >= self.value, "<=": found <= self.value, ">": found > self.value, "<": found < self.value}[self.op]

    def __str__(self) -> str:
        return f"{self.metric}{self.op}{self.value:g}"
