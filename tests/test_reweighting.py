"""L2RW and Meta-Weight-Net against what they stand for: a copy of the network is stepped by torch.optim.SGD, the meta loss
read there, and weights or parameters nudged; and against the authors' double backward pass, written plainly.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from balms_cli import SoftmaxLoss, influence
from balms_cli.losses import CostSensitiveLoss
from balms_cli.meta.l2rw import l2rw_weights
from balms_cli.meta.weight_net import MetaWeightNet
from balms_cli.models.classifiers import Classifier, linear_head
from balms_cli.models.resnet_cifar import ResNetCifar

B, M, C = 7, 9, 4
IMAGE = (2, 5, 5)
COUNTS = [9, 5, 2, 1]
PLAIN = {"momentum": 0.0}
NESTEROV = {"momentum": 0.9, "weight_decay": 5e-2, "nesterov": True}
SETTINGS = [PLAIN, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 5e-2}, NESTEROV]
LOSSES = {"softmax": SoftmaxLoss, "cost-sensitive": lambda: CostSensitiveLoss(COUNTS)}
by_settings = pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "momentum", "decay", "nesterov"])
by_loss = pytest.mark.parametrize("loss", LOSSES)


def batches(shape=IMAGE, seed=1, dtype=torch.float64, sizes=(B, M)):
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(n, *shape, dtype=dtype, generator=generator), torch.arange(n) % C) for n in sizes)


def conv_net():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(12, C)).double().train()


def prepared(settings, steps_before=3, model=None):
    """A network, and SGD whose momentum buffers are in use."""
    model = model or conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, **settings)
    for seed in range(steps_before):
        (x, y), _ = batches(seed=100 + seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def weight_net():
    """Five units: one off for every loss, one on for every loss, three with their kink among the losses of a batch."""
    net = MetaWeightNet(5).double()
    with torch.no_grad():
        net.inner.weight.copy_(torch.tensor([[-1.0], [0.8], [1.5], [-2.0], [1.0]]))
        net.inner.bias.copy_(torch.tensor([-1.0, 0.2, -1.5, 3.0, -1.3]))
        net.outer.weight.copy_(torch.tensor([[0.7, -0.9, 1.2, 0.8, -1.1]]))
        net.outer.bias.fill_(0.3)
    return net


def inner_loss(loss, logits_BC, targets_B, weights_B):
    """The weighted inner loss with nothing of the package in it."""
    losses_B = F.cross_entropy(logits_BC, targets_B, reduction="none")
    if loss == "softmax":
        return (weights_B * losses_B).mean()
    class_weights_B = 1 / torch.tensor(COUNTS, dtype=torch.float64)[targets_B]
    return (weights_B * class_weights_B * losses_B).sum() / class_weights_B.sum()


def meta_loss_after_a_step(problem, loss, weights_B):
    """Weights to meta loss, through a real step of SGD on copies. With it the gradients that the step used."""
    model, optimizer, (x, y), (meta_x, meta_y) = problem
    model, optimizer = copy.deepcopy((model, optimizer))
    optimizer.zero_grad()
    inner_loss(loss, model(x), y, weights_B).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(meta_x), meta_y).item(), grads


def slopes(function, at, step=1e-4):
    """Central differences of a function of one vector."""
    nudges = step * torch.eye(len(at), dtype=torch.float64)
    return torch.tensor([(function(at + n) - function(at - n)) / (2 * step) for n in nudges], dtype=torch.float64)


def close(got, want, rtol):
    """Relative to the largest entry of what is wanted, which must not be nothing."""
    scale = want.abs().max().item()
    assert scale > 1e-5
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * scale)


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), {n: p.grad for n, p in model.named_parameters()}))


@by_loss
@pytest.mark.parametrize("where", ["zero", "weight-net"])
@pytest.mark.parametrize("steps_before", [0, 3])
@by_settings
def test_influence_equals_differences_of_the_real_step(settings, steps_before, where, loss):
    problem = *prepared(settings, steps_before), *batches()
    model, optimizer, batch, meta_batch = problem
    module, net = LOSSES[loss](), weight_net()
    with torch.no_grad():
        true_losses_B = module.per_example(copy.deepcopy(model)(batch[0]), batch[1])
    if where == "zero":
        weights, start_B = 0.0, torch.zeros(B, dtype=torch.float64)
    else:
        weights, start_B = net.weights, net.weights(true_losses_B)
    true_meta, true_grads = meta_loss_after_a_step(problem, loss, start_B)
    true_B = slopes(lambda at: meta_loss_after_a_step(problem, loss, at)[0], start_B)
    before = snapshot(model, optimizer)

    found = [influence(model, optimizer, module, batch, meta_batch, weights_B=weights, method=m) for m in ("jvp", "higher")]

    torch.testing.assert_close(snapshot(model, optimizer), before, rtol=0, atol=0)  # running statistics among them
    close(found[0].influence_B, found[1].influence_B, rtol=1e-12)
    for result in found:
        close(result.influence_B, true_B, rtol=1e-6)
        torch.testing.assert_close(result.losses_B, true_losses_B, rtol=1e-12, atol=1e-14)
        assert result.meta_loss.item() == pytest.approx(true_meta, rel=1e-12)
        assert result.grads.keys() == true_grads.keys()
        for name, gradient in true_grads.items():
            torch.testing.assert_close(result.grads[name], gradient, rtol=1e-10, atol=1e-13)
        for tensor in (result.influence_B, result.losses_B, result.meta_loss, *result.grads.values()):
            assert not tensor.requires_grad


@by_loss
@by_settings
def test_the_closed_form_agrees_at_zero_and_at_the_weights_of_a_net(settings, loss):
    torch.manual_seed(0)
    model, optimizer = prepared(settings, model=nn.Sequential(nn.Flatten(), nn.Linear(50, C)).double())
    (x, y), (meta_x, meta_y) = batches()
    head, module = model[1], LOSSES[loss]()
    for weights in (0.0, weight_net().weights):
        problem = head, optimizer, module, (x.flatten(1), y), (meta_x.flatten(1), meta_y)
        want = influence(*problem, weights_B=weights, method="higher")
        for method in ("closed-form", "jvp"):
            got = influence(*problem, weights_B=weights, method=method)
            for name in ("influence_B", "losses_B", "grads", "meta_loss"):
                torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["closed-form", "jvp", "higher"])
def test_weights_come_as_a_tensor_a_function_of_the_losses_or_a_number(method):
    torch.manual_seed(0)
    head = nn.Linear(3, C).double()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.3, momentum=0.9)
    problem = head, optimizer, SoftmaxLoss(), *batches((3,))
    losses_B = F.cross_entropy(head(problem[3][0]), problem[3][1], reduction="none").detach()
    asked = []

    def by_loss_(seen_B):
        assert not seen_B.requires_grad
        asked.append(seen_B)
        return seen_B.float() ** 2  # a type of its own

    def same(a, b):
        torch.testing.assert_close(tuple(a), tuple(b), rtol=1e-13, atol=1e-15)

    by_function = influence(*problem, weights_B=by_loss_, method=method)
    assert len(asked) == 1
    torch.testing.assert_close(asked[0], losses_B, rtol=1e-12, atol=0)
    by_tensor = influence(*problem, weights_B=asked[0].float() ** 2, method=method)
    same(by_function, by_tensor)
    for dtype in (torch.float32, torch.float64):
        copied = copy.deepcopy(head).to(dtype)
        sgd = torch.optim.SGD(copied.parameters(), lr=0.3)
        (x, y), (meta_x, meta_y) = batches((3,), dtype=dtype)
        found = influence(copied, sgd, SoftmaxLoss(), (x, y), (meta_x, meta_y), weights_B=losses_B, method=method)
        assert found.influence_B.dtype == found.grads["weight"].dtype == dtype  # that of the network, not of the weights
    learnt = (asked[0] ** 2).float().requires_grad_()  # no graph of the weights comes through
    assert not influence(*problem, weights_B=learnt, method=method).grads["weight"].requires_grad
    for number in (0.0, 0, 0.7):
        by_number = influence(*problem, weights_B=number, method=method)
        same(by_number, influence(*problem, weights_B=torch.full((B,), number, dtype=torch.float64), method=method))
    same(influence(*problem, weights_B=1.0, method=method), influence(*problem, method=method))


def test_the_number_zero_saves_the_first_pass():
    model, optimizer = prepared(NESTEROV)
    passes, problem = [], (model, optimizer, SoftmaxLoss(), *batches())
    model[0].register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    zero = influence(*problem, weights_B=0.0, method="jvp")
    assert passes == [True, False]  # the meta batch, then forward mode, which keeps no graph
    zeros = influence(*problem, weights_B=torch.zeros(B).double(), method="jvp")
    assert passes[2:] == [True, True, False]
    torch.testing.assert_close(tuple(zero), tuple(zeros), rtol=1e-13, atol=1e-15)
    assert all(not g.any() for g in zero.grads.values())


def l2rw_as_published(model, lr, batch, meta_batch):
    """Algorithm 1: a step on the eps-weighted sum of losses at eps = 0, differentiated through; SGD without momentum."""
    params = dict(model.named_parameters())
    (x, y), (meta_x, meta_y) = batch, meta_batch

    def logits(at, inputs):
        return functional_call(model, {**at, **{n: b.clone() for n, b in model.named_buffers()}}, (inputs,))

    eps_B = torch.zeros(len(y), dtype=torch.float64, requires_grad=True)
    weighted = (eps_B * F.cross_entropy(logits(params, x), y, reduction="none")).sum()
    grads = torch.autograd.grad(weighted, params.values(), create_graph=True)
    ahead = {name: p - lr * g for (name, p), g in zip(params.items(), grads, strict=True)}
    (slope_B,) = torch.autograd.grad(F.cross_entropy(logits(ahead, meta_x), meta_y), eps_B)
    helpful_B = torch.maximum(-slope_B, torch.zeros_like(slope_B))
    return helpful_B / (helpful_B.sum() + (helpful_B.sum() == 0))


@pytest.mark.parametrize("method", ["jvp", "higher"])
def test_l2rw_equals_the_authors_double_backward_pass(method):
    model, optimizer = prepared(PLAIN)
    batch, meta_batch = batches()
    published_B = l2rw_as_published(model, 0.2, batch, meta_batch)
    assert 0 < (published_B == 0).sum() < B - 1
    got_B = l2rw_weights(
        influence(model, optimizer, SoftmaxLoss(), batch, meta_batch, weights_B=0.0, method=method).influence_B
    )
    torch.testing.assert_close(got_B, B * published_B, rtol=1e-10, atol=1e-13)


def test_l2rw_weights_by_hand():
    got_B = l2rw_weights(torch.tensor([0.5, -1.0, 0.0, -3.0, 2.0]))
    assert got_B.tolist() == [0.0, 1.25, 0.0, 3.75, 0.0] and got_B.mean() == 1
    learnt = torch.tensor([-1.0, 1.0], requires_grad=True)
    assert not l2rw_weights(learnt).requires_grad


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_l2rw_weights_do_not_depend_on_the_scale_of_the_influence(scale):
    """Learning rates of a late step make it small: no epsilon may take part."""
    influence_B = torch.tensor([0.5, -1.0, 0.25, -3.0])
    torch.testing.assert_close(l2rw_weights(scale * influence_B), l2rw_weights(influence_B), rtol=1e-6, atol=0)


def test_l2rw_where_no_example_helps_is_a_plain_step():
    for influence_B in (torch.zeros(3), torch.tensor([0.1, 2.0, 0.0])):
        assert l2rw_weights(influence_B).tolist() == [1.0, 1.0, 1.0]
    assert l2rw_weights(torch.tensor([-1.0, math.nan, 1.0])).isnan().all()  # a diverged run is not hidden


def test_l2rw_finds_the_wrong_labels():
    """Two far Gaussian classes, one label in four flipped, a clean meta batch."""
    generator = torch.Generator().manual_seed(0)
    true_B, flipped_B = torch.arange(80) % 2, torch.arange(80) % 8 >= 6
    x_BD = torch.randn(80, 2, generator=generator) + 3 * (2 * true_B[:, None] - 1)
    head = nn.Linear(2, 2)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    batch, meta_batch = (x_BD[:40], torch.where(flipped_B, 1 - true_B, true_B)[:40]), (x_BD[40:], true_B[40:])
    weights_B = l2rw_weights(influence(head, optimizer, SoftmaxLoss(), batch, meta_batch, weights_B=0.0).influence_B)
    assert not weights_B[flipped_B[:40]].any() and (weights_B[~flipped_B[:40]] > 0).all()


def value_by_hand(net, loss):
    """V in plain floats."""
    p = {name: t.detach().flatten().tolist() for name, t in net.named_parameters()}
    hidden = [max(0.0, w * loss + b) for w, b in zip(p["inner.weight"], p["inner.bias"], strict=True)]
    z = sum(w * a for w, a in zip(p["outer.weight"], hidden, strict=True)) + p["outer.bias"][0]
    return 1 / (1 + math.exp(-z))


def weights_by_hand(net, losses_B):
    values = [value_by_hand(net, loss) for loss in losses_B.tolist()]
    return torch.tensor([len(values) * v / sum(values) for v in values], dtype=torch.float64)


LOSSES_B = torch.tensor([0.01, 0.7, 2.3, 0.2, 5.0, 1.1, 0.05], dtype=torch.float64)


def test_weight_net_by_hand():
    net = weight_net()
    values_B = net(LOSSES_B)
    want = [value_by_hand(net, loss) for loss in LOSSES_B.tolist()]
    torch.testing.assert_close(values_B.detach(), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)
    assert values_B.max() - values_B.min() > 0.1 and values_B.shape == (B,)
    weights_B = net.weights(LOSSES_B)
    torch.testing.assert_close(weights_B, weights_by_hand(net, LOSSES_B), rtol=1e-12, atol=0)
    assert weights_B.mean().item() == pytest.approx(1) and not weights_B.requires_grad
    shapes = {name: tuple(p.shape) for name, p in MetaWeightNet().named_parameters()}
    assert shapes == {"inner.weight": (100, 1), "inner.bias": (100,), "outer.weight": (1, 100), "outer.bias": (1,)}


def test_weight_net_whose_values_all_vanish_still_weighs():
    """V under 1e-200 is zero in float32: 0/0 for the quotient as written."""
    net = weight_net()
    with torch.no_grad():
        net.outer.bias.fill_(-500.0)
    want_B = weights_by_hand(net, LOSSES_B)
    single = copy.deepcopy(net).float()
    assert not single(LOSSES_B.float()).any()
    torch.testing.assert_close(single.weights(LOSSES_B.float()).double(), want_B, rtol=1e-3, atol=0)
    gradient = single.gradient(LOSSES_B.float(), torch.linspace(-1, 1, B))
    exact = net.gradient(LOSSES_B, torch.linspace(-1, 1, B).double())
    for name, slope in exact.items():
        torch.testing.assert_close(gradient[name].double(), slope, rtol=1e-2, atol=1e-6)


@by_loss
@pytest.mark.parametrize("settings", [PLAIN, NESTEROV], ids=["plain", "nesterov"])
def test_weight_net_gradient_equals_differences_of_the_whole_chain(settings, loss):
    """phi to values, to weights, to a step of torch.optim.SGD, to the meta loss."""
    problem = *prepared(settings), *batches()
    model, optimizer, batch, meta_batch = problem
    module, net = LOSSES[loss](), weight_net()
    with torch.no_grad():
        losses_B = module.per_example(copy.deepcopy(model)(batch[0]), batch[1])

    def chain(phi):
        twin = copy.deepcopy(net)
        nn.utils.vector_to_parameters(phi, twin.parameters())
        return meta_loss_after_a_step(problem, loss, weights_by_hand(twin, losses_B))[0]

    phi = nn.utils.parameters_to_vector(net.parameters()).detach()
    want = slopes(chain, phi, step=1e-4)
    found = influence(model, optimizer, module, batch, meta_batch, weights_B=net.weights)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)  # replaced, not added to
    with torch.no_grad():  # as a training step may call it
        gradient = net.gradient(found.losses_B, found.influence_B)
    got = torch.cat([gradient[name].flatten() for name, _ in net.named_parameters()])
    close(got, want, rtol=1e-5)
    torch.testing.assert_close(got, torch.cat([p.grad.flatten() for p in net.parameters()]), rtol=0, atol=0)
    assert (want == 0).sum() == 3  # in and out of the unit that is off


def test_weight_net_gradient_is_the_chain_rule_of_its_docstring():
    net, influence_B = weight_net(), torch.tensor([0.3, -1.2, 0.8, 2.0, -0.4, 1.1, -0.9]).double()
    values_B = net(LOSSES_B)
    weights_B = B * values_B.detach() / values_B.sum().item()
    dvalues_B = (B / values_B.sum().item()) * (influence_B - (influence_B * weights_B).sum() / B)
    want = torch.autograd.grad(values_B, list(net.parameters()), dvalues_B)
    got = net.gradient(LOSSES_B, influence_B)
    for slope, (name, _) in zip(want, net.named_parameters(), strict=True):
        torch.testing.assert_close(got[name], slope, rtol=1e-10, atol=1e-13)
    shifted = net.gradient(LOSSES_B, torch.full((B,), 3.0).double())  # the weights sum to B whatever phi is
    assert all(slope.abs().max() < 1e-13 for slope in shifted.values())


def test_weight_net_learns_to_trust_small_losses():
    """Labels flipped for one example in four: V, moved against its gradient, ends lower for large losses."""
    generator = torch.Generator().manual_seed(0)
    true_N, flipped_N = torch.arange(400) % 2, torch.arange(400) % 8 >= 6
    x_ND = torch.randn(400, 2, generator=generator) + 3 * true_N[:, None]
    targets_N = torch.where(flipped_N, 1 - true_N, true_N)
    torch.manual_seed(0)
    head, net = nn.Linear(2, 2), MetaWeightNet()
    optimizer, adam = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9), torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(150):
        drawn_B = torch.randint(400, (64,), generator=generator)
        meta_M = torch.randint(400, (64,), generator=generator)
        batch = x_ND[drawn_B], targets_N[drawn_B]
        found = influence(head, optimizer, SoftmaxLoss(), batch, (x_ND[meta_M], true_N[meta_M]), weights_B=net.weights)
        net.gradient(found.losses_B, found.influence_B)
        adam.step()
        for name, parameter in head.named_parameters():
            parameter.grad = found.grads[name]
        optimizer.step()
    small, large = net(torch.tensor([0.1, 3.0])).tolist()
    assert large < 0.7 * small


# Mixed precision: the forward-mode pass of a network under autocast.


def cifar_net():
    torch.manual_seed(0)
    return Classifier(ResNetCifar(8), linear_head(64, C, torch.Generator().manual_seed(0))).train()


class OtherNorms(nn.Module):
    """Instance, group and layer norm, and attention, each between layers that compute in bf16."""

    def __init__(self):
        super().__init__()
        self.conv, self.instance = nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True)
        self.conv2, self.group = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.conv3, self.layer = nn.Conv2d(8, 8, 4, stride=4), nn.LayerNorm(8)
        self.conv4 = nn.Conv2d(8, 8, 1)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, C)

    def forward(self, x):
        x = self.conv3(self.group(self.conv2(self.instance(self.conv(x)).tanh())).tanh())
        x = self.conv4(self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        tokens = x.flatten(2).transpose(1, 2)
        return self.head((tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]).mean(1))


def other_norms():
    torch.manual_seed(0)
    return OtherNorms()


@pytest.mark.parametrize("weights", [None, 0.0, "net"])
@pytest.mark.parametrize("build", [cifar_net, other_norms])
def test_under_autocast_the_influence_is_that_of_float32_to_bf16_error(build, weights):
    model = build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **NESTEROV, fused=True)
    batch, meta_batch = ((x.contiguous(memory_format=torch.channels_last), y)
                         for x, y in batches((3, 16, 16), dtype=torch.float32, sizes=(32, 32)))  # fmt: skip
    net = weight_net().float()
    problem = model, optimizer, SoftmaxLoss(), batch, meta_batch
    weights_B = net.weights if weights == "net" else weights
    exact = influence(*problem, weights_B=weights_B, method="jvp")
    before = snapshot(model, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        rough = influence(*problem, weights_B=weights_B, method="jvp")
    torch.testing.assert_close(snapshot(model, optimizer), before, rtol=0, atol=0)
    for tensor in (rough.influence_B, rough.losses_B, rough.meta_loss, *rough.grads.values()):
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()
    for name in ("influence_B", "losses_B"):
        error = (getattr(rough, name) - getattr(exact, name)).norm() / getattr(exact, name).norm()
        assert 0 < error < 0.05, name  # bf16 keeps 8 bits


def test_under_autocast_the_losses_are_those_of_the_networks_own_forward_pass():
    """Whether they come of a first pass or of the forward-mode one."""
    model, batch = cifar_net(), batches((3, 16, 16), dtype=torch.float32, sizes=(32, 32))
    problem = model, torch.optim.SGD(model.parameters(), lr=0.1), SoftmaxLoss(), *batch
    with torch.autocast("cpu", torch.bfloat16):
        first_B, last_B = (influence(*problem, weights_B=s, method="jvp").losses_B for s in (None, 0.0))
        with torch.no_grad():
            own_B = F.cross_entropy(copy.deepcopy(model)(batch[0][0]), batch[0][1], reduction="none")
    torch.testing.assert_close(first_B, own_B, rtol=1e-6, atol=0)
    # Its kernel for bf16 maps rounds once in a while to the other side; maps left in float32 would be 7e-4 away.
    assert (last_B - own_B).norm() < 3e-4 * own_B.norm()


@pytest.mark.parametrize("method", ["jvp", "higher"])
def test_a_head_that_runs_in_float32_is_not_rounded_on_the_way_back(method):
    model, batch = Classifier(nn.Flatten(), linear_head(50, C)), batches(dtype=torch.float32)
    problem = model, torch.optim.SGD(model.parameters(), lr=0.1), SoftmaxLoss(), *batch
    want = influence(*problem, method=method)
    with torch.autocast("cpu", torch.bfloat16):
        got = influence(*problem, method=method)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-5, atol=1e-7)


def test_forward_mode_through_attention_equals_differences_of_the_real_step():
    """Its fast kernels have no forward mode."""
    problem = *prepared(NESTEROV, 0, other_norms().double()), *batches((3, 8, 8))
    want_B = slopes(lambda at: meta_loss_after_a_step(problem, "softmax", at)[0], torch.ones(B).double())
    got = influence(*problem[:2], SoftmaxLoss(), *problem[2:], method="jvp")
    assert got.influence_B.tolist() == pytest.approx(want_B.tolist(), rel=1e-6, abs=0)


def test_weight_net_is_not_rounded_by_autocast():
    net = weight_net().float()
    losses_B, influence_B = LOSSES_B.float(), torch.linspace(-1, 1, B)
    want_B, want = net.weights(losses_B), net.gradient(losses_B, influence_B)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net.weights(losses_B), want_B, rtol=0, atol=0)
        torch.testing.assert_close(net.gradient(losses_B, influence_B), want, rtol=0, atol=0)
