"""Meta Reweigher: class loss weights learned through influence (supplement B.2).

r = sigmoid(theta), 0.5 at the start. An example of class y weighs s_i = B r_y / R with R = sum_j r_{y_j}, the mean weight
of a batch thus being 1 (``norm="mean"``, as the released detection code does: otherwise the learning rate drifts with the
rates), or r_y as the text has it (``norm="none"``).

Shapes: B batch, C classes.
"""

import torch
from torch import Tensor, nn


class MetaReweigher(nn.Module):
    """Learnable class weights for ``num_classes`` classes. Use as ``MetaSampler``, with ``weights`` in place of ``draw``."""

    def __init__(self, num_classes: int, *, norm: str = "mean"):
        super().__init__()
        if norm not in ("mean", "none"):
            raise ValueError(f"norm {norm!r}: choose mean or none")
        self.norm = norm
        self.theta = nn.Parameter(torch.zeros(num_classes))

    @property
    def rates(self) -> Tensor:
        """r [C], in (0, 1)."""
        return self.theta.detach().sigmoid()

    @torch.no_grad()
    def weights(self, targets_B: Tensor) -> Tensor:
        """Loss weight of each example [B]."""
        rates_B = self.theta.sigmoid()[targets_B]
        return rates_B if self.norm == "none" else rates_B * (len(rates_B) / rates_B.sum())

    @torch.no_grad()
    def gradient(self, targets_B: Tensor, influence_B: Tensor) -> Tensor:
        """d L_meta / d theta [C] from the influence h of each example at the present weights.

        norm="mean": (B/R) r_c (1 - r_c) [sum_{y_i=c} h_i - (m_c/B) sum_i h_i s_i], m_c the class's count in the batch.
        """
        rates_C = self.theta.sigmoid()
        influence_B = influence_B.to(rates_C)
        slope_C = rates_C * (1 - rates_C)
        by_class_C = torch.zeros_like(rates_C).index_add_(0, targets_B, influence_B)
        if self.norm == "none":
            return slope_C * by_class_C
        batch, total = len(targets_B), rates_C[targets_B].sum()
        share_C = torch.bincount(targets_B, minlength=len(rates_C)).to(rates_C) / batch
        mean_shift = (influence_B * self.weights(targets_B)).sum()
        return (batch / total) * slope_C * (by_class_C - share_C * mean_shift)
