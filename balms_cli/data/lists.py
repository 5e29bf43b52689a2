"""Lists of images: text files of ``path label`` lines, CSV files with a header ``path,label[,split]``, iNaturalist's JSON.

Paths are relative to the list's folder, or to a folder that is given. A list may have siblings: 'test' or 'val' in place
of the last 'train' in its name. The published lists of ImageNet-LT, Places-LT and iNaturalist 2018 have this form.
"""

import codecs
import csv
import json
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError, one_line
from .aside import is_plain, printable
from .folders import MAX_DEPTH, TOO_DEEP, Problem, is_inside

_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")
_MAX_GAPS = 100_000  # integer labels that no line has, above which the list is refused even where problems are collected
_MAX_CELL = 1 << 17  # characters of a cell of a CSV file
_PATH, _LABEL = ("path", "image", "file", "filename"), ("label", "class")  # names of columns, as people have them
PLACES365 = ("places365_train_standard.txt", "places365_train_challenge.txt")
_PLACES_TRAIN = ("data_256_standard", "data_256_challenge", "data_256", "data_large_standard", "data_large_challenge",
                 "data_large")  # fmt: skip
_PLACES_VAL = ("val_256", "val_large")
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
Item = tuple[str, int]  # (key, label)


@dataclass
class Entries:
    """Images of one split as they are listed: ``keys`` relative to the root, ``labels`` as written (N of each).

    ``name`` of what lists them; ``where``: the place of entry i in it, for messages.
    """

    name: str
    keys: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    numbers: array = field(default_factory=lambda: array("q"))
    where: Callable[["Entries", int], str] = lambda self, i: f"{self.name} line {self.numbers[i]}"

    def place(self, i: int) -> str:
        return self.where(self, i)


@dataclass
class Lists:
    """Splits as (key, label) pairs, ``classes`` in order of their labels; ``files``: the sibling that a split is from;
    ``passed``: samples of shards that have a label but no image, by the ending of what they have."""

    root: Path
    classes: list[str]
    train: list[Item]
    test: list[Item] | None = None
    val: list[Item] | None = None
    bad: list[tuple[str, str]] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    passed: Counter[str] = field(default_factory=Counter)


def siblings(path: Path) -> dict[str, Path]:
    """The test and validation lists of a training list, by split. A val list without a test list is the test split, as
    iNaturalist has it."""
    before, found, after = path.name.rpartition("train")
    there = {}
    for word in ("test", "val"):
        other = path.with_name(f"{before}{word}{after}")
        if found and other.is_file():
            there[word] = other
    return there if "test" in there or not there else {"test": there["val"]}


def read(path: Path, problems: list[Problem] | None = None, images: Path | None = None) -> Lists:
    """Read a list file or a CSV file, and its siblings. ``images``: the folder that paths are relative to.

    Labels that are all integers must cover 0..max, and are then the names of the classes; others are names. Raises:
    DataError with the line's number for a line that cannot be read, a path out of the root, or a label out of range.
    ``problems``: takes these messages instead, the lines they are about left out; a class without training images stays,
    and ``bad`` stays empty.
    """
    if images is not None and not os.path.isdir(images):
        raise DataError(f"the images' folder {images} is not there: --images names it")
    root = (images or path.resolve().parent).resolve()
    bad: list[tuple[str, str]] = []
    reader = {".csv": _table, ".json": _annotations}.get(path.suffix.lower(), _lines)
    parts = reader(path, root, bad, problems)
    files = siblings(path) if len(parts) == 1 else {}
    for split, other in files.items():
        parts[split] = reader(other, root, bad, problems)["train"]
    result = assemble(root, parts, bad, problems)
    result.files = files
    return result


