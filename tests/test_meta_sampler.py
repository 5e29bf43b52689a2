"""Meta Sampler: its law by chi-square, its gradients by finite differences of the soft form and by plain autograd."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats

from balms_cli import BalancedSoftmaxLoss, MetaSampler, SoftmaxLoss, influence
from balms_cli.meta import sampler as module

COUNTS = [30, 12, 5, 1]
THETA = [-1.2, 0.3, 0.9, 2.0]
ESTIMATORS = ("class", "image", "expected")
GUMBEL_ESTIMATORS = ("class", "image")


def meta_sampler(estimator, theta=THETA, counts=COUNTS, temperature=1.0):
    learner = MetaSampler(counts, estimator=estimator, temperature=temperature)
    with torch.no_grad():
        learner.theta.copy_(torch.tensor(theta))
    return learner


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sigmoid(t):
    return 1 / (1 + math.exp(-t))


def law_by_hand(theta=THETA, counts=COUNTS):
    mass = [n * sigmoid(t) for n, t in zip(counts, theta, strict=True)]
    return [m / sum(mass) for m in mass]


def slopes(function, theta=THETA, step=1e-5):
    """Central differences of a function of a list of floats."""
    out = []
    for c in range(len(theta)):
        up, down = list(theta), list(theta)
        up[c] += step
        down[c] -= step
        out.append((function(up) - function(down)) / (2 * step))
    return torch.tensor(out)


# The law


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_drawn_classes_and_images_follow_the_law(estimator, temperature):
    """P(class c) = n_c r_c / sum_j n_j r_j, every image of a class alike, whatever the temperature."""
    size = 30_000
    draw = meta_sampler(estimator, temperature=temperature).draw(size, seeded())
    assert draw.classes_B.shape == draw.positions_B.shape == (size,)
    law = law_by_hand()

    drawn_C = np.bincount(draw.classes_B.numpy(), minlength=4)
    assert stats.chisquare(drawn_C, np.array(law) * size).pvalue > 1e-3
    per_image = np.zeros((4, max(COUNTS)))
    np.add.at(per_image, (draw.classes_B.numpy(), draw.positions_B.numpy()), 1)
    drawn, expected = [], []
    for c, n in enumerate(COUNTS):
        assert per_image[c, n:].sum() == 0  # a position beyond the class's images
        drawn += list(per_image[c, :n])
        expected += [law[c] * size / n] * n
    assert stats.chisquare(drawn, expected).pvalue > 1e-3
    # The test would notice the two laws one might mix this up with.
    for wrong in (np.array(COUNTS) / sum(COUNTS), np.array([sigmoid(t) for t in THETA])):
        assert stats.chisquare(drawn_C, wrong / wrong.sum() * size).pvalue < 1e-12


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rates_are_instance_balanced_and_rates_of_one_over_n_class_balanced(estimator):
    size = 20_000
    start = MetaSampler(COUNTS, estimator=estimator)
    assert start.rates.tolist() == [0.5] * 4
    drawn_C = np.bincount(start.draw(size, seeded()).classes_B.numpy(), minlength=4)
    assert stats.chisquare(drawn_C, size * np.array(COUNTS) / 48).pvalue > 1e-3

    balanced = meta_sampler(estimator, [math.log(0.5 / n / (1 - 0.5 / n)) for n in COUNTS])  # r = 0.5 / n
    drawn_C = np.bincount(balanced.draw(size, seeded()).classes_B.numpy(), minlength=4)
    assert stats.chisquare(drawn_C).pvalue > 1e-3


def test_every_image_of_a_huge_class_can_be_drawn():
    """Of 2^26 images a place in float32, 24 bits, would reach every fourth alone."""
    positions_B = MetaSampler([2**26, 1]).draw(4_000, seeded()).positions_B
    assert stats.chisquare(np.bincount(positions_B.numpy() % 4, minlength=4)).pvalue > 1e-3
    assert positions_B.min() >= 0 and 2**25 < positions_B.max() < 2**26


def test_rates_and_law_by_hand():
    learner = meta_sampler("class")
    torch.testing.assert_close(learner.rates, torch.tensor([sigmoid(t) for t in THETA]))
    torch.testing.assert_close(learner.log_law.exp(), torch.tensor(law_by_hand()))
    assert not learner.rates.requires_grad and not learner.log_law.requires_grad


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_generator_alone_decides_the_draw(estimator):
    learner = meta_sampler(estimator)
    torch.manual_seed(1)
    first = learner.draw(200, seeded(5))
    torch.manual_seed(2)
    again, other = learner.draw(200, seeded(5)), learner.draw(200, seeded(6))
    for a, b in zip(first, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert not torch.equal(first.classes_B, other.classes_B)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_the_noise_of_the_relaxed_draw_is_gumbel_at_the_stated_temperature(temperature):
    """Of two classes tau * logit(soft) less the gap of the logits is a difference of two Gumbels: Logistic(0, 1)."""
    learner = meta_sampler("class", [0.4, -0.2], [7, 3], temperature)
    soft_BC = learner.draw(5_000, seeded()).soft_BC.double().clamp(1e-30)
    difference = math.log(7 * sigmoid(0.4)) - math.log(3 * sigmoid(-0.2))
    noise = temperature * (soft_BC[:, 0].log() - soft_BC[:, 1].log()) - difference
    assert stats.kstest(noise.numpy(), "logistic").pvalue > 1e-3


# The gradient of the Gumbel estimators


class NoiseBank:
    """Uniform numbers from one fixed list: the noise is known, and the same however the rows are cut."""

    def __init__(self):
        self.numbers, self.used = np.random.default_rng(1).random(10_000, dtype=np.float32), 0

    def take(self, *size):
        first, self.used = self.used, self.used + math.prod(size)
        return torch.from_numpy(self.numbers[first : self.used].reshape(size).copy())

    def gumbel(self, rows, columns):
        return -np.log(-np.log(self.numbers[: rows * columns].reshape(rows, columns).astype(np.float64)))


@pytest.fixture
def bank(monkeypatch):
    """The matrix of noise comes from the bank; positions, a vector, are drawn as ever."""
    bank, rand = NoiseBank(), torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **how: bank.take(*size) if len(size) == 2 else rand(*size, **how))
    return bank


def columns_of(estimator):
    """The entries that Gumbel noise is drawn for: the class of each, and the number of images that it stands for."""
    if estimator == "class":
        return np.arange(4), np.array(COUNTS)
    return np.repeat(np.arange(4), COUNTS), np.ones(sum(COUNTS))


def soft_draw(theta, gumbel, estimator, temperature):
    """softmax((log rho + g) / tau) in float64 numpy, by exp and division (the corrected eq 79)."""
    classes, images = columns_of(estimator)
    rates = 1 / (1 + np.exp(-np.array(theta)))
    powers = (images * rates[classes] * np.exp(gumbel)) ** (1 / temperature)
    return powers / powers.sum(1, keepdims=True)


SIZE = 24
INFLUENCE = torch.randn(SIZE, generator=seeded(9))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("estimator", GUMBEL_ESTIMATORS)
def test_gradient_equals_finite_differences_of_the_soft_form(bank, estimator, temperature):
    """With the noise held: d/dtheta of sum_i h_i * soft value of the entry that was drawn at the start (eq 81)."""
    learner = meta_sampler(estimator, temperature=temperature)
    draw = learner.draw(SIZE, seeded())
    classes, _ = columns_of(estimator)
    gumbel = bank.gumbel(SIZE, len(classes))
    soft = soft_draw(THETA, gumbel, estimator, temperature)
    drawn = soft.argmax(1)
    assert draw.classes_B.tolist() == classes[drawn].tolist() and len(set(draw.classes_B.tolist())) == 4
    if estimator == "image":
        starts = np.array([0, 30, 42, 47])
        assert (starts[classes[drawn]] + draw.positions_B.numpy()).tolist() == drawn.tolist()
    torch.testing.assert_close(draw.soft_B.double(), torch.from_numpy(soft.max(1)), rtol=1e-4, atol=1e-6)

    def objective(theta):
        return float(INFLUENCE.double().numpy() @ soft_draw(theta, gumbel, estimator, temperature)[range(SIZE), drawn])

    want_C = slopes(objective)
    assert want_C.abs().max() > 0.05
    torch.testing.assert_close(learner.gradient(draw, INFLUENCE), want_C, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 23])
def test_cutting_the_image_estimator_into_rows_changes_nothing(bank, monkeypatch, rows):
    learner = meta_sampler("image", temperature=0.7)
    whole = learner.draw(SIZE, seeded())
    assert bank.used == SIZE * 48
    bank.used = 0
    widths = []
    relaxed = module._relaxed_draw
    monkeypatch.setattr(module, "_CHUNK_ENTRIES", rows * 48 + 47)
    monkeypatch.setattr(module, "_relaxed_draw", lambda x, b, *rest: widths.append(b) or relaxed(x, b, *rest))
    cut = learner.draw(SIZE, seeded())
    assert max(widths) == rows and sum(widths) == SIZE
    assert torch.equal(cut.classes_B, whole.classes_B) and torch.equal(cut.positions_B, whole.positions_B)
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-7)


def test_rows_longer_than_the_limit_are_drawn_one_by_one(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ENTRIES", 10)
    learner, size = meta_sampler("image"), 3_000
    drawn_C = np.bincount(learner.draw(size, seeded()).classes_B.numpy(), minlength=4)
    assert stats.chisquare(drawn_C, np.array(law_by_hand()) * size).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("estimator", GUMBEL_ESTIMATORS)
def test_influence_and_gradient_equal_autograd_through_the_straight_through_draw(bank, estimator, temperature):
    """The paper's computation written plainly: theta, straight-through draw, weighted losses, SGD step, meta loss.

    In float64, by torch's autograd with create_graph, without anything of the package but the noise.
    """
    learner = meta_sampler(estimator, temperature=temperature).double()
    draw = learner.draw(SIZE, seeded())
    classes, images = columns_of(estimator)
    gumbel = torch.from_numpy(bank.gumbel(SIZE, len(classes)))
    torch.manual_seed(0)
    head = torch.nn.Linear(3, 4).double()
    means_CD = 2 * torch.randn(4, 3).double()
    x_BD, meta_MD = means_CD[draw.classes_B] + torch.randn(SIZE, 3), torch.randn(8, 3).double()
    meta_targets_M = torch.arange(8) % 4
    lr, decay, n = 0.5, 5e-3, torch.tensor(COUNTS).double()

    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    log_rho = (torch.from_numpy(images) + 0.0).log() + theta.sigmoid().log()[classes]
    soft = ((log_rho + gumbel) / temperature).softmax(1)
    drawn = soft.argmax(1)
    assert draw.classes_B.tolist() == classes[drawn.numpy()].tolist()
    hard = F.one_hot(drawn, len(classes)) - soft.detach() + soft
    weight_B = hard[range(SIZE), drawn]  # one, with the gradient of the soft draw
    logits_BC = x_BD @ head.weight.T + head.bias + n.log()
    loss = -(weight_B * logits_BC.log_softmax(1)[range(SIZE), draw.classes_B]).mean()
    grads = torch.autograd.grad(loss, (head.weight, head.bias), create_graph=True)
    weight, bias = (p - lr * (g + decay * p) for p, g in zip(head.parameters(), grads, strict=True))
    meta = -(meta_MD @ weight.T + bias).log_softmax(1)[range(8), meta_targets_M].mean()
    (want_C,) = torch.autograd.grad(meta, theta)
    assert want_C.abs().max() > 1e-4

    optimizer = torch.optim.SGD(head.parameters(), lr=lr, weight_decay=decay)
    batch, meta_batch = (x_BD, draw.classes_B), (meta_MD, meta_targets_M)
    found = influence(head, optimizer, BalancedSoftmaxLoss(COUNTS), batch, meta_batch)
    got_C = learner.gradient(draw, found.influence_B)
    torch.testing.assert_close(got_C, want_C, rtol=1e-4, atol=1e-6 * want_C.abs().max().item())


# The gradient through the law


def test_expected_gradient_equals_finite_differences_of_the_expected_influence():
    """B * sum_c P_c(theta) hbar_c with hbar_c, the mean influence of the batch's examples of class c, held."""
    learner = meta_sampler("expected")
    draw = learner.draw(200, seeded(1))
    assert draw.soft_B is None and draw.soft_BC is None
    influence_B = torch.randn(200, generator=seeded(2))
    sums, seen = [0.0] * 4, [0] * 4
    for y, h in zip(draw.classes_B.tolist(), influence_B.tolist(), strict=True):
        sums[y], seen[y] = sums[y] + h, seen[y] + 1
    assert min(seen) > 0
    means = [s / m for s, m in zip(sums, seen, strict=True)]
    want_C = slopes(lambda theta: 200 * sum(p * h for p, h in zip(law_by_hand(theta), means, strict=True)))
    torch.testing.assert_close(learner.gradient(draw, influence_B), want_C, rtol=1e-4, atol=1e-5)


