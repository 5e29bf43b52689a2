"""Batched augmentation against one image at a time, and the numbers that drive it."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from balms_cli.data.transforms import augment, crop_flip, cutout, keyed_uniform, normalise

IMAGES = torch.tensor(np.random.default_rng(0).integers(0, 256, (6, 3, 16, 16)), dtype=torch.uint8)


def test_keyed_numbers_are_uniform_and_unrelated():
    u = keyed_uniform(3, 1, torch.arange(20_000), 5).numpy()
    assert u.min() >= 0 and u.max() < 1
    for column in u.T:
        assert kstest(column, "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(u.T) - np.eye(5)).max() < 0.03
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03
    assert abs(np.corrcoef(u[:, 0], keyed_uniform(4, 1, torch.arange(20_000), 5)[:, 0])[0, 1]) < 0.03


def test_keyed_numbers_match_splitmix_in_plain_integers():
    """The vector arithmetic wraps as 64-bit integers do: compared with Python's own, masked."""
    mask, m1, m2, golden = 2**64 - 1, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15
    from balms_cli.data.samplers import mix

    def one(sample, column):
        x = (sample * m1 + column * golden + (mix(9, 2) << 1)) & mask
        x = (x ^ x >> 30) * m1 & mask
        x = (x ^ x >> 27) * m2 & mask
        x = (x ^ x >> 31) * m1 & mask
        x ^= x >> 33
        return (x >> 40) / 2**24

    samples = [0, 1, 77, 2**40 + 3]
    expected = [[one(s, c) for c in (1, 2, 3)] for s in samples]
    assert keyed_uniform(9, 2, torch.tensor(samples), 3).tolist() == expected


def test_an_image_looks_the_same_in_any_batch():
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    ops = ["crop", "flip", "cutout"]
    whole = augment(IMAGES, torch.arange(6), mean, std, seed=5, stream=0, ops=ops)
    for i in range(6):
        alone = augment(IMAGES[i : i + 1], torch.tensor([i]), mean, std, seed=5, stream=0, ops=ops)
        assert torch.equal(whole[i], alone[0])
    assert not torch.equal(whole, augment(IMAGES, torch.arange(6), mean, std, seed=6, stream=0, ops=ops))


def test_crop_and_flip_pixel_by_pixel():
    u_crop = torch.tensor([[0.0, 0.0], [0.999, 0.999], [0.5, 0.1], [0.2, 0.8], [0.4, 0.4], [0.9, 0.3]])
    u_flip = torch.tensor([0.1, 0.9, 0.49, 0.51, 0.0, 0.99])
    out = crop_flip(IMAGES, u_crop, u_flip)
    for i in range(6):
        padded = np.pad(IMAGES[i].numpy(), ((0, 0), (2, 2), (2, 2)))  # 1/8 of 16
        top, left = (int(u * 5) for u in u_crop[i])
        expected = padded[:, top : top + 16, left : left + 16]
        if u_flip[i] < 0.5:
            expected = expected[:, :, ::-1]
        assert np.array_equal(out[i].numpy(), expected)


def test_cutout_clears_a_clipped_square_and_nothing_else():
    u = torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.99, 0.2]])
    out = cutout(torch.ones(3, 3, 16, 16), u, 8)
    for i in range(3):
        row, column = (int(v * 16) for v in u[i])
        expected = np.ones((16, 16))
        expected[max(0, row - 4) : row + 4, max(0, column - 4) : column + 4] = 0
        assert np.array_equal(out[i, 0].numpy(), expected) and np.array_equal(out[i, 2].numpy(), expected)


def test_normalise_gives_zero_mean_and_unit_variance_for_its_own_statistics():
    from balms_cli.data.feed import InMemory
    from balms_cli.stages.common import channel_statistics

    mean, std = channel_statistics(InMemory(IMAGES, torch.zeros(len(IMAGES)), torch.device("cpu")))
    out = normalise(IMAGES, torch.tensor(mean), torch.tensor(std))
    assert out.mean((0, 2, 3)).abs().max() < 1e-4 and (out.std((0, 2, 3)) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("count, step", [(5, 1), (39_999, 1), (40_000, 2), (70_000, 3)])
def test_statistics_are_of_evenly_spaced_images_a_few_of_them_in_hand_at_a_time(count, step):
    from balms_cli.stages.common import channel_statistics

    pixels = torch.randint(0, 200, (count, 3, 1, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[:, 2] = 7
    asked = []

    class Images:
        def __len__(self):
            return count

        def rows(self, images_B):
            asked.append(len(images_B))
            return pixels[images_B]

    mean, std = channel_statistics(Images())
    values = pixels[::step].numpy() / 255
    assert np.array(mean) == pytest.approx(values.mean((0, 2, 3)), abs=6e-7) and sum(asked) == len(values)
    assert np.array(std) == pytest.approx([*values.std((0, 2, 3), ddof=0)[:2], 1e-3], rel=0.2 if count == 5 else 1e-4)
    assert max(asked) <= 256  # 20,000 photos as float64 are 24 GB
