"""What the choice of test photos alone would make of a detector's figures.

Two runs: swapped photo by photo. Where it makes no difference which of the two detectors looks at a photo, changing hands
over any of the photos gives a difference as likely as the one that was found; the share of such swaps that give one as large
is an exact p (Fisher 1935; for scores of retrieval and translation: Noreen 1989), however few objects there are, and whatever
the figure is. So AP is computed anew for each swap, by LVIS's rules, from the matches of the engine that scored the runs.

One run: the accuracy at true boxes has a bootstrap over photos, as objects of one photo are not independent. Its mean is over
categories, so a photo counts by its objects' shares of them. A category of one or two photos shows too little of its own
spread and takes that of its group; where fewer than five objects are right, or wrong, Wilson's interval stands for it, with
the figure's effective number of photos. Of AP itself no interval is known that holds where categories have one object.

Shapes: B photos, N detections or objects, C categories, T thresholds of IoU, R swaps, P right detections.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..metrics.intervals import DRAWS, LEVEL, SEED, wilson

SWAPS, FEWEST = 999, 99  # of photos between two runs; fewer where the detections are many
_BUDGET = 3e9  # swapped detections of a pair, thresholds and kind by kind: a minute or so
_CHUNK = 4_000_000  # swapped detections held at once
_RECALLS = np.linspace(0.0, 1.0, 101)  # at which LVIS reads precision
_POOLED = 2  # photos up to which a category takes its group's spread
_FEW = 5.0  # objects right, or wrong, from which on the draws are trusted


@dataclass(frozen=True)
class Matches:
    """Detections that count, with what they hit. ``images``, ``categories``: places [N] from 0; ``scores`` [N]; ``right`` and
    ``wrong`` bool [N, T]: neither is one that is not judged; ``objects`` [C]: how many are to be found."""

    images: np.ndarray
    categories: np.ndarray
    scores: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    objects: np.ndarray


def swapped_differences(first: Matches, other: Matches, groups: dict[str, np.ndarray], photos: int, *, seed: int = SEED
                        ) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Difference of AP, ``other`` minus ``first``, and its p: over the categories (bool [C]) of each of ``groups``; a group
    without an object is left out."""
    swapped_RB = np.random.default_rng(seed).integers(0, 2, (swaps_of(first, other) + 1, photos), dtype=np.int8)
    swapped_RB[0] = 0  # as it was found
    tested_C = first.objects > 0
    gained_CR = np.zeros((len(tested_C), len(swapped_RB)))
    for c in np.flatnonzero(tested_C):
        gained_CR[c] = np.subtract(*_both(first, other, c, swapped_RB)[::-1])
    return {name: _found(gained_CR[of_C & tested_C].mean(0)) for name, of_C in groups.items() if (of_C & tested_C).any()}


def swaps_of(first: Matches, other: Matches) -> int:
    """How many swaps of two runs are tried."""
    size = max(1, (len(first.scores) + len(other.scores)) * 2 * first.right.shape[1])
    return int(min(SWAPS, max(FEWEST, _BUDGET / size)))


def swapped_accuracy(images_N: np.ndarray, shares_N: np.ndarray, gained_N: np.ndarray, photos: int, *, seed: int = SEED
                     ) -> tuple[float, float]:  # fmt: skip
    """The same of a sum over objects: ``shares_N`` of each in it, ``gained_N`` 1 for an object that the other alone has right,
    -1 for one that the first alone has."""
    gained_B = np.bincount(images_N, shares_N * gained_N, photos)
    signs_RB = 1 - 2 * np.random.default_rng(seed).integers(0, 2, (SWAPS + 1, photos), dtype=np.int8)
    signs_RB[0] = 1
    return _found(signs_RB @ gained_B)


def _found(gained_R: np.ndarray) -> tuple[float, float]:
    as_large = np.abs(gained_R) >= abs(gained_R[0]) - 1e-9  # the one found is among them
    return float(gained_R[0]), float(as_large.mean())


def average_precision(matches: Matches, c: int) -> float:
    """AP of a category as the engines have it: the mean over thresholds and 101 recalls."""
    return float(_both(matches, matches, c, np.zeros((1, int(matches.images.max(initial=0)) + 1), np.int8))[0][0])


