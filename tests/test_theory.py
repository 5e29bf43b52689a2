"""Theorem 1 and what raw logits mean, on problems whose posteriors are known in closed form.

Gaussian classes with one covariance: a linear classifier can be exactly right, so what is fitted can be held against
Bayes' rule. A finite set of inputs with a free logit for each: the optimum of a loss on the whole population is exact.
"""

import math

import pytest
import torch

from balms_cli import BalancedSigmoidLoss, BalancedSoftmaxLoss, MetaSampler, SoftmaxLoss


def minimise(objective, parameters, steps=400):
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)


# Theorem 1

MEANS = torch.tensor([[1.2, 0.0], [-0.6, 1.0], [-0.6, -1.0]], dtype=torch.float64)
LONG_TAIL = [40_000, 4_000, 800]


def gaussian_posterior(x_ND, prior):
    """Bayes' rule for Gaussian classes of unit covariance: density times prior, divided by the sum."""
    density_NC = torch.exp(-0.5 * (x_ND[:, None, :] - MEANS).square().sum(2))
    joint_NC = density_NC * torch.tensor(prior, dtype=torch.float64)
    return joint_NC / joint_NC.sum(1, keepdim=True)


@pytest.fixture(scope="module")
def gaussian_draws():
    generator = torch.Generator().manual_seed(0)
    targets_N = torch.repeat_interleave(torch.arange(3), torch.tensor(LONG_TAIL))
    x_ND = MEANS[targets_N] + torch.randn(len(targets_N), 2, generator=generator, dtype=torch.float64)
    test_classes = torch.arange(3).repeat(1_000)
    test_MD = MEANS[test_classes] + torch.randn(3_000, 2, generator=generator, dtype=torch.float64)
    return x_ND, targets_N, test_MD, test_classes


@pytest.mark.parametrize("loss, recovered, other", [
    (BalancedSoftmaxLoss(LONG_TAIL), [1, 1, 1], LONG_TAIL),
    (SoftmaxLoss(LONG_TAIL), LONG_TAIL, [1, 1, 1]),
], ids=["balanced", "softmax"])  # fmt: skip
def test_theorem_1_on_gaussian_classes(gaussian_draws, loss, recovered, other):
    """On long-tailed draws softmax of raw logits is the balanced posterior; by the plain loss the long-tailed one."""
    x_ND, targets_N, test_MD, _ = gaussian_draws
    head = torch.nn.Linear(2, 3).double()
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    minimise(lambda: loss(head(x_ND), targets_N), head.parameters(), steps=60)
    with torch.no_grad():
        posterior_MC = head(test_MD).softmax(1)
    right, wrong = (
        (posterior_MC - gaussian_posterior(test_MD, prior)).abs().sum(1).mean().item() for prior in (recovered, other)
    )
    assert right < 0.03 and wrong > 0.4

    # The weights themselves: differences of the means, and of -|mean|^2 / 2 + log prior, to a few standard errors.
    bias_C = -0.5 * MEANS.square().sum(1) + torch.tensor(recovered, dtype=torch.float64).log()
    weight_gap = head.weight.detach() - head.weight.detach()[0] - (MEANS - MEANS[0])
    bias_gap = head.bias.detach() - head.bias.detach()[0] - (bias_C - bias_C[0])
    assert weight_gap.abs().max() < 0.2 and bias_gap.abs().max() < 0.25


def test_the_balanced_posterior_is_what_finds_the_tail(gaussian_draws):
    """The point of it: on balanced test data the raw logits of Balanced Softmax come within 1 % of Bayes' accuracy."""
    x_ND, targets_N, test_MD, test_classes = gaussian_draws
    accuracy = {}
    for loss in (SoftmaxLoss(), BalancedSoftmaxLoss(LONG_TAIL)):
        head = torch.nn.Linear(2, 3).double()
        minimise(lambda loss=loss, head=head: loss(head(x_ND), targets_N), head.parameters(), steps=60)
        accuracy[type(loss)] = (head(test_MD).argmax(1) == test_classes).double().mean().item()
    bayes = (gaussian_posterior(test_MD, [1, 1, 1]).argmax(1) == test_classes).double().mean().item()
    assert accuracy[BalancedSoftmaxLoss] > bayes - 0.01 and accuracy[SoftmaxLoss] < bayes - 0.1


# What raw logits mean

COUNTS = [600, 90, 25, 6]
THETA = [-1.5, 0.4, 1.0, 2.0]
RATES = [1 / (1 + math.exp(-t)) for t in THETA]
# p(x | y), four classes (rows) on six inputs.
LIKELIHOOD = torch.tensor(
    [
        [0.40, 0.25, 0.15, 0.10, 0.06, 0.04],
        [0.05, 0.35, 0.25, 0.15, 0.10, 0.10],
        [0.10, 0.10, 0.10, 0.40, 0.20, 0.10],
        [0.02, 0.08, 0.20, 0.10, 0.25, 0.35],
    ],
    dtype=torch.float64,
)


def normalised(prior):
    return torch.tensor([p / sum(prior) for p in prior], dtype=torch.float64)


