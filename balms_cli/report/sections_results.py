"""The page's sections on accuracy: key numbers, shot groups with runs side by side, and class by class."""

from . import figures_accuracy as figures
from .html import Safe, escape, join, named, table, tag
from .parts import Parts, folded, grid, group_key, listed, say, section
from .view import GROUP_WORDS

_COLUMNS = ("balanced_accuracy", "many", "medium", "few", "rarest3", "top1", "top5")
_WORDS = GROUP_WORDS | {"balanced_accuracy": "all classes", "top1": "all images", "top5": "among top 5"}
ROWS = 100  # classes of the page's table; all are in classes.csv


def tiles(page: Parts) -> Safe:
    """Key numbers with their intervals, run under run where there are several."""
    blocks = [m for m in (*page.view.blocks[-1:], *page.view.blocks[:-1])]
    made = [tag("li", tag("h3", _WORDS[m]), *_tile_rows(page, m), class_="tile") for m in blocks]
    made.append(tag("li", tag("h3", "calibration error"), *_ece_rows(page), class_="tile"))
    if any(run["never_predicted"] for run in page.view.runs):
        made.append(tag("li", tag("h3", "never predicted"), *_never_rows(page), class_="tile"))
    return tag("ul", *made, class_="tiles wide" if page.several else "tiles", aria_label="Key numbers")


def _tile_rows(page: Parts, metric: str) -> list[Safe]:
    n = page.numbers
    rows = []
    for i in page.view.shown:
        path = ("runs", i, "metrics", metric)
        found = n.at(*path)
        if not page.several:
            rows += [tag("p", n.percent(*path, "value"), tag("small", " %"), class_="big"),
                     tag("p", n.interval(*path), class_="note"), _mini(found, metric)]  # fmt: skip
        else:
            rows.append(tag("div", page.run(i), tag("span", tag("b", n.percent(*path, "value")), " ", tag(
                "span", n.interval(*path), class_="note")), _mini(found, metric), class_="row"))  # fmt: skip
    return rows


def _mini(found: dict | None, metric: str) -> Safe:
    if found is None:
        return Safe("")
    low, high, value = (100 * found[key] for key in ("low", "high", "value"))
    kind = metric if metric in ("many", "medium", "few") else "all"
    return Safe(f'<svg class="mini {kind}" aria-hidden="true"><rect class="track" x="0" y="3" width="100%" height="2" rx="1"/>'
                f'<rect class="span" x="{low:.2f}%" y="1.5" width="{max(high - low, 0.3):.2f}%" height="5" rx="1"/>'
                f'<circle class="dot" cx="{value:.2f}%" cy="4" r="4"/></svg>')  # fmt: skip


def _ece_rows(page: Parts) -> list[Safe]:
    n = page.numbers
    if not page.several:
        found = page.view.runs[0]["calibration"]["all"]
        side = found["confidence"] - found["accuracy"]
        word = f"scores too {'high' if side > 0 else 'low'} on average" if side else "scores right on average"
        return [tag("p", n.percent("runs", 0, "calibration", "all", "ece"), tag("small", " %"), class_="big"),
                tag("p", word, class_="note")]  # fmt: skip
    return [tag("div", page.run(i), tag("b", n.percent("runs", i, "calibration", "all", "ece")), class_="row")
            for i in page.view.shown]  # fmt: skip


def _never_rows(page: Parts) -> list[Safe]:
    n = page.numbers
    if not page.several:
        return [tag("p", n.count("runs", 0, "never_predicted"), class_="big"),
                tag("p", "of ", n.counted("data", "classes", "#", noun="class"), class_="note")]  # fmt: skip
    return [tag("div", page.run(i), tag("b", n.count("runs", i, "never_predicted")), class_="row") for i in page.view.shown]


