"""The annotations that detections are scored on, mended where both engines of scoring.py would trip over them.

Federated rules (Gupta et al. 2019): in an image, detections count of the categories that it has, and of those it was searched
for in vain.
"""

from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.aside import printable
from ..errors import DataError
from ..report.detector_document import Truth
from .header import frequency_group
from .lvis_json import MAX_SIDE, file_name, read_json
from .outlines import clip_polygon, compressed

GROUPS = ("r", "c", "f")
_FARTHEST = 1e9  # pixels
_INT64, _MOST = 2**63, 10**12  # ids, and images of a category
CROWD, STRAY, NO_AREA, NO_BOX = "crowd regions", "annotations of no image or category", "objects without area", "bad boxes"
NO_MASK = "objects without a usable mask"


@dataclass
class Object:
    image: int
    category: int
    box: list[float]
    area: float
    segmentation: Any = None  # polygons, a compressed RLE, or None


@dataclass
class GroundTruth:
    """The annotations of a file that detections are scored on. ``sizes``: (width, height) by image id; ``names`` and ``groups``
    ("r", "c", "f") by category id, rising; ``left_out``: how many of what are not scored on."""

    path: Path
    sizes: dict[int, tuple[int, int]]
    names: dict[int, str]
    groups: dict[int, str]
    objects: list[Object]
    absent: dict[int, list[int]]  # category ids that an image was searched for in vain
    open: dict[int, set[int]]  # category ids that are not marked wherever they are
    left_out: Counter[str] = field(default_factory=Counter)
    train_counts: dict[int, int] = field(default_factory=dict)  # "image_count", which LVIS has of the training images
    notes: list[str] = field(default_factory=list)  # what the file lacks, and what was taken instead
    sha256: str = ""
    files: dict[int, str | None] = field(default_factory=dict)  # by image id; None where the name cannot be used

    def image_counts(self) -> dict[int, int]:
        """Images with an object, by category id."""
        return {k: len(images) for k, images in _images_of(self.objects, self.names).items()}

    def instance_counts(self) -> dict[int, int]:
        counts = Counter(thing.category for thing in self.objects)
        return {id: counts[id] for id in self.names}

    def for_report(self) -> Truth:
        """The same with places instead of ids."""
        image, category = ({id: place for place, id in enumerate(ids)} for ids in (self.sizes, self.names))
        return Truth(self.path, self.sha256, list(self.names), list(self.names.values()), list(self.groups.values()),
                     list(self.sizes), list(self.sizes.values()), np.array([image[o.image] for o in self.objects]),
                     np.array([category[o.category] for o in self.objects]), np.array([o.box for o in self.objects]),
                     dict(self.left_out), self.notes)  # fmt: skip

    @property
    def has_masks(self) -> bool:
        return any(thing.segmentation is not None for thing in self.objects)


def load_ground_truth(path: str | Path, frequencies: dict[int, str] | None = None, *, by_name: dict[str, str] | None = None
                      ) -> GroundTruth:  # fmt: skip
    """Read an LVIS or COCO file to score on.

    As the official tool does, objects without area are left out. Crowd regions (COCO) are too: their category then counts as
    not marked everywhere in that image, so that nothing found there is wrong. A file in which no image has
    ``neg_category_ids`` is marked exhaustively, as COCO is. Groups are the file's own, else those of ``frequencies`` (category
    id -> r, c or f) or ``by_name``, else by the number of its own images. Raises: DataError (exit 3).
    """
    path = Path(path)
    document, sha256 = read_json(path)
    if not isinstance(document, dict):
        raise DataError(f"{path} is not an object with images, annotations and categories, as LVIS and COCO have it")
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list) or not all(isinstance(entry, dict) for entry in document[key]):
            raise DataError(f"{path} has no list of {key}: it is not in LVIS or COCO format")
    images, categories = _by_id(document["images"], "image", path), _by_id(document["categories"], "category", path)
    truth = GroundTruth(
        path,
        {id: _size(entry, path) for id, entry in images.items()},
        {id: str(entry.get("name", id)) for id, entry in categories.items()},
        {},
        [],
        {},
        defaultdict(set),
        sha256=sha256,
        files={id: _file(entry, id, path) for id, entry in images.items()},
    )
    exhaustive = not any("neg_category_ids" in entry for entry in images.values())
    everything = list(categories)
    for id, entry in images.items():
        truth.absent[id] = everything if exhaustive else _known(entry.get("neg_category_ids"), categories)
        truth.open[id] |= set(_known(entry.get("not_exhaustive_category_ids"), categories))
    counts = {id: entry.get("image_count") for id, entry in categories.items()}
    truth.train_counts = {id: n for id, n in counts.items() if type(n) is int and 0 <= n <= _MOST}
    for entry in document["annotations"]:
        _add(truth, entry)
    if not truth.objects:
        raise DataError(f"{path} has no object to score on")
    if exhaustive:
        truth.notes.append("no image says what it was searched for in vain (neg_category_ids): all categories, as in COCO")
    named = {id: by_name[name] for id, name in truth.names.items() if name in by_name} if by_name else {}
    _group(truth, {id: entry.get("frequency") for id, entry in categories.items()}, named | (frequencies or {}))
    return truth


