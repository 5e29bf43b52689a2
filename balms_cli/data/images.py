"""Pixels of a manifest's images as one uint8 array; and the check that finds unreadable images."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError
from ..reporter import Reporter
from . import known, moved
from .aside import name_some, printable
from .audit import case_clashes
from .decode import BadImage, fit, open_image, quiet_pillow, read_image, upright_size
from .folders import is_inside
from .manifest import Manifest, Split
from .sources import Source

_MEMORY_SHARE = 0.5  # of the memory that is free, what one array of pixels may take
_BATCH = 64  # images a thread takes at a time, at most


def load_pixels(
    manifest: Manifest, split: str, size: int, reporter: Reporter | None = None, *, threads: int | None = None
) -> np.ndarray:
    """Pixels of a split, in the order of its index: uint8 [N, 3, size, size], RGB.

    The shorter side is resized to ``size`` (bicubic, antialiased) and the centre cropped; an image that is ``size`` x
    ``size`` is left as it is, bit for bit. ``threads``: decoders (default: one a processor, 8 at most).
    Raises: DataError for unreadable images (all of them are named or counted), for a missing source, or where the array
    would take more than half of the free memory.
    """
    if split not in manifest.splits:
        raise DataError(f"{manifest.name} has no split '{split}'; it has {', '.join(manifest.splits)}")
    if reporter is not None:
        moved.tell(manifest.moved_from, manifest.source["root"], reporter)
    part, reporter = manifest.splits[split], reporter or Reporter()
    whole = {"digits": _load_digits, "cifar": _load_cifar}.get(manifest.source["kind"])
    _check_memory(len(part), size, in_files=whole is None)
    if whole is not None:
        return whole(manifest, part, size)
    return _load_files(manifest, part, split, size, reporter, threads)


def _load_files(manifest: Manifest, part: Split, split: str, size: int, reporter: Reporter, threads: int | None) -> np.ndarray:
    real_root = root_of(manifest)
    pixels = np.empty((len(part), 3, size, size), dtype=np.uint8)

    def read(i: int) -> str | None:
        try:
            pixels[i] = read_image(inside(real_root, part.keys[i]), size)
        except BadImage as error:
            return str(error)
        return None

    bad = _for_all(read, len(part), reporter, f"reading {split} images", threads)
    if bad:
        raise DataError(_bad_message([(part.keys[i], reason) for i, reason in bad], len(part)))
    return pixels


def root_of(manifest: Manifest) -> str:
    """The real path of the folder that holds a manifest's images. Raises: DataError where it is gone."""
    root = manifest.source["root"]
    if not os.path.isdir(root):
        raise DataError(moved.gone(root))
    return os.path.realpath(root)


def check_images(source: Source, reporter: Reporter | None = None, *, threads: int | None = None) -> list[tuple[str, str]]:
    """Decode every image of a folder or list source once, in full. Returns: (key, reason) of the bad ones, in order.

    Warns of classes that are hardly meant: one alone, or two whose names only case or Unicode's normal form tells apart.
    """
    reporter = reporter or Reporter()
    if len(source.classes) == 1:
        name = printable(source.classes[0])
        reporter.warn(f"'{name}' is the only class, so there is nothing to tell apart; if it holds the class folders, name it: "
                      f"{Path(source.root) / name}")  # fmt: skip
    for names in case_clashes(source.classes):
        reporter.warn(f"classes {', '.join(map(printable, names))} differ by case or Unicode form only, and are kept apart; "
                      "if they are one, merge them: a Mac or Windows would")  # fmt: skip
    keys = list(dict.fromkeys(key for key, _ in source.train + (source.test or []) + (source.val or [])))
    real_root = os.path.realpath(source.root)

    def read(i: int) -> str | None:
        try:
            read_image(inside(real_root, keys[i]), None)
        except BadImage as error:
            return str(error)
        return None

    bad = _for_all(read, len(keys), reporter, "checking images", threads)
    return [(keys[i], reason) for i, reason in bad]


def refuse_bad(bad: list[tuple[str, str]], total: int) -> None:
    """Raises: DataError that names the bad images, if there are any."""
    if bad:
        raise DataError(_bad_message(bad, total))


def _bad_message(bad: list[tuple[str, str]], total: int) -> str:
    named = name_some([f"{printable(key)} ({reason})" for key, reason in bad])
    return f"{len(bad)} of {total} images cannot be read: {named}; balms make-lt --skip-bad leaves them out"


def median_size(source: Source, sample: int = 200) -> list[int]:
    """Median [width, height] in pixels of up to ``sample`` training images, evenly spaced; reads headers only."""
    if source.kind == "digits":
        return [8, 8]
    if source.kind == "cifar":
        return [32, 32]
    keys = [key for key, _ in source.train]
    picked = [keys[i] for i in np.linspace(0, len(keys) - 1, min(sample, len(keys))).astype(int)]
    sizes = []
    with quiet_pillow():
        for key in picked:
            try:
                with open_image(os.path.join(source.root, key)) as image:
                    sizes.append(upright_size(image))
            except Exception:
                continue  # an unreadable one: what it means is check_images' business
    return [int(x) for x in np.median(sizes, axis=0)] if sizes else [0, 0]


