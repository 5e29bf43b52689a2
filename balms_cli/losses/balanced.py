"""The paper's losses: Balanced Softmax and its form for multiple binary logistic regressions. Shapes: B batch, C classes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import SoftmaxLoss, checked_priors, log_share, minus_onehot


class BalancedSoftmaxLoss(SoftmaxLoss):
    """Balanced Softmax (eq 10 of the paper): cross-entropy on z_c + tau log n_c.

    ``exponent`` is tau: 1 is the loss; 1/4 is the margin that the generalisation bound itself gives (Corollary 2.1).
    With equal counts it is cross-entropy. Raises ValueError for a class without images.

    ``background`` (a detector's, label of background rows): the first argument is then the share f_c of the images that show
    each class, in (0, 1), else ValueError. Logits [B, C + 1], a label being its column. Foreground rows: cross-entropy on
    z_c + tau (log f_c - mean_j log f_j), the background's logit as it is; background rows: plain cross-entropy. A constant
    in the shift would move foreground against background, hence the mean is taken off.
    """

    def __init__(self, class_counts, exponent: float = 1.0, *, background: int | None = None):
        super().__init__(background=background)
        if background is None:
            self.offset_C = exponent * log_share(class_counts)
        else:
            log_f_C = checked_priors(class_counts, background).log()
            self.offset_C = exponent * (log_f_C - log_f_C.mean())


class LogitAdjustedLoss(BalancedSoftmaxLoss):
    """The logit-adjusted loss (Menon et al., ICLR 2021, eq 10): cross-entropy on z_c + tau log(n_c / N), tau = 1.

    The same function as Balanced Softmax with the same tau, found a few months apart from another side (Bayes-optimal
    scorers for the balanced error); here under the name that its readers look for.
    """


class SigmoidLoss(SoftmaxLoss):
    """k binary logistic regressions (eqs 13-14 of the supplement): their cross-entropies summed over the classes.

    ``background``: the label of background rows, whose targets are all zero. The logits stay [B, C]: label y is column y below
    the background's label and y - 1 above it.
    """

    def plain(self) -> SoftmaxLoss:
        return SigmoidLoss(background=self.background)

    def _columns(self, values_C: Tensor) -> Tensor:
        return values_C

    def _positives(self, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        """The column of each row's class [B, 1], and whether it has one [B, 1]."""
        foreground_B = targets_B != self.background
        columns_B = torch.where(foreground_B, targets_B - (targets_B > self.background).long(), 0)
        return columns_B[:, None], foreground_B[:, None]

    def onehot(self, targets_B: Tensor, like_BC: Tensor) -> Tensor:
        """The targets of the binary problems [B, C], zero in background rows."""
        if self.background is None:
            return F.one_hot(targets_B, like_BC.shape[1]).to(like_BC)
        columns_B1, foreground_B1 = self._positives(targets_B)
        return torch.zeros_like(like_BC).scatter(1, columns_B1, foreground_B1.to(like_BC))

    def per_example(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        shifted_BC = self.adjusted(logits_BC, targets_B)
        onehot_BC = self.onehot(targets_B, shifted_BC)
        return F.binary_cross_entropy_with_logits(shifted_BC, onehot_BC, reduction="none").sum(1)

    def with_gradient(self, logits_BC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        logits_BC = logits_BC.detach()
        sigmoid_BC = self.adjusted(logits_BC, targets_B).sigmoid()
        losses_B = self.per_example(logits_BC, targets_B)
        if self.background is None:
            return losses_B, minus_onehot(sigmoid_BC, targets_B)
        columns_B1, foreground_B1 = self._positives(targets_B)
        return losses_B, sigmoid_BC.scatter_add_(1, columns_B1, -foreground_B1.to(sigmoid_BC))

    def implied_log_prior(self, log_law_C: Tensor) -> Tensor:
        """The same for k binary problems: odds of the law over the odds that the loss takes out, made to sum to one."""
        law_C = log_law_C.log_softmax(0).exp().clamp(1e-12, 1 - 1e-12)
        offset_C = 0 if self.offset_C is None else self.offset_C.to(law_C)
        return F.logsigmoid(law_C.logit() - offset_C).log_softmax(0)


class BalancedSigmoidLoss(SigmoidLoss):
    """Balanced loss for multiple binary logistic regression (eqs 21-23 of the supplement, A.2).

    Each logit z_c becomes z_c - log((n/k)/n_c * (n - n_c)/(n - n/k)); the binary cross-entropies are summed over the
    classes and averaged over the batch (eqs 13-14). Raises ValueError for a class without images or for one class only.

    ``background`` (a detector's, label of background rows): the first argument is then the share f_c of the images that show
    each class, in (0, 1), else ValueError. Logits [B, C], without a background column. Foreground rows: z_c becomes
    z_c + log(f_c / (1 - f_c)), which is the above without its constant, as in the released detection code; background rows:
    plain, all targets zero (the remark in A.2).
    """

    def __init__(self, class_counts, *, background: int | None = None):
        super().__init__(background=background)
        if background is not None:
            self.offset_C = checked_priors(class_counts, background).logit()
            return
        log_share_C = log_share(class_counts)
        k = len(log_share_C)
        if k < 2:
            raise ValueError("the balanced sigmoid needs at least two classes: with one there is nothing to tell apart")
        log_odds_C = log_share_C - torch.log1p(-log_share_C.exp())  # log n_c / (n - n_c)
        # -log((n/k)/(n - n/k)) = log(k - 1): zero shift where every class has n/k images.
        self.offset_C = log_odds_C + math.log(k - 1)
