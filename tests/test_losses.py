"""The losses against the paper's equations, written out term by term in plain Python floats.

No softmax or binary cross-entropy of torch is the truth here, except where a test says that a loss must equal one.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from balms_cli import BalancedSigmoidLoss, BalancedSoftmaxLoss, SoftmaxLoss, class_counts
from balms_cli.losses import build_loss, log_softmax

COUNTS = [900, 210, 37, 6, 1]


def softmax_terms(logits, targets, priors):
    """-log(prior_y e^z_y / sum_j prior_j e^z_j) (eq 10, priors = n; eq 1 with priors = 1), one example at a time."""
    terms = []
    for row, y in zip(logits.tolist(), targets.tolist(), strict=True):
        total = 0.0
        for z, prior in zip(row, priors, strict=True):
            total += prior * math.exp(z)
        terms.append(-math.log(priors[y] * math.exp(row[y]) / total))
    return terms


def sigmoid_terms(logits, targets, counts):
    """Eq 23 for the probability, eqs 13-14 for the sum over classes, one example at a time."""
    n, k = sum(counts), len(counts)
    terms = []
    for row, y in zip(logits.tolist(), targets.tolist(), strict=True):
        loss = 0.0
        for j, z in enumerate(row):
            shifted = z - math.log((n / k) / counts[j] * (n - counts[j]) / (n - n / k))
            phi = math.exp(shifted) / (1 + math.exp(shifted))
            loss += -math.log(phi) if j == y else -math.log(1 - phi)
        terms.append(loss)
    return terms


CASES = {
    "softmax": (SoftmaxLoss(COUNTS), lambda z, y: softmax_terms(z, y, [1.0] * 5)),
    "balanced": (BalancedSoftmaxLoss(COUNTS), lambda z, y: softmax_terms(z, y, COUNTS)),
    "balanced-quarter": (
        BalancedSoftmaxLoss(COUNTS, exponent=0.25),
        lambda z, y: softmax_terms(z, y, [n**0.25 for n in COUNTS]),
    ),
    "balanced-zero": (BalancedSoftmaxLoss(COUNTS, exponent=0.0), lambda z, y: softmax_terms(z, y, [1.0] * 5)),
    "balanced-sigmoid": (BalancedSigmoidLoss(COUNTS), lambda z, y: sigmoid_terms(z, y, COUNTS)),
}
each_loss = pytest.mark.parametrize("name", CASES)


def example_batch(dtype=torch.float64, batch=11, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits_BC = scale * torch.randn(batch, len(COUNTS), dtype=torch.float64, generator=generator)
    return logits_BC.to(dtype), torch.arange(batch) % len(COUNTS)


def value_and_gradient(loss, logits_BC, targets_B):
    logits_BC = logits_BC.clone().requires_grad_()
    value = loss(logits_BC, targets_B)
    (gradient_BC,) = torch.autograd.grad(value, logits_BC)
    return value.detach(), gradient_BC


@each_loss
def test_per_example_and_mean_equal_the_papers_equation(name):
    loss, brute_force = CASES[name]
    logits_BC, targets_B = example_batch()
    want_B = torch.tensor(brute_force(logits_BC, targets_B), dtype=torch.float64)
    got_B = loss.per_example(logits_BC, targets_B)
    assert got_B.shape == (11,) and got_B.dtype == torch.float64
    torch.testing.assert_close(got_B, want_B, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(loss(logits_BC, targets_B), want_B.sum() / 11, rtol=1e-11, atol=1e-11)


@each_loss
def test_gradient_equals_finite_differences_of_the_papers_equation(name):
    loss, brute_force = CASES[name]
    logits_BC, targets_B = example_batch(batch=6, scale=2.0, seed=1)
    _, gradient_BC = value_and_gradient(loss, logits_BC, targets_B)
    step = 1e-5
    for i in range(6):
        for c in range(len(COUNTS)):
            up, down = logits_BC.clone(), logits_BC.clone()
            up[i, c] += step
            down[i, c] -= step
            slope = (sum(brute_force(up, targets_B)) - sum(brute_force(down, targets_B))) / (2 * step) / 6
            assert gradient_BC[i, c].item() == pytest.approx(slope, abs=1e-8)
    assert torch.autograd.gradcheck(lambda z: loss.per_example(z, targets_B), logits_BC.requires_grad_())


@pytest.mark.parametrize("counts, exponent", [([40] * 5, 1.0), ([1] * 5, 0.25), (COUNTS, 0.0)])
def test_balanced_softmax_without_imbalance_is_cross_entropy(counts, exponent):
    logits_BC, targets_B = example_batch()
    got = value_and_gradient(BalancedSoftmaxLoss(counts, exponent), logits_BC, targets_B)
    want = value_and_gradient(F.cross_entropy, logits_BC, targets_B)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_balanced_sigmoid_with_equal_counts_is_the_plain_sum_of_binary_cross_entropies():
    logits_BC, targets_B = example_batch()
    onehot_BC = torch.zeros_like(logits_BC)
    onehot_BC[torch.arange(11), targets_B] = 1.0

    def plain(logits, _):
        return F.binary_cross_entropy_with_logits(logits, onehot_BC, reduction="sum") / 11

    got = value_and_gradient(BalancedSigmoidLoss([17] * 5), logits_BC, targets_B)
    torch.testing.assert_close(got, value_and_gradient(plain, logits_BC, targets_B), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tau", [1.0, 0.25, 1.5])
def test_balanced_softmax_is_the_logit_adjusted_loss_on_class_priors(tau):
    """Menon et al. (ICLR 2021), eq 10: log(1 + sum_{y' != y} (pi_y' / pi_y)^tau e^(z_y' - z_y))."""
    logits_BC, targets_B = example_batch(seed=2)
    pi = [n / sum(COUNTS) for n in COUNTS]
    want = 0.0
    for row, y in zip(logits_BC.tolist(), targets_B.tolist(), strict=True):
        others = sum((pi[j] / pi[y]) ** tau * math.exp(row[j] - row[y]) for j in range(5) if j != y)
        want += math.log1p(others) / 11
    assert BalancedSoftmaxLoss(COUNTS, tau)(logits_BC, targets_B).item() == pytest.approx(want, rel=1e-11)


def test_balanced_softmax_asks_a_rare_class_for_a_larger_margin():
    """On equal logits a rare class pays log(N / n): more than log C, a frequent one less. Fixes the sign by hand."""
    terms = BalancedSoftmaxLoss([80, 15, 5]).per_example(torch.zeros(3, 3), torch.arange(3))
    torch.testing.assert_close(terms, torch.tensor([math.log(100 / 80), math.log(100 / 15), math.log(20.0)]))


def test_only_the_shares_matter_to_the_losses():
    logits_BC, targets_B = example_batch()
    thousand_fold = [1000 * n for n in COUNTS]
    for kind in (BalancedSoftmaxLoss, BalancedSigmoidLoss):
        got, want = kind(thousand_fold)(logits_BC, targets_B), kind(COUNTS)(logits_BC, targets_B)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [SoftmaxLoss, BalancedSoftmaxLoss, BalancedSigmoidLoss])
def test_extreme_logits_and_counts_stay_finite_and_right(kind, dtype):
    counts = [1_000_000, 1, 1_000]
    n = sum(counts)
    logits_BC = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, -1e4], [0.0, 0.0, 0.0]], dtype=dtype)
    targets_B = torch.tensor([1, 1, 2, 1])
    loss = kind(counts)
    value, gradient_BC = value_and_gradient(loss, logits_BC, targets_B)
    assert value.isfinite() and gradient_BC.isfinite().all()

    shift = {
        SoftmaxLoss: [0.0] * 3,
        BalancedSoftmaxLoss: [math.log(c) for c in counts],
        BalancedSigmoidLoss: [-math.log((n / 3) / c * (n - c) / (n - n / 3)) for c in counts],
    }[kind]
    want = []
    for row, y in zip(logits_BC.tolist(), targets_B.tolist(), strict=True):
        z = [a + b for a, b in zip(row, shift, strict=True)]
        if kind is BalancedSigmoidLoss:  # log(1 + e^x) without overflow
            softplus = [max(x, 0.0) + math.log1p(math.exp(-abs(x))) for x in z]
            want.append(sum(softplus) - z[y])
        else:
            want.append(max(z) + math.log(sum(math.exp(x - max(z)) for x in z)) - z[y])
    got_B = loss.per_example(logits_BC, targets_B).double()
    spacing = torch.finfo(dtype).eps * 1e4  # of neighbouring floats at 1e4: what adding a shift may lose
    torch.testing.assert_close(got_B, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=2 * spacing)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_loss
