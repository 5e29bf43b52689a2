"""Losses that weigh examples: by class (cost-sensitive, class-balanced, deferred) or by difficulty (focal).

Class weights act as in ``torch.nn.CrossEntropyLoss(weight=...)``: the weighted terms of a batch are divided by the sum of
its weights, so that only ratios of weights count, and a batch without rare classes steps as far as any other.
Shapes: B batch, C classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .balanced import SigmoidLoss
from .base import SoftmaxLoss, by_label, checked_counts, log_softmax


class FocalLoss(SoftmaxLoss):
    """Focal loss (Lin et al., ICCV 2017, eq 4) on softmax probabilities: -(1 - p_y)^gamma log p_y. gamma = 0: softmax.

    ``gamma``: 1 in the long-tail re-runs of the LDAM-DRW repository; 2, for detection, in the original. ``background``: the
    label of background rows; the logits are then [B, C + 1].
    """

    prior_is_exact = False  # its minimiser is not the posterior (it is less sure than that)

    def __init__(self, class_counts=None, gamma: float = 1.0, *, background: int | None = None):
        super().__init__(background=background)
        if not gamma >= 0:
            raise ValueError(f"gamma must be 0 or more, got {gamma}")
        self.gamma = gamma

    def per_example(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        log_p_B = -F.nll_loss(log_softmax(self.adjusted(logits_BC, targets_B)), targets_B, reduction="none")
        # 1 - p without cancellation; kept above zero, where a power under 1 would have an infinite slope.
        miss_B = (-torch.expm1(log_p_B)).clamp_min(torch.finfo(log_p_B.dtype).tiny)
        return -(miss_B**self.gamma) * log_p_B


class SigmoidFocalLoss(SigmoidLoss):
    """Focal loss (Lin et al., ICCV 2017, eq 4) of C binary problems, summed over the classes: -(1 - p_t)^gamma log p_t, p_t the
    probability of what is true. gamma = 0: the plain sigmoid loss.

    ``gamma``: 2, as in the original. Without its alpha, which weighs positives against the many negatives of a detector that
    scores every anchor: a second stage sees sampled regions. Raises ValueError for a negative gamma. ``background``: the label
    of background rows, as in ``SigmoidLoss``.
    """

    prior_is_exact = False

    def __init__(self, class_counts=None, gamma: float = 2.0, *, background: int | None = None):
        super().__init__(background=background)
        if not gamma >= 0:
            raise ValueError(f"gamma must be 0 or more, got {gamma}")
        self.gamma = gamma

    def _parts(self, logits_BC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By row and class: +1 where the target is one, else -1; log p_t; 1 - p_t, above zero as in ``FocalLoss``."""
        shifted_BC = self.adjusted(logits_BC, targets_B)
        sign_BC = 2 * self.onehot(targets_B, shifted_BC) - 1
        signed_BC = sign_BC * shifted_BC
        miss_BC = (-signed_BC).sigmoid().clamp_min(torch.finfo(signed_BC.dtype).tiny)
        return sign_BC, F.logsigmoid(signed_BC), miss_BC

    def per_example(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        _, log_p_BC, miss_BC = self._parts(logits_BC, targets_B)
        return -(miss_BC**self.gamma * log_p_BC).sum(1)

    def with_gradient(self, logits_BC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        """The B terms, and dl/dz = +-(1 - p_t)^gamma (gamma p_t log p_t - (1 - p_t)). No graph."""
        sign_BC, log_p_BC, miss_BC = self._parts(logits_BC.detach(), targets_B)
        power_BC = miss_BC**self.gamma
        slope_BC = power_BC * (self.gamma * log_p_BC.exp() * log_p_BC - miss_BC)
        return -(power_BC * log_p_BC).sum(1), sign_BC * slope_BC


class ReweightedLoss(SoftmaxLoss):
    """Another loss with class weights: sum_i w_{y_i} l_i / sum_i w_{y_i}. ``weights_C``: positive and finite (else
    ValueError); only their ratios count.

    Around a loss with ``background``: background rows weigh 1, the weights are taken as they are, and the sum is divided by
    the number of rows.
    """

    def __init__(self, loss: SoftmaxLoss, weights_C):
        super().__init__(background=loss.background)
        weights_C = torch.as_tensor(weights_C, dtype=torch.float64).flatten()
        if not ((weights_C > 0) & weights_C.isfinite()).all():
            raise ValueError("class weights must be positive and finite")
        self.loss = loss
        if self.background is None:
            # Mean 1 over the classes, as Cui et al. scale theirs: a single term stays readable.
            weights_C = weights_C * (len(weights_C) / weights_C.sum())
        self.register_buffer("weights_C", weights_C, persistent=False)
        self.prior_is_exact, self.initial_bias = loss.prior_is_exact, loss.initial_bias
        if loss.with_gradient is None:
            self.with_gradient = None

    def weights(self, targets_B: Tensor, like: Tensor) -> Tensor:
        """The weight of each example [B]."""
        return by_label(self.weights_C.to(like), self.background, 1.0)[targets_B]

    def at_step(self, step: int, steps: int, seed: int = 0) -> None:
        self.loss.at_step(step, steps, seed)

    def plain(self) -> SoftmaxLoss:
        return self.loss.plain()

    def adjusted(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        return self.loss.adjusted(logits_BC, targets_B)

    def per_example(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        losses_B = self.loss.per_example(logits_BC, targets_B)
        return losses_B * self.weights(targets_B, losses_B)

    def with_gradient(self, logits_BC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        losses_B, gradient_BC = self.loss.with_gradient(logits_BC, targets_B)
        weights_B = self.weights(targets_B, losses_B)
        return losses_B * weights_B, gradient_BC * weights_B[:, None]

    def denominator(self, targets_B: Tensor) -> Tensor | int:
        if self.background is not None:
            return len(targets_B)
        weights_B, loss = self.weights(targets_B, self.weights_C), self.loss
        while isinstance(loss, ReweightedLoss):  # then the terms carry the product of the weights
            weights_B, loss = weights_B * loss.weights(targets_B, weights_B), loss.loss
        return weights_B.sum()

    def implied_log_prior(self, log_law_C: Tensor) -> Tensor:
        """Weighing a class is drawing it more often: the law times the weights, seen through the inner loss."""
        return self.loss.implied_log_prior(log_law_C + self.weights_C.to(log_law_C).log())


class CostSensitiveLoss(ReweightedLoss):
    """Cost-sensitive softmax (CBW of the paper's Table 2): cross-entropy with class weights 1 / n_c^exponent.

    ``exponent``: 1; 1/2 is the square-root form. Equals ``torch.nn.CrossEntropyLoss(weight=1 / n)``.
    """

    def __init__(self, class_counts, exponent: float = 1.0):
        super().__init__(SoftmaxLoss(), torch.exp(-exponent * log_share_of_smallest(class_counts)))


class ClassBalancedLoss(ReweightedLoss):
    """Class-balanced loss (Cui et al., CVPR 2019, eq 5): class weights (1 - beta) / (1 - beta^n_c), the inverse of the
    effective number of images.

    ``beta``: 0.9999, as in the LDAM-DRW repository (the original tunes it a data set, from 0.9 to 0.9999).
    ``form``: ``softmax``, ``sigmoid`` (a head of such a loss starts from the bias -log(k - 1)), or ``focal`` with
    ``gamma``. Raises ValueError for beta outside [0, 1).
    """

    def __init__(self, class_counts, beta: float = 0.9999, form: str = "softmax", gamma: float = 1.0):
        weights_C = effective_number(class_counts, beta).reciprocal()
        forms = {"softmax": SoftmaxLoss, "sigmoid": SigmoidLoss, "focal": lambda: FocalLoss(gamma=gamma)}
        if form not in forms:
            raise ValueError(f"form {form!r}: choose one of {', '.join(forms)}")
        super().__init__(forms[form](), weights_C)
        if form == "sigmoid":
            self.initial_bias = -math.log(max(len(weights_C) - 1, 1))


class DeferredReweighting(ReweightedLoss):
    """Deferred re-weighting, DRW (Cao et al., NeurIPS 2019, Algorithm 1): any loss, its classes weighed alike up to the
    share ``start`` of the steps and by the inverse of their effective number from there on.

    ``start``: 0.8, epoch 160 of 200; ``beta``: 0.9999 (both of the LDAM-DRW repository). Raises ValueError for a loss with
    ``background``, against which these weights have no scale.
    """

    def __init__(self, loss: SoftmaxLoss, class_counts, beta: float = 0.9999, start: float = 0.8):
        if loss.background is not None:
            raise ValueError("deferred re-weighting is for losses without background=: their class weights have no scale "
                             "against the background's; use ReweightedLoss with weights of your own")  # fmt: skip
        super().__init__(loss, effective_number(class_counts, beta).reciprocal())
        self.start, self.active = start, True

    def at_step(self, step: int, steps: int, seed: int = 0) -> None:
        super().at_step(step, steps, seed)
        self.active = step >= self.start * steps

    def weights(self, targets_B: Tensor, like: Tensor) -> Tensor:
        return super().weights(targets_B, like) if self.active else torch.ones_like(targets_B, dtype=like.dtype)

    def implied_log_prior(self, log_law_C: Tensor) -> Tensor:
        return super().implied_log_prior(log_law_C) if self.active else self.loss.implied_log_prior(log_law_C)


def effective_number(class_counts, beta: float) -> Tensor:
    """(1 - beta^n) / (1 - beta) in float64 [C] (Cui et al., eq 3): 1 for one image, n for beta near 1.

    Computed without cancellation, so that beta = 1 - 1e-12 still gives n.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must lie in [0, 1), got {beta}")
    counts_C = checked_counts(class_counts)
    if beta == 0:
        return torch.ones_like(counts_C)
    return torch.expm1(counts_C * math.log(beta)) / (beta - 1)


def log_share_of_smallest(class_counts) -> Tensor:
    """log(n_c / min n) in float64 [C]: powers of it neither overflow nor vanish in the rare classes."""
    counts_C = checked_counts(class_counts)
    return (counts_C / counts_C.min()).log()
