"""The schedule by hand arithmetic at every step, and the guard against non-finite losses."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from balms_cli.config import PretrainConfig
from balms_cli.engine.optim import Guard, learning_rate, make_sgd, step_drops
from balms_cli.errors import DivergedError


def test_schedule_at_every_step_of_the_papers_recipe():
    lrs = [learning_rate(i, 13_000, peak=0.1, warmup_steps=800, warmup_lr=0.05) for i in range(13_000)]
    assert lrs[0] == 0.05 and lrs[400] == pytest.approx(0.075) and lrs[800] == 0.1
    assert all(a < b for a, b in pairwise(lrs[:801]))
    assert all(a > b for a, b in pairwise(lrs[800:]))
    assert lrs[800 + 6100] == pytest.approx(0.05)  # half way down
    for i in (1000, 5000, 12_999):
        assert lrs[i] == pytest.approx(0.1 * math.cos(math.pi / 2 * (i - 800) / 12_200) ** 2)  # half-angle form
    assert 0 < lrs[-1] < 1e-8


def test_schedule_without_warm_up_starts_at_the_peak():
    assert [round(learning_rate(i, 4, peak=1.0), 6) for i in range(4)] == [1.0, 0.853553, 0.5, 0.146447]


def test_drops_by_ten_at_their_steps_also_within_the_warm_up():
    lrs = [step_drops(i, peak=0.8, drops=[3, 6], warmup_steps=4, warmup_factor=0.25) for i in range(8)]
    assert lrs == pytest.approx([0.2, 0.35, 0.5, 0.065, 0.08, 0.08, 0.008, 0.008])
    assert [step_drops(i, peak=1.0, drops=[]) for i in (0, 99)] == [1.0, 1.0]


def test_what_sgd_decays_and_that_nesterov_needs_momentum():
    head = nn.Linear(2, 2)
    optimizer = make_sgd(head, PretrainConfig(momentum=0.0, nesterov=True, weight_decay=0.5, lr=1.0), [head.bias])
    before = {k: v.clone() for k, v in head.state_dict().items()}
    head.weight.grad, head.bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.equal(head.weight, before["weight"] / 2) and torch.equal(head.bias, before["bias"])


class Elsewhere(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda")


def test_guard_on_a_gpu_flags_the_bad_step_and_all_later_ones_until_somebody_asks():
    weight = nn.Parameter(torch.ones(3))
    sgd, adam = (kind([weight], lr=0.1, fused=True) for kind in (torch.optim.SGD, torch.optim.Adam))
    guard = Guard(torch.device("cpu"))
    guard.bad = guard.bad.as_subclass(Elsewhere)
    seen = []
    for loss in (1.0, float("inf"), 2.0):
        weight.grad = torch.ones(3)
        guard.step(torch.tensor(loss), sgd, adam)
        sgd.found_inf, adam.found_inf = (o.found_inf.as_subclass(torch.Tensor) for o in (sgd, adam))
        seen.append((sgd.found_inf.item(), adam.found_inf.item()))
    assert seen == [(0, 0), (1, 1), (1, 1)]
    with pytest.raises(DivergedError):
        guard.check()


def test_guard_stops_before_the_step_that_would_spoil_the_weights():
    head = nn.Linear(2, 2)
    optimizer = make_sgd(head, PretrainConfig())
    before = {k: v.clone() for k, v in head.state_dict().items()}
    head.weight.grad, head.bias.grad = torch.full((2, 2), float("nan")), torch.zeros(2)
    guard = Guard(torch.device("cpu"))
    with pytest.raises(DivergedError, match="not finite"):
        guard.step(torch.tensor(float("nan")), optimizer)
    assert all(torch.equal(before[k], v) for k, v in head.state_dict().items())


def test_the_fused_optimizers_skip_a_flagged_step_as_the_guard_relies_on_where_asking_would_stall():
    """On a GPU the guard hands the optimizer a flag instead of raising; torch's fused kernels must honour it."""
    for make in (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True), lambda p: torch.optim.Adam(p, fused=True)):
        weight = nn.Parameter(torch.ones(3))
        optimizer = make([weight])
        weight.grad = torch.ones(3)
        optimizer.step()
        after = weight.detach().clone()
        state = {k: v.clone() for k, v in optimizer.state[weight].items()}
        assert (after < 1).all()
        weight.grad = torch.full((3,), float("nan"))
        optimizer.found_inf = torch.ones(())
        for _ in range(2):
            optimizer.step()
        assert torch.equal(weight, after) and all(torch.equal(v, optimizer.state[weight][k]) for k, v in state.items())