def groups(page: Parts) -> Safe:
    """Accuracy by shot group; of several runs side by side, with the difference of each to the first."""
    n, view = page.numbers, page.view
    columns = [m for m in _COLUMNS if any(run["metrics"][m] for run in view.runs)]
    lede = say("Many-shot classes have more than 100 training images, medium-shot 20 to 100, few-shot fewer than 20. A "
               "group’s accuracy is the mean of its classes’ accuracies, so every class counts the same. Intervals (",
               n.percent("intervals", "level", digits=0),
               " %) say how far a value could be off by the choice of test images.")  # fmt: skip
    if not page.several:
        rows = [[_WORDS[m], n.percent("runs", 0, "metrics", m, "value"), n.interval("runs", 0, "metrics", m)] for m in columns
                if view.runs[0]["metrics"][m]]  # fmt: skip
        return section(
            "groups",
            "Accuracy by shot group",
            lede,
            grid(page.figure(figures.groups), table("Accuracy, %", ["", "value", "interval"], rows)),
        )
    notes = []
    if page.document["differences"]:
        notes.append(say("Runs on the same images are compared image by image. A difference is called real where its interval "
                         "leaves out 0; of twenty such differences about one looks real without being so."))  # fmt: skip
    apart = [page.run(i) for i, run in enumerate(view.runs) if not run["same_images"]]
    if apart:
        notes.append(say("Not compared image by image, as scored on other images: ", listed(apart), ".", quiet=True))
    if len(view.shown) < len(view.runs):
        notes.append(say("Figures show the first run and the best of the others; the table has all ", n.count("runs", "#"), ".",
                         quiet=True))  # fmt: skip
    return section("groups", "Accuracy by shot group", lede, *notes,
                   grid(page.figure(figures.groups), page.figure(figures.differences)), _run_table(page, columns),
                   *_seeds(page, columns), _difference_table(page, columns))  # fmt: skip


def _run_table(page: Parts, columns: list[str]) -> Safe:
    n, view, rows = page.numbers, page.view, []
    for i in range(len(view.runs)):
        cells = []
        for m in columns:
            found = view.difference(i)
            bounds = found and found["metrics"][m]
            less = None
            if bounds:
                path = ("differences", view.document["differences"].index(found), "metrics", m, "value")
                word, kind = (" real", "sub real") if bounds["real"] else (" chance?", "sub")
                less = tag("span", n.signed(*path), word, class_=kind)
            cells.append(join([n.percent("runs", i, "metrics", m, "value"), n.interval("runs", i, "metrics", m), less]))
        rows.append([page.run(i, 60), *cells])
    small = ["under each its interval", *([", and the difference to ", page.run(0)] if page.document["differences"] else []),
             "; all classes: mean of class accuracies; all images: share that is right"]  # fmt: skip
    return table(join(["Accuracy of each run, %", tag("small", *small)]), ["run", *(_WORDS[m] for m in columns)], rows)


def _difference_table(page: Parts, columns: list[str]) -> Safe | None:
    n, rows = page.numbers, []
    for k, found in enumerate(page.document["differences"]):
        for m in columns:
            if found["metrics"][m] is None:
                continue
            path = ("differences", k, "metrics", m)
            rows.append([named(found["run"], 40), _WORDS[m], n.signed(*path, "value"),
                         join([n.signed(*path, "low"), " to ", n.signed(*path, "high")]),
                         tag("span", "real", class_="real") if found["metrics"][m]["real"] else "could be chance"])  # fmt: skip
    if not rows:
        return None
    caption = join(["Points more than ", page.run(0), tag("small", "on the same test images, with intervals")])
    return folded(
        "Every difference with its interval",
        table(caption, ["run", "accuracy of", "difference", "interval", ""], rows, class_="tall"),
    )


def _seeds(page: Parts, columns: list[str]) -> list[Safe]:
    n, rows = page.numbers, []
    for k, one in enumerate(page.document["seeds"]):
        cells = [join([n.percent("seeds", k, "metrics", m, "mean"), " ± ", n.percent("seeds", k, "metrics", m, "error")])
                 if one["metrics"][m] else escape("–") for m in columns]  # fmt: skip
        over = tag("span", n.count("seeds", k, "runs", "#"), f" runs: {one['varied']}", class_="sub")
        rows.append([join([named(one["label"], 60), over]), *cells])
    if not rows:
        return []
    caption = join(["Over seeds, %", tag("small", "mean ± its standard error over runs that agree in all but seeds")])
    return [table(caption, ["method, and what varied", *(_WORDS[m] for m in columns)], rows)]


