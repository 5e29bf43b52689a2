"""What a detectors' report says in plain words. Every sentence follows from the document by the rules here; a difference is
more than chance only where the document says that it was shown to be."""

from typing import Any

from .html import Numbers, Safe, join, named, tag

WORDS = {"r": "rare", "c": "common", "f": "frequent"}
KIND_WORDS = {"segm": "masks", "bbox": "boxes"}
_NAME = 40  # characters of a name within a sentence
_FEW = 100  # objects: under so many AP_r is a rough figure


def metric(name: str) -> Safe:
    """AP_r with its letter below the line."""
    base, _, letter = name.partition("_")
    return join([base, tag("sub", letter) if letter else None])


def verdict(document: dict[str, Any], numbers: Numbers) -> tuple[Safe, list[Safe]]:
    """The headline, and what supports it."""
    rare, several = ends(document)[0], len(document["runs"]) > 1
    if several:
        best, others = finds_most(document, rare), range(1, len(document["runs"]))
        headline = _comparison(document, numbers, best, rare)
        points = [_objects(document, numbers, rare), *(_rest(document, numbers, i, i == best) for i in others),
                  *(_at_boxes(document, numbers, i, rare) for i in others),
                  *(gap_sentence(document, numbers, i, whose=True) for i in (0, best))]  # fmt: skip
    else:
        headline, points = gap_sentence(document, numbers, 0), [_objects(document, numbers, rare)]
    return headline, [point for point in (*points, _unfound(document, numbers)) if point]


def ends(document: dict[str, Any]) -> tuple[str, str]:
    """The least and the most frequent group with an object to find; the same one where there is no other."""
    metrics = document["runs"][0]["metrics"][document["kind"]]  # of all runs the same ones are empty
    there = [group for group in WORDS if metrics[f"AP_{group}"] is not None]
    return there[0], there[-1]


def finds_most(document: dict[str, Any], group: str) -> int:
    """Of the runs after the first the one with the highest AP of a group; the first of equals."""
    of = [run["metrics"][document["kind"]][f"AP_{group}"] for run in document["runs"]]
    return max(range(1, len(of)), key=lambda i: (of[i], -i))


def _run(document: dict[str, Any], i: int) -> Safe:
    return named(document["runs"][i]["name"], _NAME)


def gap_sentence(document: dict[str, Any], numbers: Numbers, i: int, whose: bool = False) -> Safe:
    """What the long tail costs a run: AP of rare against AP of frequent categories. ``whose``: of which run, as one of
    several. These are other objects, of which some are harder: that no test can take away."""
    kind = document["kind"]
    gap, path, of = document["runs"][i]["gap"][kind], ("runs", i, "metrics", kind), KIND_WORDS[kind]
    start = join(["With ", _run(document, i), " "]) if whose else None
    if gap is None:
        return join([start, "all" if whose else "All", f" tested categories are {WORDS[ends(document)[0]]}, so no tail can be "
                     f"seen: AP of {of} is ", numbers.percent(*path, "AP"), " %."])  # fmt: skip
    a, b = (numbers.percent(*path, f"AP_{gap[end]}") for end in ("rare", "frequent"))
    rare, frequent = WORDS[gap["rare"]], WORDS[gap["frequent"]]
    if not any(document["runs"][i]["metrics"][kind][f"AP_{gap[end]}"] for end in ("rare", "frequent")):
        return join([start, f"neither {rare} nor {frequent}" if whose else f"Neither {rare} nor {frequent}",
                     f" categories are found at all: AP of {of} is 0."])  # fmt: skip
    if gap["value"] <= 0:
        return join([start, f"{rare if whose else rare.capitalize()} categories are found no worse than {frequent} ones: AP of "
                     f"{of} is ", a, " % against ", b, " %."])  # fmt: skip
    return join([start, "the" if whose else "The", " long tail costs ",
                 tag("strong", numbers.points("runs", i, "gap", kind, "value"), " points"),
                 f" of AP: {rare} categories reach ", a, f" %, {frequent} ones ", b, f" % ({of})."])  # fmt: skip


