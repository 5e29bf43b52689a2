"""How long a tail is: figures of the class counts alone. Pure NumPy; used by the report and by ``balms audit``.

Counts are training images a class, in any order. C is the number of classes.
"""

import math
from collections.abc import Sequence

import numpy as np

from ..data.longtail import gini, imbalance_factor

__all__ = ["gini", "head_share", "imbalance_factor"]


def head_share(class_counts: Sequence[int] | np.ndarray, share: float = 0.1) -> float:
    """The part of all images that lies in the largest ``share`` of the classes (rounded up, so at least one class).

    Returns: a fraction; for equal classes about ``share``, near 1 for a long tail. 0 where there are no images.
    Raises: ValueError unless 0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share is above 0 and at most 1, got {share}")
    ordered = np.sort(np.asarray(class_counts, dtype=np.float64))[::-1]
    head = math.ceil(round(share * ordered.size, 9))  # rounded first: 0.07 * 100 is 7.000000000000001
    return float(ordered[:head].sum() / ordered.sum()) if ordered.sum() else 0.0
