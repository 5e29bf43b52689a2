"""Detections as a results file of LVIS (and COCO) has them: read, checked, written.

Columns, not an object a detection: LVIS v1 val has up to 5.9 million. Shapes: N detections. Boxes are x, y, width, height in
pixels; masks are the ``counts`` of compressed run lengths (RLE) of the image's size.
"""

import json
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.aside import printable, replace_file
from ..errors import DataError
from ..report.detector_document import Found
from .lvis_json import read_json
from .outlines import compressed

KINDS = {"bbox": "boxes", "segm": "masks"}
MOST = 300  # detections an image that LVIS scores
_PER_BYTE = 6  # bytes of memory that a byte of a file takes while it is parsed and scored, at most
_LARGEST = 1e15  # of a score or a coordinate


@dataclass(frozen=True)
class Results:
    """``image_ids``, ``category_ids`` int64 [N] of the annotations file, ``scores`` float64 [N], ``boxes`` float64 [N, 4] or
    None, ``counts`` (N texts) or None."""

    image_ids: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray | None
    counts: list[str] | None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def iou_types(self) -> tuple[str, ...]:
        """What can be scored of them. Nothing detected is so for boxes and masks."""
        if not len(self):
            return ("bbox", "segm")
        return ("bbox",) * (self.boxes is not None) + ("segm",) * (self.counts is not None)

    def take(self, rows: np.ndarray) -> "Results":
        return Results(self.image_ids[rows], self.category_ids[rows], self.scores[rows],
                       None if self.boxes is None else self.boxes[rows],
                       None if self.counts is None else [self.counts[row] for row in rows])  # fmt: skip

    def best(self, most: int = MOST) -> "Results":
        """The surest ``most`` of each image; of equal scores those that stand first. The order stays."""
        order = np.lexsort((-self.scores, self.image_ids))  # stable
        images = self.image_ids[order]
        first = np.flatnonzero(np.r_[True, images[1:] != images[:-1]][: len(images)])
        place = np.arange(len(images)) - np.repeat(first, np.diff(np.r_[first, len(images)]))
        kept = order[place < most]
        return self if len(kept) == len(self) else self.take(np.sort(kept))

    def for_report(self, image_place: Mapping[int, int], category_place: Mapping[int, int], sizes: Mapping[int, tuple[int, int]]
                   ) -> Found:  # fmt: skip
        """The same with places instead of ids, and with boxes: those of the masks where there are no others."""
        boxes = self.boxes
        if boxes is None:
            import hotcoco

            ids = self.image_ids.tolist()
            rles = [{"size": [*sizes[id][::-1]], "counts": counts} for id, counts in zip(ids, self.counts or [], strict=True)]
            boxes = np.array(hotcoco.mask.to_bbox(rles), np.float64) if rles else np.empty((0, 4))
        places = ([of[id] for id in ids.tolist()] for of, ids in ((image_place, self.image_ids),
                                                                  (category_place, self.category_ids)))  # fmt: skip
        return Found(*(np.array(column, np.int64) for column in places), self.scores, boxes.reshape(-1, 4))

    def write(self, path: Path, sizes: Mapping[int, tuple[int, int]]) -> None:
        """The JSON list that ``lvis.LVISResults`` takes. ``sizes``: (width, height) by image id."""
        none = [None] * len(self)
        boxes, masks = none if self.boxes is None else self.boxes.tolist(), none if self.counts is None else self.counts
        ids = self.image_ids.tolist(), self.category_ids.tolist()
        lines = []
        for image, category, score, box, counts in zip(*ids, self.scores.tolist(), boxes, masks, strict=True):
            entry: dict[str, Any] = {"image_id": image, "category_id": category, "score": score}
            if box is not None:
                entry["bbox"] = box
            if counts is not None:
                width, height = sizes[image]
                entry["segmentation"] = {"size": [height, width], "counts": counts}
            lines.append(json.dumps(entry))
        replace_file(path, "[" + ",\n".join(lines) + "]\n")


