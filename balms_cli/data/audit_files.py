"""The files of a data set, one by one: there or not, an image or not, its size, and which files hold the same bytes.

Nothing of a file is believed: pipes and devices are not opened, links out of the root are not followed, pixels are
counted before they are decoded, and a file is hashed piece by piece. Shapes: N entries, F files.
"""

import hashlib
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..reporter import Reporter
from . import known, tar_entry
from .audit import Listing
from .decode import BadImage, check_size, open_image, quiet_pillow, reason, turn_for, upright_size
from .folders import MAX_DEPTH, TOO_DEEP, is_inside
from .images import default_workers

MAX_FILE = 1 << 30  # bytes; a photo takes a thousandth of that
_CHUNK = 64  # files a thread takes at once
_STAT_CHUNK = 4096
_WORD = 2**64 - 1
_MAX_CODES = 1000  # different reasons, modes or formats that are told apart
_SPECIAL = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
            (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))  # fmt: skip


class Codes:
    """Small numbers for texts that return often; shared by threads. Number 0 stands for none."""

    def __init__(self) -> None:
        self.texts = [""]
        self._numbers = {"": 0}
        self._lock = threading.Lock()

    def __call__(self, text: str) -> int:
        number = self._numbers.get(text)
        if number is None:
            with self._lock:
                text = text if len(self.texts) < _MAX_CODES else "other"
                number = self._numbers.setdefault(text, len(self.texts))
                if number == len(self.texts):
                    self.texts.append(text)
        return number


@dataclass
class Facts:
    """What is known of each entry. ``reason_N``: code of why it cannot be read, 0 where it can (as far as was looked);
    ``bytes_N``: -1 where unknown; ``width_N``, ``height_N``: upright, 0 where unknown; ``content_N``: equal for equal
    content, -1 where unreadable. ``decoded``, ``hashed``: what was done; ``root_gone``: the files' folder is not there."""

    reason_N: np.ndarray
    bytes_N: np.ndarray
    width_N: np.ndarray
    height_N: np.ndarray
    mode_N: np.ndarray
    format_N: np.ndarray
    content_N: np.ndarray
    reasons: Codes
    modes: Codes
    formats: Codes
    decoded: bool
    hashed: bool
    hashed_files: int = 0
    root_gone: bool = False

    @staticmethod
    def unknown(n: int, *, decoded: bool, hashed: bool) -> "Facts":
        small, wide = (np.zeros(n, np.int16) for _ in range(3)), (np.zeros(n, np.int32) for _ in range(2))
        reason_N, mode_N, format_N = small
        width_N, height_N = wide
        return Facts(reason_N, np.full(n, -1, np.int64), width_N, height_N, mode_N, format_N, np.arange(n, dtype=np.int64),
                     Codes(), Codes(), Codes(), decoded, hashed)  # fmt: skip


class _Root:
    """Paths of keys, links followed, inside the root or not at all; real paths of folders are remembered."""

    def __init__(self, root: str) -> None:
        self.real = os.path.realpath(root)
        self._folders: dict[str, str] = {}

    def find(self, key: str) -> tuple[str, os.stat_result]:
        """Real path and status of a regular file. Raises: BadImage, or OSError."""
        if key.count("/") > MAX_DEPTH:
            raise BadImage(TOO_DEEP)
        if (place := tar_entry.find(os.path.join(self.real, key))) is not None:
            return self._find_in_tar(key, place)
        folder, _, name = key.rpartition("/")
        real = self._folders.get(folder)
        if real is None:
            if len(self._folders) > 100_000:
                self._folders.clear()
            real = self._folders[folder] = os.path.realpath(os.path.join(self.real, folder))
        path = f"{real}{os.sep}{name}"
        status = os.lstat(path) if is_inside(real, self.real) else None
        if status is not None and stat.S_ISLNK(status.st_mode):
            path = os.path.realpath(path)
            status = os.stat(path) if is_inside(path, self.real) else None
        if status is None:
            raise BadImage("a link that leaves the folder")
        if not stat.S_ISREG(status.st_mode):
            what = next((name for test, name in _SPECIAL if test(status.st_mode)), "not a regular file")
            raise BadImage(f"{what}, not a file")
        return path, status

    def _find_in_tar(self, key: str, place: tar_entry.Place) -> tuple[str, os.stat_result]:
        """The same of an image in a shard: its own size, and a number that no other image there has."""
        shard, status = self.find(os.path.relpath(place.shard, self.real))
        if place.offset + place.size > status.st_size:
            raise BadImage("missing: the tar file ends before it")
        inode = (status.st_ino * 0x9E3779B97F4A7C15 + place.offset) & _WORD
        values = (status.st_mode, inode, status.st_dev, 1, 0, 0, place.size, 0, 0, 0)
        return shard + os.path.join(self.real, key)[len(place.shard) :], os.stat_result(values)


