"""The losses of a detector's box classifier, by the names of ``--loss``.

Shapes: R regions, C categories. Label 0 is background.
"""

import torch

from ..losses import (
    BalancedSigmoidLoss,
    BalancedSoftmaxLoss,
    LDAMLoss,
    ReweightedLoss,
    SigmoidEqualizationLoss,
    SigmoidFocalLoss,
    SigmoidLoss,
    SoftmaxLoss,
    effective_number,
)


def region_loss(name: str, frequencies_C, image_counts_C, *, gamma: float = 2.0, beta: float = 0.999, margin: float = 0.5,
                eql_threshold: float = 0.00176) -> SoftmaxLoss:  # fmt: skip
    """The loss ``name`` of regions: called as ``loss(logits, labels_R)``, the mean over all regions, background included.

    Labels are 0 for background, else 1..C. The softmax family (softmax, balanced-softmax, class-balanced, ldam) takes logits
    [R, C + 1], background in column 0; the sigmoid family (sigmoid, balanced-sigmoid, focal, equalization) takes [R, C],
    label y in column y - 1. ``frequencies_C``: share of the images with each category, in (0, 1); ``image_counts_C``: their
    number. ``plain()`` of the result is softmax or sigmoid.

    * ``balanced-softmax``, ``balanced-sigmoid``: the paper's (eqs 10 and 21-23; the remark in A.2: background rows stay plain).
    * ``focal``: with ``gamma``, on each of the C binary problems; no alpha, as the sampling of regions fixes how many are
      background. Divided by the regions, like all here, not by the foreground ones as in RetinaNet.
    * ``class-balanced``: softmax; category weights by the inverse effective number of images (``beta``), scaled to mean 1 over
      the images, so that foreground as a whole keeps its weight against the background's 1.
    * ``ldam``: ``margin`` is that of the rarest category, in logits: the head is linear, so the cosine and the scale of the
      original are not there, nor is a margin for background.
    * ``equalization``: Tan et al.'s for sigmoids; a category is rare under the share ``eql_threshold`` of the images.

    Raises KeyError for an unknown name and ValueError for priors outside (0, 1), categories without images and
    hyper-parameters out of range.
    """
    builders = {
        "softmax": lambda: SoftmaxLoss(background=0),
        "balanced-softmax": lambda: BalancedSoftmaxLoss(frequencies_C, background=0),
        "class-balanced": lambda: ReweightedLoss(SoftmaxLoss(background=0), _class_balanced(image_counts_C, beta)),
        "ldam": lambda: LDAMLoss(frequencies_C, margin, scale=1.0, background=0),
        "sigmoid": lambda: SigmoidLoss(background=0),
        "balanced-sigmoid": lambda: BalancedSigmoidLoss(frequencies_C, background=0),
        "focal": lambda: SigmoidFocalLoss(gamma=gamma, background=0),
        "equalization": lambda: SigmoidEqualizationLoss(frequencies_C, eql_threshold, background=0),
    }
    return builders[name]()


def _class_balanced(image_counts_C, beta: float) -> torch.Tensor:
    """Weights 1 / effective number in float64 [C], of mean 1 over the images."""
    counts_C = torch.as_tensor(image_counts_C, dtype=torch.float64)
    weights_C = effective_number(counts_C, beta).reciprocal()
    return weights_C * (counts_C.sum() / (counts_C * weights_C).sum())
