"""Batched AutoAugment against torchvision's, which works on one image at a time: pixels, decisions, the law of the whole."""

import ast
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chi2_contingency, chisquare
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode
from torchvision.transforms import autoaugment as torchvision_module

from balms_cli.data import autoaugment
from balms_cli.data.autoaugment import OPS, POLICIES, auto_augment, decide, magnitude_table
from balms_cli.data.transforms import keyed_uniform

THEIRS = AutoAugment(AutoAugmentPolicy.CIFAR10)
NAMES = {"shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX", "translate_y": "TranslateY", "rotate": "Rotate",
         "brightness": "Brightness", "color": "Color", "contrast": "Contrast", "sharpness": "Sharpness",
         "posterize": "Posterize", "solarize": "Solarize", "autocontrast": "AutoContrast", "equalize": "Equalize",
         "invert": "Invert"}  # fmt: skip
SIZES = [(32, 32), (16, 16), (24, 40), (33, 15)]
DRAWS = 20_000


@pytest.fixture(autouse=True)
def plain_matrix_product(monkeypatch):
    """torchvision places pixels by a matrix product, and on some processors that rounds in another way than plain sums do:
    where a source lies midway between two pixels it then takes the other one. Ours are plain sums, the same everywhere."""
    monkeypatch.setattr(torch.Tensor, "bmm", lambda a, b: sum(a[:, :, k, None] * b[:, k, None] for k in range(a.shape[2])))


def pictures(height, width):
    """Noise, flat, black, white, gradients, few and nearby values, one lively channel beside two flat ones."""
    random = np.random.default_rng(height * 100 + width)
    noise = random.integers(0, 256, (3, height, width))
    across = np.broadcast_to(np.linspace(0, 255, width), (3, height, width))
    down = np.broadcast_to(np.linspace(250, 3, height)[:, None], (3, height, width))
    channels = np.stack([noise[0], np.full((height, width), 77), np.full((height, width), 255)])
    flat = np.broadcast_to(np.array([[[200]], [[31]], [[90]]]), noise.shape)
    near = random.integers(100, 104, noise.shape)
    dark = np.minimum(noise, noise[::-1]) // 3
    two = np.where(noise < 128, 0, 255)
    every = [noise, flat, 0 * noise, 0 * noise + 255, across, down, channels, near, dark, two, (across + down) / 2]
    return torch.tensor(np.stack(every).astype(np.uint8))


def torchvision_op(image, name, magnitude):
    return torchvision_module._apply_op(image, NAMES[name], magnitude, InterpolationMode.NEAREST, None)


def torchvision_magnitudes(name, height, width):
    """Every magnitude that torchvision could hand to the operation, both signs where it draws one."""
    magnitudes, signed = THEIRS._augmentation_space(10, (height, width))[NAMES[name]]
    values = magnitudes.double().reshape(-1).tolist()
    return values + [-v for v in values] if signed else values


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_pixels_of_every_operation_at_every_magnitude(name, size):
    images, magnitudes = pictures(*size), torchvision_magnitudes(name, *size)
    batch = images.repeat(len(magnitudes), 1, 1, 1)
    before = batch.clone()
    out = OPS[name](batch, torch.tensor(magnitudes, dtype=torch.float64).repeat_interleave(len(images)))
    expected = torch.stack([torchvision_op(image, name, m) for m in magnitudes for image in images])
    assert out.dtype == torch.uint8 and out.shape == batch.shape
    assert torch.equal(out, expected)
    assert torch.equal(batch, before)


def test_the_pixels_under_test_change_at_all():
    """Each operation does something to the noise: the comparison above is not one of untouched images."""
    noise = pictures(32, 32)[0]
    for name in NAMES:
        changed = (torchvision_op(noise, name, torchvision_magnitudes(name, 32, 32)[-1]) != noise).float().mean()
        assert changed > 0.3 or name == "autocontrast", name  # noise has all values already


@pytest.mark.parametrize("size", [(2, 5), (3, 3), (1, 4)])
def test_sharpness_of_the_smallest_images(size):
    images = torch.tensor(np.random.default_rng(1).integers(0, 256, (4, 3, *size)), dtype=torch.uint8)
    out = OPS["sharpness"](images, torch.full((4,), 0.9, dtype=torch.float64))
    assert torch.equal(out, torch.stack([torchvision_op(image, "sharpness", 0.9) for image in images]))


def test_policies_and_magnitudes_are_torchvisions():
    unleveled = {"AutoContrast", "Equalize", "Invert"}
    ours = [tuple((NAMES[op], p, None if NAMES[op] in unleveled else level) for op, p, level in pair) for pair in POLICIES]
    assert ours == THEIRS.policies
    assert list(OPS) == list(NAMES)
    for size in (*SIZES, (224, 200)):
        table, signed = magnitude_table(*size)
        for i, name in enumerate(NAMES):
            magnitudes, either_sign = THEIRS._augmentation_space(10, size)[NAMES[name]]
            assert table[i].tolist() == magnitudes.double().expand(10).tolist() and signed[i] == either_sign


