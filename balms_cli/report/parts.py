"""What the sections of the page share: the document, its numbers, and figures put in place."""

from dataclasses import dataclass, field
from typing import Any

from .canvas import Drawn, label
from .html import Numbers, Safe, join, named, shorten, tag
from .palette import MARKERS
from .svg import Styles, drawing, inline, png
from .view import View


@dataclass
class Parts:
    """The page while it is put together: every figure that is drawn leaves its PNG in ``files``."""

    document: dict[str, Any]
    thumbnails: dict[tuple[int, str], str]
    files: dict[str, bytes] = field(default_factory=dict)
    styles: Styles = field(default_factory=Styles)

    def __post_init__(self) -> None:
        self.view, self.numbers = View(self.document), Numbers(self.document)

    @property
    def several(self) -> bool:
        return len(self.view.runs) > 1

    def run(self, i: int, most: int | None = 40) -> Safe:
        return named(self.view.runs[i]["name"], most)

    def figure(self, draw, *arguments: Any) -> Safe:
        """What a function of ``figures.py`` draws, as an element; empty where there is nothing to draw."""
        with drawing(f"{draw.__name__} {arguments}"):
            drawn: Drawn | None = draw(self.view, *arguments)
            if drawn is None:
                return Safe("")
            svg = inline(drawn.figure, self.styles, drawn.label, drawn.hover)
            self.files[f"{drawn.name}.png"] = png(drawn.figure, label(drawn.title, 48))
        link = tag("a", "PNG", href=f"{drawn.name}.png", aria_label=f"{drawn.title} as PNG")
        title = tag("div", tag("h3", shorten(drawn.title, 70)), link, class_="title")
        return tag("figure", title, svg, id=f"figure-{drawn.name}")


def section(name: str, title: str, *content: Any) -> Safe:
    return tag("section", tag("h2", title, id=f"{name}-title"), *content, id=name, aria_labelledby=f"{name}-title")


def say(*content: Any, quiet: bool = False) -> Safe:
    return tag("p", *content, class_="quiet" if quiet else None)


def grid(*content: Safe) -> Safe:
    """Figures, tables and text beside each other where there is room."""
    there = [part for part in content if part]
    return tag("div", *there, class_="figures lone" if len(there) == 1 else "figures") if there else Safe("")


def folded(summary: Any, *content: Any, opened: bool = False) -> Safe:
    return tag("details", tag("summary", summary), *content, open=opened)


SHAPES = {"o": '<circle cx="5" cy="5" r="4.5"/>', "s": '<rect x=".8" y=".8" width="8.4" height="8.4"/>',
           "^": '<path d="M5 .4 9.8 9.4H.2z"/>'}  # fmt: skip


def group_key(group: str) -> Safe:
    """A shot group's name with its mark."""
    mark = Safe(f'<svg class="key {group}" viewBox="0 0 10 10" aria-hidden="true">{SHAPES[MARKERS[group]]}</svg>')
    return tag("span", mark, f"{group}-shot", class_="group")


def listed(words: list[Any]) -> Safe:
    """a, b and c."""
    return join(words) if len(words) < 2 else join([join(words[:-1], ", "), " and ", words[-1]])
