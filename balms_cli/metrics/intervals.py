"""How far a figure could be from its value by the choice of test images alone: intervals of accuracies and differences.

Every figure is a weighted mean of class accuracies, and a test set's class sizes are its design. So the bootstrap draws
within each class: from the n images of a class n - 1 anew, with replacement (McCarthy and Snowden 1985; with n, the
variance would come out too small by (n - 1)/n, which matters where a class has two or three test images). With h of the n
right, the right ones among the drawn are Binomial(n - 1, h/n), exactly. For two runs on the same images the four outcomes
(both right, one, the other, none) are multinomial in the same way. So no image is ever resampled.

What a bootstrap cannot see is told otherwise:
  * one test image of a class has no spread of its own, and two show all or nothing: such a class takes the spread of its
    shot group (drawn with the group's mean shares, and centred on what was seen);
  * fewer than five images right, or wrong (of two runs: told apart), say too little; where all are wrong, every draw is 0.
    There stands the Wilson interval (Wilson 1927), for a difference the one of Bonett and Price (2012), with the figure's
    effective number of images, 1 / sum_c w_c^2 / n_c: exact where the classes share one accuracy;
  * so it does for a figure of fewer than 20 classes that is mostly made of classes with one outcome alone (all right, or all
    wrong), which show no spread. Over many classes those that show too little and too much make up for each other.

Simulated test sets (tests/test_intervals.py): 92 to 97 % of the intervals hold the truth; where a figure hangs on a few
classes of one or two images, 83 % and more.

Shapes: C classes, M metrics, D draws. All intervals are two-sided, 95 %.
"""

import numpy as np

from ..data.longtail import shot_groups
from .accuracy import metric_weights

LEVEL, DRAWS, SEED = 0.95, 2000, 0
Z = 1.959963984540054  # the normal quantile of (1 + LEVEL) / 2
_FEW = 5.0  # images right, or wrong, from which on the draws are trusted
_MANY = 20  # classes
_POOLED = 2  # test images up to which a class takes its group's spread
_CHUNK = 1_000_000  # numbers drawn at once
_MOST_ROWS = 1000  # terms of a sum from which on it is normal

Bounds = dict[str, tuple[float, float, float] | None]  # metric -> value, low, high


