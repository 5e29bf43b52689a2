"""List files: lines of ``path label``, paths relative to the list's folder."""

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from .aside import is_plain, printable
from .folders import MAX_DEPTH, TOO_DEEP, Problem, is_inside

_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")
_MAX_GAPS = 100_000  # integer labels that no line has, above which the list is refused even where problems are collected


@dataclass(slots=True)
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


def read(path: Path, problems: list[Problem] | None = None) -> Lists:
    """Read a list file and its sibling.

    Labels that are all integers must cover 0..max, and are then the names of the classes; others are names. Raises:
    DataError with the line's number for a line that cannot be read, a path out of the root, or a label out of range.
    ``problems``: takes these messages instead, the lines they are about left out; a class without training images stays,
    and ``bad`` stays empty.
    """
    root = path.resolve().parent
    result = Lists(root, [], [], None)
    lines = _lines(path, root, result.bad, problems)
    numeric = all(_INTEGER.fullmatch(line.label) for line in lines)
    if numeric:
        result.classes = _integer_classes(path, lines, problems)
    else:
        result.classes = sorted({line.label for line in lines})
    labels = {name: label for label, name in enumerate(result.classes)}
    result.train = [(line.key, labels[_name(line.label, numeric)]) for line in lines]
    other = sibling(path)
    if other is not None:
        result.test = []
        for line in _lines(other, root, result.bad, problems):
            result.test.append((line.key, _test_label(other, line, labels, numeric, problems)))
        result.classes = list(labels)
    if refused := {key for key, _ in result.bad}:
        result.train = [item for item in result.train if item[0] not in refused]
        result.test = None if result.test is None else [item for item in result.test if item[0] not in refused]
    return result


def _name(label: str, numeric: bool) -> str:
    """'03' and '3' are the same integer label; names stay as written."""
    return str(int(label)) if numeric else label


def _test_label(file: Path, line: Line, labels: dict[str, int], numeric: bool, problems: list[Problem] | None) -> int:
    name = _name(line.label, numeric and _INTEGER.fullmatch(line.label) is not None)
    if name in labels:
        return labels[name]
    if problems is not None:  # a class of the test list alone: whoever collects problems sees it by its counts
        return labels.setdefault(name, len(labels))
    if numeric:
        raise DataError(f"label {line.label} in {file.name} line {line.number} is out of range 0..{len(labels) - 1}")
    raise DataError(f"test class '{line.label}' in {file.name} line {line.number} has no training images")


def _mind(problems: list[Problem] | None, kind: str, message: str) -> None:
    """Raises: DataError, or notes the problem where problems are collected."""
    if problems is None:
        raise DataError(message)
    problems.append((kind, message))


def _integer_classes(path: Path, lines: list[Line], problems: list[Problem] | None) -> list[str]:
    """Names '0'..'max' of integer labels. Raises: DataError for a negative label, or one that no line has."""
    for line in lines:
        if int(line.label) < 0:
            _mind(problems, "label",
                  f"label {line.label} in {path.name} line {line.number} is out of range: labels start at 0")  # fmt: skip
    lines[:] = [line for line in lines if int(line.label) >= 0]
    used = {int(line.label) for line in lines}
    highest = max(used, default=-1)
    if len(used) <= highest and (problems is None or highest - len(used) >= _MAX_GAPS):
        empty = next(label for label in range(highest) if label not in used)
        raise DataError(f"class {empty} has no images in {path.name}: integer labels must cover all of 0..{highest}")
    return [str(label) for label in range(highest + 1)]


def _lines(path: Path, root: Path, bad: list[tuple[str, str]], problems: list[Problem] | None) -> list[Line]:
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
        simple = content.isascii() and content.isprintable()  # as most are, and the quicker question
        if len(parts) != 2 or not (simple or all(is_plain(part) for part in parts)):
            _mind(problems, "line",
                  f"{path.name} line {number}: expected 'path label', got '{printable(content[:80])}'")  # fmt: skip
            continue
        try:
            line = Line(number, _key(parts[0], root, f"{path.name} line {number}"), parts[1])
        except DataError as error:
            _mind(problems, "line", str(error))
            continue
        if (first := seen.setdefault(line.key, line)) is not line:
            told = f"{path.name} line {number}: '{line.key}' is already listed in line {first.number}"
            if first.label == line.label:
                _mind(problems, "listed-twice", told)
            else:
                _mind(problems, "two-labels", f"{told}, as '{first.label}' and not '{line.label}'")
            continue
        # Whoever collects problems looks at each file anyway.
        if problems is None and (reason := _refusal(line.key, root, real_folders)):
            bad.append((line.key, reason))
        lines.append(line)
    if not lines:
        raise DataError(f"{path} lists no images; expected lines of 'path label'")
    return lines


def _key(path: str, root: Path, where: str) -> str:
    """The path relative to the root. Raises: DataError where it leads out of it."""
    if os.sep == "/" and not {"", ".", ".."} & set(path.split("/")):
        return path  # as most are: relative, and written in one way
    absolute = os.path.normpath(os.path.join(root, path))
    if os.path.isabs(path):  # perhaps written by way of a link to the root
        absolute = os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))
    if not is_inside(absolute, root) or absolute == str(root):
        raise DataError(f"{where}: '{path}' leads out of the list's folder {root}")
    return os.path.relpath(absolute, root).replace(os.sep, "/")


def _refusal(key: str, root: Path, real_folders: dict[str, str]) -> str | None:
    """Why a file is not to be read, if so; real paths of folders are remembered. A missing one is left to its reader."""
    if key.count("/") > MAX_DEPTH:
        return TOO_DEEP
    folder, _, name = key.rpartition("/")
    if folder not in real_folders:
        real_folders[folder] = os.path.realpath(root / folder)
    path = f"{real_folders[folder]}{os.sep}{name}"
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
