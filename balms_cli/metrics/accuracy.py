"""What a classifier's logits are worth: overall, by shot group, and class by class.

Shapes: N test images, C classes. Fractions from 0 to 1; None where there is nothing to measure.
"""

from typing import Any

import numpy as np

from ..data.longtail import shot_groups

GROUPS = ("many", "medium", "few")
SCALARS = ("top1", "top5", "balanced_accuracy", *GROUPS, "rarest3")


def summarise(logits_NC: np.ndarray, labels_N: np.ndarray, classes: list[str], class_counts: list[int]) -> dict[str, Any]:
    """Every figure of ``evaluate``. ``class_counts``: training images a class, which decide the shot groups.

    ``many``/``medium``/``few`` (over 100, 20 to 100, under 20 training images; Liu et al., CVPR 2019) and
    ``balanced_accuracy`` are means of class accuracies; ``rarest3`` is that of the three classes with fewest training
    images that were tested (ties: the later in order). ``top5`` is None up to five classes, where it could only be 1.
    """
    k = len(classes)
    correct_N = logits_NC.argmax(1) == labels_N
    tested_C = np.bincount(labels_N, minlength=k)
    hits_C = np.bincount(labels_N[correct_N], minlength=k)
    accuracy_C = np.divide(hits_C, tested_C, out=np.full(k, np.nan), where=tested_C > 0)
    groups_C = np.asarray(shot_groups(class_counts))
    counts_C = np.asarray(class_counts)
    rarest = [c for c in np.lexsort((-np.arange(k), counts_C)) if tested_C[c]][:3]
    return {
        "top1": _mean(correct_N),
        "top5": _mean(_rank_of_truth(logits_NC, labels_N) < 5) if k > 5 else None,
        "balanced_accuracy": _mean(accuracy_C),
        **{group: _mean(accuracy_C[groups_C == group]) for group in GROUPS},
        "rarest3": _mean(accuracy_C[rarest]) if k > 3 else None,
        "per_class": [
            {"name": name, "train_count": int(n), "test_count": int(t), "accuracy": None if np.isnan(a) else float(a)}
            for name, n, t, a in zip(classes, class_counts, tested_C, accuracy_C, strict=True)
        ],
    }


def _mean(values: np.ndarray) -> float | None:
    """Mean without the NaN of untested classes; None for nothing."""
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else None


def _rank_of_truth(logits_NC: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """How many classes score strictly above the true one [N]."""
    truth_N1 = np.take_along_axis(logits_NC, labels_N[:, None], axis=1)
    return (logits_NC > truth_N1).sum(1)
