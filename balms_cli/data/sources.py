"""Sources of images: digits, CIFAR, a folder, a list, shards. A source says what is there; nothing is drawn here yet."""

import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config import MakeLTConfig, suggest
from ..errors import ConfigError, DataError
from ..reporter import Reporter
from . import class_names, folders, known, lists, shards, tar_entry
from .aside import name_some, printable
from .lists import Item
from .longtail import order_images

DIGITS_TEST = 50  # test images a class of the digits: enough to tell 2 % apart, and over 120 stay for the head
PLACES_NAMES = "categories_places365.txt"
# How a source gives its images. FOLDER, LIST and SHARDS (tar files) are what manifests know; Places365's is a list there.
FOLDER, LIST, SHARDS, PLACES = "folder", "list", "shards", "places365"
MIN_SPLIT = 3  # a class with fewer images than this gives none to the test split


@dataclass(frozen=True)
class Source:
    """What a source holds. ``classes`` in label order; ``test`` None: there is no test split yet; ``val``: a validation
    split that the source brings.

    ``known``: a set with a label order and a split of its own. ``bad``: (key, reason) of what could be listed, but is
    not to be read, such as a link out of the root. ``names``: what to call each class, where that is not as in ``classes``.
    """

    kind: str
    name: str
    root: str
    classes: list[str]
    train: list[Item]
    test: list[Item] | None
    known: bool = False
    bad: list[tuple[str, str]] = field(default_factory=list)
    val: list[Item] | None = None
    names: dict[str, str] = field(default_factory=dict)

    def hash_key(self, key: str) -> str:
        """What orders an image: the key; in known sets without the extension, as PNG and WebP hold the same image; in shards
        the member's name, so that the same samples in other shards give the same draw."""
        if self.kind == SHARDS:
            return tar_entry.name_of(key)
        return key.rpartition(".")[0] or key if self.known else key


def open_source(config: MakeLTConfig, reporter: Reporter, archives: dict[str, known.Archive] | None = None) -> Source:
    """The source that ``config.source`` names. Raises: DataError (exit 3), ConfigError for an unwritable cache.

    Classes are in label order for known sets, else by decreasing number of training images. ``archives``: official
    archives other than CIFAR's own, for tests.
    """
    name, archives = config.source, archives or known.ARCHIVES
    if name == "digits" or name in archives:
        check_known(name, config.images, config.names, config.leaf_classes)
    if name == "digits":
        return _digits()
    if name in archives:
        return _cifar(archives[name], config, reporter)
    form, path = form_of(name), Path(os.path.expanduser(name))
    if form is None:
        raise DataError(f"no such source: '{printable(name)}'; {suggest(name, ['digits', *archives])} or a folder, a list "
                        "file, or tar shards")  # fmt: skip
    check_unused(form, config.images, config.leaf_classes)
    source = _folder(path, config.leaf_classes, reporter) if form == FOLDER else _listed(form, config, reporter)
    names = names_file(form, path, config.names)
    return sort_classes(source if names is None else _named(source, names))


