"""Odd, damaged and hostile files, each a real one: training from memory, training from disk and prediction read the same."""

import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from balms_cli.config import MakeLTConfig
from balms_cli.data import decode
from balms_cli.data.decode import quiet_pillow, read_image
from balms_cli.data.feed import OnDisk
from balms_cli.data.images import check_images, load_pixels, median_size
from balms_cli.data.manifest import Manifest
from balms_cli.data.sources import open_source
from balms_cli.data.unlabelled import find_images, read_batches
from balms_cli.errors import DataError
from balms_cli.reporter import Reporter
from balms_cli.stages import make_lt

from .data_helpers import Listener, picture, tree

RNG = np.random.default_rng(7)
SIDE = 24
DEEP = RNG.integers(0, 65536, (SIDE, SIDE, 4), dtype=np.uint16)  # values of 16 bits
COARSE = DEEP >> 8
SCALED = np.rint(DEEP / 257).astype(int)  # what they are in 8 bits
# A red corner and a green foot: no turn or mirror leaves it as it is.
UPRIGHT = np.zeros((40, SIDE, 3), np.uint8)
UPRIGHT[:10, :12], UPRIGHT[-6:] = (255, 0, 0), (0, 255, 0)
TURNS = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
         6: np.rot90, 7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: lambda a: np.rot90(a, 3)}  # fmt: skip


