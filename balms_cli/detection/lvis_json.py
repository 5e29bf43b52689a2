"""A JSON file in LVIS (v0.5, v1) or COCO format: parsed, its structure checked, its annotations packed while they are read.

A file is a stranger's: a bad structure is one DataError. LVIS v1 has 1.27 million annotations, whose numbers never all exist as
Python objects.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from ..data.aside import printable
from ..data.images import available_memory
from ..errors import DataError
from .outlines import Packed

MAX_SIDE = 100_000  # pixels of an image, in width or height
_PER_BYTE = 4.0  # bytes of memory for one of the file, at the least: its bytes and its text, then what is packed and the rest
_DRIVE = re.compile("[A-Za-z]:")
_PLURAL = {"image": "images", "category": "categories"}


class Entry(NamedTuple):
    """One entry of "annotations", as the parser leaves it. ``segmentation`` False: it is there, and no segmentation."""

    id: Any
    image_id: Any
    category_id: Any
    box: array | Literal[False] | None
    crowd: Any
    segmentation: Packed | Literal[False]


def read_json(path: Path, hook: Callable[[dict[str, Any]], Any] | None = None, per_byte: float = 0.0) -> tuple[Any, str]:
    """A stranger's JSON file, ``hook`` called with each object, and its sha256. ``per_byte``: bytes of memory that one of the
    file takes, where this is to be looked at first. Raises: DataError (exit 3), one line."""
    try:
        needed, free = path.stat().st_size * per_byte, available_memory()
        if free is not None and needed > free:
            raise DataError(f"{path} takes about {needed / 2**30:.1f} GiB of memory, where {free / 2**30:.1f} GiB are free: "
                            "more memory or a smaller file is needed (of results: fewer detections an image, with higher "
                            "scores)")  # fmt: skip
        raw = path.read_bytes()
        sha256 = hashlib.sha256(raw).hexdigest()
        text = raw.decode("utf-8-sig")
        del raw
        return json.loads(text, object_hook=hook), sha256
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder: give the JSON file itself") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except MemoryError:
        raise DataError(f"{path} does not fit into memory") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a text file in UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else "it holds a number of thousands of digits"
        raise DataError(f"{path} is not valid JSON: {what}") from None


def parse(path: Path) -> tuple[dict[str, Any], str]:
    """The JSON object with its three lists, annotations packed, and the file's sha256."""
    document, sha256 = read_json(path, _hook, _PER_BYTE)
    if not isinstance(document, dict):
        raise DataError(f"{path} is not an object with images, annotations and categories, as LVIS and COCO have it")
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            raise DataError(f"{path} has no list of {key}: it is not in LVIS or COCO format")
        if not document[key]:
            raise DataError(f"{path} has no {key}: there is nothing to train on")
    return document, sha256


def _hook(entry: dict[str, Any]) -> Any:
    """Packs an annotation as soon as the parser has it, so that its numbers never all exist as Python objects."""
    if "image_id" not in entry or "category_id" not in entry:
        return entry
    return Entry(entry.get("id"), entry["image_id"], entry["category_id"], _pack_box(entry.get("bbox")),
                       entry.get("iscrowd"), _pack(entry.get("segmentation")))  # fmt: skip


def _pack_box(box: Any) -> array | Literal[False] | None:
    if box is None:
        return None
    try:
        packed = array("d", box)
    except (TypeError, ValueError, OverflowError):
        return False
    return packed if len(packed) == 4 else False


def _pack(segmentation: Any) -> Packed | Literal[False]:
    """Polygons of three points or more, as arrays (x, y, x, y ...)."""
    if segmentation is None or isinstance(segmentation, dict):
        return segmentation
    if not isinstance(segmentation, list):
        return False
    if segmentation and not isinstance(segmentation[0], list):
        segmentation = [segmentation]  # one polygon without a list around it, as some tools write it
    try:
        polygons = [array("d", polygon) for polygon in segmentation]
    except (TypeError, ValueError, OverflowError):
        return False
    return tuple(polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0)


def checked_id(entry: Any, kind: str, path: Path) -> int:
    id = entry.get("id") if isinstance(entry, dict) else None
    if type(id) is not int:
        raise DataError(f"{path}: one of the {_PLURAL[kind]} has no 'id' that is an integer")
    return id


def integers(value: Any) -> tuple[int, ...]:
    return tuple(id for id in value if type(id) is int) if isinstance(value, list) else ()


def file_name(entry: dict[str, Any], id: int, path: Path) -> str:
    """Relative, with ``/``. LVIS v1 has no ``file_name``: the last two parts of ``coco_url`` are folder and file."""
    name = entry.get("file_name")
    if name is None and isinstance(entry.get("coco_url"), str):
        name = "/".join(entry["coco_url"].split("/")[-2:])
    if not isinstance(name, str) or not name:
        raise DataError(f"{path}: image {id} has neither a file_name nor a coco_url")
    relative = PurePosixPath(name.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts or _DRIVE.match(name) or "\0" in name or not relative.parts:
        raise DataError(f"{path}: image {id} has the file name '{printable(name)}', which leads out of the images' folder")
    return str(relative)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        return False
    return True


def read_categories(entries: list[Any], path: Path) -> dict[int, dict[str, Any]]:
    """The entries by id, in rising order."""
    categories: dict[int, dict[str, Any]] = {}
    names = set()
    for entry in entries:
        id = checked_id(entry, "category", path)
        name = entry.get("name")
        if id in categories:
            raise DataError(f"{path}: category id {id} is there twice")
        if not isinstance(name, str) or not name or not _is_text(name):
            raise DataError(f"{path}: category {id} has no name")
        if name in names:  # evaluation matches categories by name
            raise DataError(f"{path}: two categories are called '{printable(name)}': rename one")
        names.add(name)
        categories[id] = entry
    return dict(sorted(categories.items()))
