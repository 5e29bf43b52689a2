"""The sections of the detectors' page: scores, categories, true boxes, photos, provenance."""

from typing import Any

from ..data.aside import printable
from .canvas import Drawn
from .categories import GROUPS as MARKS
from .categories import draw_categories
from .detector_document import KINDS
from .detector_verdict import KIND_WORDS, WORDS, metric
from .html import Safe, attribute, code, escape, join, named, table, tag
from .palette import MARKERS, RUNS
from .parts import SHAPES, Parts, folded, grid, say, section
from .view import View

COLUMNS = ("AP", "AP50", "AP75", "AP_s", "AP_m", "AP_l", "AP_r", "AP_c", "AP_f", "AR")
TESTED = ("AP", "AP_r", "AP_c", "AP_f")  # of which differences are told
ROWS = 150  # categories of the page's table; all are in categories.csv
POINTS = 6000  # marks of all figures that are elements of their own, with names; more become pixels
_RANGES = {"r": "in 1 to 10 training images", "c": "in 11 to 100", "f": "in more than 100"}


def key(group: str) -> Safe:
    """A frequency group's name with its mark."""
    return tag("span", _mark(group), WORDS[group], class_="group")


def _mark(group: str, said: str = 'aria-hidden="true"') -> Safe:
    _, place = MARKS[group]
    return Safe(f'<svg class="key {place}" viewBox="0 0 10 10" {said}>{SHAPES[MARKERS[place]]}</svg>')


def _category(page: Parts, c: int) -> Safe:
    """A category's name behind the mark of its group, for tables."""
    one = page.document["categories"][c]
    return join([_mark(one["group"], f'role="img" aria-label="{WORDS[one["group"]]}"'), named(one["name"], 40)])


def tiles(page: Parts) -> Safe:
    """AP of the page's kind over all categories and by group, run under run."""
    n, kind, made = page.numbers, page.document["kind"], []
    for name in TESTED:
        path = [("runs", i, "metrics", kind, name) for i in range(len(page.view.runs[:RUNS]))]
        if all(n.at(*one) is None for one in path):
            continue
        title = tag("h3", metric(name), f" of {KIND_WORDS[kind]}" if name == "AP" else f": {WORDS[name[-1]]} categories")
        rows = [tag("div", page.run(i), tag("b", n.percent(*one)), class_="row") for i, one in enumerate(path)]
        if not page.several:
            rows = [tag("p", n.percent(*path[0]), tag("small", " %"), class_="big")]
        made.append(tag("li", title, *rows, class_="tile"))
    return tag("ul", *made, class_="tiles groups" if page.several else "tiles", aria_label="Key numbers")


def scores(page: Parts) -> Safe:
    n, view = page.numbers, page.view
    rows = []
    for i, run in enumerate(view.runs):
        for kind in [kind for kind in reversed(KINDS) if kind in run["metrics"]]:
            cells = [join([n.percent("runs", i, "metrics", kind, name, digits=2), _less(page, i, kind, name)])
                     for name in COLUMNS]  # fmt: skip
            rows.append([join([page.run(i, 24 if page.several else 60), tag("span", KIND_WORDS[kind], class_="tag")]), *cells])
    lede = say("LVIS’s metrics by its federated rules: AP is the mean over IoU thresholds of 0.5 to 0.95 and over categories, "
               "each of which counts the same. ", metric("AP_r"), ", ", metric("AP_c"), ", ", metric("AP_f"),
               ": rare, common, frequent categories, ", join([_RANGES[g] for g in WORDS], ", "), "; ", metric("AP_s"), ", ",
               metric("AP_m"), ", ", metric("AP_l"), ": small, medium, large objects; AR: of 300 detections a photo. No "
               "interval is known for AP: a category with one object shows no spread of its own.")  # fmt: skip
    swapped = say("Below a figure its difference to ", page.run(0), " in points, and p: how often swapping the two runs photo "
                  "by photo, at random, gives one as large. “Shown” where p times the number of compared runs is at most ",
                  n.percent("chance", "most", digits=0), " %. It is about the choice of test photos alone: another training "
                  "seed is not in it, and of twenty such differences about one looks shown without being so.")  # fmt: skip
    return section("scores", "Scores", lede, swapped if page.several else None,
                   table("LVIS metrics, %", ["run", *map(metric, COLUMNS)], rows))  # fmt: skip


