"""LVIS metrics of detections. The numbers are those of the ``lvis`` package; the engine is hotcoco, which a test holds equal to
it, or ``lvis`` itself.

Nothing is measured here: what both engines trip over is mended before, and both are given the same.

Shapes: C categories of the file, N detections, T thresholds of IoU, K of recall, A ranges of area.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError
from .ground_truth import GroundTruth, load_ground_truth
from .results import MOST, Results, gather, read_results

IouType = Literal["bbox", "segm"]
Engine = Literal["hotcoco", "lvis"]
# Our names, and the engines'. Small is under 32 x 32 pixels of an object's area, large over 96 x 96. Rare, common, frequent: in
# at most 10, at most 100, and more training images.
METRICS = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_s": "APs", "AP_m": "APm", "AP_l": "APl", "AP_r": "APr",
           "AP_c": "APc", "AP_f": "APf", "AR": f"AR@{MOST}", "AR_s": f"ARs@{MOST}", "AR_m": f"ARm@{MOST}",
           "AR_l": f"ARl@{MOST}"}  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """``metrics``: the names of :data:`METRICS`, each from 0 to 1, None where no object of that kind is in the file.
    ``per_category``: AP by category id of the file, None for categories without an object."""

    metrics: dict[str, float | None]
    per_category: dict[int, float | None]


def score(ground_truth: str | Path | GroundTruth, results: list[dict[str, Any]] | str | Path | Results, iou_type: IouType,
          engine: Engine = "hotcoco", frequencies: dict[int, str] | None = None) -> Scores:  # fmt: skip
    """AP and AR of boxes ("bbox") or masks ("segm"), by the rules of LVIS: the 300 surest detections an image.

    ``results``: a results file, or objects as it holds them. Of masks the area is the mask's own, whether or not there is a
    box too. Nothing detected is 0. Raises: DataError (exit 3) for what cannot be scored.
    """
    truth = ground_truth if isinstance(ground_truth, GroundTruth) else load_ground_truth(ground_truth, frequencies)
    if not isinstance(results, Results):
        known = truth.sizes, truth.names
        results = read_results(results, *known) if isinstance(results, str | Path) else gather(results, *known, "results")
    if iou_type not in results.iou_types:
        raise DataError(f"the results have no {'boxes' if iou_type == 'bbox' else 'masks'}, so these cannot be scored")
    places = _Places(truth)
    dataset = places.dataset(iou_type)
    if not dataset["annotations"]:
        raise DataError(f"{truth.path} has no masks, so masks cannot be scored")
    run = _run_lvis if engine == "lvis" else _run_hotcoco
    found, precision_TKCA = run(dataset, places.columns(results.best(), iou_type), iou_type)
    metrics = {ours: _or_none(float(found[theirs])) for ours, theirs in METRICS.items()}
    per_category = {id: _or_none(_mean(precision_TKCA[:, :, c, 0])) for c, id in enumerate(truth.names)}
    return Scores(metrics, per_category)


def official_cost(truth: GroundTruth) -> tuple[float, float]:
    """About how many seconds, and gigabytes, the official tool takes an IoU type: measured with 1,000 images and 1,230
    categories, 23.8 s and 1.25 GB; both grow with their product."""
    pairs = len(truth.sizes) * len(truth.names)
    return 1.93e-5 * pairs, 1.02e-6 * pairs


def _or_none(value: float) -> float | None:
    return None if value < 0 else value


def _mean(values: np.ndarray) -> float:
    kept = values[values > -1]
    return float(kept.mean()) if len(kept) else -1.0


# Engines


def _run_hotcoco(dataset: dict[str, Any], found: "_Found", iou_type: str) -> tuple[dict[str, float], np.ndarray]:
    import hotcoco

    with redirect_stdout(io.StringIO()):  # it prints its table
        truth = hotcoco.COCO(dataset)
        rows_N7 = np.column_stack([found.images, found.boxes, found.scores, found.categories])
        detections = truth.load_res(rows_N7, segmentation=found.rles) if found.rles else truth.load_res(rows_N7)
        if len(rows_N7):
            detections.update_anns(ids=np.arange(1, len(rows_N7) + 1), area=found.areas)
        evaluation = hotcoco.COCOeval(truth, detections, iou_type, lvis_style=True)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.get_results(), np.asarray(evaluation.eval["precision"])[..., 0]


def _run_lvis(dataset: dict[str, Any], found: "_Found", iou_type: str) -> tuple[dict[str, float], np.ndarray]:
    with _official() as (lvis, results, evaluate):
        truth = lvis.LVIS.__new__(lvis.LVIS)  # it reads a file only
        truth.logger, truth.dataset = logging.getLogger(lvis.__name__), dataset
        truth._create_index()
        entries = [{"image_id": image, "category_id": category, "score": score, **shape} for image, category, score, shape in
                   zip(found.images.tolist(), found.categories.tolist(), found.scores.tolist(), found.shapes(iou_type),
                       strict=True)]  # fmt: skip
        if entries:
            detections = results.LVISResults(truth, entries, max_dets=MOST)
        else:  # it fails at an empty list
            detections = results.LVISResults.__new__(results.LVISResults)
            detections.logger, detections.dataset = logging.getLogger(results.__name__), {**dataset, "annotations": []}
            detections._create_index()
        evaluation = evaluate.LVISEval(truth, detections, iou_type)
        evaluation.run()
    return dict(evaluation.get_results()), evaluation.eval["precision"]


class _Numpy:
    """numpy as it was when lvis 0.5.3 was written."""

    float = float

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@contextmanager
def _official() -> Iterator[tuple[Any, Any, Any]]:
    """lvis's three modules, in a state in which they run: ``np.float`` is there for its own module alone, and its warnings
    (of its logger's name, and of results given as a list) are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lvis.eval
        import lvis.lvis
        import lvis.results

        modules = lvis.lvis, lvis.results, lvis.eval
        loggers = [logging.getLogger(module.__name__) for module in modules]
        levels, real = [logger.level for logger in loggers], lvis.eval.np
        try:
            lvis.eval.np = _Numpy()
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield modules
        finally:
            lvis.eval.np = real
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# What they are given


@dataclass(frozen=True)
class _Found:
    """Detections with the engines' ids. ``areas``: of the boxes or the masks; ``rles``: of the masks, else None."""

    images: np.ndarray
    categories: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    rles: list[dict[str, Any]] | None

    def shapes(self, iou_type: str) -> Iterator[dict[str, Any]]:
        if iou_type == "segm":
            return ({"segmentation": dict(rle)} for rle in self.rles or [])
        return ({"bbox": box} for box in self.boxes.tolist())


class _Places:
    """Ids 1, 2, ... in place of the file's, in the same order: an object's id 0 is 'no match' to the official tool, and
    hotcoco's rows are floats."""

    def __init__(self, truth: GroundTruth):
        self.truth = truth
        self.images = {id: place for place, id in enumerate(truth.sizes, 1)}
        self.categories = {id: place for place, id in enumerate(truth.names, 1)}

    def dataset(self, iou_type: str) -> dict[str, Any]:
        truth, masks = self.truth, iou_type == "segm"
        images = [{"id": place, "width": truth.sizes[id][0], "height": truth.sizes[id][1],
                   "neg_category_ids": [self.categories[k] for k in truth.absent[id]],
                   "not_exhaustive_category_ids": [self.categories[k] for k in sorted(truth.open[id])]}
                  for id, place in self.images.items()]  # fmt: skip
        annotations = []
        for thing in truth.objects:
            if masks and thing.segmentation is None:
                continue
            entry = {"id": len(annotations) + 1, "image_id": self.images[thing.image], "iscrowd": 0, "area": thing.area,
                     "category_id": self.categories[thing.category], "bbox": list(thing.box)}  # fmt: skip
            if masks:
                entry["segmentation"] = thing.segmentation
            annotations.append(entry)
        categories = [{"id": place, "name": f"category {place}", "frequency": truth.groups[id]}
                      for id, place in self.categories.items()]  # fmt: skip
        return {"images": images, "annotations": annotations, "categories": categories}

    def columns(self, results: Results, iou_type: str) -> _Found:
        """Detections without area are none: the official tool leaves them out too."""
        import hotcoco

        rles = None
        if iou_type == "segm":
            sizes = [self.truth.sizes[id] for id in results.image_ids.tolist()]
            rles = [{"size": [height, width], "counts": counts}
                    for (width, height), counts in zip(sizes, results.counts or [], strict=True)]  # fmt: skip
            areas = np.array(hotcoco.mask.area(rles), np.float64) if rles else np.empty(0)
            boxes = np.array(hotcoco.mask.to_bbox(rles), np.float64) if rles else np.empty((0, 4))
        else:
            boxes = results.boxes if results.boxes is not None else np.empty((0, 4))
            areas = boxes[:, 2] * boxes[:, 3]
        kept = areas > 0
        images = np.array([self.images[id] for id in results.image_ids.tolist()], np.int64)
        categories = np.array([self.categories[id] for id in results.category_ids.tolist()], np.int64)
        return _Found(images[kept], categories[kept], results.scores[kept], boxes[kept].reshape(-1, 4), areas[kept],
                      None if rles is None else [rle for rle, keep in zip(rles, kept, strict=True) if keep])  # fmt: skip