def test_expected_gradient_leaves_out_the_classes_that_the_batch_does_not_show():
    """Then it is the same over the others alone: their law among themselves, weighed by their part of the whole."""
    learner = meta_sampler("expected")
    draw = learner.draw(60, seeded(1))._replace(classes_B=torch.tensor([0, 2] * 30))
    influence_B = torch.tensor([0.5, -0.25] * 30)
    law = law_by_hand()
    part = law[0] + law[2]

    def objective(theta):
        mass = [COUNTS[c] * sigmoid(theta[c]) for c in (0, 2)]
        return 60 * part * (0.5 * mass[0] - 0.25 * mass[1]) / sum(mass)

    got_C = learner.gradient(draw, influence_B)
    torch.testing.assert_close(got_C, slopes(objective), rtol=1e-4, atol=1e-5)
    assert got_C[1] == 0 and got_C[3] == 0


def test_a_constant_influence_moves_expected_nowhere_and_class_somewhere():
    """A constant loss tells nothing of the rates. Eq 81 keeps the drawn entry alone, so `class` is pushed all the same:

    for two classes by E[S_c (1[drawn = c] - S_c)] (1 - r_c), S_c the soft value: here an integral over logistic noise.
    """
    counts, theta, size = [9, 1], [0.3, -0.4], 40_000
    for estimator in ("expected", "class"):
        learner = meta_sampler(estimator, theta, counts)
        draw = learner.draw(size, seeded())
        gradient_C = learner.gradient(draw, torch.ones(size)) / size
        if estimator == "expected":
            assert gradient_C.abs().max() < 1e-6
            continue
        gap = math.log(9 * sigmoid(0.3)) - math.log(sigmoid(-0.4))

        def pushed(noise, sign, gap=gap):
            first = sigmoid(gap + noise)
            drawn = max(first, 1 - first)
            own = first if sign > 0 else 1 - first
            return drawn * ((own > 0.5) - own) * stats.logistic.pdf(noise)

        for c, sign in enumerate((1, -1)):
            mean, _ = integrate.quad(pushed, -40, 40, args=(sign,), points=[-gap], limit=200)
            mean *= 1 - sigmoid(theta[c])
            assert abs(mean) > 0.01
            assert gradient_C[c].item() == pytest.approx(mean, abs=5e-3)


