"""Steps of stage 1: the whole network from images, plain or with a weight for each example learned on the way.

One re-weighted iteration (L2RW, Meta-Weight-Net): look one SGD step ahead, through the whole network, and read a
class-balanced meta batch there; the influence of each example on the meta loss becomes its weight, or trains the network
that makes the weights; then the real step on the same batch. Shapes: B batch, M meta batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PretrainConfig
from ..data.samplers import ClassIndex, mix
from ..engine.distributed import World
from ..engine.optim import Guard
from ..engine.profile import phase
from ..engine.runtime import Runtime
from ..losses import SoftmaxLoss
from ..meta.influence import Influence, influence
from ..meta.l2rw import l2rw_weights
from ..meta.weight_net import MetaWeightNet
from ..models.classifiers import Classifier

_META_DRAW, _WEIGHT_NET = 11, 12
Read = Callable[[int], tuple[Tensor, Tensor]]  # step -> network inputs [B, 3, S, S] and targets [B], its share of the batch


def plain_step(model: nn.Module, optimizer, loss: SoftmaxLoss, read: Read, runtime: Runtime, world: World
               ) -> Callable[[int, Guard], Tensor]:  # fmt: skip
    """Forward, loss, backward, SGD. B is this process's share of the batch."""

    def step(i: int, guard: Guard) -> Tensor:
        inputs, targets_B = read(i)
        with phase("forward"):
            with runtime.autocast():
                logits_BC = model(inputs)
            value = loss(logits_BC, targets_B) if world.size == 1 else _share_of_loss(loss, logits_BC, targets_B, world)
        with phase("backward"):
            optimizer.zero_grad()
            value.backward()
        with phase("optimizer"):
            value = world.mean(value.detach())  # one number for all: they log, and give up, together
            guard.step(value, optimizer)
        return value

    return step


def _share_of_loss(loss: SoftmaxLoss, logits_BC: Tensor, targets_B: Tensor, world: World) -> Tensor:
    """What averaged over the processes is the loss of the whole batch: a denominator is that of the batch, not the share."""
    losses_B = loss.per_example(logits_BC, targets_B)
    return losses_B.sum() / world.mean(torch.as_tensor(loss.denominator(targets_B), device=losses_B.device)).to(losses_B)


def class_balanced(index: ClassIndex, batch_size: int, seed: int) -> Callable[[int], Tensor]:
    """The meta batch of each step: images drawn with replacement, every class as likely as any other."""
    edges_C = torch.ones(len(index.counts), dtype=torch.float64, device=index.counts.device).cumsum(0)
    generator = torch.Generator(edges_C.device)
    return lambda i: index.draw(edges_C, batch_size, generator.manual_seed(mix(seed, _META_DRAW, i)))


def reweighted_step(config: PretrainConfig, model: Classifier, optimizer, loss: SoftmaxLoss, weigher: "Weigher", read: Read,
                    meta_read: Read, runtime: Runtime) -> Callable[[int, Guard], Tensor]:  # fmt: skip
    """The same step on weighted examples, their weights by one look ahead."""
    plain = loss.plain()

    def step(i: int, guard: Guard) -> Tensor:
        inputs, targets_B = read(i)
        with runtime.autocast():
            meta_batch = meta_read(i)
            with phase("look ahead"):
                seen = influence(model, optimizer, loss, (inputs, targets_B), meta_batch,
                                 weights_B=weigher.at_first, meta_loss=plain, method=config.hypergradient)  # fmt: skip
        with phase("look ahead"):
            weights_B = weigher.learn(seen, guard)
        with phase("forward"):
            with runtime.autocast():
                logits_BC = model(inputs)
            value = loss.reduce(loss.per_example(logits_BC, targets_B) * weights_B, targets_B)
        with phase("backward"):
            optimizer.zero_grad()
            value.backward()
        with phase("optimizer"):
            guard.step(value + seen.meta_loss, optimizer)
        return value.detach()

    return step


class L2RW:
    """Weights made anew for every batch: nothing is kept from step to step."""

    at_first = 0.0

    def __init__(self):
        self.parts: dict[str, Any] = {}

    def learn(self, seen: Influence, guard: Guard) -> Tensor:
        return l2rw_weights(seen.influence_B)


class WeightNet:
    """Meta-Weight-Net: weights by a small network of the loss, which itself takes a step of SGD first."""

    def __init__(self, config: PretrainConfig, device: torch.device):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(config.seed, _WEIGHT_NET))
            self.net = MetaWeightNet(config.weight_net_hidden)
        self.net.to(device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=config.weight_net_lr, momentum=0.9, nesterov=True,
                                         weight_decay=config.weight_net_decay, fused=True)  # fmt: skip
        self.at_first = self.net.weights
        self.parts = {"weight_net": self.net, "weight_net_optimizer": self.optimizer}

    def learn(self, seen: Influence, guard: Guard) -> Tensor:
        self.net.gradient(seen.losses_B, seen.influence_B)
        guard.step(seen.meta_loss, self.optimizer)
        return self.net.weights(seen.losses_B)


Weigher = L2RW | WeightNet


def make_weigher(config: PretrainConfig, device: torch.device) -> Weigher:
    return L2RW() if config.reweight == "l2rw" else WeightNet(config, device)
