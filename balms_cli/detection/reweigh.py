"""The Meta Reweigher on regions: category weights for the foreground, one for the background (supplement B.2).

Weights have mean 1 over the foreground of the whole batch, that of all processes, and so has their gradient: what several
processes compute is what one would with the regions of all.

Shapes: R regions of this process, C categories; label 0 is background, label y has weight y - 1 of the reweigher.
"""

import torch
from torch import Tensor

from ..engine.distributed import ALONE, World
from ..meta.reweigher import MetaReweigher


@torch.no_grad()
def region_weights(reweigher: MetaReweigher, labels_R: Tensor, world: World = ALONE) -> Tensor:
    """Loss weight of each region [R]: ``MetaReweigher.weights`` over the foreground of all processes, 1 for background."""
    foreground_R = labels_R > 0
    rates_R = torch.where(foreground_R, reweigher.rates[(labels_R - 1).clamp_min(0)], 0)
    if reweigher.norm == "mean":
        count, rates = world.sum(torch.stack([foreground_R.sum().to(rates_R), rates_R.sum()])).unbind()
        rates_R = rates_R * (count / rates)
    return torch.where(foreground_R, rates_R, 1)


@torch.no_grad()
def theta_gradient(reweigher: MetaReweigher, labels_R: Tensor, influence_R: Tensor, world: World = ALONE) -> Tensor | None:
    """d L_meta / d theta [C], the same in every process, from the influence of each region at the weights above
    (``influence(..., total=world.sum)``). None where no process has foreground: there is nothing to learn from."""
    foreground_R = labels_R > 0
    labels_F = world.gather_rows(labels_R[foreground_R])
    influence_F = world.gather_rows(influence_R[foreground_R])
    return reweigher.gradient(labels_F - 1, influence_F) if len(labels_F) else None
