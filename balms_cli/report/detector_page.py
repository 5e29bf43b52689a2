"""The detectors' report: one HTML page that opens from disk and fetches nothing, beside it its numbers as JSON and CSV and its
figures as PNG. The folder appears whole or not at all."""

import csv
import io
from pathlib import Path
from typing import Any

from ..data.aside import folder_aside, inert
from ..reporter import Reporter
from . import detector_sections as sections
from . import sections_data
from .detector_document import KINDS
from .detector_verdict import verdict
from .html import Safe, join, named, tag
from .page import whole
from .parts import Parts
from .svg import Styles
from .write import DOCUMENT, LISTING, PAGE, check_folder, json_text

_SHEET = """
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,14rem),1fr));gap:.75rem;margin-top:.6rem}
.panels figure{padding:.5rem}
@media (max-width:40rem){.panels{grid-template-columns:1fr 1fr}}
svg.photo{display:block;width:100%;height:auto;border-radius:6px;background:var(--soft)}
.photo rect{fill:none;vector-effect:non-scaling-stroke}
.photo .edge{stroke:#000;stroke-width:4.5;stroke-opacity:.55}
.photo .box{stroke-width:2.2}
.photo .true{stroke:#fff}.photo .hit{stroke:#2cc495}.photo .miss{stroke:#ff8b45;stroke-dasharray:6 4}
.panels figcaption{font-size:.8125rem;margin-top:.35rem}
.panels figcaption b{display:block;font-weight:600;overflow-wrap:anywhere}
.panels figcaption span{color:var(--muted)}
.tiles.groups{grid-template-columns:repeat(auto-fit,minmax(min(100%,13rem),1fr))}
sub{font-size:.75em;line-height:0}
"""


class _Styles(Styles):
    """With the rules of what this page alone has."""

    def css(self) -> str:
        return _SHEET + super().css()


def write_report(document: dict[str, Any], pictures: dict[int, str], folder: Path, reporter: Reporter | None = None, *,
                 overwrite: bool = False) -> Path:  # fmt: skip
    """Write the report of ``document`` (``detector_document.build``) to ``folder``; returns the page's path. ``pictures``:
    ``data:`` URIs by photo. Raises: as ``write.write_report``; an earlier report stays as it was then."""
    html, files = render(document, pictures, reporter)
    texts = {DOCUMENT: json_text(document), "categories.csv": _categories(document), "runs.csv": _runs(document), PAGE: html}
    with folder_aside(folder.resolve()) as fresh:
        for name, text in texts.items():
            (fresh / name).write_text(text, encoding="utf-8", newline="")
        for name, content in files.items():
            (fresh / name).write_bytes(content)
        (fresh / LISTING).write_text("".join(f"{name}\n" for name in sorted([*texts, *files])), encoding="utf-8")
        check_folder(folder, overwrite=overwrite)  # once more: drawing took a while
    return folder / PAGE


def render(document: dict[str, Any], pictures: dict[int, str], reporter: Reporter | None = None
           ) -> tuple[str, dict[str, bytes]]:  # fmt: skip
    """The page's HTML, and its figures' PNGs by file name."""
    page = Parts(document, {(0, str(photo)): uri for photo, uri in pictures.items()}, styles=_Styles())
    makers = {"scores": sections.scores, "categories": sections.categories, "true boxes": sections.true_boxes,
              "photos": sections.photos, "recipe": sections_data.recipe, "provenance": sections.provenance}  # fmt: skip
    made = []
    with (reporter or Reporter()).task("drawing the report", len(makers), unit="section") as task:
        for make in makers.values():
            made.append(make(page))
            task.advance()
    links = [tag("li", tag("a", name.capitalize(), href=f"#{name.replace(' ', '-')}")) for name in makers]
    body = join([tag("a", "Skip to the results", href="#main", class_="skip"), _header(page, links),
                 tag("main", *made, id="main"), _footer(page)])  # fmt: skip
    return whole(page, Safe(body.replace("</data> %", "</data>\u00a0%"))), page.files


def _header(page: Parts, links: list[Safe]) -> Safe:
    document, n = page.document, page.numbers
    what = [named(document["runs"][0]["name"], 80)] if not page.several else [n.count("runs", "#"), " runs"]
    about = [*what, " scored on ", n.counted("data", "photos", noun="photo"), " with ",
             n.counted("data", "objects", noun="object"), " of ", n.count("data", "tested"), " categories, ",
             tag("time", document["created"][:10], datetime=document["created"])]  # fmt: skip
    headline, points = verdict(document, n)
    told = tag("ul", *(tag("li", point) for point in points))
    said = tag("div", tag("p", headline, class_="headline"), told, class_="verdict")
    return tag("header", tag("p", tag("b", "balms"), " · detectors’ long-tail report", class_="eyebrow"),
               tag("h1", named(document["data"]["name"], 120)), tag("p", *about, class_="about"), said, sections.tiles(page),
               tag("nav", tag("ul", *links), aria_label="On this page"))  # fmt: skip


def _footer(page: Parts) -> Safe:
    files = [tag("a", name, href=name) for name in ("report.json", "categories.csv", "runs.csv")]
    version = page.document["versions"].get("balms")
    return tag("footer", tag("p", "Made by balms", f" {version}" if version else "", " from ", files[0],
                             ", which holds every number of this page. Tables: ", files[1], ", ", files[2], "."))  # fmt: skip


def _categories(document: dict[str, Any]) -> str:
    head = ["run", "id", "category", "group", "train_images", "photos", "objects", *(f"ap_{kind}" for kind in reversed(KINDS))]
    rows = [[run["name"], one["id"], one["name"], one["group"], run["train_images"][c], one["photos"], one["objects"],
             *(run["ap"].get(kind, {c: None})[c] for kind in reversed(KINDS))]
            for run in document["runs"] for c, one in enumerate(document["categories"])]  # fmt: skip
    return _csv(head, rows)


def _runs(document: dict[str, Any]) -> str:
    """A row a run and kind: all metrics, differences with p, and the accuracy at true boxes."""
    names = list(next(iter(document["runs"][0]["metrics"].values())))
    tested, groups = sections.TESTED, ("all", "r", "c", "f")
    head = ["run", "folder", "stage", "loss", "seed", "of", "detections", *names,
            *(f"{part}_{name}" for name in tested for part in ("difference", "p", "shown")),
            *(f"true_boxes_{group}{end}" for group in groups for end in ("", "_low", "_high"))]  # fmt: skip
    rows = []
    for i, run in enumerate(document["runs"]):
        for kind, metrics in run["metrics"].items():
            found = document["differences"][i - 1]["metrics"].get(kind, {}) if i else {}
            rows.append([*(run[key] for key in ("name", "run", "stage", "loss", "seed")), kind, run["detections"],
                         *metrics.values(),
                         *((found.get(name) or {}).get(part) for name in tested for part in ("value", "p", "shown")),
                         *(((run["true_boxes"] or {}).get(group) or {}).get(end) for group in groups
                           for end in ("value", "low", "high"))])  # fmt: skip
    return _csv(head, rows)


def _csv(head: list[str], rows: list[list[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([head, *([inert(cell) for cell in row] for row in rows)])
    return stream.getvalue()
