"""Folders of images: ``train/CLASS/*`` with ``test/CLASS/*`` or ``val/CLASS/*`` or both, or ``CLASS/*``.

These are torchvision's ImageFolder, ImageNet and INaturalist layouts, too. ``val`` alone is the test split, as ImageNet's is;
it may be called ``valid`` or ``validation``.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from .aside import is_plain, printable

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
     ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".avif")
)  # fmt: skip
# Pictures by name that are not decoded here; they are told of, where other files are merely counted.
UNDECODED = frozenset(
    (".heic", ".heif", ".hif", ".jxl", ".svg", ".psd", ".xcf", ".exr", ".ico", ".eps", ".dcm", ".dng", ".cr2", ".cr3", ".nef",
     ".arw", ".orf", ".raf", ".rw2")
)  # fmt: skip
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
_MAX_REPEATS = 100_000  # folders met again by way of links: above that it is a trap, not a data set
MAX_DEPTH = 100  # folders in one another; the system takes time that grows with the cube of it
TOO_DEEP = f"more than {MAX_DEPTH} folders deep"
Problem = tuple[str, str]  # (kind, message)
# Names of the split folders: train, test, val.
SPLIT_FOLDERS = (("train", "test", "val"), ("2021_train", "2021_test", "2021_valid"),
                 ("2021_train_mini", "2021_test", "2021_valid"), ("train_mini", "test", "val"))  # fmt: skip


@dataclass
class Scan:
    """Keys (POSIX paths relative to ``root``) a class name, sorted. ``bad``: (key, reason) of what to leave unread.

    What was passed over: ``passed``, files by type ('.txt'; 'hidden'); ``stray``, images outside class folders;
    ``beside``, folders beside train and test; ``again``, links to a folder that the class holds already.
    ``val_is_test``: the validation folder that stands in for the test split, if one does; ``leaves``: every folder that
    holds images is a class, named by its path.
    """

    root: Path
    train: dict[str, list[str]]
    test: dict[str, list[str]] | None
    val: dict[str, list[str]] | None = None
    bad: list[tuple[str, str]] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)
    stray: int = 0
    beside: list[str] = field(default_factory=list)
    again: int = 0
    val_is_test: str = ""
    leaves: bool = False
    problems: list[Problem] | None = None
    repeats: int = 0
    folders: set[str] = field(default_factory=set)


def scan(folder: Path, problems: list[Problem] | None = None, *, leaves: bool = False) -> Scan:
    """List a folder's images by class. Hidden files and other file types are passed over; class folders may be nested.

    Raises: DataError for a folder without class folders, or a class folder without images. ``problems``: takes what
    would be raised about a class; one without images then stays, with none. ``leaves``: see :class:`Scan`.
    """
    try:
        root = folder.resolve(strict=True)
        result = Scan(root, {}, None, problems=problems, leaves=leaves)
        names = next((names for names in SPLIT_FOLDERS if _is_split(root / names[0], root / names[1])), None)
        if names is None:
            result.train = _classes(result, "")
            return result
        train, test, val = names
        val = next((name for name in (val, "valid", "validation") if _has_classes(root / name)), val)
        used = {train}
        result.train = _classes(result, f"{train}/")
        if (root / test).is_dir():
            result.test = _classes(result, f"{test}/")
            used.add(test)
        if _has_classes(root / val):
            found = _classes(result, f"{val}/", needed=False)
            if any(found.values()):
                used.add(val)
                result.val = found
        if result.test is None and result.val is not None:
            result.test, result.val, result.val_is_test = result.val, None, val
        for entry in os.scandir(root):
            if _is_dir(entry) and not entry.name.startswith(".") and entry.name not in used:
                result.beside.append(entry.name)
            elif _is_image(entry.name):
                result.stray += 1
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror or error}") from None
    return result


def undecoded(passed: Counter[str]) -> str:
    """What to say of the pictures among the files that were passed over, counted by ending; '' where there are none."""
    kinds = [f"{n:,} {ending}" for ending, n in passed.most_common() if ending in UNDECODED]
    return f"left out, as they cannot be decoded here: {', '.join(kinds)}; convert them to JPEG or PNG" if kinds else ""


def _has_classes(folder: Path) -> bool:
    return folder.is_dir() and any(_is_dir(entry) for entry in os.scandir(folder) if not entry.name.startswith("."))


def _is_split(train: Path, test: Path) -> bool:
    """Whether ``train`` is a split of class folders, and not a class of that name (trains, say)."""
    if not train.is_dir():
        return False
    entries = [entry for entry in os.scandir(train) if not entry.name.startswith(".")]
    return any(_is_dir(entry) for entry in entries) and (test.is_dir() or not any(_is_image(entry.name) for entry in entries))


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_image(name: str) -> bool:
    return _ending(name) in EXTENSIONS and not name.startswith(".")


def _is_dir(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder, or a link to one; a link in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _mind(result: Scan, kind: str, message: str) -> None:
    """Raises: DataError, or notes the problem where problems are collected."""
    if result.problems is None:
        raise DataError(message)
    result.problems.append((kind, message))


def _classes(result: Scan, prefix: str, *, needed: bool = True) -> dict[str, list[str]]:
    """The class folders under ``root/prefix``. ``needed``: one without images is an error."""
    base = result.root / prefix
    names, packed = [], ""
    for entry in os.scandir(base):
        if entry.name.startswith("."):
            continue
        if _is_dir(entry):
            names.append(entry.name)
        elif entry.name.lower().endswith(_ARCHIVES):
            packed = f"; {printable(entry.name)} in it is an archive: unpack it"
        elif _is_image(entry.name) or _ending(entry.name) in UNDECODED:
            result.stray += 1
    if not names:
        message = f"{base} holds no class folders; expected train/CLASS/* with test/CLASS/*, or CLASS/*{packed}"
        if prefix != "test/":
            raise DataError(message)
        _mind(result, "no-classes", message)
    classes: dict[str, list[str]] = {}
    for name in sorted(names):
        if not is_plain(name):
            _mind(result, "class-name",
                  f"{base}: class folder '{printable(name)}' has a control character in its name; rename it")  # fmt: skip
            continue
        refused, passed = len(result.bad), Counter(result.passed)
        keys = sorted(_images(result, prefix + name))
        if not keys and len(result.bad) == refused and result.problems is None and needed:
            told = undecoded(result.passed - passed) or (
                f"{printable(str(base / name))} is empty or holds other file types; put images there, or remove the folder"
            )
            raise DataError(f"class '{name}' has no images: {told}")
        if not result.leaves:
            if keys or needed:
                classes[name] = keys
            continue
        for key in keys:
            classes.setdefault(key[len(prefix) :].rpartition("/")[0], []).append(key)
    return classes


def _images(result: Scan, key: str) -> list[str]:
    """Keys of all images under ``root/key``, at any depth; a folder counts once, however many links lead to it.

    A link may lead anywhere within the root; one that leaves it goes to ``result.bad``.
    """
    keys: list[str] = []
    seen: set[str] = set()
    folders: list[tuple[str, str]] = []
    linked = [key]
    home = os.path.realpath(result.root / key)
    while folders or linked:
        if not folders:  # by its own name first: links come last, in order
            linked.sort(reverse=True)
            key = linked.pop()
            folders.append((key, os.path.realpath(result.root / key)))
        key, real = folders.pop()
        if key.count("/") > MAX_DEPTH:
            result.bad.append((key, TOO_DEEP))
        elif not is_inside(real, result.root):
            result.bad.append((key, "a link that leaves the folder"))
        elif real in seen or (seen and is_inside(home, real)):  # met already, or a way back up that would hold other classes
            result.again += 1
        else:
            seen.add(real)
            _count_visit(result, real)
            for entry in _entries(result, key):
                path = f"{key}/{entry.name}"
                if entry.name.startswith("."):
                    result.passed["hidden"] += 1
                elif _is_dir(entry):
                    if not is_plain(entry.name):
                        result.bad.append((path, "a control character or not UTF-8 in its name"))
                    elif entry.is_symlink():
                        linked.append(path)
                    else:
                        folders.append((path, f"{real}{os.sep}{entry.name}"))
                elif not _is_image(entry.name):
                    result.passed[_ending(entry.name)] += 1
                elif reason := _refusal(entry, result.root):
                    result.bad.append((path, reason))
                else:
                    keys.append(path)
    return keys


def _entries(result: Scan, key: str) -> Iterator[os.DirEntry]:
    try:
        with os.scandir(result.root / key) as entries:
            yield from entries
    except OSError as error:
        if result.problems is None:
            raise
        result.problems.append(("folder", f"cannot read the folder {printable(key[:200])}: {error.strerror or error}"))


def _count_visit(result: Scan, real: str) -> None:
    """Links among folders can multiply: twenty folders, each with two links to the next, are a million ways."""
    result.repeats += real in result.folders
    result.folders.add(real)
    if result.repeats > _MAX_REPEATS:
        raise DataError(f"{result.root}: links lead to the same folders more than {_MAX_REPEATS} times; remove some")


def _refusal(entry: os.DirEntry, root: Path) -> str | None:
    """Why an image file is not to be read, if so. A missing target of a link is left to whoever reads it."""
    if not is_plain(entry.name):
        return "a control character or not UTF-8 in its name"
    try:
        if entry.is_symlink() and not is_inside(os.path.realpath(entry.path), root):
            return "a link that leaves the folder"
        if not entry.is_file() and os.path.exists(entry.path):
            return "not a regular file"  # a pipe or a device: reading it may never end
    except OSError:
        return "a link in a circle"
    return None


def is_inside(real: str, root: str | Path) -> bool:
    """Whether a real path lies in ``root`` (real as well)."""
    return real == str(root) or real.startswith(str(root).rstrip(os.sep) + os.sep)
