"""Meta-Weight-Net: a small network that turns an example's loss into its weight, learned through influence (Shu et al.,
NeurIPS 2019, "Meta-Weight-Net: learning an explicit mapping for sample weighting").

V: 1 -> hidden -> 1, ReLU, then a sigmoid. An example weighs s_i = B V(l_i) / sum_j V(l_j): the authors' normalisation by
the batch's sum, times B, because the inner loss here is a mean. With w_j = V(l_j), W their sum, and h_i = dL/ds_i,

    dL/dw_j = (B / W) (h_j - (1/B) sum_i h_i s_i),     dL/dphi = sum_j dL/dw_j dV(l_j)/dphi, the losses l_j held fixed.

Computed as s = B softmax(log V): the same weights and the same chain rule, but where every V of a batch is too small for a
float its ratios still stand, instead of 0/0.

Shapes: B batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MetaWeightNet(nn.Module):
    """V, with ``hidden`` units (100, as the authors have it): losses [B], in nats, to values [B] in (0, 1).

    Each step: ``influence`` with ``weights_B=net.weights``, ``gradient``, a step of the net's own optimizer, and the real
    step on ``weights(losses_B)``. Computed in the type of its parameters, whatever autocast is on.
    """

    def __init__(self, hidden: int = 100):
        super().__init__()
        self.inner, self.outer = nn.Linear(1, hidden), nn.Linear(hidden, 1)

    def forward(self, losses_B: Tensor) -> Tensor:
        """V(l) [B]."""
        return self._logits(losses_B).sigmoid()

    @torch.no_grad()
    def weights(self, losses_B: Tensor) -> Tensor:
        """Loss weight of each example [B], mean 1. No graph."""
        return self._normalised(losses_B)

    def gradient(self, losses_B: Tensor, influence_B: Tensor) -> dict[str, Tensor]:
        """d L_meta / d phi by name, from each example's loss [B] and its influence [B] at the present weights.

        Also left in the ``.grad`` of the parameters, in place of what was there.
        """
        with torch.enable_grad(), torch.autocast(losses_B.device.type, enabled=False):
            weights_B = self._normalised(losses_B)
            slopes = torch.autograd.grad(weights_B, list(self.parameters()), influence_B.detach().to(weights_B))
        gradient = {}
        for (name, parameter), slope in zip(self.named_parameters(), slopes, strict=True):
            parameter.grad = gradient[name] = slope
        return gradient

    def _normalised(self, losses_B: Tensor) -> Tensor:
        return len(losses_B) * F.logsigmoid(self._logits(losses_B)).softmax(0)

    def _logits(self, losses_B: Tensor) -> Tensor:
        # Losses are told apart to more than the three digits of bf16.
        with torch.autocast(losses_B.device.type, enabled=False):
            losses_B1 = losses_B.detach().to(self.inner.weight)[:, None]
            return self.outer(F.relu(self.inner(losses_B1))).squeeze(1)