def _less(page: Parts, i: int, kind: str, name: str) -> Safe | None:
    """The difference to the first run, and whether it was shown."""
    path = ("differences", i - 1, "metrics", kind, name)
    return None if not i or name not in TESTED else _judged(page, path)


def _judged(page: Parts, path: tuple) -> Safe | None:
    n, found = page.numbers, page.numbers.at(*path)
    if not found:
        return None
    mark = " shown" if found["shown"] else None
    return join([tag("span", n.signed(*path, "value"), mark, class_="sub real" if mark else "sub"),
                 tag("span", "p ", n.number(*path, "p", digits=3), class_="sub")])  # fmt: skip


def drawn(view: View, i: int) -> Drawn | None:
    """AP of each category over its training images, of one run; all runs have the same axes."""
    document, run = view.document, view.runs[i]
    kind = document["kind"]
    rows = [{"name": c["name"], "frequency": c["group"], "train_images": images, "objects": c["objects"], kind: ap}
            for c, images, ap in zip(document["categories"], run["train_images"], run["ap"][kind], strict=True)
            if images is not None and ap is not None]  # fmt: skip
    if not rows:
        return None
    highest = max(ap for one in view.runs for ap in one["ap"][kind] if ap is not None)
    figure, hover = draw_categories(rows, kind, max(10, 10 * -(-100 * highest // 10)), pixels=_crowded(document))
    said = f"AP of {KIND_WORDS[kind]} of {len(rows):,} categories over their training images."
    return Drawn(view.file("ap-by-category", i), view.titled("Categories by AP", i), said, figure, hover)


def _crowded(document: dict[str, Any]) -> bool:
    return document["data"]["tested"] * len(document["runs"][:RUNS]) > POINTS


def categories(page: Parts) -> Safe:
    kind, runs = page.document["kind"], page.view.runs
    figures = [page.figure(drawn, i) for i in range(len(runs[:RUNS]))]
    lede = say("Each mark is a category with an object to find; AP of ", KIND_WORDS[kind], ".",
               None if _crowded(page.document) else " Point at one for its name.",
               *([f" The first {RUNS} runs are drawn."] if len(runs) > RUNS else []))  # fmt: skip
    if not any(figures):
        lede = say("Neither the runs nor the annotations say how many training images a category had, so no figure shows AP "
                   "over them.", quiet=True)  # fmt: skip
    moved = [_moved(page, d) for d in range(len(page.document["differences"]))]
    return section("categories", "Category by category", lede, grid(*figures), *moved, _table(page))


def _moved(page: Parts, d: int) -> Safe:
    """The largest gains and losses of a run."""
    n, kind = page.numbers, page.document["kind"]
    one, path = page.document["differences"][d]["moved"][kind], ("differences", d, "moved", kind)
    furthest = " The furthest are below. Whether one is more than chance was not tested: see how few objects it has."
    told = say("Of the tested categories ", n.count(*path, "up"), " gain, ", n.count(*path, "down"), " lose and ",
               n.count(*path, "same"), " stay, from ", page.run(0), " to ", page.run(d + 1), ".",
               furthest if one["gains"] or one["losses"] else None)  # fmt: skip
    both = (("Largest gains", "gains"), ("Largest losses", "losses"))
    return join([tag("h3", page.run(d + 1, 70), " against ", page.run(0, 70), class_="above"), told,
                 grid(*(_ends(page, word, (*path, which)) for word, which in both if one[which]))])  # fmt: skip


def _ends(page: Parts, title: str, path: tuple) -> Safe:
    n, rows = page.numbers, []
    for k, row in enumerate(n.at(*path)):
        c = row["category"]
        rows.append([_category(page, c), n.count("runs", 0, "train_images", c), n.count("categories", c, "objects"),
                     *(n.percent(*path, k, end) for end in ("before", "after")), n.signed(*path, k, "value")])  # fmt: skip
    small = f"of {KIND_WORDS[page.document['kind']]}, with the category’s training images and test objects"
    caption = join([title, ", AP %", tag("small", small)])
    return table(caption, ["category", "images", "objects", "before", "after", "points"], rows, class_="narrow")


def _table(page: Parts) -> Safe:
    """The tested categories, the rarest first; of many the rarest and the most frequent."""
    n, kind, runs = page.numbers, page.document["kind"], page.view.runs
    counts = runs[0]["train_images"]
    order = sorted((c for c, one in enumerate(page.document["categories"]) if one["objects"]), key=lambda c: counts[c] or 0)
    shown = order if len(order) <= ROWS else [*order[: ROWS // 2], *order[-ROWS // 2 :]]
    rows = [[_category(page, c), n.count("runs", 0, "train_images", c),
             *(n.count("categories", c, counted) for counted in ("photos", "objects")),
             *(n.percent("runs", i, "ap", kind, c) for i in range(len(runs)))] for c in shown]  # fmt: skip
    cut = f"the {ROWS // 2} with fewest and with most training images; all are in categories.csv"
    caption = join([f"AP of {KIND_WORDS[kind]}, %", tag("small", cut if len(order) > ROWS else "the rarest first")])
    head = ["category", "training images", "test photos", "test objects",
            *(page.run(i, 24) if page.several else "AP" for i in range(len(runs)))]  # fmt: skip
    return folded("All tested categories" if len(order) <= ROWS else "The rarest and the most frequent categories",
                  table(caption, head, rows, class_="tall" if len(rows) > 12 else ""))  # fmt: skip


def true_boxes(page: Parts) -> Safe:
    """Accuracy at the true boxes by group, with intervals."""
    n, runs = page.numbers, page.view.runs
    asked = [i for i, run in enumerate(runs) if run["true_boxes"] is not None]
    if not asked:
        return section("true-boxes", "At the true boxes", say("Not asked for. ", code("balms detect evaluate --gt-boxes"),
                       " classifies the true boxes, so that what the box classifier knows is seen apart from what the "
                       "proposals miss.", quiet=True))  # fmt: skip
    groups = [g for g in ("all", *WORDS) if any(runs[i]["true_boxes"][g] for i in asked)]
    rows = [[page.run(i, 60), *(_box_cell(page, i, g) for g in groups)] for i in asked]
    first = ("runs", asked[0], "true_boxes")
    counted = ["objects", *(join([n.count(*first, g, "objects"), tag("span", "in ", n.count(*first, g, "photos"), " photos",
                                  class_="sub")]) for g in groups)]  # fmt: skip
    lede = say("The box classifier is given the true boxes and has to name what is in them; background is no answer. Mean over "
               "categories of the share of objects that it names right. Intervals (", n.percent("intervals", "level", digits=0),
               " %) are over the choice of test photos.")  # fmt: skip
    return section("true-boxes", "At the true boxes", lede,
                   table("Right at the true boxes, %", ["run", *("all" if g == "all" else key(g) for g in groups)],
                         [*rows, counted]))  # fmt: skip


def _box_cell(page: Parts, i: int, group: str) -> Safe:
    path = ("runs", i, "true_boxes", group)
    return join([page.numbers.percent(*path, "value"), page.numbers.interval(*path),
                 _judged(page, ("differences", i - 1, "true_boxes", group)) if i else None])  # fmt: skip


def photos(page: Parts) -> Safe:
    """Rare objects as they are, and what each run found there."""
    document = page.document
    if document["no_pictures"] is not None:
        return section("photos", "Rare objects", say("No pictures: ", document["no_pictures"], ".", quiet=True))
    lede = say("A photo of each of the rarest tested categories, by lowest id, whatever the runs made of it. Solid: "
               "true boxes, and found boxes that cover half of one (IoU 0.5); dashed: found elsewhere. Of each run its "
               "surest detections of that category, one more than there are objects and 20 at most.")  # fmt: skip
    return section("photos", "Rare objects", lede, *(_photo(page, e) for e in range(len(document["examples"]))))


def _photo(page: Parts, e: int) -> Safe:
    n, one = page.numbers, page.document["examples"][e]
    c = one["category"]
    name = page.document["categories"][c]["name"]
    images = page.document["runs"][0]["train_images"][c]
    told = [n.counted("runs", 0, "train_images", c, noun="training image"), ", "] if images is not None else []
    title = tag("h3", named(name, 70), " ", key(page.document["categories"][c]["group"]),
                tag("span", *told, f"photo {one['photo_id']}", class_="tag"), class_="above")  # fmt: skip
    count = n.counted("examples", e, "objects", noun="object")
    truth = _panel(page, e, [(box, "true", None) for box in one["boxes"]], "truth", [count])
    panels = [truth]
    for i in range(len(page.view.runs[:RUNS])):
        found = one["runs"][i]["found"]
        boxes = [(f["box"], "hit" if f["hit"] else "miss", f"{f['score']:.3g}") for f in found]
        panels.append(_panel(page, e, boxes, page.run(i), _told(page, e, i)))
    return join([title, tag("div", *panels, class_="panels")])


def _told(page: Parts, e: int, i: int) -> list[Any]:
    n, path, one = page.numbers, ("examples", e, "runs", i), page.document["examples"][e]["runs"][i]
    said: list[Any] = ["none found"]
    if one["found"]:
        boxes = " box, " if len(one["found"]) == 1 else " boxes, "
        said = [n.count(*path, "found", "#"), boxes, n.count(*path, "hits"), " at an object, the surest with score ",
                n.short(*path, "found", 0, "score")]  # fmt: skip
    if one["called"] is None:
        return [*said, "; nothing of any name at the object"]
    name = page.document["categories"][one["called"]["category"]]["name"]
    return [*said, "; called ", named(name, 30), ", ", n.short(*path, "called", "score")]


def _panel(page: Parts, e: int, boxes: list, title: Any, told: list[Any]) -> Safe:
    """The photo, defined once, with boxes over it."""
    one = page.document["examples"][e]
    (width, height), uri = one["size"], page.thumbnails.get((0, str(one["photo"])))
    if uri is None:
        gone = tag("p", "photo cannot be read", class_="quiet")
        return tag("figure", gone, tag("figcaption", tag("b", title), tag("span", *told)))
    shapes = []
    for (x, y, w, h), kind, score in boxes:
        place = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"'
        hint = f"<title>{score}</title>" if score else ""
        shapes.append(f'<rect class="edge" {place}/><rect class="box {kind}" {place}>{hint}</rect>')
    said = attribute(printable(f"{page.document['categories'][one['category']]['name']}: {len(boxes)} boxes"))
    view = f'class="photo" viewBox="0 0 {width} {height}" role="img" aria-label="{said}"'
    picture = (f'<image id="photo-{e}" href="{uri}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
               if title == "truth" else f'<use href="#photo-{e}"/>')  # fmt: skip
    return tag("figure", Safe(f"<svg {view}>{picture}{''.join(shapes)}</svg>"),
               tag("figcaption", tag("b", title), tag("span", *told)))  # fmt: skip


def provenance(page: Parts) -> Safe:
    """Where the runs came from, and what they were scored on and by."""
    n, data, blocks = page.numbers, page.document["data"], []
    for i, run in enumerate(page.view.runs):
        ours = run["loss"] is not None
        what = f"{run['stage']}, {run['classifier']} classifier, loss {run['loss']}" if ours else run["stage"]
        known = facts_of([
            ("what", escape(what)), ("folder" if ours else "file", code(run["run"])),
            ("seed", n.count("runs", i, "seed") if isinstance(run["seed"], int) else None),
            *((name.replace("_", " "), _fact(value)) for name, value in run["provenance"].items()),
            ("detections", n.count("runs", i, "detections")),
            ("results", code(run["results"]) if ours and run["results"] else None),
        ])  # fmt: skip
        blocks.append(folded(page.run(i, 80), known, opened=i == 0) if page.several else known)
    truth = facts_of([
        ("annotations", code(data["annotations"])), ("sha256", code(data["sha256"])),
        ("evaluator", escape(page.document["evaluator"])),
        ("left out", join([join([f"{name} ", n.count("data", "left_out", name)]) for name in data["left_out"]], ", ")),
        *(("note", escape(note)) for note in data["notes"]),
    ])  # fmt: skip
    swaps = [join([n.count("differences", d, "swaps", kind), f" ({KIND_WORDS[kind]}, ", page.run(d + 1), ")"])
             for d, one in enumerate(page.document["differences"]) for kind in one["swaps"]]  # fmt: skip
    chance = ["p: ", page.document["chance"]["method"], ", ", join(swaps, ", "), ", seed ", n.count("chance", "seed"), ". "]
    way = say("Intervals: ", page.document["intervals"]["method"], ", ", n.count("intervals", "draws"), " draws, seed ",
              n.count("intervals", "seed"), ". ", *(chance if swaps else []), quiet=True)  # fmt: skip
    return section("provenance", "Provenance", truth, way, *blocks)


def _fact(value: Any) -> Safe | None:
    if isinstance(value, dict):
        value = ", ".join(f"{name} {one}" for name, one in value.items())
    return None if value in (None, "") else code(value) if len(str(value)) > 40 else named(str(value))


def facts_of(pairs: list[tuple[str, Any]]) -> Safe:
    return tag("dl", *(join([tag("dt", name), tag("dd", value)]) for name, value in pairs if value), class_="facts")
