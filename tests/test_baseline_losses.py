"""The losses that Balanced Softmax is compared with, against their papers' equations in plain Python floats.

A reference is a term for an example and a weight for its class; the loss is the weighted mean of the terms, the sum of the
batch's weights below. Exponentials are taken of differences from the largest logit, so a reference holds at any size.
"""

import math
from copy import deepcopy
from fractions import Fraction
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from balms_cli import SoftmaxLoss, losses
from balms_cli.losses import EqualizationLoss, FocalLoss, LDAMLoss, ReweightedLoss, SigmoidLoss

from .test_losses import COUNTS, example_batch, normalised, value_and_gradient
from .test_theory import minimise

BETA, THRESHOLD = 0.999, 0.04  # of COUNTS, the shares of the last three classes lie below the threshold; no count does


def softmax_term(z, y, n, w=None):
    """-log(e^z_y / sum_j w_j e^z_j) of one example: its logits, its class, the class counts (not used here)."""
    kept = [x + math.log(a) for x, a in zip(z, w or [1.0] * len(z), strict=True) if a > 0]
    return max(kept) + math.log(sum(math.exp(x - max(kept)) for x in kept)) - z[y]


def adjusted_term(z, y, n, tau=1.0):
    return softmax_term([x + tau * math.log(m / sum(n)) for x, m in zip(z, n, strict=True)], y, n)


def focal_term(z, y, n, gamma=1.0):
    log_p = -softmax_term(z, y, n)
    return -((-math.expm1(log_p)) ** gamma) * log_p


def sigmoid_term(z, y, n):
    """-log phi(z_y) - sum_{j != y} log(1 - phi(z_j)), where -log phi(z) = log(1 + e^-z) and 1 - phi(z) = phi(-z)."""
    signed = [-x if j == y else x for j, x in enumerate(z)]
    return sum(max(x, 0.0) + math.log1p(math.exp(-abs(x))) for x in signed)


def ldam_term(z, y, n, max_margin=0.5, scale=30.0):
    margin = max_margin * n[y] ** -0.25 / max(m**-0.25 for m in n)
    return softmax_term([x - scale * margin if j == y else x for j, x in enumerate(z)], y, n)


def equalization_term(z, y, n):
    """With gamma = 1 nothing is left to chance: w_j = 1 - [pi_j < threshold] [j != y]."""
    return softmax_term(z, y, n, [0.0 if m / sum(n) < THRESHOLD and j != y else 1.0 for j, m in enumerate(n)])


def effective(n):
    return (1 - BETA) / (1 - BETA**n)


def drw(inner, **options):
    return lambda n: losses.DeferredReweighting(inner(n), n, BETA, **options)


def cb(*form):
    return lambda n: losses.ClassBalancedLoss(n, BETA, *form)


