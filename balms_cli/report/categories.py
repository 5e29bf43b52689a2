"""The figure of ``balms detect evaluate``: AP of each category against its training images."""

from typing import Any

import numpy as np

from .canvas import canvas, label, logarithmic
from .palette import LIGHT, MARKERS
from .svg import drawing, png

# A group's name, and the place it takes in the palette: the fewest images have the colour of few-shot classes.
_GROUPS = {"f": ("frequent", "many"), "c": ("common", "medium"), "r": ("rare", "few")}
_WHAT = {"bbox": "boxes", "segm": "masks"}


def category_png(name: str, rows: list[dict[str, Any]], kind: str) -> bytes:
    """``rows`` of one run, each with ``train_images`` (0: never seen, drawn at the left edge), ``frequency`` and AP of
    ``kind``, bbox or segm. A line is the mean of each group."""
    title = f"{label(name)}: AP of {_WHAT[kind]} by category"
    with drawing(title):
        figure, axes = canvas(2.6, top=0.36)
        most = max(2, *(row["train_images"] for row in rows))
        seen = [max(0.5, row["train_images"]) for row in rows]
        jitter = np.random.default_rng(0).uniform(-0.02, 0.02, len(rows))  # decades: many categories have 1, 2, 3 images
        for group, (word, place) in _GROUPS.items():
            own = [i for i, row in enumerate(rows) if row["frequency"] == group]
            if not own:
                continue
            x = np.array([seen[i] for i in own]) * 10 ** jitter[own]
            y = 100 * np.array([rows[i][kind] for i in own])
            axes.plot(x, y, MARKERS[place], color=LIGHT[place], markersize=4.5, alpha=0.75, markeredgewidth=0, clip_on=False,
                      label=f"{word}: {y.mean():.1f}")  # fmt: skip
            axes.plot([min(x), max(x)], [y.mean()] * 2, color=LIGHT[place], linewidth=1.4)
        axes.set_xscale("log")
        low = 0.42 if min(seen) < 1 else 0.85
        unseen = " (left edge: none)" if min(seen) < 1 else ""
        axes.set(xlim=(low, most * 1.25), ylim=(0, 100), xlabel=f"training images of the category{unseen}",
                 ylabel="AP, % (line: mean of the group)")  # fmt: skip
        logarithmic(axes.xaxis, low, most)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, borderaxespad=0.2, handletextpad=0.2)
        return png(figure, title)