def assemble(root: Path, parts: dict[str, Entries], bad: list[tuple[str, str]], problems: list[Problem] | None = None) -> Lists:
    """Labels as written to numbers, over all splits. ``parts`` is emptied on the way, to spare memory. Raises: DataError."""
    result = Lists(root, [], [], bad=bad)
    train = parts.pop("train")
    used = set(train.labels)
    numeric = all(_INTEGER.fullmatch(label) for label in used)
    if numeric:
        result.classes = _integer_classes(train, used, problems)
    else:
        result.classes = sorted(used)
    labels = {name: label for label, name in enumerate(result.classes)}
    # '03' and '3' are the same integer label; names stay as written.
    of = {label: labels.get(str(int(label)) if numeric else label, -1) for label in used}
    result.train = [item for item in zip(train.keys, map(of.__getitem__, train.labels), strict=True) if item[1] >= 0]
    for split in ("test", "val"):
        if split in parts:
            part = parts.pop(split)
            of = {}
            for i, label in enumerate(part.labels):
                if label not in of:
                    of[label] = _other_label(part, i, labels, numeric, problems)
            setattr(result, split, list(zip(part.keys, map(of.__getitem__, part.labels), strict=True)))
    result.classes = list(labels)
    if refused := {key for key, _ in bad}:
        for split in ("train", "test", "val"):
            if (items := getattr(result, split)) is not None:
                setattr(result, split, [item for item in items if item[0] not in refused])
    return result


def _other_label(part: Entries, i: int, labels: dict[str, int], numeric: bool, problems: list[Problem] | None) -> int:
    """The number of a label in a test or validation list."""
    label = part.labels[i]
    name = str(int(label)) if numeric and _INTEGER.fullmatch(label) else label
    if name in labels:
        return labels[name]
    if problems is not None:  # a class of the test list alone: whoever collects problems sees it by its counts
        return labels.setdefault(name, len(labels))
    if numeric:
        raise DataError(f"label {label} in {part.place(i)} is out of range 0..{len(labels) - 1}")
    raise DataError(f"test class '{label}' in {part.place(i)} has no training images")


def _mind(problems: list[Problem] | None, kind: str, message: str) -> None:
    """Raises: DataError, or notes the problem where problems are collected."""
    if problems is None:
        raise DataError(message)
    problems.append((kind, message))


def _integer_classes(train: Entries, used: set[str], problems: list[Problem] | None) -> list[str]:
    """Names '0'..'max' of integer labels. Raises: DataError for a negative label, or one that no line has."""
    if any(int(label) < 0 for label in used):
        for i, label in enumerate(train.labels):
            if int(label) < 0:
                _mind(problems, "label", f"label {label} in {train.place(i)} is out of range: labels start at 0")
    numbers = {int(label) for label in used if int(label) >= 0}
    highest = max(numbers, default=-1)
    if len(numbers) <= highest and (problems is None or highest - len(numbers) >= _MAX_GAPS):
        empty = next(label for label in range(highest) if label not in numbers)
        raise DataError(f"class {empty} has no images in {train.name}: integer labels must cover all of 0..{highest}; "
                        "count from 0, or write names")  # fmt: skip
    return [str(label) for label in range(highest + 1)]


class _Taker:
    """Takes (path, label) pairs into Entries, minding what is listed twice or leads out of the root."""

    def __init__(self, name: str, root: Path, bad: list[tuple[str, str]], problems: list[Problem] | None):
        self.entries, self.root, self.bad, self.problems = Entries(name), root, bad, problems
        self.seen: dict[str, int] = {}
        self.real_folders: dict[str, str | None] = {}
        self.labels: dict[str, str] = {}  # one string a label, not one a line

    def take(self, number: int, path: str, label: str) -> None:
        entries, problems = self.entries, self.problems
        try:
            key = _key(path, self.root, entries.name, number)
        except DataError as error:
            _mind(problems, "line", str(error))
            return
        if (first := self.seen.setdefault(key, len(entries.keys))) != len(entries.keys):
            told = f"{entries.name} line {number}: '{key}' is already listed in line {entries.numbers[first]}"
            if entries.labels[first] == label:
                _mind(problems, "listed-twice", told)
            else:
                _mind(problems, "two-labels", f"{told}, as '{entries.labels[first]}' and not '{label}'")
            return
        # Whoever collects problems looks at each file anyway.
        if problems is None and (reason := _refusal(key, self.root, self.real_folders)):
            self.bad.append((key, reason))
        entries.keys.append(key)
        entries.labels.append(self.labels.setdefault(label, label))
        entries.numbers.append(number)


