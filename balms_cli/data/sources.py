"""Sources of images: digits, CIFAR, a folder, a list file. A source says what is there; nothing is drawn here yet."""

import itertools
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config import MakeLTConfig, suggest
from ..errors import DataError
from ..reporter import Reporter
from . import folders, known, lists
from .longtail import order_images

Item = tuple[str, int]  # (key, label)
DIGITS_TEST = 50  # test images a class of the digits: enough to tell 2 % apart, and over 120 stay for the head
MIN_SPLIT = 3  # a class with fewer images than this gives none to the test split


@dataclass(frozen=True)
class Source:
    """What a source holds. ``classes`` in label order; ``test`` None: there is no test split yet.

    ``known``: a set with a label order and a split of its own. ``bad``: (key, reason) of what could be listed, but is
    not to be read, such as a link out of the root.
    """

    kind: str
    name: str
    root: str
    classes: list[str]
    train: list[Item]
    test: list[Item] | None
    known: bool = False
    bad: list[tuple[str, str]] = field(default_factory=list)

    def hash_key(self, key: str) -> str:
        """What orders an image: the key; in known sets without the extension, as PNG and WebP hold the same image."""
        return key.rpartition(".")[0] or key if self.known else key


def open_source(config: MakeLTConfig, reporter: Reporter, archives: dict[str, known.Archive] | None = None) -> Source:
    """The source that ``config.source`` names. Raises: DataError (exit 3), ConfigError for an unwritable cache.

    Classes are in label order for known sets, else by decreasing number of training images. ``archives``: official
    archives other than CIFAR's own, for tests.
    """
    name, archives = config.source, archives or known.ARCHIVES
    if name == "digits":
        return _digits()
    if name in archives:
        return _cifar(archives[name], config, reporter)
    path = Path(name).expanduser()
    if path.is_dir():
        return sort_classes(_folder(path))
    if path.is_file():
        return sort_classes(_list(path, reporter))
    raise DataError(f"no such source: '{name}'; {suggest(name, ['digits', *archives])} or a folder, or a list file")


def _digits() -> Source:
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels; DIGITS_TEST test images a class, by hash."""
    from sklearn.datasets import load_digits

    targets = load_digits().target.tolist()
    items = [(f"digit-{i:04d}", label) for i, label in enumerate(targets, 1)]
    classes = [str(c) for c in range(10)]
    train, test = cut(items, classes, {c: DIGITS_TEST for c in range(10)})
    return Source("digits", "digits", "", classes, train, test, known=True)


def _cifar(archive: known.Archive, config: MakeLTConfig, reporter: Reporter) -> Source:
    found = known.locate(archive, config.data_root, config.offline, reporter)
    if found.kind == "folder":
        return _known_folder(archive, found.root)
    parts = {}
    for part in ("train", "test"):
        batches = known.read_batches(archive, found.root, part)
        parts[part] = [pair for keys, labels, _ in batches for pair in zip(keys, labels.tolist(), strict=True)]
    return Source("cifar", archive.name, str(found.root), archive.classes, parts["train"], parts["test"], known=True)


def _known_folder(archive: known.Archive, root: Path) -> Source:
    scan = folders.scan(root)
    extra = [name for name in scan.train if name not in archive.classes]
    if extra:
        raise DataError(f"{root}/train holds class '{extra[0]}', which {archive.name} does not have")
    if scan.test is None:
        raise DataError(f"{root} has no test folder; {known.ways(archive)}")
    train, test = (_label(part, archive.classes) for part in (scan.train, scan.test))
    return Source("folder", archive.name, str(scan.root), archive.classes, train, test, known=True, bad=scan.bad)


def _folder(path: Path) -> Source:
    scan = folders.scan(path)
    classes = list(scan.train)
    test = None if scan.test is None else _label(scan.test, classes)
    return Source("folder", scan.root.name, str(scan.root), classes, _label(scan.train, classes), test, bad=scan.bad)


def _label(part: dict[str, list[str]], classes: list[str]) -> list[Item]:
    """Keys a class name to (key, label), in label order. Raises: DataError for a class that ``classes`` lacks."""
    for name in part:
        if name not in classes:
            raise DataError(f"test class '{name}' has no training images: rename or remove it, or add some to train/")
    return [(key, label) for label, name in enumerate(classes) for key in part.get(name, [])]


def _list(path: Path, reporter: Reporter) -> Source:
    parsed = lists.read(path)
    if parsed.test is not None:
        reporter.note(f"test split: {lists.sibling(path)}")
        both = {key for key, _ in parsed.train} & {key for key, _ in parsed.test}
        if both:
            reporter.warn(f"{len(both)} images are in the training and in the test list, such as {min(both)}")
    name = path.stem or path.name
    return Source("list", name, str(parsed.root), parsed.classes, parsed.train, parsed.test, bad=parsed.bad)


def cut(items: list[Item], classes: list[str], amounts: dict[int, int]) -> tuple[list[Item], list[Item]]:
    """Cut ``amounts[label]`` images a class from ``items``; returns (what stays, what was cut), both in label order.

    Drawn by hash with the seed 0, whatever the seed of the run: results of several seeds then share their test images.
    """
    stays: list[Item] = []
    gone: list[Item] = []
    for label, keys in by_class(items, len(classes)).items():
        order = order_images(0, classes[label], keys)
        amount = amounts.get(label, 0)
        gone += [(keys[i], label) for i in order[:amount]]
        stays += [(keys[i], label) for i in sorted(order[amount:])]
    return stays, gone


def by_class(items: list[Item], k: int) -> dict[int, list[str]]:
    """Keys of every label 0..k-1."""
    groups: dict[int, list[str]] = {label: [] for label in range(k)}
    for key, label in items:
        groups[label].append(key)
    return groups


def split_test(source: Source, fraction: float) -> Source:
    """Cut a test split where there is none: ``fraction`` of each class, at least one image; none of small classes.

    Classes are put in order again, as the cut may have changed which is largest.
    """
    if source.test is not None:
        return source
    sizes = Counter(label for _, label in source.train)
    amounts = {c: min(max(1, round(n * fraction)), n - 1) for c, n in sizes.items() if n >= MIN_SPLIT}
    train, test = cut(source.train, source.classes, amounts)
    return sort_classes(replace(source, train=train, test=test))


def drop(source: Source, keys: set[str]) -> Source:
    """The source without the images in ``keys``. Raises: DataError where a class has no training image left."""
    train = [item for item in source.train if item[0] not in keys]
    test = None if source.test is None else [item for item in source.test if item[0] not in keys]
    left = {label for _, label in train}
    for label, name in enumerate(source.classes):
        if label not in left:
            raise DataError(f"class '{name}' has no readable training image left")
    return sort_classes(replace(source, train=train, test=test))


def sort_classes(source: Source) -> Source:
    """Classes by decreasing number of training images, ties by name (or number, if all are); known sets as they are."""
    if source.known:
        return source
    sizes = Counter(label for _, label in source.train)
    numeric = all(name.isascii() and name.isdigit() for name in source.classes)

    def rank(label: int) -> tuple[int, int | str]:
        return -sizes[label], int(source.classes[label]) if numeric else source.classes[label]

    order = sorted(range(len(source.classes)), key=rank)
    new = dict(zip(order, itertools.count()))

    def relabel(items: list[Item]) -> list[Item]:
        return sorted(((key, new[label]) for key, label in items), key=lambda item: item[1])

    test = None if source.test is None else relabel(source.test)
    return replace(source, classes=[source.classes[i] for i in order], train=relabel(source.train), test=test)