def _by_id(entries: list[dict[str, Any]], kind: str, path: Path) -> dict[int, dict[str, Any]]:
    """In the order of their ids, which decides among equal scores."""
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        id = entry.get("id")
        if type(id) is not int or not -_INT64 <= id < _INT64 or id in found:
            raise DataError(f"{path}: one of the {kind} ids is not an integer (of 64 bits), or there twice")
        found[id] = entry
    return dict(sorted(found.items()))


def _size(entry: dict[str, Any], path: Path) -> tuple[int, int]:
    sides = entry.get("width"), entry.get("height")
    if not all(type(side) in (int, float) and 1 <= side <= MAX_SIDE and side == int(side) for side in sides):
        raise DataError(f"{path}: image {entry['id']} has no usable width and height (pixels, from 1 to {MAX_SIDE})")
    return int(sides[0]), int(sides[1])


def _file(entry: dict[str, Any], id: int, path: Path) -> str | None:
    try:
        return file_name(entry, id, path)
    except DataError:  # for scoring no file is needed
        return None


def _known(ids: Any, categories: dict[int, Any]) -> list[int]:
    return [id for id in ids if type(id) is int and id in categories] if isinstance(ids, list) else []


def _add(truth: GroundTruth, entry: dict[str, Any]) -> None:
    image, category = entry.get("image_id"), entry.get("category_id")
    if type(image) is not int or type(category) is not int or image not in truth.sizes or category not in truth.names:
        truth.left_out[STRAY] += 1
        return
    if entry.get("iscrowd") or entry.get("ignore"):
        truth.left_out[CROWD] += 1
        truth.open[image].add(category)
        return
    width, height = truth.sizes[image]
    segmentation = _segmentation(entry.get("segmentation"), width, height)
    if segmentation is None:
        truth.left_out[NO_MASK] += 1
    box, area = _numbers(entry.get("bbox"), 4), _numbers([entry.get("area")], 1)
    if (box is None or area is None) and segmentation is not None:
        from pycocotools import mask as coco_mask

        rle = segmentation
        if isinstance(rle, list):
            rle = coco_mask.merge(coco_mask.frPyObjects(rle, height, width))
        box = box or coco_mask.toBbox(rle).tolist()
        area = area or [float(coco_mask.area(rle))]
    if box is None or box[2] < 0 or box[3] < 0:
        truth.left_out[NO_BOX] += 1
        return
    area = area or [box[2] * box[3]]
    if not area[0] > 0:
        truth.left_out[NO_AREA] += 1
        return
    truth.objects.append(Object(image, category, box, area[0], segmentation))


def _numbers(values: Any, count: int) -> list[float] | None:
    if not isinstance(values, list) or len(values) != count:
        return None
    fine = all(type(value) in (int, float) and abs(value) <= _FARTHEST**2 for value in values)  # so put, NaN is not
    return [float(value) for value in values] if fine else None


def _segmentation(found: Any, width: int, height: int) -> Any:
    """Polygons of three points or more, near the image, or a compressed RLE; None: neither. A polygon that goes far beyond the
    image is cut there: rasterising takes memory by its length."""
    if isinstance(found, dict):
        return compressed(found, height, width)
    if not isinstance(found, list):
        return None
    polygons = []
    for polygon in [found] if found and not isinstance(found[0], list) else found:
        numbers = _numbers(polygon, len(polygon)) if isinstance(polygon, list) else None
        if not numbers or len(numbers) < 6 or len(numbers) % 2 or max(map(abs, numbers)) > _FARTHEST:
            continue
        xs, ys = numbers[::2], numbers[1::2]
        if min(xs) < -width or max(xs) > 2 * width or min(ys) < -height or max(ys) > 2 * height:
            numbers = clip_polygon(array("d", numbers), width, height).tolist()
        if len(numbers) >= 6:
            polygons.append(numbers)
    return polygons or None


def _images_of(objects: list[Object], names: dict[int, str]) -> dict[int, set[int]]:
    images: dict[int, set[int]] = {id: set() for id in names}
    for thing in objects:
        images[thing.category].add(thing.image)
    return images


def _group(truth: GroundTruth, own: dict[int, Any], others: dict[int, str]) -> None:
    counts, computed = truth.image_counts(), 0
    for id in truth.names:
        group = own[id] if own[id] in GROUPS else others.get(id)
        if group not in GROUPS:
            computed += 1
            group = frequency_group(counts[id])
        truth.groups[id] = group
    if computed:
        truth.notes.append(f"{computed} of {len(own)} categories have no frequency: rare, common, frequent is by the images of "
                           f"{printable(truth.path.name)} itself")  # fmt: skip
