"""Annotations in LVIS format (v0.5 and v1) or plain COCO format, checked before they are believed. Torch is not imported.

A JSON file is a stranger's: a bad structure is one DataError, an annotation that cannot be trained on is left out and counted.
LVIS v1 has 1.27 million annotations, so what is kept of them is packed: labels and boxes of an image are arrays, a polygon is
an ``array`` of doubles, made while the JSON is parsed. The numbers of a polygon are those of the file.

Shapes: C categories, N images, I instances of an image, A annotations, P polygons, K points.
"""

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np

from ..data.aside import name_some, printable
from ..errors import DataError
from ..reporter import Reporter
from .header import Category

MIN_SIDE = 0.1  # pixels; a thinner box may lose its area to rounding once it is resized
_MAX_SIDE = 100_000  # pixels of an image, in width or height
_LONGEST = 1e6  # pixels of an annotation's outline; the rasteriser takes some 100 bytes for each
_FARTHEST = 1e9  # pixels; a polygon that goes farther is no polygon
_CHUNK = 1 << 15  # annotations measured at a time
_RARE, _COMMON = 10, 100  # images that a rare, and a common, category is in at most (LVIS)
_DRIVE = re.compile("[A-Za-z]:")

CROWD = "crowd regions"
STRAY = "annotations of an image or category that the file does not have"
NO_SEGMENTATION = "annotations without a segmentation"
BAD_SEGMENTATION = "empty or degenerate segmentations"
BAD_RLE = "run-length masks that do not fit their image"
OUTSIDE = "segmentations outside their image"
BAD_BOX = "boxes without area in their image"
NO_INSTANCE = "images without a usable annotation"
NO_IMAGE = "categories without an image"

Segmentation = list[list[float]] | dict[str, Any] | None
_Packed = tuple[array, ...] | dict[str, Any] | None


class Instance(NamedTuple):
    """One object: its label in 1..C, its box (x1, y1, x2, y2) in pixels within the image, and its polygons or RLE."""

    label: int
    box: tuple[float, float, float, float]
    segmentation: Segmentation


@dataclass
class ImageInfo:
    """One image of a JSON file. ``file_name`` is relative, with ``/``; ``crowd`` counts its crowd regions, left out.

    ``labels`` [I] int64 and ``boxes`` [I, 4] float64 are its instances' as arrays; :attr:`instances` unpacks all there is.
    """

    id: int
    width: int
    height: int
    file_name: str
    neg_category_ids: tuple[int, ...] = ()
    not_exhaustive_category_ids: tuple[int, ...] = ()
    crowd: int = 0
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    boxes: np.ndarray = field(default_factory=lambda: np.empty((0, 4)))
    packed: list[_Packed] = field(default_factory=list)

    @property
    def instances(self) -> list[Instance]:
        """Its objects in the file's order, made anew at each look."""
        rows = zip(self.labels.tolist(), self.boxes.tolist(), self.packed, strict=True)
        return [Instance(label, tuple(box), unpack(packed)) for label, box, packed in rows]


@dataclass
class Annotations:
    """A JSON file's usable content. Label c + 1 is ``categories[c]``; categories are in the order of their ids.

    ``left_out``: how many of what (a plural) were left out; ``without_image``: names of the categories among them.
    ``all_categories`` and ``groups``: every category of the file, id -> name, and id -> its "frequency" there (None: none).
    """

    path: Path
    sha256: str
    categories: list[Category]
    images: list[ImageInfo]
    left_out: dict[str, int] = field(default_factory=dict)
    without_image: list[str] = field(default_factory=list)
    all_categories: dict[int, str] = field(default_factory=dict)
    groups: dict[int, str | None] = field(default_factory=dict)
    masks: bool = True

    @property
    def image_counts(self) -> np.ndarray:
        """Images that each category is in, int64 [C]."""
        return np.array([category.image_count for category in self.categories], np.int64)

    @property
    def num_images(self) -> int:
        """N: images with a usable annotation."""
        return sum(bool(len(image.labels)) for image in self.images)

    @property
    def frequencies(self) -> np.ndarray:
        """Share of the images that each category is in, float64 [C]: the prior f, kept within [1/2N, 1 - 1/2N]."""
        half = 0.5 / self.num_images
        return np.clip(self.image_counts / self.num_images, half, 1 - half)


class _Annotation(NamedTuple):
    """One entry of "annotations", as the parser leaves it. ``segmentation`` False: it is there, and no segmentation."""

    id: Any
    image_id: Any
    category_id: Any
    box: array | Literal[False] | None
    crowd: Any
    segmentation: _Packed | Literal[False]


