"""Influence against the true bi-level map: a deep copy of model and torch.optim.SGD is stepped, and its meta loss read.

The three ways must agree with each other to rtol 1e-9 in float64, and with central differences of that map.
"""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from balms_cli import BalancedSigmoidLoss, BalancedSoftmaxLoss, SoftmaxLoss, influence
from balms_cli.losses import ClassBalancedLoss
from balms_cli.meta.influence import sgd_lookahead

B, M, C, D = 7, 9, 4, 5
SGD_SETTINGS = [
    {"momentum": momentum, "weight_decay": decay, "nesterov": nesterov}
    for momentum, nesterov in [(0.0, False), (0.9, False), (0.9, True)]
    for decay in (0.0, 5e-3)
]
METHODS = ("closed-form", "jvp", "higher")


def batches(inputs=(D,), seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, *inputs, dtype=torch.float64, generator=generator)
    meta = torch.randn(M, *inputs, dtype=torch.float64, generator=generator)
    return (x, torch.arange(B) % C), (meta, torch.arange(M) % C)


def some_weights():
    return torch.tensor([0.5, 1.7, 0.0, 2.0, 1.0, 0.3, 1.5], dtype=torch.float64)


def linear_head(bias=True):
    torch.manual_seed(0)
    return nn.Linear(D, C, bias=bias).double()


def conv_net():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(12, C)).double().train()


