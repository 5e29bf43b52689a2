"""Detections drawn on their photo: translucent masks, boxes, and labels that stay clear of one another.

Colours are Okabe and Ito's, told apart by colour-blind readers; a category keeps its own unless another one of the picture
has it. Lines have a dark edge, so that they show on light and dark ground. Torch is not imported here.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ..data.aside import printable

COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
Box = tuple[int, int, int, int]  # of a picture, in pixels
Colour = tuple[int, int, int]
_DARK, _LIGHT = (20, 20, 20), (255, 255, 255)
_FILL = 0.35  # how much of a mask's colour covers the photo
_WIDE, _WIDEST = 1280, 4096  # pixels of a picture's longer side: about so many at least, and at most
_MOST = 16  # times that a small photo is enlarged
_LETTERS = 28  # of a name; the rest is cut
_ALWAYS, _CHEAP = 1e9, 1.0  # what a label may cost: of hidden boxes (one hidden whole: 1.5), and distance from its own
_LABELS = 300  # at most, those of the highest scores
_JOINERS = "\u200c\u200d"  # of the invisible characters those that letters need; the others may turn the text round


class Detection(NamedTuple):
    """One found object. ``box`` is x1, y1, x2, y2 in pixels of the upright photo; ``rle`` its mask of the photo's size."""

    label: int  # 1..C
    category_id: int  # the JSON's
    name: str
    score: float
    box: tuple[float, float, float, float]
    rle: dict[str, Any] | None = None


def draw(photo: Image.Image, detections: Sequence[Detection]) -> Image.Image:
    """A picture of ``photo``, RGB and upright, with all detections. In a crowd not all have a label: the best of each category
    has one, others where it hides little."""
    width, height = photo.size
    longer = max(width, height)
    scale = min(_MOST, max(1, round(_WIDE / longer))) if longer <= _WIDEST else _WIDEST / longer
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    unit = max(2, round(max(size) / 800))  # width of a line, in pixels
    shown = [d for d in detections if np.isfinite(d.box).all()]
    colours = _colours(shown)
    by_area = sorted(range(len(shown)), key=lambda i: -_area(shown[i].box))  # the small ones come on top
    pixels_HW3 = np.array(photo if scale == 1 else photo.resize(size, Image.Resampling.LANCZOS))
    for i in by_area:
        if shown[i].rle is not None:
            _lay_mask(pixels_HW3, shown[i].rle, colours[i], scale, unit)
    picture = Image.fromarray(pixels_HW3)
    pen = ImageDraw.Draw(picture)
    boxes = [_in_picture(d.box, scale, picture.size) for d in shown]
    for i in by_area:
        _outline(pen, boxes[i], colours[i], unit)
    _write_labels(picture, pen, shown, boxes, colours, unit)
    return picture


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _in_picture(box: Sequence[float], scale: float, size: tuple[int, int]) -> Box:
    """Pixels of the box's first and last column and row, within the picture and never less than three wide."""
    edges = []
    for low, high, side in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        first = min(max(round(low * scale), 0), side - 1)
        edges.append((max(0, min(first, side - 3)), min(side - 1, max(round(high * scale) - 1, first + 2))))
    (x1, x2), (y1, y2) = edges
    return x1, y1, x2, y2


def _colours(detections: Sequence[Detection]) -> list[Colour]:
    """One a detection: of each category its own, or the next that no category of this picture has yet."""
    taken: dict[int, int] = {}
    for label in dict.fromkeys(d.label for d in detections):
        free = [c % len(COLOURS) for c in range(label - 1, label - 1 + len(COLOURS))
                if c % len(COLOURS) not in taken.values()]  # fmt: skip
        taken[label] = free[0] if free else (label - 1) % len(COLOURS)
    return [COLOURS[taken[d.label]] for d in detections]


def _outline(pen: ImageDraw.ImageDraw, box: Box, colour: Colour, unit: int) -> None:
    x1, y1, x2, y2 = box
    pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_DARK, width=unit + 2)
    pen.rectangle(box, outline=colour, width=unit)


def _lay_mask(pixels_HW3: np.ndarray, rle: dict[str, Any], colour: Colour, scale: float, unit: int
              ) -> None:  # fmt: skip
    """Tint what the mask covers, and draw its edge."""
    from pycocotools import mask as coco_mask

    x, y, w, h = (int(v) for v in coco_mask.toBbox(rle))
    if w < 1 or h < 1:
        return
    left, top, right, bottom = (round(v * scale) for v in (x, y, x + w, y + h))
    part_HW3 = pixels_HW3[top:bottom, left:right]
    if not part_HW3.size:
        return
    mask_HW = coco_mask.decode(rle)[y : y + h, x : x + w]
    if scale != 1:  # smoothly, or it would have steps
        size = part_HW3.shape[1::-1]
        mask_HW = np.asarray(Image.fromarray(mask_HW * np.uint8(255)).resize(size, Image.Resampling.BILINEAR)) // 128
    inside_HW = mask_HW.astype(bool)
    rim = Image.fromarray(np.pad(mask_HW, 1)).filter(ImageFilter.MinFilter(3))
    for _ in range(unit - 1):
        rim = rim.filter(ImageFilter.MinFilter(3))
    edge_HW = inside_HW & ~np.asarray(rim)[1:-1, 1:-1].astype(bool)
    tinted = part_HW3[inside_HW] * (1 - _FILL) + np.array(colour) * _FILL
    part_HW3[inside_HW] = tinted.astype(np.uint8)
    part_HW3[edge_HW] = colour


