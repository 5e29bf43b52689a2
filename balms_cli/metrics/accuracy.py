"""What a classifier's scores are worth: overall, by shot group, and class by class.

Every figure here is a weighted mean of class accuracies; :func:`metric_weights` says which.
Shapes: N test images, C classes. Fractions from 0 to 1; None where there is nothing to measure.
"""

from typing import Any

import numpy as np

from ..data.longtail import shot_groups
from .scores import Scores

GROUPS = ("many", "medium", "few")
SCALARS = ("top1", "top5", "balanced_accuracy", *GROUPS, "rarest3")


def summarise(scores: Scores, labels_N: np.ndarray, classes: list[str], class_counts: list[int]) -> dict[str, Any]:
    """Every figure of ``evaluate``. ``class_counts``: training images a class, which decide the shot groups.

    ``many``/``medium``/``few`` (over 100, 20 to 100, under 20 training images; Liu et al., CVPR 2019) and
    ``balanced_accuracy`` are means of class accuracies; ``rarest3`` is that of the three classes with fewest training
    images that were tested (ties: the later in order). ``top5`` is None up to five classes, where it could only be 1.
    """
    k = len(classes)
    correct_N = scores.predicted_N == labels_N
    tested_C = np.bincount(labels_N, minlength=k)
    hits_C = np.bincount(labels_N[correct_N], minlength=k)
    accuracy_C = np.divide(hits_C, tested_C, out=np.full(k, np.nan), where=tested_C > 0)
    return {
        "top1": _mean(correct_N),
        "top5": _mean(scores.rank_N < 5) if k > 5 else None,
        **{metric: _mean(accuracy_C[of_C]) for metric, of_C in class_sets(class_counts, tested_C).items()},
        "per_class": [
            {"name": name, "train_count": int(n), "test_count": int(t), "accuracy": None if np.isnan(a) else float(a)}
            for name, n, t, a in zip(classes, class_counts, tested_C, accuracy_C, strict=True)
        ],
    }


def class_sets(class_counts: list[int], tested_C: np.ndarray) -> dict[str, np.ndarray]:
    """The tested classes that each mean of class accuracies is over: bool [C] a metric, all False where it is empty.

    ``tested_C``: test images a class. A class without any is in no set.
    """
    counts_C, groups_C, is_tested_C = np.asarray(class_counts), np.asarray(shot_groups(class_counts)), tested_C > 0
    k = len(counts_C)
    rarest3_C = np.zeros(k, bool)
    if k > 3:
        rarest3_C[[c for c in np.lexsort((-np.arange(k), counts_C)) if is_tested_C[c]][:3]] = True
    groups = {group: is_tested_C & (groups_C == group) for group in GROUPS}
    return {"balanced_accuracy": is_tested_C, **groups, "rarest3": rarest3_C}


def metric_weights(class_counts: list[int], tested_C: np.ndarray) -> dict[str, np.ndarray | None]:
    """Weights [C] of the class accuracies in each of SCALARS, adding up to 1; None for a metric that is empty.

    Those of ``top5`` belong to the classes' own top-5 accuracies.
    """
    overall_C = tested_C / tested_C.sum()
    sets = {metric: of_C / of_C.sum() if of_C.any() else None for metric, of_C in class_sets(class_counts, tested_C).items()}
    return {"top1": overall_C, "top5": overall_C if len(tested_C) > 5 else None, **sets}


def _mean(values: np.ndarray) -> float | None:
    """Mean without the NaN of untested classes; None for nothing."""
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else None
