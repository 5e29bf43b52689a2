"""What people see: everything on stderr, so that stdout holds the result alone.

On a terminal: bars with ETA. Elsewhere: a plain line every few seconds. ``--quiet``: nothing but errors.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich import markup
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..data.aside import printable
from ..reporter import Reporter, Task

_PLAIN_SECONDS = 5.0
_LEAST = 16  # characters of a line of text in a table, before its numbers go into a second one
_NUMBER = re.compile(r"(?:[-\d.,%+−±~*–\s]|\bto\b)*")  # 45.9, an interval below it, a dash, a mark


class _Stderr(Console):
    def on_broken_pipe(self) -> None:
        self.quiet = True  # whoever read the log is gone (`2>&1 | head`, Ctrl-C with `| tee`): the work goes on, and is saved


def stderr() -> Console:
    """A console on the stderr of this moment (tests and pipes change it). A log is wider than Rich's guess of 80."""
    log = not sys.stderr.isatty() and "COLUMNS" not in os.environ
    return _Stderr(stderr=True, highlight=False, emoji=False, width=120 if log else None)


def escape(text: str) -> str:
    """Text as it is: no markup of Rich's, and no control characters, by which a name could steer the terminal."""
    return markup.escape("\n".join(map(printable, text.split("\n"))))


def print_result(result: dict[str, Any] | str) -> None:
    """The one thing on stdout: a path on a line, or one JSON object."""
    text = result if isinstance(result, str) else json.dumps(result, allow_nan=False)
    try:
        sys.stdout.write(text + "\n")
    except UnicodeEncodeError:  # a code page that lacks one of its characters: escaped there, in JSON nothing is lost
        code = sys.stdout.encoding
        sys.stdout.write(text.encode(code, "backslashreplace").decode(code) + "\n")
    sys.stdout.flush()


def print_error(message: str) -> None:
    stderr().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def make_reporter(quiet: bool) -> Reporter:
    return Reporter() if quiet else ConsoleReporter()


class ConsoleReporter(Reporter):
    """Draws what a stage reports with Rich."""

    def __init__(self) -> None:
        self.console = stderr()

    def note(self, message: str) -> None:
        self.console.print(escape(message), soft_wrap=True)

    def warn(self, message: str) -> None:
        self.console.print(f"[yellow]warning:[/] {escape(message)}", soft_wrap=True)

    def table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Text folds where it has to; a number never does: columns that do not fit go into another table below."""
        rows = [[str(cell) for cell in row] for row in rows]
        cells = [[row[i] for row in rows] for i in range(len(columns))]
        room = self.console.width
        tight = sum(_wide([heading, *of]) + 3 for heading, of in zip(columns, cells, strict=True)) + 1 > room
        for n, block in enumerate(_blocks(columns, cells, room)):
            table = Table(title=None if n else escape(title), title_justify="left", title_style="bold")
            for i in block:
                number = _is_number(i, cells[i])
                broken = tight and number and cell_len(columns[i]) > _wide(cells[i])
                heading = columns[i].replace(" ", "\n") if broken else columns[i]
                table.add_column(escape(heading), justify="right" if i else "left", overflow="fold", no_wrap=number)
            for row in rows:
                table.add_row(*(escape(row[i]) for i in block))
            self.console.print(table)

    def bars(self, title: str, labels: list[str], values: list[float], texts: list[str]) -> None:
        wide = max(map(cell_len, labels))
        room = max(10, min(60, self.console.width - 4 - wide - max(map(len, texts))))
        top = max(values) or 1
        self.console.print(f"[bold]{escape(title)}[/]")
        for label, value, text in zip(labels, values, texts, strict=True):
            bar = "█" * max(1, round(room * value / top)) if value > 0 else ""
            indent = " " * (wide - cell_len(label))
            self.console.print(f"{indent}{escape(label)} [cyan]{bar}[/] {escape(text)}", soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: int, unit: str = "step") -> Iterator[Task]:
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            yield _PlainTask(self.console, description, total, unit)
            return
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(f"{unit}s"),
                   TimeElapsedColumn(),
                   TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[metrics]}")]  # fmt: skip
        with Progress(*columns, console=self.console) as progress:
            yield _BarTask(progress, progress.add_task(description, total=total, metrics=""))


def _is_number(i: int, cells: list[str]) -> bool:
    return i > 0 and all(_NUMBER.fullmatch(cell) for cell in cells)


def _wide(texts: list[str]) -> int:
    """Cells of the terminal that the longest line takes."""
    return max((cell_len(line) for text in texts for line in text.split("\n")), default=0)


def _blocks(columns: list[str], cells: list[list[str]], room: int) -> list[list[int]]:
    """The columns of each table: one where all fit into ``room``, else as many as it takes, each led by the same text."""
    need = [max(_wide(of), _wide(heading.split(" "))) if _is_number(i, of) else min(_LEAST, _wide([heading, *of]))
            for i, (heading, of) in enumerate(zip(columns, cells, strict=True))]  # fmt: skip
    first = next((i for i, of in enumerate(cells) if _is_number(i, of)), len(columns))
    lead, blocks = list(range(first)), [list(range(first))]
    for i in range(first, len(columns)):
        if len(blocks[-1]) > len(lead) and sum(need[c] + 3 for c in [*blocks[-1], i]) + 1 > room:
            blocks.append([*lead])
        blocks[-1].append(i)
    return blocks


def _metrics_text(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name.replace('_per_second', '/s')} {value:.4g}" for name, value in metrics.items())


class _BarTask(Task):
    def __init__(self, progress: Progress, identity: Any) -> None:
        self.progress, self.identity = progress, identity

    def advance(self, amount: int = 1, **metrics: float) -> None:
        fields = {"metrics": _metrics_text(metrics)} if metrics else {}
        self.progress.update(self.identity, advance=amount, **fields)

    def skip(self, amount: int) -> None:
        self.progress.update(self.identity, completed=amount)


class _PlainTask(Task):
    """One line every few seconds, and one at the end: a log that stays readable."""

    def __init__(self, console: Console, description: str, total: int, unit: str) -> None:
        self.console, self.description, self.total, self.unit = console, description, total, unit
        self.done, self.began, self.said = 0, time.monotonic(), time.monotonic()
        self.skipped = 0

    def advance(self, amount: int = 1, **metrics: float) -> None:
        self.done += amount
        clock = time.monotonic()
        if clock - self.said < _PLAIN_SECONDS and self.done < self.total:
            return
        self.said, elapsed = clock, clock - self.began
        fresh = self.done - self.skipped
        left = elapsed / fresh * (self.total - self.done) if fresh > 0 else 0.0
        ending = f"{elapsed:.0f} s" if self.done >= self.total else f"{left:.0f} s left"
        line = f"{self.description}: {self.done}/{self.total} {self.unit}s, {ending}  {_metrics_text(metrics)}"
        self.console.print(escape(line.rstrip()), soft_wrap=True)

    def skip(self, amount: int) -> None:
        self.done = self.skipped = amount