CASES = {  # name: loss of the counts; term of (logits of one example, its class, counts); weight of a class of n images
    "softmax": (SoftmaxLoss, softmax_term, None),
    "logit-adjusted": (losses.LogitAdjustedLoss, adjusted_term, None),
    "logit-adjusted-1.5": (lambda n: losses.LogitAdjustedLoss(n, 1.5), partial(adjusted_term, tau=1.5), None),
    "sigmoid": (SigmoidLoss, sigmoid_term, None),
    "focal": (FocalLoss, focal_term, None),
    "focal-2": (lambda n: FocalLoss(n, 2.0), partial(focal_term, gamma=2.0), None),
    "focal-half": (lambda n: FocalLoss(n, 0.5), partial(focal_term, gamma=0.5), None),
    "cost-sensitive": (losses.CostSensitiveLoss, softmax_term, lambda n: 1 / n),
    "cost-sensitive-half": (lambda n: losses.CostSensitiveLoss(n, 0.5), softmax_term, lambda n: n**-0.5),
    "class-balanced": (cb(), softmax_term, effective),
    "class-balanced-sigmoid": (cb("sigmoid"), sigmoid_term, effective),
    "class-balanced-focal": (cb("focal", 2.0), partial(focal_term, gamma=2.0), effective),
    "ldam": (LDAMLoss, ldam_term, None),
    "ldam-0.3": (lambda n: LDAMLoss(n, 0.3, 10.0), partial(ldam_term, max_margin=0.3, scale=10.0), None),
    "equalization": (lambda n: EqualizationLoss(n, 1.0, THRESHOLD), equalization_term, None),
    "reweighted": (lambda n: ReweightedLoss(SigmoidLoss(), [m**0.25 for m in n]), sigmoid_term, lambda n: n**0.25),
    "drw": (drw(SoftmaxLoss), softmax_term, effective),
    "ldam-drw": (drw(LDAMLoss), ldam_term, effective),
}
OF_SIGMOIDS = {"sigmoid", "class-balanced-sigmoid", "reweighted"}
BLIND = {"softmax", "sigmoid", "focal", "focal-2", "focal-half"}  # to the counts
each_loss = pytest.mark.parametrize("name", CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def reference(name, logits, targets, counts=COUNTS, also=None):
    """The weighted terms, their weights (mean 1 over the classes, times those of ``also``), and the weighted mean."""
    _, term, weight = CASES[name]
    of_class = [1.0 if weight is None else weight(n) for n in counts]
    weights = [of_class[y] * len(counts) / sum(of_class) * (also[y] if also else 1.0) for y in targets.tolist()]
    terms = [term(z, y, counts) * w for z, y, w in zip(logits.tolist(), targets.tolist(), weights, strict=True)]
    return terms, weights, sum(terms) / sum(weights)


def assert_same_loss(one, other, tolerance=1e-12):
    got, want = (value_and_gradient(loss, *example_batch()) for loss in (one, other))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@each_loss
def test_terms_denominator_and_mean_equal_the_papers_equation(name):
    loss, (logits_BC, targets_B) = CASES[name][0](COUNTS), example_batch()
    terms, weights, mean = reference(name, logits_BC, targets_B)
    assert loss.per_example(logits_BC, targets_B).tolist() == pytest.approx(terms, rel=1e-11, abs=1e-11)
    assert float(loss.denominator(targets_B)) == pytest.approx(sum(weights), rel=1e-12)
    assert loss(logits_BC, targets_B).item() == pytest.approx(mean, rel=1e-11)


@each_loss
def test_gradient_equals_finite_differences_and_the_one_by_hand(name):
    loss, (logits_BC, targets_B) = CASES[name][0](COUNTS), example_batch(batch=5, scale=2.0, seed=1)
    _, gradient_BC = value_and_gradient(loss, logits_BC, targets_B)
    steps = 1e-5 * torch.eye(25, dtype=torch.float64).reshape(25, 5, 5)
    for step_BC, slope in zip(steps, gradient_BC.flatten().tolist(), strict=True):
        up, down = (reference(name, logits_BC + change, targets_B)[2] for change in (step_BC, -step_BC))
        assert slope == pytest.approx((up - down) / 2e-5, abs=1e-8)

    if "focal" in name:  # other terms than its parent's: it must not pass on its parent's gradient
        assert loss.with_gradient is None
        return
    for scale in (1.0, 1e4):
        leaf_BC = (scale * logits_BC).requires_grad_()
        terms_B, by_hand_BC = loss.with_gradient(leaf_BC, targets_B)
        wanted_B = loss.per_example(leaf_BC, targets_B)
        (wanted_BC,) = torch.autograd.grad(wanted_B.sum(), leaf_BC)
        torch.testing.assert_close(terms_B, wanted_B.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(by_hand_BC, wanted_BC, rtol=1e-10, atol=1e-12)
        assert not terms_B.requires_grad and not by_hand_BC.requires_grad


@each_loss
@each_dtype
def test_extreme_logits_and_counts_stay_finite_and_right(name, dtype):
    counts = [1_000_000, 1, 1_000]
    logits_BC = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, -1e4], [0.0, 0.0, 0.0]], dtype=dtype)
    spacing = torch.finfo(dtype).eps * 1e4  # of neighbouring floats at 1e4: what adding a shift may lose
    for targets_B in (torch.tensor([1, 1, 2, 0]), torch.zeros(4, dtype=torch.int64)):
        want = reference(name, logits_BC, targets_B, counts)[2]
        for loss in (CASES[name][0](counts), CASES[name][0](counts).to(dtype)):
            value, gradient_BC = value_and_gradient(loss, logits_BC, targets_B)
            assert value.dtype == dtype and gradient_BC.isfinite().all()
            assert value.item() == pytest.approx(want, rel=2e-6, abs=2 * spacing)


