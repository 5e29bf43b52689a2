"""The index of a manifest: one CSV a split, ``image,label`` a line, and the hash that names its content."""

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError
from .aside import is_plain, printable


@dataclass(frozen=True)
class Split:
    """Images of one split: ``keys`` (N paths relative to the source's root, POSIX) and ``labels`` int64 [N]."""

    keys: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)


def index_sha256(classes: list[str], texts: dict[str, str]) -> str:
    """sha256 (hex) over the class names in order and the index files' text; each part is preceded by its length."""
    digest = hashlib.sha256()
    for part in [json.dumps(classes), *(x for split in sorted(texts) for x in (split, texts[split]))]:
        data = part.encode()
        digest.update(f"{len(data)}\n".encode() + data)
    return digest.hexdigest()


def index_text(split: Split) -> str:
    labels = split.labels.tolist()
    body = "\n".join([f"{key},{label}" for key, label in zip(split.keys, labels, strict=True)])
    if '"' not in body and "\r" not in body and body.count(",") == len(labels) and body.count("\n") == max(len(labels) - 1, 0):
        return f"image,label\n{body}\n" if labels else "image,label\n"  # as the writer below, in a third of its time
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["image", "label"])
    writer.writerows(zip(split.keys, split.labels.tolist(), strict=True))
    return stream.getvalue()


def parse_index(text: str, file: Path, k: int) -> Split:
    """One index file. Labels must lie in 0..k-1, keys must be distinct and must not lead out of the root."""
    return _parse_plain(text, k) or _parse_any(text, file, k)


def _parse_plain(text: str, k: int) -> Split | None:
    """An index in which nothing is quoted and nothing odd stands, as most are: looked at as a whole, which takes a fifth of
    the time. None for any other, a faulty one as well."""
    head, _, body = text.partition("\n")
    odd = ('"', "\r", "..", "//", "/,", "\n/", "\n,", ":\\")
    if head != "image,label" or not body.endswith("\n") or body[0] in "/," or any(part in text for part in odd):
        return None
    lines = body[:-1].split("\n")
    if text.count(",") != len(lines) + 1 or not is_plain(text.replace("\n", "")):
        return None
    keys, labels = zip(*[line.rpartition(",")[::2] for line in lines], strict=True)
    numbers = {label: int(label) for label in set(labels) if label.isascii() and label.isdigit() and len(label) < 10}
    different = set(keys)
    if len(numbers) < len(set(labels)) or max(numbers.values()) >= k or len(different) < len(keys) or "" in different:
        return None
    return Split(list(keys), np.fromiter(map(numbers.__getitem__, labels), np.int64, len(labels)))


def _parse_any(text: str, file: Path, k: int) -> Split:
    keys: list[str] = []
    labels: list[int] = []
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        if next(reader, None) != ["image", "label"]:
            raise DataError(f"{file}: the first line must be 'image,label'")
        for row in reader:
            where = f"{file} line {reader.line_num}"
            if len(row) != 2 or not row[1].isascii() or not row[1].isdigit():
                raise DataError(f"{where}: expected 'image,label', the label an integer from 0")
            if len(row[1]) > 9 or int(row[1]) >= k:
                raise DataError(f"{where}: label {row[1][:10]} is out of range 0..{k - 1}")
            if not is_safe_key(row[0]):
                raise DataError(f"{where}: '{printable(row[0])}' leads out of the source's folder")
            keys.append(row[0])
            labels.append(int(row[1]))
    except csv.Error as error:
        raise DataError(f"{file} line {reader.line_num}: {error}") from None
    if len(set(keys)) != len(keys):
        raise DataError(f"{file}: an image is listed twice")
    return Split(keys, np.array(labels, dtype=np.int64))


def is_safe_key(key: str) -> bool:
    """A relative POSIX path that stays under its root: no leading slash, no drive, no '..', no control character."""
    parts = key.split("/")
    return bool(key) and is_plain(key) and ".." not in parts and "" not in parts and not key[1:].startswith(":\\")
