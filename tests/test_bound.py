"""Optimal margins and the terms of eq 28: by hand, by double loop, and against random margins of the same sum."""

import json
import math

import numpy as np
import pytest

from balms_cli.bound import LOG2, bound_terms, optimal_margins

LONG_TAIL = [500, 120, 40, 7, 2]


def losses_and_labels(counts, seed=0):
    """As many images a class as counted, in mixed order, rarer classes with larger losses."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return rng.exponential(0.3 + 0.3 * labels), labels


def numbers(value):
    """Every number anywhere in the result."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


# Margins


def test_margins_by_hand():
    # fourth roots 1, 2, 4, so the shares are 1, 1/2, 1/4 of 7/4
    assert optimal_margins([1, 16, 256]) == pytest.approx([4 / 7, 2 / 7, 1 / 7], rel=1e-12)
    assert optimal_margins([1, 16, 256], total=3.5) == pytest.approx([2, 1, 0.5], rel=1e-12)
    assert optimal_margins([9]) == pytest.approx([1])


def test_margins_are_even_for_even_counts_and_grow_with_rarity():
    assert optimal_margins([37] * 8, total=2) == pytest.approx([0.25] * 8, rel=1e-12)
    margins = optimal_margins(LONG_TAIL)
    assert (np.diff(margins) > 0).all() and margins.sum() == pytest.approx(1, rel=1e-12)


def test_scaling_the_counts_changes_no_margin():
    assert optimal_margins(np.multiply(LONG_TAIL, 1000)) == pytest.approx(optimal_margins(LONG_TAIL), rel=1e-12)


@pytest.mark.parametrize("beta", [0.2, 1.0, 6.0])
def test_no_other_margins_of_the_same_sum_have_a_smaller_complexity(beta):
    counts = np.array(LONG_TAIL, dtype=float)
    rng = np.random.default_rng(1)

    def complexity(margins):
        return (4 / (margins * np.sqrt(counts))).sum(-1)

    best = optimal_margins(LONG_TAIL, beta)
    least = complexity(best)
    assert least == pytest.approx(4 * (counts**-0.25).sum() ** 2 / beta, rel=1e-12)  # what Cauchy-Schwarz promises
    anywhere = beta * rng.dirichlet(np.ones(5), 20_000)
    nearby = best * np.exp(0.03 * rng.normal(size=(20_000, 5)))
    nearby *= beta / nearby.sum(1, keepdims=True)
    assert complexity(anywhere).min() > least and complexity(nearby).min() > least
    assert complexity(nearby).min() < 1.001 * least  # near enough for the comparison to bite


def test_descent_from_equal_margins_ends_at_the_optimal_ones():
    counts = np.array(LONG_TAIL, dtype=float)
    scores = np.zeros(5)  # margins are a softmax of the scores, so that their sum stays 1
    for _ in range(4000):
        margins = np.exp(scores) / np.exp(scores).sum()
        slope = -1 / (margins**2 * np.sqrt(counts))
        scores -= 0.1 * margins * (slope - (margins * slope).sum())
    assert margins == pytest.approx(optimal_margins(LONG_TAIL), rel=1e-6)


@pytest.mark.parametrize("counts, total", [
    ([3, 0], 1), ([3, -1], 1), ([3, math.nan], 1), ([3, math.inf], 1), ([3, 1.5], 1), ([], 1), ([[3, 4]], 1),
    ([3, 4], 0), ([3, 4], -1), ([3, 4], math.inf), ([3, 4], math.nan),
])  # fmt: skip
def test_margins_refuse(counts, total):
    with pytest.raises(ValueError):
        optimal_margins(counts, total)
    with pytest.raises(ValueError):
        bound_terms([0.1], [0], counts, total=total)


# Terms


