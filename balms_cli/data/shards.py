"""WebDataset shards: tar files in which the files of one sample follow each other and share a name up to the first dot.

``000123.jpg`` with ``000123.cls`` (a number), ``000123.json`` (``{"label": ...}``) or ``000123.txt`` (a name). Shards are
read through once, header by header, and stay as they are: an image is then found by its place (see ``tar_entry``).
"""

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from ..reporter import Reporter
from .aside import is_plain, printable
from .folders import EXTENSIONS, Problem, is_inside
from .index import is_safe_key
from .lists import SPLIT_WORDS, Entries, Lists, assemble
from .tar_entry import SMALL, Member, make_key, members

MAX_SHARDS = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")
_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)
_LABELS = ("cls", "json", "txt")  # the first that a sample has is its label
_JSON_KEYS = ("label", "cls", "class")


def is_pattern(source: str) -> bool:
    """Whether a source names shards: a tar file, or a pattern like ``shards-{000..012}.tar``."""
    return source.endswith((".tar", ".tar.gz", ".tgz"))


def holds_shards(folder: Path) -> bool:
    """Whether a folder holds tar files and no folders (ImageNet's own archives may lie beside its train/ and val/)."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        return any(entry.name.endswith(".tar") for entry in entries) and not any(entry.is_dir() for entry in entries)
    except OSError:
        return False  # whoever reads the folder tells why


def expand(pattern: str) -> list[str]:
    """``a-{00..02}.tar`` to its three names, ``{a,b}.tar`` to two. Raises: DataError where that would be too many."""
    parts = _BRACES.split(pattern)
    choices: list[list[str]] = []
    for i, part in enumerate(parts):
        if i % 2 == 0:
            choices.append([part])
        elif span := _RANGE.fullmatch(part):
            first, last, width = int(span[1]), int(span[2]), len(span[1]) if span[1].startswith("0") else 0
            if abs(last - first) >= MAX_SHARDS:
                raise DataError(f"'{printable(pattern)}' means more than {MAX_SHARDS} shards")
            step = 1 if last >= first else -1
            choices.append([f"{number:0{width}d}" for number in range(first, last + step, step)])
        else:
            choices.append(part.split(",") if "," in part else ["{" + part + "}"])
    total = 1
    for one in choices:
        total *= len(one)
    if total > MAX_SHARDS:
        raise DataError(f"'{printable(pattern)}' means more than {MAX_SHARDS} shards")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def find(source: str) -> dict[str, list[Path]]:
    """Shards a split, in order. Raises: DataError for one that is missing.

    In a folder 'train', 'test' or 'val' as a word in a name says the split. A pattern names the training shards; those
    beside them whose names differ in that word and in numbers alone are the other splits. Shards of one pattern may lie in
    several folders, so on several disks.
    """
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        files = sorted(path / name for name in _names(path) if name.endswith(".tar") and not name.startswith("."))
        splits: dict[str, list[Path]] = {}
        for file in files:
            splits.setdefault(_split_of(file.name) or "train", []).append(file)
    else:
        files = [path] if os.path.isfile(path) else [Path(name) for name in expand(str(path))]
        missing = [file for file in files if not os.path.isfile(file)]
        if missing:
            raise DataError(f"{len(missing)} of {len(files)} shards of '{printable(source)}' are not there, such as "
                            f"{printable(str(missing[0]))}")  # fmt: skip
        splits = {"train": files}
        named = set(files)
        form = _form(files[0].name) if _split_of(files[0].name) == "train" else None
        for folder in dict.fromkeys(file.parent for file in files):
            for name in sorted(_names(folder)):
                split = _split_of(name)
                if split in ("test", "val") and _form(name) == form and folder / name not in named:
                    splits.setdefault(split, []).append(folder / name)
    if not splits.get("train"):
        raise DataError(f"{printable(source)} holds no training shards, only those of {', '.join(splits) or 'nothing'}")
    if "val" in splits and "test" not in splits:
        splits["test"] = splits.pop("val")
    return splits


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from None


def _split_of(name: str) -> str | None:
    found = _WORD.search(name)
    return SPLIT_WORDS[found[1].lower()] if found else None


def _form(name: str) -> str:
    return re.sub(r"[0-9]+", "#", _WORD.sub("*", name, count=1))


def read(source: str, reporter: Reporter, problems: list[Problem] | None = None) -> Lists:
    """Index all shards. Raises: DataError for a shard or a sample that cannot be read; ``problems`` takes what is wrong with
    single samples instead."""
    splits = find(source)
    root = Path(os.path.commonpath([file.parent.resolve() for files in splits.values() for file in files]))
    told = {split: files[0].with_name(f"{files[0].name} and {len(files) - 1} more" if files[1:] else files[0].name)
            for split, files in splits.items()}  # fmt: skip
    bad: list[tuple[str, str]] = []
    parts: dict[str, Entries] = {}
    named: set[str] = set()
    passed: Counter[str] = Counter()
    with reporter.task("indexing shards", sum(map(len, splits.values())), unit="shard") as task:
        for split, files in splits.items():
            part = parts[split] = Entries("the shards", where=lambda self, i: f"{printable(self.keys[i])}")
            texts: dict[str, str] = {}
            for file in files:
                if not is_inside(os.path.realpath(file), root):
                    raise DataError(f"{file} is a link that leaves {root}: name the place of the file itself, in braces with "
                                    "the others ({a,b}/train-{00..12}.tar)")  # fmt: skip
                name = os.path.relpath(file.parent.resolve() / file.name, root).replace(os.sep, "/")
                if name in named:
                    raise DataError(f"'{printable(source)}' means {printable(name)} twice: name each shard once")
                named.add(name)
                for key, label in _samples(file, name, bad, passed, problems):
                    part.keys.append(key)
                    part.labels.append(texts.setdefault(label, label))
                task.advance()
            if not part.keys:
                raise DataError(f"{files[0].parent}: the {split} shards hold no images; expected samples of an image and "
                                f".cls, .json or .txt")  # fmt: skip
    result = assemble(root, parts, bad, problems)
    result.passed = passed
    result.files = {split: told[split] for split in ("test", "val") if split in told}
    return result


def _samples(
    file: Path, shard: str, bad: list[tuple[str, str]], passed: Counter[str], problems: list[Problem] | None
) -> Iterator[tuple[str, str]]:
    """(key, label as written) of every sample with an image; ``shard``: the file as keys name it. ``passed`` counts samples
    that have a label beside another file, but no image, by the ending of that file."""
    seen: set[str] = set()
    for base, group in itertools.groupby(members(file), key=lambda found: _base(found[0].name)):
        image: Member | None = None
        other = ""
        texts: dict[str, tuple[Member, bytes]] = {}
        for member, content in group:
            ending = member.name[len(base) + 1 :].lower()
            if ending in _LABELS:
                texts.setdefault(ending, (member, content))
            elif "." + ending in EXTENSIONS and image is None:
                image = member
            else:
                other = other or ending
        if image is None:  # a photo that is not decoded here, features; captions alone, or a file that tells about the shard
            if texts and other:
                passed[f".{printable(other[:20])}"] += 1
            continue
        told = f"sample '{printable(base[:80])}' in {file.name}"
        if base in seen:
            _mind(problems, f"{told} is there twice, not in one piece: its files must follow each other")
            continue
        seen.add(base)
        key = make_key(shard, image)
        if not is_safe_key(key):
            bad.append((key, "a member name that leads out of the shard or holds a control character"))
            continue
        label = next((_label(ending, *texts[ending]) for ending in _LABELS if ending in texts), None)
        if label is None:
            what = "has no label: expected .cls, .json or .txt (a tar of class folders is to be unpacked)" if not texts else \
                   "has a label that cannot be read: expected a number in .cls, 'label' in .json, one line in .txt"  # fmt: skip
            _mind(problems, f"{told} {what}")
            continue
        yield key, label


def _mind(problems: list[Problem] | None, message: str) -> None:
    if problems is None:
        raise DataError(message)
    problems.append(("sample", message))


def _base(name: str) -> str:
    """The name up to the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _label(ending: str, member: Member, content: bytes) -> str | None:
    if member.size > SMALL or len(content) < member.size:
        return None
    try:
        text = content.decode("utf-8-sig").strip()
        if ending == "json":
            found = json.loads(text)
            found = next((found[key] for key in _JSON_KEYS if key in found), None) if isinstance(found, dict) else found
            if isinstance(found, bool) or not isinstance(found, int | str):
                return None
            text = str(found).strip()
    except (ValueError, RecursionError):
        return None
    return text if text and is_plain(text) and (ending != "cls" or text.lstrip("+-").isdigit()) else None
