"""Annotations in LVIS format (v0.5 and v1) or plain COCO format, checked before they are believed. Torch is not imported.

A JSON file is a stranger's: a bad structure is one DataError, an annotation that cannot be trained on is left out and counted.
LVIS v1 has 1.27 million annotations, so what is kept of them is packed: labels and boxes of an image are arrays, a polygon is
an ``array`` of doubles, made while the JSON is parsed. The numbers of a polygon are those of the file.

Shapes: C categories, N images, I instances of an image, A annotations, P polygons, K points.
"""

import re
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..data.aside import name_some, printable
from ..errors import DataError
from ..reporter import Reporter
from .header import COMMON, RARE, Category, frequency_group
from .lvis_json import MAX_SIDE, Entry, checked_id, file_name, integers, parse, read_categories
from .outlines import Extent, Packed, Segmentation, clip_polygon, compressed, extents_of, rle_area, rle_box, unpack

MIN_SIDE = 0.1  # pixels; a thinner box may lose its area to rounding once it is resized
_LONGEST = 1e6  # pixels of an annotation's outline; the rasteriser takes some 100 bytes for each
_FARTHEST = 1e9  # pixels; a polygon that goes farther is no polygon
_CHUNK = 1 << 15  # annotations measured at a time

CROWD = "crowd regions"
STRAY = "annotations of an image or category that the file does not have"
NO_SEGMENTATION = "annotations without a segmentation"
BAD_SEGMENTATION = "empty or degenerate segmentations"
BAD_RLE = "run-length masks that do not fit their image"
OUTSIDE = "segmentations outside their image"
BAD_BOX = "boxes without area in their image"
NO_INSTANCE = "images without a usable annotation"
NO_IMAGE = "categories without an image"


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
    packed: list[Packed] = field(default_factory=list)

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


def load_annotations(path: str | Path, *, masks: bool = True, every_image: bool = False) -> Annotations:
    """Read and check a JSON file in LVIS or COCO format.

    Kept for training are images with a usable annotation, and categories that such an image has. ``masks`` False: an
    annotation needs no segmentation, and none is kept. ``every_image``: images without a usable annotation stay too.
    Frequency groups are the file's, else by the images of a category: 1-10 rare, 11-100 common, more frequent.
    Raises: DataError (exit 3) for a file that cannot be read, is not such JSON, or has nothing usable in it.
    """
    path = Path(path)
    document, sha256 = parse(path)
    images = _images(document["images"], path)
    categories = read_categories(document["categories"], path)
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
        group = found.groups[id] or frequency_group(count)
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
                      f"to {RARE} images rare, to {COMMON} common, above that frequent")  # fmt: skip


def left_out_text(left_out: dict[str, int]) -> str:
    """What was left out in words: reason by reason, with how many."""
    return ", ".join(f"{reason} ({count})" for reason, count in left_out.items())


def find_annotations(data: str | Path, split: Literal["train", "val"]) -> Path:
    """The JSON file that ``data`` is, or the one of a split in that folder (or in ``annotations/`` there).

    A file is of a split where a word of its name begins with it (``lvis_v1_train.json``); of several, the one whose name the
    others go on from (``lvis_val``, ``lvis_val_full``). Raises: DataError where there is none, or no such one.
    """
    data = Path(data)
    if not data.exists():
        raise DataError(f"{data} does not exist: give a JSON file with annotations, or a folder that holds one")
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
            raise DataError(f"the images' folder {printable(str(images))} does not exist: name another by --images")
        return Path(images)
    folder = Path(annotations_path).parent
    homes = [folder, folder.parent] if folder.name == "annotations" else [folder]
    return next((home / "images" for home in homes if (home / "images").is_dir()), homes[-1])


def _images(entries: list[Any], path: Path) -> dict[int, ImageInfo]:
    images: dict[int, ImageInfo] = {}
    for entry in entries:
        id = checked_id(entry, "image", path)
        if id in images:
            raise DataError(f"{path}: image id {id} is there twice")
        width, height = entry.get("width"), entry.get("height")
        if not all(type(side) in (int, float) and 1 <= side <= MAX_SIDE and side == int(side) for side in (width, height)):
            raise DataError(f"{path}: image {id} has no usable width and height (pixels, from 1 to {MAX_SIDE})")
        images[id] = ImageInfo(id, int(width), int(height), file_name(entry, id, path), integers(entry.get("neg_category_ids")),
                               integers(entry.get("not_exhaustive_category_ids")))  # fmt: skip
    return images


def _sort_in(annotations: list[Any], images: dict[int, ImageInfo], categories: dict[int, Any], path: Path, masks: bool,
             left_out: Counter[str]) -> None:  # fmt: skip
    """Give each usable annotation to its image; labels are places among all categories, plus 1."""
    label_of = {id: label for label, id in enumerate(categories, 1)}
    rows: dict[int, tuple[array, array, list[Packed]]] = {}
    ids: set[int] = set()
    for first in range(0, len(annotations), _CHUNK):
        chunk = annotations[first : first + _CHUNK]
        for entry in chunk:
            if not isinstance(entry, Entry):
                raise DataError(f"{path}: one of the annotations is not an object with an image_id and a category_id")
            if type(entry.id) is int:
                if entry.id in ids:
                    raise DataError(f"{path}: annotation id {entry.id} is there twice")
                ids.add(entry.id)
        for entry, extent in zip(chunk, extents_of([entry.segmentation for entry in chunk]), strict=True):
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


def _usable(entry: Entry, extent: Extent | None, image: ImageInfo, masks: bool) -> tuple[Any, Packed] | str:
    """Box (x1, y1, x2, y2) within the image and packed segmentation; or why the annotation is left out."""
    packed, box = entry.segmentation, entry.box
    width, height = image.width, image.height
    wrong = None
    if isinstance(packed, dict):
        packed = compressed(packed, height, width)
        wrong = BAD_RLE if packed is None else None if rle_area(packed) else BAD_SEGMENTATION
    elif packed is None:
        wrong = NO_SEGMENTATION
    elif extent is None or not extent[4] > 0 or not max(map(abs, extent[:4])) <= _FARTHEST:
        wrong = BAD_SEGMENTATION
    elif extent[0] >= width or extent[1] >= height or extent[2] <= 0 or extent[3] <= 0:
        wrong = OUTSIDE
    elif extent[5] > _LONGEST:
        packed = tuple(part for polygon in packed if len(part := clip_polygon(polygon, width, height)) >= 6)
        wrong = OUTSIDE if not packed else BAD_SEGMENTATION if extents_of([packed])[0][5] > _LONGEST else None
    if masks and wrong:
        return wrong
    if box is None and not wrong:
        box = rle_box(packed) if isinstance(packed, dict) else (*extent[:2], extent[2] - extent[0], extent[3] - extent[1])
    if not box:
        return BAD_BOX
    x, y, w, h = box
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if not (x2 - x1 >= MIN_SIDE and y2 - y1 >= MIN_SIDE):  # so put, NaN is left out as well
        return BAD_BOX
    return (x1, y1, x2, y2), packed if masks else None