# Use


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_moves_against_the_gradient_in_the_direction_of_a_helpful_class(estimator):
    """Examples of the tail help (h < 0), those of the head hurt: the tail's rate rises over the head's."""
    learner = MetaSampler([50, 5], estimator=estimator)
    optimizer, generator = torch.optim.Adam(learner.parameters(), lr=0.05), seeded()
    for _ in range(40):
        draw = learner.draw(128, generator)
        learner.theta.grad = learner.gradient(draw, torch.tensor([0.01, -0.01])[draw.classes_B])
        assert learner.theta.grad.shape == (2,) and not learner.theta.grad.requires_grad
        optimizer.step()
    assert learner.rates[1] > 0.6 > 0.4 > learner.rates[0]


def learned_rates(loss, counts, means_CD, seed):
    """BALMS on a linear head, 200 steps."""
    generator, counts_C = seeded(seed), torch.tensor(counts)
    x_ND = means_CD.repeat_interleave(counts_C, 0) + torch.randn(sum(counts), 2, generator=generator)
    starts_C = counts_C.cumsum(0) - counts_C
    head = torch.nn.Linear(2, len(counts))
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    learner = MetaSampler(counts)
    adam = torch.optim.Adam(learner.parameters(), lr=0.02, betas=(0.9, 0.99))

    meta_classes = torch.arange(len(counts)).repeat_interleave(32)
    for _ in range(200):
        draw = learner.draw(128, generator)
        at = (torch.rand(len(meta_classes), generator=generator) * counts_C[meta_classes]).long()
        batch = x_ND[starts_C[draw.classes_B] + draw.positions_B], draw.classes_B
        meta_batch = x_ND[starts_C[meta_classes] + at], meta_classes
        found = influence(head, optimizer, loss, batch, meta_batch)
        learner.theta.grad = learner.gradient(draw, found.influence_B)
        adam.step()
        for name, parameter in head.named_parameters():
            parameter.grad = found.grads[name]
        optimizer.step()
    return learner.rates


