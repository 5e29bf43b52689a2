"""What the numbers say, in plain words, and what to do about it. Every sentence follows from the document by the rules here."""

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .html import Numbers, Safe, join, named, tag
from .view import View

FLAT = (0.8, 1.25)  # how far the rarest group's part of p(y) may be from the most frequent group's and still count as level
SMALL = 0.05  # a gap between groups, as a fraction, that is not worth much trouble
_NAME = 40  # characters of a name within a sentence
_CHANCE = "; the difference could be chance."


@dataclass
class Verdict:
    """One sentence, what supports it, and advice: words and, where there is one, a command."""

    headline: Safe
    points: list[Safe] = field(default_factory=list)
    advice: list[tuple[Safe, str | None]] = field(default_factory=list)


def verdict(view: View, numbers: Numbers) -> Verdict:
    return _one(view, numbers, 0) if len(view.runs) == 1 else _several(view, numbers)


def gap_is_real(view: View, run: int) -> bool | None:
    """Whether the rarest group lies below the most frequent one by more than the choice of test images explains.

    The two groups share no image, so the interval of their difference follows from theirs (Donner and Zou, 2012).
    """
    ends = view.ends(run)
    return None if ends is None else _lies_below(view, run, ends[1], ends[0])


def _lies_below(view: View, run: int, group: str, other: str) -> bool:
    low, high = (view.runs[run]["metrics"][name] for name in (group, other))
    spread = ((high["value"] - high["low"]) ** 2 + (low["high"] - low["value"]) ** 2) ** 0.5
    return high["value"] - low["value"] > spread


def _gap(view: View, run: int) -> float | None:
    ends = view.ends(run)
    return None if ends is None else view.value(run, ends[0]) - view.value(run, ends[1])


def _one(view: View, numbers: Numbers, run: int) -> Verdict:
    found = Verdict(gap_sentence(view, numbers, run))
    found.points = [point for point in (scores_sentence(view, numbers, run), never_sentence(view, numbers, run),
                                        _rarest_sentence(view, numbers, run)) if point]  # fmt: skip
    found.advice = advise(view, numbers, run)
    return found


def _metric(numbers: Numbers, run: int, metric: str) -> Safe:
    return join([numbers.percent("runs", run, "metrics", metric, "value"), " %"])


def gap_sentence(view: View, numbers: Numbers, run: int, name: bool = False) -> Safe:
    """How the shot groups compare: the page's first sentence for a single run. ``name``: of which run, as one of several."""
    k, ends = len(view.document["data"]["classes"]), view.ends(run)
    whose = join(["With ", named(view.runs[run]["name"], _NAME), ", "]) if name else None
    if k == 1:
        return Safe("There is only one class, so there is no tail to see: every prediction is right.")
    if ends is None:
        return _start(whose, "all tested classes are of one shot group; their accuracy is ",
                      numbers.percent("runs", run, "metrics", "balanced_accuracy", "value"), " % on average.")  # fmt: skip
    head, tail = ends
    a, b = ("runs", run, "metrics", head, "value"), ("runs", run, "metrics", tail, "value")
    size = tag("strong", numbers.gap(a, b), " points")
    gap = _gap(view, run)
    real = gap_is_real(view, run) or _lies_below(view, run, head, tail)
    if real and gap >= SMALL and not name:
        return join(["The long tail costs ", size, f": {tail}-shot classes are recognised in ", numbers.percent(*b),
                     f" % of cases, {head}-shot ones in ", numbers.percent(*a), " %."])  # fmt: skip
    if real or abs(gap) >= SMALL:
        only = "only " if abs(gap) < SMALL else ""
        return _start(whose, f"{tail}-shot classes lie {only}", size, f" {'below' if gap > 0 else 'above'} {head}-shot ones, ",
                      numbers.percent(*b), " % against ", numbers.percent(*a), " %", "." if real else _CHANCE)  # fmt: skip
    return _start(whose, f"{tail}-shot and {head}-shot classes do about equally well, ", numbers.percent(*b), " % and ",
                  numbers.percent(*a), " %", _CHANCE)  # fmt: skip


