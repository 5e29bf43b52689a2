"""Folders and files that appear whole or not at all: written aside, then moved into place."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import BalmsError, ConfigError, DataError

try:
    import fcntl
except ImportError:  # Windows has none: who meet there do their work twice
    fcntl = None

_ASIDE = ".new-"
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG, errno.EIO}


def write_error(error: OSError, target: Path) -> BalmsError:
    """The one line for a failed write: DataError (exit 3) where the disk is full or broken, as the place was right;
    ConfigError (exit 2) where it is read-only, forbidden or not a folder, as another place has to be named."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return DataError(f"cannot write {target}: {reason}; free some space or choose another place")
    return ConfigError(f"cannot write {target}: {reason}; choose a place that you may write to")


def _make_parents(folder: Path) -> list[Path]:
    """Create ``folder`` and its parents; returns those that are new, innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            made.insert(0, path)
    except OSError:
        _remove_empty(made)
        raise
    return made


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _swap(fresh: Path, target: Path, keep_existing: bool) -> None:
    """Move ``fresh`` to ``target``; what was there is moved aside first, and back should the move fail."""
    if not target.exists():
        try:
            return os.rename(fresh, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise  # else another process was quicker
    if keep_existing:
        return
    old = Path(tempfile.mkdtemp(prefix=".old-", dir=target.parent))
    try:
        os.rename(target, old / "content")
        os.rename(fresh, target)
    finally:  # Ctrl-C as well: what was there must not go with the folder that held it
        if not target.exists():
            os.rename(old / "content", target)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def folder_aside(target: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """A new empty folder beside ``target``, moved to ``target`` when the block ends well, removed when it does not.

    ``keep_existing``: where ``target`` has appeared meanwhile (another process made the same), that one stays.
    Raises: ConfigError or DataError (see :func:`write_error`) for every OSError on the way; nothing stays behind,
    not even parent folders that were made for it.
    """
    made: list[Path] = []
    fresh: Path | None = None
    try:
        made = _make_parents(target.parent)
        fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
        yield fresh
        fresh.chmod(0o777 & ~_umask())  # mkdtemp makes it private; the result is as open as any new folder
        _swap(fresh, target, keep_existing)
    except OSError as error:
        if error.errno is None:
            raise  # not the system's: a damaged archive that is being read
        raise write_error(error, target) from error
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        if not target.exists():
            _remove_empty(made)


def replace_file(target: Path, content: str | bytes) -> None:
    """Write aside, to the disk, then move into place: a reader sees the old file or the new one, never half of one.

    Text is written as UTF-8. Raises: see :func:`write_error`.
    """
    aside = target.with_name(f"{_ASIDE}{os.getpid()}-{target.name}")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except OSError as error:
        raise write_error(error, target) from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def remove_half_written(folder: Path) -> None:
    """Take away what a process that was killed while it wrote here left aside. Only for a folder nobody writes in now."""
    for left in folder.glob(f"{_ASIDE}*"):
        with suppress(OSError):
            left.unlink()


def lock(place: int | BinaryIO, waiting: Callable[[], None]) -> bool:
    """Lock an open file or folder (a descriptor); where another process holds it call ``waiting``, which may raise instead of
    waiting. The lock goes with the descriptor, however the process ends. False: there are no locks on this system."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting()
        fcntl.flock(place, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return False
    return True


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def name_some(items: list[str], limit: int = 5) -> str:
    """The first ``limit`` items and how many more there are: one line that stays readable with thousands."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


# What a spreadsheet takes for a formula; a plain number with a sign is none.
_FORMULA = re.compile(r"[=@＝＋－＠]|[+-](?![\d.]+$)")
# Control characters, line separators, and bytes of a file name that are not UTF-8 (Python's lone surrogates).
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def is_plain(name: str) -> bool:
    """Whether a name can be written to a text file and shown on one line: any Unicode but control characters."""
    return not _UNPRINTABLE.search(name)


def printable(name: str) -> str:
    """A name on one line of a terminal: what :func:`is_plain` minds is escaped."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), name)


def inert(cell: Any) -> Any:
    """A cell of a CSV file that no spreadsheet takes for a formula: an apostrophe stands before what could be one."""
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell
