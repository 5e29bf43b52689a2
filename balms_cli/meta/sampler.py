"""Meta Sampler: class sample rates learned through the influence of each drawn example (paper 3.2, supplement B.1).

P(image i) is proportional to the rate r of its class, so P(class c) = n_c r_c / sum_j n_j r_j: equal rates are
instance-balanced sampling, class-balanced means r_c proportional to 1/n_c. r = sigmoid(theta), 0.5 at the start.

Eq 79 has log and exp misplaced; what is drawn is softmax((log rho + g) / tau) over the images with Gumbel noise g, made
one-hot by argmax, with the gradient of the softmax (straight-through). Three estimators of d L_meta / d theta:

* ``image``: as the text has it, B x N, computed a few rows at a time so that memory stays bounded (noise of 24 bits ties at
  the top where there are millions of images, and the first of equals is drawn);
* ``class``: the same law from B x C: Gumbel over classes with logits log n_c + log r_c, then a uniform image of the class;
* ``expected``: no Gumbel: the derivative of P(class) times the mean influence of the class. Eq 81 keeps only the drawn
  entry, so with the other two a constant loss gives a gradient whose expectation is not zero; here it is exactly zero.

Shapes: B draws, C classes, N images ordered by class.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses.base import checked_counts

# Entries of the B x N matrix that the image estimator holds at a time: 16 MB a tensor in float32.
_CHUNK_ENTRIES = 4_000_000


class Draw(NamedTuple):
    """A batch drawn by the sampler. An image is named by its class and its position among the images of that class."""

    classes_B: Tensor
    positions_B: Tensor
    soft_B: Tensor | None  # S_i: soft value of the drawn entry
    soft_BC: Tensor | None  # relaxed draw, summed over the images of each class


class MetaSampler(nn.Module):
    """Learnable class sample rates. ``class_counts``: training images a class [C], at least one each, else ValueError.

    A training loop draws a batch, gets its influence (``balms_cli.influence``), sets ``theta.grad`` to
    ``gradient(draw, influence_B)`` and steps an Adam (lr 0.01, betas 0.9 and 0.99 in the paper) on ``theta``.
    """

    def __init__(self, class_counts, *, estimator: str = "class", temperature: float = 1.0):
        super().__init__()
        if estimator not in ("class", "image", "expected"):
            raise ValueError(f"estimator {estimator!r}: choose class, image or expected")
        if not temperature > 0:
            raise ValueError(f"the temperature of the relaxed draw must be above 0, got {temperature}")
        counts_C = checked_counts(torch.as_tensor(class_counts, dtype=torch.int64)).long()
        self.estimator, self.temperature = estimator, temperature
        self.theta = nn.Parameter(torch.zeros(len(counts_C)))
        self.register_buffer("counts_C", counts_C, persistent=False)
        self.register_buffer("sizes_C", counts_C.double(), persistent=False)
        self.register_buffer("log_counts_C", counts_C.double().log().float(), persistent=False)
        self.register_buffer("starts_C", counts_C.cumsum(0) - counts_C, persistent=False)

    @property
    def rates(self) -> Tensor:
        """r [C], in (0, 1)."""
        return self.theta.detach().sigmoid()

    @property
    def log_law(self) -> Tensor:
        """log P(class c) [C]."""
        return (self.log_counts_C + F.logsigmoid(self.theta.detach())).log_softmax(0)

    @torch.no_grad()
    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Draw:
        """``batch_size`` images by the present rates, with replacement."""
        if self.estimator == "image":
            return self._draw_images(batch_size, generator)
        logits_C = self.log_counts_C + F.logsigmoid(self.theta)
        soft_B, soft_BC, classes_B = _relaxed_draw(logits_C, batch_size, self.temperature, generator)
        u_B = torch.rand(batch_size, generator=generator, device=self.theta.device, dtype=torch.float64)
        positions_B = (u_B * self.sizes_C.index_select(0, classes_B)).long()
        if self.estimator == "expected":
            return Draw(classes_B, positions_B, None, None)
        return Draw(classes_B, positions_B, soft_B, soft_BC)

    def _draw_images(self, batch_size: int, generator: torch.Generator | None) -> Draw:
        class_of_N = torch.repeat_interleave(self.counts_C)
        log_rho_N = F.logsigmoid(self.theta)[class_of_N]
        rows = max(1, _CHUNK_ENTRIES // len(class_of_N))
        parts = []
        for first in range(0, batch_size, rows):
            b = min(rows, batch_size - first)
            soft_b, soft_bN, images_b = _relaxed_draw(log_rho_N, b, self.temperature, generator)
            soft_bC = soft_bN.new_zeros(b, len(self.theta)).index_add_(1, class_of_N, soft_bN)
            classes_b = class_of_N[images_b]
            parts.append((classes_b, images_b - self.starts_C[classes_b], soft_b, soft_bC))
        return Draw(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @torch.no_grad()
    def gradient(self, draw: Draw, influence_B: Tensor) -> Tensor:
        """d L_meta / d theta [C] from the influence of each drawn example."""
        rates_C = self.theta.sigmoid()
        influence_B = influence_B.to(rates_C)
        if self.estimator == "expected":
            return self._expected(draw.classes_B, influence_B) * (1 - rates_C)
        # theta reaches entry c of the relaxed draw through log r_c, whose derivative is 1 - r_c.
        weight_B = influence_B * draw.soft_B / self.temperature
        drawn_C = torch.zeros_like(rates_C).index_add_(0, draw.classes_B, weight_B)
        return (drawn_C - weight_B @ draw.soft_BC) * (1 - rates_C)

    def _expected(self, classes_B: Tensor, influence_B: Tensor) -> Tensor:
        """B sum_c' hbar_c' dP_c' / dlog r_c, over the classes that the batch shows (the others tell nothing of theirs)."""
        seen_C = torch.zeros_like(self.theta).index_add_(0, classes_B, torch.ones_like(influence_B))
        mean_C = torch.zeros_like(self.theta).index_add_(0, classes_B, influence_B) / seen_C.clamp(min=1)
        law_C = self.log_law.exp() * (seen_C > 0)
        baseline = (law_C @ mean_C) / law_C.sum()
        return len(classes_B) * law_C * (mean_C - baseline)


def _relaxed_draw(logits_K: Tensor, batch_size: int, temperature: float, generator) -> tuple[Tensor, Tensor, Tensor]:
    """Gumbel-softmax over K entries: soft value of the drawn entry [B], relaxed draw [B, K], drawn entry [B]."""
    u_BK = torch.rand(batch_size, len(logits_K), generator=generator, device=logits_K.device)
    perturbed_BK = logits_K - u_BK.log_().neg_().log_()  # -log(-log u) is a Gumbel(0, 1); u = 0 gives -inf: not drawn
    top_B1, drawn_B1 = perturbed_BK.max(1, keepdim=True)
    # softmax by hand: the drawn entry is the largest, so its exponential is 1 and its soft value one over the sum.
    soft_BK = perturbed_BK.sub_(top_B1).div_(temperature).exp_()
    soft_B1 = soft_BK.sum(1, keepdim=True).reciprocal_()
    return soft_B1.squeeze(1), soft_BK.mul_(soft_B1), drawn_B1.squeeze(1)
