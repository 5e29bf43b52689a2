"""What an audit finds wrong or worth knowing, each with its count, a few examples, and what to do about it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import presets
from ..data import aside, moved
from ..data.audit import Listing, case_clashes
from ..data.audit_files import Facts
from ..data.duplicates import SPLITS, TRAIN_TEST, WITHIN, Duplicates
from ..data.folders import UNDECODED, undecoded
from ..data.sources import MIN_SPLIT, SHARDS, called_splits, no_image
from ..metrics.intervals import wilson

PROBLEM, NOTE = "problem", "note"
NEAR_EMPTY = 5  # images; the smallest class of ImageNet-LT and of Places-LT has as many (Liu et al., CVPR 2019)
FEW_TEST = 10  # test images a class: below, its accuracy says little
TEST_IMBALANCED = 1.5  # largest / smallest class of the test split
HUGE = 4096  # pixels of the longer side
_EXAMPLES = 3
_GRAY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")

# What a kind of problem of the listing is called; make-lt stops at each of them.
_LISTED = {
    "line": "lines of the list that cannot be used", "listed-twice": "lines with an image that an earlier line lists",
    "two-labels": "lines with another label than an earlier line for the same image", "label": "lines with a negative label",
    "class-name": "class folders with control characters in their names", "no-classes": "splits without class folders",
    "folder": "folders that cannot be read", "sample": "samples of the shards that cannot be used",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """``level``: problem (something to mend; ``--strict`` stops at it) or note. ``stops``: make-lt refuses it."""

    kind: str
    level: str
    count: int
    message: str
    examples: list[str] = field(default_factory=list)
    stops: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "level": self.level, "count": self.count, "message": self.message,
                "examples": self.examples, "stops_make_lt": self.stops}  # fmt: skip


def findings(listing: Listing, facts: Facts, duplicates: Duplicates, counts_SC: np.ndarray) -> list[Finding]:
    """All findings, problems first, in the order in which they matter."""
    found = [*_leakage(listing, duplicates), *_classes(listing, counts_SC), *_files(listing, facts), *_listed(listing),
             *_names(listing), *_test(listing, counts_SC), *_sizes(listing, facts), *_passed(listing)]  # fmt: skip
    return [one for one in found if one.level == PROBLEM] + [one for one in found if one.level == NOTE]


def _problem(kind: str, count: int, message: str, examples: list[str] | None = None, *, stops: bool = False) -> Finding:
    return Finding(kind, PROBLEM, count, message, examples or [], stops)


def _note(kind: str, count: int, message: str, examples: list[str] | None = None) -> Finding:
    return Finding(kind, NOTE, count, message, examples or [])


def _n(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _reasons(counts: Counter[str]) -> str:
    """Reasons, the most frequent first; how often each, where there are several."""
    if len(counts) == 1:
        return next(iter(counts))
    return aside.name_some([f"{reason} ({n:,})" for reason, n in counts.most_common()], 4)


def _pair(listing: Listing, rows: np.ndarray) -> str:
    """Two twins that differ in split or label, where they do."""
    first = rows[0]
    other = next((r for r in rows if listing.split_N[r] != listing.split_N[first]
                  or listing.label_N[r] != listing.label_N[first]), rows[1])  # fmt: skip

    def told(row: int) -> str:
        name = aside.printable(listing.classes[listing.label_N[row]])
        return f"{listing.splits[listing.split_N[row]]}: {listing.keys[row]} ({name})"

    return f"{told(first)} = {told(other)}"


def _leakage(listing: Listing, duplicates: Duplicates) -> list[Finding]:
    def pairs(groups: np.ndarray) -> list[str]:
        return [_pair(listing, duplicates.rows(np.array([group]))) for group in groups[:_EXAMPLES]]

    found = []
    leaks = duplicates.of_kind(TRAIN_TEST)
    if leaks.size:
        test = int((listing.split_N[duplicates.rows(leaks)] == listing.splits.index("test")).sum())
        text = f"leakage: {_n(test, 'test image')} also in the training images, with the same content: what is measured on "
        found.append(_problem("train-test-leak", test, text + "them is memory; take them out of train", pairs(leaks)))
    across = duplicates.of_kind(SPLITS)
    if across.size:
        text = f"{_n(len(across), 'image')} with the same content in two splits other than train and test"
        found.append(_problem("split-leak", len(across), text, pairs(across)))
    labels = np.flatnonzero(duplicates.labels_G)
    if labels.size:
        text = f"{_n(len(labels), 'image')} under two labels, with the same content: at least one of them is wrong"
        found.append(_problem("two-labels", len(labels), text, pairs(labels)))
    within = duplicates.of_kind(WITHIN)
    if within.size:
        extra = int((duplicates.size_G[within] - 1).sum())
        text = f"{_n(extra, 'exact copy', 'exact copies')} of images of the same class in the same split: "
        if "test" in listing.splits:
            found.append(_note("copies", extra, text + "they weigh more than others", pairs(within)))
        else:
            text += "make-lt cuts the test images from these, so that an image and its copy may come to lie on both sides"
            found.append(_problem("copies", extra, text, pairs(within)))
    return found


def _classes(listing: Listing, counts_SC: np.ndarray) -> list[Finding]:
    names = [aside.printable(name) for name in listing.classes]
    train_C = counts_SC[0]
    test_C = counts_SC[listing.splits.index("test")] if "test" in listing.splits else None
    tested_C = np.zeros(len(names), bool) if test_C is None else test_C > 0
    near_C, small_C = (train_C > 0) & (train_C < NEAR_EMPTY), (train_C > 0) & (train_C < MIN_SPLIT)
    problems = [("untrained", (train_C == 0) & tested_C, "in test without a training image"),
                ("empty", (train_C == 0) & ~tested_C, "without any image")]  # fmt: skip
    notes = [("near-empty", near_C, f"with fewer than {NEAR_EMPTY} training images")]
    if test_C is None:
        notes.append(("untested", small_C, f"with fewer than {MIN_SPLIT} images: make-lt keeps them all in training, untested"))
    else:
        notes.append(("untested", (train_C > 0) & ~tested_C, "without a test image: nothing will be known of them"))
    found = []
    for level, told in ((PROBLEM, problems), (NOTE, notes)):
        for kind, which_C, text in told:
            rows = np.flatnonzero(which_C)
            if rows.size:
                examples = [names[c] for c in rows[:_EXAMPLES]]
                message = f"{_n(len(rows), 'class', 'classes')} {text}"
                found.append(Finding(kind, level, len(rows), message, examples, stops=level == PROBLEM))
    if (train_C > 0).sum() == 1:
        found.append(_problem("one-class", 1, "only one class has training images: there is nothing to tell apart"))
    return found


def _files(listing: Listing, facts: Facts) -> list[Finding]:
    found = []
    if facts.root_gone:
        found.append(_problem("root-gone", 1, moved.gone(listing.root), stops=True))
    rows = np.flatnonzero(facts.reason_N)
    if rows.size:
        texts, counts = facts.reasons.texts, np.bincount(facts.reason_N[rows], minlength=len(facts.reasons.texts))
        reasons = _reasons(Counter({texts[c]: int(n) for c, n in enumerate(counts) if n}))
        shown = [f"{listing.keys[row]} ({texts[facts.reason_N[row]]})" for row in rows[:_EXAMPLES]]
        text = f"{len(rows):,} of {len(listing.keys):,} images cannot be read: {reasons}"
        found.append(_problem("unreadable", len(rows), text, shown, stops=True))
        lost_C = (listing.counts(facts.reason_N == 0)[0] == 0) & (listing.counts()[0] > 0)
        if lost_C.any():
            names = [aside.printable(listing.classes[c]) for c in np.flatnonzero(lost_C)]
            text = f"{_n(len(names), 'class', 'classes')} without a readable training image"
            found.append(_problem("all-unreadable", len(names), text, names[:_EXAMPLES], stops=True))
    if listing.bad:
        reasons = _reasons(Counter(reason for _, reason in listing.bad))
        text = f"{_n(len(listing.bad), 'entry', 'entries')} not read: {reasons}"
        shown = [aside.printable(key) for key, _ in listing.bad[:_EXAMPLES]]
        found.append(_problem("refused", len(listing.bad), text, shown, stops=True))
    return found


def _listed(listing: Listing) -> list[Finding]:
    kinds: dict[str, list[str]] = {}
    for kind, message in listing.problems:
        kinds.setdefault(kind, []).append(message)
    return [
        _problem(f"listed-{kind}", len(told), f"{_LISTED[kind]}: {len(told):,}", told[:_EXAMPLES], stops=True)
        for kind, told in kinds.items()
    ]


def _names(listing: Listing) -> list[Finding]:
    found = []
    if told := called_splits(listing.classes):
        found.append(_problem("split-names", len(listing.classes), told))
    if classes := case_clashes(listing.classes):
        shown = [" / ".join(map(aside.printable, group)) for group in classes[:_EXAMPLES]]
        text = f"{_n(len(classes), 'group')} of class names that differ only by case: most likely one class, and one folder on "
        found.append(_problem("class-case", len(classes), text + "other systems", shown))
    keys = case_clashes(listing.keys) if listing.has_files else []
    if alone := [group for group in keys if len({key.rpartition("/")[0] for key in group}) == 1]:
        text = f"{_n(len(alone), 'group')} of file names that differ only by case: on other systems one overwrites the other"
        found.append(_note("name-case", len(alone), text, [" / ".join(group) for group in alone[:_EXAMPLES]]))
    return found


def _test(listing: Listing, counts_SC: np.ndarray) -> list[Finding]:
    if "test" not in listing.splits:
        text = "no test split: make-lt sets 20 % of each class aside for it, so training has that much less than counted here"
        return [_note("no-test", 1, text)]
    test_C = counts_SC[listing.splits.index("test")]
    tested = test_C[test_C > 0]
    if not tested.size:
        return [_problem("no-test", 1, "the test split holds no image: nothing can be measured")]
    found = []
    if small := int((tested < FEW_TEST).sum()):
        n = int(np.median(tested[tested < FEW_TEST]))
        low, high = (100 * float(end) for end in wilson(n / 2, n))
        text = f"{_n(small, 'class', 'classes')} with fewer than {FEW_TEST} test images: of {_n(n, 'image')}, an accuracy of "
        text += f"50 % has a 95 % interval of {low:.0f} to {high:.0f} %; trust the means of the groups"
        found.append(_note("few-test", small, text))
    factor = tested.max() / tested.min()
    if factor > TEST_IMBALANCED:
        text = f"the test split is imbalanced itself (factor {factor:.3g}): top-1 follows its frequent classes; read "
        found.append(_note("test-imbalanced", 1, text + "balanced_accuracy and few"))
    return found


def _sizes(listing: Listing, facts: Facts) -> list[Finding]:
    rows = np.flatnonzero(facts.width_N)
    if not rows.size:
        return []
    width, height = facts.width_N[rows], facts.height_N[rows]
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    fed = fed_size(listing, (int(np.median(width)), int(np.median(height))))
    small = shorter < fed / 2
    small &= not small.all()  # where all are, that is what the data is
    found = []
    for kind, which, text in (
        ("small", small, f"less than half of the {fed} px that a network is fed by default: scaled up, and blurred"),
        ("huge", longer > HUGE, f"longer than {HUGE} px: most of the time will go into decoding; scale a copy down"),
        ("elongated", longer > 2 * shorter, "more than twice as long as wide: the centre square is less than half of them"),
    ):
        picked = np.flatnonzero(which)
        if picked.size:
            shown = [f"{listing.keys[rows[i]]} ({width[i]}x{height[i]})" for i in picked[:_EXAMPLES]]
            found.append(_note(kind, len(picked), f"{_n(len(picked), 'image')} {text}", shown))
    modes = np.bincount(facts.mode_N[rows], minlength=len(facts.modes.texts))
    if (modes > 0).sum() > 1:
        told = ", ".join(f"{modes[c]:,} {facts.modes.texts[c]}" for c in np.argsort(-modes, kind="stable") if modes[c])
        found.append(_note("modes", int((modes > 0).sum()), f"images of several modes ({told}): all are read as RGB"))
    return found + _gray_classes(listing, facts, rows)


def fed_size(listing: Listing, median: tuple[int, int]) -> int:
    """Pixels a side that preset quick feeds a network with such data."""
    name = listing.manifest.source["name"] if listing.manifest else listing.name
    return presets.choose("pretrain", presets.kind_of_data(name, median), "quick", on_gpu=False)[1]["image_size"]


def _gray_classes(listing: Listing, facts: Facts, rows: np.ndarray) -> list[Finding]:
    """Classes that are all gray among coloured ones, or the reverse: a network tells them by that alone."""
    gray = np.array([text in _GRAY for text in facts.modes.texts])[facts.mode_N[rows]]
    images_C = np.bincount(listing.label_N[rows], minlength=len(listing.classes))
    gray_C = np.bincount(listing.label_N[rows], weights=gray, minlength=len(listing.classes))
    what, other = ("coloured", "gray") if gray.mean() > 0.5 else ("gray", "coloured")
    odd_C = (images_C >= NEAR_EMPTY) & (gray_C == (images_C if what == "gray" else 0))
    if not odd_C.any() or odd_C.sum() == (images_C > 0).sum():
        return []
    names = [aside.printable(listing.classes[c]) for c in np.flatnonzero(odd_C)]
    text = f"{_n(len(names), 'class', 'classes')} wholly {what} where most images are {other}: a network may tell them by that"
    return [_note("mode-tells-class", len(names), text, names[:_EXAMPLES])]


def _passed(listing: Listing) -> list[Finding]:
    found = []
    if listing.kind == SHARDS and listing.passed:
        return [_problem("undecoded", listing.passed.total(), no_image(listing.passed))]
    others = Counter({kind: n for kind, n in listing.passed.items() if kind not in UNDECODED})
    if told := undecoded(listing.passed):
        found.append(_problem("undecoded", (listing.passed - others).total(), told))
    if total := others.total():
        kinds = [f"{n:,} {aside.printable(kind[:20]) or 'without ending'}" for kind, n in others.most_common()]
        text = f"{_n(total, 'file')} passed over as no image by name: {aside.name_some(kinds)}"
        found.append(_note("other-files", total, text))
    if listing.stray:
        found.append(_note("stray", listing.stray, f"{_n(listing.stray, 'image')} outside class folders, passed over"))
    if listing.beside:
        names = [aside.printable(name) for name in listing.beside[:_EXAMPLES]]
        text = f"{_n(len(listing.beside), 'folder')} beside train and test, passed over"
        found.append(_note("beside", len(listing.beside), text, names))
    if listing.again:
        text = f"{_n(listing.again, 'link')} to a folder that the class holds already (a circle, or a second way), passed over"
        found.append(_note("links-again", listing.again, text))
    return found
