"""Which images make up a batch. Every sampler is a function of (seed, step): a resumed run draws what it would have drawn.

Laws over classes (field names; sources: Kang et al., ICLR 2020, eq 1, for the middle three):

* ``instance``: every image once an epoch, in an order drawn anew for each;
* ``class`` (CBS): a class uniformly, then an image of it;  ``square-root``: P(c) proportional to sqrt(n_c);
* ``progressive``: P(c) = (1 - t) n_c/N + t/k, t the share of the training done;
* class rates r (``rates.json``): P(c) proportional to n_c r_c.

Shapes: N images, C classes, B batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_MASK = (1 << 63) - 1


def mix(*parts: int) -> int:
    """63 well-mixed bits from integers (splitmix64 finaliser): independent streams from (seed, purpose, step)."""
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK


class ClassIndex:
    """Images grouped by class: ``order`` [N] lists them class by class, those of class c from ``starts[c]`` on."""

    def __init__(self, labels_N: Tensor, num_classes: int):
        self.counts = torch.bincount(labels_N, minlength=num_classes)
        self.sizes = self.counts.double()  # the same, as numbers to multiply by
        self.starts = self.counts.cumsum(0) - self.counts
        self.order = labels_N.argsort(stable=True)

    def images(self, classes_B: Tensor, positions_B: Tensor) -> Tensor:
        """Image indices [B] from a class and a position within it."""
        return self.order.index_select(0, self.starts.index_select(0, classes_B) + positions_B)

    def draw(self, edges_C: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
        """``batch_size`` images with replacement: a class by the cumulative law ``edges_C``, then an image uniformly."""
        u_2B = torch.rand(2, batch_size, generator=generator, device=edges_C.device, dtype=torch.float64)
        classes_B = torch.searchsorted(edges_C, u_2B[0] * edges_C[-1], right=True).clamp_(max=len(edges_C) - 1)
        return self.images(classes_B, (u_2B[1] * self.sizes.index_select(0, classes_B)).long())


def class_law(name: str, counts_C: Tensor, progress: float = 1.0) -> Tensor:
    """P(class) [C], float64, of a named sampler; ``progress`` in 0..1 is used by ``progressive`` alone."""
    counts_C = counts_C.double()
    share_C = counts_C / counts_C.sum()
    uniform_C = torch.full_like(share_C, 1 / len(share_C))
    if name == "instance":
        return share_C
    if name == "class":
        return uniform_C
    if name == "square-root":
        return counts_C.sqrt() / counts_C.sqrt().sum()
    return (1 - progress) * share_C + progress * uniform_C


def rates_law(rates_C: Tensor, counts_C: Tensor) -> Tensor:
    """P(class) [C], float64, from class rates: proportional to n_c r_c."""
    mass_C = counts_C.double() * rates_C.double().to(counts_C.device)
    return mass_C / mass_C.sum()


def batches(name: str, index: ClassIndex, batch_size: int, steps: int, seed: int, rates_C: Tensor | None = None
            ) -> Callable[[int], Tensor]:  # fmt: skip
    """The batch of each step as a function of the step: ``draw(step) -> image indices [B]``."""
    device = index.counts.device
    if name == "instance" and rates_C is None:
        return _epochs(len(index.order), batch_size, seed, device)
    generator = torch.Generator(device)

    def draw(step: int) -> Tensor:
        edges_C = fixed_C if fixed_C is not None else class_law(name, index.counts, step / max(1, steps - 1)).cumsum(0)
        return index.draw(edges_C, batch_size, generator.manual_seed(mix(seed, 1, step)))

    fixed_C = None
    if rates_C is not None:
        fixed_C = rates_law(rates_C, index.counts).cumsum(0)
    elif name != "progressive":
        fixed_C = class_law(name, index.counts).cumsum(0)
    return draw


def _epochs(n: int, batch_size: int, seed: int, device: torch.device) -> Callable[[int], Tensor]:
    """Batches cut from one endless row of permutations: every image once in each N draws, no partial batch."""
    generator, held = torch.Generator(), {}

    def permutation(epoch: int) -> Tensor:
        if epoch not in held:
            if len(held) > 1:
                held.pop(min(held))
            held[epoch] = torch.randperm(n, generator=generator.manual_seed(mix(seed, 2, epoch))).to(device)
        return held[epoch]

    def draw(step: int) -> Tensor:
        first, last = step * batch_size, (step + 1) * batch_size
        parts = []
        while first < last:
            epoch, place = divmod(first, n)
            parts.append(permutation(epoch)[place : place + last - first])
            first += len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return draw