def _start(whose: Safe | None, first: str, *rest: Any) -> Safe:
    return join([whose, first if whose else first[:1].upper() + first[1:], *rest])


def scores_sentence(view: View, numbers: Numbers, run: int, name: bool = False) -> Safe | None:
    """Whether p(y) is flat, said of the two outer groups."""
    tilt, ends = view.tilt(run), view.ends(run)
    if tilt is None:
        return None
    head, tail = ends
    whose = join(["The scores of ", named(view.runs[run]["name"], _NAME)]) if name else "Its scores"
    even = view.runs[run]["marginal"]["note"] is None
    a, b = (numbers.number("runs", run, "marginal", *([] if even else ["per_share"]), group, digits=2) for group in ends)
    part = "an even share of the scores" if even else "its share of the test images"
    said = join([f": on average a {tail}-shot class gets ", b, f" times {part}, a {head}-shot class ", a, " times."])
    if FLAT[0] <= tilt <= FLAT[1]:
        return join([whose, " are balanced" if even else " follow the test images", said])
    side = "frequent" if tilt < FLAT[0] else "rare"
    return join([whose, f" favour the {side} classes" if even else f" give the {side} classes more than their images", said])


def never_sentence(view: View, numbers: Numbers, run: int) -> Safe | None:
    """How many classes are never predicted; None where all are."""
    never = view.runs[run]["never_predicted"]
    if not never:
        return None
    predicted = view.runs[run]["per_class"]["predicted"]
    names = [view.document["data"]["classes"][c] for c in view.order[::-1] if predicted[c] == 0][:3]
    listed = join([" (", join([named(name, 24) for name in names], ", "), ", …)" if never > len(names) else ")"])
    return join([numbers.count("runs", run, "never_predicted"), " of ", numbers.count("data", "classes", "#"),
                 " classes ", "is" if never == 1 else "are", " never predicted", listed, "."])  # fmt: skip


def _rarest_sentence(view: View, numbers: Numbers, run: int) -> Safe | None:
    if view.runs[run]["metrics"]["rarest3"] is None:
        return None
    return join(["The three rarest classes reach ", _metric(numbers, run, "rarest3"), "."])


def advise(view: View, numbers: Numbers, run: int) -> list[tuple[Safe, str | None]]:
    """What to do about a run."""
    one, tilt, gap = view.runs[run], view.tilt(run), _gap(view, run)
    backbone = _typed(_backbone_of(one))
    if tilt is None or gap is None:
        return []
    if view.document["target_prior"] is not None:
        return [(Safe("These scores are re-scored for another class prior; without training, no more can be had."), None)]
    if tilt < FLAT[0]:
        advice = [(Safe("Train a new last layer that does not favour the frequent classes (minutes, on the same backbone):"),
                   f"balms retrain {backbone} --loss balanced --meta-sampler")]  # fmt: skip
        if one["loss"] == "balanced" and one["stage"] == "retrain":
            advice = [(Safe("Its loss is balanced, but its scores are not yet: train it longer, with a learned sampler."),
                       f"balms retrain {backbone} --loss balanced --meta-sampler --steps {_steps(one)}")]  # fmt: skip
        return [*advice, (Safe("See at once, without training, what another prior gives:"),
                          f"balms evaluate {_typed(one['run'])} --target-prior uniform")]  # fmt: skip
    balancing = one["sampler"] in ("class", "square-root", "progressive")
    if tilt > FLAT[1] and balancing and one["loss"] in ("balanced", "logit-adjusted"):
        return [(Safe("A balancing sampler on top of a balanced loss over-balances. Leave the sampler out:"),
                 f"balms retrain {backbone} --loss balanced --meta-sampler")]  # fmt: skip
    if tilt > FLAT[1] and one["loss"] in ("balanced", "logit-adjusted"):
        return [(Safe("The rare classes are favoured more than even. Weaken the loss's margins:"),
                 f"balms retrain {backbone} --loss balanced --loss-exponent 0.75")]  # fmt: skip
    if tilt > FLAT[1]:
        return [(Safe("Nothing in its loss favours the rare classes: its scores are spread because it is unsure. A better "
                      "backbone, or more training, helps more than another loss."), None),
                *_better_backbone(view, one)]  # fmt: skip
    if gap_is_real(view, run) and gap >= SMALL:
        worst = _weakest(view, run)
        names = join([named(view.document["data"]["classes"][c], 24) for c in worst], ", ")
        return [(join(["The scores are level, so what is left of the gap is what few images cannot teach. More images help "
                       "most for the classes that do worst: ", names, "."]), None), *_better_backbone(view, one)]  # fmt: skip
    if gap >= SMALL:
        return [(Safe("The scores are level, and what is left of the gap could be chance: more test images would tell."), None)]
    groups = "the groups do about equally well" if gap > -SMALL else "the rare classes do no worse than the frequent ones"
    return [(Safe(f"For the tail there is nothing to mend: the scores are level and {groups}."), None)]


