"""The figures of accuracy: by shot group, difference by difference, class by class, between groups, and against confidence.

Shapes: C classes.
"""

import math
from typing import Any

import numpy as np

from ..metrics import GROUPS
from .canvas import Drawn, canvas, label, legend, logarithmic, room
from .html import isolated, plural, points, shorten
from .palette import LIGHT, MARKERS, RUN_MARKERS
from .svg import number
from .view import GROUP_WORDS, View

POINTS = 3000  # of the page's scatters that are elements of their own, with names; more become pixels
CROWD = 300  # classes whose points cover each other
_LINE = 5  # images of a bin that a line goes through


def groups(view: View) -> Drawn:
    """Accuracy and its interval by shot group: a block a group, in it a row a run."""
    rows = [(place, view.runs[run]["name"], {m: (f"runs.{run}.metrics.{m}.value", view.runs[run]["metrics"][m])
                                             for m in view.blocks}) for place, run in enumerate(view.shown)]  # fmt: skip
    figure, axes = _intervals(rows, view.blocks, several=len(view.runs) > 1)
    axes.set(xlim=(0, 100), xlabel="accuracy %, line: 95 % interval")
    return Drawn("accuracy-by-group", "Accuracy by shot group", f"Accuracy by shot group, in percent. {_said(rows)}", figure)


def _said(rows: list, sign: bool = False) -> str:
    """Rows of :func:`_intervals` in words."""
    return "; ".join(
        f"{name}: " + ", ".join(f"{GROUP_WORDS[m]} {points(one['value'], sign)}" for m, (_, one) in found.items() if one)
        for _, name, found in rows
    )


def differences(view: View) -> Drawn | None:
    """Paired differences to the first run: filled where the interval leaves out 0. None where nothing is compared."""
    rows, widest = [], 1.0
    for place, run in enumerate(view.shown):
        one = view.difference(run)
        if one is not None:
            k, metrics = view.document["differences"].index(one), one["metrics"]
            rows.append((place, one["run"], {m: (f"differences.{k}.metrics.{m}.value", metrics[m]) for m in view.blocks}))
            ends = [bounds[end] for bounds in map(metrics.get, view.blocks) if bounds for end in ("low", "high")]
            widest = max([widest, *(100 * abs(end) for end in ends)])
    if not rows:
        return None
    blocks = [m for m in view.blocks if any(found[m][1] for *_, found in rows)]
    figure, axes = _intervals(rows, blocks, several=True)
    axes.axvline(0, color=LIGHT["ink"], linewidth=1)
    first = view.runs[0]["name"]
    axes.set(xlim=(-1.06 * widest, 1.06 * widest), xlabel=f"points more than {label(first, 20)}; filled: real")
    said = f"Points more than {first} on the same images. {_said(rows, sign=True)}"
    return Drawn("differences", f"Difference to {isolated(shorten(first, 48))}", said, figure)


def _intervals(rows: list[tuple[int, str, dict[str, tuple[str, dict | None]]]], blocks: list[str], several: bool):
    """Values with their intervals. ``rows``: place of the run, its name, and a metric each the value's place and bounds."""
    step = 0.19
    gap = step if len(rows) > 1 else 0.11
    names = [name for _, name, _ in rows] if several else []
    figure, axes = canvas(len(blocks) * (len(rows) * step + gap), left=1.05, right=0.52, top=room(names) if names else 0.1)
    y, ticks = 0.0, []
    for metric in blocks:
        y += gap / 2
        ticks.append(y + len(rows) * step / 2)
        for place, _, found in rows:
            path, bounds = found[metric]
            if bounds is not None:
                colour = LIGHT[f"run{place}"] if several else LIGHT.get(metric, LIGHT["ink"])
                marker = RUN_MARKERS[place] if several else MARKERS.get(metric, "D")
                _interval(axes, y + step / 2, bounds, colour, marker, path)
            y += step
        y += gap / 2
        if metric != blocks[-1]:
            axes.axhline(y, color=LIGHT["line"], linewidth=0.7)
    axes.set_ylim(y, 0)
    axes.set_yticks(ticks, [GROUP_WORDS[metric] for metric in blocks])
    axes.tick_params(axis="y", length=0, pad=8)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    if names:
        for place, name, _ in rows:
            axes.plot([], [], RUN_MARKERS[place], color=LIGHT[f"run{place}"], markersize=6, label=label(name))
        legend(axes, names)
    return figure, axes


