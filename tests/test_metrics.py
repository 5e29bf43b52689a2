"""Figures by hand, by brute force and against scikit-learn; gates."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from balms_cli.data.longtail import shot_groups
from balms_cli.errors import ConfigError
from balms_cli.metrics import Gate, Scores, summarise
from balms_cli.metrics.accuracy import SCALARS, metric_weights
from balms_cli.metrics.calibration import calibration
from balms_cli.metrics.confusion import confused_pairs, group_confusion, marginal
from balms_cli.metrics.tail import gini, head_share

COUNTS = [500, 300, 150, 101, 100, 60, 20, 19, 10, 5, 3, 2]
NAMES = [f"c{i}" for i in range(12)]


@pytest.fixture
def scored():
    """500 images of 12 classes: logits [500, 12] and labels [500]."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, 500)
    return rng.normal(size=(500, 12)) + 1.5 * np.eye(12)[labels], labels


def found_of(logits, labels, classes, counts):
    return summarise(Scores.of(logits, labels), labels, classes, counts)


def test_against_scikit_learn_on_random_scores(scored):
    logits, labels = scored
    found = found_of(logits, labels, NAMES, COUNTS)
    assert found["top1"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))
    accuracy = [(logits.argmax(1)[labels == c] == c).mean() for c in range(12)]
    assert found["many"] == pytest.approx(np.mean(accuracy[:4]))  # over 100
    assert found["medium"] == pytest.approx(np.mean(accuracy[4:7]))  # 20 to 100
    assert found["few"] == pytest.approx(np.mean(accuracy[7:]))  # under 20
    assert found["rarest3"] == pytest.approx(np.mean(accuracy[9:]))
    assert [c["accuracy"] for c in found["per_class"]] == pytest.approx(accuracy)


def test_every_figure_is_the_weighted_mean_of_class_accuracies_that_its_interval_is_about(scored):
    logits, labels = scored
    scores = Scores.of(logits, labels)
    found = summarise(scores, labels, NAMES, COUNTS)
    tested = np.bincount(labels)
    weights = metric_weights(COUNTS, tested)
    assert set(weights) == set(SCALARS)
    for metric, weights_C in weights.items():
        right = scores.rank_N < 5 if metric == "top5" else scores.rank_N < 1
        assert found[metric] == pytest.approx(weights_C @ (np.bincount(labels[right], minlength=12) / tested)), metric


def test_empty_groups_and_untested_classes_are_null():
    logits = np.eye(4)[[0, 0, 1, 2]] * 5
    found = found_of(logits, np.array([0, 0, 1, 1]), list("abcd"), [400, 300, 200, 150])
    assert found["medium"] is None and found["few"] is None and found["top5"] is None
    assert found["many"] == pytest.approx(0.75) and found["balanced_accuracy"] == pytest.approx(0.75)
    assert [c["accuracy"] for c in found["per_class"]] == [1.0, 0.5, None, None]
    assert [c["test_count"] for c in found["per_class"]] == [2, 2, 0, 0]


def test_rarest3_passes_over_untested_classes():
    logits = np.eye(5)[[0, 1, 2, 3]] * 5
    found = found_of(logits, np.array([0, 1, 2, 0]), list("abcde"), [50, 40, 30, 20, 10])
    assert found["rarest3"] == pytest.approx((1 + 1 + 0.5) / 3)  # e and d untested: c, b, a


def test_rarest3_of_equals_are_the_later_and_of_three_classes_there_is_none():
    logits = np.eye(5)[[0, 1, 2, 3, 3]] * 5  # all right but the last class
    found = found_of(logits, np.arange(5), list("abcde"), [50, 10, 10, 10, 10])
    assert found["rarest3"] == pytest.approx(2 / 3)  # c, d, e
    assert found_of(logits[:, :3], np.array([0, 1, 2, 0, 0]), list("abc"), [3, 2, 1])["rarest3"] is None


# What is kept of the logits