def take_steps(model, optimizer, inputs=(D,), steps=3):
    """Ordinary training steps, so that momentum buffers are in use."""
    for seed in range(steps):
        (x, y), _ = batches(inputs, seed=100 + seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()


def step_a_copy(model, optimizer, loss, batch, meta_batch, weights, meta_loss):
    """The bi-level map itself: weights -> one step of torch.optim.SGD -> meta loss. With it the gradients used."""
    model, optimizer = copy.deepcopy((model, optimizer))
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    optimizer.zero_grad()
    (weights * loss.per_example(model(batch[0]), batch[1])).sum().div(len(batch[1])).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    with torch.no_grad():
        return meta_loss(model(meta_batch[0]), meta_batch[1]).item(), grads


def finite_differences(*problem, weights, meta_loss, step=1e-4):
    slopes = []
    for i in range(len(weights)):
        up, down = weights.clone(), weights.clone()
        up[i] += step
        down[i] -= step
        there = [step_a_copy(*problem, at, meta_loss)[0] for at in (up, down)]
        slopes.append((there[0] - there[1]) / (2 * step))
    return torch.tensor(slopes, dtype=torch.float64)


def check(methods, model, optimizer, loss, batch, meta_batch, weights_B=None, meta_loss=F.cross_entropy, rtol=1e-6):
    """All methods equal each other and the differences of the map, in all four fields of the result."""
    problem = model, optimizer, loss, batch, meta_batch
    start = torch.ones(len(batch[1]), dtype=torch.float64) if weights_B is None else weights_B
    true_meta, true_grads = step_a_copy(*problem, start, meta_loss)
    true_B = finite_differences(*problem, weights=start, meta_loss=meta_loss)
    assert true_B.abs().max() > 1e-4  # else nothing would be compared
    results = [influence(*problem, weights_B=weights_B, meta_loss=meta_loss, method=m) for m in methods]
    for result in results:
        scale = true_B.abs().max().item()
        torch.testing.assert_close(result.influence_B, true_B, rtol=rtol, atol=rtol * scale)
        torch.testing.assert_close(result.influence_B, results[0].influence_B, rtol=1e-9, atol=1e-9 * scale)
        assert result.meta_loss.item() == pytest.approx(true_meta, rel=1e-12)
        with torch.no_grad():
            losses_B = loss.per_example(copy.deepcopy(model)(batch[0]), batch[1])
        torch.testing.assert_close(result.losses_B, losses_B, rtol=1e-12, atol=1e-12)
        assert result.grads.keys() == true_grads.keys()
        for name, gradient in true_grads.items():
            torch.testing.assert_close(result.grads[name], gradient, rtol=1e-10, atol=1e-13)
        for tensor in (result.influence_B, result.losses_B, result.meta_loss, *result.grads.values()):
            assert not tensor.requires_grad
    return results


@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weighted"])
@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("settings", SGD_SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_linear_head_all_ways_equal_differences_of_the_real_step(settings, steps_before, weighted):
    model = linear_head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, **settings)
    take_steps(model, optimizer, steps=steps_before)
    weights_B = some_weights() if weighted else None
    check(METHODS, model, optimizer, BalancedSoftmaxLoss([50, 20, 8, 1]), *batches(), weights_B)


@pytest.mark.parametrize("loss", [SoftmaxLoss(), BalancedSigmoidLoss([50, 20, 8, 1])], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_head_with_other_losses_and_without_a_bias(bias, loss):
    model = linear_head(bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=5e-3, nesterov=True)
    take_steps(model, optimizer)
    check(METHODS, model, optimizer, loss, *batches(), some_weights())


def squared_error(logits_MC, targets_M):
    return (logits_MC.softmax(1) - F.one_hot(targets_M, C)).square().sum(1).mean()


def summed(logits_MC, targets_M):
    return F.cross_entropy(logits_MC, targets_M, reduction="sum", label_smoothing=0.1)


@pytest.mark.parametrize("meta_loss", [squared_error, summed, BalancedSoftmaxLoss([1, 8, 20, 50])])
def test_any_scalar_meta_loss(meta_loss):
    model = linear_head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    take_steps(model, optimizer)
    check(METHODS, model, optimizer, SoftmaxLoss(), *batches(), meta_loss=meta_loss)


def test_each_parameter_group_steps_at_its_own_rate():
    model = linear_head()
    groups = [
        {"params": [model.weight], "lr": 0.4, "momentum": 0.9, "weight_decay": 5e-3, "nesterov": True},
        {"params": [model.bias], "lr": 0.05, "momentum": 0.5, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    take_steps(model, optimizer)
    check(METHODS, model, optimizer, SoftmaxLoss(), *batches(), some_weights())


def test_a_scheduled_rate_is_the_rate_in_use():
    model = linear_head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.8, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for _ in range(4):
        take_steps(model, optimizer, steps=1)
        schedule.step()
    check(METHODS, model, optimizer, SoftmaxLoss(), *batches())


IMAGES = (2, 6, 6)


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("settings", [SGD_SETTINGS[1], SGD_SETTINGS[5]], ids=["plain", "nesterov"])
def test_conv_net_with_batch_norm_in_train_mode(settings, steps_before):
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **settings)
    take_steps(model, optimizer, IMAGES, steps_before)
    check(("jvp", "higher"), model, optimizer, BalancedSoftmaxLoss([9, 5, 2, 1]), *batches(IMAGES), some_weights())


def test_conv_net_in_eval_mode_uses_the_running_statistics():
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    take_steps(model, optimizer, IMAGES)
    check(("jvp", "higher"), model.eval(), optimizer, SoftmaxLoss(), *batches(IMAGES))


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("method, build, inputs", [
    ("closed-form", linear_head, (D,)), ("jvp", linear_head, (D,)), ("higher", linear_head, (D,)),
    ("jvp", conv_net, IMAGES), ("higher", conv_net, IMAGES),
])  # fmt: skip
def test_looking_ahead_leaves_no_trace(method, build, inputs, steps_before):
    """Parameters, their .grad, buffers and optimizer state are the same objects with the same bits afterwards."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3, nesterov=True)
    take_steps(model, optimizer, inputs, steps_before)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = copy.deepcopy((held, optimizer.state_dict(), {n: p.grad for n, p in model.named_parameters()}))
    batch, meta_batch = batches(inputs)
    inputs_before = copy.deepcopy((batch, meta_batch))

    influence(model, optimizer, SoftmaxLoss(), batch, meta_batch, method=method)

    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is tensor for name, tensor in held.items()) and after.keys() == held.keys()
    assert all(p.requires_grad and p.is_leaf for p in model.parameters()) and model.training
    now = after, optimizer.state_dict(), {n: p.grad for n, p in model.named_parameters()}
    torch.testing.assert_close(now, before, rtol=0, atol=0)
    torch.testing.assert_close((batch, meta_batch), inputs_before, rtol=0, atol=0)


def test_lookahead_is_where_the_optimizer_goes():
    for settings in SGD_SETTINGS:
        model = linear_head()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, **settings)
        for steps in (0, 2):
            take_steps(model, optimizer, steps=steps)
            F.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
            params = dict(model.named_parameters())
            ahead, _ = sgd_lookahead(params, {n: p.grad for n, p in params.items()}, optimizer)
            optimizer.step()
            for name, p in params.items():
                torch.testing.assert_close(ahead[name], p.detach(), rtol=1e-13, atol=1e-15)


def test_auto_takes_the_closed_form_where_the_model_is_linear(monkeypatch):
    module = importlib.import_module("balms_cli.meta.influence")  # the package hands out the function under this name
    taken = []
    monkeypatch.setattr(module, "_closed_form", lambda *a: taken.append("closed-form"))
    monkeypatch.setattr(module, "_forward_mode", lambda *a: taken.append("jvp"))
    for model in (linear_head(), conv_net()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        influence(model, optimizer, SoftmaxLoss(), *batches())
    assert taken == ["closed-form", "jvp"]


class CosineHead(nn.Linear):
    """A linear head by inheritance only."""

    def forward(self, x):
        return 4 * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


def test_a_subclass_with_another_forward_is_no_linear_head():
    torch.manual_seed(0)
    model = CosineHead(D, C, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    check(("auto", "jvp", "higher"), model, optimizer, SoftmaxLoss(), *batches())
    with pytest.raises(ValueError, match="CosineHead"):
        influence(model, optimizer, SoftmaxLoss(), *batches(), method="closed-form")


@pytest.mark.parametrize("method", ["jvp", "higher"])
def test_frozen_layers_take_no_part(method):
    """A frozen layer before the head: the influence of the head alone on its outputs, and no gradient for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C)).double()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.3, momentum=0.9, weight_decay=5e-3)
    take_steps(model, optimizer)
    (x, y), (meta, meta_y) = batches()
    got = influence(model, optimizer, SoftmaxLoss(), (x, y), (meta, meta_y), method=method)
    front = model[:2].requires_grad_(False)
    want = influence(model[2], optimizer, SoftmaxLoss(), (front(x), y), (front(meta), meta_y), method="closed-form")
    torch.testing.assert_close(got.influence_B, want.influence_B, rtol=1e-9, atol=1e-12)
    assert set(got.grads) == {"2.weight", "2.bias"}