def load_annotations(path: str | Path, *, masks: bool = True, every_image: bool = False) -> Annotations:
    """Read and check a JSON file in LVIS or COCO format.

    Kept for training are images with a usable annotation, and categories that such an image has. ``masks`` False: an
    annotation needs no segmentation, and none is kept. ``every_image``: images without a usable annotation stay too.
    Frequency groups are the file's, else by the images of a category: 1-10 rare, 11-100 common, more frequent.
    Raises: DataError (exit 3) for a file that cannot be read, is not such JSON, or has nothing usable in it.
    """
    path = Path(path)
    document, sha256 = _parse(path)
    images = _images(document["images"], path)
    categories = _categories(document["categories"], path)
    annotations = document.pop("annotations")
    del document
    left_out: Counter[str] = Counter()
    _sort_in(annotations, images, categories, path, masks, left_out)
    del annotations
    names = {id: entry["name"] for id, entry in categories.items()}
    groups = {id: group if (group := entry.get("frequency")) in ("r", "c", "f") else None for id, entry in categories.items()}
    found = Annotations(path, sha256, [], list(images.values()), dict(left_out), [], names, groups, masks)
    return _settle(found, list(names), every_image)


def keep_images(annotations: Annotations, indices: Iterable[int], reason: str) -> Annotations:
    """The same with these images alone, the others counted under ``reason``; categories are counted (and labelled) anew."""
    kept = [replace(annotations.images[i]) for i in indices]
    left_out = {**annotations.left_out, reason: annotations.left_out.get(reason, 0) + len(annotations.images) - len(kept)}
    ids = [category.id for category in annotations.categories]
    return _settle(replace(annotations, images=kept, left_out=left_out), ids, every_image=False)


def _settle(found: Annotations, ids: list[int], every_image: bool) -> Annotations:
    """Count, leave out what has no image or no instance, and number the labels. ``ids[label - 1]`` is what labels mean now."""
    image_counts, instance_counts = np.zeros((2, len(ids) + 1), np.int64)
    for image in found.images:
        image_counts[np.unique(image.labels)] += 1
        instance_counts += np.bincount(image.labels, minlength=len(ids) + 1)
    usable = [image for image in found.images if len(image.labels)]
    left_out = Counter(found.left_out)
    if not usable:
        lost = f" (left out: {left_out_text(left_out)})" if left_out else ""
        hint = "; boxes alone need no segmentation: --no-masks" if left_out.keys() & {NO_SEGMENTATION, BAD_SEGMENTATION} else ""
        raise DataError(f"{found.path}: no image has a usable annotation{lost}{hint}")
    order = sorted((id, label) for label, id in enumerate(ids, 1) if image_counts[label])
    without = [label for label in range(1, len(ids) + 1) if not image_counts[label]]
    new_label = np.zeros(len(ids) + 1, np.int64)
    new_label[[label for _, label in order]] = np.arange(1, len(order) + 1)
    for image in usable:
        image.labels = new_label[image.labels]
    categories = []
    for id, label in order:
        count = int(image_counts[label])
        group = found.groups[id] or ("r" if count <= _RARE else "c" if count <= _COMMON else "f")
        categories.append(Category(id=id, name=found.all_categories[id], image_count=count,
                                   instance_count=int(instance_counts[label]), frequency=group))  # fmt: skip
    left_out[NO_IMAGE] += len(without)
    if not every_image:
        left_out[NO_INSTANCE] += len(found.images) - len(usable)
    names = found.without_image + [found.all_categories[ids[label - 1]] for label in without]
    images = found.images if every_image else usable
    return replace(found, categories=categories, images=images, without_image=names,
                   left_out={reason: count for reason, count in left_out.items() if count})  # fmt: skip


def tell_left_out(annotations: Annotations, reporter: Reporter) -> None:
    """A line with what was left out, and how many, and one with how many categories had no frequency group in the file."""
    name = printable(annotations.path.name)
    if annotations.left_out:
        reporter.note(f"left out of {name}: {left_out_text(annotations.left_out)}")
    if counted := sum(annotations.groups[category.id] is None for category in annotations.categories):
        reporter.note(f"{counted} of {len(annotations.categories)} categories have no frequency in {name}, so it is counted: 1 "
                      f"to {_RARE} images rare, to {_COMMON} common, above that frequent")  # fmt: skip