def test_half_precision_logits_are_computed_in_float32(name, dtype):
    """The logits may be rounded; nothing after them is: bfloat16 arithmetic would be wrong in the third digit."""
    loss, brute_force = CASES[name]
    logits_BC, targets_B = example_batch(dtype)
    want = sum(brute_force(logits_BC.double(), targets_B)) / 11
    for inside_autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside_autocast):
            value, gradient_BC = value_and_gradient(loss, logits_BC, targets_B)
        assert value.dtype == torch.float32 and gradient_BC.dtype == dtype
        assert value.item() == pytest.approx(want, rel=2e-6)


def test_autocast_of_a_linear_head_reaches_the_loss_in_float32():
    torch.manual_seed(0)
    head, features = torch.nn.Linear(8, 5), torch.randn(16, 8)
    targets_B = torch.arange(16) % 5
    with torch.autocast("cpu", torch.bfloat16):
        logits_BC = head(features)
        assert logits_BC.dtype == torch.bfloat16  # else this test would show nothing
        losses_B = BalancedSoftmaxLoss(COUNTS).per_example(logits_BC, targets_B)
    assert losses_B.dtype == torch.float32
    want_B = torch.tensor(softmax_terms(logits_BC.double(), targets_B, COUNTS), dtype=torch.float64)
    torch.testing.assert_close(losses_B.double(), want_B, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", [BalancedSoftmaxLoss, BalancedSigmoidLoss])
@pytest.mark.parametrize("counts", [[5, 0, 3], [0, 1], [4, -1, 2]])
def test_a_class_without_images_is_refused_by_name(kind, counts):
    empty = [c for c, n in enumerate(counts) if n <= 0]
    with pytest.raises(ValueError, match=rf"\[{empty[0]}\]"):
        kind(counts)


@pytest.mark.parametrize("kind", [BalancedSoftmaxLoss, BalancedSigmoidLoss])
@pytest.mark.parametrize("counts", [[5, math.nan, 3], [5, math.inf, 3], []])
def test_counts_that_are_no_counts_are_refused(kind, counts):
    """A NaN is neither above nor below zero: it would make every loss one."""
    with pytest.raises(ValueError, match="one finite number a class"):
        kind(counts)


@pytest.mark.parametrize("kind", [BalancedSoftmaxLoss, BalancedSigmoidLoss])
@pytest.mark.parametrize("columns", [1, 4, 6])
def test_counts_of_other_classes_than_the_logits_are_refused(kind, columns):
    """One column would be broadcast, and the loss be quietly wrong."""
    with pytest.raises(ValueError, match=f"needs logits of 5 columns here, got {columns}: one a class$"):
        kind(COUNTS)(torch.zeros(2, columns), torch.tensor([0, 0]))


def test_balanced_sigmoid_needs_two_classes():
    with pytest.raises(ValueError, match="two classes"):
        BalancedSigmoidLoss([12])


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda c: torch.tensor(c, dtype=torch.float32)])
def test_counts_may_be_a_list_or_a_tensor_of_any_kind(kind):
    logits_BC, targets_B = example_batch()
    got = BalancedSoftmaxLoss(kind(COUNTS))(logits_BC, targets_B)
    assert got.item() == pytest.approx(sum(softmax_terms(logits_BC, targets_B, COUNTS)) / 11, rel=1e-11)