# ---- files written byte by byte, so that what is in them is known without any library


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *before: tuple[bytes, bytes]) -> bytes:
    """``rows``: every row with its filter byte 0; ``before``: chunks ahead of the pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    middle = b"".join(chunk(*one) for one in before) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + head + middle + chunk(b"IEND", b"")


def png_of(values: np.ndarray, colour: int, *before: tuple[bytes, bytes]) -> bytes:
    big = values.astype(values.dtype.newbyteorder(">"))
    rows = b"".join(b"\0" + row.tobytes() for row in big)
    return png(values.shape[1], values.shape[0], 8 * values.dtype.itemsize, colour, rows, *before)


def tiff_of(values: np.ndarray, photometric: int, kind: int = 1, order: str = "<") -> bytes:
    """Uncompressed, [H, W, channels]. ``photometric``: 0 white is zero, 1 black is zero, 2 RGB; ``kind``: 1 uint, 3 float."""
    height, width, channels = values.shape
    body = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = struct.pack(f"{order}{channels}H", *[8 * values.dtype.itemsize] * channels)
    content = body + (bits if channels > 2 else b"")
    one = struct.pack(f"{order}HH", 8 * values.dtype.itemsize, 0)
    place = struct.pack(f"{order}I", 8 + len(body)) if channels > 2 else one
    entries = [(256, width), (257, height), (259, 1), (262, photometric), (273, 8), (277, channels), (278, height),
               (279, len(body)), (339, kind)]  # fmt: skip
    tags = [(tag, struct.pack(f"{order}HHII", tag, 4, 1, value)) for tag, value in entries]
    tags.append((258, struct.pack(f"{order}HHI", 258, 3, channels) + place))
    table = struct.pack(f"{order}H", len(tags)) + b"".join(packed for _, packed in sorted(tags)) + bytes(4)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(content))
    return start + content + table


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)


def chw(values: np.ndarray) -> np.ndarray:
    return np.asarray(values).transpose(2, 0, 1).astype(int)


def manifest_of(folder: Path, workspace: Path, **options: object) -> Manifest:
    return make_lt.run(MakeLTConfig(source=str(folder), as_is=True, test_fraction=0.01, **options), workspace).manifest


def read_everywhere(manifest: Manifest, size: int, crop: str = "train") -> list[dict[str, np.ndarray]]:
    """Pixels by key as training from memory, training from disk (1 thread, and 3) and prediction read them."""
    keys, root = manifest.splits[crop].keys, Path(manifest.source["root"])
    found = [dict(zip(keys, load_pixels(manifest, crop, size), strict=True))]
    for workers in (1, 3):
        disk = OnDisk(manifest, crop, size, torch.device("cpu"), workers=workers)
        found.append(dict(zip(keys, disk.rows(torch.arange(len(keys))).numpy(), strict=True)))
        disk.close()
    batches = read_batches(find_images([str(root)]), size, 5, 2)
    predicted = {Path(path).relative_to(root).as_posix(): pixels for batch in batches for path, pixels in batch}
    return [*found, {key: predicted[key] for key in keys}]


# ---- pixels


def odd_pictures() -> dict[str, tuple[bytes, np.ndarray, int]]:
    """Name -> content, true pixels [SIDE, SIDE, 3], and how far off a value may be."""
    g16, rgb16 = gray(SCALED[:, :, 0]), SCALED[:, :, :3]
    inks = RNG.integers(0, 256, (3, 3, 4), dtype=np.uint8).repeat(8, 0).repeat(8, 1)  # fields of 8 pixels: JPEG keeps them
    paper = (255 - inks[:, :, :3].astype(int)) * (255 - inks[:, :, 3:].astype(int)) / 255
    table = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    index = RNG.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    clear = (b"tRNS", bytes(RNG.integers(0, 2, 256, dtype=np.uint8) * 255))  # half of the entries are transparent
    two_bits = RNG.integers(0, 4, (SIDE, SIDE), dtype=np.uint8)
    packed = np.packbits(np.unpackbits(two_bits[:, :, None], axis=2)[:, :, 6:].reshape(SIDE, -1), axis=1)
    unit = (DEEP[:, :, :1] / 65535).astype(np.float32)
    frames = [Image.fromarray(np.full((SIDE, SIDE, 3), v, np.uint8)) for v in ((250, 10, 30), (10, 240, 20), (0, 0, 255))]
    first = np.asarray(frames[0])

    def saved(image: Image.Image, format: str, **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, format, **options)
        return file.getvalue()

    moving = {"save_all": True, "append_images": frames[1:]}
    cmyk = saved(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in cmyk  # so the inks are stored inverted, as Photoshop does
    return {
        "gray16.png": (png_of(DEEP[:, :, :1], 0), g16, 0),
        "gray16 and alpha.png": (png_of(DEEP[:, :, :2], 4), g16, 1),
        "rgb16.png": (png_of(DEEP[:, :, :3], 2), rgb16, 1),
        "rgba16.png": (png_of(DEEP, 6), rgb16, 1),
        "gray16-le.tif": (tiff_of(DEEP[:, :, :1], 1), g16, 0),
        "gray16-be.tif": (tiff_of(DEEP[:, :, :1], 1, order=">"), g16, 0),
        "gray16-negative.tif": (tiff_of(DEEP[:, :, :1], 0), 255 - g16, 0),
        "gray8-negative.tif": (tiff_of(COARSE[:, :, :1].astype(np.uint8), 0), 255 - gray(COARSE[:, :, 0]), 0),
        "rgb16.tif": (tiff_of(DEEP[:, :, :3], 2), rgb16, 1),
        "unit float.tif": (tiff_of(unit, 1, 3), g16, 0),
        "byte float.tif": (tiff_of(unit * 255, 1, 3), g16, 0),
        "gray16.pgm": (f"P5 {SIDE} {SIDE} 65535\n".encode() + DEEP[:, :, 0].astype(">u2").tobytes(), g16, 0),
        "cmyk.jpg": (cmyk, np.rint(paper), 4),
        "cmyk.tif": (saved(Image.fromarray(inks, "CMYK"), "TIFF"), np.rint(paper), 1),
        "palette.png": (png_of(index[:, :, None], 3, (b"PLTE", table.tobytes())), table[index], 0),
        "palette, half of it clear.png": (png_of(index[:, :, None], 3, (b"PLTE", table.tobytes()), clear), table[index], 0),
        "palette of 4.png": (png(SIDE, SIDE, 2, 3, b"".join(b"\0" + row.tobytes() for row in packed),
                                 (b"PLTE", table[:4].tobytes()), (b"tRNS", b"\0\xff\x80\0")), table[two_bits], 0),
        "moving.gif": (saved(frames[0], "GIF", **moving), first, 0),
        "moving.webp": (saved(frames[0], "WEBP", lossless=True, **moving), first, 0),
        "moving.png": (saved(frames[0], "PNG", **moving), first, 0),
        "moving, another still.png": (saved(frames[0], "PNG", default_image=True, **moving), first, 0),
        "pages.tif": (saved(frames[0], "TIFF", **moving), first, 0),
        "last frame lost.gif": (saved(frames[0], "GIF", **moving)[:-20], first, 0),
    }  # fmt: skip


def test_every_kind_of_pixel_is_read_alike_everywhere(tmp_path: Path) -> None:
    pictures = odd_pictures()
    tree(tmp_path / "photos", {"b": 1})
    (tmp_path / "photos" / "a").mkdir()
    for name, (content, _, _) in pictures.items():
        (tmp_path / "photos" / "a" / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_everywhere(manifest_of(tmp_path / "photos", tmp_path / "w"), SIDE)
    tested = 0
    for one in found:
        for key, pixels in one.items():
            if (name := key.removeprefix("a/")) in pictures:
                _, true, slack = pictures[name]
                assert np.abs(pixels.astype(int) - chw(true)).max() <= slack, name
                tested += 1
    assert tested >= 4 * (len(pictures) - 1)  # all but the one image that became the test split


def test_values_that_are_no_numbers_are_no_light(tmp_path: Path) -> None:
    values = np.full((SIDE, SIDE, 1), 0.5, np.float32)
    values[0, 0], values[0, 1], values[0, 2], values[0, 3] = np.nan, -np.inf, np.inf, -0.25
    (tmp_path / "f.tif").write_bytes(tiff_of(values, 1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read_image(tmp_path / "f.tif", SIDE)
    assert pixels[0, 0, :5].tolist() == [0, 0, 255, 0, 128]


@pytest.mark.parametrize(("size", "drafted"), [(60, (160, 120)), (61, (320, 240)), (120, (320, 240)), (121, (640, 480))])
def test_a_photo_is_decoded_at_twice_the_size_needed_at_least(tmp_path: Path, size: int, drafted: tuple[int, int]) -> None:
    with Image.open(picture(tmp_path / "x.jpg", size=(640, 480))) as image:
        decode._draft(image, size, 480)
        assert image.size == drafted


@pytest.mark.parametrize(("highest", "white"), [(255, 255), (256, 1), (65535, 255)])
def test_the_range_of_32_bits_is_that_of_the_values(tmp_path: Path, highest: int, white: int) -> None:
    Image.fromarray(np.array([[0, highest]] * 2, dtype=np.int32)).save(tmp_path / "x.tif")
    assert read_image(tmp_path / "x.tif", 2)[0].tolist() == [[0, white]] * 2


def test_a_deep_image_of_many_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_STRIP", 5 * SIDE)  # 5 rows at a time: the last strip is shorter
    (tmp_path / "g.png").write_bytes(png_of(DEEP[:, :, :1], 0))
    assert (read_image(tmp_path / "g.png", SIDE) == chw(gray(SCALED[:, :, 0]))).all()


@pytest.mark.parametrize(
    ("ending", "options"),
    [("png", {}), ("tif", {}), ("webp", {"lossless": True}), ("jpg", {"quality": 100, "subsampling": 0})],
)
def test_turned_photos_of_every_format(tmp_path: Path, ending: str, options: dict) -> None:
    """Also where a part is cut out: places are those of the upright photo."""
    asked = []

    def foot(width: int, height: int) -> tuple[int, int, int, int]:
        asked.append((width, height))
        return 0, height - SIDE, SIDE, SIDE

    for orientation, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / "p" / "a" / f"{orientation}.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(turn(UPRIGHT))).save(file, exif=exif, **options)
        assert np.abs(read_image(file, SIDE) - chw(UPRIGHT[8:32])).max() <= 30
        assert np.abs(read_image(file, SIDE, foot) - chw(UPRIGHT[-SIDE:])).max() <= 30
    assert set(asked) == {(SIDE, 40)}
    assert median_size(open_source(MakeLTConfig(source=str(tmp_path / "p")), Reporter())) == [SIDE, 40]


def test_exif_behind_the_pixels(tmp_path: Path) -> None:
    """Where a PNG file may have it, and Pillow finds it only once all is read."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = png_of(np.ascontiguousarray(np.rot90(UPRIGHT)), 2)
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    late = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    (tmp_path / "p.png").write_bytes(content[:-12] + late + content[-12:])
    assert (read_image(tmp_path / "p.png", SIDE) == chw(UPRIGHT[8:32])).all()
    assert (read_image(tmp_path / "p.png", SIDE, lambda width, height: (0, height - SIDE, SIDE, SIDE))
            == chw(UPRIGHT[-SIDE:])).all()  # fmt: skip


