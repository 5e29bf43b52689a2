"""L2RW: weights for the examples of one batch, from one look ahead (Ren et al., ICML 2018, "Learning to reweight examples
for robust deep learning", Algorithm 1).

The step to look past is the one that gives every example the weight zero. An example that would lower the meta loss there
(h_i < 0) weighs in proportion to how fast; one that would raise it weighs nothing. Nothing is kept from batch to batch.
"""

import torch
from torch import Tensor


@torch.no_grad()
def l2rw_weights(influence_B: Tensor) -> Tensor:
    """Loss weight of each example [B], mean 1, from its influence [B] at zero weights: ``influence(..., weights_B=0.0)``.

    w_i = B max(0, -h_i) / sum_j max(0, -h_j). The authors' weights sum to 1 and weigh a sum over the batch; times B they
    weigh a mean. A batch in which no example helps is not passed over, as theirs is: it gets ones, a plain step. The scale
    of the influence does not matter. One influence that is not a number makes every weight so.
    """
    helpful_B = (-influence_B).clamp_min(0)
    mean = helpful_B.mean()
    return torch.where(mean == 0, torch.ones_like(helpful_B), helpful_B / mean)  # on the device: asks nothing of it
