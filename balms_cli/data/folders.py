"""Folders of images: ``train/CLASS/*`` with ``test/CLASS/*``, or ``CLASS/*``."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from .aside import is_plain, printable

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
     ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".avif")
)  # fmt: skip


@dataclass
class Scan:
    """Keys (POSIX paths relative to ``root``) a class name, sorted. ``bad``: (key, reason) of what to leave unread."""

    root: Path
    train: dict[str, list[str]]
    test: dict[str, list[str]] | None
    bad: list[tuple[str, str]] = field(default_factory=list)


def scan(folder: Path) -> Scan:
    """List a folder's images by class. Hidden files and other file types are passed over; class folders may be nested.

    Raises: DataError for a folder without class folders, or a class folder without images.
    """
    try:
        root = folder.resolve(strict=True)
        result = Scan(root, {}, None)
        if _is_split(root / "train", root / "test"):
            result.train = _classes(result, "train/")
            if (root / "test").is_dir():
                result.test = _classes(result, "test/")
        else:
            result.train = _classes(result, "")
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror or error}") from None
    return result


def _is_split(train: Path, test: Path) -> bool:
    """Whether ``train`` is a split of class folders, and not a class of that name (trains, say)."""
    if not train.is_dir():
        return False
    entries = [entry for entry in os.scandir(train) if not entry.name.startswith(".")]
    return any(entry.is_dir() for entry in entries) and (test.is_dir() or not any(_is_image(entry.name) for entry in entries))


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def _classes(result: Scan, prefix: str) -> dict[str, list[str]]:
    """The class folders under ``root/prefix``."""
    base = result.root / prefix
    names = sorted(entry.name for entry in os.scandir(base) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{base} holds no class folders; expected train/CLASS/* with test/CLASS/*, or CLASS/*")
    classes = {}
    for name in names:
        if not is_plain(name):
            raise DataError(f"{base}: class folder '{printable(name)}' has a control character in its name; rename it")
        refused = len(result.bad)
        classes[name] = sorted(_images(result, prefix + name, set()))
        if not classes[name] and len(result.bad) == refused:
            raise DataError(f"class '{name}' has no images: {base / name} is empty or holds other file types")
    return classes


def _images(result: Scan, key: str, above: set[str]) -> list[str]:
    """Keys of all images under ``root/key``, at any depth. ``above``: real paths of the folders above, against loops.

    A link may lead anywhere within the root; one that leaves it goes to ``result.bad``.
    """
    real = os.path.realpath(result.root / key)
    if not is_inside(real, result.root):
        result.bad.append((key, "a link that leaves the folder"))
        return []
    if real in above:
        return []
    keys = []
    with os.scandir(result.root / key) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{key}/{entry.name}"
            if entry.is_dir():
                keys += _images(result, path, above | {real})
            elif not _is_image(entry.name):
                continue
            elif not is_plain(entry.name):
                result.bad.append((path, "a control character or not UTF-8 in its name"))
            elif entry.is_symlink() and not is_inside(os.path.realpath(entry.path), result.root):
                result.bad.append((path, "a link that leaves the folder"))
            else:
                keys.append(path)
    return keys


def is_inside(real: str, root: str | Path) -> bool:
    """Whether a real path lies in ``root`` (real as well)."""
    return real == str(root) or real.startswith(str(root).rstrip(os.sep) + os.sep)
