"""What the figures share: one width, axes placed by hand, so that figures line up, and axes and legends that read well.

Drawn with matplotlib off screen, once each; ``svg.py`` makes the page's figure and the file's of it.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any
from unicodedata import east_asian_width

from ..data.aside import printable
from .html import shorten, unturned
from .palette import LIGHT, RUN_LINES, RUN_MARKERS
from .svg import WIDTH
from .view import View

_NOT_XML = re.compile("[\ufffe\uffff]")
_LETTERS = 54  # of a legend in one row
LEFT = 0.62  # inches left of the axes
NAMED = 12  # classes that stand along an axis by name


@dataclass(frozen=True)
class Drawn:
    """A figure with what is said of it: its file's name, its title, what it shows in words, and its points' names."""

    name: str
    title: str
    label: str
    figure: Any
    hover: dict[str, list[str]] = field(default_factory=dict)


def label(name: str, most: int = 28) -> str:
    """A stranger's name as a figure shows it."""
    shown = shorten(unturned(_NOT_XML.sub("\ufffd", printable(name))), most)
    return f"\u200b{shown}" if shown.startswith("_") else shown  # matplotlib leaves such names out of legends


def _width(name: str) -> int:
    """Letters of the usual width that a name takes: Chinese, Japanese and Korean ones count twice."""
    return len(name) + sum(east_asian_width(letter) in "WF" for letter in name)


def canvas(height: float, *, left: float = LEFT, right: float = 0.24, top: float = 0.34, bottom: float = 0.5):
    """A figure of the page's width and one pair of axes; the height is the axes', margins come on top. All in inches."""
    from matplotlib.figure import Figure

    total = height + top + bottom
    figure = Figure(figsize=(WIDTH, total))
    axes = figure.add_axes((left / WIDTH, bottom / total, (WIDTH - left - right) / WIDTH, height / total))
    return figure, axes


def _columns(names: list[str]) -> int:
    """Names in a row of the legend: all where they fit, else two, else one."""
    lengths = [_width(label(name)) + 5 for name in names]
    return len(names) if sum(lengths) <= _LETTERS else 2 if 2 * max(lengths) <= _LETTERS else 1


def legend(axes, names: list[str]) -> None:
    """Above the axes, from where the axes of most figures begin. Without names there is none."""
    if not names:
        return
    box, width = axes.get_position(), axes.figure.get_size_inches()[0]
    axes.legend(loc="lower left", bbox_to_anchor=((LEFT - 0.05) / width / box.width - box.x0 / box.width, 1.0),
                ncols=_columns(names), borderaxespad=0.3, borderpad=0.2, labelspacing=0.3, handlelength=1.7,
                columnspacing=1.1)  # fmt: skip


def room(names: list[str]) -> float:
    """Inches above the axes that the legend needs."""
    return 0.14 + (0.025 + 0.175 * math.ceil(len(names) / _columns(names)) if names else 0)


def logarithmic(axis, low: float, high: float, narrow: bool = False) -> None:
    """Ticks of a logarithmic axis from ``low`` to ``high``, written out: 1, 10, 100, and 2 and 5 where there is room.

    ``narrow``: a thousand is 1k.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def written(x: float, _: int) -> str:
        if narrow and x >= 1000:
            return f"{x / 1000:g}k"
        return f"{x:,.0f}" if x >= 1 else f"{x:g}"

    subs = (1,) if high / low > 300 else (1, 2, 5) if high / low > 4 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8)
    axis.set_major_locator(LogLocator(10, subs=subs, numticks=20))
    axis.set_minor_locator(LogLocator(10, subs=range(2, 10), numticks=20))
    axis.set_major_formatter(FuncFormatter(written))
    axis.set_minor_formatter(NullFormatter())


def class_axis(axes, view: View) -> None:
    """Classes by decreasing training images along x: by name where they are few, else by rank."""
    names = [label(view.document["data"]["classes"][c], 10) for c in view.order] if len(view.order) <= NAMED else []
    if names:
        slanted = _slanted(names)
        axes.set_xticks(range(1, len(names) + 1), names, rotation=35 if slanted else 0, ha="right" if slanted else "center",
                        rotation_mode="anchor" if slanted else None)  # fmt: skip
        axes.tick_params(axis="x", length=0)
    else:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlim=(0.3, len(view.order) + 0.7), xlabel="classes, the one with most training images first")
    height = axes.figure.get_size_inches()[1] * axes.get_position().height
    axes.xaxis.set_label_coords(0.5, -(class_room(view) - 0.08) / height)
    axes.xaxis.label.set_verticalalignment("bottom")
    axes.grid(False, axis="x")


def class_room(view: View) -> float:
    """Inches under the axes that :func:`class_axis` needs."""
    names = [label(view.document["data"]["classes"][c], 10) for c in view.order] if len(view.order) <= NAMED else []
    return 0.5 if not names or not _slanted(names) else 0.44 + 0.042 * max(map(_width, names))


def _slanted(names: list[str]) -> bool:
    return len(names) * (max(map(_width, names)) + 1) > 62


def run_style(place: int, marked: bool) -> dict[str, Any]:
    """Colour, line and marker of a run by its place among the shown ones: the same in every figure."""
    return {"color": LIGHT[f"run{place}"], "linestyle": RUN_LINES[place], "marker": RUN_MARKERS[place] if marked else None}
