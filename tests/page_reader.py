"""A report's page as a reader of HTML sees it: every element, every number with its place, the text outside of numbers."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "col"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""  # of the element and all in it
    inside: tuple[str, ...] = ()  # tags around it, outermost first


@dataclass
class Page(HTMLParser):
    source: str
    elements: list[Element] = field(default_factory=list)

    def __post_init__(self):
        super().__init__(convert_charrefs=True)
        self._open: list[Element] = []
        self.feed(self.source)
        assert not self._open, f"never closed: {[e.tag for e in self._open]}"

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs), inside=tuple(e.tag for e in self._open))
        assert len(attrs) == len(element.attributes), f"an attribute is given twice: {attrs}"
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open and self._open[-1].tag == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data):
        for element in self._open:
            element.text += data

    def all(self, tag: str, **attributes: str) -> list[Element]:
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        return [e for e in self.elements if e.tag == tag and all(e.attributes.get(k) == v for k, v in wanted.items())]

    def one(self, tag: str, **attributes: str) -> Element:
        (found,) = self.all(tag, **attributes)
        return found

    def numbers(self) -> list[tuple[str, str | None, str, str]]:
        """(place, place of the subtrahend, value, text) of every number, in HTML and in figures."""
        found = [(e.attributes, e.attributes["value"], e.text) for e in self.all("data")]
        found += [(e.attributes, e.attributes["data-value"], e.text) for e in self.all("g") if "data-path" in e.attributes]
        return [(of["data-path"], of.get("data-minus"), value, text) for of, value, text in found]


def look_up(document, place: str):
    """What stands in the document at a place such as ``runs.0.metrics.few.value``."""
    for key in place.split("."):
        key = key.replace("~1", ".").replace("~0", "~")
        if key == "#":
            document = len(document)
        else:
            document = document[int(key)] if isinstance(document, list) else document[key]
    return document


def check_numbers(page: Page, document) -> set[str]:
    """Every number of the page is the document's, and its text is that number rounded. Returns the places seen."""
    numbers = page.numbers()
    for place, minus, value, text in numbers:
        found = look_up(document, place) - (look_up(document, minus) if minus else 0)
        assert json.loads(value) == found, place
        assert reads_as(text, found), f"{place}: {found} is shown as {text}"
    return {place for place, *_ in numbers}


def reads_as(text: str, value: float) -> bool:
    """Whether a text is a number rounded: itself or in percent, with its sign or as a size."""
    text = text.strip().replace(",", "").replace("−", "-").replace("+", "")
    decimals, shown = len(text.partition(".")[2].partition("e")[0]), float(text)
    rounded = [float(f"{value:.4g}"), *(float(f"{scale * value:.{decimals}f}") for scale in (1, 100))]
    return any(shown in (x, abs(x)) for x in rounded)
