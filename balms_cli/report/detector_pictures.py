"""Photos of rare objects, with what was there and what each run found: which are shown, and their pictures as data: URIs.

Which photo is shown does not depend on what any run made of it.
"""

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from .detector_document import GROUPS, DetectorRun, Truth

MOST = 6  # photos
_SIDE = 360  # pixels of a picture's longer side
_OBJECTS, _BOXES = 100, 20  # true boxes, and found ones of a run, in one picture
_HIT = 0.5  # overlap (IoU) from which on a box is at an object


def choose(truth: Truth, runs: list[DetectorRun]) -> list[dict[str, Any]]:
    """A photo of each of the rarest tested categories (by the first run's training images), the one with the lowest id that is
    not there yet: the true boxes of the category there, and of each run its surest detections of it, one more than there are
    objects, and what it calls the largest of them, by its surest detection there. Boxes are x, y, width, height in pixels."""
    rows = runs[0].result["per_category"]
    tested = np.unique(truth.object_categories).tolist()
    group = next(g for g in GROUPS if any(truth.groups[c] == g for c in tested))
    order = sorted((c for c in tested if truth.groups[c] == group), key=lambda c: (rows[c]["train_images"] or 0, truth.ids[c]))
    chosen: list[dict[str, Any]] = []
    for c in order:
        photos = set(truth.object_photos[truth.object_categories == c].tolist()) - {one["photo"] for one in chosen}
        if photos:
            chosen.append(_example(truth, runs, c, min(photos, key=lambda place: truth.photos[place])))
        if len(chosen) == MOST:
            break
    return chosen


def _example(truth: Truth, runs: list[DetectorRun], c: int, b: int) -> dict[str, Any]:
    there = (truth.object_categories == c) & (truth.object_photos == b)
    true_I4 = truth.object_boxes[there]
    largest_4 = true_I4[true_I4[:, 2:].prod(1).argmax()]
    return {"photo": b, "photo_id": truth.photos[b], "size": list(truth.sizes[b]), "category": c,
            "objects": len(true_I4), "boxes": true_I4[:_OBJECTS],
            "runs": [_of_run(run, c, b, true_I4, largest_4) for run in runs]}  # fmt: skip


def _of_run(run: DetectorRun, c: int, b: int, true_I4: np.ndarray, largest_4: np.ndarray) -> dict[str, Any]:
    found = run.found
    here = np.flatnonzero(found.photos == b)
    here = here[np.argsort(-found.scores[here], kind="stable")]
    own = here[found.categories[here] == c][: min(len(true_I4) + 1, _BOXES)]
    at = here[overlaps(found.boxes[here], largest_4[None])[:, 0] >= _HIT]
    hits = (overlaps(found.boxes[own], true_I4) >= _HIT).any(1)
    return {
        "found": [{"box": box, "score": score, "hit": hit} for box, score, hit in zip(found.boxes[own], found.scores[own], hits,
                                                                                      strict=True)],
        "hits": int(hits.sum()),
        "called": {"category": found.categories[at[0]], "score": found.scores[at[0]]} if len(at) else None,
    }  # fmt: skip


def overlaps(a_N4: np.ndarray, b_M4: np.ndarray) -> np.ndarray:
    """Intersection over union [N, M] of boxes x, y, width, height; 0 where a box has no area."""
    a, b = a_N4[:, None], b_M4[None]
    sides = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = sides.clip(0).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def pictures(examples: list[dict[str, Any]], read: Callable[[int], np.ndarray | None]) -> dict[int, str]:
    """``data:`` URIs by photo. ``read``: the photo at a place, uint8 [H, W, 3], None where it cannot be read."""
    from PIL import Image

    found = {}
    for one in examples:
        pixels_HW3 = read(one["photo"])
        if pixels_HW3 is None:
            continue
        picture, stream = Image.fromarray(pixels_HW3), io.BytesIO()
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        picture.save(stream, "JPEG", quality=78)
        found[one["photo"]] = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return found
