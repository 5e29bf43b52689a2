"""A feature bank as one file: written by shards while features are extracted, read by the rows that are drawn.

It is a safetensors file with one tensor, ``features`` [R, D] float32. While it grows it lies in the folder ``NAME.part`` at
its full length, and an empty file there, named by its number, marks every shard of SHARD_ROWS rows that is whole: rows
first, then, when the system has them on the disk, the mark. A process killed at any moment leaves whole shards behind, and
the next one begins where they end. Several processes write the same file, each its own shards.

Shapes: R rows, D features, B batch.
"""

import json
import mmap
import os
import shutil
import struct
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import DataError
from .aside import lock, write_error

SHARD_ROWS = 2048
_TENSOR = "features"
_ITEM = 4  # bytes of a float32


def bank_bytes(rows: int, features: int) -> int:
    """What a bank takes, in memory and on the disk but for its header of some 100 bytes."""
    return rows * features * _ITEM


def size_text(count: int) -> str:
    """Bytes as people read them: 3.3 GiB, 12 MiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"


class BankFile:
    """The bank at ``target`` with [rows, features]: whole, or under way beside it."""

    def __init__(self, target: Path, rows: int, features: int):
        self.target, self.rows, self.features = target, rows, features
        self.folder = target.with_name(f"{target.name}.part")
        self.growing = self.folder / target.name
        self.header = _header(rows, features)
        self.shards = -(-rows // SHARD_ROWS)
        self._held: BinaryIO | None = None

    # Reading

    def data_offset(self) -> int | None:
        """Where the rows begin in the whole file; None where there is none, or it is damaged or of another shape."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.target, "numpy") as file:  # checks the header, and that the file is as long as it says
                found = file.get_slice(_TENSOR) if list(file.keys()) == [_TENSOR] else None
                if found is None or found.get_shape() != [self.rows, self.features] or found.get_dtype() != "F32":
                    return None
            with self.target.open("rb") as file:
                offset = 8 + struct.unpack("<Q", file.read(8))[0]
        except (OSError, SafetensorError, struct.error):
            return None
        return offset if offset % _ITEM == 0 else None

    def mapped(self) -> "MappedRows | None":
        """The rows as they lie on the disk. None as with :meth:`data_offset`."""
        offset = self.data_offset()
        return None if offset is None else MappedRows(self.target, offset, self.rows, self.features)

    def loaded(self) -> Tensor | None:
        """The rows [R, D] in memory. None as with :meth:`data_offset`."""
        if (offset := self.data_offset()) is None:
            return None
        features_RD = torch.empty(self.rows, self.features)
        into, done = memoryview(features_RD.numpy()).cast("B"), 0
        with self.target.open("rb", buffering=0) as file:
            file.seek(offset)
            while done < len(into) and (count := file.readinto(into[done:])):
                done += count
        return features_RD if done == len(into) else None

    # Writing

    def begin(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Make the growing file, or take up the one that was left, and hold it: another run that is at this same bank is
        waited for, after a call of ``waiting``. What :meth:`missing` then tells is still to be written: nothing, where that
        other run finished it.

        Raises DataError (exit 3) where the disk is too small for it, and see :func:`write_error`.
        """
        try:
            while not self._hold(waiting):
                pass
            if self.data_offset() is not None:  # that other run has just finished it
                self.tidy()
                self.release()
                return
            if not self._is_ours():
                for mark in self._marks():
                    (self.folder / str(mark)).unlink(missing_ok=True)
                self._held.truncate(0)
            self._check_space()
            self._held.truncate(len(self.header) + bank_bytes(self.rows, self.features))
            self._held.seek(0)
            self._held.write(self.header)
            self._held.flush()
        except OSError as error:
            self.release()
            raise write_error(error, self.target) from error
        except DataError:
            self.release()
            raise

    def missing(self) -> list[int]:
        """The shards that are not marked as whole, after :meth:`begin`."""
        if self._held is None and self.data_offset() is not None:
            return []
        marks = self._marks()
        return [number for number in range(self.shards) if number not in marks]

    def shard(self, number: int) -> range:
        """The rows of a shard."""
        return range(number * SHARD_ROWS, min((number + 1) * SHARD_ROWS, self.rows))

    def writer(self) -> "ShardWriter":
        return ShardWriter(self)

    def finish(self) -> None:
        """The file takes its place, if it is not there. Raises DataError where shards are missing; see :func:`write_error`."""
        if missing := self.missing():
            raise DataError(f"{len(missing)} of {self.shards} shards of {self.target} are not there: several processes that "
                            "make a bank together need one folder that all of them see")  # fmt: skip
        if self._held is None:
            return
        try:
            if os.name == "nt":
                self.release()  # Windows moves no open file
            os.replace(self.growing, self.target)
            shutil.rmtree(self.folder, ignore_errors=True)
        except OSError as error:
            raise write_error(error, self.target) from error
        finally:
            self.release()

    def release(self) -> None:
        """Let go of the growing file. What is marked stays for the next run; where nothing is, nothing stays."""
        if self._held is None:
            return
        if not self._marks():
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):
                self.folder.parent.rmdir()  # where it holds nothing else
        self._held.close()
        self._held = None

    def tidy(self) -> None:
        """The bank is there: take away the marks of a process that was killed just after it had moved the file."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def rows_of(self, shards: list[int]) -> int:
        """How many rows these shards have together."""
        return sum(len(self.shard(number)) for number in shards)

    def free(self) -> int | None:
        """Bytes free where the bank is to lie. None: unknown."""
        folder = self.target.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            return None

    def _check_space(self) -> None:
        needed, free = bank_bytes(self.rows_of(self.missing()), self.features), self.free()
        if free is not None and needed > free:
            raise DataError(f"the feature bank needs {size_text(needed)} and {self.target.parent} has {size_text(free)} free: "
                            "free some space, lower --views or --set class_rows, or recompute features with "
                            "--features online")  # fmt: skip

    def _hold(self, waiting: Callable[[], None]) -> bool:
        """Open the growing file and lock it. False: meanwhile another process moved it into place, or took it away."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            held = os.fdopen(os.open(self.growing, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except FileNotFoundError:
            return False
        try:
            lock(held, waiting)
            ours = os.path.samestat(os.fstat(held.fileno()), os.stat(self.growing))
        except FileNotFoundError:
            ours = False
        except BaseException:  # Ctrl-C while it waits
            held.close()
            raise
        if ours:
            self._held = held
        else:
            held.close()
        return ours

    def _is_ours(self) -> bool:
        """Whether the file that was left has this bank's shape."""
        self._held.seek(0)
        whole = len(self.header) + bank_bytes(self.rows, self.features)
        return self._held.read(len(self.header)) == self.header and os.fstat(self._held.fileno()).st_size == whole

    def _marks(self) -> set[int]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return set()
        return {int(name) for name in names if name.isascii() and name.isdigit()}


class MappedRows:
    """``features`` [R, D] of a file: a row is read when it is asked for, no memory is set aside. Not to be written to."""

    def __init__(self, path: Path, offset: int, rows: int, features: int):
        self.file = path.open("rb")
        self.offset, self.row_bytes = offset, bank_bytes(1, features)
        # Read-only and shared: a private map would have to fit the memory that the system may promise.
        view = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(view, "madvise"):
            view.madvise(mmap.MADV_RANDOM)  # else each row brings 128 KiB of its neighbours along
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it cannot be written to: so it should be
            flat = torch.frombuffer(view, dtype=torch.float32, offset=offset, count=rows * features)
        self.features = flat.view(rows, features)

    def will_need(self, rows_B: Tensor) -> None:
        """Ask the system for all these rows at once: it then fetches them side by side, not one after the other."""
        if not hasattr(os, "posix_fadvise"):
            return
        descriptor = self.file.fileno()
        for row in rows_B.tolist():
            os.posix_fadvise(descriptor, self.offset + row * self.row_bytes, self.row_bytes, os.POSIX_FADV_WILLNEED)


class ShardWriter:
    """Writes rows of the growing file, and marks shards when all their rows are on the disk."""

    def __init__(self, bank: BankFile):
        self.bank = bank
        try:
            self.file = bank.growing.open("r+b", buffering=0)
        except OSError as error:
            raise write_error(error, bank.target) from error

    def write(self, first: int, features_BD: Tensor) -> None:
        """Put features [B, D] at the rows from ``first`` on."""
        content = memoryview(features_BD.contiguous().cpu().numpy()).cast("B")
        try:
            self.file.seek(len(self.bank.header) + bank_bytes(first, self.bank.features))
            while content:
                content = content[self.file.write(content) :]
        except OSError as error:
            raise write_error(error, self.bank.target) from error

    def mark(self, shard: int) -> None:
        """All rows of the shard have been written."""
        try:
            os.fsync(self.file.fileno())
            (self.bank.folder / str(shard)).touch()
        except OSError as error:
            raise write_error(error, self.bank.target) from error

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _header(rows: int, features: int) -> bytes:
    """The head of a safetensors file: length of the JSON (little-endian, 8 bytes), then the JSON, padded to 8 bytes."""
    tensor = {"dtype": "F32", "shape": [rows, features], "data_offsets": [0, bank_bytes(rows, features)]}
    text = json.dumps({_TENSOR: tensor}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
