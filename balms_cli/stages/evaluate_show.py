"""How ``balms evaluate`` shows its figures on stderr."""

from pathlib import Path
from typing import Any

from ..report.html import plural, points
from ..report.scored import Scored
from ..report.text import COLUMNS, percent
from ..reporter import Reporter

_SHOWN = 30
_HEADINGS = list(COLUMNS.values())


def show(scored: list[Scored], names: list[str], reporter: Reporter) -> None:
    """One table over the runs, by their short ``names``, an interval under each figure; for a single run, its classes too."""
    results = [one.result for one in scored]
    first = results[0]
    images = f"{first['images']:,} {plural(first['images'], 'image')}"
    title = f"{scored[0].manifest.name}, {first['split']} split, {images}, accuracy %"
    if "target_prior" in first:
        title += f", re-scored for the {first['target_prior']} prior (tau {first['posthoc_tau']:g})"
    title += ", and below it its 95 % interval"
    rows = [[name, *(with_interval(r[m], r["intervals"][m]) for m in COLUMNS), percent(r["ece"])]
            for name, r in zip(names, results, strict=True)]  # fmt: skip
    reporter.table(title, ["run", *_HEADINGS, "ECE"], rows)
    if len(results) == 1:
        rows = sorted(first["per_class"], key=lambda c: -c["train_count"])
        half = _SHOWN // 2
        shown = rows if len(rows) <= _SHOWN else [*rows[:half], None, *rows[-half:]]
        reporter.table("class by class", ["class", "training images", "test images", "accuracy"],
                       [["...", "", "", ""] if c is None else [c["name"], str(c["train_count"]), str(c["test_count"]),
                        percent(c["accuracy"])] for c in shown])  # fmt: skip


def with_interval(value: float | None, interval: list[float] | None) -> str:
    """``45.9`` over ``45.0–46.8``."""
    return percent(value) if interval is None else f"{percent(value)}\n{percent(interval[0])}–{percent(interval[1])}"


def show_differences(differences: list[dict[str, Any]], left_out: list[str], reporter: Reporter) -> None:
    """What each further run gains over the first on the same images; and which runs have other images."""
    if differences:

        def cell(found: dict[str, Any] | None) -> str:
            if found is None:
                return "–"
            mark = " *" if found["real"] else ""
            value, low, high = (points(found[key], sign=True) for key in ("value", "low", "high"))
            return f"{value}{mark}\n{low} to {high}"

        rows = [[one["run"], *(cell(one["metrics"][m]) for m in COLUMNS)] for one in differences]
        title = f"points more than {differences[0]['against']} on the same images, and 95 % interval (*: without 0)"
        reporter.table(title, ["run", *_HEADINGS], rows)
    if left_out:
        reporter.note(f"not compared image by image, as scored on other images: {', '.join(left_out)}")


def show_seeds(groups: list[dict[str, Any]], reporter: Reporter) -> None:
    """Runs of one method: mean and standard error over the seeds, by what varied."""
    if not groups:
        return

    def cell(found: dict[str, Any] | None) -> str:
        return "–" if found is None else f"{percent(found['mean'])}\n±{percent(found['error'])}"

    rows = [[f"{one['label']}\n{len(one['runs'])} runs: {one['varied']}", *(cell(one["metrics"][m]) for m in COLUMNS)]
            for one in groups]  # fmt: skip
    reporter.table("mean ± standard error over runs that differ in seeds alone", ["method", *_HEADINGS], rows)


def show_bound(result: dict[str, Any], reporter: Reporter) -> None:
    """The terms of the bound, class by class, and what they are not."""
    bound = result["bound"]
    columns = ["class", "n", "margin gamma*", "loss margin 5 %", "median", "error", "error at gamma*", "complexity", "epsilon"]

    def cells(name: str, n: str, row: dict[str, Any]) -> list[str]:
        quantiles = row["margin_quantiles"]
        numbers = [row["gamma"], quantiles["q5"], quantiles["q50"], row["error"], row["margin_error"], row["complexity"],
                   row["epsilon"]]  # fmt: skip
        return [name, n, *("–" if v is None else f"{v:.3f}" for v in numbers)]

    rows = [cells(name, str(row["n"]), row) for name, row in zip(bound["classes"], bound["per_class"], strict=True)]
    half = _SHOWN // 2
    shown = rows if len(rows) <= _SHOWN else [*rows[:half], ["..."] + [""] * 8, *rows[-half:]]
    title = f"{Path(result['run']).name}: terms of the bound on {bound['images']} training images, t = {bound['threshold']:.3f}"
    reporter.table(title, columns, [*shown, cells("mean", "", bound["mean"])])
    reporter.note(f"complexity: relative to sqrt(C(F)); margins gamma* make its sum {bound['complexity_ratio']:.3f} of that "
                  f"of equal margins. B in epsilon: {bound['loss_range']:.2f} ({bound['loss_range_source']}). "
                  f"{bound['note']}")  # fmt: skip
