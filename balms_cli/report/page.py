"""The report as one HTML page that opens from disk: nothing in it is fetched, and each figure lies beside it as a PNG."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from ..data.aside import replace_file
from ..reporter import Reporter
from . import sections_data, sections_results, sections_scores
from .html import Safe, join, named, tag
from .parts import Parts, say
from .scored import Scored
from .style import SCRIPT, sheet
from .thumbnails import thumbnails
from .verdict import verdict
from .write import PAGE


def write_page(document: dict[str, Any], scored: list[Scored], folder: Path, reporter: Reporter | None = None) -> Path:
    """Write ``index.html`` and its figures (PNG) into ``folder``, which is there. Returns the page's path.

    ``document``: what ``report.document.build`` makes of ``scored``; every number of the page stands in it, and the page
    says where. Example images are read from the data; one that cannot be read any more has a placeholder.
    Raises: ConfigError or DataError where the folder cannot be written to.
    """
    html, files = render(document, thumbnails(scored, sections_scores.wanted(document)), reporter)
    for name, content in files.items():
        replace_file(folder / name, content)
    replace_file(folder / PAGE, html)
    return folder / PAGE


def render(document: dict[str, Any], pictures: dict[tuple[int, str], str], reporter: Reporter | None = None
           ) -> tuple[str, dict[str, bytes]]:  # fmt: skip
    """The page's HTML, and its figures' PNGs by file name. ``pictures``: data: URIs by (run, image key)."""
    page = Parts(document, pictures)
    makers = [sections_data.data, sections_results.groups, sections_results.classes, sections_scores.confusion,
              sections_scores.calibration, sections_scores.marginal, sections_data.learned, sections_data.training,
              sections_data.recipe, sections_data.provenance]  # fmt: skip
    sections = []
    with (reporter or Reporter()).task("drawing the report", len(makers), unit="section") as task:
        for make in makers:
            sections.append(make(page))
            task.advance()
    body = join([tag("a", "Skip to the results", href="#main", class_="skip"), _header(page), tag("main", *sections, id="main"),
                 _footer(page)])  # fmt: skip
    return whole(page, Safe(body.replace("</data> %", "</data>\u00a0%"))), page.files


def whole(page: Parts, body: Safe) -> str:
    css = sheet(page.styles.css())
    policy = (f"default-src 'none'; img-src data:; style-src '{_hash(css)}'; script-src '{_hash(SCRIPT)}'; base-uri 'none'; "
              "form-action 'none'")  # fmt: skip
    head = tag("head", tag("meta", charset="utf-8"),
               tag("meta", http_equiv="Content-Security-Policy", content=Safe(policy)),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("meta", name="color-scheme", content="light dark"),
               tag("meta", name="referrer", content="no-referrer"),
               tag("link", rel="icon", href="data:,"),
               tag("title", f"{page.document['data']['name']} – balms report"),
               Safe(f"<style>{css}</style>"))  # fmt: skip
    content = tag("body", body, Safe(f"<script>{SCRIPT}</script>"))
    return f"<!DOCTYPE html>\n{tag('html', head, content, lang='en')}\n"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _header(page: Parts) -> Safe:
    document, n = page.document, page.numbers
    first = document["runs"][0]
    what = [named(first["name"], 80)] if not page.several else [n.count("runs", "#"), " runs"]
    first_alone = ", the first" if not all(run["same_images"] for run in document["runs"]) else ""
    about = [*what, f"{first_alone} scored on ", n.counted("images", noun=f"{document['split']} image"), " of ",
             n.counted("data", "classes", "#", noun="class"), ", ",
             tag("time", document["created"][:10], datetime=document["created"])]  # fmt: skip
    return tag("header", tag("p", tag("b", "balms"), " · long-tail report", class_="eyebrow"),
               tag("h1", named(document["data"]["name"], 120)), tag("p", *about, class_="about"), *_prior(page), _verdict(page),
               sections_results.tiles(page), _contents(page))  # fmt: skip


def _prior(page: Parts) -> list[Safe]:
    prior = page.document["target_prior"]
    if prior is None:
        return []
    n = page.numbers
    inexact = [page.run(i) for i, run in enumerate(page.view.runs) if not run.get("prior_exact", True)]
    return [say("Scores are re-scored for another class prior: ", named(prior["prior"], 80), ", strength tau ",
                n.short("target_prior", "tau"), ".", *([" The prior in the scores of ", join(inexact, ", "),
                " is not known exactly; that of the training law was taken."] if inexact else []))]  # fmt: skip


def _verdict(page: Parts) -> Safe:
    found = verdict(page.view, page.numbers)
    parts = [tag("p", found.headline, class_="headline")]
    if found.points:
        parts.append(tag("ul", *(tag("li", point) for point in found.points)))
    if found.advice:
        steps = [tag("li", text, tag("code", command, class_="command") if command else None) for text, command in found.advice]
        parts += [tag("h2", "What to do"), tag("ul", *steps, class_="advice")]
    return tag("div", *parts, class_="verdict")


def _contents(page: Parts) -> Safe:
    there = {"data": "Data", "groups": "Shot groups", "classes": "Classes", "confusion": "Confusion",
             "calibration": "Calibration", "marginal": "p(y)", "rates": "Sample rates", "curves": "Training",
             "recipe": "Recipe", "provenance": "Provenance"}  # fmt: skip
    links = [tag("li", tag("a", word, href=f"#{name}")) for name, word in there.items()]
    return tag("nav", tag("ul", *links), aria_label="On this page")


def _footer(page: Parts) -> Safe:
    def link(name: str) -> Safe:
        return tag("a", name, href=name)

    version = page.document["versions"].get("balms")
    return tag("footer", tag("p", "Made by balms", f" {version}" if version else "", " from ", link("report.json"),
                             ", which holds every number of this page. Tables: ", link("classes.csv"), ", ", link("runs.csv"),
                             ", ", link("report.md"), "."))  # fmt: skip