def left_out_text(left_out: dict[str, int]) -> str:
    """What was left out in words: reason by reason, with how many."""
    return ", ".join(f"{reason} ({count})" for reason, count in left_out.items())


def find_annotations(data: str | Path, split: Literal["train", "val"]) -> Path:
    """The JSON file that ``data`` is, or the one of a split in that folder (or in ``annotations/`` there).

    A file is of a split where a word of its name begins with it (``lvis_v1_train.json``); of several, the one whose name the
    others go on from (``lvis_val``, ``lvis_val_full``). Raises: DataError where there is none, or no such one.
    """
    data = Path(data)
    if not data.is_dir():
        return data
    found: list[Path] = []
    for folder in (data, data / "annotations"):
        found = sorted(file for file in folder.glob("*.json") if _is_of(file.stem.lower(), split))
        if found:
            break
    if not found:
        raise DataError(f"{data} holds no annotations of '{split}': no JSON file there, or in annotations/, has it in its "
                        "name; give the file itself")  # fmt: skip
    plain = min(found, key=lambda file: len(file.stem))
    if not all(file.stem.startswith(plain.stem) for file in found):
        names = name_some([printable(file.name) for file in found])
        raise DataError(f"{data} holds several JSON files of '{split}' ({names}): give the one that is meant")
    return plain


def _is_of(stem: str, split: str) -> bool:
    # COCO keeps captions and the like beside its instances, by the same split names.
    other = ("captions", "person_keypoints", "stuff", "panoptic", "image_info")
    return re.search(rf"(?<![a-z]){split}", stem) is not None and not stem.startswith(other)


def find_images(annotations_path: str | Path, images: str | Path | None) -> Path:
    """The images' folder: ``images`` where given, else ``images/`` beside the JSON file, else the file's own folder.

    For a file in a folder ``annotations``, as COCO has it, the folder above counts as the file's own. Raises: DataError.
    """
    if images is not None:
        if not Path(images).is_dir():
            raise DataError(f"the images' folder {images} does not exist: name another by --images")
        return Path(images)
    folder = Path(annotations_path).parent
    homes = [folder, folder.parent] if folder.name == "annotations" else [folder]
    return next((home / "images" for home in homes if (home / "images").is_dir()), homes[-1])


# The file


def _parse(path: Path) -> tuple[dict[str, Any], str]:
    """The JSON object with its three lists, annotations packed, and the file's sha256."""
    try:
        raw = path.read_bytes()
        sha256 = hashlib.sha256(raw).hexdigest()
        text = raw.decode("utf-8-sig")
        del raw
        document = json.loads(text, object_hook=_hook)
    except FileNotFoundError:
        raise DataError(f"no annotations: {path} does not exist") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder: give the JSON file with the annotations") from None
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
        raise DataError(f"{path} is not valid JSON of annotations: {what}") from None
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
    return _Annotation(entry.get("id"), entry["image_id"], entry["category_id"], _pack_box(entry.get("bbox")),
                       entry.get("iscrowd"), _pack(entry.get("segmentation")))  # fmt: skip


def _pack_box(box: Any) -> array | Literal[False] | None:
    if box is None:
        return None
    try:
        packed = array("d", box)
    except (TypeError, ValueError, OverflowError):
        return False
    return packed if len(packed) == 4 else False


def _pack(segmentation: Any) -> _Packed | Literal[False]:
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


def unpack(packed: _Packed) -> Segmentation:
    """Polygons as lists of numbers; an RLE, or none, as it is."""
    return [polygon.tolist() for polygon in packed] if isinstance(packed, tuple) else packed


# Images and categories


def _images(entries: list[Any], path: Path) -> dict[int, ImageInfo]:
    images: dict[int, ImageInfo] = {}
    for entry in entries:
        id = _id(entry, "image", path)
        if id in images:
            raise DataError(f"{path}: image id {id} is there twice")
        width, height = entry.get("width"), entry.get("height")
        if not all(type(side) in (int, float) and 1 <= side <= _MAX_SIDE and side == int(side) for side in (width, height)):
            raise DataError(f"{path}: image {id} has no usable width and height (pixels, from 1 to {_MAX_SIDE})")
        images[id] = ImageInfo(id, int(width), int(height), _file_name(entry, id, path), _ids(entry.get("neg_category_ids")),
                               _ids(entry.get("not_exhaustive_category_ids")))  # fmt: skip
    return images