def inside(real_root: str, key: str) -> str:
    """The path of a key. Raises: BadImage where a link leads out of the root (the manifest may be a stranger's)."""
    path = os.path.join(real_root, key)
    if not is_inside(os.path.realpath(path), real_root):
        raise BadImage("a link that leaves the folder")
    return path


def _for_all(
    read: Callable[[int], str | None], count: int, reporter: Reporter, title: str, threads: int | None
) -> list[tuple[int, str]]:
    """``read`` for 0 to ``count`` - 1 in a pool (Pillow's decoders release the GIL). Returns: (i, reason) of the bad ones."""
    bad: list[tuple[int, str]] = []
    workers = threads or default_workers()
    size = min(_BATCH, 1 + count // (4 * workers))  # a future takes 2 KB: one an image would be gigabytes for millions

    def read_some(first: int) -> list[str | None]:
        return [read(i) for i in range(first, min(first + size, count))]

    with quiet_pillow(), ThreadPoolExecutor(workers) as pool, reporter.task(title, count, unit="image") as task:
        try:
            for first, reasons in zip(range(0, count, size), pool.map(read_some, range(0, count, size)), strict=True):
                bad += [(first + i, reason) for i, reason in enumerate(reasons) if reason is not None]
                task.advance(len(reasons))
        except BaseException:  # Ctrl-C: do not decode the rest first
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return bad


def default_workers() -> int:
    """Decoder threads: one a processor, 8 at most."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, processors)


def _load_digits(manifest: Manifest, part: Split, size: int) -> np.ndarray:
    """scikit-learn's digits: 8x8 values 0..16, scaled to 0..255, resized bilinearly, gray repeated."""
    from sklearn.datasets import load_digits

    small = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    pixels = np.empty((len(part), 3, size, size), dtype=np.uint8)
    for i, key in enumerate(part.keys):
        number = key.removeprefix("digit-")
        if not (number.isascii() and number.isdigit() and len(number) < 10 and 1 <= int(number) <= len(small)):
            raise DataError(f"{manifest.name}: '{printable(key)}' is not an image of the digits")
        image = Image.fromarray(small[int(number) - 1]).convert("RGB")
        pixels[i] = fit(image, size, resampling("digits"))
    return pixels


def _load_cifar(manifest: Manifest, part: Split, size: int) -> np.ndarray:
    """CIFAR from the official batches; a split may mix images of both parts, so both are read where needed."""
    archive, root = known.ARCHIVES.get(manifest.source["name"]), root_of(manifest)
    if archive is None:
        raise DataError(f"{manifest.name}: no such official set: '{manifest.source['name']}'")
    wanted = {key: i for i, key in enumerate(part.keys)}
    pixels = np.empty((len(part), 3, size, size), dtype=np.uint8)
    filled = 0
    for source_part in sorted({key.partition("/")[0] for key in part.keys} & {"train", "test"}):
        for keys, _, images in known.read_batches(archive, Path(root), source_part):
            for row, key in enumerate(keys):
                if (i := wanted.get(key)) is not None:
                    image = images[row]
                    pixels[i] = image if size == 32 else fit(Image.fromarray(image.transpose(1, 2, 0)), size)
                    filled += 1
    if filled < len(part):
        raise DataError(f"{manifest.name}: {len(part) - filled} of {len(part)} images are not in {root}")
    return pixels


def resampling(kind: str | None) -> Image.Resampling:
    """How images of a source of this kind are resized for training."""
    return Image.Resampling.BILINEAR if kind == "digits" else Image.Resampling.BICUBIC


def fits_memory(count: int, size: int) -> bool:
    """Whether the pixels of ``count`` images take no more than half of the memory that is free."""
    free = available_memory()
    return free is None or _pixel_bytes(count, size) <= _MEMORY_SHARE * free


def _pixel_bytes(count: int, size: int) -> int:
    """What the pixels of ``count`` images take: each of torchrun's processes on this machine holds them all."""
    return count * 3 * size * size * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _check_memory(count: int, size: int, in_files: bool) -> None:
    needed, free = _pixel_bytes(count, size), available_memory()
    if free is not None and not fits_memory(count, size):
        raise DataError(
            f"{count} images at {size} px take {needed / 2**30:.1f} GiB, more than half of the {free / 2**30:.1f} GiB "
            "that are free: lower --image-size" + (", or read them as they are needed: --set loading=disk" if in_files else "")
        )


def available_memory() -> int | None:
    """Memory that can be taken now, in bytes: what the system has free, within the container's limit. None: unknown."""
    amounts = []
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        amounts.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
        amounts.append(max(limit - used, 0))
    except (OSError, ValueError):  # no limit is written 'max'
        pass
    return min(amounts, default=None)
