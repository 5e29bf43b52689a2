"""A report as a folder that appears whole or not at all: the page, its figures, and the document's numbers as JSON, CSV
and Markdown.

A report replaces an earlier one where that is asked for, and nothing else: ``.balms-report`` in its folder lists the files
that are the report's, and a folder with any other file in it is left alone.
"""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.aside import folder_aside, inert, printable, write_error
from ..engine.run_dir import check_place
from ..errors import ConfigError
from ..metrics import GROUPS, SCALARS
from ..reporter import Reporter
from .scored import Scored
from .text import markdown

PAGE, DOCUMENT, TEXT, LISTING = "index.html", "report.json", "report.md", ".balms-report"
_MAX_LISTING = 1_000_000  # bytes


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that a report must not be written to. Raises: ConfigError (exit 2)."""
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--report {folder} is a file; a report is a folder: choose another name")
        if Path.cwd().is_relative_to(folder.resolve()):
            raise ConfigError(f"--report {folder} holds the folder that you work in: choose a folder for the report alone")
        check_place(folder)
        check_place(folder.resolve().parent)
        if not folder.is_dir() or not any(folder.iterdir()):
            return
        if not overwrite:
            raise ConfigError(f"--report {folder} is not empty; choose another, or --overwrite to replace a report there")
        foreign = _foreign(folder)
    except OSError as error:
        raise write_error(error, folder) from None
    except RuntimeError:  # of Python up to 3.12, for a link that leads back to itself
        raise ConfigError(f"--report {folder} is a link that leads nowhere; choose another folder") from None
    if foreign:
        what = ", ".join(printable(name) for name in foreign[:3])
        raise ConfigError(f"--report {folder} holds other files too, such as {what}: it is left alone; choose another folder")


def _foreign(folder: Path) -> list[str]:
    """Files in ``folder`` that its listing does not name, a few at most; all of them where it has no listing."""
    listing, ours = folder / LISTING, {LISTING}
    if listing.is_file() and listing.stat().st_size <= _MAX_LISTING:
        ours |= set(listing.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
    found: list[str] = []
    for place, folders, files in os.walk(folder, onerror=_refuse):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        names = sorted((Path(place) / name).relative_to(folder).as_posix() for name in [*files, *links])
        found += [name for name in names if name not in ours]
        if len(found) >= 3:
            break  # enough to refuse: a whole disk need not be walked
    return found


def _refuse(error: OSError) -> None:
    """A folder that cannot be looked into may hold anything."""
    raise error


def write_report(document: dict[str, Any], scored: list[Scored], folder: Path, reporter: Reporter, *,
                 overwrite: bool = False) -> None:  # fmt: skip
    """Write the report of ``document`` to ``folder``.

    Raises: ConfigError for a folder in use or not to be written to, DataError for a full disk; nothing is left then, and
    an earlier report stays as it was.
    """
    from .page import write_page  # matplotlib, so only where a report is asked for

    with folder_aside(folder.resolve()) as fresh:
        (fresh / DOCUMENT).write_text(json_text(document), encoding="utf-8")
        (fresh / TEXT).write_text(markdown(document), encoding="utf-8")
        for name, text in csv_files(document):
            (fresh / name).write_text(text, encoding="utf-8", newline="")
        write_page(document, scored, fresh, reporter)
        names = sorted(path.relative_to(fresh).as_posix() for path in fresh.rglob("*") if path.is_file())
        (fresh / LISTING).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        check_folder(folder, overwrite=overwrite)  # once more: scoring and drawing took a while


def json_text(document: dict[str, Any]) -> str:
    """A line a top-level entry: as small as JSON gets, and still something that ``grep`` and a diff can work on."""
    entries = (f"{json.dumps(key)}: {_compact(value)}" for key, value in document.items())
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def csv_files(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and content of each table. Fractions from 0 to 1; an empty cell where there is nothing to measure.

    A name that a spreadsheet would run as a formula has an apostrophe before it; ``report.json`` has it as it is.
    """
    for name, rows in (
        ("runs.csv", _runs(document)), ("classes.csv", _classes(document)), ("pairs.csv", _pairs(document)),
        ("groups.csv", _groups(document)), ("calibration.csv", _calibration(document)), ("curves.csv", _curves(document)),
        ("differences.csv", _differences(document)), ("seeds.csv", _seeds(document)),
    ):  # fmt: skip
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        first = next(rows)
        count = 0
        for row in rows:
            if not count:
                writer.writerow(first)
            count += 1
            writer.writerow([inert(cell) for cell in row])
        if count:  # a single run has no differences: no file rather than an empty one
            yield name, stream.getvalue()