def classes(page: Parts) -> Safe:
    view = page.view
    lede = say("Each point is a class. Where the tail costs nothing, they lie level; a trend that climbs is the tail’s price.",
               *([" Points are moved up and down a little, so that they do not cover each other."]
                 if figures.spread_of(view, 0) else []),
               *([" Point at one for its name."] if len(view.order) * len(view.shown) <= figures.POINTS else []))  # fmt: skip
    lines = [_trend_line(page, i) for i in view.shown]
    drawn = [page.figure(figures.by_class, i) for i in view.shown]
    if not page.several:
        return section("classes", "Accuracy of each class", lede, *lines, grid(*drawn, _class_table(page)))
    return section("classes", "Accuracy of each class", lede, grid(*drawn, tag("div", *lines, class_="say")),
                   _class_table(page))  # fmt: skip


def _trend_line(page: Parts, i: int) -> Safe:
    n, trend = page.numbers, page.view.runs[i]["trend"]
    if trend is None:
        whose = join([page.run(i), ": "]) if page.several else None
        return say(whose, "All tested classes have as many training images: there is no trend.")
    start = join([page.run(i), ": with "]) if page.several else "With "
    rank = ["; rank correlation ", n.number("runs", i, "trend", "spearman")] if trend["spearman"] is not None else []
    return say(start, "ten times as many training images accuracy ", "rises" if trend["slope"] >= 0 else "falls", " by ",
               n.points("runs", i, "trend", "slope"), " points", *rank, ".")  # fmt: skip


def _class_table(page: Parts) -> Safe:
    n, view = page.numbers, page.view
    k, order = len(view.order), view.order
    note = "most training images first"
    if k > ROWS:
        accuracy = view.runs[0]["per_class"]["accuracy"]
        order = sorted((c for c in order if accuracy[c] is not None), key=lambda c: accuracy[c])[:ROWS]
        note = join([f"the {ROWS} with the lowest accuracy", *([" of ", page.run(0)] if page.several else []), "; all are in ",
                     tag("a", "classes.csv", href="classes.csv")])  # fmt: skip
    groups_of, rated = page.document["data"]["group_of"], not page.several and view.runs[0]["rates"] is not None
    head = ["class", "training", page.document["split"]]
    head += [page.run(i, 18) for i in view.shown] if page.several else ["accuracy %", "predicted", "p(y) %"]
    head += ["rate"] if rated else []
    rows = []
    for c in order:
        mark = group_key(groups_of[c]) if page.several else tag("div", group_key(groups_of[c]))
        cells = [join([named(page.document["data"]["classes"][c], 60), " ", mark]),
                 n.count("data", "train_counts", c), n.count("data", "test_counts", c)]  # fmt: skip
        if page.several:
            cells += [n.percent("runs", i, "per_class", "accuracy", c) for i in view.shown]
        else:
            of = ("runs", 0, "per_class")
            tested = view.runs[0]["per_class"]["accuracy"][c] is not None
            between = tag("span", n.percent(*of, "low", c), "–", n.percent(*of, "high", c), class_="interval")
            cells += [join([n.percent(*of, "accuracy", c), between if tested else None]),
                      n.count(*of, "predicted", c), n.percent(*of, "mean_score", c, digits=2)]  # fmt: skip
        rows.append(cells + ([n.number("runs", 0, "rates", "values", c)] if rated else []))
    caption = join(["Class by class", *([", accuracy %"] if page.several else []), tag("small", note)])
    return table(caption, head, rows, class_=f"{'tall' if len(rows) > 12 else ''} {'' if page.several else 'narrow'}".strip())