def test_terms_by_hand():
    # counts 16 and 1: fourth roots 2 and 1, margins 1/3 and 2/3 of 1.5
    losses = [0.25, 0.75, 1.5, 3.0, 0.3]
    found = bound_terms(losses, [0, 0, 0, 0, 1], [16, 1], total=1.5, threshold=1.0, delta=0.1)
    head, tail = found["per_class"]
    assert (head["gamma"], tail["gamma"]) == (pytest.approx(0.5), pytest.approx(1.0))
    assert (head["n"], head["images"], tail["n"], tail["images"]) == (16, 4, 1, 1)
    # f = 0.75, 0.25, -0.5, -2: two under 0, three under a half
    assert (head["error"], head["margin_error"]) == (0.5, 0.75)
    assert head["margin_quantiles"]["q50"] == pytest.approx(-0.125) and head["margin_quantiles"]["q75"] == pytest.approx(0.375)
    assert head["margin_quantiles"]["q5"] == pytest.approx(-2 + 0.15 * 1.5)
    # f = 0.7: right at t, yet under its margin of 1
    assert (tail["error"], tail["margin_error"]) == (0.0, 1.0)
    assert list(tail["margin_quantiles"]) == ["q5", "q25", "q50", "q75", "q95"]
    assert list(tail["margin_quantiles"].values()) == pytest.approx([0.7] * 5)
    assert (head["complexity"], tail["complexity"]) == (pytest.approx(4 / 0.5 / 4), pytest.approx(4.0))
    assert found["gamma_equal"] == 0.75
    assert (head["complexity_equal"], tail["complexity_equal"]) == (pytest.approx(4 / 3), pytest.approx(16 / 3))
    assert found["complexity_ratio"] == pytest.approx((2 + 4) / (4 / 3 + 16 / 3))
    # B = |3 - 1| = 2: 4 B / gamma is 16 and 8, whose log2 are 4 and 3; delta of one class is 0.05
    assert found["loss_range"] == found["loss_range_observed"] == 2 and "observed" in found["loss_range_source"]
    assert head["epsilon"] == pytest.approx(math.sqrt(math.log(4) / 16) + math.sqrt(math.log(20) / 32))
    assert tail["epsilon"] == pytest.approx(math.sqrt(math.log(3)) + math.sqrt(math.log(20) / 2))
    mean = found["mean"]
    assert (mean["error"], mean["margin_error"], mean["complexity"]) == (0.25, 0.875, pytest.approx(3))
    assert mean["epsilon"] == pytest.approx((head["epsilon"] + tail["epsilon"]) / 2)
    assert mean["margin_quantiles"]["q50"] == pytest.approx((-0.125 + 0.7) / 2)
    assert (found["classes"], found["images"], found["images_match_counts"]) == (2, 5, False)
    assert (found["beta"], found["delta"], found["delta_per_class"], found["threshold"]) == (1.5, 0.1, 0.05, 1.0)


def test_terms_by_double_loop():
    losses, labels = losses_and_labels(LONG_TAIL)
    found = bound_terms(losses, labels, LONG_TAIL, total=0.8, delta=0.01, loss_range=25)
    assert found["images_match_counts"] and found["loss_range"] == 25 and "given" in found["loss_range_source"]
    assert found["threshold"] == LOG2 == math.log(2)
    largest = max(abs(loss - math.log(2)) for loss in losses)
    assert found["loss_range_observed"] == pytest.approx(largest, rel=1e-12)
    for c, row in enumerate(found["per_class"]):
        wrong = wrong_by_margin = 0
        margins = []
        for loss, label in zip(losses, labels, strict=True):
            if label == c:
                margins.append(math.log(2) - loss)
                wrong += margins[-1] < 0
                wrong_by_margin += margins[-1] < row["gamma"]
        n = LONG_TAIL[c]
        assert (row["n"], row["images"]) == (n, len(margins)) == (n, n)
        assert (row["error"], row["margin_error"]) == (pytest.approx(wrong / n), pytest.approx(wrong_by_margin / n))
        assert row["margin_quantiles"]["q50"] == pytest.approx(np.median(margins))
        assert min(margins) <= row["margin_quantiles"]["q5"] <= row["margin_quantiles"]["q95"] <= max(margins)
        assert row["gamma"] == pytest.approx(optimal_margins(LONG_TAIL, 0.8)[c])
        assert row["complexity"] == pytest.approx(4 / row["gamma"] / n**0.5)
        logs = math.log(math.log(100 / row["gamma"], 2)), math.log(5 / 0.01)
        assert row["epsilon"] == pytest.approx((logs[0] / n) ** 0.5 + (logs[1] / 2 / n) ** 0.5)
        assert row["epsilon_missing"] is None
    for column in ("n", "images", "gamma", "error", "margin_error", "complexity", "complexity_equal", "epsilon"):
        assert found["mean"][column] == pytest.approx(sum(row[column] for row in found["per_class"]) / 5)