# Labels


def _write_labels(picture: Image.Image, pen: ImageDraw.ImageDraw, shown: Sequence[Detection], boxes: Sequence[Box],
                  colours: Sequence[Colour], unit: int) -> None:  # fmt: skip
    size = max(13, round(max(picture.size) / 76))
    best = sorted(range(len(shown)), key=lambda i: -shown[i].score)
    first = set({shown[i].label: i for i in reversed(best)}.values())
    order = sorted(best, key=lambda i: i not in first)[:_LABELS]
    tiles = [_tile(shown[i], colours[i], size) for i in order]
    limits = [_ALWAYS if i in first else _CHEAP for i in order]
    spots = lay_labels([tile.size for tile in tiles], order, limits, boxes, picture.size, unit)
    for i, spot in zip(order, spots, strict=True):
        if spot is not None:
            _lead(pen, spot, boxes[i], colours[i], unit)
    for tile, spot in zip(tiles, spots, strict=True):  # over all leading lines
        if spot is not None:
            picture.paste(tile, spot[:2])


def lay_labels(sizes: Sequence[tuple[int, int]], owners: Sequence[int], limits: Sequence[float], boxes: Sequence[Box],
               whole: tuple[int, int], unit: int) -> list[Box | None]:  # fmt: skip
    """Where labels go, in a picture of the size ``whole``: each where it hides least, none over an earlier one.

    ``sizes``: widths and heights; ``owners``: the place of each one's box in ``boxes``; ``limits``: what it may cost at most,
    of boxes that it hides and distance from its own, else it has no place (None). Places are x1, y1, x2, y2, ends excluded.
    """
    boxes_N4 = np.array(boxes, dtype=float).reshape(-1, 4)
    spots: list[Box | None] = []
    for size, own, limit in zip(sizes, owners, limits, strict=True):
        spots_K3 = _candidates(size, boxes_N4[own], whole, unit)
        corners_K2 = np.rint(spots_K3[:, :2])
        at_K4 = np.concatenate([corners_K2, corners_K2 + size], 1)
        costs_K = spots_K3[:, 2] + _cover(at_K4, boxes_N4, own)
        costs_K[(at_K4[:, :2] < 0).any(1) | (at_K4[:, 2:] > whole).any(1)] = np.inf
        if taken := [spot for spot in spots if spot is not None]:
            costs_K[(_overlap(at_K4, np.array(taken, dtype=float)) > 0).any(1)] = np.inf
        k = int(costs_K.argmin())
        spots.append(tuple(at_K4[k].astype(int).tolist()) if costs_K[k] <= limit else None)
    return spots


def _candidates(size: tuple[int, int], box_4: np.ndarray, whole: tuple[int, int], unit: int) -> np.ndarray:
    """Left, top and cost [K, 3] of the places for a label: at the box, pushed into the picture, or further off."""
    (w, h), (x1, y1, x2, y2), gap = size, box_4, unit + 1
    above, below, centre = y1 - h - gap, y2 + gap + 1, ((x1 + x2 - w) / 2, (y1 + y2 - h) / 2)
    inner = (x1 + gap, y1 + gap, x2 - w - gap, y2 - h - gap)
    spots = [(x1 - gap, above, 0.0), (inner[0], inner[1], 0.1), (x1 - gap, below, 0.2), (x2 - w + 1, above, 0.2),
             (x2 - w + 1, below, 0.3), (inner[2], inner[1], 0.3), (inner[0], inner[3], 0.3), (inner[2], inner[3], 0.4),
             (x2 + gap + 1, y1, 0.4), (x1 - w - gap, y1, 0.4), (*centre, 0.4), (x2 + gap + 1, centre[1], 0.5),
             (x1 - w - gap, centre[1], 0.5)]  # fmt: skip
    spots += [(min(max(x, 0), whole[0] - w), min(max(y, 0), whole[1] - h), cost + 0.1) for x, y, cost in spots]
    for ring in range(1, 7):
        for dx in (-0.6, 0, 0.6):
            spots += [(x1 + dx * ring * w, above - ring * 1.2 * h, 1 + 0.3 * ring),
                      (x1 + dx * ring * w, below + ring * 1.2 * h - 1, 1.1 + 0.3 * ring)]  # fmt: skip
        spots += [(x1 - w - ring * h, y1 + ring * h, 1.2 + 0.3 * ring), (x2 + ring * h, y1 + ring * h, 1.2 + 0.3 * ring)]
    return np.array(spots)


