"""Pixels: untouched where they fit, cropped where not, and every bad image named."""

import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from balms_cli.config import MakeLTConfig
from balms_cli.data import decode, images, known, moved
from balms_cli.data.decode import BadImage, read_image
from balms_cli.data.feed import OnDisk
from balms_cli.data.images import check_images, load_pixels
from balms_cli.data.index import index_sha256
from balms_cli.data.manifest import Manifest
from balms_cli.data.sources import open_source
from balms_cli.errors import DataError
from balms_cli.reporter import Reporter
from balms_cli.stages import make_lt

from .data_helpers import Listener, fake_cifar, picture, tree

NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def manifest_of(folder: Path, workspace: Path, **options: object) -> Manifest:
    config = MakeLTConfig(source=str(folder), as_is=True, **options)
    return make_lt.run(config, workspace).manifest


def chw(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def test_fitting_images_are_untouched(tmp_path: Path) -> None:
    tree(tmp_path / "photos", {"train/a": 2, "train/b": 1, "test/a": 1})
    Image.fromarray(NOISE).save(tmp_path / "photos/train/b/00.png")
    manifest = manifest_of(tmp_path / "photos", tmp_path / "w")
    pixels = load_pixels(manifest, "train", 32, threads=2)
    assert pixels.shape == (3, 3, 32, 32)
    assert pixels.dtype == np.uint8
    row = manifest.splits["train"].keys.index("train/b/00.png")
    assert (pixels[row] == NOISE.transpose(2, 0, 1)).all()
    assert load_pixels(manifest, "test", 16).shape == (1, 3, 16, 16)
    with pytest.raises(DataError, match="has no split 'val'"):
        load_pixels(manifest, "val", 32)


@pytest.mark.parametrize("size", [(90, 50), (50, 90), (64, 64), (20, 30)])
def test_resize_then_centre_crop(tmp_path: Path, size: tuple[int, int]) -> None:
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))  # a smooth picture: no ringing at the crop's rim
    image = Image.fromarray(np.stack([2 * x, 2 * y, x + y], axis=2).astype(np.uint8))
    image.save(tmp_path / "p.png")
    scale = 32 / min(size)
    resized = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
    expected = chw(resized.crop((left, top, left + 32, top + 32))).astype(int)
    assert np.abs(read_image(tmp_path / "p.png", 32) - expected)[:, 2:-2, 2:-2].max() <= 3


