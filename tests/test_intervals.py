"""Intervals: closed forms against SciPy, the bootstrap against resampled images, and coverage by simulation."""

import numpy as np
import pytest
from scipy.stats import binomtest

from balms_cli.metrics.accuracy import metric_weights
from balms_cli.metrics.intervals import accuracy_intervals, paired_intervals, resample, wilson

from .report_helpers import long_tail


def test_wilson_is_scipys_at_every_count():
    for n in (1, 2, 5, 40):
        for hits in range(n + 1):
            theirs = binomtest(hits, n).proportion_ci(0.95, "wilson")
            assert [float(end) for end in wilson(hits, n)] == pytest.approx([theirs.low, theirs.high], abs=1e-12)
    low, high = wilson(np.array([0, 3]), np.array([0, 3]))
    assert np.isnan([low[0], high[0]]).all() and high[1] == 1


def test_draws_are_those_of_images_resampled_one_by_one():
    """n - 1 of a class's n images, with replacement, the image's outcome for both runs kept together."""
    n, gained, lost = np.array([12, 4, 30]), np.array([5, 1, 0]), np.array([2, 1, 12])
    weights = np.array([[0.2, 0.0], [0.5, 1.0], [0.3, 0.0]])
    found = resample(n, gained, lost, np.array(["many", "few", "few"]), weights, 20_000, 0)
    rng = np.random.default_rng(7)
    images = [np.repeat([1, -1, 0], [g, b, m - g - b]) for m, g, b in zip(n, gained, lost, strict=True)]
    drawn = np.stack([rng.choice(x, (20_000, len(x) - 1)).mean(1) for x in images], axis=1) @ weights
    assert found.mean(0) == pytest.approx(weights.T @ ((gained - lost) / n), abs=0.01)
    assert found.std(0) == pytest.approx(drawn.std(0), rel=0.03)
    for q in (0.025, 0.25, 0.75, 0.975):
        assert np.quantile(found, q, axis=0) == pytest.approx(np.quantile(drawn, q, axis=0), abs=0.02)
    assert np.corrcoef(found.T)[0, 1] == pytest.approx(np.corrcoef(drawn.T)[0, 1], abs=0.03)  # one draw for all metrics


def test_the_spread_is_that_of_the_unbiased_variance():
    n, hits = np.array([5, 8, 40]), np.array([2, 6, 10])
    weights = np.full((3, 1), 1 / 3)
    drawn = resample(n, hits, 0 * hits, np.array(["few"] * 3), weights, 50_000, 1)
    p = hits / n
    assert drawn.std() ** 2 == pytest.approx((p * (1 - p) / (n - 1)).sum() / 9, rel=0.03)


def test_many_classes_drawn_together_spread_as_each_by_itself(monkeypatch):
    """400 classes of all sizes and accuracies; five of them make a figure of their own."""
    rng = np.random.default_rng(5)
    n = rng.integers(3, 40, 400)
    gained = rng.binomial(n, rng.uniform(0, 0.6, 400))
    lost = rng.binomial(n - gained, 0.3)
    weights = np.stack([n / n.sum(), np.full(400, 1 / 400), np.where(np.arange(400) < 5, 0.2, 0)], axis=1)
    ask = (n, gained, lost, np.array(["few"] * 400), weights, 4000, 0)
    each = resample(*ask)
    monkeypatch.setattr("balms_cli.metrics.intervals._MOST_ROWS", 100)
    together = resample(*ask)
    assert not np.array_equal(together, each)
    error = each.std(0)
    assert (np.abs(together.mean(0) - each.mean(0)) < 0.1 * error).all()
    assert together.std(0) == pytest.approx(error, rel=0.05)
    assert np.corrcoef(together.T) == pytest.approx(np.corrcoef(each.T), abs=0.06)
    for q in (0.025, 0.975):
        assert (np.abs(np.quantile(together, q, axis=0) - np.quantile(each, q, axis=0)) < 0.15 * error).all()


