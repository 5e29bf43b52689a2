"""What a data set holds, before anything is made of it: ``balms audit`` reads here what ``make-lt`` would refuse.

Shapes: N entries (an image in a split), S splits, C classes.
"""

import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..config import MakeLTConfig, suggest
from ..errors import DataError
from ..reporter import Reporter
from . import class_names, folders, known, lists, moved
from .aside import printable
from .folders import Problem
from .manifest import HEADER, Manifest, is_manifest
from .sources import FOLDER, check_known, check_unused, form_of, names_file, open_source, read_listed, tell_splits


@dataclass
class Listing:
    """The entries of a data set, as listed; no image was opened yet.

    ``kind``: folder, list, shards, digits or cifar (the last two hold no image files); ``keys`` are relative to ``root``;
    ``bad``: (key, reason) of what is left unread; ``problems``: (kind, message) of what make-lt refuses; ``passed``,
    ``stray``, ``beside``, ``again``: see :class:`folders.Scan`. Classes are in label order for known sets and
    manifests, else by decreasing number of training images.
    """

    kind: str
    name: str
    path: str
    root: str
    classes: list[str]
    splits: list[str]
    keys: list[str]
    split_N: np.ndarray
    label_N: np.ndarray
    known: bool = False
    manifest: Manifest | None = None
    bad: list[tuple[str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)
    stray: int = 0
    beside: list[str] = field(default_factory=list)
    again: int = 0

    @property
    def has_files(self) -> bool:
        return self.kind not in ("digits", "cifar")

    def counts(self, rows_N: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Entries a split and class: int64 [S, C]; ``rows_N``: of these entries alone."""
        k = len(self.classes)
        cells_N = self.split_N[rows_N].astype(np.int64) * k + self.label_N[rows_N]
        return np.bincount(cells_N, minlength=len(self.splits) * k).reshape(len(self.splits), k)


def open_listing(data: str, data_root: str | None, offline: bool, reporter: Reporter, *, images: str | None = None,
                 names: str | None = None, leaf_classes: bool = False) -> Listing:  # fmt: skip
    """List what ``data`` names: digits, cifar10, cifar100, a manifest, a folder of class folders, a list or CSV file, or
    tar shards. ``images``, ``names``, ``leaf_classes``: as in :class:`MakeLTConfig`.

    Raises: DataError (exit 3) where there is nothing to list; what is wrong inside is collected in ``problems``.
    """
    path = Path(os.path.expanduser(data))
    if data == "digits" or data in known.ARCHIVES:
        check_known(data, images, names, leaf_classes)
        return _known(data, data_root, offline, reporter)
    if os.path.isfile(path / HEADER) or (path.suffix == ".json" and os.path.isfile(path) and is_manifest(path)):
        check_known("a manifest", images, names, leaf_classes)
        return _manifest(path, reporter)
    form = form_of(data)
    if form is None:
        raise DataError(f"no such data: '{printable(data)}'; {suggest(data, ['digits', *known.ARCHIVES])} or a folder, "
                        f"a list file, tar shards, or a manifest")  # fmt: skip
    check_unused(form, images, leaf_classes)
    problems: list[Problem] = []
    if form == FOLDER:
        found = folders.scan(path, problems, leaves=leaf_classes)
        tell_splits(reporter, {"test": found.val_is_test} if found.val_is_test else {})
        listing = _from_scan(found, path, found.root.name, list(found.train))
    else:
        kind, name, parsed = read_listed(form, data, images, reporter, problems)
        listing = _from_lists(kind, name, path, parsed, problems, reporter)
    listing = _sorted(listing)
    if (file := names_file(form, path, names)) is not None:
        label_C, row_C = np.unique(listing.label_N, return_index=True)
        first = dict(zip(label_C.tolist(), row_C.tolist(), strict=True))
        samples = [listing.keys[first[c]] if c in first else None for c in range(len(listing.classes))]
        shown = class_names.match(class_names.read(file), listing.classes, samples, file)
        listing.classes = [shown[one] for one in listing.classes]
    return listing


def _known(name: str, data_root: str | None, offline: bool, reporter: Reporter) -> Listing:
    if name != "digits":
        archive = known.ARCHIVES[name]
        found = known.locate(archive, data_root, offline, reporter)
        if found.kind == "folder":
            listing = _from_scan(folders.scan(found.root, []), found.root, name, list(archive.classes))
            listing.known, listing.path = True, name
            return listing
    source = open_source(MakeLTConfig(source=name, data_root=data_root, offline=offline), Reporter())
    parts = {"train": source.train, "test": source.test or []}
    listing = _listing(source.kind, name, name, source.root, source.classes, parts)
    listing.known = True
    return listing


def _manifest(path: Path, reporter: Reporter) -> Listing:
    manifest = Manifest.load(path)
    moved.tell(manifest.moved_from, manifest.source["root"], reporter)
    keys = [key for part in manifest.splits.values() for key in part.keys]
    split_N = np.repeat(np.arange(len(manifest.splits), dtype=np.uint8), [len(part) for part in manifest.splits.values()])
    label_N = np.concatenate([part.labels for part in manifest.splits.values()]).astype(np.int32)
    return Listing(manifest.source["kind"], manifest.name, str(manifest.path), manifest.source["root"], manifest.classes,
                   list(manifest.splits), keys, split_N, label_N, manifest=manifest)  # fmt: skip


def _from_scan(found: folders.Scan, path: Path, name: str, classes: list[str]) -> Listing:
    """Classes that only the test folder has come last, with no training image."""
    names = dict.fromkeys([*classes, *found.train, *(found.test or {}), *(found.val or {})])
    labels = {one: label for label, one in enumerate(names)}
    parts = {"train": found.train} | {split: part for split, part in (("val", found.val), ("test", found.test))
                                      if part is not None}  # fmt: skip
    items = {split: [(key, labels[one]) for one, keys in part.items() for key in keys] for split, part in parts.items()}
    listing = _listing("folder", name, str(path), str(found.root), list(labels), items)
    listing.bad, listing.problems, listing.passed = found.bad, found.problems or [], found.passed
    listing.stray, listing.beside, listing.again = found.stray, sorted(found.beside), found.again
    return listing


def _from_lists(kind: str, name: str, path: Path, parsed: lists.Lists, problems: list[Problem], reporter: Reporter) -> Listing:
    tell_splits(reporter, parsed.files)
    parts = {"train": parsed.train} | {split: part for split, part in (("val", parsed.val), ("test", parsed.test))
                                       if part is not None}  # fmt: skip
    listing = _listing(kind, name, str(path), str(parsed.root), parsed.classes, parts)
    listing.bad, listing.problems, listing.passed = parsed.bad, problems, parsed.passed
    return listing


def _listing(kind: str, name: str, path: str, root: str, classes: list[str], parts: dict[str, list]) -> Listing:
    keys: list[str] = []
    label_N = np.empty(sum(map(len, parts.values())), dtype=np.int32)
    for items in parts.values():
        begin = len(keys)
        keys += [key for key, _ in items]
        label_N[begin : len(keys)] = np.fromiter((label for _, label in items), np.int32, len(items))
    split_N = np.repeat(np.arange(len(parts), dtype=np.uint8), [len(items) for items in parts.values()])
    return Listing(kind, name, path, root, classes, list(parts), keys, split_N, label_N)


def _sorted(listing: Listing) -> Listing:
    """Classes in the order that make-lt gives them: by decreasing number of training images, ties by name or number."""
    train_C = listing.counts()[0]
    numeric = all(name.isascii() and name.isdigit() for name in listing.classes)
    names = [int(name) if numeric else name for name in listing.classes]
    order = sorted(range(len(names)), key=lambda c: (-train_C[c], names[c]))
    new_C = np.empty(len(order), dtype=np.int32)
    new_C[order] = np.arange(len(order))
    listing.classes, listing.label_N = [listing.classes[c] for c in order], new_C[listing.label_N]
    return listing


def fold(name: str) -> str:
    """A name as a file system that minds neither case nor Unicode's normal form sees it."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def case_clashes(names: list[str]) -> list[list[str]]:
    """Groups of different names that are one where case and normal form do not count. Memory: 8 bytes a name."""
    hash_N = np.fromiter((hash(fold(name)) for name in names), np.int64, len(names))
    values, counts = np.unique(hash_N, return_counts=True)
    rows = np.flatnonzero(np.isin(hash_N, values[counts > 1]))
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(fold(names[row]), []).append(names[row])
    return [sorted(set(group)) for group in groups.values() if len(set(group)) > 1]
