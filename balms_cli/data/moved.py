"""Where a manifest's images lie on this machine: at the root that it names or, where that is gone, under ``BALMS_DATA``."""

import os
import re

from ..reporter import Reporter
from . import known, tar_entry
from .aside import printable

_MARKS = 3  # images of a manifest that a place must hold to be taken for the images' own
_told: set[tuple[str, str]] = set()


def here(kind: str, name: str, root: str, keys: list[str]) -> str:
    """The root of a source's images: ``root`` where it is there; else, as a real path, the first of ``BALMS_DATA/NAME`` (NAME:
    what the folder ``root`` is called) and ``BALMS_DATA`` that holds the first of ``keys``; else ``root``."""
    base = os.environ.get("BALMS_DATA")
    if not base or kind == "digits" or os.path.isdir(root):
        return root
    marks = keys[:_MARKS]
    if kind == "cifar":  # the official batches, in which the keys are
        marks = [file for file, _ in known.ARCHIVES[name].train] if name in known.ARCHIVES else []
    base = os.path.expanduser(base)
    called = re.split(r"[/\\]", root.rstrip("/\\"))[-1]  # a stranger may call it '..'
    places = [os.path.join(base, called), base] if called not in ("", ".", "..") else [base]
    found = (place for place in places if marks and all(_holds(place, mark) for mark in marks))
    return next(map(os.path.realpath, found), root)


def _holds(place: str, key: str) -> bool:
    path = os.path.join(place, key)
    entry = tar_entry.find(path)
    return os.path.isfile(path if entry is None else entry.shard)


def tell(written: str, root: str, reporter: Reporter) -> None:
    """Say once where images are read from that are not where their manifest says."""
    if written and (written, root) not in _told:
        _told.add((written, root))
        reporter.note(f"the images' folder {printable(written)} is gone; they are read from {printable(root)} (BALMS_DATA)")


def gone(root: str) -> str:
    """What to say where the images are at no place that is looked at."""
    base = os.environ.get("BALMS_DATA")
    where = printable(root) + (f" is gone, and BALMS_DATA ({printable(base)}) does not hold its images" if base else " is gone")
    return f"the images' folder {where}; put them there, or name the folder that holds them by BALMS_DATA"