def test_decisions_follow_the_stated_probabilities():
    policy_B, applied_B2, sign_B2 = decide(torch.arange(DRAWS), seed=0, stream=3)
    assert chisquare(torch.bincount(policy_B, minlength=25)).pvalue > 1e-3
    for policy, pair in enumerate(POLICIES):
        here = policy_B == policy
        for slot, (_, p, _) in enumerate(pair):
            applied = int(applied_B2[here, slot].sum())
            assert binomtest(applied, int(here.sum()), p).pvalue > 1e-5 if p else applied == 0  # 49 tests: 5e-4 in all
    for slot in (0, 1):
        assert binomtest(int((sign_B2[:, slot] < 0).sum()), DRAWS).pvalue > 1e-3
    assert set(sign_B2.flatten().tolist()) == {-1, 1}


def test_decisions_are_independent_of_each_other():
    """The two slots, signs and applications, and neighbouring samples; within a sub-policy, as the probabilities differ."""
    policy_B, applied_B2, sign_B2 = (x.numpy() for x in decide(torch.arange(DRAWS), seed=1, stream=0))
    negative_B2 = sign_B2 < 0
    for policy, ((_, p, _), (_, q, _)) in enumerate(POLICIES):
        if p and q:
            of = applied_B2[policy_B == policy]
            assert chi2_contingency(_table(of[:, 0], of[:, 1])).pvalue > 1e-4
    for one, other in [(negative_B2[:, 0], negative_B2[:, 1]), (applied_B2[:, 0], negative_B2[:, 0]),
                       (applied_B2[:, 1], negative_B2[:, 1]), (applied_B2[:, 0], negative_B2[:, 1]),
                       (negative_B2[:-1, 0], negative_B2[1:, 0])]:  # fmt: skip
        assert chi2_contingency(_table(one, other)).pvalue > 1e-3
    for of in (policy_B[:-1], negative_B2[1:, 0], negative_B2[1:, 1]):
        assert chi2_contingency(_table(policy_B[1:], of)).pvalue > 1e-3


def test_decisions_are_unrelated_to_the_crop_of_the_same_seed_and_stream():
    crop = keyed_uniform(2, 0, torch.arange(DRAWS), 5).numpy()
    ours = np.concatenate([x.numpy().reshape(DRAWS, -1) for x in decide(torch.arange(DRAWS), seed=2, stream=0)], axis=1)
    assert np.abs(np.corrcoef(crop.T, ours.astype(float).T)[:5, 5:]).max() < 0.03


def _table(a, b):
    """How often each pair of values occurs."""
    rows, columns = np.unique(a, return_inverse=True)[1], np.unique(b, return_inverse=True)[1]
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1)
    return table