def _interval(axes, y: float, bounds: dict[str, Any], colour: str, marker: str, path: str) -> None:
    value, signed = 100 * bounds["value"], "real" in bounds
    axes.plot([100 * bounds["low"], 100 * bounds["high"]], [y, y], color=colour, linewidth=3, alpha=0.4, solid_capstyle="butt")
    axes.plot(value, y, marker, color=colour, markersize=6.5, markeredgewidth=1.1, clip_on=False, zorder=4,
              markerfacecolor=colour if bounds.get("real", True) else LIGHT["paper"])  # fmt: skip
    axes.text(1.03, y, points(bounds["value"], sign=signed), transform=axes.get_yaxis_transform(), va="center", fontsize=9,
              gid=number(path, bounds["value"]))  # fmt: skip


def by_class(view: View, run: int) -> Drawn:
    """Accuracy of each class over its training images, with the document's least-squares line."""
    one = view.runs[run]
    counts_C, groups_C = np.asarray(view.of(run, "train_counts")), np.asarray(view.of(run, "group_of"))
    accuracy_C = np.array([math.nan if a is None else 100 * a for a in one["per_class"]["accuracy"]])
    tested_C, k = ~np.isnan(accuracy_C), len(counts_C)
    pixels, spread = k * len(view.shown) > POINTS, spread_of(view, run)
    size = 38 if k <= 30 else 24 if k <= CROWD else 5 if pixels else 12
    drawn_C = accuracy_C + spread * np.random.default_rng(0).uniform(-1, 1, k)
    figure, axes = canvas(2.7)
    hover, names = {}, view.document["data"]["classes"]
    for group in GROUPS:
        of_C = np.flatnonzero(tested_C & (groups_C == group))
        if not len(of_C):
            continue
        axes.scatter(counts_C[of_C], drawn_C[of_C], size, marker=MARKERS[group], color=LIGHT[group], zorder=3, clip_on=False,
                     alpha=0.85 if k <= CROWD else 0.4, edgecolors="none" if pixels else LIGHT["paper"], linewidths=0.6,
                     gid=f"points-{group}", rasterized=pixels)  # fmt: skip
        axes.plot([], [], MARKERS[group], color=LIGHT[group], label=f"{group}-shot")
        if not pixels:
            hover[f"points-{group}"] = [f"{isolated(label(names[c], 80))}: {accuracy_C[c]:.1f} %, {counts_C[c]:,} training "
                                        f"{plural(counts_C[c], 'image')}" for c in of_C]  # fmt: skip
    if one["trend"] is not None:
        x = np.geomspace(counts_C[tested_C].min(), counts_C[tested_C].max(), 60)
        axes.plot(x, (100 * (one["trend"]["intercept"] + one["trend"]["slope"] * np.log10(x))).clip(0, 100), color=LIGHT["ink"],
                  linestyle=(0, (5, 2)), linewidth=1.3, label="trend", zorder=4)  # fmt: skip
    low, high = counts_C.min(), counts_C.max()
    spare = max((high / low) ** 0.04, 1.15)
    axes.set_xscale("log")
    axes.set(xlim=(low / spare, high * spare), ylim=(-2 - spread, 102 + spread))
    axes.set(xlabel="training images of the class", ylabel="accuracy %")
    logarithmic(axes.xaxis, low / spare, high * spare)
    legend(axes, ["many-shot", "medium-shot", "few-shot", "trend"][: len(axes.get_legend_handles_labels()[1])])
    said = ""
    if one["trend"] is not None:
        slope = one["trend"]["slope"]
        said = f" The trend goes {'up' if slope >= 0 else 'down'} by {points(slope)} points for ten times as many images."
    return Drawn(view.file("accuracy-by-class", run), view.titled("Accuracy of each class", run),
                 f"Accuracy of {tested_C.sum():,} classes over their training images.{said}", figure, hover)  # fmt: skip


