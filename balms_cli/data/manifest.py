"""A data set as a folder: ``manifest.json`` and one CSV a split, over images that stay where they are.

A manifest may come from a stranger: everything in it is checked before it is believed.
"""

import json
import os
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ConfigError, DataError
from . import aside, moved
from .index import Split, index_sha256, index_text, parse_index
from .longtail import imbalance_factor

FORMAT, VERSION = "balms-manifest", 1
HEADER = "manifest.json"
SPLITS = ("train", "val", "meta", "test")


class _SourceModel(BaseModel):
    model_config = ConfigDict(strict=True)
    kind: Literal["folder", "list", "shards", "cifar", "digits"]
    name: str
    root: str


class _HeaderModel(BaseModel):
    """What ``manifest.json`` must hold; keys of later minor versions are left alone."""

    model_config = ConfigDict(strict=True)
    name: str
    source: _SourceModel
    classes: list[str]
    class_counts: list[int]
    splits: dict[Literal["train", "val", "meta", "test"], int]
    profile: str
    imbalance: float | None
    seed: int
    sha256: str
    image_size: Annotated[list[int], Field(min_length=2, max_length=2)]
    skipped: list[dict[str, str]]
    untested: list[str]
    created: str
    options: dict[str, Any] = {}


@dataclass(frozen=True)
class Header:
    """What a listing of manifests needs; read without the index files. ``path`` is the manifest's folder."""

    path: Path
    name: str
    created: str
    sha256: str
    classes: int
    images: int


