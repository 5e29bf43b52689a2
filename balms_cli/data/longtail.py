"""Long-tailed class counts, shot groups and reproducible draws. Pure NumPy.

Counts are in images a class, classes in head-to-tail order. C is the number of classes.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MANY_ABOVE = 100  # many-shot: more training images than this (Liu et al., "OLTR", CVPR 2019)
FEW_BELOW = 20  # few-shot: fewer training images than this; what lies between is medium-shot
GROUPS = ("many", "medium", "few")


def _floor(values: np.ndarray) -> np.ndarray:
    """Floor that forgives float error: 49.99999999999999, meant as 50, stays 50."""
    nearest = np.rint(values)
    exact = np.isclose(values, nearest, rtol=1e-12, atol=1e-9)
    return np.where(exact, nearest, np.floor(values)).astype(np.int64)


def _check(n_max: int, k: int, imbalance: float) -> None:
    if n_max < 1 or k < 1 or not imbalance >= 1 or not np.isfinite(imbalance):
        raise ValueError(f"need n_max >= 1, k >= 1 and a finite imbalance >= 1, got {n_max}, {k}, {imbalance}")


def class_counts_exponential(n_max: int, k: int, imbalance: float) -> np.ndarray:
    """The exponential tail: class c keeps ``floor(n_max * imbalance ** (-c / (k - 1)))`` images, at least one.

    Returns: int64 [k], decreasing, ``n_max`` first. Raises: ValueError for values out of range.
    Source: Cui et al., "Class-Balanced Loss", CVPR 2019; used for CIFAR-LT by LDAM and by Balanced Meta-Softmax.
    """
    _check(n_max, k, imbalance)
    position = np.arange(k) / max(k - 1, 1)
    return np.maximum(_floor(n_max * float(imbalance) ** -position), 1)


def class_counts_step(n_max: int, k: int, imbalance: float) -> np.ndarray:
    """The step tail: the first half of the classes keeps ``n_max`` images, the rest ``floor(n_max / imbalance)``.

    With an odd number of classes the middle one belongs to the head. Returns: int64 [k], at least one a class.
    Raises: ValueError for values out of range. Source: Buda et al. 2018; LDAM (Cao et al., NeurIPS 2019).
    """
    _check(n_max, k, imbalance)
    tail = np.maximum(_floor(np.array(n_max / imbalance)), 1)
    return np.where(np.arange(k) < (k + 1) // 2, n_max, tail).astype(np.int64)


def class_counts_pareto(n_max: int, k: int, imbalance: float, alpha: float = 6.0) -> np.ndarray:
    """The Pareto tail of ImageNet-LT: the values of a Pareto law at its median ranks, stretched from ``n_max`` down to
    ``n_max / imbalance``.

    Class c gets ``u ** (-1 / alpha)`` with ``u = (c + 0.7) / (k + 0.4)``, the median of the (c + 1)-th smallest of k uniform
    draws (Benard's approximation), so this is the middle of what a random draw gives. Returns: int64 [k], decreasing, at
    least one a class. Raises: ValueError for values out of range. Source: Liu et al., CVPR 2019 (OLTR), section 4: Pareto
    with alpha 6. Its lists are random draws; for Places-LT the authors name another alpha than the paper does (1.34,
    their issue 38).
    """
    _check(n_max, k, imbalance)
    if not alpha > 0 or not np.isfinite(alpha):
        raise ValueError(f"need a finite alpha > 0, got {alpha}")
    if k == 1:
        return np.array([n_max], dtype=np.int64)
    log_C = -np.log((np.arange(k) + 0.7) / (k + 0.4)) / alpha
    value_C = np.exp(log_C - log_C[0])  # beside the largest: a small alpha makes numbers that no float holds
    share_C = (value_C - value_C[-1]) / (1 - value_C[-1])
    n_min = n_max / imbalance
    return np.maximum(_floor(n_min + share_C * (n_max - n_min)), 1)


def alpha_for_total(total: int, n_max: int, k: int, imbalance: float) -> float | None:
    """The alpha at which the Pareto tail comes nearest to ``total`` images, to four digits; None where none does.

    A larger alpha makes a flatter tail, so more images.
    """

    def images(alpha: float) -> int:
        return int(class_counts_pareto(n_max, k, imbalance, alpha).sum())

    low, high = 0.05, 1000.0
    if not images(low) <= total <= images(high):
        return None
    while high / low > 1 + 1e-5:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if images(middle) < total else (low, middle)
    return float(f"{high:.4g}")


@dataclass(frozen=True)
class Published:
    """A published long-tailed training list: its classes, largest and smallest class, and images."""

    name: str
    classes: int
    largest: int
    smallest: int
    images: int


# Liu et al., CVPR 2019; Places-LT's images as counted in its list (the paper's text says 184,500: its authors' issue 38).
PUBLISHED = (Published("ImageNet-LT", 1000, 1280, 5, 115_846), Published("Places-LT", 365, 4980, 5, 62_500))

PROFILES = {"exponential": class_counts_exponential, "step": class_counts_step, "pareto": class_counts_pareto}


def imbalance_factor(counts: Sequence[int] | np.ndarray) -> float:
    """Largest class count / smallest, as measured. Raises: ValueError where a class has no image, or there is none."""
    counts = np.asarray(counts)
    if counts.size == 0 or counts.min() < 1:
        raise ValueError("the imbalance factor needs at least one image in every class")
    return float(counts.max() / counts.min())


def shot_groups(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """'many' (> 100 training images), 'medium' (20 to 100) or 'few' (< 20) for each class: str [C]."""
    counts = np.asarray(counts)
    return np.where(counts > MANY_ABOVE, "many", np.where(counts < FEW_BELOW, "few", "medium"))


def gini(counts: Sequence[int] | np.ndarray) -> float:
    """Gini coefficient of the counts: 0 where all classes are equal, towards 1 where one class has everything.

    Mean absolute difference of two classes over twice the mean, in its sorted form.
    """
    ordered = np.sort(np.asarray(counts, dtype=np.float64))
    k, total = ordered.size, ordered.sum()
    if k == 0 or total == 0:
        return 0.0
    return float(((2 * np.arange(1, k + 1) - k - 1) * ordered).sum() / (k * total))


def order_images(seed: int, class_name: str, keys: Sequence[str]) -> np.ndarray:
    """The order in which the images of one class are kept: int64 [N], indices into ``keys``.

    Sorted by sha256(seed, class, key), so the draw depends on nothing but these three (not on the machine, the order
    of files, or the other images), and keeping fewer images keeps a subset. Names are compared in Unicode's composed
    form: file systems differ in the form they give back.
    """
    start = f"{seed}\0{unicodedata.normalize('NFC', class_name)}\0".encode()
    sha256 = hashlib.sha256
    digests = [sha256(start + (key if key.isascii() else unicodedata.normalize("NFC", key)).encode()).digest() for key in keys]
    order = sorted(zip(digests, keys, range(len(digests)), strict=True))
    return np.fromiter((i for _, _, i in order), np.int64, len(order))
