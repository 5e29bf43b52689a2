"""The page's sections on the data, and on where the runs came from: recipe and provenance."""

from typing import Any

from . import figures
from .html import Safe, code, escape, join, named, table, tag
from .parts import Parts, folded, grid, group_key, listed, say, section

_GROUPS = ("many", "medium", "few")
_RANGES = {"many": "more than 100", "medium": "20 to 100", "few": "fewer than 20"}


def data(page: Parts) -> Safe:
    n, facts = page.numbers, page.document["data"]
    first, last = page.view.order[0], page.view.order[-1]
    largest = "tenth of the classes" if len(facts["classes"]) > 10 else "class"
    spread = [", from ", n.count("data", "train_counts", first), " a class down to ", n.count("data", "train_counts", last),
              f". The largest {largest} holds ", n.percent("data", "head_share"), " % of the images"]  # fmt: skip
    lede = say(n.counted("data", "train_images", noun="training image"), " of ",
               n.counted("data", "classes", "#", noun="class"), *(spread if first != last else ()), ".")  # fmt: skip
    rows = [
        [join([group_key(group), tag("span", _RANGES[group], class_="sub")]),
         *(n.count("data", "groups", group, key) for key in ("classes", "train_images", "test_images"))]
        for group in _GROUPS
    ]  # fmt: skip
    split = page.document["split"]
    head = ["group", "classes", "training", split]
    known = _facts([
        ("imbalance factor", join([n.short("data", "imbalance_factor"), " (largest class over smallest)"])),
        ("Gini coefficient", join([n.number("data", "gini"), " (0: all classes equal)"])),
        ("source", escape(facts["source"])),
        ("drawn", join([facts["profile"], ", seed ", n.count("data", "seed")])),
        ("splits", join([join([name, " ", n.count("data", "splits", name)]) for name in facts["splits"]], ", ")),
        ("index sha256", code(facts["manifest_sha256"])),
        ("not tested", join([n.counted("data", "untested", noun="class"), f" without a {split} image"])
         if facts["untested"] else None),
    ])  # fmt: skip
    own = [page.run(i) for i, run in enumerate(page.view.runs) if run["train_counts"] is not None]
    note = say("Trained on other counts of these classes, which their groups follow: ", listed(own), ".", quiet=True)
    caption = join(["Shot groups", tag("small", "by a class’s training images")])
    return section(
        "data",
        "The data",
        lede,
        note if own else None,
        grid(page.figure(figures.class_counts), tag("div", table(caption, head, rows), known, class_="side")),
    )


def _facts(pairs: list[tuple[str, Any]]) -> Safe:
    return tag("dl", *(join([tag("dt", name), tag("dd", value)]) for name, value in pairs if value is not None), class_="facts")


def learned(page: Parts) -> Safe:
    """Learned sample rates or class weights."""
    n = page.numbers
    runs = [i for i, run in enumerate(page.view.runs) if run["rates"] is not None]
    if not runs:
        none = say("No run here learned any. ", code("balms retrain --meta-sampler"), " learns how often each class is drawn.",
                   quiet=True)  # fmt: skip
        return section("rates", "Learned sample rates", none)
    lines = [say(page.run(i), ": learned ", page.view.runs[i]["rates"]["kind"], ", variance over the classes ",
                 n.number("runs", i, "rates", "variance", digits=3), ".") for i in runs]  # fmt: skip
    note = say("A class’s rate says how often one of its images is drawn; all start at one half. Where they stay level, the "
               "loss needs no help from the sampler: it is balanced already.")  # fmt: skip
    drawn = page.figure(figures.rates) if set(runs) & set(page.view.shown) else Safe("")
    return section("rates", "Learned sample rates", grid(drawn, tag("div", note, *lines, class_="say")))


def training(page: Parts) -> Safe:
    drawn = [page.figure(figures.curves, stage) for stage in ("pretrain", "retrain")]
    if not any(drawn):
        return section("curves", "Training curves", say("The runs' folders hold no metrics.jsonl.", quiet=True))
    note = say("Thin: as logged; thick: a running mean. Losses of different kinds cannot be compared.", quiet=True)
    return section("curves", "Training curves", note, grid(*drawn))


