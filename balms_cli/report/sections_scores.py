"""The page's sections on what goes wrong and on the scores: confusion, calibration, marginal likelihood."""

from . import figures, figures_accuracy
from .html import Safe, join, table, tag
from .parts import Parts, folded, grid, group_key, say, section
from .view import View

_PAIRS = 12  # of a single run; of each of several runs half as many
GROUPS = ("many", "medium", "few")


def pairs_of(document: dict) -> list[tuple[int, int]]:
    """(run, pair) of the confused pairs that the page shows."""
    view = View(document)
    most = _PAIRS if len(view.runs) == 1 else _PAIRS // 2
    return [(i, p) for i in view.shown for p in range(min(most, len(view.runs[i]["confusion"]["pairs"])))]


def wanted(document: dict) -> list[tuple[int, str]]:
    """(run, key) of the pictures that the page shows."""
    shown = [(i, document["runs"][i]["confusion"]["pairs"][p]) for i, p in pairs_of(document)]
    return [(i, example["key"]) for i, pair in shown for example in pair["examples"]]


def confusion(page: Parts) -> Safe:
    view = page.view
    lede = say("Of the images of each group: how many are right, and into which group the wrong ones go. Where the tail is "
               "lost to the head, few-shot images land under many and medium.")  # fmt: skip
    drawn = grid(*(page.figure(figures_accuracy.confusion, i) for i in view.shown))
    shown: dict[int, list[int]] = {}
    for i, p in pairs_of(page.document):
        shown.setdefault(i, []).append(p)
    about = say("The classes most often taken for another, by share times number of the true class’s images, each with the "
                "images that were mistaken with the highest scores.", quiet=True)  # fmt: skip
    if not any(shown.values()):
        lists = [say("No image is taken for another class.", quiet=True)]
    elif not page.several:
        lists = [about, _pairs(page, 0, shown.get(0, []))]
    else:
        lists = [about, *(folded(page.run(i, 80), _pairs(page, i, places), opened=i == 0) for i, places in shown.items())]
    return section("confusion", "Confusion", lede, drawn, tag("h3", "Most confused classes", class_="above"), *lists)


def _pairs(page: Parts, i: int, places: list[int]) -> Safe:
    return tag("ul", *(_pair(page, i, p) for p in places), class_="pairs")


def _pair(page: Parts, i: int, p: int) -> Safe:
    n, names, groups_of = page.numbers, page.document["data"]["classes"], page.view.of(i, "group_of")
    pair, path = page.view.runs[i]["confusion"]["pairs"][p], ("runs", i, "confusion", "pairs", p)
    true, taken = names[pair["true"]], names[pair["predicted"]]
    title = tag("div", tag("bdi", true, title=true), tag("span", "→", class_="arrow", role="img", aria_label="taken for"),
                tag("bdi", taken, title=taken), class_="names")  # fmt: skip
    marks = tag("p", group_key(groups_of[pair["true"]]), " taken for ", group_key(groups_of[pair["predicted"]]), class_="note")
    count = tag("p", n.count(*path, "count"), " image, " if pair["count"] == 1 else " images, ", n.percent(*path, "share"),
                " % of the class", class_="note")  # fmt: skip
    pictures = [_thumbnail(page, i, path, e, pair, true, taken) for e in range(len(pair["examples"]))]
    return tag("li", title, marks, count, tag("div", *pictures, class_="thumbs"), class_="pair")


def _thumbnail(page: Parts, i: int, path: tuple, e: int, pair: dict, true: str, taken: str) -> Safe:
    uri = page.thumbnails.get((i, pair["examples"][e]["key"]))
    if uri is None:
        picture = tag("div", "image not there any more", class_="gone")
    else:
        picture = tag("img", src=Safe(uri), alt=f"{true}, taken for {taken}", title=pair["examples"][e]["key"],
                      class_="small" if uri.startswith("data:image/png") else None)  # fmt: skip
    return tag("figure", picture, tag("figcaption", page.numbers.percent(*path, "examples", e, "score", digits=0), " %"))


def calibration(page: Parts) -> Safe:
    n, view = page.numbers, page.view
    lede = say("Of the images scored 80 %, are 80 % right? On the diagonal they are; below it scores promise too much. A "
               "point’s size is its share of its group’s images, and lines leave out bins of fewer than five. ECE, the "
               "expected calibration error, is the mean distance, in ", n.count("runs", 0, "calibration", "bins"),
               " equal bins of the score.")  # fmt: skip
    rows = []
    for i in range(len(view.runs)):
        for group in ("all", *GROUPS):
            if view.runs[i]["calibration"][group] is None:
                continue
            path = ("runs", i, "calibration", group)
            mark = group_key(group) if group != "all" else tag("span", "all images", class_="group")
            rows.append([join([page.run(i, 30), " ", mark]) if page.several else mark, n.count(*path, "n"),
                         n.percent(*path, "confidence"), n.percent(*path, "accuracy"), n.percent(*path, "ece")])  # fmt: skip
    head = ["run and group" if page.several else "group", "images", "mean score", "right", "ECE"]
    numbers = table("Calibration, %", head, rows, class_="tall" if len(rows) > 14 else "")
    drawn = [page.figure(figures_accuracy.reliability, i) for i in view.shown]
    return section("calibration", "Calibration", lede, grid(*drawn, numbers))


def marginal(page: Parts) -> Safe:
    n, view = page.numbers, page.view
    lede = say("p(y) is the mean score of a class over all test images. A classifier that favours no class has it level at "
               "1/C, the drawn line; one trained on a long tail as it is gives too much to the head.")  # fmt: skip
    notes = {run["marginal"]["note"] for run in view.runs} - {None}
    warning = say("The test images are not even over the classes, so a perfect classifier would not be level either: it "
                  "would follow the dotted line.", quiet=True)  # fmt: skip
    rows = []
    for i in range(len(view.runs)):
        path = ("runs", i, "marginal")
        rows.append([page.run(i, 40), *(n.number(*path, group) for group in GROUPS), n.number(*path, "variance", digits=3),
                     n.number(*path, "kl_from_uniform", digits=3)])  # fmt: skip
    small = tag("small", "mean by group; variance over the classes; divergence from level, in nats")
    caption = join(["p(y) as a multiple of 1/C", small])
    numbers = table(caption, ["run", *GROUPS, "variance", "KL"], rows)
    return section(
        "marginal", "Marginal likelihood p(y)", lede, warning if notes else None, grid(page.figure(figures.marginal), numbers)
    )