@pytest.mark.parametrize(
    "block",
    [b"\xff" * 50, b"", b"II*\0", b"II*\0\x08\0\0\0\xff\xff",
     b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x112, 3, 1, 99),  # an orientation that there is not
     b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x10F, 2, 5000, 999_999),  # text that begins behind the end
     b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIII", 0x8769, 4, 1, 8, 8)],  # a table that holds itself
)  # fmt: skip
def test_broken_exif_costs_no_photo(tmp_path: Path, block: bytes) -> None:
    Image.new("RGB", (30, 20), (120, 120, 120)).save(tmp_path / "p.jpg")
    content, exif = (tmp_path / "p.jpg").read_bytes(), b"Exif\0\0" + block
    (tmp_path / "p.jpg").write_bytes(content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:])
    with quiet_pillow():
        assert (read_image(tmp_path / "p.jpg", 8) == 120).all()


def test_a_photo_with_another_behind_it(tmp_path: Path) -> None:
    """MPO, as phones write it: the first picture, scaled down while it is decoded as that of a plain JPEG file is."""
    x, y = np.meshgrid(np.arange(1200), np.arange(900))
    first = Image.fromarray(np.stack([x // 5, y // 4, (x + y) // 9], axis=2).astype(np.uint8))
    first.save(tmp_path / "p.mpo", save_all=True, append_images=[Image.new("RGB", (1200, 900), "red")], quality=95)
    first.save(tmp_path / "p.jpg", quality=95)
    with Image.open(tmp_path / "p.mpo") as image:
        assert image.format == "MPO"
    assert (read_image(tmp_path / "p.mpo", 32) == read_image(tmp_path / "p.jpg", 32)).all()


# ---- damaged files, and files made to hurt


def damaged(tmp_path: Path) -> dict[str, str]:
    """Files under ``tmp_path/p/a``, and what is wrong with each."""
    picture(tmp_path / "p" / "a" / "good.png", size=(SIDE, SIDE))
    picture(tmp_path / "p" / "b" / "good.png", size=(SIDE, SIDE))
    whole = Image.fromarray(RNG.integers(0, 256, (60, 60, 3), dtype=np.uint8))
    expected = {}
    for ending in ("jpg", "png", "webp", "gif", "bmp", "ppm", "jp2"):
        file = tmp_path / "p" / "a" / f"half.{ending}"
        whole.save(file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        expected[f"a/half.{ending}"] = "truncated"
    whole.save(tmp_path / "p" / "a" / "no end.jpg")
    (tmp_path / "p" / "a" / "no end.jpg").write_bytes((tmp_path / "p" / "a" / "no end.jpg").read_bytes()[:-40])
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
    page, eps = b"<!doctype html><title>404</title>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    contents = {"phone.jpg": heic, "page.jpg": page, "program.png": eps, "nothing.png": b"", "zeros.jpg": bytes(5000),
                "start only.png": b"\x89PNG\r\n\x1a\n"}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / "p" / "a" / name).write_bytes(content)
    return expected | {
        "a/no end.jpg": "truncated", "a/phone.jpg": "a HEIC photo: convert it to JPEG", "a/page.jpg": "not an image",
        "a/program.png": "not an image", "a/nothing.png": "empty", "a/zeros.jpg": "not an image",
        "a/start only.png": "not an image",
    }  # fmt: skip


def test_damaged_files_are_named_with_the_reason_by_every_reader(tmp_path: Path) -> None:
    expected = damaged(tmp_path)
    source = open_source(MakeLTConfig(source=str(tmp_path / "p")), Reporter())
    assert dict(check_images(source, threads=2)) == expected
    read = [one for batch in read_batches(find_images([str(tmp_path / "p")]), SIDE, 4, 2) for one in batch]
    told = {Path(path).relative_to(tmp_path / "p").as_posix(): pixels for path, pixels in read if isinstance(pixels, str)}
    assert told == expected
    manifest = manifest_of(tmp_path / "p", tmp_path / "w", check=False)
    with pytest.raises(DataError, match=f"{len(expected) - 1} of|{len(expected)} of") as caught:
        load_pixels(manifest, "train", SIDE)
    assert "\n" not in str(caught.value)
    disk = OnDisk(manifest, "train", SIDE, torch.device("cpu"), workers=2)
    row = manifest.splits["train"].keys.index("a/phone.jpg")
    with pytest.raises(DataError, match="HEIC photo: convert it to JPEG"):
        disk.rows(torch.tensor([row]))
    disk.close()
    kept = manifest_of(tmp_path / "p", tmp_path / "w", skip_bad=True)
    assert {one["path"] for one in kept.skipped} == set(expected)
    assert load_pixels(kept, "train", SIDE).any()


def test_what_the_gpus_decoder_refuses_pillow_reads_or_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's decoder, here on the CPU: it raises for the whole batch, and does not say for which file."""
    x, y = np.meshgrid(np.arange(80), np.arange(50))
    smooth = Image.fromarray(np.stack([3 * x, 5 * y, x + y], axis=2).astype(np.uint8))
    for name in ("a/0", "a/1", "a/2", "b/0", "b/1"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        smooth.save(tmp_path / "p" / f"{name}.jpg", quality=95)
    manifest = manifest_of(tmp_path / "p", tmp_path / "w")
    disk = OnDisk(manifest, "train", SIDE, torch.device("cpu"), workers=1, decode="gpu")
    rows = torch.arange(len(disk))
    pillows = torch.from_numpy(load_pixels(manifest, "train", SIDE)).int()
    assert 0 < (disk.rows(rows).int() - pillows).abs().max() <= 6  # another decoder, the same picture

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such JPEG")

    with monkeypatch.context() as patched:
        patched.setattr("torchvision.io.decode_jpeg", refuse)
        assert (disk.rows(rows).int() - pillows).abs().max() <= 1
    key = manifest.splits["train"].keys[2]
    content = (tmp_path / "p" / key).read_bytes()
    (tmp_path / "p" / key).write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match=rf"^{key} can no longer be read \(truncated\)"):
        disk.rows(rows)
    disk.close()


def bombs() -> dict[str, bytes]:
    """Small files that claim, or hold, thousands of millions of bytes."""
    empty = zlib.compress(bytes(1000))
    zeros = zlib.compressobj(9)
    blank = b"".join(zeros.compress(bytes(1 << 20)) for _ in range(150)) + zeros.flush()  # 150 MB of comment
    small = b"".join(b"\0" + bytes(SIDE) for _ in range(SIDE))
    many = struct.pack("<HHIH", 277, 4, 1, 1)  # values a pixel: one, to become 2048
    return {
        "wide.png": png(60_000, 60_000, 8, 2, empty),
        "just over.png": png(9_500, 9_500, 16, 6, empty),
        "comment.png": png(SIDE, SIDE, 8, 0, small, (b"zTXt", b"Comment\0\0" + blank)),
        "profile.png": png(SIDE, SIDE, 8, 0, small, (b"iCCP", b"icc\0\0" + blank)),
        "screen.gif": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b";",
        "frame.gif": b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6)
                     + b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02\x44\x01\0;",
        "sheet.bmp": b"BM" + struct.pack("<IHHI", 54, 0, 0, 54)
                     + struct.pack("<IiiHHIIiiII", 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "scan.ppm": b"P6 99999 99999 255\n" + bytes(100),
        "samples.tif": tiff_of(DEEP[:, :, :1], 1).replace(many, many[:-2] + b"\0\x08"),  # Pillow logs an error
    }  # fmt: skip


READ_ALL = """
import json, sys
from balms_cli.data.decode import BadImage, quiet_pillow, read_image

def peak():  # not ru_maxrss: a program started by a large one counts that one's memory too
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

reasons, before = {}, peak()
with quiet_pillow():
    for path in sys.argv[1:]:
        try:
            reasons[path] = str(read_image(path, 24).shape)
        except BadImage as error:
            reasons[path] = str(error)
print(json.dumps([reasons, peak() - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's /proc")
def test_bombs_go_off_nowhere(tmp_path: Path) -> None:
    """In a process of its own, whose memory tells what they took."""
    made = bombs()
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
        assert len(content) < 1_000_000
    command = [sys.executable, "-c", READ_ALL, *made]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    reasons, taken = json.loads(done.stdout)
    assert taken < 100_000 and done.stderr == ""  # KiB
    text = "text or profile too large"
    assert (
        reasons | {"comment.png": text, "profile.png": text, "screen.gif": "not an image", "samples.tif": "not an image"}
        == reasons
    )
    assert sum("pixels" in reason for reason in reasons.values()) == len(reasons) - 4


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads with 89 million pixels each would take gigabytes; small images do not wait for each other."""
    tree(tmp_path / "p", {"a": 12, "b": 1})
    at_work, most, real, lock = [0], [0], Image.Image.load, threading.Lock()

    def slow(image: Image.Image) -> object:
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        time.sleep(0.02)
        with lock:
            at_work[0] -= 1
        return real(image)

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", slow)
    source = open_source(MakeLTConfig(source=str(tmp_path / "p")), Reporter())
    assert check_images(source, threads=4) == [] and most[0] > 1
    most[0] = 0
    monkeypatch.setattr(decode, "BIG", 63)  # these have 64 pixels
    assert check_images(source, threads=4) == [] and most[0] == 1


# ---- names


NAMES = (
    "with spaces", "caf\u00e9 (composed)", "cafe\u0301 (in parts)", "caf\u00e9", "cafe\u0301",
    "\U0001f408 and \U0001f469\u200d\U0001f52c", "\u05d7\u05ea\u05d5\u05dc \u0642\u0637",  # emoji; Hebrew and Arabic
    "-rf", "a & <b> \"c\" 'd'", "%41 $HOME `x`", "#hash, comma", "\u00a0nbsp", "100",
)  # fmt: skip


def test_names_of_any_script_stay_with_their_pixels(tmp_path: Path) -> None:
    """Each file has a colour of its own, so that an image under another's name would be seen."""
    colours = {}
    for c, folder in enumerate(NAMES):
        for i, name in enumerate((f"{NAMES[c]} 1.PNG", "\u00fc 2.png", "u\u0308 2.png")):
            key = f"{folder}/{name}"
            colours[key] = (17 * c, 80 * i, 90)
            (tmp_path / "my photos" / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 11), colours[key]).save(tmp_path / "my photos" / key)
    if len(os.listdir(tmp_path / "my photos")) < len(NAMES):
        pytest.skip("this file system takes composed and decomposed letters for the same")
    made = manifest_of(tmp_path / "my photos", tmp_path / "w s")
    manifest = Manifest.load(made.path)  # as it was written, not as it is remembered
    assert sorted(manifest.classes) == sorted(NAMES) and unicodedata.normalize("NFC", NAMES[4]) == NAMES[3]
    for split in ("train", "test"):
        labels = dict(zip(manifest.splits[split].keys, manifest.splits[split].labels, strict=True))
        for one in read_everywhere(manifest, 8, split):
            for key, pixels in one.items():
                assert pixels[:, 4, 4].tolist() == list(colours[key]), key
                assert manifest.classes[labels[key]] == key.split("/")[0]
    assert set(manifest.splits["train"].keys) | set(manifest.splits["test"].keys) == set(colours)


def test_the_command_line_takes_such_names_too(balms, chain, tmp_path: Path) -> None:
    folder = tmp_path / "my \U0001f408 photos, \u05d7\u05ea\u05d5\u05dc"
    for name in ("a b.png", "\u00e9.png", "e\u0301.png", "-x.png"):
        picture(folder / name, size=(SIDE, SIDE))
    done = balms("predict", chain.pretrained, folder, "--quiet")
    assert done.code == 0, done.err
    assert sorted(line.split("\t")[0] for line in done.out.splitlines()) == sorted(
        str(folder / name) for name in ("a b.png", "\u00e9.png", "e\u0301.png", "-x.png"))  # fmt: skip


def test_names_that_differ_by_case_are_two_and_it_is_told(tmp_path: Path) -> None:
    """They stay apart, as the file system keeps them apart; make-lt warns, as a Mac or Windows would merge them."""
    root = tmp_path / "p"
    for key, value in {"Cat/A.png": 10, "Cat/a.png": 20, "cat/A.png": 30, "cat/a.png": 40, "cat/b.png": 50}.items():
        picture(root / key, value)
    if len(os.listdir(root)) < 2:
        pytest.skip("this file system does not mind case")
    listener = Listener()
    config = MakeLTConfig(source=str(root), as_is=True, test_fraction=0.01)
    manifest = make_lt.run(config, tmp_path / "w", listener).manifest
    assert sorted(manifest.classes) == ["Cat", "cat"]
    told = [text for text in listener.warnings if "Cat, cat" in text]
    assert len(told) == 1 and "case" in told[0]
    for one in read_everywhere(manifest, 8):
        assert {key: pixels[0, 0, 0] for key, pixels in one.items()} == {
            key: value for key, value in {"Cat/A.png": 10, "Cat/a.png": 20, "cat/A.png": 30, "cat/a.png": 40,
                                          "cat/b.png": 50}.items() if key in one}  # fmt: skip
    quiet = Listener()
    tree(tmp_path / "q", {"cat": 2, "dog": 2})
    make_lt.run(MakeLTConfig(source=str(tmp_path / "q"), as_is=True), tmp_path / "w", quiet)
    assert not any("case" in text for text in quiet.warnings)


def test_a_folder_above_the_class_folders_is_one_class_and_it_is_told(tmp_path: Path) -> None:
    tree(tmp_path / "download" / "photos", {"a": 3, "b": 2})
    listener = Listener()
    make_lt.run(MakeLTConfig(source=str(tmp_path / "download"), as_is=True), tmp_path / "w", listener)
    told = [text for text in listener.warnings if "only class" in text]
    assert len(told) == 1 and told[0].endswith(str(tmp_path / "download" / "photos"))


# ---- links and paths


def test_circles_of_links_end(tmp_path: Path) -> None:
    root = tree(tmp_path / "p", {"a": 2, "b": 3})
    (root / "a" / "self.png").symlink_to("self.png")
    (root / "a" / "there.png").symlink_to("back.png")
    (root / "a" / "back.png").symlink_to("there.png")
    (root / "a" / "here").symlink_to(".")
    (root / "a" / "up").symlink_to("..")  # to the root: b's images are not a's
    (root / "a" / "deep").mkdir()
    (root / "a" / "deep" / "again").symlink_to("../deep")
    (root / "c").symlink_to("c")
    source = open_source(MakeLTConfig(source=str(root)), Reporter())
    bad = dict(source.bad) | dict(check_images(source))
    assert {key for key, _ in source.train} - set(bad) == {"a/00.png", "a/01.png", "b/00.png", "b/01.png", "b/02.png"}
    assert set(bad) == {"a/self.png", "a/there.png", "a/back.png"}
    found = {path: problem for path, problem in find_images([str(root / "a")])}
    assert {Path(path).name for path, problem in found.items() if problem is None} >= {"00.png", "01.png"}
    read = {Path(p).name: x for batch in read_batches(found.items(), 8, 4, 0) for p, x in batch}
    assert {name for name, x in read.items() if not isinstance(x, str)} == {"00.png", "01.png"}
    (root / "list.txt").write_text("a/self.png a\na/00.png a\na/here/01.png a\nb/00.png b\na/there.png b\n")
    listed = open_source(MakeLTConfig(source=str(root / "list.txt")), Reporter())
    assert {key for key, _ in listed.bad + check_images(listed)} == {"a/self.png", "a/there.png"}


@pytest.mark.parametrize(
    "path", ["../x.png", "a/../../x.png", "/etc/x.png", "a/../../p2/x.png", "..\\x.png", "a\\..\\..\\x.png"]
)
def test_a_path_out_of_the_root_is_refused_with_its_line(tmp_path: Path, path: str) -> None:
    root = tree(tmp_path / "p", {"a": 2})
    picture(tmp_path / "x.png")
    picture(tmp_path / "p2" / "x.png")  # begins like the root, and is beside it
    (root / "list.txt").write_text(f"a/00.png cat\n{path} dog\n")
    with pytest.raises(DataError, match=r"line 2.*leads out of"):
        open_source(MakeLTConfig(source=str(root / "list.txt")), Reporter())


def test_a_folder_swapped_for_a_link_out_is_not_followed_by_any_reader(tmp_path: Path) -> None:
    manifest = manifest_of(tree(tmp_path / "p", {"a": 3, "b": 3}), tmp_path / "w")
    tree(tmp_path / "secret", {"": 3})
    for file in (tmp_path / "p" / "a").iterdir():
        file.unlink()
    (tmp_path / "p" / "a").rmdir()
    (tmp_path / "p" / "a").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="leaves the folder"):
        load_pixels(manifest, "train", 8)
    disk = OnDisk(manifest, "train", 8, torch.device("cpu"), workers=1)
    with pytest.raises(DataError, match="leaves the folder"):
        disk.rows(torch.arange(len(disk)))
    disk.close()
    found = dict(find_images([str(tmp_path / "p")]))
    assert found[str(tmp_path / "p" / "a")] == "a link that leaves the folder"
    assert sum(problem is None for problem in found.values()) == 3


