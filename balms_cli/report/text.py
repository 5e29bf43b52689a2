"""The report's document as Markdown: the tables of the page, to read in a terminal, a pull request or a diff.

Names come from folders and manifests of anyone, so every cell is escaped.
"""

import json
from collections.abc import Iterable
from typing import Any

from ..metrics import GROUPS
from . import card
from .html import plural, points, six_digits

COLUMNS = {"top1": "top-1", "top5": "top-5", "balanced_accuracy": "balanced", "many": "many", "medium": "medium",
           "few": "few", "rarest3": "rarest 3"}  # fmt: skip
_MOST_CLASSES = 60
_LONGEST = 300  # characters of a cell


def markdown(document: dict[str, Any]) -> str:
    """The whole report as one Markdown text; pictures, curves and the classes of a large data set stay in their files."""
    parts = [_head(document), _result(document), _differences(document), _seeds(document), _data(document),
             _groups(document), _pairs(document), _marginal(document), _classes(document), _recipe(document),
             _provenance(document)]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(value: Any) -> str:
    """A value as text in which Markdown and HTML find nothing of theirs, on one line and not too long."""
    text = str(value)
    return card.markdown(text if len(text) <= _LONGEST else text[:_LONGEST] + "...")


def percent(value: float | None) -> str:
    """An accuracy in percent with one decimal, an en dash for an empty group."""
    return "–" if value is None else f"{100 * six_digits(value):.1f}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {plural(count, noun)}"


