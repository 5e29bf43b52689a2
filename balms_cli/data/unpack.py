"""Archives into the cache, once: unpacked aside and moved into place, never trusting a name or a size in them."""

import errno
import hashlib
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from ..errors import BalmsError, DataError, one_line
from ..reporter import Reporter
from .aside import folder_aside, printable

MAX_FILES = 1_000_000
MAX_BYTES = 4 << 30  # all files of a zip together, unpacked; the largest known set takes 0.2 GB
MAX_RATIO = 200  # unpacked bytes / packed bytes; images hardly shrink at all
# What the system says of a place or a name in an archive, not of the disk: 'a' beside 'a/b', a name too long, a place before 0.
_ITS_OWN = (errno.EINVAL, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
MAX_MEMBER = 512 << 20  # one official batch takes at most 155 MB


def unpack_zip(file: Path, name: str, cache: Path, reporter: Reporter) -> Path:
    """Unpack ``file``, a zip of the folder ``name/train/CLASS/*``, into the cache; returns that folder.

    The place is named after the zip's table of contents (names, sizes, CRCs), so the same zip is unpacked once,
    wherever it lies. Raises: DataError for a zip that is damaged, leads out of its folder, holds links, or is a bomb.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            _check_members(members, file, name)
            contents = "\n".join(f"{m.filename} {m.file_size} {m.CRC}" for m in members)
            target = cache / "unpacked" / f"{name}-{hashlib.sha256(contents.encode()).hexdigest()[:12]}"
            if not target.is_dir():
                reporter.note(f"unpacking {file} into {target}, once")
                with folder_aside(target, keep_existing=True) as fresh:
                    _extract(archive, members, fresh, reporter)
    except BalmsError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from None
    except Exception as error:  # zipfile raises many kinds on hostile bytes; each is a bad archive, not a bug
        raise DataError(f"{file} is damaged or not a zip: {one_line(error)}") from None
    return target / name


def _check_members(members: list[zipfile.ZipInfo], file: Path, name: str) -> None:
    """Everything that can be refused before a byte is written."""
    total = sum(member.file_size for member in members)
    packed = sum(member.compress_size for member in members)
    if len(members) > MAX_FILES or total > MAX_BYTES or total > MAX_RATIO * max(packed, 1 << 16):
        raise DataError(f"{file} would unpack to {len(members)} files of {total / 1e9:.1f} GB: refused")
    if len({member.filename for member in members}) < len(members):
        raise DataError(f"{file} holds a file twice: refused")
    for member in members:
        path = PurePosixPath(member.filename)
        shown = printable(member.filename)
        leads_out = not path.parts or path.is_absolute() or ".." in path.parts
        if leads_out or "\\" in member.filename or ":" in path.parts[0]:
            raise DataError(f"{file} holds a path that leads out of its folder: '{shown}'")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise DataError(f"{file} holds a symbolic link: '{shown}'")
    if not any(member.filename.startswith(f"{name}/train/") for member in members):
        raise DataError(f"{file} holds no folder {name}/train/")


def _extract(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], folder: Path, reporter: Reporter) -> None:
    """Write every member; ``zipfile`` checks each CRC and never gives more bytes than the size declared."""
    made: set[Path] = set()
    with reporter.task("unpacking", len(members), unit="file") as task:
        for done, member in enumerate(members, 1):
            path = folder.joinpath(*PurePosixPath(member.filename).parts)
            try:
                if path.parent not in made:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    made.add(path.parent)
                with archive.open(member) as source, open(path, "xb") as sink:
                    shutil.copyfileobj(source, sink)
            except OSError as error:
                if error.errno in _ITS_OWN:
                    shown = printable(member.filename)
                    raise DataError(f"{archive.filename} is damaged at '{shown}': {error.strerror}") from None
                raise
            if done % 256 == 0 or done == len(members):
                task.advance(256 if done % 256 == 0 else done % 256)


def unpack_tar(file: Path, folder: str, names: list[str], cache: Path, reporter: Reporter) -> Path:
    """Take the files ``folder/NAME`` out of a tar archive, and nothing else, into ``cache/folder``; returns that.

    Names on disk come from ``names``, never from the archive. Raises: DataError for a damaged or incomplete archive.
    """
    target = cache / folder
    if all((target / name).is_file() for name in names):
        return target
    reporter.note(f"unpacking {file} into {target}, once")
    try:
        with tarfile.open(file) as archive, folder_aside(target) as fresh:
            missing = {f"{folder}/{name}": name for name in names}
            for member in archive:
                name = missing.pop(member.name, None)
                if name is None:
                    continue
                source = archive.extractfile(member) if member.isfile() and member.size <= MAX_MEMBER else None
                if source is None:
                    raise DataError(f"{file}: '{printable(member.name)}' is not a plain file of the size expected")
                with source, open(fresh / name, "xb") as sink:
                    shutil.copyfileobj(source, sink)
                if not missing:
                    break
            if missing:
                raise DataError(f"{file} lacks {', '.join(sorted(missing))}")
    except BalmsError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from None
    except Exception as error:  # as above, of tarfile
        raise DataError(f"{file} is damaged or not a tar archive: {one_line(error)}") from None
    return target
