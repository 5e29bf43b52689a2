"""Which images are drawn: laws by chi-square, epochs by counting, and the same draw for the same step."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from balms_cli.data.samplers import ClassIndex, batches, class_law, mix, rates_law

COUNTS = [60, 25, 10, 5]
LABELS = torch.tensor(np.random.default_rng(0).permutation(np.repeat(range(4), COUNTS)))


def drawn(name, *, steps=400, batch=64, rates=None, seed=1):
    index = ClassIndex(LABELS, 4)
    draw = batches(name, index, batch, steps, seed, rates)
    return [draw(i) for i in range(steps)]


def test_instance_balanced_takes_every_image_once_an_epoch_across_batch_borders():
    images = torch.cat(drawn("instance", steps=50, batch=30))
    for epoch in range(15):
        assert sorted(images[epoch * 100 : (epoch + 1) * 100].tolist()) == list(range(100))
    assert images[:100].tolist() != images[100:200].tolist()


@pytest.mark.parametrize("name, law", [
    ("class", [1 / 4] * 4), ("square-root", np.sqrt(COUNTS) / np.sqrt(COUNTS).sum()),
])  # fmt: skip
def test_class_laws_hold(name, law):
    images = torch.cat(drawn(name))
    seen = np.bincount(LABELS[images], minlength=4)
    assert chisquare(seen, np.array(law) * seen.sum()).pvalue > 1e-3
    for c in range(4):  # within a class every image is as likely
        of_class = images[LABELS[images] == c]
        assert chisquare(np.bincount(of_class)[LABELS[: of_class.max() + 1] == c]).pvalue > 1e-3


def test_learned_rates_law_is_counts_times_rates():
    rates = torch.tensor([0.1, 0.4, 0.9, 0.5])
    expected = np.array([6.0, 10.0, 9.0, 2.5]) / 27.5
    assert rates_law(rates, torch.tensor(COUNTS)).numpy() == pytest.approx(expected)
    seen = np.bincount(LABELS[torch.cat(drawn("instance", rates=rates))], minlength=4)
    assert chisquare(seen, expected * seen.sum()).pvalue > 1e-3


def test_progressive_goes_from_instance_to_class_balanced():
    counts = torch.tensor(COUNTS)
    assert class_law("progressive", counts, 0.0).tolist() == pytest.approx([0.6, 0.25, 0.1, 0.05])
    assert class_law("progressive", counts, 0.5).tolist() == pytest.approx([0.425, 0.25, 0.175, 0.15])
    assert class_law("progressive", counts, 1.0).tolist() == pytest.approx([0.25] * 4)
    for step, law in ((0, [0.6, 0.25, 0.1, 0.05]), (1, [0.25] * 4)):  # the first and the last of two steps
        seen = np.bincount(LABELS[drawn("progressive", steps=2, batch=8000)[step]], minlength=4)
        assert chisquare(seen, np.array(law) * 8000).pvalue > 1e-3
    images = drawn("progressive")
    rare = [(LABELS[b] == 3).float().mean().item() for b in images]
    assert np.mean(rare[:80]) < 0.1 < 0.2 < np.mean(rare[-80:])


@pytest.mark.parametrize("name", ["instance", "class", "progressive"])
def test_a_step_draws_the_same_whenever_it_is_asked(name):
    first = drawn(name, steps=40, batch=16)
    index = ClassIndex(LABELS, 4)
    draw = batches(name, index, 16, 40, 1, None)
    for i in (33, 7, 39, 0):  # out of order, as after a resume
        assert torch.equal(draw(i), first[i])
    other = batches(name, index, 16, 40, 2, None)
    assert not torch.equal(other(7), first[7])


def test_a_batch_may_be_larger_than_the_data():
    assert np.bincount(drawn("instance", steps=1, batch=250)[0]).tolist().count(3) == 50


def test_mix_separates_neighbouring_streams():
    values = {mix(s, p, i) for s in range(20) for p in range(5) for i in range(50)}
    assert len(values) == 5000 and all(0 <= v < 2**63 for v in values)
    bits = np.mean([[v >> b & 1 for b in range(63)] for v in values], axis=0)
    assert np.abs(bits - 0.5).max() < 0.04