def population_optimum(loss, law_C):
    """The free table of logits [X, C] that minimises the loss: classes come by ``law_C``, inputs by p(x | y)."""
    logits_XC = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    weights_CX = law_C[:, None] * LIKELIHOOD

    def objective():
        of_class = [loss.per_example(logits_XC, torch.full((6,), y)) for y in range(4)]
        return (weights_CX * torch.stack(of_class)).sum()

    minimise(objective, [logits_XC])
    return logits_XC.detach()


def sampler_law():
    sampler = MetaSampler(COUNTS).double()
    with torch.no_grad():
        sampler.theta.copy_(torch.tensor(THETA, dtype=torch.float64))
    return sampler.log_law


ON_DATA, CLASS_BALANCED = normalised(COUNTS), normalised([1, 1, 1, 1])
META = normalised([n * r for n, r in zip(COUNTS, RATES, strict=True)])
TABLE = {  # loss, law of the draws, and the prior that raw logits are then right for, each written by hand
    "softmax": (SoftmaxLoss(), ON_DATA, COUNTS),
    "balanced": (BalancedSoftmaxLoss(COUNTS), ON_DATA, [1, 1, 1, 1]),
    "balanced+cbs": (BalancedSoftmaxLoss(COUNTS), CLASS_BALANCED, [1 / n for n in COUNTS]),
    "softmax+meta": (SoftmaxLoss(), META, [n * r for n, r in zip(COUNTS, RATES, strict=True)]),
    "balanced+meta": (BalancedSoftmaxLoss(COUNTS), META, RATES),
    "softmax+cbs": (SoftmaxLoss(), CLASS_BALANCED, [1, 1, 1, 1]),
    "quarter": (BalancedSoftmaxLoss(COUNTS, 0.25), ON_DATA, [n**0.75 for n in COUNTS]),
}


@pytest.mark.parametrize("setup", TABLE)
def test_raw_logits_are_right_for_the_stated_prior(setup):
    loss, law_C, prior = TABLE[setup]
    joint_XC = LIKELIHOOD.T * normalised(prior)
    posterior_XC = joint_XC / joint_XC.sum(1, keepdim=True)
    fitted_XC = population_optimum(loss, law_C).softmax(1)
    torch.testing.assert_close(fitted_XC, posterior_XC, rtol=1e-4, atol=1e-5)

    log_law_C = sampler_law() if setup.endswith("meta") else law_C.log()
    torch.testing.assert_close(loss.implied_log_prior(log_law_C).exp(), normalised(prior), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("setup", ["softmax", "balanced+cbs", "softmax+meta", "balanced+meta", "quarter"])
def test_taking_the_implied_prior_off_gives_the_balanced_posterior(setup):
    """What re-scoring for a target prior does: add log target - log implied; here the target is uniform."""
    loss, law_C, _ = TABLE[setup]
    rescored_XC = (population_optimum(loss, law_C) - loss.implied_log_prior(law_C.log())).softmax(1)
    balanced_XC = LIKELIHOOD.T / LIKELIHOOD.T.sum(1, keepdim=True)
    torch.testing.assert_close(rescored_XC, balanced_XC, rtol=1e-4, atol=1e-5)


def test_balanced_sigmoid_gives_k_binary_posteriors_with_prior_one_over_k():
    """Eqs 15-23: the sigmoid of a raw logit is right where a class has prior 1/k and the rest keep their shares."""
    fitted_XC = population_optimum(BalancedSigmoidLoss(COUNTS), ON_DATA).sigmoid()
    for c in range(4):
        others = [j for j in range(4) if j != c]
        rest_X = sum(COUNTS[j] * LIKELIHOOD[j] for j in others) / sum(COUNTS[j] for j in others)
        want_X = LIKELIHOOD[c] / 4 / (LIKELIHOOD[c] / 4 + rest_X * 3 / 4)
        torch.testing.assert_close(fitted_XC[:, c], want_X, rtol=1e-4, atol=1e-5)


def test_weight_of_a_minority_example_at_imbalance_100():
    """The gradient of a well-fitted example over that of plain softmax, minority over majority: 100^2, with CBS 100^3.

    (The text's own algebra, eqs 71-78, gives 100 and 100^2.)
    """
    counts = [100, 1]
    weight = {}
    for y in (0, 1):
        logits_BC = torch.zeros(1, 2, dtype=torch.float64)
        logits_BC[0, y] = 20.0  # the probability of the right class is close to one, before and after the shift
        slope = []
        for loss in (BalancedSoftmaxLoss(counts), SoftmaxLoss()):
            z = logits_BC.clone().requires_grad_()
            slope.append(torch.autograd.grad(loss(z, torch.tensor([y])), z)[0][0, y])
        weight[y] = (slope[0] / slope[1]).item()
    on_data = weight[1] / weight[0]
    assert on_data == pytest.approx(1e4, rel=1e-4)
    # CBS draws an example of class c with probability (1/2) / n_c instead of 1 / N.
    assert on_data * (0.5 / counts[1]) / (0.5 / counts[0]) == pytest.approx(1e6, rel=1e-4)