@each_loss
def test_half_precision_logits_are_computed_in_float32(name):
    loss, (logits_BC, targets_B) = CASES[name][0](COUNTS), example_batch(torch.bfloat16)
    want = reference(name, logits_BC, targets_B)[2]
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient_BC = value_and_gradient(loss, logits_BC, targets_B)
    assert value.dtype == torch.float32 and gradient_BC.dtype == torch.bfloat16
    assert [value.item(), loss(logits_BC.float(), targets_B).item()] == pytest.approx([want, want], rel=2e-6)


@each_dtype
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_of_sure_and_of_hopeless_examples(gamma, dtype):
    """p -> 1, where a power of 1 - p under 1 has an infinite slope, and p -> 0."""
    edge = torch.tensor([0.0, 1.0, 8.0, 17.0, 30.0, 60.0, 90.0, 800.0, 1e4], dtype=dtype)
    logits_BC, targets_B = torch.stack([torch.cat([edge, -edge]), edge.new_zeros(18)], 1), torch.zeros(18, dtype=torch.int64)
    loss = FocalLoss(gamma=gamma)
    value, gradient_BC = value_and_gradient(loss, logits_BC, targets_B)
    assert value.isfinite() and gradient_BC.isfinite().all() and (gradient_BC[:, 0] <= 0).all()
    # 1 - p is to be as fine as the log p that it is made of, which cannot be told from 0 where p is near 1.
    want = [-((-math.expm1(log_p)) ** gamma) * log_p for log_p in losses.log_softmax(logits_BC)[:, 0].tolist()]
    assert loss.per_example(logits_BC, targets_B).tolist() == pytest.approx(want, rel=1e-5, abs=0)
    if gamma == 0:
        torch.testing.assert_close((value, gradient_BC), value_and_gradient(F.cross_entropy, logits_BC, targets_B))


def test_losses_that_equal_another():
    for name in ("cost-sensitive", "cost-sensitive-half", "class-balanced", "drw"):
        weights_C = torch.tensor([CASES[name][2](n) for n in COUNTS], dtype=torch.float64)
        assert_same_loss(CASES[name][0](COUNTS), torch.nn.CrossEntropyLoss(weight=weights_C), 1e-11)
    for name in (name for name in CASES if "focal" not in name and "ldam" not in name):  # equal counts: nothing to mend
        assert_same_loss(CASES[name][0]([17] * 5), SigmoidLoss() if name in OF_SIGMOIDS else F.cross_entropy)
    assert_same_loss(losses.ClassBalancedLoss(COUNTS, 0.0), F.cross_entropy)
    assert_same_loss(losses.ClassBalancedLoss(COUNTS, 1 - 1e-12), losses.CostSensitiveLoss(COUNTS), 1e-8)
    assert_same_loss(losses.DeferredReweighting(SoftmaxLoss(), COUNTS), losses.ClassBalancedLoss(COUNTS, 0.9999))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99, 0.9999, 1 - 1e-12])
