"""What ``balms detect evaluate --report`` hands to the page, as plain data: runs, what each detection hit, photos."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DetectEvaluateConfig
from ..data.decode import BadImage, quiet_pillow
from ..data.images import inside
from ..engine.header import sha256_of
from ..report.detector_document import DetectorRun, build
from ..report.detector_pictures import choose, pictures
from ..report.write import PAGE
from ..reporter import Reporter
from .dataset import read_pixels
from .ground_truth import GroundTruth
from .header import DetectHeader
from .results import KINDS, Results
from .scoring import matches

_SETTINGS = ("score_threshold", "detections", "nms", "pre_nms", "batch_size", "precision")


def for_report(file: Path, header: DetectHeader | None, one: dict[str, Any], found: Results, truth: GroundTruth,
                config: DetectEvaluateConfig, at_boxes: np.ndarray | None, *, several: bool) -> DetectorRun:  # fmt: skip
    """``several``: what each detection hit is needed, to tell a difference from chance."""
    image_place, category_place = ({id: place for place, id in enumerate(ids)} for ids in (truth.sizes, truth.names))
    if at_boxes is not None:
        at_boxes = np.array([(image_place[i], category_place[c], right) for i, c, right in at_boxes.tolist()], np.int64)
        at_boxes = at_boxes.reshape(-1, 3)
    more = {"sha256": sha256_of(file), "settings": {key: getattr(config, key) for key in _SETTINGS} if header else None}
    return DetectorRun(file.parent if header else file, header, one | more,
                       {kind: matches(truth, found, kind) for kind in KINDS if kind in one and several},
                       found.for_report(image_place, category_place, truth.sizes), at_boxes)  # fmt: skip


def write_report(told: list[DetectorRun], truth: GroundTruth, photos: Path, folder: Path, reporter: Reporter, *, overwrite: bool
            ) -> None:  # fmt: skip
    from ..report import detector_page  # matplotlib, so only where a report is asked for

    scored_on = truth.for_report()
    examples = choose(scored_on, told)
    shown = pictures(examples, _reader(truth, photos))
    why_none = None if shown else f"none of the photos can be read in {photos} (--images names their folder)"
    if why_none:
        reporter.note(f"the report has no photos: {why_none}")
    document = build(scored_on, told, examples, why_none, reporter)
    detector_page.write_report(document, shown, folder, reporter, overwrite=overwrite)
    reporter.note(f"report: {folder / PAGE}")


def _reader(truth: GroundTruth, folder: Path) -> Callable[[int], np.ndarray | None]:
    """The photo at a place, uint8 [H, W, 3]; None where it cannot be read, or is not the one that was annotated."""
    root, names = os.path.realpath(folder), list(truth.files.values())

    def read(place: int) -> np.ndarray | None:
        if names[place] is None:
            return None
        try:
            with quiet_pillow():
                size = list(truth.sizes.values())[place]
                return read_pixels(inside(root, names[place]), size).permute(1, 2, 0).contiguous().numpy()
        except (BadImage, OSError, ValueError):
            return None

    return read