# ---- lists as Windows writes them


def test_line_ends_marks_and_backslashes_of_windows(tmp_path: Path) -> None:
    root = tree(tmp_path, {"my cats": 2, "caf\u00e9": 1})
    lines = ["my cats\\00.png cat", "my cats\\01.png cat", "caf\u00e9\\00.png dog", ""]
    plain = [("my cats/00.png", 0), ("my cats/01.png", 0), ("caf\u00e9/00.png", 1)]
    texts = {
        "plain": "\n".join(lines).replace("\\", "/").encode(),
        "crlf": "\r\n".join(lines).replace("\\", "/").encode(),
        "bom": ("\ufeff" + "\r\n".join(lines).replace("\\", "/")).encode(),
        "backslash": ("\ufeff" + "\r\n".join(lines)).encode(),
        "utf16": "\r\n".join(lines).encode("utf-16"),
    }
    for name, content in texts.items():
        (root / f"{name}.txt").write_bytes(content)
        source = open_source(MakeLTConfig(source=str(root / f"{name}.txt")), Reporter())
        assert (source.train, source.classes) == (plain, ["cat", "dog"]), name
        assert check_images(source) == []
    if os.name == "posix":  # a file that has a backslash in its name is that file
        picture(root / "my cats\\00.png", 99)
        source = open_source(MakeLTConfig(source=str(root / "backslash.txt")), Reporter())
        assert source.train[0][0] == "my cats\\00.png"


