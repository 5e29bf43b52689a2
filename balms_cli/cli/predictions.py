"""How ``balms predict`` gives out what it finds, batch by batch: lines for programs, a table for people."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing

from ..data.aside import printable
from ..data.folders import undecoded
from ..errors import DataError
from ..reporter import Reporter
from .console import print_result

_SECONDS = 10.0  # between two lines that say how far it is


def paths_of(arguments: Iterable[str]) -> Iterator[str]:
    """The paths named, those on stdin at the place of ``-``: a line each, whatever bytes a file's name is of."""
    for argument in arguments:
        if argument != "-":
            yield argument
            continue
        for line in sys.stdin.buffer:
            if path := os.fsdecode(line.removesuffix(b"\n").removesuffix(b"\r")):
                yield path


def write(predictor, arguments: list[str], *, as_json: bool, quiet: bool, reporter: Reporter) -> None:
    """Raises: DataError (exit 3) where not one image could be read."""
    passed: Counter[str] = Counter()
    first = None  # of the images that could not be read, and why
    as_table = not (as_json or quiet) and sys.stdout.isatty() and sys.stderr.isatty()
    good = bad = 0
    began = said = time.monotonic()
    with closing(predictor.batches(paths_of(arguments), passed)) as batches:
        for batch in batches:
            for one in batch:
                if one.error is not None:
                    first = first or f"{printable(one.path)}: {one.error}"
                    reporter.warn(f"{printable(one.path)} is left out: {one.error}")
            read = [one for one in batch if one.error is None]
            good, bad = good + len(read), bad + len(batch) - len(read)
            if as_table and read:
                _table(predictor, read, reporter)
            elif lines := [json.dumps(predictor.to_json(one)) for one in batch] if as_json else [_line(one) for one in read]:
                print_result("\n".join(lines))
            if not as_table and time.monotonic() - said > _SECONDS:
                said = time.monotonic()
                reporter.note(f"{good + bad:,} images, {(good + bad) / (said - began):.0f} a second")
    if not good:
        raise DataError(nothing_read(bad, passed, first))
    reporter.note(f"classified: {good:,} of {good + bad:,} images in {time.monotonic() - began:.1f} s{passed_over(passed)}")


def _line(one) -> str:
    """PATH, CLASS, SCORE, and so on down to the last of the top k."""
    named = [text for name, score in zip(one.classes, one.scores, strict=True) for text in (printable(name), f"{score:.6f}")]
    return "\t".join([printable(one.path), *named])


def _table(predictor, read: list, reporter: Reporter) -> None:
    def percent(score: float) -> str:
        return f"{100 * score:.1f}"

    rows = [[printable(one.path), printable(one.classes[0]), percent(one.scores[0]),
             ", ".join(f"{printable(name)} {percent(s)} %" for name, s in zip(one.classes[1:], one.scores[1:], strict=True))]
            for one in read]  # fmt: skip
    value = predictor.temperature.value
    title = "scores in %, uncalibrated" if value is None else f"scores in %, calibrated (temperature {value:.3g})"
    reporter.table(title, ["image", "class", "score", "next"], rows)


def nothing_read(bad: int, passed: Counter[str], first: str | None) -> str:
    """``first``: an image that could not be read, and why."""
    if bad:
        return f"no image could be read, of {bad:,}; {first}"
    return f"there are no images in what was named{passed_over(passed)}"


def passed_over(passed: Counter[str]) -> str:
    if not passed:
        return ""
    kinds = ", ".join(f"{n:,} {printable(ending) or 'without ending'}" for ending, n in passed.most_common(3))
    pictures = undecoded(passed)
    return f"; other files passed over: {sum(passed.values()):,} ({kinds})" + (f"; {pictures}" if pictures else "")