def look(listing: Listing, reporter: Reporter, *, decode: bool, hashes: bool, workers: int | None = None) -> Facts:
    """Look at all files: their status; with ``decode`` every image in full; with ``hashes`` the sha256 of those that
    share their size with another file (a file of a size of its own has no twin, and hard links are one file)."""
    if not listing.has_files:
        return _arrays(listing, hashes)
    facts = Facts.unknown(len(listing.keys), decoded=decode, hashed=hashes)
    if not os.path.isdir(listing.root):
        facts.root_gone, facts.decoded, facts.hashed = True, False, False
        return facts
    root, workers = _Root(listing.root), max(1, workers if workers is not None else default_workers())
    inode_N = np.zeros((len(listing.keys), 2), np.uint64)

    def status(rows: range) -> None:
        sizes, inodes, reasons = [], [], []
        for key in listing.keys[rows.start : rows.stop]:
            size, inode = -1, (0, 0)
            try:
                found = root.find(key)[1]
                size, inode = found.st_size, (found.st_dev & _WORD, found.st_ino & _WORD)
                told = "" if 0 < size <= MAX_FILE else "over 1 GiB: not read" if size else "empty"
            except (BadImage, OSError, ValueError) as error:
                told = reason(error, key)
            sizes.append(size)
            inodes.append(inode)
            reasons.append(facts.reasons(told))
        part = slice(rows.start, rows.stop)
        facts.bytes_N[part], inode_N[part], facts.reason_N[part] = sizes, np.array(inodes, np.uint64), reasons

    _for_all(status, len(listing.keys), _STAT_CHUNK, reporter, "looking at files", workers)
    file_N, first_F = _files(inode_N, facts.reason_N == 0)
    shared_F = _shared(facts.bytes_N[first_F]) if hashes else np.zeros(len(first_F), bool)
    todo_F = np.flatnonzero(shared_F | decode)
    digest_F = np.zeros((len(first_F), 32), np.uint8)

    def read(places: range) -> None:
        for file in todo_F[places.start : places.stop]:
            row = first_F[file]
            try:
                _read(root, listing.keys[row], row, facts, digest_F[file] if shared_F[file] else None, decode)
            except Exception as error:  # one file of a stranger's: told and counted, it ends nothing
                facts.reason_N[row] = facts.reasons(reason(error, listing.keys[row]))

    if todo_F.size:
        title = "reading images" if decode else "hashing files of equal size"
        with quiet_pillow():
            _for_all(read, len(todo_F), _CHUNK, reporter, title, workers)
    there_N = file_N >= 0
    for array_N in (facts.reason_N, facts.width_N, facts.height_N, facts.mode_N, facts.format_N):
        array_N[there_N] = array_N[first_F][file_N[there_N]]
    facts.hashed_files = int(shared_F.sum())
    good_N = there_N & (facts.reason_N == 0)
    facts.content_N[~good_N] = -1
    facts.content_N[good_N] = _contents(digest_F, shared_F)[file_N[good_N]]
    return facts


def _read(root: _Root, key: str, row: int, facts: Facts, digest: np.ndarray | None, decode: bool) -> None:
    """One file: its hash into ``digest``, and its pixels, which are decoded and forgotten. Raises: whatever goes wrong."""
    path, _ = root.find(key)
    if (entry := tar_entry.open_entry(path)) is not None:
        if digest is not None:
            digest[:] = np.frombuffer(hashlib.sha256(entry.getbuffer()).digest(), np.uint8)
        if decode:
            _decode(entry, row, facts)
        return
    # Not to wait for a writer, should it have become a pipe just now.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
            raise BadImage("changed while it was read")
        if digest is not None:
            digest[:] = np.frombuffer(hashlib.file_digest(file, "sha256").digest(), np.uint8)
            file.seek(0)
        if decode:
            _decode(file, row, facts)