def test_two_images_of_a_class_that_agree_are_no_proof_that_all_do():
    """12 classes of two images, in each both right or both wrong: alone each would show no spread at all."""
    hits = np.where(np.arange(12) % 2, 2, 0)
    drawn = resample(np.full(12, 2), hits, 0 * hits, np.array(["few"] * 12), np.full((12, 1), 1 / 12), 50_000, 0)
    assert drawn.mean() == pytest.approx(0.5, abs=0.005) and drawn.std() == pytest.approx((0.25 / 24) ** 0.5, rel=0.02)


def test_classes_of_one_image_take_the_spread_of_their_group():
    """20 classes, an image each, 8 right: as if 20 images of one class were drawn anew."""
    hits = np.arange(20) < 8
    drawn = resample(np.ones(20, int), hits.astype(int), np.zeros(20, int), np.array(["few"] * 20), np.full((20, 1), 0.05),
                     50_000, 0)  # fmt: skip
    assert drawn.mean() == pytest.approx(0.4, abs=0.005) and drawn.std() == pytest.approx((0.4 * 0.6 / 20) ** 0.5, rel=0.02)
    two = resample(np.array([1, 9]), np.array([1, 0]), np.zeros(2, int), np.array(["few", "many"]), np.eye(2), 1000, 0)
    assert (two[:, 0] == 1).all()  # alone in its group: nothing is known of its spread; Wilson stands there


def test_too_few_right_or_wrong_images_take_the_closed_form():
    n = np.full(4, 10)
    found = accuracy_intervals([300, 200, 50, 5], n, n, n)
    assert found["top1"] == (1, pytest.approx(binomtest(40, 40).proportion_ci(0.95, "wilson").low), 1)
    assert found["many"][1] == pytest.approx(binomtest(20, 20).proportion_ci(0.95, "wilson").low)
    assert found["few"][1] == pytest.approx(binomtest(10, 10).proportion_ci(0.95, "wilson").low)
    assert found["top5"] is None
    none = paired_intervals([300, 200, 50, 5], n, (0 * n, 0 * n), (0 * n, 0 * n))["top1"]
    half = 1.959964 * (2 / 42 / 42) ** 0.5  # Bonett and Price: one image added to each side, two to the total
    assert none == (0, pytest.approx(-half), pytest.approx(half))


@pytest.mark.parametrize("hits, closed", [(4, True), (5, False), (195, False), (196, True)])
def test_under_five_right_or_wrong_images_the_draws_are_not_trusted(hits, closed):
    """200 images of 20 classes, the few in classes of their own."""
    n, few = np.full(20, 10), (np.arange(20) < min(hits, 200 - hits)).astype(int)
    found = accuracy_intervals([50] * 20, n, few if hits < 100 else n - few, n)["top1"]
    low, high = wilson(hits, 200)
    assert found[0] == pytest.approx(hits / 200)
    assert (found[1:] == pytest.approx((float(low), float(high)), abs=1e-9)) == closed


def test_empty_metrics_are_none_and_intervals_hold_their_value_in_bounds():
    rng = np.random.default_rng(3)
    for _ in range(30):
        k = int(rng.integers(1, 9))
        counts, n = rng.integers(1, 200, k).tolist(), rng.integers(0, 6, k)
        n[0] = max(n[0], 1)
        hits = rng.binomial(n, rng.random(k))
        found = accuracy_intervals(counts, n, hits, hits, draws=100)
        weights = metric_weights(counts, n)
        for metric, bounds in found.items():
            assert (bounds is None) == (weights[metric] is None)
            assert bounds is None or 0 <= bounds[1] <= bounds[0] <= bounds[2] <= 1
        lost = rng.binomial(n - hits, 0.5)
        for bounds in paired_intervals(counts, n, (hits, lost), (hits, lost), draws=100).values():
            assert bounds is None or -1 <= bounds[1] <= bounds[0] <= bounds[2] <= 1


