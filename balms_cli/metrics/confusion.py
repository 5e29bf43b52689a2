"""Where the wrong ones go: between shot groups, between classes, and what scores a class gets on the whole.

Shapes: N images, C classes.
"""

from typing import Any

import numpy as np

from .accuracy import GROUPS


def group_confusion(labels_N: np.ndarray, predicted_N: np.ndarray, groups_C: np.ndarray) -> dict[str, dict[str, float] | None]:
    """Of each group's images the share that is right, and that is wrongly taken for a class of each group: adds up to 1.

    None for a group without images.
    """
    true_N, taken_N, right_N = groups_C[labels_N], groups_C[predicted_N], labels_N == predicted_N
    table: dict[str, dict[str, float] | None] = {}
    for group in GROUPS:
        of_N = true_N == group
        wrong = {other: of_N & ~right_N & (taken_N == other) for other in GROUPS}
        cells = {"right": of_N & right_N, **wrong}
        table[group] = {name: float(cell_N.sum() / of_N.sum()) for name, cell_N in cells.items()} if of_N.any() else None
    return table


def confused_pairs(labels_N: np.ndarray, predicted_N: np.ndarray, classes: list[str], most: int = 12) -> list[dict[str, Any]]:
    """The classes that are most often taken for another: by share of the true class's images times their number.

    The product keeps both a rare class that is always wrong and a large one that is often wrong. Ties go by name.
    """
    k = len(classes)
    wrong_N = labels_N != predicted_N
    codes, counts = np.unique(labels_N[wrong_N] * k + predicted_N[wrong_N], return_counts=True)
    true, taken = codes // k, codes % k
    shares = counts / np.bincount(labels_N, minlength=k)[true]
    order = sorted(range(len(codes)), key=lambda i: (-shares[i] * counts[i], classes[true[i]], classes[taken[i]]))
    return [
        {"true": int(true[i]), "predicted": int(taken[i]), "count": int(counts[i]), "share": float(shares[i])}
        for i in order[:most]
    ]


def marginal(mean_score_C: np.ndarray, tested_C: np.ndarray, groups_C: np.ndarray) -> dict[str, Any]:
    """How far the marginal likelihood p(y), the mean score of each class over the images, is from flat.

    In units of 1/C: 1 is a class's fair part of the scores. ``variance`` of C p(y); ``kl_from_uniform`` in nats; by group the
    mean C p(y) of its classes. On a split that is not balanced a perfect classifier is not flat either: ``note`` says so, and
    ``per_share`` has what each group gets over its share of the split's images.
    Source: Ren et al., NeurIPS 2020, Figure 1 (the main paper's).
    """
    k = len(mean_score_C)
    relative_C = k * mean_score_C
    positive_C = mean_score_C[mean_score_C > 0]
    found: dict[str, Any] = {
        "variance": float(relative_C.var()),
        "kl_from_uniform": max(0.0, float((positive_C * np.log(k * positive_C)).sum())),
        **{group: float(relative_C[groups_C == group].mean()) if (groups_C == group).any() else None for group in GROUPS},
        "per_share": {group: _over(mean_score_C[groups_C == group].sum(), tested_C[groups_C == group].sum() / tested_C.sum())
                      for group in GROUPS},
        "note": None,
    }  # fmt: skip
    if tested_C.min() != tested_C.max():
        low, high = k * tested_C.min() / tested_C.sum(), k * tested_C.max() / tested_C.sum()
        found["note"] = (f"the split is not balanced: a classifier that is always right and sure would have its classes at "
                         f"{low:.3g} to {high:.3g} of the fair part, in proportion to their images")  # fmt: skip
    return found


def _over(part: float, share: float) -> float | None:
    return float(part / share) if share > 0 else None