def _open(path: Path, what: str) -> Iterator[str]:
    """The lines of a text file, one at a time; Windows line ends and a byte order mark are minded."""
    try:
        with open(path, "rb") as file:  # UTF-16 is what PowerShell's > writes
            encoding = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        with open(path, encoding=encoding, newline="\n" if what == "list" else "") as stream:
            yield from stream
    except UnicodeError:
        form = "text file of 'path label' lines" if what == "list" else "CSV file with a header 'path,label'"
        raise DataError(f"{path} is neither a folder nor a {form} (UTF-8)") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def read_places365(folder: Path, problems: list[Problem] | None = None) -> Lists:
    """Places365 as torchvision and its authors lay it out: lists of ``/a/airfield/00000001.jpg 0`` beside the images' folders.

    The small images (256 px) are taken where both sizes are there. Raises: DataError as :func:`read` does.
    """
    root, bad = folder.resolve(), []
    parts, files = {}, {}
    for split, names, folders in (("train", PLACES365, _PLACES_TRAIN), ("test", ("places365_val.txt",), _PLACES_VAL)):
        file = next((root / name for name in names if (root / name).is_file()), None)
        images = next((name for name in folders if (root / name).is_dir()), None)
        if file is None:
            continue
        if images is None:
            raise DataError(f"{root} has the list {file.name} but no images: none of {', '.join(folders)} is there")
        parts[split] = _lines(file, root, bad, problems, f"{images}/")["train"]
        files[split] = file
    result = assemble(root, parts, bad, problems)
    result.files = {split: file for split, file in files.items() if split != "train"}
    return result


def _lines(
    path: Path, root: Path, bad: list[tuple[str, str]], problems: list[Problem] | None, prefix: str | None = None
) -> dict[str, Entries]:
    """All entries of one list file; blank lines and comments (#) are passed over. ``prefix``: the folder that its paths
    are within, though they begin with a slash."""
    taker = _Taker(path.name, root, bad, problems)
    for number, content in enumerate(_open(path, "list"), 1):
        content = content.strip()
        if not content or content.startswith("#"):
            continue
        parts = content.rsplit(maxsplit=1)
        simple = content.isascii() and content.isprintable()  # as most are, and the quicker question
        if len(parts) != 2 or not (simple or all(is_plain(part) for part in parts)):
            _mind(problems, "line",
                  f"{path.name} line {number}: expected 'path label', got '{printable(content[:80])}'")  # fmt: skip
            continue
        taker.take(number, parts[0] if prefix is None else prefix + parts[0].lstrip("/"), parts[1])
    if not taker.entries.keys and not problems:
        raise DataError(f"{path} lists no images; expected lines of 'path label'")
    return {"train": taker.entries}


def _annotations(path: Path, root: Path, bad: list[tuple[str, str]], problems: list[Problem] | None) -> dict[str, Entries]:
    """iNaturalist's own files (``train2018.json``): images with an id and a ``file_name``, annotations that give each a
    ``category_id``. An image is numbered by its place in the file."""
    try:
        with open(path, encoding="utf-8-sig") as stream:
            found = json.load(stream)
        labels = {one["image_id"]: one["category_id"] for one in found["annotations"]}
        if len(labels) < len(found["annotations"]):
            raise ValueError("an image has several")
        images = [(one["file_name"], labels.pop(one["id"])) for one in found["images"]]
        if labels or not all(isinstance(name, str) and type(label) is int for name, label in images):
            raise ValueError("images and annotations do not fit each other")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no manifest of balms, and no file of images with one annotation each: "
                        f"{one_line(error)}") from None  # fmt: skip
    taker = _Taker(path.name, root, bad, problems)
    for number, (name, label) in enumerate(images, 1):
        if not name or not is_plain(name):
            _mind(problems, "line", f"{path.name} image {number}: its file name is empty or holds a control character")
            continue
        taker.take(number, name, str(label))
    if not taker.entries.keys and not problems:
        raise DataError(f"{path} lists no images")
    return {"train": taker.entries}


