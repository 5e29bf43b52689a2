"""What is kept of a classifier's logits: four numbers an image or class, from which every figure of the report follows.

Shapes: N images, C classes. The logits themselves may be large (50,000 images of 10,000 classes take 2 GB) and go.
"""

from dataclasses import dataclass

import numpy as np

_CHUNK = 4_000_000  # logits whose softmax is held at once, in float64


@dataclass(frozen=True)
class Scores:
    """Of each image the winner and its softmax score, how many classes beat the true one, and the classes' mean scores."""

    predicted_N: np.ndarray  # int64: the class of the largest logit (ties: the first)
    confidence_N: np.ndarray  # float64, 0..1: its softmax score
    rank_N: np.ndarray  # int64: classes before the true one by logit (ties: the first in order), so 0 where it is predicted
    mean_score_C: np.ndarray  # float64, adds up to 1: mean softmax score of the class over the images, p(y)

    @staticmethod
    def of(logits_NC: np.ndarray, labels_N: np.ndarray) -> "Scores":
        """Raises: ValueError where a logit is not a finite number, or there are no images."""
        n, k = logits_NC.shape
        if not n:
            raise ValueError("no images to score")
        predicted_N, rank_N = np.empty(n, np.int64), np.empty(n, np.int64)
        confidence_N, total_C = np.empty(n), np.zeros(k)
        step = max(1, _CHUNK // k)
        for rows in (slice(start, start + step) for start in range(0, n, step)):
            z_BC = logits_NC[rows].astype(np.float64)
            if not np.isfinite(z_BC).all():
                raise ValueError("a logit is not a finite number")
            truth_B1 = np.take_along_axis(z_BC, labels_N[rows, None], axis=1)
            predicted_N[rows], rank_N[rows] = z_BC.argmax(1), (z_BC > truth_B1).sum(1)
            tied = (z_BC == truth_B1).sum(1) > 1  # rare, but logits that are all alike must not count as five right ones
            before_BC = np.arange(k) < labels_N[rows][tied, None]
            rank_N[rows][tied] += ((z_BC[tied] == truth_B1[tied]) & before_BC).sum(1)
            p_BC = np.exp(z_BC - z_BC.max(1, keepdims=True))
            p_BC /= p_BC.sum(1, keepdims=True)
            confidence_N[rows] = p_BC.max(1)
            total_C += p_BC.sum(0)
        return Scores(predicted_N, confidence_N, rank_N, total_C / n)
