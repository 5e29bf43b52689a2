"""Losses for long-tailed classification: Balanced Softmax, its multiple-binary form, and plain softmax.

Shapes: B batch, C classes. A loss is built from class counts and called as ``loss(logits, targets)``; the mean over the
batch comes back, ``per_example`` gives the B terms. Counts act in training only: at test time raw logits are used.

All three compute at least in float32, whatever autocast made of the logits.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def class_counts(labels_N: Tensor, num_classes: int | None = None) -> Tensor:
    """Training images a class: int64 [C] from integer labels [N].

    Raises ValueError for a class without images (its prior would be zero, its log minus infinity) and for labels
    outside 0..num_classes-1.
    """
    labels_N = torch.as_tensor(labels_N, dtype=torch.int64)
    if labels_N.numel() == 0 or labels_N.min() < 0:
        raise ValueError("labels must be a non-empty vector of integers >= 0")
    counts_C = torch.bincount(labels_N, minlength=num_classes or 0)
    if num_classes is not None and len(counts_C) > num_classes:
        raise ValueError(f"label {int(labels_N.max())} is out of range 0..{num_classes - 1}")
    _check(counts_C)
    return counts_C


def _check(counts_C: Tensor) -> None:
    empty = (counts_C <= 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"classes without training images: {empty[:10]}; remove them or merge them into others")


def _log_share(counts) -> Tensor:
    """log(n_c / N) in float64 [C]: shares, not counts, so that the shift stays small whatever the size of the data."""
    counts_C = torch.as_tensor(counts, dtype=torch.float64).flatten()
    _check(counts_C)
    return (counts_C / counts_C.sum()).log()


def log_softmax(logits_BC: Tensor) -> Tensor:
    """log softmax over the classes [B, C]. torch's row kernel crawls where a row is shorter than a vector register; across
    rows it does not (B 512, C 10 on an AVX-512 CPU: 83 against 13 microseconds)."""
    if logits_BC.shape[1] < 24 and logits_BC.device.type == "cpu":
        return logits_BC.t().contiguous().log_softmax(0).t()
    return logits_BC.log_softmax(1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class SoftmaxLoss(nn.Module):
    """Cross-entropy on the logits as they are. The baseline of every table.

    ``class_counts`` is taken for the sake of one signature and not used.
    """

    def __init_subclass__(cls, **kwargs):
        """A subclass with other terms must bring their gradient too, or has none by hand: never its parent's."""
        super().__init_subclass__(**kwargs)
        if "per_example" in cls.__dict__ and "with_gradient" not in cls.__dict__:
            cls.with_gradient = None

    def __init__(self, class_counts=None):
        super().__init__()
        self.register_buffer("offset_C", None, persistent=False)

    def adjusted(self, logits_BC: Tensor) -> Tensor:
        """The logits that training sees, at least float32."""
        logits_BC = _at_least_float32(logits_BC)
        return logits_BC if self.offset_C is None else logits_BC + self.offset_C.to(logits_BC)

    def per_example(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        """The B terms of the loss: [B]."""
        return F.nll_loss(log_softmax(self.adjusted(logits_BC)), targets_B, reduction="none")

    def with_gradient(self, logits_BC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        """The B terms, and the derivative of each by its logits [B, C]: P - Y (eqs 52 and 57 of the supplement). No graph."""
        log_p_BC = log_softmax(self.adjusted(logits_BC.detach()))
        losses_B1 = -log_p_BC.gather(1, targets_B[:, None])
        return losses_B1.squeeze(1), _minus_onehot(log_p_BC.exp_(), targets_B)

    def forward(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        """The mean over the batch: a scalar."""
        return self.per_example(logits_BC, targets_B).mean()

    def implied_log_prior(self, log_law_C: Tensor) -> Tensor:
        """The class prior that raw logits assume after training on draws of law ``log_law_C`` (log, [C])."""
        return log_law_C.log_softmax(0)


class BalancedSoftmaxLoss(SoftmaxLoss):
    """Balanced Softmax (eq 10 of the paper): cross-entropy on z_c + tau log n_c.

    ``exponent`` is tau: 1 is the loss; 1/4 is the margin that the generalisation bound itself gives (Corollary 2.1).
    The same as the logit-adjusted loss of Menon et al. (ICLR 2021, eq 10) with the same tau. With equal counts it is
    cross-entropy. Raises ValueError for a class without images.
    """

    def __init__(self, class_counts, exponent: float = 1.0):
        super().__init__()
        self.offset_C = exponent * _log_share(class_counts)

    def implied_log_prior(self, log_law_C: Tensor) -> Tensor:
        """Raw logits are right for the prior law_c * exp(-offset_c): uniform on the data, 1/n under CBS (A.5)."""
        return (log_law_C - self.offset_C.to(log_law_C)).log_softmax(0)


class BalancedSigmoidLoss(SoftmaxLoss):
    """Balanced loss for multiple binary logistic regression (eqs 21-23 of the supplement, A.2).

    Each logit z_c becomes z_c - log((n/k)/n_c * (n - n_c)/(n - n/k)); the binary cross-entropies are summed over the
    classes and averaged over the batch (eqs 13-14). Raises ValueError for a class without images or for one class only.
    """

    def __init__(self, class_counts):
        super().__init__()
        log_share_C = _log_share(class_counts)
        k = len(log_share_C)
        if k < 2:
            raise ValueError("the balanced sigmoid needs at least two classes: with one there is nothing to tell apart")
        log_odds_C = log_share_C - torch.log1p(-log_share_C.exp())  # log n_c / (n - n_c)
        # -log((n/k)/(n - n/k)) = log(k - 1): zero shift where every class has n/k images.
        self.offset_C = log_odds_C + math.log(k - 1)

    def per_example(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        shifted_BC = self.adjusted(logits_BC)
        onehot_BC = F.one_hot(targets_B, logits_BC.shape[1]).to(shifted_BC)
        return F.binary_cross_entropy_with_logits(shifted_BC, onehot_BC, reduction="none").sum(1)

    def with_gradient(self, logits_BC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        logits_BC = logits_BC.detach()
        sigmoid_BC = self.adjusted(logits_BC).sigmoid()
        return self.per_example(logits_BC, targets_B), _minus_onehot(sigmoid_BC, targets_B)

    def implied_log_prior(self, log_law_C: Tensor) -> Tensor:
        """The same for k binary problems: odds of the law over the odds that the loss takes out, made to sum to one."""
        law_C = log_law_C.log_softmax(0).exp().clamp(1e-12, 1 - 1e-12)
        return F.logsigmoid(law_C.logit() - self.offset_C.to(law_C)).log_softmax(0)


def _minus_onehot(p_BC: Tensor, targets_B: Tensor) -> Tensor:
    """P - Y, in place."""
    return p_BC.scatter_add_(1, targets_B[:, None], p_BC.new_full((len(targets_B), 1), -1.0))


def build_loss(name: str, class_counts, exponent: float = 1.0) -> SoftmaxLoss:
    """The loss that a configuration names: softmax, balanced, balanced-sigmoid."""
    if name == "balanced":
        return BalancedSoftmaxLoss(class_counts, exponent)
    return {"softmax": SoftmaxLoss, "balanced-sigmoid": BalancedSigmoidLoss}[name](class_counts)