def test_effective_number_equals_exact_fractions(beta):
    counts, exact = [1, 2, 37, 500, 3000], Fraction(beta)
    want = [float((1 - exact**n) / (1 - exact)) for n in counts]
    assert losses.effective_number(counts, beta).tolist() == pytest.approx(want, rel=1e-13)


def test_ldam_margins():
    logits_BC, targets_B = example_batch(batch=5)
    for counts in (COUNTS, [17] * 5):
        taken_BC = logits_BC - LDAMLoss(counts, max_margin=0.4, scale=20.0).adjusted(logits_BC, targets_B)
        want = [8.0 * (n / counts[-1]) ** -0.25 for n in counts]  # the rarest class, the last, has 0.4 * 20
        assert taken_BC.diagonal().tolist() == pytest.approx(want)
        assert not (taken_BC - taken_BC.diag().diag()).any()  # only the true class's logit moves


@pytest.mark.parametrize("inner", ["softmax", "sigmoid", "focal-2", "ldam", "cost-sensitive"])
@pytest.mark.parametrize("start, first", [({}, 160), ({"start": 0.0}, 0), ({"start": 1.0}, 200)])
def test_deferred_weights_act_from_their_first_step_on(inner, start, first):
    """Steps count from 0. Before the deferral it is the inner loss, weights of its own included; then both weigh."""
    make, _, weight = CASES[inner]
    loss, (logits_BC, targets_B) = drw(make, **start)(COUNTS), example_batch()
    for step in (0, 159, 160, 199, 10):  # at an earlier step again: it follows, as after a resume
        loss.at_step(step, 200, seed=3)
        late = [effective(n) if step >= first else 1.0 for n in COUNTS]
        value, gradient_BC = value_and_gradient(loss, logits_BC, targets_B)
        assert value.item() == pytest.approx(reference(inner, logits_BC, targets_B, also=late)[2], rel=1e-11)
        if loss.with_gradient is not None:
            by_hand_BC = loss.with_gradient(logits_BC, targets_B)[1] / loss.denominator(targets_B)
            torch.testing.assert_close(by_hand_BC, gradient_BC, rtol=1e-10, atol=1e-12)
        prior = [n * w * (weight(n) if weight else 1.0) for n, w in zip(COUNTS, late, strict=True)]
        torch.testing.assert_close(loss.implied_log_prior(normalised(COUNTS).log()).exp(), normalised(prior))


def spared(loss):
    """Where one call of Equalization spares a class, for 4000 targets 0, 1, .. 4, 0, .. [B, C]."""
    return loss.adjusted(torch.zeros(4000, 5), torch.arange(4000) % 5).isneginf()


@pytest.mark.parametrize("told", [True, False])
def test_equalization_spares_tail_classes_at_rate_gamma(told):
    loss = EqualizationLoss(COUNTS, 0.7, THRESHOLD)
    torch.manual_seed(0)
    if told:
        loss.at_step(5, 100, seed=1)
    spared_BC, targets_B = spared(loss), torch.arange(4000) % 5
    assert not spared_BC[:, :2].any() and not spared_BC[torch.arange(4000), targets_B].any()
    for c in (2, 3, 4):
        rate = spared_BC[targets_B != c, c].double().mean().item()
        assert rate == pytest.approx(0.7, abs=5 * math.sqrt(0.7 * 0.3 / 3200))  # five standard deviations
    both = spared_BC[targets_B < 2, 2:4].all(1).double().mean().item()  # classes draw apart: gamma squared
    assert both == pytest.approx(0.49, abs=5 * math.sqrt(0.49 * 0.51 / 1600))
    assert not EqualizationLoss([50, 25, 25], 1.0, 0.25).tail_C.any()  # strictly below the threshold


