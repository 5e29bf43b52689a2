"""Images read ahead from their files: the same pixels as from memory, in the plan's order, whoever decodes them."""

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from balms_cli.data import feed
from balms_cli.data.decode import BadImage, read_image
from balms_cli.data.feed import AHEAD, OnDisk, View, keyed_crop
from balms_cli.data.gpu_decode import decode_into, jpeg_bytes
from balms_cli.data.images import load_pixels
from balms_cli.data.manifest import Manifest
from balms_cli.errors import ConfigError, DataError

from .conftest import SMALL, invoke

CPU = torch.device("cpu")


@pytest.fixture
def manifest(chain) -> Manifest:
    return Manifest.load(chain.manifest)


def view(samples) -> View:
    return View(torch.as_tensor(samples), seed=3, stream=0)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_files_give_the_pixels_that_memory_holds(manifest, workers):
    pixels = torch.from_numpy(load_pixels(manifest, "train", 16))
    disk = OnDisk(manifest, "train", 16, CPU, workers=workers)
    order = torch.randperm(len(disk), generator=torch.Generator().manual_seed(0))
    assert torch.equal(disk.rows(order), pixels[order]) and disk.rows(order[:0]).shape == (0, 3, 16, 16)
    read = disk.batches(lambda step: (order[step * 5 : step * 5 + 5], None), stop=9)
    for step in (0, 1, 2, 6, 7, 8, 3, 3, 4):  # in order, ahead, back, again
        found, images = read(step)
        assert torch.equal(images, order[step * 5 : step * 5 + 5]) and torch.equal(found, pixels[images])
    disk.close()


def test_random_crops_are_those_of_their_samples_whatever_the_workers_and_the_batch(manifest):
    images, samples = torch.arange(20), torch.arange(100, 120)
    found = []
    for workers in (0, 4):
        disk = OnDisk(manifest, "train", 16, CPU, workers=workers)
        found.append(disk.rows(images, view(samples)))
        parts = [disk.rows(images[b : b + 1], view(samples[b : b + 1])) for b in range(20)]
        found.append(torch.cat(parts))
        disk.close()
    assert all(torch.equal(found[0], other) for other in found[1:])
    for other in (view(samples + 1), View(samples, seed=4, stream=0), View(samples, seed=3, stream=1)):
        rows = OnDisk(manifest, "train", 16, CPU, workers=0).rows(images, other)
        assert (rows != found[0]).flatten(1).any(1).float().mean() > 0.9


def test_only_so_many_batches_are_under_way(manifest, monkeypatch):
    asked = []
    disk = OnDisk(manifest, "train", 16, CPU, workers=2)
    read = disk.batches(lambda step: (asked.append(step), (torch.arange(4), None))[1], stop=5)
    assert asked == []
    read(0)
    assert asked == list(range(AHEAD + 1))
    read(1)
    assert asked == list(range(AHEAD + 2))
    for step in (2, 3, 4):
        read(step)
    assert asked == [0, 1, 2, 3, 4]  # never beyond the plan
    disk.close()


def test_the_next_batches_are_read_while_the_step_is_at_work(manifest, monkeypatch):
    began, real = [], read_image
    monkeypatch.setattr(feed, "read_image", lambda *a: (began.append(threading.current_thread().name), real(*a))[1])
    disk = OnDisk(manifest, "train", 16, CPU, workers=2)
    read = disk.batches(lambda step: (torch.arange(4), None), stop=50)
    read(0)
    deadline = time.monotonic() + 10
    while len(began) < 4 * (1 + AHEAD) and time.monotonic() < deadline:
        time.sleep(0.01)  # nobody asks for batch 1 meanwhile
    assert len(began) == 4 * (1 + AHEAD) and all(name.startswith("balms-decode") for name in began)
    disk.close()