def _runs(document: dict[str, Any]) -> Iterator[list[Any]]:
    yield ["run", "folder", "stage", "classifier", "loss", "sampler", "seed", "images",
           *(f"{m}{part}" for m in SCALARS for part in ("", "_low", "_high")), "ece", "never_predicted",
           "marginal_variance", "marginal_kl", "trend_slope", "trend_spearman"]  # fmt: skip
    for run in document["runs"]:
        cells = [(run["metrics"][m] or {}).get(part) for m in SCALARS for part in ("value", "low", "high")]
        trend = run["trend"] or {}
        yield [*(run[key] for key in ("name", "run", "stage", "classifier", "loss", "sampler", "seed", "images")), *cells,
               run["calibration"]["all"]["ece"], run["never_predicted"], run["marginal"]["variance"],
               run["marginal"]["kl_from_uniform"], trend.get("slope"), trend.get("spearman")]  # fmt: skip


def _classes(document: dict[str, Any]) -> Iterator[list[Any]]:
    yield ["run", "class", "group", "train_count", "test_count", "accuracy", "low", "high", "predicted", "mean_score", "rate"]
    data = document["data"]
    for run in document["runs"]:
        of = run["per_class"]
        rates = run["rates"]["values"] if run["rates"] else [None] * len(data["classes"])
        columns = [data["classes"], *(run[key] or data[key] for key in ("group_of", "train_counts", "test_counts")),
                   of["accuracy"], of["low"], of["high"], of["predicted"], of["mean_score"], rates]  # fmt: skip
        for row in zip(*columns, strict=True):
            yield [run["name"], *row]


def _pairs(document: dict[str, Any]) -> Iterator[list[Any]]:
    yield ["run", "true", "predicted", "count", "share"]
    names = document["data"]["classes"]
    for run in document["runs"]:
        for pair in run["confusion"]["pairs"]:
            yield [run["name"], names[pair["true"]], names[pair["predicted"]], pair["count"], pair["share"]]


def _groups(document: dict[str, Any]) -> Iterator[list[Any]]:
    yield ["run", "group", "right", *(f"wrong_as_{group}" for group in GROUPS), "marginal", "ece"]
    for run in document["runs"]:
        for group in GROUPS:
            cells, sure = run["confusion"]["groups"][group], run["calibration"][group]
            if cells:
                yield [run["name"], group, cells["right"], *(cells[other] for other in GROUPS), run["marginal"][group],
                       sure and sure["ece"]]  # fmt: skip


def _calibration(document: dict[str, Any]) -> Iterator[list[Any]]:
    yield ["run", "group", "low", "high", "images", "confidence", "accuracy"]
    for run in document["runs"]:
        for group in ("all", *GROUPS):
            for one in (run["calibration"][group] or {"bins": []})["bins"]:
                yield [run["name"], group, one["low"], one["high"], one["n"], one["confidence"], one["accuracy"]]


def _curves(document: dict[str, Any]) -> Iterator[list[Any]]:
    yield ["run", "stage", "step", "loss", "lr"]
    for run in document["runs"]:
        for curve in (run["parent_curves"], run["curves"]):
            if curve:
                for row in zip(curve["step"], curve["loss"], curve["lr"], strict=True):
                    yield [run["name"], curve["stage"], *row]


def _differences(document: dict[str, Any]) -> Iterator[list[Any]]:
    yield ["run", "against", "metric", "value", "low", "high", "real"]
    for one in document["differences"]:
        for metric, found in one["metrics"].items():
            if found:
                yield [one["run"], one["against"], metric, found["value"], found["low"], found["high"], found["real"]]


def _seeds(document: dict[str, Any]) -> Iterator[list[Any]]:
    yield ["method", "varied", "metric", "mean", "standard_error", "runs"]
    for one in document["seeds"]:
        for metric, found in one["metrics"].items():
            if found:
                yield [one["label"], one["varied"], metric, found["mean"], found["error"], found["n"]]