def spread_of(view: View, run: int) -> float:
    """How far points of many classes are moved up or down, in accuracy percent, as classes of few test images share few
    values and would cover each other. 0 where classes are few."""
    tested_C = np.asarray(view.of(run, "test_counts"))
    return 0.0 if len(tested_C) <= CROWD else float(min(6.0, 35 / np.median(tested_C[tested_C > 0])))


def confusion(view: View, run: int) -> Drawn:
    """Where each group's images go: right, or wrongly into which group. Rows add up to 100 %."""
    from matplotlib.patches import Rectangle

    table = view.runs[run]["confusion"]["groups"]
    rows = [group for group in GROUPS if table[group] is not None]
    left_C = {"right": 0.0, **{group: 1.14 + x for x, group in enumerate(GROUPS)}}
    figure, axes = canvas(0.44 * len(rows), left=1.05, right=0.16, top=0.52, bottom=0.06)
    for y, group in enumerate(rows):
        for cell, x in left_C.items():
            value = table[group][cell]
            axes.add_patch(Rectangle((x + 0.02, y + 0.04), 0.96, 0.92, facecolor=LIGHT["good" if cell == "right" else "heat"],
                                     alpha=0.06 + 0.5 * value, linewidth=0))  # fmt: skip
            axes.text(x + 0.5, y + 0.5, points(value), ha="center", va="center", fontsize=10.5,
                      gid=number(f"runs.{run}.confusion.groups.{group}.{cell}", value))  # fmt: skip
    axes.set(xlim=(0, 4.14), ylim=(len(rows), 0))
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [f"{group}-shot" for group in rows])
    axes.set_xticks([x + 0.5 for x in left_C.values()], list(left_C))
    axes.xaxis.tick_top()
    axes.annotate("wrong, taken for a class of", (2.64, 0), (0, 25), textcoords="offset points", ha="center", fontsize=9,
                  color=LIGHT["muted"])  # fmt: skip
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    said = "; ".join(f"of {group}-shot images {points(table[group]['right'])} % right, " + ", ".join(
        f"{points(table[group][other])} % taken for {other}-shot" for other in GROUPS) for group in rows)  # fmt: skip
    return Drawn(view.file("confusion", run), view.titled("Confusion between groups, %", run), said, figure)


def reliability(view: View, run: int) -> Drawn:
    """Accuracy over confidence in equal bins, by group; a point's size is its share of the group's images."""
    found = view.runs[run]["calibration"]
    figure, axes = canvas(2.7)
    axes.plot([0, 100], [0, 100], color=LIGHT["muted"], linewidth=1, linestyle=(0, (2, 2)))
    there = [group for group in (*GROUPS, "all") if found[group] is not None]
    for group in there:
        bins = [b for b in found[group]["bins"] if b["n"]]
        line = [b for b in bins if b["n"] >= _LINE]
        colour, width = LIGHT.get(group, LIGHT["ink"]), 2 if group == "all" else 1.2
        axes.plot([100 * b["confidence"] for b in line], [100 * b["accuracy"] for b in line], color=colour, linewidth=width,
                  zorder=3)  # fmt: skip
        axes.scatter([100 * b["confidence"] for b in bins], [100 * b["accuracy"] for b in bins],
                     [9 + 110 * b["n"] / found[group]["n"] for b in bins], marker=MARKERS.get(group, "D"), color=colour,
                     edgecolors=LIGHT["paper"], linewidths=0.6, zorder=4, clip_on=False)  # fmt: skip
        axes.plot([], [], marker=MARKERS.get(group, "D"), color=colour, linewidth=width,
                  label="all" if group == "all" else f"{group}-shot")  # fmt: skip
    axes.set(xlim=(0, 102), ylim=(-1.5, 103), xlabel="score of the predicted class, %", ylabel="accuracy %")
    legend(axes, ["many-shot", "medium-shot", "few-shot", "all"][: len(there)])
    said = "; ".join(f"{group}: mean score {points(found[group]['confidence'])} %, right {points(found[group]['accuracy'])} %"
                     for group in there)  # fmt: skip
    return Drawn(view.file("reliability", run), view.titled("Reliability diagram", run),
                 f"Accuracy over score in bins. {said}", figure)  # fmt: skip
