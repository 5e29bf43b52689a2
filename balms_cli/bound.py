"""The terms of the generalisation bound (Theorem 2, eqs 24-31 of the supplement) that one checkpoint can show.

Eq 28 holds the error on a balanced test set under the mean over the k classes of

    margin error on the training images + (4 / gamma_j) sqrt(C(F) / n_j) + epsilon_j(gamma_j).

What can be said:

- the optimal margins gamma*_j (eq 31) are known beforehand: they depend on the class counts alone, up to their sum beta;
- the margins f = t - l of the training images (eq 24), and the shares of them that lie under 0 (eq 25, on the sample) and
  under gamma*_j (eq 26, on the sample). At t = log 2 a loss under t means that the true class has over half of the
  probability, so that top-1 is right: the share with l > t is then no less than the top-1 error (but for exact ties);
- the complexity term up to the one factor sqrt(C(F)) that all classes share, hence also how much smaller its sum (eq 30) is
  at gamma* than at equal margins: by Cauchy-Schwarz sum_j n_j^(-1/2) / gamma_j is never under (sum_j n_j^(-1/4))^2 / beta;
- epsilon_j (eq 29), with delta / k where the text has delta, for eq 27 has to hold for all k classes at once, and for a
  stated B.

What cannot be said: the value of the right-hand side. C(F) is not known for a network. B has to hold for every model in F,
and one checkpoint on its training images shows only a lower limit of it. t and beta are free, and the corollary's own
argument moves t by gamma_base (eqs 33-36). So the terms stand side by side and are never added up. Besides, gamma* is the
best choice for eq 30 only: the margin error grows with gamma_j, and nothing weighs the one against the other while C(F) is
unknown.

Shapes: N images, C classes (the text's k). Losses, t, B and margins are in nats; errors are fractions from 0 to 1.
"""

import math
from typing import Any

import numpy as np

LOG2 = math.log(2)
QUANTILES = (5, 25, 50, 75, 95)  # percent
NOTE = (
    "Terms of eq 28, not to be added up: C(F) is not known (the complexity columns are relative to its square root), B is not "
    "known (loss_range says which value stands in for it), and t and beta are free choices. Losses must be plain cross-entropy "
    "of un-augmented training images. The optimal margins make the sum of the complexity terms smallest, not the margin "
    "errors. A mean is null where any class lacks the value, since eq 28 averages over all classes."
)
_ROUNDING = 1e-3  # a float32 cross-entropy may come out a little under 0; a log-probability of the wrong sign is further off


def optimal_margins(class_counts, total: float = 1.0) -> np.ndarray:
    """The margins that make the sum of the complexity terms smallest, for a given sum of margins.

    ``class_counts`` [C]: training images a class. ``total``: beta, the sum of the margins, in nats; it only scales them.
    Returns gamma* [C], float64, in nats: gamma*_j = beta n_j^(-1/4) / sum_i n_i^(-1/4).
    Raises ValueError for counts under 1 or no classes at all, and for a ``total`` that is not a finite number above 0.
    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, supplement, eq 31; the same
    law as the margins of Cao et al., NeurIPS 2019.
    """
    counts_C = _counts(class_counts)
    total = _positive("total", total)
    shares_C = counts_C**-0.25
    return total * shares_C / shares_C.sum()