def rounded(scores_N: np.ndarray, boxes_N4: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 numbers as float64 that a file gives back to the bit: the shortest text of a score, a thousandth of a pixel."""
    shortest = [float(text) for text in np.asarray(scores_N, np.float32).astype(str)]
    return np.array(shortest, np.float64), np.round(np.asarray(boxes_N4, np.float64), 3)


def gather(entries: Iterable[Any], sizes: Mapping[int, tuple[int, int]], categories: Iterable[int], name: str) -> Results:
    """Results from objects of a results file. Raises: DataError, as :func:`read_results`."""
    columns = _Columns(sizes, categories)
    for entry in entries:
        if not isinstance(entry, dict):
            raise DataError(f"{name}: detection {columns.read + 1} is not an object with image_id, category_id and score")
        columns.add(entry)
        if columns.fault:
            break
    return columns.results(name)


def read_results(path: str | Path, sizes: Mapping[int, tuple[int, int]], categories: Iterable[int]) -> Results:
    """A results file, checked against the images (id -> width, height) and categories (ids) that it is to be scored on.

    Raises: DataError (exit 3) for a file that cannot be read or does not fit into memory, and for the first detection of an
    unknown image or category, without a finite score, or whose box or mask is none.
    """
    path = Path(path)
    columns = _Columns(sizes, categories)

    def hook(entry: dict[str, Any]) -> Any:
        if "image_id" not in entry and "score" not in entry:
            return entry
        columns.add(entry)
        return None

    document, _ = read_json(path, hook, _PER_BYTE)
    if not isinstance(document, list):
        raise DataError(f"{path} is not a list of detections, as LVIS and COCO have results")
    if any(entry is not None for entry in document) or len(document) != columns.read:
        odd = next((i for i, entry in enumerate(document, 1) if entry is not None), len(document))
        raise DataError(f"{path}: detection {odd} is not an object with image_id, category_id and score")
    return columns.results(str(path))


class _Columns:
    """Takes detections one by one, so that no object is kept of any, and keeps the first fault."""

    def __init__(self, sizes: Mapping[int, tuple[int, int]], categories: Iterable[int]):
        self.sizes, self.known = sizes, frozenset(categories)
        self.ids, self.scores, self.boxes = array("q"), array("d"), array("d")
        self.counts: list[str] = []
        self.read = 0
        self.fault: str | None = None

    def add(self, entry: dict[str, Any]) -> None:
        self.read += 1
        if self.fault is None and (fault := self._add(entry)):
            self.fault = f"detection {self.read} {fault}"

    def _add(self, entry: dict[str, Any]) -> str | None:
        image, category, score = entry.get("image_id"), entry.get("category_id"), entry.get("score")
        if type(image) is not int or image not in self.sizes:
            return f"is of image {_shown(image)}, which the annotations do not have"
        if type(category) is not int or category not in self.known:
            return f"is of category {_shown(category)}, which the annotations do not have"
        if not _finite(score):
            return f"has the score {_shown(score)}, which is not a finite number"
        box, mask = entry.get("bbox"), entry.get("segmentation")
        if box is None and mask is None:
            return "has neither a bbox nor a segmentation"
        if box is not None:
            if not (isinstance(box, list) and len(box) == 4 and all(map(_finite, box)) and box[2] >= 0 and box[3] >= 0):
                return f"has the bbox {_shown(box)}: x, y, width and height in pixels are wanted, neither side negative"
            self.boxes.extend(box)
        if mask is not None:
            width, height = self.sizes[image]
            if isinstance(mask, list):
                return "has polygons: masks of results are run lengths (RLE), as pycocotools.mask.encode makes them"
            if (rle := compressed(mask, height, width)) is None:
                return f"has a mask that is no run lengths (RLE) of {height} x {width} pixels, its image's height and width"
            self.counts.append(rle["counts"])
        self.ids.extend((image, category))
        self.scores.append(score)
        if (box is not None and len(self.boxes) != 4 * self.read) or (mask is not None and len(self.counts) != self.read):
            return "has a bbox or a segmentation where one before it has none: all or none"
        return None

    def results(self, name: str) -> Results:
        count = len(self.scores)
        if self.fault is None and (len(self.boxes) not in (0, 4 * count) or len(self.counts) not in (0, count)):
            self.fault = "some detections have a bbox or a segmentation and others none: all or none"
        if self.fault is not None:
            raise DataError(f"{name}: {self.fault}")
        images, categories = np.array(self.ids, np.int64).reshape(-1, 2).T
        boxes = np.array(self.boxes, np.float64).reshape(-1, 4) if self.boxes else None
        return Results(images.copy(), categories.copy(), np.array(self.scores, np.float64), boxes, self.counts or None)


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST  # so put, NaN is not


def _shown(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= 60 else text[:57] + "..."
