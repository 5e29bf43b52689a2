"""Outlines of objects, as polygons and as run-length masks, measured before a rasteriser sees them. Torch is not imported.

A polygon is an ``array`` of doubles (x, y, x, y ...), so that those of a million objects stay small.

Shapes: P polygons, K points.
"""

from array import array
from typing import Any

import numpy as np

Segmentation = list[list[float]] | dict[str, Any] | None
Packed = tuple[array, ...] | dict[str, Any] | None
# Lowest x and y, highest x and y, twice the area of all polygons, and the steps of their outlines (larger of dx and dy, summed)
Extent = tuple[float, float, float, float, float, float]

_MOST = 2**32 - 1  # pixels; pycocotools counts them in 32 bits


def unpack(packed: Packed) -> Segmentation:
    """Polygons as lists of numbers; an RLE, or none, as it is."""
    return [polygon.tolist() for polygon in packed] if isinstance(packed, tuple) else packed


def extents_of(segmentations: list[Any]) -> list[Extent | None]:
    """Of each annotation's polygons, all at once. None: it has none. Numbers that are not finite stay so."""
    extents: list[Extent | None] = [None] * len(segmentations)
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


def compressed(rle: Any, height: int, width: int) -> dict[str, Any] | None:
    """An RLE of an image's size in its compressed form, ``counts`` a str; None where it is not a whole RLE of that size.

    pycocotools itself must not be given what is not: it then reads and writes memory that is not its own.
    """
    from pycocotools import mask as coco_mask

    if not isinstance(rle, dict) or rle.get("size") != [height, width] or height * width > _MOST:
        return None
    counts = rle.get("counts")
    runs = counts if isinstance(counts, list) else runs_of(counts) if isinstance(counts, str) else None
    if runs is None or (isinstance(counts, list) and not all(type(run) is int and run >= 0 for run in runs)):
        return None
    if int(sum(runs)) != height * width or min(runs) < 0:
        return None
    if isinstance(counts, list):
        counts = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"].decode()
    return {"size": [height, width], "counts": counts}


def runs_of(counts: str) -> list[int] | None:
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


def rle_area(rle: dict[str, Any]) -> int:
    from pycocotools import mask as coco_mask

    return int(coco_mask.area(rle))


def rle_box(rle: dict[str, Any]) -> tuple[float, ...]:
    from pycocotools import mask as coco_mask

    return tuple(coco_mask.toBbox(rle).tolist())