def _both(first: Matches, other: Matches, c: int, swapped_RB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AP [R] of both runs after each swap."""
    rows, rows_other = (np.flatnonzero(one.categories == c) for one in (first, other))
    scores_N = np.concatenate([first.scores[rows], other.scores[rows_other]])
    order_N = np.argsort(-scores_N, kind="stable")
    images_N, theirs_N, right_NT, wrong_NT = (np.concatenate(pair)[order_N] for pair in (
        (first.images[rows], other.images[rows_other]), (np.zeros(len(rows), np.int8), np.ones(len(rows_other), np.int8)),
        (first.right[rows], other.right[rows_other]), (first.wrong[rows], other.wrong[rows_other])))  # fmt: skip
    last = int(np.flatnonzero(right_NT.any(1)).max(initial=-1)) + 1  # what is wrong after the last that is right costs nothing
    images_N, theirs_N, right_NT, wrong_NT = (a[:last] for a in (images_N, theirs_N, right_NT, wrong_NT))
    found = np.zeros((2, len(swapped_RB)))
    step = max(1, _CHUNK // max(1, last, int(first.objects[c])))
    for start in range(0, len(swapped_RB), step):
        part = slice(start, start + step)
        of_other_RN = swapped_RB[part][:, images_N] ^ theirs_N  # after the swap
        for side in (0, 1):
            found[side, part] = _precision(of_other_RN == side, right_NT, wrong_NT, int(first.objects[c]))
    return found[0], found[1]


def _precision(kept_RN: np.ndarray, right_NT: np.ndarray, wrong_NT: np.ndarray, objects: int) -> np.ndarray:
    """AP [R] of the detections ``kept_RN``, which stand in the order of their scores."""
    # How many must be found for each recall; at least one, as precision is 0 before.
    needed = np.maximum(1, np.searchsorted(np.arange(objects + 1) / objects, _RECALLS, side="left"))
    total_R = np.zeros(len(kept_RN))
    for right_N, wrong_N in zip(right_NT.T, wrong_NT.T, strict=True):
        places_P = np.flatnonzero(right_N)
        if not len(places_P):
            continue
        kept_RP = kept_RN[:, places_P]
        hits_RP = kept_RP.cumsum(1)
        misses_RP = (kept_RN & wrong_N).cumsum(1, dtype=np.int32)[:, places_P]
        precision_RP = np.where(kept_RP, hits_RP / np.maximum(hits_RP + misses_RP, 1), 0)
        best_RP = np.maximum.accumulate(precision_RP[:, ::-1], axis=1)[:, ::-1]
        by_hits = np.zeros((len(kept_RN), max(objects, len(places_P)) + 2))
        rows, columns = np.nonzero(kept_RP)
        by_hits[rows, hits_RP[rows, columns]] = best_RP[rows, columns]
        total_R += by_hits[:, needed].mean(1)
    return total_R / right_NT.shape[1]


def accuracy_interval(images_N: np.ndarray, categories_N: np.ndarray, right_N: np.ndarray, photos: int, *, seed: int = SEED
                      ) -> tuple[float, float, float]:  # fmt: skip
    """Mean over the categories of the share of their objects that is right, with its low and high end."""
    _, of_N, objects_K = np.unique(categories_N, return_inverse=True, return_counts=True)
    k = len(objects_K)
    share_K = np.bincount(of_N, right_N) / objects_K
    value = float(share_K.mean())
    part_N = 1 / (k * objects_K[of_N])  # of an object in the mean
    pairs = np.unique(np.stack([of_N, images_N]), axis=1)
    photos_K = np.bincount(pairs[0], minlength=k)
    pooled_K = photos_K <= _POOLED
    centre_K = np.where(pooled_K, value, share_K)
    widened_K = np.where(pooled_K, 1.0, np.sqrt(photos_K / np.maximum(photos_K - 1, 1)))
    moved_B = np.bincount(images_N, part_N * (right_N - centre_K[of_N]) * widened_K[of_N], photos)
    effective = 1 / float((np.bincount(images_N, part_N, photos) ** 2).sum())
    if min(value, 1 - value) * effective < _FEW:
        low, high = wilson(value * effective, effective)
    else:
        rng, law_B, drawn_D = np.random.default_rng(seed), np.full(photos, 1 / photos), np.empty(DRAWS)
        for d in range(DRAWS):
            drawn_D[d] = (rng.multinomial(photos, law_B) - 1) @ moved_B
        low, high = np.quantile(value + drawn_D, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, float(min(max(low, 0.0), value)), float(max(min(high, 1.0), value))


def mean_shares(categories_N: np.ndarray) -> np.ndarray:
    """Each object's share [N] in the mean over the categories."""
    _, of_N, objects_K = np.unique(categories_N, return_inverse=True, return_counts=True)
    return 1 / (len(objects_K) * objects_K[of_N])


def shown(p: float, others: int) -> bool:
    """Whether a difference is more than chance: at the interval's level, over all the runs that are compared (Bonferroni)."""
    return p * others <= 1 - LEVEL + 1e-12


def groups_of(groups: Sequence[str]) -> dict[str, np.ndarray]:
    """Categories (bool [C]) of AP, AP_r, AP_c and AP_f."""
    of_C = np.asarray(groups)
    return {"AP": np.ones(len(of_C), bool), **{f"AP_{group}": of_C == group for group in "rcf"}}
