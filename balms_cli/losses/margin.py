"""Label-distribution-aware margins. Shapes: B batch, C classes."""

import torch
from torch import Tensor

from .base import SoftmaxLoss, at_least_float32, checked_counts, checked_priors


class LDAMLoss(SoftmaxLoss):
    """LDAM (Cao et al., NeurIPS 2019, eqs 10-13): cross-entropy on s * (cos_c - Delta_c [c = y]), Delta_c ~ n_c^(-1/4).

    ``max_margin``: Delta of the rarest class, 0.5; ``scale``: s, 30 (both of the LDAM-DRW repository). The logits are those
    of a cosine head that has applied s already (``CosineHead``): the loss takes off s * Delta_y. A head that is not a
    cosine times s has no margin to speak of. With ``DeferredReweighting`` around it: LDAM-DRW.

    ``background`` (a detector's, label of background rows): the first argument is then each class's share of the images, in
    (0, 1), else ValueError; logits [B, C + 1]; background rows have no margin.
    """

    prior_is_exact = False  # the margin moves the true class only, which is no prior

    def __init__(self, class_counts, max_margin: float = 0.5, scale: float = 30.0, *, background: int | None = None):
        super().__init__(background=background)
        counts_C = checked_counts(class_counts) if background is None else checked_priors(class_counts, background)
        self.register_buffer("margin_C", scale * max_margin * (counts_C.min() / counts_C) ** 0.25, persistent=False)

    def adjusted(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        logits_BC = at_least_float32(logits_BC)
        margin_B1 = self.by_column(self.margin_C.to(logits_BC), logits_BC)[targets_B][:, None]
        return logits_BC - torch.zeros_like(logits_BC).scatter(1, targets_B[:, None], margin_B1)
