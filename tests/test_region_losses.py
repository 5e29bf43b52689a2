"""Losses with ``background``, region by region, against their formulas in plain Python floats.

A reference row is: its logits by column, the place of its class among the categories (None: background), the priors.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from balms_cli import BalancedSigmoidLoss, BalancedSoftmaxLoss, SoftmaxLoss, losses
from balms_cli.losses import (
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    ReweightedLoss,
    SigmoidEqualizationLoss,
    SigmoidFocalLoss,
    SigmoidLoss,
)

from .test_baseline_losses import focal_term, sigmoid_term, softmax_term

PRIORS = [0.9, 0.3, 0.02, 0.001]
C = len(PRIORS)
WEIGHTS = [0.2, 0.5, 3.0, 7.0]
THRESHOLD = 0.1  # the last two are rare
BACKGROUNDS = [0, 2, C]  # torchvision's, one between, detectron2's and mmdetection's
each_background = pytest.mark.parametrize("background", BACKGROUNDS)


def bce(z, y):
    """-log of the probability that a logit gives to the truth."""
    x = -z if y else z
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# Softmax family: a row has the C categories' logits and, apart from them, the background's.


def plain_softmax(z, bg, c):
    return softmax_term([*z, bg], C if c is None else c, None)


def balanced_softmax(z, bg, c, tau=1.0):
    mean = sum(map(math.log, PRIORS)) / C
    shift = [0.0 if c is None else tau * (math.log(f) - mean) for f in PRIORS]
    return plain_softmax([x + s for x, s in zip(z, shift, strict=True)], bg, c)


def ldam(z, bg, c, max_margin=0.5, scale=30.0):
    taken = 0.0 if c is None else scale * max_margin * (min(PRIORS) / PRIORS[c]) ** 0.25
    return plain_softmax([x - taken * (j == c) for j, x in enumerate(z)], bg, c)


def softmax_focal(z, bg, c):
    return focal_term([*z, bg], C if c is None else c, None, 1.5)


def weighted(term):
    return lambda z, bg, c: term(z, bg, c) * (1.0 if c is None else WEIGHTS[c])


# Sigmoid family: no logit for the background.


def plain_sigmoid(z, bg, c):
    return sigmoid_term(z, -1 if c is None else c, None)


def balanced_sigmoid(z, bg, c):
    return plain_sigmoid([x + (0.0 if c is None else math.log(f / (1 - f))) for x, f in zip(z, PRIORS, strict=True)], bg, c)


def sigmoid_focal(z, bg, c, gamma=2.0):
    terms = [bce(x, j == c) for j, x in enumerate(z)]
    return sum((-math.expm1(-t)) ** gamma * t for t in terms)


def equalization(z, bg, c):
    spared = [c is not None and f < THRESHOLD and j != c for j, f in enumerate(PRIORS)]
    return sum(bce(x, j == c) for j, x in enumerate(z) if not spared[j])


SOFTMAX = {
    "softmax": (lambda b: SoftmaxLoss(background=b), plain_softmax),
    "balanced": (lambda b: BalancedSoftmaxLoss(PRIORS, background=b), balanced_softmax),
    "balanced-quarter": (lambda b: BalancedSoftmaxLoss(PRIORS, 0.25, background=b), lambda *r: balanced_softmax(*r, tau=0.25)),
    "logit-adjusted": (lambda b: LogitAdjustedLoss(PRIORS, background=b), balanced_softmax),
    "ldam": (lambda b: LDAMLoss(PRIORS, background=b), ldam),
    "focal": (lambda b: FocalLoss(gamma=1.5, background=b), softmax_focal),
    "weighted": (lambda b: ReweightedLoss(SoftmaxLoss(background=b), WEIGHTS), weighted(plain_softmax)),
    "weighted-balanced": (lambda b: ReweightedLoss(BalancedSoftmaxLoss(PRIORS, background=b), WEIGHTS),
                          weighted(balanced_softmax)),
    "weighted-twice": (lambda b: ReweightedLoss(ReweightedLoss(SoftmaxLoss(background=b), WEIGHTS), WEIGHTS),
                       weighted(weighted(plain_softmax))),
}  # fmt: skip
SIGMOID = {
    "sigmoid": (lambda b: SigmoidLoss(background=b), plain_sigmoid),
    "balanced-sigmoid": (lambda b: BalancedSigmoidLoss(PRIORS, background=b), balanced_sigmoid),
    "focal-2": (lambda b: SigmoidFocalLoss(background=b), sigmoid_focal),
    "focal-half": (lambda b: SigmoidFocalLoss(gamma=0.5, background=b), lambda *r: sigmoid_focal(*r, gamma=0.5)),
    "focal-0": (lambda b: SigmoidFocalLoss(gamma=0.0, background=b), plain_sigmoid),
    "sigmoid-equalization": (lambda b: SigmoidEqualizationLoss(PRIORS, THRESHOLD, background=b), equalization),
    "weighted-sigmoid": (lambda b: ReweightedLoss(BalancedSigmoidLoss(PRIORS, background=b), WEIGHTS),
                         weighted(balanced_sigmoid)),
}  # fmt: skip
CASES = SOFTMAX | SIGMOID
each_loss = pytest.mark.parametrize("name", CASES)


def regions(name, background, rows=12, scale=2.0, seed=0):
    """Logits in the columns that the loss has, labels by the convention: every third row background, all classes there."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, C + (name in SOFTMAX), dtype=torch.float64, generator=generator)
    categories = [None if i % 3 == 2 else i % C for i in range(rows)]
    labels = [background if c is None else c + (c >= background) for c in categories]
    return logits, torch.tensor(labels), categories


