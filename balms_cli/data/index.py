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
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["image", "label"])
    writer.writerows(zip(split.keys, split.labels.tolist(), strict=True))
    return stream.getvalue()


def parse_index(text: str, file: Path, k: int) -> Split:
    """One index file. Labels must lie in 0..k-1, keys must be distinct and must not lead out of the root."""
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
            if int(row[1][:10]) >= k:
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