def test_what_is_applied_has_torchvisions_law(monkeypatch):
    """Sequences of (operation, magnitude), counted inside both: torchvision draws from its generator, we from our keys."""
    theirs = Counter()
    done = []
    monkeypatch.setattr(torchvision_module, "_apply_op", lambda image, *op, **_: (done.append(op), image)[1])
    space = THEIRS._augmentation_space(10, (32, 32))
    monkeypatch.setattr(THEIRS, "_augmentation_space", lambda *_: space, raising=False)
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    torch.manual_seed(0)
    for _ in range(DRAWS // 2):
        done.clear()
        THEIRS(image)
        theirs[tuple(done)] += 1

    ours = [[] for _ in range(DRAWS)]

    def recorder(name):
        def note(images, magnitude_B):
            for (low, high), magnitude in zip(images[:, 0, 0, :2].tolist(), magnitude_B.tolist(), strict=True):
                ours[low + 256 * high].append((NAMES[name], magnitude))
            return images

        return note

    for name in OPS:
        monkeypatch.setitem(autoaugment.OPS, name, recorder(name))
    tagged = torch.zeros(DRAWS, 3, 1, 32, dtype=torch.uint8).expand(-1, -1, 32, -1).contiguous()
    tagged[:, 0, 0, 0], tagged[:, 0, 0, 1] = torch.arange(DRAWS) % 256, torch.arange(DRAWS) // 256
    auto_augment(tagged, torch.arange(DRAWS) + 10**6, seed=0, stream=0)
    ours = Counter(tuple(sequence) for sequence in ours)
    assert _agree(theirs, ours) > 1e-3
    assert {s for s, n in theirs.items() if n > 20} <= set(ours) and {s for s, n in ours.items() if n > 40} <= set(theirs)


def _agree(one, other):
    """p-value that two counts come from one law; rare outcomes are put together."""
    keys = sorted(set(one) | set(other), key=repr)
    table = np.array([[one[k], other[k]] for k in keys])
    rare = table.sum(1) < 20
    return chi2_contingency(np.vstack([table[~rare], table[rare].sum(0)])).pvalue


def test_outputs_of_one_image_have_torchvisions_law(monkeypatch):
    """Every image that torchvision can make of one, with its exact probability, against the frequencies of ours."""
    image = pictures(16, 16)[10].clone()
    image[0, 3:9, 2:11] //= 2
    # With probabilities 1/2 its draws 0 and 1 mean applied and left out.
    monkeypatch.setattr(THEIRS, "policies", [tuple((op, 0.5, i) for op, _, i in pair) for pair in THEIRS.policies])
    drawn = None
    monkeypatch.setattr(THEIRS, "get_params", lambda _: drawn)
    law = Counter()
    for policy, ((_, p, _), (_, q, _)) in enumerate(POLICIES):
        for first, second, *signs in product((True, False), (True, False), (0, 1), (0, 1)):
            drawn = policy, [1 - first, 1 - second], signs
            law[THEIRS(image).numpy().tobytes()] += (p if first else 1 - p) * (q if second else 1 - q) / 4 / len(POLICIES)
    law = {out: share for out, share in law.items() if share}
    assert len(law) > 80 and sum(law.values()) == pytest.approx(1)

    many = auto_augment(image.expand(DRAWS, -1, -1, -1), torch.arange(DRAWS), seed=4, stream=1)
    counts = Counter(one.tobytes() for one in many.numpy())
    assert set(counts) <= set(law)
    assert {out for out, share in law.items() if share > 1e-3} <= set(counts)
    expected = np.array([law[out] * DRAWS for out in law])
    observed = np.array([counts[out] for out in law])
    rare = expected < 8
    expected, observed = (np.append(x[~rare], x[rare].sum()) for x in (expected, observed))
    assert chisquare(observed, expected).pvalue > 1e-3


def test_an_image_looks_the_same_in_any_batch():
    images = pictures(32, 32)[torch.arange(200) % 11]
    samples = torch.arange(200) * 7 + 2**40
    whole = auto_augment(images, samples, seed=5, stream=2)
    order = torch.tensor(np.random.default_rng(0).permutation(200))
    assert torch.equal(auto_augment(images[order], samples[order], seed=5, stream=2), whole[order])
    for size in (1, 3, 64):
        parts = [auto_augment(images[i : i + size], samples[i : i + size], seed=5, stream=2) for i in range(0, 200, size)]
        assert torch.equal(torch.cat(parts), whole)
    for other in ({"seed": 6, "stream": 2}, {"seed": 5, "stream": 3}, {"seed": 5, "stream": 2, "by": 1}):
        differing = auto_augment(images, samples + other.pop("by", 0), **other) != whole
        assert differing.flatten(1).any(1).float().mean() > 0.5


def test_input_is_kept_and_any_layout_or_size_taken():
    images = pictures(24, 40)
    samples = torch.arange(11)
    before = images.clone()
    out = auto_augment(images, samples, seed=0, stream=0)
    assert torch.equal(images, before) and out.dtype == torch.uint8 and out.shape == images.shape
    assert out.data_ptr() != images.data_ptr()
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(auto_augment(channels_last, samples, seed=0, stream=0), out)
    assert auto_augment(images[:0], samples[:0], seed=0, stream=0).shape == (0, 3, 24, 40)


def test_nothing_but_shapes_is_read_back_from_the_device():
    """On the meta device tensors have no values: reading one, or mixing in one of the CPU's, is an error."""
    images = pictures(32, 32)[torch.arange(300) % 11].to("meta")
    out = auto_augment(images, torch.arange(300), seed=0, stream=0)
    assert out.device.type == "meta" and out.shape == images.shape and out.dtype == torch.uint8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_pixels():
    images = pictures(24, 40)[torch.arange(550) % 11]
    out = auto_augment(images.cuda(), torch.arange(550), seed=0, stream=0)
    assert torch.equal(out.cpu(), auto_augment(images, torch.arange(550), seed=0, stream=0))


def test_autocast_leaves_the_pixels_alone():
    images = pictures(28, 28)[torch.arange(100) % 11]
    plain = auto_augment(images, torch.arange(100), seed=0, stream=0)
    autoaugment._sources.cache_clear()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.equal(auto_augment(images, torch.arange(100), seed=0, stream=0), plain)


def test_torchvision_is_not_loaded_for_it():
    tree = ast.parse(Path(autoaugment.__file__).read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = [alias.name for n in imports for alias in n.names] + [n.module for n in imports if isinstance(n, ast.ImportFrom)]
    assert not [name for name in names if name and name.startswith("torchvision")]