def bound_terms(losses_N, labels_N, class_counts, *, total: float = 1.0, threshold: float = LOG2, delta: float = 0.05,
                loss_range: float | None = None) -> dict[str, Any]:  # fmt: skip
    """What a checkpoint shows of the terms of eq 28, class by class; no sum of them (see the module's text).

    ``losses_N`` [N]: plain cross-entropy l(theta) of un-augmented training images, in nats, whatever loss trained the model.
    ``labels_N`` [N]: their classes, integers from 0 to C - 1. ``class_counts`` [C]: training images a class, the n_j.
    ``total``: beta, the sum of the margins. ``threshold``: t. ``delta``: the chance of failure for all classes together.
    ``loss_range``: B; without it the largest |l - t| of the given images, which the true B may well exceed.

    Returns plain types, fit for JSON:

    - ``threshold``, ``delta``, ``delta_per_class`` (delta / k), ``beta``, ``classes`` (k), ``images`` (N);
      ``images_match_counts``: whether each class has just n_j images, without which the errors are not those of eq 26;
    - ``loss_range`` (the B in use), ``loss_range_observed``, ``loss_range_source`` (in words);
    - ``gamma_equal`` (beta / k) and ``complexity_ratio``, the sum of eq 30 at gamma* over that at equal margins, at most 1;
    - ``per_class``, in the order of ``class_counts``: ``n``, ``images``, ``gamma`` (eq 31), ``margin_quantiles`` of t - l
      (``q5`` to ``q95``), ``error`` (share with l > t, eq 25), ``margin_error`` (share with l + gamma > t, eq 26),
      ``complexity`` and ``complexity_equal`` (4 / (gamma sqrt(n)) at gamma* and at equal margins, the factor sqrt(C(F)) left
      out), ``epsilon`` (eq 29 with delta / k) and ``epsilon_missing`` (why there is none, else None);
    - ``mean``: the same columns (but the last) averaged over the classes, each class counting the same;
    - ``note``: what these figures are not.

    None: quantiles and errors of a class without images; its epsilon, unless B was given; an epsilon where 4 B < 2 gamma,
    whose log(log2(4 B / gamma)) is negative or not real; a mean where a class lacks the value.

    Raises ValueError for counts under 1, labels out of range, arrays that do not fit, losses that are not finite or clearly
    under 0, ``total``, ``threshold`` or ``loss_range`` not above 0, ``delta`` not between 0 and 1, and for a ``loss_range``
    that the given losses already exceed.
    Source: eqs 24-31 of the supplement (see :func:`optimal_margins`); eq 27 is Theorem 2 of Kakade et al., NeurIPS 2008.
    """
    counts_C = _counts(class_counts)
    k = len(counts_C)
    losses_N, labels_N = _sample(losses_N, labels_N, k)
    threshold = _positive("threshold", threshold)
    if not 0 < delta < 1:
        raise ValueError(f"delta is a chance between 0 and 1, not {delta}")
    gamma_C, gamma_equal = optimal_margins(counts_C, total), float(total) / k
    observed = float(np.abs(losses_N - threshold).max()) if losses_N.size else None
    used, source = _loss_range(loss_range, observed)

    # A stable sort puts the images of a class side by side, so that many classes cost no more than few.
    images_C = np.bincount(labels_N, minlength=k)
    by_class = np.split(losses_N[np.argsort(labels_N, kind="stable")], np.cumsum(images_C)[:-1])
    per_class = [
        _margins(losses, threshold, gamma)
        | _complexity(n, gamma, gamma_equal)
        | _low_order(n, gamma, used if len(losses) or loss_range is not None else None, delta / k)
        for n, gamma, losses in zip(counts_C, gamma_C, by_class, strict=True)
    ]
    mean = _means(per_class)
    return {
        "threshold": threshold, "delta": float(delta), "delta_per_class": float(delta) / k, "beta": float(total),
        "classes": k, "images": len(losses_N), "images_match_counts": bool((images_C == counts_C).all()),
        "loss_range": used, "loss_range_observed": observed, "loss_range_source": source,
        "gamma_equal": gamma_equal, "complexity_ratio": mean["complexity"] / mean["complexity_equal"],
        "per_class": per_class, "mean": mean, "note": NOTE,
    }  # fmt: skip


def _loss_range(given: float | None, observed: float | None) -> tuple[float | None, str]:
    """B, and where it comes from, in words. A value that an image refutes is refused."""
    if given is None:
        return observed, "the largest |l - t| over the given images: an observed value, not the supremum that eq 27 asks for"
    given = _positive("loss_range", given)
    if observed is not None and given < observed:
        raise ValueError(f"loss_range {given:g} is not B: an image has |l - t| = {observed:g}")
    return given, "given by the caller"


