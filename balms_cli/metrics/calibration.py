"""Whether a score of 0.8 is right eight times in ten: expected calibration error and the reliability diagram's bins."""

from typing import Any

import numpy as np

BINS = 15


def calibration(confidence_N: np.ndarray, correct_N: np.ndarray, bins: int = BINS) -> dict[str, Any] | None:
    """Expected calibration error over equal-width bins of the top score: sum_b n_b/N |accuracy_b - confidence_b|.

    Bin b holds scores in (b/bins, (b+1)/bins]. ``confidence_N``: softmax score of the predicted class; ``correct_N``: bool.
    Returns: None for no images. Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eqs 2 to 5.
    """
    n = len(confidence_N)
    if not n:
        return None
    edges = np.arange(bins + 1) / bins
    bin_N = np.clip(np.searchsorted(edges, confidence_N, side="left") - 1, 0, bins - 1)
    n_B = np.bincount(bin_N, minlength=bins)
    score_B = np.bincount(bin_N, confidence_N, minlength=bins)
    right_B = np.bincount(bin_N, correct_N.astype(np.float64), minlength=bins)
    return {
        "n": n,
        "ece": float(np.abs(right_B - score_B).sum() / n),
        "confidence": float(score_B.sum() / n),
        "accuracy": float(right_B.sum() / n),
        "bins": [
            {"low": float(edges[b]), "high": float(edges[b + 1]), "n": int(m),
             "confidence": float(score_B[b] / m) if m else None, "accuracy": float(right_B[b] / m) if m else None}
            for b, m in enumerate(n_B)
        ],
    }  # fmt: skip
