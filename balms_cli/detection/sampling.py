"""Which images a step sees: repeat factor sampling, and the class-balanced meta batch. A draw is a function of (seed, step).

Shapes: N images, C categories, B batch.
"""

from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from .annotations import Annotations

_EPOCH, _ORDER = 31, 32  # streams of random numbers: how often an image is in an epoch, and in which order


def repeat_factors(annotations: Annotations, threshold: float) -> np.ndarray:
    """How often an epoch has each image, in the mean: r(I) = max over its categories c of max(1, sqrt(t / f_c)), float64 [N].

    f_c is the share of the images that c is in, t the ``threshold`` (0: every factor is 1). Source: Gupta et al., LVIS, CVPR
    2019, appendix B.2. An image without a usable annotation has the factor 1.
    """
    return np.maximum(1.0, _max_over_categories(annotations, category_repeats(annotations, threshold)))


def category_repeats(annotations: Annotations, threshold: float) -> np.ndarray:
    """How often each category asks for its images: max(1, sqrt(t / f_c)), float64 [C]."""
    share_C = annotations.image_counts / annotations.num_images
    return np.maximum(1.0, np.sqrt(threshold / share_C))


def _max_over_categories(annotations: Annotations, values_C: np.ndarray) -> np.ndarray:
    """Of each image, the largest value among its categories, float64 [N]; 0 where it has none."""
    sizes_N = np.array([len(image.labels) for image in annotations.images])
    found_N = np.zeros(len(sizes_N))
    labels = np.concatenate([image.labels for image in annotations.images])
    starts_N = sizes_N.cumsum() - sizes_N
    filled_N = sizes_N > 0
    found_N[filled_N] = np.maximum.reduceat(values_C[labels - 1], starts_N[filled_N])
    return found_N


def epoch_indices(factors: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The images of an epoch in their order, int64: i floor(r_i) times, and once more with probability r_i - floor(r_i)."""
    repeats_N = _repeats(factors, seed, epoch)
    return _generator(seed, _ORDER, epoch).permutation(np.repeat(np.arange(len(factors)), repeats_N))


def _repeats(factors: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    whole_N = np.floor(factors)
    return (whole_N + (_generator(seed, _EPOCH, epoch).random(len(factors)) < factors - whole_N)).astype(np.int64)


def draw_batches(factors: np.ndarray, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """The images of each step, int64 [B]: batches cut from the endless row of epochs, so that none is partial.

    A function of the step alone: a run that is resumed at any step goes on with what it would have drawn.
    """
    ends: list[int] = []  # places in the endless row at which the epochs end, as far as they are known
    held: dict[int, np.ndarray] = {}

    def indices(epoch: int) -> np.ndarray:
        if epoch not in held:
            if len(held) > 1:
                held.pop(min(held))
            held[epoch] = epoch_indices(factors, seed, epoch)
        return held[epoch]

    def draw(step: int) -> np.ndarray:
        place, stop = step * batch_size, (step + 1) * batch_size
        while not ends or ends[-1] < stop:
            ends.append((ends[-1] if ends else 0) + int(_repeats(factors, seed, len(ends)).sum()))
        epoch, parts = bisect_right(ends, place), []
        while place < stop:
            begin, end = ends[epoch - 1] if epoch else 0, ends[epoch]
            parts.append(indices(epoch)[place - begin : min(stop, end) - begin])
            place, epoch = end, epoch + 1
        return np.concatenate(parts)

    return draw


def class_balanced_images(annotations: Annotations, batch_size: int, seed: int, stream: int) -> Callable[[int], np.ndarray]:
    """The images of each step's meta batch, int64 [B]: with replacement, P(I) in proportion to the largest 1/f_c among its
    categories.

    Balance on the level of images, as in the released code of BALMS: its repeat factors with a threshold that every
    category is under. ``stream`` tells this draw from others of the same seed.
    """
    weights_N = _max_over_categories(annotations, annotations.num_images / annotations.image_counts)
    edges_N = weights_N.cumsum()

    def draw(step: int) -> np.ndarray:
        places_B = _generator(seed, stream, step).random(batch_size) * edges_N[-1]
        return np.searchsorted(edges_N, places_B, side="right").clip(max=len(edges_N) - 1)

    return draw


def _generator(*parts: int) -> np.random.Generator:
    from ..data.samplers import mix  # torch comes with it

    return np.random.Generator(np.random.Philox(mix(*parts)))