def test_class_counts_by_hand():
    counts_C = class_counts(torch.tensor([2, 0, 1, 2, 2, 0]))
    assert counts_C.tolist() == [2, 1, 3] and counts_C.dtype == torch.int64
    assert class_counts([1, 0, 0, 0], 2).tolist() == [3, 1]


@pytest.mark.parametrize(
    "labels, num_classes, words",
    [
        ([0, 1, 5], 3, "label 5 is out of range 0..2"),
        ([0, 1, 2, 3], 3, "label 3 is out of range 0..2"),
        ([0, 1, -1], 3, ">= 0"),
        ([0, 2, 2], None, r"\[1\]"),  # class 1 has no image
        ([0, 1], 4, r"\[2, 3\]"),  # the last two have none
        ([], 3, "non-empty"),
        ([0, 1, 10**13], 3, "label 10000000000000 is out of range 0..2"),  # 80 TB, were a count kept for each
        ([0, 1, 10**13], None, r"\[2, 3, 4, 5, 6, 7, 8, 9, 10, 11\]"),
        ([0, 2, 5, 12, 12], None, r"\[1, 3, 4, 6, 7, 8, 9, 10, 11\];"),
    ],
)
def test_class_counts_refuses(labels, num_classes, words):
    with pytest.raises(ValueError, match=words):
        class_counts(torch.tensor(labels, dtype=torch.int64), num_classes)