def test_paces_tell_which_side_waits(manifest, monkeypatch):
    def slow(path, size, crop=None):
        time.sleep(0.01)
        return np.zeros((3, 16, 16), np.uint8)

    monkeypatch.setattr(feed, "read_image", slow)
    disk = OnDisk(manifest, "train", 16, CPU, workers=2)
    read = disk.batches(lambda step: (torch.arange(16), None), stop=6)
    for step in range(6):
        read(step)
    paces = disk.paces()
    assert 10 < paces["input_images_per_second"] < 200  # two workers, 10 ms an image at least
    assert paces["step_images_per_second"] > 2 * paces["input_images_per_second"] and disk.waited() > 0.6
    assert disk.paces()["step_images_per_second"] == 0  # since the last look
    disk.close()


def test_rates_are_images_by_the_seconds_that_went_into_them(monkeypatch):
    monkeypatch.setattr(feed.time, "perf_counter", lambda: 108.0)
    pace = feed.Pace(images=60, read_seconds=6.0, wait_seconds=5.0, began=100.0)  # 8 s, 3 of them at work
    assert pace.rates(4) == {"input_images_per_second": 40.0, "step_images_per_second": 20.0}
    assert pace.rates(0)["input_images_per_second"] == 10.0  # the caller itself reads


def test_a_file_that_is_gone_is_named_in_one_line(manifest):
    key = manifest.splits["train"].keys[3]
    (Path(manifest.source["root"]) / key).rename(Path(manifest.source["root"]) / "away")
    try:
        for workers in (0, 2):
            disk = OnDisk(manifest, "train", 16, CPU, workers=workers)
            with pytest.raises(DataError, match=rf"{key} can no longer be read \(missing\)"):
                disk.batches(lambda step: (torch.arange(6), None), stop=1)(0)
            disk.close()
    finally:
        (Path(manifest.source["root"]) / "away").rename(Path(manifest.source["root"]) / key)


def test_after_a_bad_file_nothing_more_is_decoded(manifest, monkeypatch):
    """Else the process would go on for the rest of three batches before it could end."""
    calls = []

    def slow(path, size, crop=None):
        calls.append(path)
        time.sleep(0.01)
        raise BadImage("odd")

    monkeypatch.setattr(feed, "read_image", slow)
    disk = OnDisk(manifest, "train", 16, CPU, workers=2)
    read = disk.batches(lambda step: (torch.zeros(400, dtype=torch.int64), None), stop=9)
    with pytest.raises(DataError):
        read(0)
    disk.pool.shutdown(wait=True)  # as the end of the process does
    assert len(calls) < 20  # of 1,200 images in 150 parts


def test_crops_have_the_law_of_torchvisions():
    """Places and sizes of 4,000 crops of each side, compared number by number (Kolmogorov and Smirnov)."""
    for width, height in ((500, 375), (90, 400)):
        torch.manual_seed(0)
        image, theirs = torch.empty(1, height, width), []
        for _ in range(4000):
            top, left, h, w = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
            theirs.append((left, top, w, h, w * h, w / h))
        ours = [(*box, box[2] * box[3], box[2] / box[3]) for box in (keyed_crop(k)(width, height) for k in range(4000))]
        for mine, their in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
            assert stats.ks_2samp(mine, their).pvalue > 1e-3
        assert all(min(x, y) >= 0 and x + w <= width and y + h <= height for x, y, w, h, *_ in ours)


@pytest.mark.parametrize("shape", [(500, 10), (10, 500), (1, 1)])
def test_the_crop_of_an_image_too_long_for_any_is_torchvisions(shape):
    width, height = shape
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(1, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
    box = keyed_crop(0)(width, height)
    assert box[2:] == (w, h) and abs(box[0] - left) <= 1 and abs(box[1] - top) <= 1


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_crop_is_cut_from_the_upright_image(tmp_path, orientation):
    upright = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    stored = upright if orientation == 1 else np.rot90(upright)  # 6: to be turned clockwise
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "p.png", exif=exif)
    found = read_image(tmp_path / "p.png", 20, lambda width, height: (width - 20, 5, 20, 20))
    assert (found == upright[5:25, 40:60].transpose(2, 0, 1)).all()