def test_scores_are_those_of_a_softmax_of_the_whole(scored, monkeypatch):
    logits, labels = scored
    monkeypatch.setattr("balms_cli.metrics.scores._CHUNK", 12 * 7)  # seven images at once; 500 is no multiple
    found, p = Scores.of(logits.astype(np.float32), labels), softmax(logits.astype(np.float32).astype(float), axis=1)
    assert np.array_equal(found.predicted_N, p.argmax(1))
    assert found.confidence_N == pytest.approx(p.max(1)) and found.mean_score_C == pytest.approx(p.mean(0))
    order = np.argsort(-logits, axis=1, kind="stable")
    assert np.array_equal(found.rank_N, [list(row).index(label) for row, label in zip(order, labels, strict=True)])


def test_logits_that_are_all_alike_are_right_by_chance_only():
    labels = np.arange(20)
    found = Scores.of(np.zeros((20, 20)), labels)
    assert (found.rank_N < 1).sum() == 1 and (found.rank_N < 5).sum() == 5
    assert np.array_equal(found.rank_N == 0, found.predicted_N == labels)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_no_number_is_an_error(scored, bad):
    logits, labels = scored
    logits[450, 3] = bad
    with pytest.raises(ValueError, match="not a finite number"):
        Scores.of(logits, labels)
    with pytest.raises(ValueError, match="no images"):
        Scores.of(logits[:0], labels[:0])


# Calibration


def test_ece_against_a_loop_over_images_and_bins():
    rng = np.random.default_rng(1)
    confidence = np.concatenate([rng.random(400), np.arange(16) / 15, [1e-9, 1.0]])  # every edge once
    right = rng.random(len(confidence)) < confidence**2
    found = calibration(confidence, right, 15)
    ece = 0.0
    for b in range(15):
        low, high = b / 15, (b + 1) / 15
        inside = [i for i, c in enumerate(confidence) if (low < c or (b == 0 and c == 0)) and c <= high]
        one = found["bins"][b]
        assert one["n"] == len(inside) and (one["low"], one["high"]) == pytest.approx((low, high))
        if inside:
            accuracy, sure = np.mean(right[inside]), np.mean(confidence[inside])
            assert (one["accuracy"], one["confidence"]) == pytest.approx((accuracy, sure))
            ece += len(inside) / len(confidence) * abs(accuracy - sure)
    assert found["ece"] == pytest.approx(ece) and sum(b["n"] for b in found["bins"]) == len(confidence)
    assert found["accuracy"] == pytest.approx(right.mean()) and found["confidence"] == pytest.approx(confidence.mean())


def test_ece_of_what_is_known_by_hand():
    assert calibration(np.array([]), np.array([], bool)) is None
    assert calibration(np.ones(4), np.ones(4, bool))["ece"] == 0
    assert calibration(np.full(10, 0.9), np.arange(10) < 5)["ece"] == pytest.approx(0.4)
    assert calibration(np.array([0.9]), np.array([True]))["bins"][0] == {
        "low": 0, "high": pytest.approx(1 / 15), "n": 0, "confidence": None, "accuracy": None,
    }  # fmt: skip


# Confusion


def test_groups_and_pairs_against_the_confusion_matrix(scored):
    logits, labels = scored
    predicted, groups = logits.argmax(1), shot_groups(COUNTS)
    matrix = confusion_matrix(labels, predicted, labels=range(12))
    found = group_confusion(labels, predicted, groups)
    for group in ("many", "medium", "few"):
        rows = matrix[groups == group]
        wrong = rows - np.diag(np.diag(matrix))[groups == group]
        assert found[group]["right"] == pytest.approx((rows.sum() - wrong.sum()) / rows.sum())
        for other in ("many", "medium", "few"):
            assert found[group][other] == pytest.approx(wrong[:, groups == other].sum() / rows.sum())
        assert sum(found[group].values()) == pytest.approx(1)
    share = matrix / matrix.sum(1, keepdims=True)
    weight = np.where(np.eye(12), 0, share * matrix)
    pairs = confused_pairs(labels, predicted, NAMES, most=1000)
    assert len(pairs) == (weight > 0).sum()
    for pair in pairs:
        place = pair["true"], pair["predicted"]
        assert pair["count"] == matrix[place] and pair["share"] == pytest.approx(share[place])
    assert [p["share"] * p["count"] for p in pairs] == pytest.approx(np.sort(weight[weight > 0])[::-1])
    assert confused_pairs(labels, predicted, NAMES) == pairs[:12]


