"""Meta Reweigher against finite differences of the weights, written out in plain Python floats."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from balms_cli import MetaReweigher, SoftmaxLoss, influence

THETA = [0.7, -1.1, 0.2, 2.0]
TARGETS = torch.tensor([0, 0, 0, 1, 1, 3, 0])  # class 2 is absent
INFLUENCE = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.4, 1.1, -0.9], dtype=torch.float64)


def reweigher(norm, theta=THETA):
    model = MetaReweigher(len(theta), norm=norm).double()
    with torch.no_grad():
        model.theta.copy_(torch.tensor(theta, dtype=torch.float64))
    return model


def weights_by_hand(theta, targets, norm):
    rates = [1 / (1 + math.exp(-t)) for t in theta]
    drawn = [rates[y] for y in targets.tolist()]
    return [len(drawn) * r / sum(drawn) for r in drawn] if norm == "mean" else drawn


def slopes(function, theta, step=1e-5):
    """Central differences of a function of a list of floats."""
    out = []
    for c in range(len(theta)):
        up, down = list(theta), list(theta)
        up[c] += step
        down[c] -= step
        out.append((function(up) - function(down)) / (2 * step))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("norm", ["mean", "none"])
def test_weights_by_hand(norm):
    got_B = reweigher(norm).weights(TARGETS)
    want_B = torch.tensor(weights_by_hand(THETA, TARGETS, norm), dtype=torch.float64)
    torch.testing.assert_close(got_B, want_B, rtol=1e-12, atol=0)
    assert (got_B.mean().item() == pytest.approx(1.0, abs=1e-12)) == (norm == "mean")


@pytest.mark.parametrize("norm", ["mean", "none"])
def test_gradient_equals_finite_differences_of_the_weights(norm):
    def objective(theta):
        weights = weights_by_hand(theta, TARGETS, norm)
        return sum(h * s for h, s in zip(INFLUENCE.tolist(), weights, strict=True))

    got_C = reweigher(norm).gradient(TARGETS, INFLUENCE)
    torch.testing.assert_close(got_C, slopes(objective, THETA), rtol=1e-7, atol=1e-9)
    assert got_C[2] == 0  # a class that the batch does not show is told nothing


def test_a_constant_influence_moves_normalised_weights_nowhere():
    """The weights sum to B whatever theta is, so a shift of every h by a constant changes nothing."""
    constant = torch.full_like(INFLUENCE, 3.0)
    normalised = reweigher("mean")
    torch.testing.assert_close(normalised.gradient(TARGETS, constant), torch.zeros(4).double(), rtol=0, atol=1e-13)
    shifted, plain = normalised.gradient(TARGETS, INFLUENCE + constant), normalised.gradient(TARGETS, INFLUENCE)
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-13)
    assert reweigher("none").gradient(TARGETS, constant)[0] > 0.1  # without the norm it does move


@pytest.mark.parametrize("norm", ["mean", "none"])
def test_gradient_through_a_real_sgd_step(norm):
    """theta -> weights -> one step of torch.optim.SGD -> meta loss, as a black box, against influence and gradient."""
    torch.manual_seed(0)
    head = torch.nn.Linear(3, 4).double()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9, nesterov=True, weight_decay=5e-3)
    x_BD, meta_MD = torch.randn(7, 3).double(), torch.randn(9, 3).double()
    meta_targets_M = torch.arange(9) % 4
    F.cross_entropy(head(torch.randn(6, 3).double()), torch.arange(6) % 4).backward()
    optimizer.step()

    def meta_loss_after_a_step(theta):
        model, sgd = copy.deepcopy((head, optimizer))
        sgd.zero_grad()
        losses_B = F.cross_entropy(model(x_BD), TARGETS, reduction="none")
        weights_B = torch.tensor(weights_by_hand(theta, TARGETS, norm), dtype=torch.float64)
        ((weights_B * losses_B).sum() / 7).backward()
        sgd.step()
        return F.cross_entropy(model(meta_MD), meta_targets_M).item()

    learner = reweigher(norm)
    weights_B = learner.weights(TARGETS)
    found = influence(head, optimizer, SoftmaxLoss(), (x_BD, TARGETS), (meta_MD, meta_targets_M), weights_B=weights_B)
    got_C = learner.gradient(TARGETS, found.influence_B)
    torch.testing.assert_close(got_C, slopes(meta_loss_after_a_step, THETA, 1e-4), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", ["mean", "none"])
def test_starts_at_one_half_and_moves_against_the_gradient(norm):
    """Examples of class 0 hurt the meta loss (h > 0), those of class 1 help (h < 0): their weights part."""
    learner = MetaReweigher(2, norm=norm)
    assert learner.rates.tolist() == [0.5, 0.5]
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.05)
    targets_B, influence_B = torch.tensor([0, 0, 0, 1]), torch.tensor([0.2, 0.1, 0.3, -0.5])
    for _ in range(20):
        learner.theta.grad = learner.gradient(targets_B, influence_B)
        optimizer.step()
    assert learner.rates[0] < 0.4 and learner.rates[1] > 0.6
    weights_B = learner.weights(targets_B)
    assert weights_B[3] > weights_B[0] and not weights_B.requires_grad


def test_long_tailed_toy_gives_the_tail_more_weight():
    """Two overlapping Gaussian classes, 300 to 6 images, a balanced meta batch, plain softmax."""
    generator = torch.Generator().manual_seed(0)
    targets_N = torch.tensor([0] * 300 + [1] * 6)
    x_ND = torch.randn(306, 2, generator=generator) + 1.5 * targets_N[:, None]
    head = torch.nn.Linear(2, 2)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.2, momentum=0.9)
    learner = MetaReweigher(2)
    adam = torch.optim.Adam(learner.parameters(), lr=0.05)
    for _ in range(100):
        drawn_B = torch.randint(306, (64,), generator=generator)
        meta_M = torch.cat([torch.randint(300, (32,), generator=generator), 300 + torch.arange(32) % 6])
        batch, meta = (x_ND[drawn_B], targets_N[drawn_B]), (x_ND[meta_M], targets_N[meta_M])
        found = influence(head, optimizer, SoftmaxLoss(), batch, meta, weights_B=learner.weights(batch[1]))
        learner.theta.grad = learner.gradient(batch[1], found.influence_B)
        adam.step()
        for name, parameter in head.named_parameters():
            parameter.grad = found.grads[name]
        optimizer.step()
    assert learner.rates[1] > 0.7 and learner.rates[0] < 0.3


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="mean or none"):
        MetaReweigher(3, norm="sum")