def test_a_crop_of_a_large_jpeg_may_be_drafted_and_looks_the_same(tmp_path):
    y, x = np.mgrid[0:1200, 0:1600]
    smooth = np.stack([x / 1600, y / 1200, (x + y) / 2800], 2) * 255
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "p.jpg", quality=95)
    found = read_image(tmp_path / "p.jpg", 32, lambda width, height: (200, 100, 800, 600))
    middles = (np.arange(32) + 0.5) / 32
    expected = np.broadcast_to((200 + 800 * middles) / 1600 * 255, (32, 32))
    assert np.abs(found[0] - expected).max() < 4 and np.abs(found[1] - ((100 + 600 * middles) / 1200 * 255)[:, None]).max() < 4


def test_torchvisions_decoder_gives_nearly_the_same_pixels(tmp_path):
    """The path of a GPU's decoder, with the same decoder on the CPU."""
    y, x = np.mgrid[0:90, 0:120]
    smooth = np.stack([x / 120, y / 90, (x + y) / 210], 2) * 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "p.jpg", quality=95)
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "p.png")
    Image.fromarray(smooth.astype(np.uint8)).convert("CMYK").save(tmp_path / "inks.jpg")
    assert jpeg_bytes(str(tmp_path / "p.png"), None) is None and jpeg_bytes(str(tmp_path / "inks.jpg"), None) is None
    assert jpeg_bytes(str(tmp_path / "missing.jpg"), None) is None
    crop = keyed_crop(5)
    coded = {0: jpeg_bytes(str(tmp_path / "p.jpg"), None), 2: jpeg_bytes(str(tmp_path / "turned.jpg"), crop)}
    pixels = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    decode_into(pixels, coded, 32)
    for b, (name, how) in {0: ("p.jpg", None), 2: ("turned.jpg", crop)}.items():
        assert np.abs(pixels[b].numpy().astype(int) - read_image(tmp_path / name, 32, how)).max() <= 3
    assert not pixels[1].any()