def test_learned_rates_rise_for_the_tail_and_spread_less_with_balanced_softmax():
    """Long-tailed Gaussian classes in the plane, as in the paper's Figure 1: three seeds each."""
    counts = [400, 80, 16, 4]
    means_CD = 1.5 * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    spread = {}
    for name, loss in {"softmax": SoftmaxLoss(), "balanced": BalancedSoftmaxLoss(counts)}.items():
        rates_SC = torch.stack([learned_rates(loss, counts, means_CD, seed) for seed in range(3)])
        spread[name] = rates_SC.var(1).mean().item()
        if name == "softmax":
            assert (rates_SC[:, 0] < 0.45).all() and (rates_SC[:, 0] < rates_SC[:, 1:].amin(1) - 0.05).all()
            assert (rates_SC[:, 3] > 0.55).all()
    assert spread["balanced"] < 0.5 * spread["softmax"]


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="class, image or expected"):
        MetaSampler([3, 2], estimator="gumbel")
    for counts, empty in (([3, 0], "1"), ([-1, 4], "0"), ([0.7, 0.3], "0, 1")):  # shares are no counts
        with pytest.raises(ValueError, match=rf"without training images: \[{empty}\]"):
            MetaSampler(counts)
    with pytest.raises(ValueError, match="one finite number a class"):
        MetaSampler([])
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            MetaSampler([3, 2], temperature=temperature)