def test_large_jpeg_is_drafted_and_looks_the_same(tmp_path: Path) -> None:
    x, y = np.meshgrid(np.arange(1600), np.arange(1200))
    image = Image.fromarray(np.stack([x // 7, y // 5, (x + y) // 11], axis=2).astype(np.uint8))
    image.save(tmp_path / "p.jpg", quality=95)
    image.save(tmp_path / "p.png")
    close = np.abs(read_image(tmp_path / "p.jpg", 64).astype(int) - read_image(tmp_path / "p.png", 64))
    assert close.max() <= 4


def test_modes(tmp_path: Path) -> None:
    colour = Image.fromarray(NOISE)
    gray = colour.convert("L")
    gray.save(tmp_path / "gray.png")
    assert (read_image(tmp_path / "gray.png", 32) == np.asarray(gray)).all()
    with_alpha = colour.copy()
    with_alpha.putalpha(Image.fromarray(NOISE[:, :, 0]))
    with_alpha.save(tmp_path / "alpha.png")
    assert (read_image(tmp_path / "alpha.png", 32) == chw(colour)).all()
    palette = colour.quantize(16)
    palette.save(tmp_path / "palette.png", transparency=3)
    assert (read_image(tmp_path / "palette.png", 32) == chw(palette.convert("RGB"))).all()
    palette.save(tmp_path / "palette.gif")
    assert (read_image(tmp_path / "palette.gif", 32) == chw(palette.convert("RGB"))).all()
    inks = colour.convert("CMYK")
    inks.save(tmp_path / "inks.tif")
    assert (read_image(tmp_path / "inks.tif", 32) == chw(inks.convert("RGB"))).all()
    Image.fromarray(np.full((32, 32), 0x8080, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.unique(read_image(tmp_path / "deep.png", 32)).tolist() == [0x80]  # scaled, not clipped to white
    gray.convert("1").save(tmp_path / "bits.png")
    assert set(np.unique(read_image(tmp_path / "bits.png", 32))) <= {0, 255}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((32, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 255  # a mark that no turn or mirror leaves in place
    turns = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
             6: np.rot90, 7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: lambda a: np.rot90(a, 3)}  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(turns[orientation](upright))).save(tmp_path / "p.png", exif=exif)
    assert (read_image(tmp_path / "p.png", 32) == upright.transpose(2, 0, 1)).all()


def broken_folder(root: Path) -> Path:
    tree(root, {"a": 6, "b": 4})
    whole = picture(root / "a" / "cut.jpg", size=(64, 64)).read_bytes()
    (root / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "empty.png").write_bytes(b"")
    (root / "b" / "text.png").write_text("not an image")
    return root


def test_all_bad_images_are_named(tmp_path: Path) -> None:
    broken_folder(tmp_path / "photos")
    source = open_source(MakeLTConfig(source=str(tmp_path / "photos")), Reporter())
    expected = {"a/cut.jpg": "truncated", "a/empty.png": "empty", "b/text.png": "not an image"}
    assert dict(check_images(source, threads=2)) == expected
    manifest = manifest_of(tmp_path / "photos", tmp_path / "w", check=False, test_fraction=0.01)
    (tmp_path / "photos" / manifest.splits["train"].keys[0]).unlink()
    with pytest.raises(DataError, match=r"of \d+ images cannot be read: .*missing.*--skip-bad leaves them out") as caught:
        load_pixels(manifest, "train", 8)
    assert "\n" not in str(caught.value)


def test_source_that_moved_away(tmp_path: Path) -> None:
    manifest = manifest_of(tree(tmp_path / "photos", {"a": 3}), tmp_path / "w")
    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"is gone; put them there, or name the folder that holds them by BALMS_DATA$"):
        load_pixels(manifest, "train", 8)


def split_that_a_colleague_shares(tmp_path: Path, kind: str) -> tuple[Path, Path]:
    """A manifest, and the folder with its images (that of class a has the value i at i) that is not at its root any more."""
    root = tree(tmp_path / "theirs" / "photos", {"a": 3, "b": 2})
    options: dict[str, object] = {}
    source = root
    if kind == "list":
        source = tmp_path / "theirs" / "all.txt"
        source.write_text("a/00.png 0\na/01.png 0\na/02.png 0\nb/00.png 1\nb/01.png 1\n")
        options = {"images": str(root)}
    if kind == "csv":
        source = root / "all.csv"
        source.write_text("path,label\na/00.png,a\na/01.png,a\na/02.png,a\nb/00.png,b\nb/01.png,b\n")
    if kind == "shards":
        with tarfile.open(root / "part-0.tar", "w") as tar:
            for label, name in enumerate("ab"):
                for file in sorted((root / name).iterdir()):
                    tar.add(file, f"{name}{file.name}")
                    member = tarfile.TarInfo(f"{name}{file.stem}.cls")
                    member.size = 1
                    tar.addfile(member, io.BytesIO(str(label).encode()))
                shutil.rmtree(root / name)
    made = manifest_of(source, tmp_path / "w", test_fraction=0.01, **options)
    mine = tmp_path / "mine" / "photos"
    mine.parent.mkdir()
    root.rename(mine)
    return made.path, mine


@pytest.mark.parametrize("kind", ["folder", "list", "csv", "shards"])
@pytest.mark.parametrize("named", ["photos", ""])
def test_a_shared_split_finds_its_images_by_balms_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, named: str
) -> None:
    made, mine = split_that_a_colleague_shares(tmp_path, kind)
    before = {file: file.read_bytes() for file in made.iterdir()}
    written = Manifest.load(made).source["root"]
    monkeypatch.setenv("BALMS_DATA", str(tmp_path / "theirs"))
    with pytest.raises(DataError, match=r"does not hold its images; put them there, or name the folder .* by BALMS_DATA"):
        load_pixels(Manifest.load(made), "train", 8)
    (tmp_path / "mine" / "a").mkdir()  # of the same name as in the data, and empty
    monkeypatch.setenv("BALMS_DATA", str(mine.parent if named else mine))
    listener, manifest = Listener(), Manifest.load(made)
    assert manifest.source["root"] == str(mine) and manifest.moved_from == written != str(mine)
    assert manifest.sha256 == make_sha(manifest)
    pixels = load_pixels(manifest, "train", 8, listener)
    for key, label, image in zip(manifest.splits["train"].keys, manifest.splits["train"].labels, pixels, strict=True):
        assert (image[0] == int(Path(key).stem[-2:])).all() and label in (0, 1)
    load_pixels(manifest, "test", 8, listener)
    OnDisk(Manifest.load(made), "train", 8, torch.device("cpu"), workers=0, reporter=listener)
    told = [note for note in listener.notes if "BALMS_DATA" in note]
    assert len(told) == 1 and f"is gone; they are read from {mine} (BALMS_DATA)" in told[0]
    assert {file: file.read_bytes() for file in made.iterdir()} == before


def make_sha(manifest: Manifest) -> str:
    return index_sha256(manifest.classes, manifest.index_texts())


def test_balms_data_changes_nothing_where_the_root_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifest_of(tree(tmp_path / "photos", {"a": 3, "b": 2}), tmp_path / "w")
    tree(tmp_path / "other" / "photos", {"a": 3, "b": 2})
    monkeypatch.setenv("BALMS_DATA", str(tmp_path / "other"))
    assert Manifest.load(manifest.path).source["root"] == str(tmp_path / "photos")
    shutil.rmtree(tmp_path / "photos")
    first = Manifest.load(manifest.path).source["root"]
    tree(tmp_path / "third", {"a": 3, "b": 2})
    monkeypatch.setenv("BALMS_DATA", str(tmp_path / "third"))
    other = Manifest.load(manifest.path).source["root"]
    # Feature banks are keyed by the root: pictures of the same names in three places never share one.
    assert len({first, other, str(tmp_path / "photos")}) == 3
    (tmp_path / "link").symlink_to(tmp_path / "third")
    monkeypatch.setenv("BALMS_DATA", str(tmp_path / "link"))
    assert Manifest.load(manifest.path).source["root"] == other


@pytest.mark.parametrize("root", ["/gone/..", "/gone/.", "..", "/", "\\gone\\..", "/gone/nul\0", "/gone/" + "x" * 5000, ""])
def test_a_strangers_root_does_not_lead_out_of_balms_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    tree(tmp_path, {"a": 3})
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("BALMS_DATA", str(tmp_path / "mine"))
    monkeypatch.chdir(tmp_path / "mine")
    assert moved.here("folder", "f", root, ["a/00.png"]) == root
    assert moved.here("folder", "f", "/gone/mine", []) == "/gone/mine"


def test_a_link_out_of_the_moved_root_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, mine = split_that_a_colleague_shares(tmp_path, "folder")
    (mine / "b").rename(tmp_path / "outside")
    (mine / "b").symlink_to(tmp_path / "outside")
    monkeypatch.setenv("BALMS_DATA", str(mine.parent))
    with pytest.raises(DataError, match="a link that leaves the folder"):
        load_pixels(Manifest.load(made), "train", 8)


def test_bombs_are_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "big.png", size=(60, 60))
    picture(tmp_path / "fair.png", size=(30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns above this and raises above twice this
    picture(tmp_path / "over.png", size=(35, 35))
    assert read_image(tmp_path / "fair.png", 8) is not None
    with decode.quiet_pillow():
        for name in ("big.png", "over.png"):
            with pytest.raises(BadImage, match="pixels"):
                read_image(tmp_path / name, 8)


def test_long_thin_image_takes_no_memory(tmp_path: Path) -> None:
    picture(tmp_path / "thin.png", size=(200_000, 1))
    assert read_image(tmp_path / "thin.png", 224).shape == (3, 224, 224)


def test_link_out_of_the_root_is_not_followed(tmp_path: Path) -> None:
    manifest = manifest_of(tree(tmp_path / "photos", {"a": 3}), tmp_path / "w")
    secret = picture(tmp_path / "secret.png")
    swapped = tmp_path / "photos" / manifest.splits["train"].keys[0]
    swapped.unlink()
    swapped.symlink_to(secret)
    with pytest.raises(DataError, match="leaves the folder"):
        load_pixels(manifest, "train", 8)


def test_memory_is_asked_before_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifest_of(tree(tmp_path / "photos", {"a": 3}), tmp_path / "w")
    monkeypatch.setattr(images, "available_memory", lambda: 10_000)
    with pytest.raises(DataError, match="lower --image-size"):
        load_pixels(manifest, "train", 64)
    assert load_pixels(manifest, "train", 8).size
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # each of torchrun's processes on this machine holds its own
    assert not images.fits_memory(len(manifest.splits["train"]), 24) and images.fits_memory(2, 10)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert images.fits_memory(len(manifest.splits["train"]), 24)
    monkeypatch.undo()
    assert images.available_memory() > 1 << 20


def test_memory_is_what_the_system_and_the_container_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert images.available_memory() is None and images.fits_memory(10**9, 224)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  1000 kB\n")
    assert images.available_memory() == 1_024_000
    for name, text in (("max", "900000"), ("current", "700000"), ("stat", "anon 400000\ninactive_file 300000\n")):
        (group / f"memory.{name}").write_text(text)
    assert images.available_memory() == 500_000  # files that are kept for later give way
    (group / "memory.current").write_text("2000000")
    assert images.available_memory() == 0


def test_a_set_without_files_is_not_sent_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_lt.run(MakeLTConfig(source="digits"), tmp_path).manifest
    monkeypatch.setattr(images, "available_memory", lambda: 10_000)
    with pytest.raises(DataError, match=r"lower --image-size$"):
        load_pixels(manifest, "train", 8)


@pytest.mark.parametrize("count", [0, 1, 63, 1000, 100_000])
def test_every_image_is_looked_at_once_and_few_futures_are_held(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    seen, asked, moved = [], [], []
    submit = images.ThreadPoolExecutor.submit
    monkeypatch.setattr(images.ThreadPoolExecutor, "submit", lambda self, *a: (asked.append(1), submit(self, *a))[1])

    monkeypatch.setattr("balms_cli.reporter.Task.advance", lambda self, amount: moved.append(amount))
    bad = images._for_all(lambda i: (seen.append(i), "odd" if i % 7 == 3 else None)[1], count, Reporter(), "t", 3)
    assert sorted(seen) == list(range(count)) and bad == [(i, "odd") for i in range(count) if i % 7 == 3]
    assert sum(moved) == count and len(asked) <= max(24, count / 60)


def test_digits(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    manifest = make_lt.run(MakeLTConfig(source="digits"), tmp_path).manifest
    pixels = load_pixels(manifest, "train", 8)
    bunch = load_digits()
    train = manifest.splits["train"]
    for row, (key, label) in enumerate(zip(train.keys, train.labels, strict=True)):
        i = int(key.removeprefix("digit-")) - 1
        assert bunch.target[i] == label
        assert np.abs(pixels[row, 1] - bunch.images[i] * 255 / 16).max() <= 0.5
    assert load_pixels(manifest, "test", 32).shape == (500, 3, 32, 32)
    for odd in ("digit-0", "digit-1798", "digit-" + "1" * 5000, "digit-\u0663", "cat.png"):
        strange = replace(manifest, splits={"train": replace(train, keys=[odd, *train.keys[1:]])})
        with pytest.raises(DataError, match="not an image of the digits"):
            load_pixels(strange, "train", 8)


def test_cifar_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, tar, pixels = fake_cifar(tmp_path / "download")
    monkeypatch.setitem(known.ARCHIVES, "fake", archive)
    monkeypatch.setenv("BALMS_CACHE", str(tmp_path / "cache"))
    config = MakeLTConfig(source="fake", imbalance=2, data_root=str(tar.parent), val_per_class=1)
    manifest = make_lt.run(config, tmp_path / "w").manifest
    assert manifest.class_counts == [5, 2]
    loaded = load_pixels(manifest, "train", 32)
    for row, key in enumerate(manifest.splits["train"].keys):
        _, name, file = key.split("/")
        i = 2 * int(file.removeprefix("thing_s_").removesuffix(".png")) + int(name[1:])
        assert (loaded[row] == pixels[i]).all()
    assert load_pixels(manifest, "val", 16).shape == (2, 3, 16, 16)
    (tmp_path / "cache").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="is gone; put them there"):
        load_pixels(manifest, "train", 32)
    monkeypatch.setenv("BALMS_DATA", str(tmp_path / "moved"))
    manifest = Manifest.load(manifest.path)
    assert (load_pixels(manifest, "train", 32) == loaded).all()
    file = tmp_path / "moved" / "fake-batches" / "data_batch_1"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(DataError, match="md5 differs"):
        load_pixels(manifest, "train", 32)