def _typed(path: str) -> str:
    """A path as one would type it here: relative where it lies below."""
    below = Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd())
    return shlex.quote(os.path.relpath(path) if below else str(path))


def _better_backbone(view: View, one: dict[str, Any]) -> list[tuple[Safe, str]]:
    source, data = view.document["data"]["source"], _typed(one["provenance"]["manifest"])
    if source == "digits":
        return []  # a backbone of a few minutes is all that they need
    if source in ("cifar10", "cifar100"):
        return [(Safe("Or train the backbone longer, with stronger augmentation (on a GPU):"),
                 f"balms pretrain {data} --preset paper")]  # fmt: skip
    return [(Safe("Or start from a backbone that has seen more images than yours:"),
             f"balms pretrain {data} --backbone resnet18 --weights imagenet")]  # fmt: skip


def _weakest(view: View, run: int, most: int = 3) -> list[int]:
    """The classes with the lowest accuracy; of equals the rarer ones."""
    accuracy = view.runs[run]["per_class"]["accuracy"]
    counts = view.of(run, "train_counts")
    tested = [c for c in range(len(counts)) if accuracy[c] is not None]
    return sorted(tested, key=lambda c: (accuracy[c], counts[c]))[:most]


def _backbone_of(one: dict[str, Any]) -> str:
    """The stage-1 run that a command on this run's backbone starts from."""
    parent = one["provenance"]["parent"]
    return one["run"] if one["stage"] == "pretrain" or not isinstance(parent, str) else str(Path(parent).parent)


def _steps(one: dict[str, Any]) -> int:
    steps = one["recipe"].get("steps", {}).get("value")
    return 2 * steps if isinstance(steps, int) and steps > 0 else 2000


def _several(view: View, numbers: Numbers) -> Verdict:
    """The best run against the first, then what each of the two is like."""
    best, first = view.best, named(view.runs[0]["name"], _NAME)
    name = named(view.runs[best]["name"], _NAME)
    found = view.difference(best) if best else None
    if best == 0:
        headline = join(["No run is better than ", first, " over all classes, which has ",
                         _metric(numbers, 0, "balanced_accuracy"), "."])  # fmt: skip
    elif found is None or found["metrics"]["balanced_accuracy"] is None:
        headline = join([name, " has the highest accuracy over all classes, ", _metric(numbers, best, "balanced_accuracy"),
                         " against ", _metric(numbers, 0, "balanced_accuracy"), " of ", first,
                         ", but on other images: how much of that is chance cannot be told."])  # fmt: skip
    else:
        headline = _best_sentence(view, numbers, best, found, name, first)
    verdict = Verdict(headline)
    verdict.points = [p for p in (_backbones_differ(view), *(_costs(view, numbers, best, found) if found else ()),
                                  gap_sentence(view, numbers, 0, name=True),
                                  gap_sentence(view, numbers, best, name=True) if best else None,
                                  scores_sentence(view, numbers, 0, name=True),
                                  scores_sentence(view, numbers, best, name=True) if best else None) if p]  # fmt: skip
    if best and found and _real(found, "balanced_accuracy"):
        verdict.advice = [(join(["Use ", name, ":"]), f"balms predict {_typed(view.runs[best]['run'])} IMAGES")]
    verdict.advice += advise(view, numbers, best)
    return verdict


