"""Images inside tar files, read in place: nothing is unpacked, and a member's name decides nothing about files.

The key of such an image is ``SHARD.tar/@OFFSET+SIZE/NAME``: where its bytes begin in the shard, how many they are, and the
member's name, which is there to be read by people and orders the draw.
"""

import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from .aside import printable

BLOCK = 512  # bytes; headers and contents begin at multiples of it
MAX_ENTRY = 1 << 28  # bytes of one image
_MAX_NAME = 1 << 16  # bytes of a long name or a set of extended attributes
SMALL = 4096  # bytes of a file whose content is given with its header
_AHEAD = 8192  # bytes read at once: a header, a small label, the next header
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # not to wait for the writer of a pipe
# How archives begin that cannot be read in place: zip, gzip, bzip2, xz, zstd, 7z, rar.
PACKED = (b"PK\3\4", b"PK\5\6", b"\x1f\x8b", b"BZh91AY&SY", b"\xfd7zXZ", b"(\xb5/\xfd", b"7z\xbc\xaf", b"Rar!\x1a")
_KEY = re.compile(r"(.+?\.tar)/@([0-9]{1,15})\+([0-9]{1,10})/.", re.DOTALL)


class Member(NamedTuple):
    """One file of a tar: ``offset`` and ``size`` of its content in bytes."""

    name: str
    offset: int
    size: int


class Place(NamedTuple):
    """Where an image's bytes are."""

    shard: str
    offset: int
    size: int


def make_key(shard: str, member: Member) -> str:
    return f"{shard}/@{member.offset}+{member.size}/{member.name}"


def name_of(key: str) -> str:
    """The member's name in a key; keys of other sources are given back as they are."""
    found = _KEY.match(key) if "/@" in key else None
    return key[found.end() - 1 :] if found else key


def find(path: str | os.PathLike) -> Place | None:
    """The place that a path means, if it leads into a tar file; None for the path of a file of its own."""
    text = os.fspath(path)
    found = _KEY.match(text) if "/@" in text else None
    return Place(found[1], int(found[2]), int(found[3])) if found and not os.path.isdir(found[1]) else None


def open_entry(path: str | os.PathLike) -> io.BytesIO | None:
    """The bytes of an image in a tar file, as a file; None for the path of a file of its own.

    The member's header is looked at first, so that a shard that was written anew is noticed. Raises: OSError, or
    ValueError with a reason in a word or two.
    """
    place = find(path)
    if place is None:
        return None
    descriptor = os.open(place.shard, _READ)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if place.size > MAX_ENTRY:
            raise ValueError("over 256 MiB: not read")
        content = _read(descriptor, place.offset - BLOCK, BLOCK + place.size) if place.offset >= BLOCK else b""
        if len(content) < BLOCK + place.size or _size(content[:BLOCK]) != place.size:
            raise ValueError("the tar file has changed")
        if not place.size:
            raise ValueError("empty")
        return io.BytesIO(content[BLOCK:])
    finally:
        os.close(descriptor)


def _read(descriptor: int, offset: int, size: int) -> bytes:
    """``os.pread`` where it is there. One call gives all that the file has, up to 2 GiB."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, size)


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or base 256. Raises: ValueError."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _size(block: bytes, *, trusted: bool = False) -> int | None:
    """The size that a header tells, None where the block is no header (its checksum differs, unless ``trusted``)."""
    try:
        if not trusted and sum(block) - sum(block[148:156]) + 8 * 0x20 != _number(block[148:156]):
            return None
        size = _number(block[124:136])
        return size if size >= 0 else None  # a size below 0 would lead back, and round and round
    except ValueError:
        return None


def members(file: Path) -> Iterator[tuple[Member, bytes]]:
    """The regular files of a tar in their order, each with its content where that is SMALL, else with some of it.

    Headers alone are read, not what lies between. Raises: DataError (exit 3) for a file that is no tar, is compressed, or
    ends early.
    """
    try:
        descriptor = os.open(file, _READ)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{file} is not a regular file")
            yield from _members(file, descriptor, status.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from None


def _members(file: Path, descriptor: int, end: int) -> Iterator[tuple[Member, bytes]]:
    at, buffer, begin = 0, b"", 0
    long_name: str | None = None
    attributes: dict[str, str] = {}
    while at + BLOCK <= end:
        if not begin <= at <= at + BLOCK <= begin + len(buffer):
            buffer, begin = _read(descriptor, at, _AHEAD), at
        block = buffer[at - begin : at - begin + BLOCK]
        if not block.strip(b"\0"):
            return  # the end: two blocks of zeros
        size = _size(block, trusted=block[257:262] == b"ustar")  # adding up every header would take as long as all the rest
        if size is None:
            if at == 0:
                raise DataError(f"{file} is compressed; images are read in place, so unpack the shard to a plain .tar"
                                if block.startswith(PACKED) else f"{file} is not a tar file")  # fmt: skip
            raise DataError(f"{file} is damaged: no header at byte {at}")
        kind, start = block[156:157], at + BLOCK
        if kind in (b"L", b"x", b"g", b"K"):
            if size > _MAX_NAME:
                raise DataError(f"{file} is damaged or hostile: a name of {size} bytes at byte {at}")
            content = _read(descriptor, start, size)
            if kind == b"L":
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                attributes = _attributes(content)
        else:
            if (told := attributes.get("size", "")).isascii() and told.isdigit():
                size = int(told[:15])
            name = attributes.get("path") or long_name or _name(block)
            sparse = any(key.startswith("GNU.sparse") for key in attributes)
            long_name, attributes = None, {}
            if start + size > end:
                raise DataError(f"{file} ends in the middle of '{printable(name[:80])}': bring the whole file")
            if kind in (b"0", b"\0", b"7") and not sparse and not name.endswith("/"):
                if size <= SMALL and start + size > begin + len(buffer):
                    buffer, begin = _read(descriptor, at, _AHEAD), at
                yield Member(name, start, size), buffer[start - begin : start - begin + size]
        at = start + -(-size // BLOCK) * BLOCK


def _name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _attributes(content: bytes) -> dict[str, str]:
    """Extended attributes of POSIX tars: records of ``LENGTH key=value``."""
    found, at = {}, 0
    while (space := content.find(b" ", at, at + 10)) > at:
        digits = content[at:space]
        if not digits.isdigit() or not 0 < int(digits) <= len(content) - at:
            break
        key, _, value = content[space + 1 : at + int(digits) - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += int(digits)
    return found