def test_equalization_draws_by_seed_and_step():
    loss, seen = EqualizationLoss(COUNTS, 0.7, THRESHOLD), []
    wrapped = drw(lambda n: EqualizationLoss(n, 0.7, THRESHOLD))(COUNTS)
    for step, seed in ((5, 1), (6, 1), (5, 2), (6, 2), (5, 1)):
        loss.at_step(step, 100, seed), wrapped.at_step(step, 100, seed)
        seen.append(spared(loss))
        torch.rand(3)  # the global stream has no part in it
        assert torch.equal(spared(loss), seen[-1]) and torch.equal(spared(wrapped), seen[-1])
    loss.at_step(5, 100, seed=20_260_101_000_000)  # a date: more than a generator's 64 bits once it is multiplied
    assert torch.equal(spared(loss), spared(loss)) and not torch.equal(spared(loss), seen[0])
    assert torch.equal(seen[0], seen[4])
    assert all(not torch.equal(seen[i], seen[j]) for i in range(4) for j in range(i))


def test_equalization_is_the_softmax_over_what_its_draw_left():
    loss, (logits_BC, targets_B) = EqualizationLoss(COUNTS, 0.6, THRESHOLD), example_batch()
    for step in range(5):
        loss.at_step(step, 5)
        w = (~loss.adjusted(logits_BC, targets_B).isneginf()).double().tolist()
        want = list(map(softmax_term, logits_BC.tolist(), targets_B.tolist(), [COUNTS] * 11, w))
        assert loss.per_example(logits_BC, targets_B).tolist() == pytest.approx(want, rel=1e-11)
        by_hand_BC = loss.with_gradient(logits_BC, targets_B)[1] / 11
        torch.testing.assert_close(by_hand_BC, value_and_gradient(loss, logits_BC, targets_B)[1])
    assert_same_loss(EqualizationLoss(COUNTS, 0.0, THRESHOLD), F.cross_entropy)


PRIOR_CASES = {name: case[0] for name, case in CASES.items()} | {
    "balanced": losses.BalancedSoftmaxLoss, "balanced-sigmoid": losses.BalancedSigmoidLoss,
    "balanced-drw": drw(losses.BalancedSoftmaxLoss), "class-balanced-drw": drw(cb()),
    "equalization": lambda n: EqualizationLoss(n, 1.0, 0.2), "equalization-drw": drw(lambda n: EqualizationLoss(n, 1.0, 0.2)),
}  # fmt: skip


@pytest.mark.parametrize("name", PRIOR_CASES)
@pytest.mark.parametrize("data_counts", [[90, 40, 20, 3], [20, 20, 30, 10]])
def test_the_implied_prior_is_what_biases_learn(name, data_counts):
    """One vector of logits for all examples, fitted to convergence: on the counts that the loss knows, and on others."""
    loss = PRIOR_CASES[name]([90, 40, 20, 3])
    targets_N = torch.repeat_interleave(torch.arange(4), torch.tensor(data_counts))
    z_C = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    minimise(lambda: loss(z_C.expand(len(targets_N), -1), targets_N), [z_C], steps=60)
    learned_C = (z_C.sigmoid() if isinstance(loss.plain(), SigmoidLoss) else z_C.softmax(0)).detach()
    off_C = learned_C / learned_C.sum() - loss.implied_log_prior(normalised(data_counts).log()).exp()
    assert loss.prior_is_exact == (not any(word in name for word in ("focal", "ldam", "equalization")))
    assert off_C.abs().max() < 1e-6 if loss.prior_is_exact else off_C.abs().max() > 1e-3


@each_loss
def test_as_a_module(name):
    loss, (logits_BC, targets_B) = CASES[name][0](COUNTS), example_batch()
    assert loss.state_dict() == {}  # counts are no part of a checkpoint
    value, copy = loss(logits_BC, targets_B).item(), deepcopy(loss).float()
    assert copy(logits_BC.float(), targets_B).item() == pytest.approx(value, rel=1e-5)
    assert loss(logits_BC, targets_B).item() == value and all(b.dtype != torch.float32 for b in loss.buffers())
    moved = deepcopy(loss).to("meta")  # fails where something stays behind
    assert moved(logits_BC.to("meta"), targets_B.to("meta")).device.type == "meta"
    assert type(loss.plain()) is (SigmoidLoss if name in OF_SIGMOIDS else SoftmaxLoss)
    bias = -math.log(4) if name == "class-balanced-sigmoid" else None
    assert loss.initial_bias == bias and ReweightedLoss(loss, COUNTS).initial_bias == bias


