"""CIFAR-10 and CIFAR-100: where they lie on disk, their classes in label order, and the official Python files.

Looked for, in this order, in ``--data-root``, ``BALMS_DATA`` and the cache; in each as a folder of images
(``cifar10/train/CLASS/*``), a zip of that folder, the official batches, or the official archive.
"""

import hashlib
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..reporter import Reporter
from . import download, unpack

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR100 = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm""".split()  # noqa: SIM905 - a page of quotes and commas otherwise


@dataclass(frozen=True)
class Archive:
    """One official data set: (file name, md5) a file; ``label_key`` is the labels' key in each."""

    name: str
    classes: list[str]
    url: str
    md5: str
    folder: str
    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]
    label_key: str

    @property
    def filename(self) -> str:
        return self.url.rsplit("/", 1)[1]


# URLs and md5 sums as in torchvision.datasets (a test compares them); written down, as importing it takes seconds.
_BASE = "https://www.cs.toronto.edu/~kriz/"
ARCHIVES = {
    "cifar10": Archive(
        "cifar10", CIFAR10, _BASE + "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py",
        (("data_batch_1", "c99cafc152244af753f735de768cd75f"), ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
         ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"), ("data_batch_4", "634d18415352ddfa80567beed471001a"),
         ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb")),
        (("test_batch", "40351d587109b95175f43aff81a1287e"),), "labels",
    ),
    "cifar100": Archive(
        "cifar100", CIFAR100, _BASE + "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python",
        (("train", "16019d7e3df5f24257cddd939b257f8d"),), (("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),),
        "fine_labels",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Where a known set lies: ``kind`` 'folder' (``root`` holds train/ and test/) or 'cifar' (the official batches)."""

    kind: str
    root: Path


def cache_dir() -> Path:
    """``BALMS_CACHE``, or ``balms`` in the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    if given := os.environ.get("BALMS_CACHE"):
        return Path(os.path.expanduser(given)).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser().absolute() / "balms"


def ways(archive: Archive) -> str:
    """The ways to bring the data without a network, for the end of an error message."""
    return f"bring it with --data-root DIR, DIR holding {archive.name}/, {archive.name}.zip or {archive.filename}"


def locate(archive: Archive, data_root: str | None, offline: bool, reporter: Reporter) -> Found:
    """Find the set on disk, or download it. Raises: DataError (exit 3), ConfigError (unwritable cache)."""
    cache = cache_dir()
    if data_root is not None and not os.path.isdir(os.path.expanduser(data_root)):
        raise DataError(f"--data-root {data_root} is not a folder; {ways(archive)}")
    given = [path for path in (data_root, os.environ.get("BALMS_DATA")) if path]
    unpacked = sorted(cache.glob(f"unpacked/{archive.name}-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for place in [*(Path(os.path.expanduser(path)).absolute() for path in given), cache, *unpacked]:
        if found := _look(archive, place, cache, reporter):
            reporter.note(f"{archive.name}: {found.root}")
            return found
    if offline or os.environ.get("BALMS_OFFLINE", "") not in ("", "0"):
        raise DataError(f"{archive.name} is not on this disk and --offline forbids to download it; {ways(archive)}")
    base = os.environ.get("BALMS_CIFAR_MIRROR")
    url = f"{base.rstrip('/')}/{archive.filename}" if base else archive.url
    tar = cache / archive.filename
    download.fetch(url, tar, archive.md5, reporter, hint=ways(archive))
    return Found("cifar", _unpack_tar(archive, tar, cache, reporter))


def _look(archive: Archive, place: Path, cache: Path, reporter: Reporter) -> Found | None:
    """One place, in the four forms that the set may have there."""
    for folder in (place / archive.name, place):
        there = [name for name in archive.classes if (folder / "train" / name).is_dir()]
        if there and len(there) < len(archive.classes) and folder.name == archive.name:
            missing = next(name for name in archive.classes if name not in there)
            raise DataError(f"{folder}/train lacks class '{missing}' of {archive.name}; {ways(archive)}")
        if there == archive.classes:
            return Found("folder", folder)
    if (place / f"{archive.name}.zip").is_file():
        return Found("folder", unpack.unpack_zip(place / f"{archive.name}.zip", archive.name, cache, reporter))
    for folder in (place / archive.folder, place):
        if all((folder / name).is_file() for name, _ in archive.train + archive.test):
            return Found("cifar", folder)
    if (place / archive.filename).is_file():
        return Found("cifar", _unpack_tar(archive, place / archive.filename, cache, reporter))
    return None


def _unpack_tar(archive: Archive, tar: Path, cache: Path, reporter: Reporter) -> Path:
    names = [name for name, _ in archive.train + archive.test]
    return unpack.unpack_tar(tar, archive.folder, names, cache, reporter)


class _NumpyOnly(pickle.Unpickler):
    """Rebuilds NumPy arrays and plain containers, and nothing else: a pickle may otherwise run any code."""

    _ALLOWED = (
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_batches(archive: Archive, root: Path, part: str) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
    """The official files of ``part`` ('train' or 'test'), one at a time, each checked by its md5 before it is opened.

    Yields: keys (``train/CLASS/FILENAME``), labels int64 [N], pixels uint8 [N, 3, 32, 32]. Raises: DataError.
    """
    seen: Counter[str] = Counter()  # a key names one image, even should two images share a file name
    for name, md5 in getattr(archive, part):
        file = root / name
        try:
            with open(file, "rb") as stream:
                if hashlib.file_digest(stream, "md5").hexdigest() != md5:
                    raise DataError(f"{file} is damaged or not the official file (md5 differs): remove it, run again")
                stream.seek(0)
                batch = _NumpyOnly(stream, encoding="latin1").load()
            pixels = np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
            labels = np.asarray(batch[archive.label_key], dtype=np.int64)
            names = [str(filename) for filename in batch["filenames"]]
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from None
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{file} is not in the official format: {error}") from None
        if not len(labels) == len(names) == len(pixels) or labels.min() < 0 or labels.max() >= len(archive.classes):
            raise DataError(f"{file} is not in the official format: labels, names and pixels do not fit each other")
        keys = []
        for c, filename in zip(labels, names, strict=True):
            key = f"{part}/{archive.classes[c]}/{filename}"
            seen[key] += 1
            keys.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
        yield keys, labels, pixels
