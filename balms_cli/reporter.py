"""What a stage may say to people while it works. This one says nothing; ``cli/console.py`` draws it with Rich.

Stages talk to this interface alone, so they run the same from Python, in a pipe and on a terminal.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Task:
    """A piece of work with a known length, handed out by :meth:`Reporter.task`."""

    def advance(self, amount: int = 1, **metrics: float) -> None:
        """``amount`` units are done; ``metrics`` are shown beside the bar."""

    def skip(self, amount: int) -> None:
        """``amount`` units were done in an earlier sitting: they count as done, not for the rate."""


class Reporter:
    """Silent reporter: the base class, and the default when a stage is called from Python."""

    def note(self, message: str) -> None:
        """One plain line of information."""

    def warn(self, message: str) -> None:
        """One line that the user should not miss."""

    def table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table; the first column is text, the others are numbers already formatted as text."""

    def bars(self, title: str, labels: list[str], values: list[float], texts: list[str]) -> None:
        """A horizontal bar chart: one bar an entry, its length in proportion to ``values``, ``texts`` at its end."""

    @contextmanager
    def task(self, description: str, total: int, unit: str = "step") -> Iterator[Task]:
        """A progress bar with ETA (on a terminal), or a plain line every few seconds (elsewhere)."""
        yield Task()