def recipe(page: Parts) -> Safe:
    """Every value of the recipes and its source; what was left at its default is folded away."""
    keys = list(dict.fromkeys(key for run in page.view.runs for key in run["recipe"]))
    if not keys:
        return section("recipe", "Recipe", say("Not known.", quiet=True))
    chosen = [key for key in keys if any(_source(run, key) not in ("default", None) for run in page.view.runs)]
    if not chosen:
        chosen, rest = keys, []
    else:
        rest = [key for key in keys if key not in chosen]
    stages = sorted({run["stage"] for run in page.view.runs})
    lede = say("Every value and where it came from: a default, the preset, a configuration file, a flag, or the "
               "run of stage 1 whose backbone it has. ",
               "Stages: " + ", ".join(stages) + "." if len(stages) > 1 else "")  # fmt: skip
    return section("recipe", "Recipe", lede, _recipe_table(page, chosen, "Chosen for these runs" if rest else "All values"),
                   folded(f"Left at the default: {', '.join(rest[:6])}{', …' if len(rest) > 6 else ''}",
                          _recipe_table(page, rest, "Left at the default")) if rest else None)  # fmt: skip


def _source(run: dict[str, Any], key: str) -> str | None:
    return run["recipe"].get(key, {}).get("source")


def _recipe_table(page: Parts, keys: list[str], caption: str) -> Safe:
    runs = page.view.runs
    head = ["setting", *(page.run(i, 24) if page.several else "value" for i in range(len(runs)))]
    rows = [[code(key), *(_recipe_cell(page, i, key) for i in range(len(runs)))] for key in keys]
    return table(caption, head, rows, class_="words")


def _recipe_cell(page: Parts, i: int, key: str) -> Safe:
    found = page.view.runs[i]["recipe"].get(key)
    if found is None:
        return tag("span", "–", class_="none", title="no such setting")
    source = found["source"]
    return join([_value(page, found["value"], "runs", i, "recipe", key, "value"),
                 tag("span", source, class_="tag") if source and source != "default" else None])  # fmt: skip


def _value(page: Parts, value: Any, *path: Any) -> Safe:
    if isinstance(value, bool):
        return escape("yes" if value else "no")
    if isinstance(value, (int, float)):
        return page.numbers.short(*path)
    if isinstance(value, list):
        shown = [_value(page, item, *path, i) for i, item in enumerate(value[:8])]
        return join([*shown, "…"] if len(value) > 8 else shown, ", ")
    if value is None:
        return escape("none")
    return named(str(value), 60)


def provenance(page: Parts) -> Safe:
    blocks = []
    for i, run in enumerate(page.view.runs):
        made = run["provenance"]
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items()) or None
        known = _facts([
            ("made", _when(made["created"])), ("command", made["command"] and code(made["command"])),
            ("what", escape(f"{run['stage']}, {run['classifier']} classifier, loss {run['loss']}, sampler {run['sampler']}")),
            ("folder", code(run["run"])), ("preset", made["preset"] and escape(made["preset"])),
            ("device", made["device"] and join([made["device"], ", ", made["precision"] or "precision not known"])),
            ("versions", versions and escape(versions)), ("data", code(made["manifest"])),
            ("data sha256", join([code(made["manifest_sha256"]), None if run["same_data"] else " (not the data scored here)"])),
            ("stage 1", made["parent"] and code(made["parent"])),
            ("its sha256", made["parent_sha256"] and code(made["parent_sha256"])),
        ])  # fmt: skip
        blocks.append(folded(page.run(i, 80), known, opened=i == 0) if page.several else known)
    n, way = page.numbers, page.document["intervals"]
    scored = say("Scored on ", page.document["device"], ". Intervals: ", way["method"], ", ",
                 n.percent("intervals", "level", digits=0), " %, ", n.count("intervals", "draws"), " draws, seed ",
                 n.count("intervals", "seed"),
                 ". The last iterate of each run is scored; nothing was chosen on test images.", quiet=True)  # fmt: skip
    return section("provenance", "Provenance", scored, *blocks)


def _when(stamp: str) -> Safe:
    return tag("time", stamp[:16].replace("T", " ") + " UTC", datetime=stamp) if stamp[10:11] == "T" else escape(stamp)