@pytest.mark.parametrize("name", [name for name in CASES if name not in BLIND | {"reweighted"}])
@pytest.mark.parametrize("counts", [[5, 0, 3], [4, -1, 2]])
def test_a_class_without_images_is_refused_by_name(name, counts):
    with pytest.raises(ValueError, match=r"\[1\]"):
        CASES[name][0](counts)


def test_ldam_refuses_logits_of_other_classes_than_the_counts():
    with pytest.raises(ValueError, match="LDAMLoss needs logits of 5 columns here, got 4"):
        LDAMLoss(COUNTS)(torch.zeros(2, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize("make, words", [
    *((lambda g=g: FocalLoss(gamma=g), "gamma") for g in (-0.5, math.nan)),
    *((lambda g=g: EqualizationLoss(COUNTS, g), "gamma") for g in (-0.1, 1.1, math.nan)),
    *((lambda b=b: losses.effective_number(COUNTS, b), "beta") for b in (-0.1, 1.0, 1.5, math.nan)),
    *((lambda b=b: losses.ClassBalancedLoss(COUNTS, b), "beta") for b in (-0.1, 1.0)),
    (lambda: losses.DeferredReweighting(SoftmaxLoss(), COUNTS, 1.0), "beta"), (lambda: cb("hinge")(COUNTS), "form 'hinge'"),
    *((lambda w=w: ReweightedLoss(SoftmaxLoss(), w), "positive") for w in ([1, 0], [1, -1], [1, math.nan], [1, math.inf])),
])  # fmt: skip
def test_hyper_parameters_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name, hyper, want", [
    ("softmax", {}, SoftmaxLoss),
    ("balanced", {"exponent": 0.25}, lambda n: losses.BalancedSoftmaxLoss(n, 0.25)),
    ("logit-adjusted", {"exponent": 1.5}, CASES["logit-adjusted-1.5"][0]),
    ("balanced-sigmoid", {}, losses.BalancedSigmoidLoss),
    ("focal", {}, FocalLoss), ("focal", {"gamma": 2.0}, CASES["focal-2"][0]),
    ("cost-sensitive", {}, losses.CostSensitiveLoss), ("cost-sensitive", {"exponent": 0.5}, CASES["cost-sensitive-half"][0]),
    ("class-balanced", {"beta": BETA}, cb()),
    ("class-balanced", {}, losses.ClassBalancedLoss), ("class-balanced", {"beta": 0.9999}, losses.ClassBalancedLoss),
    ("class-balanced-sigmoid", {"beta": BETA}, cb("sigmoid")),
    ("class-balanced-focal", {"beta": BETA, "gamma": 2.0}, cb("focal", 2.0)),
    ("ldam", {}, LDAMLoss), ("ldam", {"max_margin": 0.3, "scale": 10.0}, CASES["ldam-0.3"][0]),
    ("equalization", {}, EqualizationLoss), ("equalization", {"eql_gamma": 0.9, "eql_threshold": 0.005}, EqualizationLoss),
    ("equalization", {"eql_gamma": 1.0, "eql_threshold": THRESHOLD}, CASES["equalization"][0]),
])  # fmt: skip
def test_build_loss_by_name(name, hyper, want):
    built, wanted = losses.build_loss(name, COUNTS, **hyper), want(COUNTS)
    assert type(built) is type(wanted)
    built.at_step(0, 1), wanted.at_step(0, 1)
    assert_same_loss(built, wanted)
    with pytest.raises(KeyError):
        losses.build_loss(name + "?", COUNTS)
