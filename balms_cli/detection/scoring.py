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
from ..report.detector_chance import Matches
from .ground_truth import GroundTruth, load_ground_truth
from .results import MOST, Results, gather, read_results

IouType = Literal["bbox", "segm"]
Engine = Literal["hotcoco", "lvis"]
# Our names, and the engines'. Small is under 32 x 32 pixels of an object's area, large over 96 x 96. Rare, common, frequent: in
# at most 10, at most 100, and more training images.
METRICS = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_s": "APs", "AP_m": "APm", "AP_l": "APl", "AP_r": "APr",
           "AP_c": "APc", "AP_f": "APf", "AR": f"AR@{MOST}", "AR_s": f"ARs@{MOST}", "AR_m": f"ARm@{MOST}",
           "AR_l": f"ARl@{MOST}"}  # fmt: skip
_IMAGES = 1000  # matched at a time


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


def matches(truth: GroundTruth, results: Results, iou_type: IouType) -> Matches:
    """What each detection that counts hit, as hotcoco matches them: the same whichever engine the scores are of. Images and
    categories are places in ``truth.sizes`` and ``truth.names``. Raises: DataError, as :func:`score`."""
    import hotcoco

    places, best = _Places(truth), results.best()
    columns: list[tuple] = []
    objects_C = np.zeros(len(truth.names), np.int64)
    with redirect_stdout(io.StringIO()):
        evaluation = hotcoco.COCOeval(*_hotcoco_pair(places.dataset(iou_type), places.columns(best, iou_type)), iou_type,
                                      lvis_style=True)  # fmt: skip
        evaluation.params.area_rng, evaluation.params.area_rng_lbl = [[0.0, 1e10]], ["all"]
        for first in range(1, len(truth.sizes) + 1, _IMAGES):  # what is matched comes as Python's objects
            evaluation.params.img_ids = list(range(first, min(first + _IMAGES, len(truth.sizes) + 1)))
            evaluation.evaluate()
            for one in filter(None, evaluation.eval_imgs):
                c, count = one["category_id"] - 1, len(one["dtScores"])
                objects_C[c] += np.count_nonzero(~np.asarray(one["gtIgnore"], bool))
                if count:
                    right_NT, ignored_NT = (np.array(one[key], bool).T for key in ("dtMatched", "dtIgnore"))
                    columns.append((np.full(count, one["image_id"] - 1), np.full(count, c), np.array(one["dtScores"]),
                                    right_NT & ~ignored_NT, ~right_NT & ~ignored_NT))  # fmt: skip
    none = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty((0, 10), bool), np.empty((0, 10), bool))
    return Matches(*(np.concatenate(parts) for parts in zip(none, *columns, strict=True)), objects_C)


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
        evaluation = hotcoco.COCOeval(*_hotcoco_pair(dataset, found), iou_type, lvis_style=True)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.get_results(), np.asarray(evaluation.eval["precision"])[..., 0]


def _hotcoco_pair(dataset: dict[str, Any], found: "_Found") -> tuple[Any, Any]:
    """Its ground truth and detections."""
    import hotcoco

    truth = hotcoco.COCO(dataset)
    rows_N7 = np.column_stack([found.images, found.boxes, found.scores, found.categories])
    detections = truth.load_res(rows_N7, segmentation=found.rles) if found.rles else truth.load_res(rows_N7)
    if len(rows_N7):
        detections.update_anns(ids=np.arange(1, len(rows_N7) + 1), area=found.areas)
    return truth, detections


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
        unsure = {id: set(of) for id, of in truth.open.items()}
        for thing in truth.objects if masks else []:
            if thing.segmentation is None:  # there, but nobody can say where: what is found of it there is not wrong
                unsure[thing.image].add(thing.category)
        images = [{"id": place, "width": truth.sizes[id][0], "height": truth.sizes[id][1],
                   "neg_category_ids": [self.categories[k] for k in truth.absent[id]],
                   "not_exhaustive_category_ids": [self.categories[k] for k in sorted(unsure[id])]}
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