def _margins(losses: np.ndarray, threshold: float, gamma: float) -> dict[str, Any]:
    """What the images of one class show: quantiles of t - l, and the errors of eqs 25 and 26; None without images."""
    seen = len(losses) > 0
    quantiles = np.percentile(threshold - losses, QUANTILES) if seen else [None] * len(QUANTILES)
    return {
        "images": len(losses),
        "margin_quantiles": {f"q{q}": float(v) if seen else None for q, v in zip(QUANTILES, quantiles, strict=True)},
        "error": float((losses > threshold).mean()) if seen else None,
        "margin_error": float((losses + gamma > threshold).mean()) if seen else None,
    }


def _complexity(n: float, gamma: float, gamma_equal: float) -> dict[str, Any]:
    """What the counts alone say: the second term of eq 28 without its factor sqrt(C(F)), at gamma* and at equal margins."""
    at, at_equal = (float(4 / (margin * math.sqrt(n))) for margin in (gamma, gamma_equal))
    return {"n": int(n), "gamma": float(gamma), "complexity": at, "complexity_equal": at_equal}


def _low_order(n: float, gamma: float, loss_range: float | None, delta: float) -> dict[str, Any]:
    """Eq 29 at the ``delta`` of one class, or None and why.

    Under 4 B / gamma = 2 the outer log is negative, and under 1 not even real. Nothing is lost: gamma is then over 2 B, no f
    reaches it, the margin error is 1 and eq 27 says nothing about the class.
    """
    if loss_range is None:
        return {"epsilon": None, "epsilon_missing": "no images of this class, and no B given"}
    ratio = 4 * loss_range / gamma
    if ratio < 2:
        return {"epsilon": None, "epsilon_missing": f"B is too small for this margin: 4 B / gamma is {ratio:.3g}, under 2"}
    epsilon = math.sqrt(math.log(math.log2(ratio)) / n) + math.sqrt(math.log(1 / delta) / (2 * n))
    return {"epsilon": epsilon, "epsilon_missing": None}


def _means(per_class: list[dict[str, Any]]) -> dict[str, Any]:
    """Each column over all classes or not at all: a mean of those that have a value would leave out just the hard ones."""

    def mean(values: list[float | None]) -> float | None:
        return None if None in values else float(np.mean(values))

    columns = ("n", "images", "gamma", "error", "margin_error", "complexity", "complexity_equal", "epsilon")
    quantiles = {f"q{q}": mean([row["margin_quantiles"][f"q{q}"] for row in per_class]) for q in QUANTILES}
    return {column: mean([row[column] for row in per_class]) for column in columns} | {"margin_quantiles": quantiles}


def _counts(class_counts) -> np.ndarray:
    counts_C = np.asarray(class_counts, dtype=np.float64)
    if counts_C.ndim != 1 or not counts_C.size:
        raise ValueError("class_counts is a list of one count a class")
    wrong = np.flatnonzero(~(np.isfinite(counts_C) & (counts_C >= 1) & (counts_C == np.floor(counts_C))))
    if wrong.size:
        raise ValueError(f"class_counts are whole numbers from 1 up; class {wrong[0]} has {counts_C[wrong[0]]:g}")
    return counts_C


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is a finite number above 0, not {value}")
    return float(value)


def _sample(losses_N, labels_N, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses as float64 and labels as integers, both [N] and fit for ``k`` classes."""
    losses_N, labels_N = np.asarray(losses_N, dtype=np.float64), np.asarray(labels_N)
    if losses_N.ndim != 1 or losses_N.shape != labels_N.shape:
        raise ValueError(f"losses and labels are one number an image each, not of shapes {losses_N.shape} and {labels_N.shape}")
    if not np.isfinite(losses_N).all() or (losses_N < -_ROUNDING).any():
        raise ValueError("losses are cross-entropies: finite and not under 0")
    if labels_N.size and not np.issubdtype(labels_N.dtype, np.integer):
        raise ValueError(f"labels are integers, not {labels_N.dtype}")
    if labels_N.size and not (labels_N.min() >= 0 and labels_N.max() < k):
        raise ValueError(f"labels go from 0 to {k - 1}, not from {labels_N.min()} to {labels_N.max()}")
    return losses_N, labels_N.astype(np.int64)