def _decode(file: BinaryIO, row: int, facts: Facts) -> None:
    """The pixels of an open file, and what they tell. Raises: BadImage, with the reason that reading it elsewhere gives."""
    try:
        with open_image(file) as image:
            check_size(image)
            facts.mode_N[row], facts.format_N[row] = facts.modes(image.mode), facts.formats(image.format or "")
            with turn_for(image, None):
                image.load()
            facts.width_N[row], facts.height_N[row] = upright_size(image)
    except Exception as error:  # Pillow's decoders raise many kinds on hostile bytes; each is a bad image, not a bug
        raise BadImage(reason(error, file)) from None


def _for_all(work: Callable[[range], None], n: int, chunk: int, reporter: Reporter, title: str, workers: int) -> None:
    """``work`` on ranges of rows, in threads (reading, hashing and decoding release the GIL)."""
    ranges = [range(begin, min(n, begin + chunk)) for begin in range(0, n, chunk)]
    with ThreadPoolExecutor(workers) as pool, reporter.task(title, n, unit="image") as task:
        try:
            for rows, _ in zip(ranges, pool.map(work, ranges), strict=True):
                task.advance(len(rows))
        except BaseException:  # Ctrl-C: do not read the rest first
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _files(inode_N: np.ndarray, there_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Files behind entries: number of the file [N] (-1: none), and the first entry of each [F]."""
    file_N = np.full(len(inode_N), -1, np.int64)
    rows = np.flatnonzero(there_N)
    order = rows[np.lexsort((inode_N[rows, 1], inode_N[rows, 0]))]  # stable: entries of one file stay in order
    new = np.ones(len(order), bool)
    new[1:] = (inode_N[order[1:]] != inode_N[order[:-1]]).any(axis=1)
    file_N[order] = np.cumsum(new) - 1
    return file_N, order[new]


def _shared(bytes_F: np.ndarray) -> np.ndarray:
    """Which files have the size of another."""
    values, inverse, counts = np.unique(bytes_F, return_inverse=True, return_counts=True)
    return counts[inverse] > 1 if values.size else np.zeros(0, bool)


def _contents(digest_F: np.ndarray, shared_F: np.ndarray) -> np.ndarray:
    """A number a content: files with the same digest get the same; the others one of their own."""
    content_F = np.arange(len(digest_F), dtype=np.int64)
    files = np.flatnonzero(shared_F)
    if files.size:
        words = np.ascontiguousarray(digest_F[files]).view(np.uint64)
        order = files[np.lexsort(words.T)]
        new = np.ones(len(order), bool)
        new[1:] = (digest_F[order[1:]] != digest_F[order[:-1]]).any(axis=1)
        content_F[order] = order[new][np.cumsum(new) - 1]
    return content_F


def _arrays(listing: Listing, hashes: bool) -> Facts:
    """Known sets without files of their own: their pixels are in arrays, whose checksums were verified on reading."""
    facts = Facts.unknown(len(listing.keys), decoded=True, hashed=hashes)
    facts.mode_N[:] = facts.modes("L" if listing.kind == "digits" else "RGB")
    facts.width_N[:] = facts.height_N[:] = 8 if listing.kind == "digits" else 32
    if not hashes:
        return facts
    rows: dict[str, list[int]] = {}
    for row, key in enumerate(listing.keys):
        rows.setdefault(key, []).append(row)
    digest_N = np.zeros((len(listing.keys), 32), np.uint8)
    seen_N = np.zeros(len(listing.keys), bool)
    for key, pixels in _pixels(listing):
        if key in rows:
            digest_N[rows[key]] = np.frombuffer(hashlib.sha256(pixels.tobytes()).digest(), np.uint8)
            seen_N[rows[key]] = True
    facts.reason_N[~seen_N] = facts.reasons("missing")
    facts.content_N = np.where(seen_N, _contents(digest_N, seen_N), -1)
    facts.hashed_files = int(seen_N.sum())
    return facts


def _pixels(listing: Listing):
    """Key and pixels of every image of the digits, or of the official CIFAR files."""
    if listing.kind == "digits":
        from sklearn.datasets import load_digits

        yield from ((f"digit-{i:04d}", image) for i, image in enumerate(load_digits().images, 1))
        return
    source = listing.manifest.source["name"] if listing.manifest else listing.name
    if source in known.ARCHIVES and os.path.isdir(listing.root):
        for part in ("train", "test"):
            for keys, _, images in known.read_batches(known.ARCHIVES[source], Path(listing.root), part):
                yield from zip(keys, images, strict=True)