def number(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A table of cells that are escaped already; the first column is text, the others are numbers."""
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _head(document: dict[str, Any]) -> str:
    data, prior = document["data"], document["target_prior"]
    lines = [
        f"# {escape(data['name'])}: {document['split']} split",
        f"{_counted(document['images'], 'image')} of {_counted(len(data['classes']), 'class')}, scored on "
        f"{document['created'][:10]} "
        f"({escape(document['device'])}, balms {escape(document['versions'].get('balms'))}). Accuracies in percent.",
    ]
    if prior:
        lines.append(f"Scores are re-scored for another class prior: {escape(prior['prior'])}, tau {prior['tau']:g}.")
        inexact = [escape(run["name"]) for run in document["runs"] if not run["prior_exact"]]
        if inexact:
            lines.append(f"The prior that training left in the scores of {', '.join(inexact)} is not known exactly; that of "
                         "its training law was taken.")  # fmt: skip
    return "\n\n".join(lines)


def _result(document: dict[str, Any]) -> str:
    def cell(found: dict[str, Any] | None) -> str:
        return "–" if found is None else f"{percent(found['value'])} ({percent(found['low'])}–{percent(found['high'])})"

    rows = [
        [escape(run["name"]), *(cell(run["metrics"][m]) for m in COLUMNS), percent(run["calibration"]["all"]["ece"])]
        for run in document["runs"]
    ]
    way = document["intervals"]
    notes = [
        f"In brackets: {100 * way['level']:.0f} % interval over the choice of test images ({escape(way['method'])}, "
        f"{way['draws']:,} draws). many, medium, few: mean over the classes with more than 100, 20 to 100, under 20 "
        "training images. ECE: expected calibration error."
    ]
    notes += [
        f"- {escape(run['name'])} never predicts {run['never_predicted']:,} of the classes."
        for run in document["runs"] if run["never_predicted"]
    ]  # fmt: skip
    notes += [
        f"- {escape(run['name'])} was trained on another draw of the data." for run in document["runs"] if not run["same_data"]
    ]
    return "\n\n".join(["## Accuracy", table(["run", *COLUMNS.values(), "ECE"], rows), notes[0], "\n".join(notes[1:])]).rstrip()


def _differences(document: dict[str, Any]) -> str:
    apart = [escape(run["name"]) for run in document["runs"] if not run["same_images"]]
    note = f"Not compared, as scored on other images: {', '.join(apart)}." if apart else ""
    found = document["differences"]
    if not found:
        return f"## Differences\n\n{note}" if apart else ""

    def cell(one: dict[str, Any] | None) -> str:
        if one is None:
            return "–"
        mark = " \\*" if one["real"] else ""
        value, low, high = (points(one[key], sign=True) for key in ("value", "low", "high"))
        return f"{value}{mark} ({low} to {high})"

    rows = [[escape(one["run"]), *(cell(one["metrics"][m]) for m in COLUMNS)] for one in found]
    text = f"Points more than {escape(found[0]['against'])} on the same images, and 95 % interval; \\*: it leaves out 0."
    return "\n\n".join(part for part in ["## Differences", table(["run", *COLUMNS.values()], rows), text, note] if part)


def _seeds(document: dict[str, Any]) -> str:
    def cell(one: dict[str, Any] | None) -> str:
        return "–" if one is None else f"{percent(one['mean'])} ± {percent(one['error'])}"

    rows = [[escape(one["label"]), escape(f"{len(one['runs'])} runs: {one['varied']}"),
             *(cell(one["metrics"][m]) for m in COLUMNS)] for one in document["seeds"]]  # fmt: skip
    if not rows:
        return ""
    return f"## Seeds\n\n{table(['method', 'over', *COLUMNS.values()], rows)}\n\nMean and its standard error."


def _data(document: dict[str, Any]) -> str:
    data = document["data"]
    rows = [[g, *(f"{of[key]:,}" for key in ("classes", "train_images", "test_images"))] for g, of in data["groups"].items()]
    counts = data["train_counts"]
    facts = [
        f"- source {escape(data['source'])}, profile {escape(data['profile'])}, seed {data['seed']}",
        f"- {_counted(data['train_images'], 'training image')}, {max(counts):,} to {min(counts):,} a class: imbalance factor "
        f"{data['imbalance_factor']:g}, Gini {number(data['gini'])}, {percent(data['head_share'])} % in the largest "
        f"{'tenth of the classes' if len(counts) > 10 else 'class'}",
        f"- splits: {', '.join(f'{name} {count:,}' for name, count in data['splits'].items())}"
        + (f"; {_counted(data['untested'], 'class')} without an image in this one" if data["untested"] else ""),
        f"- sha256 of the index: {escape(data['manifest_sha256'])}",
    ]
    return "\n\n".join(["## Data", "\n".join(facts), table(["group", "classes", "training images", "test images"], rows)])


def _groups(document: dict[str, Any]) -> str:
    rows = []
    for run in document["runs"]:
        for group in GROUPS:
            cells, sure = run["confusion"]["groups"][group], run["calibration"][group]
            if cells:
                rows.append([escape(run["name"]), group, *(percent(cells[key]) for key in ("right", *GROUPS)),
                             percent(sure["confidence"]), percent(sure["ece"])])  # fmt: skip
    columns = ["run", "images of", "right", *(f"wrongly {group}" for group in GROUPS), "mean score", "ECE"]
    text = "Of a group's images the percentage that is right, and that is wrongly taken for a class of each group."
    return "\n\n".join(["## Between groups", table(columns, rows), text])


def _pairs(document: dict[str, Any]) -> str:
    names = document["data"]["classes"]
    rows = [
        [escape(run["name"]), escape(names[pair["true"]]), escape(names[pair["predicted"]]), str(pair["count"]),
         percent(pair["share"])]
        for run in document["runs"] for pair in run["confusion"]["pairs"]
    ]  # fmt: skip
    if not rows:
        return ""
    return "## Most confused classes\n\n" + table(["run", "class", "taken for", "images", "% of the class"], rows)


def _marginal(document: dict[str, Any]) -> str:
    rows = [[escape(run["name"]), *(number(run["marginal"][g]) for g in GROUPS), number(run["marginal"]["variance"]),
             number(run["marginal"]["kl_from_uniform"]), *(number((run["trend"] or {}).get(k)) for k in ("slope", "spearman")),
             number((run["rates"] or {}).get("variance"))] for run in document["runs"]]  # fmt: skip
    columns = ["run", *(f"p(y) {group}" for group in GROUPS), "variance", "KL from flat", "slope", "Spearman", "rates' variance"
               ]  # fmt: skip
    text = (
        "p(y): mean score of a class over the images, where 1 is its fair part; flat is balanced. Slope: accuracy gained "
        "with ten times the training images; Spearman: rank correlation of a class's accuracy with its training images."
    )
    notes = {run["marginal"]["note"] for run in document["runs"]} - {None}
    return "\n\n".join(["## Balance", table(columns, rows), text, *(f"Note: {escape(note)}." for note in sorted(notes))])


def _classes(document: dict[str, Any]) -> str:
    data, runs = document["data"], document["runs"]
    order = sorted(range(len(data["classes"])), key=lambda c: -data["train_counts"][c])
    cut = len(order) > _MOST_CLASSES
    half = _MOST_CLASSES // 2

    def row(c: int) -> list[str]:
        return [escape(data["classes"][c]), f"{data['train_counts'][c]:,}", f"{data['test_counts'][c]:,}",
                *(percent(run["per_class"]["accuracy"][c]) for run in runs)]  # fmt: skip

    rows = [row(c) for c in (order[:half] if cut else order)]
    if cut:
        rows += [["...", *[""] * (2 + len(runs))], *(row(c) for c in order[-half:])]
    columns = ["class", "training images", "test images", *(escape(run["name"]) for run in runs)]
    return "## Class by class\n\n" + table(columns, rows) + (f"\n\nAll {len(order):,} classes: classes.csv." if cut else "")


def _recipe(document: dict[str, Any]) -> str:
    runs = document["runs"]
    keys = list(dict.fromkeys(key for run in runs for key in run["recipe"]))

    def cell(found: dict[str, Any] | None) -> str:
        if found is None:
            return ""
        value = found["value"] if isinstance(found["value"], str) else json.dumps(found["value"], ensure_ascii=False)
        return escape(value) + (f" ({escape(found['source'])})" if found["source"] not in (None, "default") else "")

    rows = [[escape(key), *(cell(run["recipe"].get(key)) for run in runs)] for key in keys]
    return "## Recipe\n\n" + table(["", *(escape(run["name"]) for run in runs)], rows)


def _provenance(document: dict[str, Any]) -> str:
    runs = document["runs"]
    keys = list(dict.fromkeys(key for run in runs for key in run["provenance"]))

    def cell(value: Any) -> str:
        if isinstance(value, dict):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        return "–" if value in (None, "") else escape(value)

    rows = [["folder", *(escape(run["run"]) for run in runs)]]
    rows += [[escape(key), *(cell(run["provenance"].get(key)) for run in runs)] for key in keys]
    return "## Where it came from\n\n" + table(["", *(escape(run["name"]) for run in runs)], rows)
