"""AP of each category against its training images: one drawing, for ``--per-category`` and for the detectors' report."""

from typing import Any

import numpy as np

from .canvas import canvas, label, logarithmic
from .palette import LIGHT, MARKERS
from .svg import drawing, png

# A group's name, and the place it takes in the palette: the fewest images have the colour of few-shot classes.
GROUPS = {"f": ("frequent", "many"), "c": ("common", "medium"), "r": ("rare", "few")}
WHAT = {"bbox": "boxes", "segm": "masks"}


def category_png(name: str, rows: list[dict[str, Any]], kind: str) -> bytes:
    """``rows`` of one run, each with ``train_images`` (0: never seen, drawn at the left edge), ``frequency`` and AP of
    ``kind``, bbox or segm. A line is the mean of each group."""
    title = f"{label(name)}: AP of {WHAT[kind]} by category"
    with drawing(title):
        return png(draw_categories(rows, kind)[0], title)


def draw_categories(rows: list[dict[str, Any]], kind: str, highest: float = 100, pixels: bool = False):
    """The figure, and its points' names by gid. ``highest``: the top of the axis, AP in percent; ``pixels``: the points are no
    elements, and have no names."""
    figure, axes = canvas(2.6, top=0.36)
    most = max([2, *(row["train_images"] for row in rows)])
    seen = [max(0.5, row["train_images"]) for row in rows]
    jitter = np.random.default_rng(0).uniform(-0.02, 0.02, len(rows))  # decades: many categories have 1, 2, 3 images
    hover = {}
    for group, (word, place) in GROUPS.items():
        own = [i for i, row in enumerate(rows) if row["frequency"] == group]
        if not own:
            continue
        x = np.array([seen[i] for i in own]) * 10 ** jitter[own]
        y = 100 * np.array([rows[i][kind] for i in own])
        axes.scatter(x, y, 20, marker=MARKERS[place], color=LIGHT[place], alpha=0.75, linewidths=0, clip_on=False,
                     label=f"{word}: {y.mean():.1f}", gid=f"points-{group}", rasterized=pixels)  # fmt: skip
        axes.plot([min(x), max(x)], [y.mean()] * 2, color=LIGHT[place], linewidth=1.4)
        hover[f"points-{group}"] = [] if pixels else [_said(rows[i], kind) for i in own]
    unseen = min(seen, default=1) < 1
    low = 0.42 if unseen else 0.85
    axes.set_xscale("log")
    axes.set(xlim=(low, most * 1.25), ylim=(0, highest), ylabel="AP, % (line: mean of the group)",
             xlabel=f"training images of the category{' (left edge: none)' if unseen else ''}")  # fmt: skip
    logarithmic(axes.xaxis, low, most)
    if hover:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, borderaxespad=0.2, handletextpad=0.2)
    return figure, hover


def _said(row: dict[str, Any], kind: str) -> str:
    """A point's name, as short as it can be: a page has thousands."""
    images, objects = row["train_images"], row["objects"]
    return f"{label(row['name'], 60)}: {100 * row[kind]:.1f}, {images:,} training images, {objects:,} test objects"
