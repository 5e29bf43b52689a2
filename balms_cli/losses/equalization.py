"""Equalization Loss. Shapes: B batch, C classes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .balanced import SigmoidLoss
from .base import SoftmaxLoss, at_least_float32, checked_counts, checked_priors


class EqualizationLoss(SoftmaxLoss):
    """Softmax Equalization Loss (Tan et al., CVPR 2020, eqs 9-11): a rare class is spared, at random, the push that examples
    of other classes give it.

    -log(e^{z_y} / sum_j w_j e^{z_j}),  w_j = 1 - beta [n_j/N < threshold] [j != y],  beta ~ Bernoulli(gamma) for every
    example and class. As log w_j is 0 or minus infinity, it is added to the logits: no exponential can overflow.
    ``gamma`` 0.9 and ``threshold`` 0.005 are those of the Bag of Tricks repository for CIFAR-100-LT; the authors'
    own values for CIFAR are not known to us.
    """

    prior_is_exact = False  # what is spared depends on the example's class, not on the class alone

    def __init__(self, class_counts, gamma: float = 0.9, threshold: float = 0.005):
        super().__init__()
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is a probability, got {gamma}")
        counts_C = checked_counts(class_counts)
        self.register_buffer("tail_C", counts_C / counts_C.sum() < threshold, persistent=False)
        self.gamma = gamma
        self._draw: int | None = None

    def at_step(self, step: int, steps: int, seed: int = 0) -> None:
        """In a run the draws are a function of (seed, step): the same again after a resume, and in every pass of a step."""
        self._draw = (seed * 1_000_003 + step) % 2**64  # what a generator takes

    def adjusted(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        logits_BC = at_least_float32(logits_BC)
        generator = None if self._draw is None else torch.Generator(logits_BC.device).manual_seed(self._draw)
        spared_BC = torch.rand(logits_BC.shape, device=logits_BC.device, generator=generator) < self.gamma
        spared_BC &= self.tail_C
        spared_BC = spared_BC.scatter(1, targets_B[:, None], False)
        return logits_BC.masked_fill(spared_BC, -torch.inf)


class SigmoidEqualizationLoss(SigmoidLoss):
    """Equalization Loss of a detector (Tan et al., CVPR 2020): binary cross-entropies, where a rare class is spared the push
    that foreground of other classes gives it.

    sum_j w_rj BCE_rj,  w_rj = 1 - E(r) T(f_j) (1 - y_rj); E(r) is 1 for a foreground row r and 0 for a background row, T(f) is
    1 where f < ``threshold``. ``class_priors``: shares f_c of the images, in (0, 1), else ValueError. ``threshold``: the
    share under which a class is rare, 0.00176 for LVIS v0.5 in the original. ``background``: label of background rows, as in
    ``SigmoidLoss``. Logits [B, C].
    """

    def __init__(self, class_priors, threshold: float = 0.00176, *, background: int):
        super().__init__(background=background)
        rare_C = checked_priors(class_priors, background) < threshold
        self.register_buffer("rare_C", rare_C, persistent=False)

    def _kept(self, targets_B: Tensor, onehot_BC: Tensor) -> Tensor:
        """w_rj [B, C], in the type of the logits."""
        rare_C = self.by_column(self.rare_C.to(onehot_BC), onehot_BC)
        foreground_B1 = (targets_B != self.background)[:, None]
        return 1 - foreground_B1 * rare_C * (1 - onehot_BC)

    def per_example(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        logits_BC = at_least_float32(logits_BC)
        onehot_BC = self.onehot(targets_B, logits_BC)
        terms_BC = F.binary_cross_entropy_with_logits(logits_BC, onehot_BC, reduction="none")
        return (self._kept(targets_B, onehot_BC) * terms_BC).sum(1)

    def with_gradient(self, logits_BC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        logits_BC = at_least_float32(logits_BC.detach())
        onehot_BC = self.onehot(targets_B, logits_BC)
        gradient_BC = (logits_BC.sigmoid() - onehot_BC) * self._kept(targets_B, onehot_BC)
        return self.per_example(logits_BC, targets_B), gradient_BC