def test_a_margin_error_is_never_under_the_error_and_equals_it_for_tiny_margins():
    losses, labels = losses_and_labels(LONG_TAIL)
    wide, narrow = (bound_terms(losses, labels, LONG_TAIL, total=total) for total in (2, 1e-9))
    assert all(row["margin_error"] >= row["error"] for row in wide["per_class"])
    assert wide["mean"]["margin_error"] > wide["mean"]["error"]
    assert [row["margin_error"] for row in narrow["per_class"]] == [row["error"] for row in wide["per_class"]]


def test_an_image_just_at_the_threshold_is_no_error():
    (row,) = bound_terms([0.5, 0.5, 2.0], [0, 0, 0], [3], total=1, threshold=0.5)["per_class"]
    assert row["error"] == pytest.approx(1 / 3) and row["margin_error"] == 1
    (row,) = bound_terms([0.5, 1.0, 2.0], [0, 0, 0], [3], total=0.5, threshold=1)["per_class"]
    assert row["margin_error"] == pytest.approx(2 / 3)  # f = gamma is enough


def test_at_log_2_the_error_covers_every_wrong_top_1():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 5, 400)
    logits = rng.normal(size=(400, 5)) + 2 * np.eye(5)[labels]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(400), labels]
    wrong = logits.argmax(1) != labels
    found = bound_terms(losses, labels, np.bincount(labels))
    for c, row in enumerate(found["per_class"]):
        assert row["error"] >= wrong[labels == c].mean() > 0
    assert not wrong[losses < LOG2].any()


def test_equal_counts_gain_nothing_and_a_long_tail_does():
    losses, labels = losses_and_labels([10, 10, 10])
    even = bound_terms(losses, labels, [10, 10, 10])
    assert even["complexity_ratio"] == pytest.approx(1, rel=1e-12)
    assert [r["complexity"] for r in even["per_class"]] == pytest.approx([r["complexity_equal"] for r in even["per_class"]])
    tail = bound_terms(*losses_and_labels(LONG_TAIL), LONG_TAIL)
    roots = np.array(LONG_TAIL, dtype=float) ** -0.25
    assert tail["complexity_ratio"] == pytest.approx(roots.sum() ** 2 / (5 * (roots**2).sum()), rel=1e-12)
    assert tail["complexity_ratio"] < 0.9


def test_delta_is_shared_out_among_the_classes():
    losses = [0.1, 5.0]
    one = bound_terms(losses, [0, 0], [2], delta=0.02, loss_range=50, total=1)["per_class"][0]
    four = bound_terms(losses, [0, 0], [2, 2, 2, 2], delta=0.08, loss_range=50, total=4)["per_class"][0]
    assert four["gamma"] == pytest.approx(one["gamma"]) and four["epsilon"] == pytest.approx(one["epsilon"], rel=1e-12)


def test_the_result_is_plain_json_and_holds_no_sum_of_the_terms():
    losses, labels = losses_and_labels(LONG_TAIL)
    counts = np.array(LONG_TAIL)
    found = bound_terms(losses.astype(np.float32), labels.astype(np.int32), counts, total=np.float32(1), delta=np.float64(0.1))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "not to be added up" in found["note"] and "C(F) is not known" in found["note"]
    keys = {*found, *found["mean"], *found["per_class"][0]}
    assert not [key for key in keys if "bound" in key or "total" in key or "sum" in key]
    shown = np.array(numbers(found))
    for row in [*found["per_class"], found["mean"]]:
        for error in ("margin_error", "error"):
            for terms in (
                [error, "complexity", "epsilon"],
                [error, "epsilon"],
                ["complexity", "epsilon"],
                [error, "complexity"],
            ):
                whole = sum(row[term] for term in terms)
                if whole not in [row[term] for term in terms]:  # an error of 0 adds nothing
                    assert np.abs(shown - whole).min() > 1e-9 * whole


# What is missing