def wilson(hits, images) -> tuple[np.ndarray, np.ndarray]:
    """Low and high end of Wilson's score interval of a proportion; NaN where there are no images."""
    hits, images = np.asarray(hits, np.float64), np.asarray(images, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = hits / images
        centre = (hits + Z**2 / 2) / (images + Z**2)
        half = Z * np.sqrt(images * share * (1 - share) + Z**2 / 4) / (images + Z**2)
    low, high = np.where(hits == 0, 0.0, centre - half), np.where(hits == images, 1.0, centre + half)  # exact at both ends
    return np.where(images > 0, low, np.nan), np.where(images > 0, high, np.nan)


def accuracy_intervals(class_counts: list[int], tested_C: np.ndarray, hits_C: np.ndarray, hits5_C: np.ndarray, *,
                       draws: int = DRAWS, seed: int = SEED) -> Bounds:  # fmt: skip
    """Value and 95 % interval of every scalar metric; None for one that is empty.

    ``class_counts``: training images a class; ``tested_C``: its test images; ``hits_C``, ``hits5_C``: how many of those
    were right, and right among the top five.
    """
    none_C = np.zeros_like(hits_C)
    return _all_bounds(class_counts, tested_C, (hits_C, none_C), (hits5_C, none_C), False, draws, seed)


def paired_intervals(class_counts: list[int], tested_C: np.ndarray, gained_lost: tuple[np.ndarray, np.ndarray],
                     gained_lost5: tuple[np.ndarray, np.ndarray], *, draws: int = DRAWS, seed: int = SEED
                     ) -> Bounds:  # fmt: skip
    """Value and 95 % interval of the difference between two runs on the same images, a metric each.

    ``gained_lost``: images of each class [C] that only the run has right, and that only the one it is compared with has;
    ``gained_lost5``: the same among the top five.
    """
    return _all_bounds(class_counts, tested_C, gained_lost, gained_lost5, True, draws, seed)


def _all_bounds(class_counts, tested_C, moved, moved5, paired: bool, draws: int, seed: int) -> Bounds:
    weights = metric_weights(class_counts, tested_C)
    groups_C = np.asarray(shot_groups(class_counts))
    found: Bounds = dict.fromkeys(weights)
    for (gained_C, lost_C), metrics in ((moved, [m for m in weights if m != "top5"]), (moved5, ["top5"])):
        metrics = [m for m in metrics if weights[m] is not None]
        weights_CM = np.stack([weights[m] for m in metrics], axis=1) if metrics else np.zeros((len(tested_C), 0))
        drawn_DM = resample(tested_C, gained_C, lost_C, groups_C, weights_CM, draws, seed)
        for i, metric in enumerate(metrics):
            found[metric] = _bounds(tested_C, gained_C, lost_C, weights_CM[:, i], drawn_DM[:, i], paired)
    return found


def resample(tested_C: np.ndarray, gained_C: np.ndarray, lost_C: np.ndarray, groups_C: np.ndarray, weights_CM: np.ndarray,
             draws: int, seed: int) -> np.ndarray:  # fmt: skip
    """Bootstrap draws [D, M] of sum_c w_c (gained_c - lost_c) / n_c.

    Classes with the same outcomes, size and weights are drawn as one, as a sum of binomials of one p is binomial: ten
    thousand classes of five test images are a few dozen rows. Where still more than a thousand are left, those that make
    up less than a thousandth of every figure's variance are drawn together, as the normal law that their sum has.
    """
    tested = tested_C > 0
    n_T, weights_TM, groups_T = tested_C[tested], weights_CM[tested], groups_C[tested]
    seen_T2 = np.stack([gained_C[tested], lost_C[tested]], axis=1) / n_T[:, None]
    shares_T2, pooled_T = seen_T2.copy(), n_T <= _POOLED
    for group in set(groups_T[pooled_T]):
        shares_T2[(groups_T == group) & pooled_T] = seen_T2[groups_T == group].mean(0)
    centre_M = weights_TM.T @ (seen_T2 - shares_T2) @ [1.0, -1.0]  # 0 but for the pooled classes
    size_T = np.where(pooled_T, n_T, n_T - 1)
    rows, alike_R = np.unique(np.column_stack([size_T, shares_T2, weights_TM]), axis=0, return_counts=True)
    size_R, gain_R, loss_R, weights_RM = rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:]
    images_R = (size_R * alike_R).astype(np.int64)
    given_R = np.divide(loss_R, 1 - gain_R, out=np.zeros_like(loss_R), where=gain_R < 1).clip(0, 1)  # lost, of those not gained
    rng = np.random.default_rng(seed)
    drawn_DM = np.tile(centre_M, (draws, 1))
    mean_R = (gain_R - loss_R) * alike_R
    variance_R = (gain_R + loss_R - (gain_R - loss_R) ** 2) * alike_R / size_R
    kept = np.arange(len(rows))
    if len(rows) > _MOST_ROWS:
        shares_RM = weights_RM**2 * variance_R[:, None]
        small_R = (shares_RM <= shares_RM.sum(0) / _MOST_ROWS).all(1)
        kept, small_SM = np.flatnonzero(~small_R), weights_RM[small_R]
        covariance_MM = (small_SM * variance_R[small_R, None]).T @ small_SM
        drawn_DM += rng.multivariate_normal(mean_R[small_R] @ small_SM, covariance_MM, size=draws)
    step = max(1, _CHUNK // draws)
    for part in (kept[start : start + step] for start in range(0, len(kept), step)):
        gained_DR = rng.binomial(images_R[part], gain_R[part], size=(draws, len(images_R[part])))
        lost_DR = rng.binomial(images_R[part] - gained_DR, given_R[part])
        drawn_DM += (gained_DR - lost_DR) / size_R[part] @ weights_RM[part]
    return drawn_DM


def _bounds(tested_C, gained_C, lost_C, weights_C, drawn_D, paired: bool) -> tuple[float, float, float]:
    """Value, low and high: the middle 95 % of the draws, or the closed form where the images say too little for that."""
    n_C = np.maximum(tested_C, 1)
    gained, lost = float(weights_C @ (gained_C / n_C)), float(weights_C @ (lost_C / n_C))
    part_C = weights_C**2 / n_C
    value, images = gained - lost, 1 / float(part_C.sum())
    moved_C, net_C = (gained_C + lost_C) / n_C, (gained_C - lost_C) / n_C
    silent = part_C[np.isclose(moved_C, net_C**2)].sum() > part_C.sum() / 2 and np.count_nonzero(weights_C) < _MANY
    if round(min(gained + lost, 1 - gained, 1 - lost) * images, 6) >= _FEW and not silent:
        low, high = np.quantile(drawn_D, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    elif paired:
        low, high = _bonett_price(gained * images, lost * images, images)
    else:
        low, high = wilson(gained * images, images)
    least = -1.0 if paired else 0.0
    return value, float(min(max(low, least), value)), float(max(min(high, 1.0), value))


def _bonett_price(gained: float, lost: float, images: float) -> tuple[float, float]:
    """Interval of a paired difference of proportions: Wald's, with one image added to each side and as many to the total."""
    up, down = (gained + 1) / (images + 2), (lost + 1) / (images + 2)
    half = Z * ((up + down - (up - down) ** 2) / (images + 2)) ** 0.5
    return up - down - half, up - down + half