def test_the_same_numbers_every_time():
    n, hits = np.array([50, 40, 30]), np.array([40, 20, 7])
    ask = ([200, 50, 5], n, hits, hits)
    assert accuracy_intervals(*ask) == accuracy_intervals(*ask) != accuracy_intervals(*ask, seed=1)


COUNTS = long_tail(10)
SETTINGS = {  # test images a class, accuracy of each class
    "as CIFAR-10": (np.full(10, 100), np.linspace(0.95, 0.05, 10)),
    "few images": (np.full(10, 6), np.linspace(0.95, 0.1, 10)),
    "one image a class": (np.ones(120, int), np.linspace(0.95, 0.05, 120)),
    "of all sizes": (np.array([60, 40, 25, 15, 10, 5, 3, 2, 1, 1]), np.linspace(0.95, 0.1, 10)),
}


def covered(setting: str, trials: int, paired: bool) -> dict[str, float]:
    """How often the interval of a simulated test set holds the truth, a metric each."""
    n, p = SETTINGS[setting]
    counts = long_tail(len(n))
    weights = metric_weights(counts, n)
    gain, loss = (0.4 * (1 - p), 0.3 * p) if paired else (p, 0 * p)
    rng = np.random.default_rng(11)
    outcomes = [rng.multinomial(m, [g, b, 1 - g - b], trials) for m, g, b in zip(n, gain, loss, strict=True)]
    gained, lost = (np.stack([one[:, i] for one in outcomes], axis=1) for i in (0, 1))
    metrics = [m for m in weights if weights[m] is not None and m != "top5"]
    held = dict.fromkeys(metrics, 0)
    for t in range(trials):
        ask = (counts, n, (gained[t], lost[t]), (0 * n, 0 * n)) if paired else (counts, n, gained[t], 0 * n)
        found = (paired_intervals if paired else accuracy_intervals)(*ask, draws=500, seed=t)
        for metric in metrics:
            truth = weights[metric] @ (gain - loss)
            held[metric] += found[metric][1] - 1e-12 <= truth <= found[metric][2] + 1e-12
    return {metric: count / trials for metric, count in held.items()}


@pytest.mark.parametrize("paired", [False, True], ids=["single", "paired"])
@pytest.mark.parametrize("setting", ["as CIFAR-10", "few images"])
def test_nineteen_intervals_in_twenty_hold_the_truth(setting, paired):
    """400 simulated test sets: 0.95 has a standard error of 0.011."""
    found = covered(setting, 400, paired)
    assert all(share >= 0.90 for share in found.values()), found
    assert np.mean(list(found.values())) >= 0.93, found


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True], ids=["single", "paired"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_coverage_with_more_trials(setting, paired):
    found = covered(setting, 3000, paired)
    # One image a class: the rarest three are three images. Of all sizes: classes of one or two images weigh a tenth each.
    least = {"one image a class": 0.80, "of all sizes": 0.86}.get(setting, 0.90)
    assert all(share >= least for share in found.values()), found
    assert found["top1"] >= 0.915, found
    if setting == "as CIFAR-10":  # many images: not wider than need be either
        assert all(share <= 0.975 for share in found.values()), found


def test_classes_that_are_all_right_or_all_wrong_do_not_make_an_interval_of_no_width():
    """Six images each of three classes, one right throughout: the draws have no spread, and 6 of 18 has Wilson's."""
    tested, hits, none = np.array([6, 6, 6]), np.array([6, 0, 0]), np.zeros(3, int)
    found = accuracy_intervals([50, 50, 50], tested, hits, hits)["medium"]
    low, high = wilson(6, 18)
    assert found == pytest.approx((1 / 3, float(low), float(high)))
    difference = paired_intervals([50, 50, 50], tested, (np.array([6, 6, 0]), none), (none, none))["medium"]
    assert difference[0] == pytest.approx(2 / 3) and difference[1] < 0.6 and difference[2] > 0.75