def test_nothing_wrong_and_no_image_of_a_group():
    labels = np.array([0, 1])
    assert confused_pairs(labels, labels, ["a", "b"]) == []
    found = group_confusion(labels, labels, np.array(["many", "many"]))
    assert found["few"] is None and found["many"] == {"right": 1, "many": 0, "medium": 0, "few": 0}


def test_the_marginal_likelihood_of_a_flat_and_of_a_lopsided_classifier():
    groups = np.array(["many", "few", "few", "few"])
    flat = marginal(np.full(4, 0.25), np.full(4, 10), groups)
    assert (flat["variance"], flat["kl_from_uniform"], flat["many"], flat["few"]) == (0, 0, 1, 1)
    assert flat["medium"] is None and flat["note"] is None
    p = np.array([0.7, 0.3, 0.0, 0.0])
    found = marginal(p, np.array([30, 10, 5, 5]), groups)
    assert found["variance"] == pytest.approx(np.var(4 * p)) and found["many"] == pytest.approx(2.8)
    assert found["kl_from_uniform"] == pytest.approx(0.7 * np.log(2.8) + 0.3 * np.log(1.2))
    assert found["per_share"] == pytest.approx({"many": 0.7 / 0.6, "medium": None, "few": 0.3 / 0.4})  # 30 and 20 of 50
    assert "0.4 to 2.4" in found["note"]  # 4 * 5 / 50 and 4 * 30 / 50


# The tail


def test_gini_and_head_share_by_brute_force():
    rng = np.random.default_rng(2)
    for counts in ([7], [5, 5, 5], [100, 1], rng.integers(1, 500, 37).tolist()):
        x = np.array(counts, float)
        assert gini(counts) == pytest.approx(np.abs(x[:, None] - x).mean() / (2 * x.mean()))
    assert gini([100, *[0] * 99]) == pytest.approx(0.99)
    assert head_share([50, 20, 10, 10, 10]) == pytest.approx(0.5) and head_share([4] * 10) == pytest.approx(0.1)
    assert head_share(range(1, 101), 0.07) == pytest.approx(sum(range(94, 101)) / 5050)
    with pytest.raises(ValueError, match="share"):
        head_share([1], 0)


# Gates


@pytest.mark.parametrize("text, metric, op, value", [
    ("few>=0.30", "few", ">=", 0.3), (" top1 < 45% ", "top1", "<", 0.45), ("rarest3>.2", "rarest3", ">", 0.2),
    ("ece<=5%", "ece", "<=", 0.05),
])  # fmt: skip
def test_gates_are_read(text, metric, op, value):
    gate = Gate.parse(text)
    assert (gate.metric, gate.op, gate.value) == (metric, op, pytest.approx(value))


@pytest.mark.parametrize("text, told", [
    ("few", "write it as"), ("fwe>=0.3", "did you mean 'few'"), ("top1>=45", "45%"), ("top1>=..", "write it as"),
    ("top1==0.3", "write it as"), ("ecce<=1", "did you mean 'ece'"),
])  # fmt: skip
def test_gates_that_cannot_be_read(text, told):
    with pytest.raises(ConfigError) as error:
        Gate.parse(text)
    assert told in str(error.value)


def test_gates_hold_and_fail_and_refuse_an_empty_group():
    result = {"top1": 0.5, "few": None, "ece": 0.05}
    assert Gate.parse("top1>=0.5").met_by(result) and not Gate.parse("top1>0.5").met_by(result)
    assert Gate.parse("top1<=50%").met_by(result) and not Gate.parse("top1<0.5").met_by(result)
    assert Gate.parse("ece<=5%").met_by(result) and not Gate.parse("ece<0.05").met_by(result)
    with pytest.raises(ConfigError, match="empty"):
        Gate.parse("few<=1").met_by(result)