def _backbones_differ(view: View) -> Safe | None:
    """That the runs differ in more than how the tail was treated, where they do; what is not known of a run is passed over."""
    for key, words in {"backbone": "have different backbones", "image_size": "see images of different sizes",
                       "weights": "began with different weights"}.items():  # fmt: skip
        known = list(dict.fromkeys(str(run["recipe"][key].get("value")) for run in view.runs if key in run["recipe"]))
        if len(known) > 1:
            names = join([" (", join([named(name, 24) for name in known[:3]], ", "), ", …)" if len(known) > 3 else ")"])
            return join([f"The runs {words}", names if key == "backbone" else None, ", so gaps are not the last layer alone."])
    return None


def _real(found: dict[str, Any], metric: str) -> bool:
    bounds = found["metrics"][metric]
    return bounds is not None and bounds["real"]


def _place(view: View, found: dict[str, Any], metric: str) -> tuple:
    return ("differences", view.document["differences"].index(found), "metrics", metric)


def _points_with_interval(view: View, numbers: Numbers, found: dict[str, Any], metric: str) -> Safe:
    path = _place(view, found, metric)
    return join([tag("strong", numbers.points(*path, "value"), " points"), " (", numbers.signed(*path, "low"), " to ",
                 numbers.signed(*path, "high"), ")"])  # fmt: skip


def _best_sentence(view: View, numbers: Numbers, best: int, found: dict[str, Any], name: Safe, first: Safe) -> Safe:
    overall, tail = _points_with_interval(view, numbers, found, "balanced_accuracy"), _tail_gained(view, best, found)
    if not _real(found, "balanced_accuracy"):
        return join([name, " leads ", first, " by ", overall, " over all classes, which could be chance: it may be 0."])
    if tail:
        return join([name, f" recognises {tail}-shot classes better than ", first, " by ",
                     _points_with_interval(view, numbers, found, tail), ", and all classes by ", overall,
                     ". Both differences are real."])  # fmt: skip
    return join([name, " is better than ", first, " by ", overall, " over all classes. The difference is real."])


def _tail_gained(view: View, best: int, found: dict[str, Any]) -> str | None:
    """The rarest group, where the best run is really better on it."""
    ends = view.ends(best)
    return ends[1] if ends and _real(found, ends[1]) and found["metrics"][ends[1]]["value"] > 0 else None


def _costs(view: View, numbers: Numbers, best: int, found: dict[str, Any]) -> list[Safe]:
    """What the best run gains or loses on the most frequent group; on the rarest too, where the headline does not say it."""
    ends = view.ends(best)
    if ends is None:
        return []
    told = _real(found, "balanced_accuracy") and _tail_gained(view, best, found)
    groups = [ends[0], *([ends[1]] if _real(found, ends[1]) and not told else [])]
    return [_cost(view, numbers, found, group) for group in groups if found["metrics"][group] is not None]


def _cost(view: View, numbers: Numbers, found: dict[str, Any], group: str) -> Safe:
    bounds, path = found["metrics"][group], _place(view, found, group)
    if not bounds["real"]:
        return join([f"On {group}-shot classes no difference can be told: ", numbers.signed(*path, "value"),
                     " points, interval ", numbers.signed(*path, "low"), " to ", numbers.signed(*path, "high"),
                     "."])  # fmt: skip
    verb = "It costs " if bounds["value"] < 0 else "It also gains "
    return join([verb, _points_with_interval(view, numbers, found, group), f" on {group}-shot classes."])
