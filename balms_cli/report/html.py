"""HTML put together from elements that escape what is in them: names of classes, runs and files are strangers' text.

Numbers stand in ``<data>`` elements with their place in the document, so that a page can be checked against its JSON.
"""

import html
import json
import re
from collections.abc import Iterable
from typing import Any

from ..data.aside import printable

_VOID = {"meta", "link", "img", "br", "col"}
# Marks that turn the direction of the text after them: harmless within <bdi>, not in plain text.
_TURNS = re.compile("[\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]")


class Safe(str):
    """Text that is HTML already; any other string is escaped where it is put in."""


def escape(text: Any) -> Safe:
    return text if isinstance(text, Safe) else Safe(html.escape(printable(str(text))))


def attribute(value: Any) -> Safe:
    """A value within the quotes of an attribute."""
    return Safe(unturned(escape(value)))


def unturned(text: str) -> str:
    """Text without marks of direction."""
    return _TURNS.sub("", text)


def isolated(text: str) -> str:
    """A stranger's name in plain text: its direction does not reach the figures after it."""
    return f"\u2068{unturned(text)}\u2069"


def join(parts: Iterable[Any], between: str = "") -> Safe:
    """Parts one after another, each escaped unless it is Safe; None is left out."""
    return Safe(escape(between).join(escape(part) for part in parts if part is not None))


def tag(name: str, /, *content: Any, **attributes: Any) -> Safe:
    """An element. ``class_`` is class, ``data_path`` is data-path; an attribute of None or False is left out, True is bare."""
    written = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            written.append(f" {key}")
        elif value is not None and value is not False:
            written.append(f' {key}="{attribute(value)}"')
    start = f"<{name}{''.join(written)}>"
    return Safe(start) if name in _VOID else Safe(f"{start}{join(content)}</{name}>")


def named(text: str, most: int | None = None) -> Safe:
    """A stranger's name: its direction does not reach beyond it, and in full it is a hover away where it is cut."""
    cut = shorten(text, most)
    return tag("bdi", cut, title=text if cut != text else None)


def shorten(text: str, most: int | None) -> str:
    """At most ``most`` characters, the last an ellipsis where some are gone."""
    return text if most is None or len(text) <= most else text[: most - 1].rstrip() + "…"


def code(command: str) -> Safe:
    return tag("code", command)


def table(caption: Any, head: list[Any], rows: Iterable[list[Any]], *, class_: str = "", named_rows: bool = True) -> Safe:
    """A table that scrolls inside its own box. The first cell of a row is its header; the others are numbers."""
    header = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    body = []
    for row in rows:
        first = tag("th", row[0], scope="row") if named_rows else tag("td", row[0])
        body.append(tag("tr", first, *(tag("td", cell) for cell in row[1:])))
    label = re.sub("<[^>]*>", "", escape(caption).replace("<small>", ", "))
    return tag("div", tag("table", tag("caption", tag("div", caption)), header, tag("tbody", *body)),
               class_=f"scroll {class_}".strip(), tabindex="0", role="region", aria_label=Safe(label))  # fmt: skip


class Numbers:
    """Numbers of the document as HTML, each with its place: ``runs.0.metrics.few.value``.

    Keys stand between dots, with ``~`` and ``.`` in them as ``~0`` and ``~1``; ``#`` is a list's length. Of a difference
    the subtrahend's place is in ``data-minus``.
    """

    def __init__(self, document: dict[str, Any]):
        self.document = document

    def at(self, *path: Any) -> Any:
        """What stands at a place; None where the way there ends early."""
        found: Any = self.document
        for key in path:
            if key == "#":
                return None if found is None else len(found)
            try:
                found = found[key]
            except (KeyError, IndexError, TypeError):
                return None
        return found

    def percent(self, *path: Any, digits: int = 1) -> Safe:
        """A fraction in percent, without the sign."""
        return self._data(path, self.at(*path), lambda value: f"{100 * value:.{digits}f}".replace("-", "−"))

    def number(self, *path: Any, digits: int = 2) -> Safe:
        return self._data(path, self.at(*path), lambda value: f"{value:.{digits}f}".replace("-", "−"))

    def short(self, *path: Any) -> Safe:
        """As short as four significant digits allow."""
        return self._data(path, self.at(*path), brief)

    def count(self, *path: Any) -> Safe:
        return self._data(path, self.at(*path), lambda value: f"{value:,}")

    def counted(self, *path: Any, noun: str) -> Safe:
        """A count and its noun: 1 class, 2 classes."""
        return join([self.count(*path), " ", plural(self.at(*path), noun)])

    def signed(self, *path: Any) -> Safe:
        """A difference of two fractions in points, with its sign."""
        return self._data(path, self.at(*path), lambda value: points(value, sign=True))

    def points(self, *path: Any) -> Safe:
        """The size of a difference in points, without its sign."""
        return self._data(path, self.at(*path), points)

    def gap(self, path: tuple, minus: tuple) -> Safe:
        """The size of the difference of two fractions in points."""
        a, b = self.at(*path), self.at(*minus)
        return self._data(path, None if a is None or b is None else a - b, points, data_minus=place(minus))

    def interval(self, *path: Any) -> Safe:
        """The interval of what stands at ``path`` (low and high), in percent."""
        if self.at(*path) is None:
            return Safe("")
        return tag("span", self.percent(*path, "low"), "–", self.percent(*path, "high"), class_="interval")

    def _data(self, path: tuple, value: float | None, show, **more: str) -> Safe:
        if value is None:
            return tag("span", "–", class_="none", title="nothing to measure")
        return tag("data", show(value), data_path=place(path), value=json.dumps(value), **more)


def place(path: Iterable[Any]) -> str:
    return ".".join(str(key).replace("~", "~0").replace(".", "~1") for key in path)


def six_digits(value: float) -> float:
    """As report.json keeps it, so that what lies on the edge of two decimals is rounded alike wherever it is shown."""
    return float(f"{value:.6g}")


def points(value: float, sign: bool = False) -> str:
    text = f"{100 * abs(six_digits(value)):.1f}"
    return ("" if text == "0.0" else "+" if value > 0 else "−") + text if sign else text


def plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"


def brief(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