def test_csv_as_windows_writes_it(tmp_path: Path) -> None:
    root = tree(tmp_path, {"a": 3, "b, c": 1})
    text = '\ufeffpath,label\r\na/00.png,cat\r\na/01.png,cat\r\n"b, c/00.png","dog, big"\r\n'
    (root / "all.csv").write_bytes(text.encode())
    source = open_source(MakeLTConfig(source=str(root / "all.csv")), Reporter())
    assert source.train == [("a/00.png", 0), ("a/01.png", 0), ("b, c/00.png", 1)]
    assert source.classes == ["cat", "dog, big"] and check_images(source) == []


# ---- photos of mixed sizes made from annotated pictures (examples/lvis_crops.py)


@pytest.fixture
def lvis_crops(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import lvis_crops

    return lvis_crops


def lvis_folder(root: Path) -> Path:
    """12 pictures of noise; a cat in each, a dog in the first 5, a bird in one, and boxes of a few pixels."""
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(12):
        Image.fromarray(RNG.integers(0, 256, (100, 120, 3), dtype=np.uint8)).save(root / "images" / f"{i:03}.jpg", quality=100)
        images.append({"id": i, "file_name": f"{i:03}.jpg", "width": 120, "height": 100})
        boxes = [(1, [10.4, 20.2, 40.3, 50.5]), (1, [0, 0, 9, 90])]
        boxes += [(2, [90.5, 60, 29.5, 40])] if i < 5 else []
        boxes += [(3, [0, 0, 60, 60])] if i == 7 else []
        annotations += [{"id": 10 * i + j, "image_id": i, "category_id": c, "bbox": box} for j, (c, box) in enumerate(boxes)]
    names = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog/puppy"}, {"id": 3, "name": "bird"}]
    document = {"images": images, "annotations": annotations, "categories": names}
    (root / "lvis_train.json").write_text(json.dumps(document))
    (root / "lvis_val_other.json").write_text(json.dumps(document | {"categories": names[:2]}))  # other categories: not read
    return root


def test_crops_hold_what_the_boxes_hold_and_no_picture_is_in_both_splits(lvis_crops, tmp_path: Path) -> None:
    root = lvis_folder(tmp_path / "lvis")
    runner, app = CliRunner(), typer.Typer()
    app.command()(lvis_crops.main)
    done = runner.invoke(app, [str(root), str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    files = sorted(path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*.jpg"))
    count = {place: sum(file.startswith(place + "/") for file in files)
             for place in ("train/cat", "test/cat", "train/dog-puppy", "test/dog-puppy")}  # fmt: skip
    assert sum(count.values()) == len(files) == 12 + 5  # neither the bird nor the thin boxes
    assert count["test/cat"] == 3 and count["test/dog-puppy"] == 1  # a quarter
    pictures = {split: {Path(file).name[:3] for file in files if file.startswith(split)} for split in ("train", "test")}
    assert not pictures["train"] & pictures["test"]
    for file in files:
        with Image.open(tmp_path / "a" / file) as image, Image.open(root / "images" / f"{Path(file).name[:3]}.jpg") as whole:
            left, top, right, bottom = (10, 20, 51, 71) if "cat" in file else (90, 60, 120, 100)
            true = np.asarray(whole).astype(int)[top:bottom, left:right]
            assert image.size == (right - left, bottom - top) and np.abs(np.asarray(image) - true).mean() < 4
    assert runner.invoke(app, [str(root), str(tmp_path / "b")]).exit_code == 0
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    for place, told in ((tmp_path / "a", "is there already"), (tmp_path / "c", "no folder of pictures")):
        failed = runner.invoke(app, [str(root if place.exists() else tmp_path), str(place)])
        assert failed.exit_code == 1 and told in failed.output and len(failed.output.strip().splitlines()) == 1
    assert not (tmp_path / "c").exists()