def _id(entry: Any, kind: str, path: Path) -> int:
    id = entry.get("id") if isinstance(entry, dict) else None
    if type(id) is not int:
        raise DataError(f"{path}: one of the {_PLURAL[kind]} has no 'id' that is an integer")
    return id


_PLURAL = {"image": "images", "category": "categories"}


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(id for id in value if type(id) is int) if isinstance(value, list) else ()


def _file_name(entry: dict[str, Any], id: int, path: Path) -> str:
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


def _categories(entries: list[Any], path: Path) -> dict[int, dict[str, Any]]:
    """The entries by id, in rising order."""
    categories: dict[int, dict[str, Any]] = {}
    names = set()
    for entry in entries:
        id = _id(entry, "category", path)
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


# Annotations


def _sort_in(annotations: list[Any], images: dict[int, ImageInfo], categories: dict[int, Any], path: Path, masks: bool,
             left_out: Counter[str]) -> None:  # fmt: skip
    """Give each usable annotation to its image; labels are places among all categories, plus 1."""
    label_of = {id: label for label, id in enumerate(categories, 1)}
    rows: dict[int, tuple[array, array, list[_Packed]]] = {}
    ids: set[int] = set()
    for first in range(0, len(annotations), _CHUNK):
        chunk = annotations[first : first + _CHUNK]
        for entry in chunk:
            if not isinstance(entry, _Annotation):
                raise DataError(f"{path}: one of the annotations is not an object with an image_id and a category_id")
            if type(entry.id) is int:
                if entry.id in ids:
                    raise DataError(f"{path}: annotation id {entry.id} is there twice")
                ids.add(entry.id)
        for entry, extent in zip(chunk, _extents([entry.segmentation for entry in chunk]), strict=True):
            image = images.get(entry.image_id) if type(entry.image_id) is int else None
            label = label_of.get(entry.category_id) if type(entry.category_id) is int else None
            if image is None or label is None:
                left_out[STRAY] += 1
            elif entry.crowd:
                left_out[CROWD] += 1
                image.crowd += 1
            elif isinstance(found := _usable(entry, extent, image, masks), str):
                left_out[found] += 1
            else:
                labels, boxes, packed = rows.setdefault(image.id, (array("q"), array("d"), []))
                labels.append(label)
                boxes.extend(found[0])
                packed.append(found[1])
    for id, (labels, boxes, packed) in rows.items():
        images[id].labels = np.frombuffer(labels, np.int64)
        images[id].boxes = np.frombuffer(boxes).reshape(-1, 4)
        images[id].packed = packed


# Lowest x and y, highest x and y, twice the area of all polygons, and the steps of their outlines (larger of dx and dy, summed)
_Extent = tuple[float, float, float, float, float, float]


def _usable(entry: _Annotation, extent: _Extent | None, image: ImageInfo, masks: bool) -> tuple[Any, _Packed] | str:
    """Box (x1, y1, x2, y2) within the image and packed segmentation; or why the annotation is left out."""
    packed, box = entry.segmentation, entry.box
    width, height = image.width, image.height
    wrong = None
    if isinstance(packed, dict):
        packed = compressed(packed, height, width)
        wrong = BAD_RLE if packed is None else None if _rle_area(packed) else BAD_SEGMENTATION
    elif packed is None:
        wrong = NO_SEGMENTATION
    elif extent is None or not extent[4] > 0 or not max(map(abs, extent[:4])) <= _FARTHEST:
        wrong = BAD_SEGMENTATION
    elif extent[0] >= width or extent[1] >= height or extent[2] <= 0 or extent[3] <= 0:
        wrong = OUTSIDE
    elif extent[5] > _LONGEST:
        packed = tuple(part for polygon in packed if len(part := clip_polygon(polygon, width, height)) >= 6)
        wrong = OUTSIDE if not packed else BAD_SEGMENTATION if _extents([packed])[0][5] > _LONGEST else None
    if masks and wrong:
        return wrong
    if box is None and not wrong:
        box = _rle_box(packed) if isinstance(packed, dict) else (*extent[:2], extent[2] - extent[0], extent[3] - extent[1])
    if not box:
        return BAD_BOX
    x, y, w, h = box
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if not (x2 - x1 >= MIN_SIDE and y2 - y1 >= MIN_SIDE):  # so put, NaN is left out as well
        return BAD_BOX
    return (x1, y1, x2, y2), packed if masks else None