def _table(path: Path, root: Path, bad: list[tuple[str, str]], problems: list[Problem] | None) -> dict[str, Entries]:
    """All entries of a CSV file, by split (train, where it has no column of that name). Other columns are passed over."""
    csv.field_size_limit(_MAX_CELL)
    rows = csv.reader(_open(path, "csv"))
    takers: dict[str, _Taker] = {}
    try:
        header = [cell.strip().lower() for cell in next(rows, [])]
        at_path, at_label = _column(path, header, _PATH), _column(path, header, _LABEL)
        at_split = header.index("split") if "split" in header else None
        for row in rows:
            if not row:
                continue
            number = rows.line_num
            if len(row) != len(header):
                _mind(problems, "line", f"{path.name} line {number}: {len(row)} cells where the header has {len(header)}")
                continue
            image, label = row[at_path], row[at_label].strip()
            simple = image.isascii() and image.isprintable() and label.isascii() and label.isprintable()
            if not image or not label or not (simple or (is_plain(image) and is_plain(label))):
                _mind(problems, "line", f"{path.name} line {number}: path or label is empty or holds a control character")
                continue
            word = "train" if at_split is None else row[at_split].strip().lower()
            if word not in SPLIT_WORDS:
                _mind(problems, "line",
                      f"{path.name} line {number}: split '{printable(word[:40])}' is none of train, val, test")  # fmt: skip
                continue
            split = SPLIT_WORDS[word]
            if split not in takers:
                takers[split] = _Taker(path.name, root, bad, problems)
            takers[split].take(number, image, label)
    except csv.Error as error:
        raise DataError(f"{path.name} line {rows.line_num}: {error}") from None
    if "train" not in takers:
        raise DataError(f"{path} lists no training images; expected a header 'path,label' or 'path,label,split', then a "
                        "line an image")  # fmt: skip
    parts = {split: taker.entries for split, taker in takers.items()}
    if "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
    return parts


def _column(path: Path, header: list[str], names: tuple[str, ...]) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    raise DataError(f"{path}: the first line must name the columns, path,label or path,label,split, with commas between them; "
                    f"'{names[0]}' is missing")  # fmt: skip


def _key(path: str, root: Path, name: str, number: int) -> str:
    """The path relative to the root. Raises: DataError where it leads out of it."""
    # As most are: relative, and written in one way.
    if path[0] not in "/." and path[-1] != "/" and "/." not in path and "//" not in path and "\\" not in path and os.sep == "/":
        return path
    if os.sep == "/" and "\\" in path and not os.path.lexists(os.path.join(root, path)):  # a list that Windows wrote
        path = path.replace("\\", "/")
    absolute = os.path.normpath(os.path.join(root, path))
    if os.path.isabs(path):  # perhaps written by way of a link to the root
        absolute = os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))
    if not is_inside(absolute, root) or absolute == str(root):
        raise DataError(f"{name} line {number}: '{path}' leads out of {root}; --images names the folder that holds all images")
    return os.path.relpath(absolute, root).replace(os.sep, "/")


def _refusal(key: str, root: Path, real_folders: dict[str, str | None]) -> str | None:
    """Why a file is not to be read, if so. A missing one is left to its reader.

    ``real_folders`` remembers the real path of each folder, None for one within the root that is not there.
    """
    folder, _, name = key.rpartition("/")
    if folder not in real_folders:
        if key.count("/") > MAX_DEPTH:
            return TOO_DEEP
        real = os.path.realpath(root / folder)
        real_folders[folder] = real if os.path.isdir(real) or not is_inside(real, root) else None
    real = real_folders[folder]
    if real is None:
        return None
    path = f"{real}{os.sep}{name}"
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            path = os.path.realpath(path)
            found = os.stat(path) if is_inside(path, root) else found
    except OSError:
        found = None
    if not is_inside(path, root):
        return "a link that leaves the folder"
    if found is not None and not stat.S_ISREG(found.st_mode):
        return "not a regular file"  # a folder; or a pipe or a device, of which reading may never end
    return None