def test_a_gpus_decoder_is_handed_the_file_as_it_was_read(tmp_path):
    """The workers read it: what happens to the file afterwards, and a slow disk, are nothing to the one who decodes."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "p.jpg")
    content, box = jpeg_bytes(str(tmp_path / "p.jpg"), None)
    before = (tmp_path / "p.jpg").read_bytes()
    with (tmp_path / "p.jpg").open("r+b") as file:
        file.write(bytes(len(before)))
    assert content.numpy().tobytes() == before and box == (10, 0, 40, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_for_a_gpus_decoder_is_one_of_the_upright_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (60, 40)).save(tmp_path / "p.jpg", exif=exif)
    _, seen = jpeg_bytes(str(tmp_path / "p.jpg"), lambda width, height: (0, 0, width, height))
    assert seen[2:] == ((60, 40) if orientation < 5 else (40, 60))


@pytest.mark.parametrize("crop", [None, view(range(3))])
def test_a_batch_that_a_gpus_decoder_refuses_is_read_by_pillow(tmp_path, monkeypatch, crop):
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "a" / f"{i}.jpg")
    data = Manifest.load(invoke("make-lt", tmp_path, "--as-is", "--out", tmp_path.with_name("data"), "-q").out.strip())
    read = OnDisk(data, "train", 16, CPU, decode="gpu")
    images = torch.arange(len(read))
    crop = crop and View(crop.samples_B[: len(read)], crop.seed, crop.stream)
    theirs = OnDisk(data, "train", 16, CPU).rows(images, crop)
    assert (read.rows(images, crop).int() - theirs.int()).abs().float().mean() < 8  # torchvision's own decoder, another resize
    monkeypatch.setattr("torchvision.io.decode_jpeg", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("refused")))
    assert torch.equal(read.rows(images, crop), theirs)


def train(chain, out, *more):
    done = invoke("pretrain", chain.manifest, *SMALL, "--precision", "fp32", "--out", out, *more)
    assert done.code == 0, done.err
    return done


def weights(run: Path):
    from safetensors.torch import load_file

    return load_file(run / "model.safetensors")


def test_a_run_from_disk_is_that_from_memory_bit_for_bit(chain, tmp_path):
    train(chain, tmp_path / "memory", "--set", "loading=memory")
    done = train(chain, tmp_path / "disk", "--set", "loading=disk", "--workers", "3")
    ours, theirs = weights(tmp_path / "disk"), weights(tmp_path / "memory")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "read as they are needed, by 3 decoder threads" in done.err
    report = json.loads((tmp_path / "disk" / "report.json").read_text())
    assert 0 <= report["input_wait"] <= 1 and "input_wait" not in json.loads((tmp_path / "memory/report.json").read_text())
    record = json.loads((tmp_path / "disk" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["input_images_per_second"] > 0 and record["step_images_per_second"] > 0
    scores = [
        json.loads(invoke("evaluate", tmp_path / "disk", "--json", "--set", f"loading={how}").out) for how in ("disk", "memory")
    ]
    assert scores[0]["per_class"] == scores[1]["per_class"]


def test_stage_2_reads_from_disk_too(chain, tmp_path):
    from .test_stages import FEW

    heads = []
    for how in ("memory", "disk"):
        for kept in (chain.pretrained / "features").glob("*"):
            kept.unlink()
        done = invoke("retrain", chain.pretrained, *FEW, "--set", f"loading={how}", "--out", tmp_path / how, "-q")
        assert done.code == 0, done.err
        heads.append(weights(tmp_path / how)["head.weight"])
    assert torch.equal(*heads)


def test_random_crops_of_files_reach_both_stages(chain, tmp_path):
    from .test_stages import FEW

    crops = ["--set", "augment=['resized-crop', 'flip']"]
    train(chain, tmp_path / "a", *crops, "--workers", "0")
    train(chain, tmp_path / "b", *crops, "--workers", "4")
    train(chain, tmp_path / "c", "--set", "augment=['flip']")
    a, b, c = (weights(tmp_path / name)["head.weight"] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)
    banks = []
    for views in ("1", "2"):
        options = [*FEW[:-1], views, "--set", "class_rows=0"]
        done = invoke("retrain", tmp_path / "a", *options, "--out", tmp_path / views, "-q")
        assert done.code == 0, done.err
        newest = max((tmp_path / "a" / "features").iterdir(), key=lambda p: p.stat().st_mtime_ns)
        from safetensors.torch import load_file

        banks.append(load_file(newest)["features"])
    assert torch.allclose(banks[0], banks[1][::2], atol=1e-5) and not torch.allclose(banks[1][::2], banks[1][1::2], atol=1e-3)


def test_crops_from_files_need_files(chain, tmp_path):
    options = ["--set", "augment=['resized-crop']", "--set", "loading=memory", "--out", tmp_path / "r"]
    refused = invoke("pretrain", chain.manifest, *SMALL, *options)
    assert refused.code == ConfigError.exit_code and "cuts from image files" in refused.err and not (tmp_path / "r").exists()


def test_too_large_for_memory_is_read_from_disk_unasked(chain, tmp_path, monkeypatch):
    from balms_cli.data import images

    monkeypatch.setattr(images, "available_memory", lambda: 1000)
    done = train(chain, tmp_path / "r")
    assert "read as they are needed" in done.err
    refused = invoke("pretrain", chain.manifest, *SMALL, "--set", "loading=memory", "--out", tmp_path / "s")
    assert refused.code == 3 and "--set loading=disk" in refused.err


def test_a_frozen_network_with_its_own_normalisation_reads_no_image(chain, tmp_path, monkeypatch):
    from balms_cli.stages import pretrain

    monkeypatch.setattr(pretrain, "load_images", lambda *a, **k: pytest.fail("read"))
    options = [*SMALL[:4], "--frozen", "--weights", chain.pretrained / "model.safetensors", "--out", tmp_path / "r"]
    assert invoke("pretrain", chain.manifest, *options).code == 0
    assert os.path.isfile(tmp_path / "r" / "model.safetensors")