@pytest.mark.parametrize("labels", [[0.6, 1.7], [[0, 1], [1, 0]], 3])
def test_class_counts_are_of_a_vector_of_integers(labels):
    with pytest.raises(ValueError, match="vector of integers"):
        class_counts(labels)


def normalised(prior):
    return torch.tensor([p / sum(prior) for p in prior], dtype=torch.float64)


def test_implied_prior_of_raw_logits_by_hand():
    """design: the prior is law * exp(-offset). Three classes, 6 + 3 + 1 images; the class-balanced law is 1/3 each."""
    n = [6, 3, 1]
    on_data, balanced_law = normalised(n).log(), normalised([1, 1, 1]).log()
    expected = [
        (SoftmaxLoss(n), on_data, [6, 3, 1]),
        (SoftmaxLoss(n), balanced_law, [1, 1, 1]),
        (BalancedSoftmaxLoss(n), on_data, [1, 1, 1]),
        (BalancedSoftmaxLoss(n), balanced_law, [1 / 6, 1 / 3, 1]),
        (BalancedSoftmaxLoss(n, 0.5), on_data, [6**0.5, 3**0.5, 1]),
        (BalancedSigmoidLoss(n), on_data, [1, 1, 1]),
        (BalancedSigmoidLoss([4, 4, 4]), on_data, [6, 3, 1]),
    ]
    for loss, log_law_C, prior in expected:
        got_C = loss.implied_log_prior(log_law_C)
        torch.testing.assert_close(got_C.exp(), normalised(prior), rtol=1e-9, atol=1e-9)
        # A law that is not normalised is the same law: rates times counts need no normalising by the caller.
        torch.testing.assert_close(loss.implied_log_prior(log_law_C + 3.0), got_C, rtol=1e-9, atol=1e-9)


def test_counts_are_no_part_of_a_checkpoint():
    assert BalancedSoftmaxLoss(COUNTS).state_dict() == {} and BalancedSigmoidLoss(COUNTS).state_dict() == {}


def test_build_loss_by_name():
    logits_BC, targets_B = example_batch()
    for name, exponent, case in [
        ("softmax", 1.0, "softmax"),
        ("balanced", 1.0, "balanced"),
        ("balanced", 0.25, "balanced-quarter"),
        ("balanced-sigmoid", 1.0, "balanced-sigmoid"),
    ]:
        want = sum(CASES[case][1](logits_BC, targets_B)) / 11
        assert build_loss(name, COUNTS, exponent=exponent)(logits_BC, targets_B).item() == pytest.approx(want, rel=1e-11)


# The gradient written by hand, and the softmax across rows


@each_loss
@pytest.mark.parametrize("scale", [3.0, 1e4])
def test_the_gradient_by_hand_is_the_one_of_autograd(name, scale):
    loss, (logits_BC, targets_B) = CASES[name][0], example_batch(scale=scale)
    losses_B, gradient_BC = loss.with_gradient(logits_BC, targets_B)
    leaf = logits_BC.clone().requires_grad_()
    terms_B = loss.per_example(leaf, targets_B)
    (want_BC,) = torch.autograd.grad(terms_B.sum(), leaf)
    torch.testing.assert_close(losses_B, terms_B.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_BC, want_BC, rtol=1e-10, atol=1e-12)
    assert not gradient_BC.requires_grad


@pytest.mark.parametrize("classes", [2, 10, 23, 24, 100])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_log_softmax_is_torchs_own_whatever_the_number_of_classes(classes, scale):
    logits = scale * torch.randn(7, classes, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_softmax(logits), logits.log_softmax(1))
    torch.testing.assert_close(log_softmax(logits).exp().sum(1), torch.ones(7))
