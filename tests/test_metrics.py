"""Figures by hand and against scikit-learn; gates."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from balms_cli.errors import ConfigError
from balms_cli.metrics import Gate, summarise

RNG = np.random.default_rng(0)


def test_against_scikit_learn_on_random_scores():
    labels = RNG.integers(0, 12, 500)
    logits = RNG.normal(size=(500, 12)) + 1.5 * np.eye(12)[labels]
    counts = [500, 300, 150, 101, 100, 60, 20, 19, 10, 5, 3, 2]
    found = summarise(logits, labels, [f"c{i}" for i in range(12)], counts)
    assert found["top1"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))
    accuracy = [(logits.argmax(1)[labels == c] == c).mean() for c in range(12)]
    assert found["many"] == pytest.approx(np.mean(accuracy[:4]))  # over 100
    assert found["medium"] == pytest.approx(np.mean(accuracy[4:7]))  # 20 to 100
    assert found["few"] == pytest.approx(np.mean(accuracy[7:]))  # under 20
    assert found["rarest3"] == pytest.approx(np.mean(accuracy[9:]))
    assert [c["accuracy"] for c in found["per_class"]] == pytest.approx(accuracy)


def test_empty_groups_and_untested_classes_are_null():
    logits = np.eye(4)[[0, 0, 1, 2]] * 5
    found = summarise(logits, np.array([0, 0, 1, 1]), list("abcd"), [400, 300, 200, 150])
    assert found["medium"] is None and found["few"] is None and found["top5"] is None
    assert found["many"] == pytest.approx(0.75) and found["balanced_accuracy"] == pytest.approx(0.75)
    assert [c["accuracy"] for c in found["per_class"]] == [1.0, 0.5, None, None]
    assert [c["test_count"] for c in found["per_class"]] == [2, 2, 0, 0]


def test_rarest3_passes_over_untested_classes():
    logits = np.eye(5)[[0, 1, 2, 3]] * 5
    found = summarise(logits, np.array([0, 1, 2, 0]), list("abcde"), [50, 40, 30, 20, 10])
    assert found["rarest3"] == pytest.approx((1 + 1 + 0.5) / 3)  # e and d untested: c, b, a


@pytest.mark.parametrize("text, metric, op, value", [
    ("few>=0.30", "few", ">=", 0.3), (" top1 < 45% ", "top1", "<", 0.45), ("rarest3>.2", "rarest3", ">", 0.2),
])  # fmt: skip
def test_gates_are_read(text, metric, op, value):
    gate = Gate.parse(text)
    assert (gate.metric, gate.op, gate.value) == (metric, op, pytest.approx(value))


@pytest.mark.parametrize("text, told", [
    ("few", "write it as"), ("fwe>=0.3", "did you mean 'few'"), ("top1>=45", "45%"), ("top1>=..", "write it as"),
    ("top1==0.3", "write it as"),
])  # fmt: skip
def test_gates_that_cannot_be_read(text, told):
    with pytest.raises(ConfigError) as error:
        Gate.parse(text)
    assert told in str(error.value)


def test_gates_hold_and_fail_and_refuse_an_empty_group():
    result = {"top1": 0.5, "few": None}
    assert Gate.parse("top1>=0.5").met_by(result) and not Gate.parse("top1>0.5").met_by(result)
    assert Gate.parse("top1<=50%").met_by(result) and not Gate.parse("top1<0.5").met_by(result)
    with pytest.raises(ConfigError, match="empty"):
        Gate.parse("few<=1").met_by(result)