def _cover(at_K4: np.ndarray, boxes_N4: np.ndarray, own: int) -> np.ndarray:
    """What a label there hides [K]: the shares of the boxes that it covers, its own counting less."""
    areas_N = (boxes_N4[:, 2] - boxes_N4[:, 0] + 1) * (boxes_N4[:, 3] - boxes_N4[:, 1] + 1)
    shares_KN = _overlap(at_K4, boxes_N4) / areas_N
    shares_KN[:, own] *= 0.8
    return 1.5 * shares_KN.sum(1)


def _overlap(a_K4: np.ndarray, b_N4: np.ndarray) -> np.ndarray:
    """Areas of the intersections [K, N]."""
    low = np.maximum(a_K4[:, None, :2], b_N4[None, :, :2])
    high = np.minimum(a_K4[:, None, 2:], b_N4[None, :, 2:])
    return (high - low).clip(0).prod(2)


def _lead(pen: ImageDraw.ImageDraw, spot: Box, box: Box,
          colour: Colour, unit: int) -> None:  # fmt: skip
    """A line from the label to its box, where the two do not touch."""
    ends = []
    for low, high, first, last in ((spot[0], spot[2], box[0], box[2]), (spot[1], spot[3], box[1], box[3])):
        ends.append((low, last) if low > last else (high, first) if high < first else (max(low, first),) * 2)
    (sx, bx), (sy, by) = ends
    if abs(sx - bx) + abs(sy - by) > 2 * unit + 2:
        pen.line((sx, sy, bx, by), fill=_DARK, width=unit + 2)
        pen.line((sx, sy, bx, by), fill=colour, width=unit)


def _tile(detection: Detection, colour: Colour, size: int) -> Image.Image:
    """Name and score on the category's colour. Of fixed height: marks that pile up on a letter are cut off."""
    text, path = caption(detection.name, detection.category_id)
    score = f" {detection.score:.2f}"
    font, digits = _font(path, size), _font(dejavu(), size)
    pad = max(2, size // 5)
    ascent, descent = digits.getmetrics()
    middle = pad + round(font.getlength(text))
    tile = Image.new("RGB", (middle + round(digits.getlength(score)) + pad, ascent + descent + 2), _DARK)
    pen = ImageDraw.Draw(tile)
    pen.rectangle((1, 1, tile.width - 2, tile.height - 2), fill=colour)
    ink = _DARK if _luminance(colour) > 0.18 else _LIGHT
    pen.text((pad, ascent + 1), text, fill=ink, font=font, anchor="ls")
    pen.text((middle, ascent + 1), score, fill=ink, font=digits, anchor="ls")
    return tile


def _luminance(colour: Colour) -> float:
    """Relative luminance of an sRGB colour, 0 to 1 (WCAG 2.1): above 0.18 black stands out more than white."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# Names and fonts


@lru_cache(4096)
def caption(name: str, category_id: int) -> tuple[str, str]:
    """The name as it is drawn, and the font file to draw it with.

    Where no font of this machine has its letters, the category's id stands for it: a row of empty boxes would say nothing.
    """
    text = "".join(c for c in printable(name).strip() if c in _JOINERS or unicodedata.category(c) != "Cf")
    text = text if len(text) <= _LETTERS else text[: _LETTERS - 1].rstrip() + "…"
    path = _font_for(text) if text.strip() else None
    return (text, path) if path else (f"category {category_id}", dejavu())


@lru_cache(1)
def dejavu() -> str:
    """The font that matplotlib brings along: Latin, Greek, Cyrillic, Arabic, Hebrew and more, but no Chinese."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def _font_for(text: str) -> str | None:
    """The first font with all letters of ``text``: DejaVu, or one of the system's."""
    letters = {ord(c) for c in text if c not in _JOINERS and not "\ufe00" <= c <= "\ufe0f"}
    if _has(dejavu(), letters):
        return dejavu()
    return next((path for path in _system_fonts() if _has(path, letters)), None)


@lru_cache(1)
def _system_fonts() -> list[str]:
    from matplotlib import font_manager

    # Plain upright ones first, as their names are shorter; colour fonts (emoji) cannot be drawn at any size.
    return sorted((path for path in font_manager.findSystemFonts() if "color" not in path.lower()), key=lambda p: (len(p), p))


def _has(path: str, letters: set[int]) -> bool:
    try:
        _font(path, 13)
        return all(_face(path).get_char_index(letter) for letter in letters)
    except (OSError, RuntimeError, ValueError):  # a damaged font, or one of bitmaps
        return False


@lru_cache(64)
def _face(path: str):
    from matplotlib.ft2font import FT2Font

    return FT2Font(path)


@lru_cache(64)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)
