"""The learning rate as a pure function of the step, and a step that never spoils the weights."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import DetectSGDConfig, TrainConfig
from ..errors import DivergedError


def learning_rate(step: int, steps: int, *, peak: float, warmup_steps: int = 0, warmup_lr: float = 0.0) -> float:
    """Linear from ``warmup_lr`` to ``peak`` over ``warmup_steps``, then a half cosine that would reach 0 at ``steps``.

    Loshchilov and Hutter (ICLR 2017) without restarts; ``step`` counts from 0.
    """
    if step < warmup_steps:
        return warmup_lr + (peak - warmup_lr) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * peak * (1 + math.cos(math.pi * progress))


def step_drops(step: int, *, peak: float, drops: Sequence[int], warmup_steps: int = 0, warmup_factor: float = 0.0) -> float:
    """Linear from ``warmup_factor * peak`` at step 0 to ``peak`` at ``warmup_steps``; from each step in ``drops`` (rising) on a
    tenth of before, also within the warm-up.

    The schedule of Detectron (Goyal et al. 2017); ``step`` counts from 0.
    """
    ramp = 1.0 if step >= warmup_steps else warmup_factor + (1 - warmup_factor) * step / warmup_steps
    return peak * ramp / 10 ** bisect_right(drops, step)


def make_sgd(module: nn.Module, config: TrainConfig | DetectSGDConfig, undecayed: Sequence[nn.Parameter] = ()
             ) -> torch.optim.SGD:  # fmt: skip
    """SGD with momentum over every parameter that asks for a gradient (fused: one kernel for all of them).

    ``undecayed``: those of them that weight decay leaves alone.
    """
    apart = {id(p) for p in undecayed}
    decayed = [p for p in module.parameters() if p.requires_grad and id(p) not in apart]
    groups = [{"params": decayed}] + ([{"params": list(undecayed), "weight_decay": 0.0}] if apart else [])
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
                           nesterov=config.nesterov and config.momentum > 0, fused=True)  # fmt: skip


class Guard:
    """Takes optimizer steps for as long as the loss is finite.

    On a CPU a bad loss raises at once. On a GPU asking would stall the queue every step, so the fused optimizers are
    handed a flag on the device that turns this step and all later ones into no-ops, and ``check`` asks now and then.
    ``checkpoint``: where the run's last state lies once there is one, for the error to name.
    """

    def __init__(self, device: torch.device, checkpoint: Path | None = None):
        self.bad, self.checkpoint = torch.zeros((), device=device), checkpoint
        self.step_now = 0

    def step(self, loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        """A step of each optimizer, unless ``loss`` (a scalar) is not finite or an earlier one was not."""
        if self.bad.device.type == "cpu":
            if not math.isfinite(loss.item()):
                self.bad.fill_(1)
                self.check()
        else:
            self.bad = torch.maximum(self.bad, 1 - torch.isfinite(loss.detach()).float())
            for optimizer in optimizers:
                optimizer.found_inf = self.bad
        for optimizer in optimizers:
            optimizer.step()

    def check(self) -> None:
        """Raises DivergedError (exit 5) when a loss was not finite."""
        if self.bad.item():
            there = self.checkpoint is not None and self.checkpoint.is_file()
            kept = f"; the last checkpoint is whole ({self.checkpoint})" if there else ""
            raise DivergedError(f"the loss is not finite by step {self.step_now}{kept}. "
                                "Lower --lr, lengthen --set warmup_steps=..., or look for broken images")  # fmt: skip