def _objects(document: dict[str, Any], numbers: Numbers, group: str) -> Safe:
    """How much there is to judge by."""
    of, path = document["data"]["groups"][group], ("data", "groups", group)
    parts = ["Judged by ", numbers.counted(*path, "objects", noun="object"), " of ", numbers.count(*path, "tested"),
             f" {WORDS[group]} categor{'y' if of['tested'] == 1 else 'ies'} in ",
             numbers.counted(*path, "photos", noun="test photo")]  # fmt: skip
    if of["lone"]:
        parts += ["; ", numbers.count(*path, "lone"), f" of these {'has' if of['lone'] == 1 else 'have'} one object alone, "
                  "and to find it or not moves ", metric(f"AP_{group}"), " by up to ", numbers.points(*path, "one"),
                  " points"]  # fmt: skip
    return join([*parts, ". That is little: on other photos AP may differ a lot." if of["objects"] < _FEW else "."])


def _comparison(document: dict[str, Any], numbers: Numbers, i: int, group: str) -> Safe:
    """Whether a run finds rare objects better than the first."""
    kind, name, first = document["kind"], _run(document, i), _run(document, 0)
    path = ("differences", i - 1, "metrics", kind, f"AP_{group}")
    found = numbers.at(*path)
    figures = [metric(f"AP_{group}"), f" of {KIND_WORDS[kind]} is ", numbers.percent("runs", i, "metrics", kind, f"AP_{group}"),
               " % against ", numbers.percent("runs", 0, "metrics", kind, f"AP_{group}"), " %"]  # fmt: skip
    if found["value"] == 0 and not numbers.at("runs", 0, "metrics", kind, f"AP_{group}"):
        return join(["Neither ", name, " nor ", first, f" finds {WORDS[group]} objects: ", *figures, "."])
    if found["value"] == 0:
        return join([name, " and ", first, f" find {WORDS[group]} objects equally well: ", *figures, "."])
    size = tag("strong", numbers.points(*path, "value"), " points")
    p = join([" (p ", numbers.number(*path, "p", digits=3), ")."])
    side, more = ("better", "more") if found["value"] > 0 else ("worse", "less")
    if found["shown"]:
        return join([name, f" finds {WORDS[group]} objects {side} than ", first, ": ", *figures, ", ", size,
                     f" {more}, which is beyond what the choice of test photos explains", p])  # fmt: skip
    return join(["It is not shown that ", name, f" finds {WORDS[group]} objects better or worse than ", first, ": ", *figures,
                 ", but ", size, f" {more} can come about by the choice of test photos alone", p])  # fmt: skip


def _rest(document: dict[str, Any], numbers: Numbers, i: int, told_of_rare: bool) -> Safe:
    """What a run takes or gives at the frequent end, and over all categories."""
    metrics = dict.fromkeys([*(f"AP_{group}" for group in ends(document)), "AP"])
    if told_of_rare:
        metrics.pop(f"AP_{ends(document)[0]}")
    told = [join([metric(name), " ", *_judged(numbers, ("differences", i - 1, "metrics", document["kind"], name))])
            for name in metrics]  # fmt: skip
    return join([_run(document, i), " against ", _run(document, 0), ": ", join(told, ", "), "."])


def _judged(numbers: Numbers, path: tuple) -> list[Any]:
    return [numbers.signed(*path, "value"), " points (", "shown" if numbers.at(*path)["shown"] else "not shown", ", p ",
            numbers.number(*path, "p", digits=3), ")"]  # fmt: skip


def _at_boxes(document: dict[str, Any], numbers: Numbers, i: int, group: str) -> Safe | None:
    path = ("differences", i - 1, "true_boxes", group)
    if numbers.at(*path) is None:
        return None
    shares = [join([numbers.percent("runs", k, "true_boxes", group, "value"), " %"]) for k in (i, 0)]
    return join(["Given the true boxes, ", _run(document, i), f" names {WORDS[group]} objects right in ", shares[0],
                 " of cases, ", _run(document, 0), " in ", shares[1], ": ", *_judged(numbers, path), "."])  # fmt: skip


def _unfound(document: dict[str, Any], numbers: Numbers) -> Safe | None:
    """How many tested categories score nothing at all."""
    kind, runs = document["kind"], document["runs"]
    if not any(run["unfound"][kind] for run in runs):
        return None
    each = [join([numbers.count("runs", i, "unfound", kind), *([" with ", _run(document, i)] if len(runs) > 1 else [])])
            for i in range(len(runs))]  # fmt: skip
    return join(["Of ", numbers.count("data", "tested"), " tested categories so many have an AP of 0: ", join(each, ", "),
                 "."])  # fmt: skip