@dataclass(frozen=True)
class Manifest:
    """A data set. ``classes`` in label order (head first), ``class_counts`` of the training split in the same order.

    ``imbalance`` is what was asked for (None: as is), ``imbalance_factor`` what was measured; ``image_size`` the median
    [width, height] in pixels of the source's training images; ``sha256`` covers class names and index, not the root.
    ``options``: those of make-lt that were not at their defaults, for people; older manifests have none. ``moved_from``: the
    root as it was written, where ``source`` tells of another place on this machine (see :mod:`.moved`); never written.
    """

    path: Path
    name: str
    source: dict[str, str]
    classes: list[str]
    class_counts: list[int]
    splits: dict[str, Split]
    profile: str
    imbalance: float | None
    imbalance_factor: float
    seed: int
    sha256: str
    image_size: list[int]
    skipped: list[dict[str, str]] = field(default_factory=list)
    untested: list[str] = field(default_factory=list)
    created: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    moved_from: str = ""

    @staticmethod
    def load(path_or_file: str | Path) -> "Manifest":
        """Read and check a manifest: its folder, or the ``manifest.json`` in it. Raises: DataError (exit 3)."""
        file = Path(path_or_file)
        file = file / HEADER if os.path.isdir(file) else file
        header = _parse_header(_read(file), file)
        classes, folder = header.classes, file.parent
        if not classes or len(set(classes)) != len(classes):
            raise DataError(f"{file}: class names must be there and differ from each other")
        if not all(name and aside.is_plain(name) for name in classes):
            raise DataError(f"{file}: a class name is empty or holds a control character")
        if "train" not in header.splits or "test" not in header.splits:
            raise DataError(f"{file}: the splits 'train' and 'test' must both be there")
        texts = {split: _read(folder / f"{split}.csv") for split in SPLITS if split in header.splits}  # train first
        if index_sha256(classes, texts) != header.sha256:
            raise DataError(f"{file}: the index files are not those it was made with (sha256 differs): make it anew")
        splits = {split: parse_index(text, folder / f"{split}.csv", len(classes)) for split, text in texts.items()}
        counts = np.bincount(splits["train"].labels, minlength=len(classes)).tolist()
        sizes = {split: len(part) for split, part in splits.items()}
        if counts != header.class_counts or sizes != header.splits:
            raise DataError(f"{file}: class_counts and split sizes do not agree with the index files")
        if 0 in counts:
            raise DataError(f"{file}: class '{classes[counts.index(0)]}' has no training image")
        values = header.model_dump(exclude={"splits"})
        source, written = values["source"], header.source.root
        source["root"] = moved.here(source["kind"], source["name"], written, splits["train"].keys)
        return Manifest(path=folder, splits=splits, imbalance_factor=imbalance_factor(counts),
                        moved_from=written if source["root"] != written else "", **values)  # fmt: skip

    def index_texts(self) -> dict[str, str]:
        """The index files' content: a CSV text a split."""
        return {split: index_text(part) for split, part in self.splits.items()}

    def header_text(self) -> str:
        """The content of ``manifest.json``."""
        names = [one.name for one in fields(self) if one.name not in ("path", "splits", "moved_from")]
        document: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        document |= {name: getattr(self, name) for name in names}
        document["splits"] = {split: len(part) for split, part in self.splits.items()}
        return json.dumps(document, ensure_ascii=False, indent=1) + "\n"

    def save(self, folder: str | Path, *, overwrite: bool = False, keep_existing: bool = False) -> None:
        """Write the manifest to ``folder``, whole or not at all.

        ``overwrite`` replaces a manifest that is there; a folder with anything else in it is never deleted.
        ``keep_existing``: one that appears meanwhile, by another process that makes the same, stays.
        Raises: ConfigError (exit 2) for a folder in use or not to be written to, DataError (exit 3) for a full disk.
        """
        folder = Path(folder)
        check_target(folder, overwrite=overwrite)
        with aside.folder_aside(folder, keep_existing=keep_existing) as fresh:
            for split, text in self.index_texts().items():
                (fresh / f"{split}.csv").write_text(text, encoding="utf-8", newline="")
            (fresh / HEADER).write_text(self.header_text(), encoding="utf-8", newline="")


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that a manifest must not be written to. Raises: ConfigError."""
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise ConfigError(f"{folder} is a file; a manifest is a folder: choose another --out")
        entries = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise aside.write_error(error, folder) from None
    foreign = [entry for entry in entries if entry not in {HEADER, *(f"{split}.csv" for split in SPLITS)}]
    if entries and not overwrite:
        raise ConfigError(f"{folder} is not empty; choose another --out, or --overwrite to replace a manifest there")
    if foreign:
        what = aside.name_some([aside.printable(entry) for entry in foreign], 3)
        raise ConfigError(f"{folder} holds more than a manifest ({what}), so it is left alone; choose another --out")


def stored_sha256(folder: Path) -> str | None:
    """The sha256 of the manifest in a folder, where its index files are those that it tells of; else None."""
    try:
        header = _parse_header(_read(folder / HEADER), folder / HEADER)
        texts = {split: _read(folder / f"{split}.csv") for split in header.splits}
    except DataError:
        return None
    return header.sha256 if index_sha256(header.classes, texts) == header.sha256 else None


def is_manifest(file: Path) -> bool:
    """Whether a JSON file means to be a manifest: it says so at its beginning."""
    try:
        with open(file, encoding="utf-8") as stream:
            return FORMAT in stream.read(200)
    except (OSError, UnicodeDecodeError):
        return False


def now() -> str:
    """The time, in UTC with microseconds, so that of two artefacts made in one second the newer is known."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def find_manifests(workspace: Path) -> list[Header]:
    """Manifests of a workspace, ``<workspace>/data/*/manifest.json``, newest first. Unreadable ones are passed over."""
    headers = []
    for file in Path(workspace).glob(f"data/*/{HEADER}"):
        if file.parent.name.startswith("."):
            continue  # being written, or left by a process that was killed
        try:
            found = _parse_header(_read(file), file)
            created = datetime.fromisoformat(found.created).astimezone(UTC).isoformat(timespec="microseconds")
        except (DataError, ValueError, OverflowError):  # the last: of a year that no other time zone has
            continue
        k, images = len(found.classes), sum(found.class_counts)
        headers.append(Header(file.parent, found.name, created, found.sha256, k, images))
    return sorted(headers, key=lambda header: (header.created, str(header.path)), reverse=True)


def newest_manifest(workspace: Path) -> Path | None:
    """Folder of the newest manifest of a workspace, or None."""
    return next((header.path for header in find_manifests(workspace)), None)


def _read(file: Path) -> str:
    try:
        with open(file, encoding="utf-8", newline="") as stream:
            return stream.read()
    except FileNotFoundError:
        raise DataError(f"no manifest: {file} does not exist; make one with balms make-lt") from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is not a text file in UTF-8") from None


def _parse_header(text: str, file: Path) -> _HeaderModel:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"{file} is not a manifest of balms make-lt")
    if document.get("version") != VERSION:
        found = document.get("version")
        raise DataError(f"{file} has format version {found!r}, this balms reads {VERSION}: make it anew")
    try:
        return _HeaderModel.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
