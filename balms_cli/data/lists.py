"""List files: lines of ``path label``, paths relative to the list's folder."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from .aside import is_plain, printable
from .folders import is_inside

_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")


@dataclass
class Line:
    """One entry: ``number`` of its line, ``key`` relative to the root, ``label`` as written."""

    number: int
    key: str
    label: str


@dataclass
class Lists:
    """A training list and, where its sibling is there, a test list; ``classes`` in order of their labels."""

    root: Path
    classes: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]] | None
    bad: list[tuple[str, str]] = field(default_factory=list)


def sibling(path: Path) -> Path | None:
    """The test list of a training list: 'test' in place of the last 'train' in its name, if such a file is there."""
    before, found, after = path.name.rpartition("train")
    other = path.with_name(f"{before}test{after}")
    return other if found and other.is_file() else None


def read(path: Path) -> Lists:
    """Read a list file and its sibling.

    Labels that are all integers must cover 0..max, and are then the names of the classes; others are names. Raises:
    DataError with the line's number for a line that cannot be read, a path out of the root, or a label out of range.
    """
    root = path.resolve().parent
    result = Lists(root, [], [], None)
    lines = _lines(path, root, result.bad)
    numeric = all(_INTEGER.fullmatch(line.label) for line in lines)
    if numeric:
        result.classes = _integer_classes(path, lines)
    else:
        result.classes = sorted({line.label for line in lines})
    labels = {name: label for label, name in enumerate(result.classes)}
    result.train = [(line.key, labels[_name(line.label, numeric)]) for line in lines]
    other = sibling(path)
    if other is not None:
        result.test = []
        for line in _lines(other, root, result.bad):
            result.test.append((line.key, _test_label(other, line, labels, numeric)))
    refused = {key for key, _ in result.bad}
    result.train = [item for item in result.train if item[0] not in refused]
    result.test = None if result.test is None else [item for item in result.test if item[0] not in refused]
    return result


def _name(label: str, numeric: bool) -> str:
    """'03' and '3' are the same integer label; names stay as written."""
    return str(int(label)) if numeric else label


def _test_label(file: Path, line: Line, labels: dict[str, int], numeric: bool) -> int:
    if not numeric:
        if line.label in labels:
            return labels[line.label]
    elif _INTEGER.fullmatch(line.label) and _name(line.label, True) in labels:
        return labels[_name(line.label, True)]
    if numeric:
        raise DataError(f"label {line.label} in {file.name} line {line.number} is out of range 0..{len(labels) - 1}")
    raise DataError(f"test class '{line.label}' in {file.name} line {line.number} has no training images")


def _integer_classes(path: Path, lines: list[Line]) -> list[str]:
    """Names '0'..'max' of integer labels. Raises: DataError for a negative label, or one that no line has."""
    for line in lines:
        if int(line.label) < 0:
            raise DataError(f"label {line.label} in {path.name} line {line.number} is out of range: labels start at 0")
    used = {int(line.label) for line in lines}
    highest = max(used)
    if len(used) <= highest:
        empty = next(label for label in range(highest) if label not in used)
        raise DataError(f"class {empty} has no images in {path.name}: integer labels must cover all of 0..{highest}")
    return [str(label) for label in range(highest + 1)]


def _lines(path: Path, root: Path, bad: list[tuple[str, str]]) -> list[Line]:
    """All entries of one list file; blank lines and comments (#) are passed over."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is neither a folder nor a text file of 'path label' lines (UTF-8)") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    lines: list[Line] = []
    seen: dict[str, Line] = {}
    real_folders: dict[str, str] = {}
    for number, content in enumerate(text.split("\n"), 1):
        content = content.strip()
        if not content or content.startswith("#"):
            continue
        parts = content.rsplit(maxsplit=1)
        if len(parts) != 2 or not all(is_plain(part) for part in parts):
            raise DataError(f"{path.name} line {number}: expected 'path label', got '{printable(content[:80])}'")
        line = Line(number, _key(parts[0], root, f"{path.name} line {number}"), parts[1])
        if (first := seen.setdefault(line.key, line)) is not line:
            raise DataError(f"{path.name} line {number}: '{line.key}' is already listed in line {first.number}")
        if not _stays(line.key, root, real_folders):
            bad.append((line.key, "a link that leaves the folder"))
        lines.append(line)
    if not lines:
        raise DataError(f"{path} lists no images; expected lines of 'path label'")
    return lines


def _key(path: str, root: Path, where: str) -> str:
    """The path relative to the root. Raises: DataError where it leads out of it."""
    absolute = os.path.normpath(os.path.join(root, path))
    if os.path.isabs(path):  # perhaps written by way of a link to the root
        absolute = os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))
    if not is_inside(absolute, root) or absolute == str(root):
        raise DataError(f"{where}: '{path}' leads out of the list's folder {root}")
    return os.path.relpath(absolute, root).replace(os.sep, "/")


def _stays(key: str, root: Path, real_folders: dict[str, str]) -> bool:
    """Whether the file, links followed, lies in the root; real paths of folders are remembered."""
    folder, _, name = key.rpartition("/")
    if folder not in real_folders:
        real_folders[folder] = os.path.realpath(root / folder)
    path = os.path.join(real_folders[folder], name)
    return is_inside(os.path.realpath(path) if os.path.islink(path) else path, root)