@pytest.mark.parametrize("method", ["auto", "jvp", "higher"])
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "left-out"])
def test_a_frozen_bias_stays_where_it_is(listed, method):
    """Whether or not the optimizer lists it: torch's step passes over a parameter without a gradient."""
    model = linear_head()
    model.bias.requires_grad_(False)
    kept = list(model.parameters()) if listed else [model.weight]
    optimizer = torch.optim.SGD(kept, lr=0.3, momentum=0.9)
    problem = model, optimizer, SoftmaxLoss(), *batches()

    def meta_loss_after_a_step(weights_B):
        twin = linear_head()
        twin.bias.requires_grad_(False)
        sgd = torch.optim.SGD([twin.weight], lr=0.3, momentum=0.9)
        (weights_B * F.cross_entropy(twin(problem[3][0]), problem[3][1], reduction="none")).mean().backward()
        sgd.step()
        return F.cross_entropy(twin(problem[4][0]), problem[4][1]).item()

    got_B = influence(*problem, method=method).influence_B
    for i in range(B):
        nudge = 1e-4 * F.one_hot(torch.tensor(i), B).double()
        slope = (meta_loss_after_a_step(1 + nudge) - meta_loss_after_a_step(1 - nudge)) / 2e-4
        assert got_B[i].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_works_inside_no_grad():
    model = linear_head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for method in METHODS:
        want = influence(model, optimizer, SoftmaxLoss(), *batches(), method=method)
        with torch.no_grad():
            got = influence(model, optimizer, SoftmaxLoss(), *batches(), method=method)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{"momentum": 0.9, "dampening": 0.1}, {"maximize": True}], ids=["damp", "max"])
def test_another_step_than_the_formulas_is_refused(settings, method):
    model = linear_head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, **settings)
    with pytest.raises(ValueError, match="dampening"):
        influence(model, optimizer, SoftmaxLoss(), *batches(), method=method)


@pytest.mark.parametrize("method", METHODS)
def test_another_optimizer_and_one_that_lacks_a_parameter_are_refused(method):
    model = linear_head()
    for optimizer in (torch.optim.Adam(model.parameters()), torch.optim.AdamW(model.parameters())):
        with pytest.raises(ValueError, match=rf"torch.optim.SGD ahead, not of {type(optimizer).__name__}$"):
            influence(model, optimizer, SoftmaxLoss(), *batches(), method=method)
    with pytest.raises(ValueError, match="does not hold 'bias': add it there, or freeze it"):
        influence(model, torch.optim.SGD([model.weight], lr=0.3), SoftmaxLoss(), *batches(), method=method)