def test_a_class_without_images_is_none_where_images_are_asked_for():
    losses, labels = [0.2, 0.9, 4.0], [0, 0, 2]
    found = bound_terms(losses, labels, [2, 5, 1])
    empty = found["per_class"][1]
    assert (empty["n"], empty["images"], empty["error"], empty["margin_error"]) == (5, 0, None, None)
    assert set(empty["margin_quantiles"].values()) == {None}
    assert empty["epsilon"] is None and "no images" in empty["epsilon_missing"]
    assert empty["gamma"] == pytest.approx(optimal_margins([2, 5, 1])[1]) and empty["complexity"] > 0
    assert found["per_class"][2]["error"] == 1.0 and found["per_class"][0]["error"] == 0.5
    mean = found["mean"]  # eq 28 averages over all classes
    assert mean["error"] is mean["margin_error"] is mean["epsilon"] is mean["margin_quantiles"]["q50"] is None
    assert mean["complexity"] > 0 and found["complexity_ratio"] < 1 and not found["images_match_counts"]
    assert bound_terms(losses, labels, [2, 5, 1], loss_range=9)["per_class"][1]["epsilon"] > 0  # a given B covers it
    json.dumps(found, allow_nan=False)


def test_no_images_at_all_leaves_what_the_counts_say():
    found = bound_terms([], [], [4, 1])
    assert found["loss_range"] is found["loss_range_observed"] is None and found["images"] == 0
    assert found["mean"]["complexity"] > 0 and found["mean"]["epsilon"] is None
    json.dumps(found, allow_nan=False)


def test_a_b_too_small_for_the_margin_gives_no_epsilon_and_says_why():
    # counts 16 and 1 with beta 6: margins 2 and 4; B = 1.5 is over half of the first and under half of the second
    found = bound_terms([2.5, 0.5], [0, 1], [16, 1], total=6, threshold=1.0)
    head, tail = found["per_class"]
    assert head["epsilon"] == pytest.approx(math.sqrt(math.log(math.log2(3)) / 16) + math.sqrt(math.log(40) / 32))
    assert tail["epsilon"] is None and "4 B / gamma is 1.5" in tail["epsilon_missing"]
    assert tail["margin_error"] == 1  # a margin over 2 B is reached by no image
    assert found["mean"]["epsilon"] is None
    (edge,) = bound_terms([2.0], [0], [4], total=2, threshold=1.0)["per_class"]  # 4 B / gamma = 2: log(log2(2)) = 0
    assert edge["epsilon"] == pytest.approx(math.sqrt(math.log(20) / 8))
    (still,) = bound_terms([1.0], [0], [1], threshold=1.0)["per_class"]  # B = 0
    assert still["epsilon"] is None and still["epsilon_missing"]


@pytest.mark.parametrize("changed, told", [
    ({"threshold": 0}, "threshold"), ({"threshold": math.inf}, "threshold"), ({"delta": 0}, "delta"), ({"delta": 1}, "delta"),
    ({"delta": math.nan}, "delta"), ({"loss_range": 0}, "loss_range"), ({"loss_range": math.nan}, "loss_range"),
    ({"loss_range": 2.0}, "loss_range 2 is not B"), ({"losses_N": [0.1, math.nan, 3]}, "finite"),
    ({"losses_N": [0.1, math.inf, 3]}, "finite"), ({"losses_N": [-0.1, 1, 3]}, "not under 0"),
    ({"losses_N": [0.1, 3]}, "shapes"), ({"losses_N": [[0.1, 1, 3]], "labels_N": [[0, 1, 1]]}, "shapes"),
    ({"labels_N": [0, 1, 2]}, "labels go"), ({"labels_N": [0, -1, 1]}, "labels go"),
    ({"labels_N": [0.0, 1.0, 1.0]}, "integers"),
])  # fmt: skip
def test_terms_refuse(changed, told):
    good = {"losses_N": [0.1, 1.0, 3.0], "labels_N": [0, 1, 1], "class_counts": [1, 2]}
    bound_terms(**good)
    with pytest.raises(ValueError, match=told):
        bound_terms(**good | changed)


def test_a_float32_zero_slightly_under_zero_is_taken_and_b_may_be_the_observed_one():
    bound_terms(np.array([-1e-7, 2], dtype=np.float32), [0, 0], [2])
    losses, labels = losses_and_labels(LONG_TAIL)
    first = bound_terms(losses, labels, LONG_TAIL)
    again = bound_terms(losses, labels, LONG_TAIL, loss_range=first["loss_range_observed"])
    assert again["per_class"] == first["per_class"]
