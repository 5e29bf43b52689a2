"""Repeat factors by brute force, and draws that are functions of the step."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from balms_cli.detection.annotations import load_annotations
from balms_cli.detection.sampling import class_balanced_images, draw_batches, epoch_indices, repeat_factors


@pytest.fixture
def annotations(tmp_path):
    """40 images; category k is in one of k + 1 of them at random, and each image has at least one."""
    rng = np.random.default_rng(0)
    rows = [(i, 10 * k + 3) for i in range(40) for k in range(6) if k == 0 or rng.random() < 1 / (k * k + 1)
            for _ in range(1 + (i + k) % 3)]  # fmt: skip
    return load(tmp_path, 40, rows)


def load(folder: Path, images: int, rows: list[tuple[int, int]]):
    """Annotations with an instance a row (image, category id)."""
    content = {"images": [{"id": 5 * i + 2, "width": 50, "height": 50, "file_name": f"{i}.png"} for i in range(images)],
               "categories": [{"id": c, "name": str(c)} for c in sorted({c for _, c in rows}, reverse=True)],
               "annotations": [{"id": n, "image_id": 5 * i + 2, "category_id": c, "bbox": [1, 1, 9, 9],
                                "segmentation": [[1, 1, 9, 1, 9, 9]]} for n, (i, c) in enumerate(rows)]}  # fmt: skip
    (folder / "train.json").write_text(json.dumps(content))
    return load_annotations(folder / "train.json")


def shares(annotations) -> dict[int, float]:
    """Share of the images that each category is in, by id, counted from the file."""
    content = json.loads(annotations.path.read_text())
    pairs = {(a["image_id"], a["category_id"]) for a in content["annotations"]}
    return {c["id"]: sum(cat == c["id"] for _, cat in pairs) / len(content["images"]) for c in content["categories"]}


def categories_by_image(annotations) -> list[set[int]]:
    content = json.loads(annotations.path.read_text())
    return [{a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]} for image in content["images"]]


@pytest.mark.parametrize("threshold", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_repeat_factors_by_brute_force(annotations, threshold):
    f = shares(annotations)
    expected = [max(max(1.0, math.sqrt(threshold / f[c])) for c in present) for present in categories_by_image(annotations)]
    assert repeat_factors(annotations, threshold).tolist() == pytest.approx(expected, rel=1e-12)
    assert threshold != 0.5 or max(expected) > 1.5  # the case is one with repeats


def test_an_epoch_has_each_image_floor_or_ceiling_times_and_its_factor_in_the_mean(annotations):
    factors = repeat_factors(annotations, 0.5)
    counts = np.stack([np.bincount(epoch_indices(factors, 1, epoch), minlength=40) for epoch in range(4000)])
    assert (counts >= np.floor(factors)).all() and (counts <= np.ceil(factors)).all()
    part = factors - np.floor(factors)
    error = np.abs(counts.mean(0) - factors)
    assert (error <= 5 * np.sqrt(part * (1 - part) / 4000) + 1e-12).all()
    assert len(set(counts.sum(1).tolist())) > 5  # rounded image by image, epoch by epoch


def test_without_repeats_an_epoch_is_a_permutation_of_its_own():
    ones = np.ones(50)
    epochs = [epoch_indices(ones, 0, epoch).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] == epoch_indices(ones, 0, 0).tolist()
    assert epochs[0] != epoch_indices(ones, 1, 0).tolist() and epoch_indices(ones, 0, 0).dtype == np.int64


@pytest.mark.parametrize("batch_size", [1, 7, 64, 300])
def test_batches_are_cut_from_the_row_of_epochs_whichever_step_is_asked_first(annotations, batch_size):
    factors = repeat_factors(annotations, 0.5)
    row = np.concatenate([epoch_indices(factors, 3, epoch) for epoch in range(20 + 20 * batch_size // 40)])
    draw = draw_batches(factors, batch_size, 3)
    for step in range(20):
        assert draw(step).tolist() == row[step * batch_size : (step + 1) * batch_size].tolist()
    for step in (19, 4, 11, 0):
        expected = row[step * batch_size : (step + 1) * batch_size].tolist()
        assert draw_batches(factors, batch_size, 3)(step).tolist() == draw(step).tolist() == expected


def test_the_meta_batch_follows_the_rarest_category_of_an_image(annotations):
    f = shares(annotations)
    weights = np.array([max(1 / f[c] for c in present) for present in categories_by_image(annotations)])
    draw = class_balanced_images(annotations, 50, 0, 9)
    images = np.concatenate([draw(step) for step in range(1000)])
    share, expected = np.bincount(images, minlength=40) / len(images), weights / weights.sum()
    assert (np.abs(share - expected) < 5 * np.sqrt(expected / len(images))).all()
    assert draw(5).tolist() == class_balanced_images(annotations, 50, 0, 9)(5).tolist()
    others = [draw(6), class_balanced_images(annotations, 50, 0, 8)(5), class_balanced_images(annotations, 50, 1, 9)(5)]
    assert all(a.tolist() != b.tolist() for a, b in pairwise([draw(5), *others]))


def test_an_image_without_annotation_is_never_in_the_meta_batch_and_never_repeats(tmp_path):
    load(tmp_path, 3, [(0, 3), (2, 4)])
    every = load_annotations(tmp_path / "train.json", every_image=True)
    assert len(every.images) == 3 and every.num_images == 2
    assert repeat_factors(every, 0.98).tolist() == pytest.approx([1.4, 1, 1.4])
    draw = class_balanced_images(every, 100, 0, 1)
    assert set(np.concatenate([draw(step) for step in range(20)]).tolist()) == {0, 2}