@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
def test_the_closed_form_is_computed_in_the_type_of_the_head_whatever_autocast_is_on(features):
    """Its gradients go into the parameters' ``grad``, which takes no other type."""
    model = linear_head().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    (x, y), (meta, meta_y) = batches()
    x, meta = x.to(features), meta.to(features)
    want = influence(model, optimizer, SoftmaxLoss(), (x.float(), y), (meta.float(), meta_y))
    with torch.autocast("cpu", torch.bfloat16):
        got = influence(model, optimizer, SoftmaxLoss(), (x, y), (meta, meta_y))
    torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        parameter.grad = got.grads[name]


@pytest.mark.parametrize("method", METHODS)
def test_a_weighted_meta_loss_is_in_the_type_of_the_network(method):
    model = linear_head().float()
    (x, y), (meta, meta_y) = batches()
    problem = model, torch.optim.SGD(model.parameters(), lr=0.3), SoftmaxLoss(), (x.float(), y), (meta.float(), meta_y)
    assert influence(*problem, meta_loss=ClassBalancedLoss([50, 20, 8, 1]), method=method).meta_loss.dtype == torch.float32


def test_closed_form_on_another_model_is_refused():
    model = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, C)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with pytest.raises(ValueError, match=r"Sequential.*jvp"):
        influence(model, optimizer, SoftmaxLoss(), *batches(), method="closed-form")


def test_an_unknown_method_is_refused_with_the_names_of_the_known():
    model = linear_head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with pytest.raises(ValueError, match="closed-form, jvp, higher"):
        influence(model, optimizer, SoftmaxLoss(), *batches(), method="newton")


def test_a_loss_that_changes_its_terms_never_borrows_its_parents_gradient():
    class Squared(BalancedSoftmaxLoss):
        def per_example(self, logits_BC, targets_B):
            return super().per_example(logits_BC, targets_B).square()

    torch.manual_seed(3)
    head = torch.nn.Linear(4, 3).double()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.2, momentum=0.9, nesterov=True)
    batch = torch.randn(7, 4).double(), torch.arange(7) % 3
    meta_batch = torch.randn(5, 4).double(), torch.arange(5) % 3
    loss = Squared([9, 3, 1])
    closed, forward = (influence(head, optimizer, loss, batch, meta_batch, method=m) for m in ("closed-form", "jvp"))
    torch.testing.assert_close(closed.influence_B, forward.influence_B, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("sizes", [(7, 9, 40, 30), (30, 20, 4, 3), (7, 9, 5, 300), (512, 512, 100, 64)])
def test_of_two_ways_to_the_influence_the_cheaper_is_taken(sizes):
    """Multiplications of the three products: by way of a matrix like the layer, or of one between the two batches."""
    b, m, c, d = sizes
    along = importlib.import_module("balms_cli.meta.influence")._along
    with FlopCounterMode(display=False) as counter:
        along(torch.zeros(b, d), torch.zeros(m, c), torch.zeros(m, d), {"weight": 1.0, "bias": 1.0})
    by_layer, by_batches = c * m * d + b * d * c, b * d * m + b * m * c
    assert counter.get_total_flops() == 2 * min(by_layer, by_batches)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(7, 9, 40, 30), (30, 20, 4, 3), (7, 9, 5, 300), (1, 1, 50, 50)])
def test_the_closed_form_is_the_same_for_large_layers_and_small(sizes, bias):
    """Rates that differ between weight and bias, momentum, a loss with its own denominator: as forward mode has it."""
    torch.manual_seed(2)
    b, m, c, d = sizes
    head = nn.Linear(d, c, bias=bias).double()
    groups = [{"params": [p], "lr": rate} for p, rate in zip(head.parameters(), (0.3, 0.05), strict=False)]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=5e-3)
    counts = torch.arange(c, 0, -1)
    batch, meta_batch = ((torch.randn(n, d).double(), torch.randint(0, c, (n,))) for n in (b, m))
    F.cross_entropy(head(meta_batch[0]), meta_batch[1]).backward()
    optimizer.step()
    closed, forward = (influence(head, optimizer, BalancedSoftmaxLoss(counts), batch, meta_batch, method=method)
                       for method in ("closed-form", "jvp"))  # fmt: skip
    torch.testing.assert_close(closed.influence_B, forward.influence_B, rtol=1e-9, atol=1e-15)