def _extents(segmentations: list[Any]) -> list[_Extent | None]:
    """Of each annotation's polygons, all at once. None: it has none. Numbers that are not finite stay so."""
    extents: list[_Extent | None] = [None] * len(segmentations)
    owners = [a for a, packed in enumerate(segmentations) if isinstance(packed, tuple) and packed]
    if not owners:
        return extents
    polygons = [polygon for a in owners for polygon in segmentations[a]]
    points_K2 = np.frombuffer(b"".join(polygons)).reshape(-1, 2)
    sizes_P = np.array([len(polygon) // 2 for polygon in polygons])
    starts_P = sizes_P.cumsum() - sizes_P
    parts = np.array([len(segmentations[a]) for a in owners])
    firsts = parts.cumsum() - parts
    with np.errstate(all="ignore"):
        # From each polygon's first point on, or the area of a small one far out is lost to rounding.
        moved_K2 = points_K2 - np.repeat(points_K2[starts_P], sizes_P, axis=0)
        next_K2 = np.roll(moved_K2, -1, axis=0)
        next_K2[starts_P + sizes_P - 1] = 0  # back at the first
        areas_P = np.abs(np.add.reduceat(moved_K2[:, 0] * next_K2[:, 1] - next_K2[:, 0] * moved_K2[:, 1], starts_P))
        steps_K = np.abs(next_K2 - moved_K2).max(1)
        low, high = np.minimum.reduceat(points_K2, starts_P[firsts]), np.maximum.reduceat(points_K2, starts_P[firsts])
        area, steps = np.add.reduceat(areas_P, firsts), np.add.reduceat(steps_K, starts_P[firsts])
    for a, extent in zip(owners, np.column_stack([low, high, area, steps]).tolist(), strict=True):
        extents[a] = tuple(extent)
    return extents


def clip_polygon(polygon: array, width: int, height: int) -> array:
    """What of a polygon lies within one image's size around the image (Sutherland and Hodgman 1974).

    The rasteriser cuts at the image's edge by itself, but takes memory by the length of an outline.
    """
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    for axis, limit, sign in ((0, -width, 1), (0, 2 * width, -1), (1, -height, 1), (1, 2 * height, -1)):
        kept = []
        for before, point in zip(points[-1:] + points[:-1], points, strict=True):
            was_in, is_in = sign * (before[axis] - limit) >= 0, sign * (point[axis] - limit) >= 0
            if was_in != is_in:
                share = (limit - before[axis]) / (point[axis] - before[axis])
                crossing = [a + share * (b - a) for a, b in zip(before, point, strict=True)]
                crossing[axis] = limit
                kept.append(tuple(crossing))
            if is_in:
                kept.append(point)
        points = kept
    return array("d", [value for point in points for value in point])


# Run-length masks


def compressed(rle: Any, height: int, width: int) -> dict[str, Any] | None:
    """An RLE of an image's size in its compressed form, ``counts`` a str; None where it is not a whole RLE of that size.

    pycocotools itself must not be given what is not: it then reads and writes memory that is not its own.
    """
    from pycocotools import mask as coco_mask

    if not isinstance(rle, dict) or rle.get("size") != [height, width]:
        return None
    counts = rle.get("counts")
    runs = counts if isinstance(counts, list) else _runs(counts) if isinstance(counts, str) else None
    if runs is None or (isinstance(counts, list) and not all(type(run) is int and run >= 0 for run in runs)):
        return None
    if int(sum(runs)) != height * width or min(runs) < 0:
        return None
    if isinstance(counts, list):
        counts = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"].decode()
    return {"size": [height, width], "counts": counts}


def _runs(counts: str) -> list[int] | None:
    """Lengths of the runs of a compressed RLE: numbers of 5 bits a character, from the fourth on as differences."""
    if not counts.isascii():
        return None
    characters = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    if not len(characters) or characters.min() < 0 or characters.max() > 63 or characters[-1] & 32:
        return None
    ends = np.flatnonzero((characters & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > 8:
        return None
    place = np.arange(len(characters)) - np.repeat(starts, sizes)
    numbers = np.add.reduceat((characters & 31) << (5 * place), starts)
    numbers -= np.where(characters[ends] & 16, 1 << (5 * sizes), 0)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers.tolist()


def _rle_area(rle: dict[str, Any]) -> int:
    from pycocotools import mask as coco_mask

    return int(coco_mask.area(rle))


def _rle_box(rle: dict[str, Any]) -> tuple[float, ...]:
    from pycocotools import mask as coco_mask

    return tuple(coco_mask.toBbox(rle).tolist())