def form_of(source: str) -> str | None:
    """How a source gives its images: FOLDER, PLACES, SHARDS or LIST; None where nothing of that name is there.

    Raises: DataError for a place that cannot be looked at.
    """
    path = Path(os.path.expanduser(source))
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        mode = 0
    except OSError as error:  # a name too long, a folder that may not be entered
        raise DataError(f"cannot read {printable(source)}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        if any(os.path.isfile(path / name) for name in lists.PLACES365):
            return PLACES
        return SHARDS if shards.holds_shards(path) else FOLDER
    if shards.is_pattern(source):
        return SHARDS
    return LIST if stat.S_ISREG(mode) else None


def read_listed(
    form: str, source: str, images: str | None, reporter: Reporter, problems: list[folders.Problem] | None = None
) -> tuple[str, str, lists.Lists]:
    """The kind, name and splits of a source that is no folder of classes. ``problems``: see :func:`lists.read`."""
    path = Path(os.path.expanduser(source))
    _refuse_archive(path)
    if form == SHARDS:
        # A pattern is called what it says beside its numbers.
        name = path.resolve().name if path.is_dir() else re.sub(r"[-_.]*\{.*\}|\.tar$", "", path.name) or "shards"
        return SHARDS, name, shards.read(source, reporter, problems)
    if form == PLACES:
        return LIST, path.resolve().name, lists.read_places365(path, problems)
    folder = None if images is None else Path(os.path.expanduser(images))
    return LIST, path.stem or path.name, lists.read(path, problems, folder)


def _refuse_archive(path: Path) -> None:
    """Raises: DataError that says what to do, for a zip, or a tar that is compressed."""
    if path.suffix == ".tar" or not os.path.isfile(path):
        return
    try:
        with open(path, "rb") as file:
            packed = file.read(16).startswith(tar_entry.PACKED)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if packed:
        known_as = next((one for one in known.ARCHIVES.values() if path.name in (f"{one.name}.zip", one.filename)), None)
        raise DataError(f"{path} is an archive: " + (
            "unpack it and name what is in it: a folder, a list, or WebDataset shards (plain .tar files)" if known_as is None
            else f"to read {known_as.name} from it, name {known_as.name} with --data-root {path.parent}"))  # fmt: skip


def names_file(form: str, path: Path, given: str | None) -> Path | None:
    """The file with the names of the classes: the given one, or that which Places365 brings."""
    if given is None:
        return path / PLACES_NAMES if form == PLACES and (path / PLACES_NAMES).is_file() else None
    return Path(os.path.expanduser(given))


def check_known(name: str, images: str | None, names: str | None, leaf_classes: bool) -> None:
    """Raises: ConfigError for an option that a known set has no use for."""
    for option, given in (("--images", images is not None), ("--names", names is not None), ("--leaf-classes", leaf_classes)):
        if given:
            raise ConfigError(f"{name} knows its images and the names of its classes: leave out {option}")


def check_unused(form: str, images: str | None, leaf_classes: bool) -> None:
    """Raises: ConfigError for an option that a source of this form has no use for."""
    if images is not None and form != LIST:
        raise ConfigError("--images names the folder of a list's or CSV file's images; this source has them itself")
    if leaf_classes and form != FOLDER:
        raise ConfigError("--leaf-classes is for folders of images; this source lists its classes")


def _named(source: Source, file: Path) -> Source:
    """The source with the names of its classes, from a file."""
    samples: dict[int, str] = {}
    for key, label in source.train:
        samples.setdefault(label, key)
    shown = [samples.get(label) for label in range(len(source.classes))]
    return replace(source, names=class_names.match(class_names.read(file), source.classes, shown, file))


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
    return Source(FOLDER, archive.name, str(scan.root), archive.classes, train, test, known=True, bad=scan.bad)


def _folder(path: Path, leaves: bool, reporter: Reporter) -> Source:
    scan = folders.scan(path, leaves=leaves)
    classes = list(scan.train)
    test, val = (None if part is None else _label(part, classes) for part in (scan.test, scan.val))
    tell_splits(reporter, {"test": scan.val_is_test} if scan.val_is_test else {})
    _tell_passed(reporter, scan)
    if told := called_splits(classes):
        reporter.warn(told)
    first = [keys[0].split("/")[-2] for keys in scan.train.values() if keys and keys[0].count("/") > 1]
    if not leaves and len(first) == len(classes) > 1 and all(one.isascii() and one.isdigit() for one in first) \
            and not set(first) & set(classes):  # fmt: skip
        reporter.note(f"folders with numbers lie within each class, as in iNaturalist: --leaf-classes makes each of them a "
                      f"class, such as '{printable(classes[0])}/{first[0]}'")  # fmt: skip
    return Source(FOLDER, scan.root.name, str(scan.root), classes, _label(scan.train, classes), test, bad=scan.bad, val=val)


def no_image(passed: Counter[str]) -> str:
    """What to say of samples in shards that were passed over though they have a label."""
    kinds = ", ".join(f"{n:,} {ending}" for ending, n in passed.most_common(3))
    return f"{passed.total():,} samples have a label but no image that can be read ({kinds}), and are passed over: " \
           "expected NAME.jpg or the like, without another dot"  # fmt: skip


def called_splits(classes: list[str]) -> str:
    """What to say of classes that are called as splits are: the folders above the class folders, most likely. Else ''."""
    if len(classes) < 2 or not all(name.lower() in lists.SPLIT_WORDS for name in classes):
        return ""
    return f"the classes are called {', '.join(classes)}: if these are splits, name their folders train, val and test, with " \
           "class folders in each"  # fmt: skip


def _tell_passed(reporter: Reporter, scan: folders.Scan) -> None:
    """What of a folder is not used, but for hidden files."""
    if told := folders.undecoded(scan.passed):
        reporter.warn(told)
    others = [f"{n:,} {printable(ending[:20]) or 'without ending'}" for ending, n in scan.passed.most_common()
              if ending != "hidden" and ending not in folders.UNDECODED]  # fmt: skip
    told = [f"files that are no images by name ({name_some(others)})"] if others else []
    told += [f"{scan.stray:,} image{'s' * (scan.stray != 1)} outside class folders"] if scan.stray else []
    told += [f"beside train and test: {name_some(sorted(map(printable, scan.beside)))}"] if scan.beside else []
    if told:
        reporter.note(f"passed over: {'; '.join(told)}")


def tell_splits(reporter: Reporter, files: dict[str, object]) -> None:
    """Which files or folders the test and validation splits are from."""
    for split, file in files.items():
        reporter.note(f"{'test' if split == 'test' else 'validation'} split: {file}")


def _label(part: dict[str, list[str]], classes: list[str]) -> list[Item]:
    """Keys a class name to (key, label), in label order. Raises: DataError for a class that ``classes`` lacks."""
    there = set(classes)
    for name in part:
        if name not in there:
            raise DataError(f"test class '{name}' has no training images: rename or remove it, or add some to train/")
    return [(key, label) for label, name in enumerate(classes) for key in part.get(name, [])]


def _listed(form: str, config: MakeLTConfig, reporter: Reporter) -> Source:
    kind, name, parsed = read_listed(form, config.source, config.images, reporter)
    tell_splits(reporter, parsed.files)
    if parsed.passed:
        reporter.warn(no_image(parsed.passed))
    train = None
    for split, part in (("test", parsed.test), ("val", parsed.val)):
        train = {key for key, _ in parsed.train} if part and train is None else train
        both = [key for key, _ in part or [] if key in train]
        if both:
            reporter.warn(f"{len(both)} images are in the training and in the {split} list, such as {min(both)}")
    return Source(kind, name, str(parsed.root), parsed.classes, parsed.train, parsed.test, bad=parsed.bad, val=parsed.val)


def cut(
    items: list[Item], classes: list[str], amounts: dict[int, int], hash_key: Callable[[str], str] = str
) -> tuple[list[Item], list[Item]]:
    """Cut ``amounts[label]`` images a class from ``items``; returns (what stays, what was cut), both in label order.

    Drawn by hash with the seed 0, whatever the seed of the run: results of several seeds then share their test images.
    """
    stays: list[Item] = []
    gone: list[Item] = []
    for label, keys in by_class(items, len(classes)).items():
        order = order_images(0, classes[label], [hash_key(key) for key in keys])
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
    train, test = cut(source.train, source.classes, amounts, source.hash_key)
    return sort_classes(replace(source, train=train, test=test))


def drop(source: Source, keys: set[str]) -> Source:
    """The source without the images in ``keys``. Raises: DataError where a class has no training image left."""
    if not keys:
        return source
    train = [item for item in source.train if item[0] not in keys]
    test, val = (None if part is None else [item for item in part if item[0] not in keys] for part in (source.test, source.val))
    left = {label for _, label in train}
    for label, name in enumerate(source.classes):
        if label not in left:
            raise DataError(f"class '{name}' has no readable training image left: bring its files back, or remove the class")
    return sort_classes(replace(source, train=train, test=test, val=val))


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

    def relabel(items: list[Item] | None) -> list[Item] | None:
        if items is None:
            return None
        return [(key, new[c]) for c, keys in _grouped(items, order) for key in keys]

    train, test, val = relabel(source.train), relabel(source.test), relabel(source.val)
    return replace(source, classes=[source.classes[i] for i in order], train=train, test=test, val=val)


def _grouped(items: list[Item], order: list[int]) -> Iterator[tuple[int, list[str]]]:
    groups = by_class(items, len(order))
    for label in order:
        yield label, groups.pop(label)
