"""A matplotlib figure as SVG inside the page and as a PNG beside it, from one drawing.

The figure is drawn in the colours of ``palette.LIGHT``. In the SVG each of them becomes a CSS variable, so that the page's
dark mode recolours it, and matplotlib's style attributes become classes, so that the page needs no inline styles.
"""

import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

from .html import Safe, attribute, escape
from .palette import LIGHT

WIDTH = 4.7  # inches: a figure's width in the page's column, and legible on a phone
_DPI = 200
_TITLE = 0.34  # inches: the room of a PNG's title
# For letters that matplotlib's own font lacks, in a PNG: what Linux, macOS and Windows bring along.
_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "Arial Unicode MS", "Microsoft YaHei", "Yu Gothic",
          "Malgun Gothic")  # fmt: skip
_COLOUR = re.compile("#[0-9a-f]{6}")
_SETTINGS = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.5,
    "axes.edgecolor": LIGHT["muted"], "axes.labelcolor": LIGHT["ink"], "axes.facecolor": "none", "axes.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlecolor": LIGHT["ink"],
    "axes.labelsize": 9.5, "text.color": LIGHT["ink"], "grid.color": LIGHT["line"], "grid.linewidth": 0.7,
    "xtick.color": LIGHT["muted"], "ytick.color": LIGHT["muted"], "xtick.labelcolor": LIGHT["ink"],
    "ytick.labelcolor": LIGHT["ink"], "xtick.labelsize": 9, "ytick.labelsize": 9, "xtick.major.width": 0.7,
    "ytick.major.width": 0.7, "xtick.minor.width": 0.5, "ytick.minor.width": 0.5, "legend.frameon": False,
    "legend.fontsize": 9, "legend.handletextpad": 0.5, "legend.columnspacing": 1.4, "lines.linewidth": 1.6,
    "lines.markersize": 5, "hatch.color": LIGHT["muted"], "hatch.linewidth": 0.6,
}  # fmt: skip


@contextmanager
def drawing(salt: str) -> Iterator[None]:
    """Matplotlib with our settings and no one else's; what it was set to comes back at the end. ``salt`` names the figure:
    equal for equal pages, and different for two figures of one page, whose element ids must differ."""
    import matplotlib
    from matplotlib.font_manager import get_font_names

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the PNG's fonts lack: its page has the reader's own fonts
        matplotlib.rcdefaults()
        fonts = ["DejaVu Sans", *sorted(set(_FONTS) & set(get_font_names()), key=_FONTS.index)]
        matplotlib.rcParams.update(_SETTINGS | {"font.family": fonts, "svg.hashsalt": f"balms {salt}"})
        log = logging.getLogger("matplotlib.font_manager")  # it would tell on stderr of a font that has no bold letters
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


def number(path: str, value: float) -> str:
    """The gid of a text that shows a number of the document: the SVG carries both."""
    return f"number {path} {json.dumps(value)}"


def png(figure: Any, title: str) -> bytes:
    """The figure in light colours with its title on top; the same bytes for the same figure. To be made after the SVG."""
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + _TITLE)
    for axes in figure.axes:
        box = axes.get_position()
        axes.set_position((box.x0, box.y0 * height / (height + _TITLE), box.width, box.height * height / (height + _TITLE)))
    figure.text(0.12 / width, 1 - 0.14 / (height + _TITLE), title, fontsize=10.5, fontweight="bold", va="top")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI, facecolor=LIGHT["paper"], metadata={"Software": None})
    return stream.getvalue()


class Styles:
    """The classes that stand for matplotlib's styles, over all figures of a page."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def name(self, style: str) -> str | None:
        """The class of a style attribute; None for one that says nothing."""
        rules = []
        for rule in filter(None, (part.strip() for part in style.split(";"))):
            key, _, value = (part.strip() for part in rule.partition(":"))
            if key == "font":  # a shorthand with matplotlib's font; the page has its own
                weight = re.match(r"(?:normal |italic )*(bold|\d{3}) ", value)
                rules += [f"font-size:{re.search(r'[0-9.]+px', value)[0]}", *([f"font-weight:{weight[1]}"] if weight else [])]
            elif key != "text-align":  # for browsers of long ago, beside text-anchor
                rules.append(f"{key}:{_COLOUR.sub(_variable, value)}")
        return self._names.setdefault(";".join(rules), f"f{len(self._names)}") if rules else None

    def css(self) -> str:
        return "".join(f".{name}{{{rules}}}" for rules, name in self._names.items())


def inline(figure: Any, styles: Styles, label: str, hover: dict[str, list[str]] | None = None) -> Safe:
    """The figure as an ``<svg>`` for the page, with ``label`` for those who cannot see it.

    ``hover``: names of the points of a collection by its gid, in the order in which it was drawn.
    """
    stream = io.BytesIO()
    silent = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, dpi=_DPI, metadata=silent)
    root = ElementTree.fromstring(stream.getvalue())
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', stream.getvalue().decode()))
    _name_points(root, hover or {})
    content = "".join(_write(child, styles, used) for child in root)
    start = f'<svg class="figure" viewBox="{root.get("viewBox")}" role="img" aria-label="{attribute(label)}">'
    return Safe(f"{start}{content}</svg>")


def _variable(found: re.Match) -> str:
    return f"var(--{_NAMES[found[0]]})" if found[0] in _NAMES else found[0]


_NAMES = {colour: name for name, colour in LIGHT.items()}


def _name_points(root: ElementTree.Element, hover: dict[str, list[str]]) -> None:
    for group in root.iter():
        names = hover.get(group.get("id", ""))
        if names:
            uses = [element for element in group.iter() if _bare(element.tag) == "use"]
            for use, name in zip(uses, names, strict=True):
                ElementTree.SubElement(use, "title").text = name


def _write(element: ElementTree.Element, styles: Styles, used: set[str]) -> str:
    name = _bare(element.tag)
    if name in ("metadata", "style"):
        return ""
    attributes = {}
    for key, value in element.attrib.items():
        key = _bare(key)
        if key == "style":
            if (known := styles.name(value)) is not None:
                attributes["class"] = known
        elif key == "id":
            if value in used:
                attributes["id"] = value
            elif value.startswith("number "):
                _, attributes["data-path"], attributes["data-value"] = value.split(" ", 2)
        elif key != "space":
            attributes[key] = value
    content = "".join(_write(child, styles, used) for child in element)
    text = (element.text or "") if name in ("text", "tspan", "title") else ""
    if name in ("g", "defs") and not attributes:
        return content if name == "g" or not content else f"<defs>{content}</defs>"
    if name == "defs" and not content:
        return ""
    written = "".join(f' {key}="{escape(_tidy(key, value))}"' for key, value in attributes.items())
    return f"<{name}{written}>{escape(text)}{content}</{name}>"


def _tidy(key: str, value: str) -> str:
    """Numbers to a hundredth of a point, lines joined: half the size."""
    if key in ("d", "x", "y", "transform", "points"):
        value = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
        return " ".join(value.split())
    return value


def _bare(name: str) -> str:
    return name.rpartition("}")[2]