def reference(name, background, logits, categories):
    terms = []
    for row, c in zip(logits.tolist(), categories, strict=True):
        bg = row.pop(background) if name in SOFTMAX else None
        terms.append(CASES[name][1](row, bg, c))
    return terms


@each_background
@each_loss
def test_every_row_is_the_formula_and_the_loss_their_mean_over_all_rows(name, background):
    loss, (logits, labels, categories) = CASES[name][0](background), regions(name, background)
    want = reference(name, background, logits, categories)
    assert loss.per_example(logits, labels).tolist() == pytest.approx(want, rel=1e-11, abs=1e-12)
    assert float(loss.denominator(labels)) == len(labels)
    assert loss(logits, labels).item() == pytest.approx(sum(want) / len(want), rel=1e-12)


@each_background
@each_loss
def test_gradient_by_hand_equals_autograd_and_finite_differences(name, background):
    loss, (logits, labels, categories) = CASES[name][0](background), regions(name, background, rows=7, seed=1)
    leaf = logits.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(loss.per_example(leaf, labels).sum(), leaf)
    for i, j in [(i, j) for i in range(7) for j in range(logits.shape[1])]:
        nudge = torch.zeros_like(logits)
        nudge[i, j] = 1e-5
        up, down = (sum(reference(name, background, logits + s * nudge, categories)) for s in (1, -1))
        assert by_autograd[i, j].item() == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-7)
    if loss.with_gradient is None:
        assert name == "focal"
        return
    for scale in (1.0, 1e3):
        leaf = (scale * logits).requires_grad_()
        terms, by_hand = loss.with_gradient(leaf, labels)
        want = loss.per_example(leaf, labels)
        (wanted,) = torch.autograd.grad(want.sum(), leaf)
        torch.testing.assert_close(terms, want.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(by_hand, wanted, rtol=1e-9, atol=1e-12)
        assert not terms.requires_grad and not by_hand.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_background
@pytest.mark.parametrize("name", [n for n in CASES if "focal" not in n])
def test_background_rows_are_those_of_the_plain_loss_bit_for_bit(name, background, dtype):
    loss, plain = CASES[name][0](background), CASES["softmax" if name in SOFTMAX else "sigmoid"][0](background)
    logits, labels, _ = regions(name, background)
    logits, rows = logits.to(dtype), labels == background
    got, want = loss.with_gradient(logits, labels), plain.with_gradient(logits, labels)
    assert rows.any() and all(torch.equal(a[rows], b[rows]) for a, b in zip(got, want, strict=True))
    assert name in ("softmax", "sigmoid") or not torch.equal(got[0][~rows], want[0][~rows])
    by_autograd = []
    for one in (loss, plain):
        leaf = logits.clone().requires_grad_()
        by_autograd += torch.autograd.grad(one(leaf, labels), leaf)
    assert torch.equal(by_autograd[0][rows], by_autograd[1][rows])


@each_loss
def test_one_batch_by_three_conventions(name):
    """The same regions with the background first, between and last: the same loss, and the same gradient column by column."""
    logits, _, categories = regions(name, 0)
    seen = []
    for background in BACKGROUNDS:
        order = list(range(C))
        if name in SOFTMAX:  # column 0 is the background's in ``logits``
            order = [1, 2, 3, 4]
            order.insert(background, 0)
        labels = torch.tensor([background if c is None else c + (c >= background) for c in categories])
        leaf = logits[:, order].clone().requires_grad_()
        value = CASES[name][0](background)(leaf, labels)
        (gradient,) = torch.autograd.grad(value, leaf)
        seen.append((value.detach(), gradient[:, torch.tensor(order).argsort()]))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(seen[2], seen[0], rtol=1e-12, atol=1e-15)


@each_loss
def test_a_batch_of_background_alone(name):
    loss, logits = CASES[name][0](0), regions(name, 0)[0]
    labels = torch.zeros(12, dtype=torch.int64)
    want = reference(name, 0, logits, [None] * 12)
    assert loss(logits, labels).item() == pytest.approx(sum(want) / 12, rel=1e-12)


@each_loss
def test_half_precision_logits_are_computed_in_float32_and_plain_is_of_the_same_kind(name):
    loss, (logits, labels, categories) = CASES[name][0](C), regions(name, C)
    logits = logits.bfloat16()
    value = loss(logits, labels)
    want = reference(name, C, logits.double(), categories)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(sum(want) / 12, rel=1e-5)
    plain = loss.plain()
    assert type(plain) is (SoftmaxLoss if name in SOFTMAX else SigmoidLoss) and plain.background == C
    assert not loss.prior_is_exact


def test_foreground_drawn_by_the_priors_teaches_no_preference():
    """What the losses are for: at zero logits the gradient over foreground whose classes come by the priors is zero, so that a
    frequent class is not preferred; the plain losses pull toward it."""
    counts = [70, 20, 9, 1]
    priors = [n / 100 for n in counts]
    labels = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(counts))

    def pull(loss, columns):
        leaf = torch.zeros(100, columns, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(loss(leaf, labels), leaf)[0].sum(0)

    # Softmax: zero but for what the background's column takes from all alike, by their priors.
    pulled = pull(BalancedSoftmaxLoss(priors, background=0), 5)
    torch.testing.assert_close(pulled[1:] / pulled[1:].sum(), torch.tensor(priors, dtype=torch.float64))
    torch.testing.assert_close(pull(BalancedSigmoidLoss(priors, background=0), 4), torch.zeros(4, dtype=torch.float64))
    assert pull(SigmoidLoss(background=0), 4)[0] < -0.1 < 0.1 < pull(SigmoidLoss(background=0), 4)[3]


def test_a_constant_in_the_priors_log_does_not_move_foreground_against_background():
    logits, labels, _ = regions("softmax", 0)
    tenth = [f / 10 for f in PRIORS]
    one, other = (BalancedSoftmaxLoss(f, background=0)(logits, labels) for f in (PRIORS, tenth))
    torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


def test_one_category_and_background():
    logits, labels = torch.tensor([[1.5], [-0.3]], dtype=torch.float64), torch.tensor([1, 0])
    want = bce(1.5 + math.log(0.2 / 0.8), True) + bce(-0.3, False)
    assert BalancedSigmoidLoss([0.2], background=0)(logits, labels).item() == pytest.approx(want / 2, rel=1e-12)


@pytest.mark.parametrize("make", [
    BalancedSoftmaxLoss, BalancedSigmoidLoss, LDAMLoss, lambda p, background: SigmoidEqualizationLoss(p, background=background),
])  # fmt: skip
def test_counts_are_refused_as_priors_with_the_fix(make):
    for wrong in ([900, 30, 2], [0.5, 1.0], [0.5, 0.0], [0.5, -0.1], [0.5, math.nan], []):
        with pytest.raises(ValueError, match=r"share of the N images.*give image counts / N, clamped to \[1/\(2N\)"):
            make(wrong, background=0)
    for label in (3, 80):
        with pytest.raises(ValueError, match=r"one of 0\.\.2"):
            make([0.5, 0.1], background=label)
    with pytest.raises(ValueError, match="0 or more"):
        make([0.5, 0.1], background=-1)
    for last in (0, 1, 2):
        make([0.5, 0.1], background=last)


@pytest.mark.parametrize("name, columns", [("balanced", C), ("balanced-sigmoid", C + 1), ("sigmoid-equalization", C + 1)])
def test_logits_of_the_other_family_are_refused(name, columns):
    with pytest.raises(ValueError, match=f"needs logits of {2 * C + 1 - columns} columns here, got {columns}"):
        CASES[name][0](0)(torch.zeros(3, columns), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("name", ["softmax", "balanced", "sigmoid", "balanced-sigmoid"])
@pytest.mark.parametrize("label", [-1, C + 1])
def test_a_label_that_is_none_is_refused(name, label):
    with pytest.raises((IndexError, RuntimeError)):
        CASES[name][0](0)(torch.zeros(2, C + (name in SOFTMAX)), torch.tensor([1, label]))


def test_other_refusals():
    with pytest.raises(ValueError, match="gamma must be 0 or more"):
        SigmoidFocalLoss(gamma=-1.0)
    with pytest.raises(ValueError, match="ReweightedLoss with weights of your own"):
        losses.DeferredReweighting(SoftmaxLoss(background=0), [5, 3])
    with pytest.raises(ValueError, match="positive"):
        ReweightedLoss(SoftmaxLoss(background=0), [1.0, 0.0])


def test_sigmoid_focal_without_background_and_at_the_extremes():
    logits = torch.tensor([[40.0, -40.0, 0.0], [-800.0, 800.0, 800.0], [0.0, 1e4, -1e4]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 2])
    for gamma in (0.0, 0.5, 2.0):
        leaf = logits.clone().requires_grad_()
        terms = SigmoidFocalLoss(gamma=gamma).per_example(leaf, labels)
        want = [sigmoid_focal(row, None, c, gamma) for row, c in zip(logits.tolist(), labels.tolist(), strict=True)]
        assert terms.tolist() == pytest.approx(want, rel=1e-9, abs=1e-12)
        (gradient,) = torch.autograd.grad(terms.sum(), leaf)
        assert gradient.isfinite().all()
        torch.testing.assert_close(SigmoidFocalLoss(gamma=gamma).with_gradient(logits, labels)[1], gradient)


def test_without_background_nothing_has_changed():
    """Counts, columns and bits as for images: the sum that torch itself would give."""
    generator = torch.Generator().manual_seed(5)
    logits, labels = torch.randn(9, 3, generator=generator), torch.arange(9) % 3
    offset = (torch.tensor([50.0, 9.0, 1.0], dtype=torch.float64) / 60).log().float()
    loss = BalancedSoftmaxLoss([50, 9, 1])
    shifted = (logits + offset).t().contiguous().log_softmax(0).t()
    assert torch.equal(loss.per_example(logits, labels), F.nll_loss(shifted, labels, reduction="none"))
    assert loss.background is None and loss.prior_is_exact
    onehot = F.one_hot(labels, 3).float()
    plain = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none").sum(1)
    assert torch.equal(SigmoidLoss().per_example(logits, labels), plain)
