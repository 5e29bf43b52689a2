"""``balms detect evaluate``: LVIS metrics of detectors and of results files, boxes and masks beside one another.

A detector's categories and the annotations' are matched by name; results carry the annotations' ids.

Shapes: B images, N detections, C categories, D features.
"""

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import DetectEvaluateConfig
from ..data.aside import name_some, printable
from ..data.manifest import now
from ..engine.distributed import ALONE, World
from ..engine.runtime import Runtime, setup, versions
from ..errors import BalmsError, CheckpointError, ConfigError, DataError, GateError
from ..metrics import Gate
from ..reporter import Reporter
from .annotations import Annotations, find_annotations, find_images, load_annotations
from .dataset import DetectImages, Example
from .ground_truth import GROUPS, GroundTruth, load_ground_truth
from .header import DetectHeader, read_detect_header
from .model import detect, load_detector, paste_rle, set_detections
from .per_category import category_rows
from .results import Results, read_results, rounded
from .scoring import METRICS, official_cost, score

KINDS = {"bbox": "boxes", "segm": "masks"}
GATES = (*METRICS, *(f"{kind}.{metric}" for kind in KINDS for metric in METRICS))
_SLOW = 60  # seconds


@dataclass(frozen=True)
class DetectEvaluation:
    """What was found of each run and results file, in the order asked for: one dictionary each."""

    scored: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return self.scored[0] if len(self.scored) == 1 else {"runs": self.scored}


def parse_gate(text: str) -> Gate:
    """A gate on a metric of detection: ``AP_r>=0.10`` is of masks where there are some, ``bbox.AP_r>=10%`` of boxes."""
    return Gate.parse(text, GATES, "'AP_r>=0.10', or 'bbox.AP_r>=10%'")


def run(config: DetectEvaluateConfig, files: list[Path], results: list[Path] | None = None, reporter: Reporter | None = None, *,
        save: Path | None = None, gt_boxes: bool = False, world: World = ALONE) -> DetectEvaluation:  # fmt: skip
    """Score the checkpoints ``files`` and the results files ``results``.

    ``save``: where a single run's results file is written (default: ``results_<annotations>.json`` in each run's folder).
    ``gt_boxes``: also classify the true boxes. Gates are held by :func:`hold_gates`, after the result is out.
    Raises: CheckpointError, DataError, ConfigError (a gate that cannot be read, or on an empty group).
    """
    reporter, results = reporter or Reporter(), results or []
    gates = [parse_gate(text) for text in config.require]
    headers = [read_detect_header(file) for file in files]  # every input is refused before any is scored
    if save is not None and len(files) != 1:
        raise ConfigError(f"--save-results is one file, for one run: {len(files)} are evaluated")
    if results and config.annotations is None:
        raise ConfigError("a results file does not say what it is of: name the annotations by --data")
    places = [_annotations_of(config, header) for header in headers]
    truths: dict[Path, GroundTruth] = {}
    for place, header in [*zip(places, headers, strict=True), *((_annotations_of(config, None), None) for _ in results)]:
        if place not in truths:
            truths[place] = _truth(place, header, config, reporter)
    scored, runtime = [], setup(config.device, config.precision) if files else None
    for file, header, place in zip(files, headers, places, strict=True):
        truth = truths[place]
        detector = _Detector(config, file, header, truth, runtime, reporter, world)
        found, accuracy = detector.look(gt_boxes)
        target = save or file.parent / f"results_{place.stem}.json"

        def finish(found=found, target=target, file=file, header=header, truth=truth, place=place, accuracy=accuracy):
            written = _write(found, target, truth, reporter, asked=save is not None)
            own = {"run": str(file.parent), "results": written and str(written)} | _provenance(header, runtime, place)
            return own | _score(found, truth, config, header, reporter) | accuracy

        scored.append(_by_main(finish, world))
    for path in results:
        place = _annotations_of(config, None)

        def finish(path=path, truth=truths[place], place=place):
            found = read_results(path, truth.sizes, truth.names)
            own = {"run": None, "results": str(path), "annotations": str(place), "versions": versions(), "date": now()[:10]}
            return own | _score(found, truth, config, None, reporter)

        scored.append(_by_main(finish, world))
    show(scored, reporter)
    for gate in gates:
        for one in scored:
            gate.met_by(flat(one))  # an empty group is told before anything is printed as a result
    return DetectEvaluation(scored)


def hold_gates(config: DetectEvaluateConfig, evaluation: DetectEvaluation) -> None:
    """All of ``config.require`` must be met by every run. Raises GateError (exit 6), which names each gate that is not."""
    told = []
    for gate in map(parse_gate, config.require):
        missed = [f"{flat(one)[gate.metric]:.6g} ({name_of(one)})" for one in evaluation.scored if not gate.met_by(flat(one))]
        if missed:
            told.append(f"--require {gate} is not met: {gate.metric} is {', '.join(missed)}")
    if told:
        raise GateError("; ".join(told))


def name_of(one: dict[str, Any]) -> str:
    return one["run"] or one["results"]


def flat(one: dict[str, Any]) -> dict[str, float | None]:
    """Metrics by the names of gates. Without a kind, those of masks where masks were scored."""
    default = one.get("segm") or one["bbox"]
    both = {f"{kind}.{metric}": one.get(kind, {}).get(metric) for kind in KINDS for metric in METRICS}
    return both | dict(default)


def show(scored: list[dict[str, Any]], reporter: Reporter) -> None:
    """Boxes and masks of each run in one table, in percent."""
    shown = [metric for metric in METRICS if not metric.startswith("AR_")]

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    names = [printable(Path(name_of(one)).name) for one in scored]
    rows = [[name, KINDS[kind], *(percent(one[kind][metric]) for metric in shown)]
            for name, one in zip(names, scored, strict=True) for kind in KINDS if kind in one]  # fmt: skip
    reporter.table("LVIS metrics, in percent (AR: of 300 detections an image)", ["run", "of", *shown], rows)
    with_boxes = [(name, one["gt_box_accuracy"]) for name, one in zip(names, scored, strict=True) if "gt_box_accuracy" in one]
    if with_boxes:
        reporter.table("Accuracy at the true boxes, mean over categories, in percent",
                       ["run", "all", "rare", "common", "frequent", "objects"],
                       [[name, *(percent(found[key]) for key in ("all", *GROUPS)), f"{found['objects']:,}"]
                        for name, found in with_boxes])  # fmt: skip


def _by_main(finish, world: World) -> dict[str, Any]:
    """What process 0 makes of it, in all of them: one scores, and where it fails all stop."""
    problem, made = None, None
    if world.main:
        try:
            made = finish()
        except BalmsError as error:
            problem = error
    problem, made = world.agree((problem, made))
    if problem is not None:
        raise problem
    return made


def _annotations_of(config: DetectEvaluateConfig, header: DetectHeader | None) -> Path:
    where = config.annotations if config.annotations is not None else Path(header.annotations).parent
    try:
        return find_annotations(where, "val").resolve()
    except DataError as error:
        if config.annotations is not None:
            raise
        raise DataError(f"{error}; name the annotations to score on by --data") from None


def _truth(place: Path, header: DetectHeader | None, config: DetectEvaluateConfig, reporter: Reporter) -> GroundTruth:
    # Where the file itself does not say, the groups are those of the training images.
    truth = load_ground_truth(place, by_name={c.name: c.frequency for c in header.categories} if header is not None else None)
    for note in truth.notes:
        reporter.warn(f"{place.name}: {note}")
    if truth.left_out:
        told = ", ".join(f"{count:,} {what}" for what, count in truth.left_out.items())
        reporter.note(f"{place.name}: not scored on: {told}")
    seconds, gigabytes = official_cost(truth)
    if config.evaluator == "lvis" and seconds > _SLOW:
        reporter.warn(f"the official tool takes about {seconds / 60:.0f} minutes and {gigabytes:.0f} GB here, for boxes and "
                      "again for masks; --evaluator hotcoco gives the same numbers")  # fmt: skip
    return truth


def _score(found: Results, truth: GroundTruth, config: DetectEvaluateConfig, header: DetectHeader | None, reporter: Reporter
           ) -> dict[str, Any]:  # fmt: skip
    kinds = [kind for kind in found.iou_types if kind == "bbox" or truth.has_masks]
    if header is not None and not header.architecture.masks:
        kinds = ["bbox"]
    if not kinds:
        raise DataError(f"the results have masks alone and {truth.path.name} has none: nothing can be scored")
    if not len(found):
        reporter.warn("nothing was detected: all scores are zero")
    scores = {kind: score(truth, found, kind, config.evaluator) for kind in kinds}
    return {"evaluator": config.evaluator, "images": len(truth.sizes), "detections": len(found),
            **{kind: one.metrics for kind, one in scores.items()},
            "per_category": category_rows(truth, {kind: one.per_category for kind, one in scores.items()}, header)}  # fmt: skip


def _write(found: Results, target: Path, truth: GroundTruth, reporter: Reporter, *, asked: bool) -> Path | None:
    try:
        found.write(target, truth.sizes)
    except BalmsError as error:  # a run's folder that cannot be written to is no reason to lose the scores
        if asked:
            raise
        reporter.warn(f"{error} (--save-results FILE)")
        return None
    reporter.note(f"results: {target}, {len(found):,} detections as LVIS has them")
    return target


def _provenance(header: DetectHeader, runtime: Runtime, place: Path) -> dict[str, Any]:
    return {"stage": header.stage, "loss": header.loss, "classifier": header.classifier, "seed": header.recipe.get("seed"),
            "annotations": str(place), "device": runtime.describe(), "versions": versions(), "date": now()[:10]}  # fmt: skip


class _Detector:
    """One checkpoint and the images that it is shown: each process looks at its part of them."""

    def __init__(self, config: DetectEvaluateConfig, file: Path, header: DetectHeader, truth: GroundTruth, runtime: Runtime,
                 reporter: Reporter, world: World):  # fmt: skip
        self.config, self.file, self.header, self.truth = config, file, header, truth
        self.runtime, self.reporter, self.world = runtime, reporter, world
        self.id_of = {name: id for id, name in truth.names.items()}
        self.ids_C = np.array([self.id_of.get(c.name, -1) for c in header.categories], np.int64)  # by label - 1
        self._tell_of_categories()
        self.annotations: Annotations = load_annotations(truth.path, masks=False, every_image=True)
        images = config.images if config.images is not None else find_images(truth.path, None)
        self.images = DetectImages(self.annotations, images, masks=False, workers=config.workers)
        self.model = set_detections(load_detector(file)[0], config).to(runtime.device)

    def _tell_of_categories(self) -> None:
        own, name = {c.name for c in self.header.categories}, printable(self.truth.path.name)
        if not own & self.id_of.keys():
            raise CheckpointError(f"{self.file.parent} and {name} have no category in common: evaluate it on its own")
        if extra := sorted(own - self.id_of.keys()):
            self.reporter.note(f"{len(extra)} of the detector's categories are not in {name}, and are left out: "
                               f"{name_some([printable(n) for n in extra], 3)}")  # fmt: skip
        present = {id for id, count in self.truth.image_counts().items() if count}
        if unknown := sorted(n for n, id in self.id_of.items() if n not in own and id in present):
            self.reporter.note(f"{len(unknown)} categories of {name} were not in the training images, and score zero: "
                               f"{name_some([printable(n) for n in unknown], 3)}")  # fmt: skip

    def look(self, gt_boxes: bool) -> tuple[Results, dict[str, Any]]:
        """All detections, in every process, and the accuracy at the true boxes where that is wanted."""
        mine = range(len(self.images))[self.world.rows(len(self.images))]
        batches = [list(mine[k : k + self.config.batch_size]) for k in range(0, len(mine), self.config.batch_size)]
        parts, right = [], []
        name = self.file.parent.name
        with closing(self.images.reader(lambda k: batches[k], len(batches))) as read, \
                self.reporter.task(name, len(mine), "image") as task:  # fmt: skip
            for k, batch in enumerate(batches):
                samples = read(k)
                parts += [self._detections(*pair) for pair in zip(batch, self._answers(samples), strict=True)]
                if gt_boxes:
                    right += [self._right_at_true_boxes(*pair) for pair in zip(batch, samples, strict=True)]
                task.advance(len(batch))
        found = self._gathered(parts)
        return found, {"gt_box_accuracy": self._accuracy(right)} if gt_boxes else {}

    def _pixels(self, sample: Example) -> Tensor:
        return sample[0].to(self.runtime.device).float() / 255

    def _answers(self, samples: list[Example]) -> list[dict[str, Tensor]]:
        with torch.no_grad(), self.runtime.autocast():
            answers = detect(self.model, [self._pixels(sample) for sample in samples])
        return [{name: value.float().cpu() if value.is_floating_point() else value.cpu() for name, value in answer.items()}
                for answer in answers]  # fmt: skip

    def _detections(self, i: int, answer: dict[str, Tensor]) -> Results:
        image = self.annotations.images[i]
        ids_N = self.ids_C[answer["labels"].numpy() - 1]
        kept_N = np.flatnonzero(ids_N >= 0)
        kept = torch.from_numpy(kept_N)
        boxes = answer["boxes"][kept]
        counts = None
        if "masks_28" in answer:
            counts = [rle["counts"] for rle in paste_rle(answer["masks_28"][kept], boxes, image.height, image.width)]
        boxes_N4 = boxes.double().numpy()
        boxes_N4 = np.concatenate([boxes_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]], 1)
        scores_N, boxes_N4 = rounded(answer["scores"][kept].numpy(), boxes_N4)
        return Results(np.full(len(kept_N), image.id, np.int64), ids_N[kept_N], scores_N, boxes_N4, counts)

    def _gathered(self, parts: list[Results]) -> Results:
        def together(columns: list[np.ndarray], dtype: type, *shape: int) -> np.ndarray:
            own = np.concatenate([np.empty((0, *shape), dtype), *columns])
            return self.world.gather_rows(torch.from_numpy(own)).numpy()

        counts = None
        if self.header.architecture.masks:
            texts = [text for part in parts for text in part.counts or []]
            lengths = together([np.array([len(text) for text in texts], np.int64)], np.int64)
            letters = together([np.frombuffer("".join(texts).encode("ascii"), np.uint8)], np.uint8).tobytes().decode("ascii")
            ends = lengths.cumsum()
            counts = [letters[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]
        return Results(together([p.image_ids for p in parts], np.int64), together([p.category_ids for p in parts], np.int64),
                       together([p.scores for p in parts], np.float64), together([p.boxes for p in parts], np.float64, 4),
                       counts)  # fmt: skip

    def _right_at_true_boxes(self, i: int, sample: Example) -> np.ndarray:
        """[I, 2]: category id, and 1 where the true box is classified right. Of the categories alone: background is none.

        Objects of categories that the detector does not know are wrong.
        """
        _, target = sample
        if not len(target["boxes"]):
            return np.empty((0, 2), np.int64)
        true_I = np.array([self.annotations.categories[label - 1].id for label in target["labels"].tolist()], np.int64)
        heads, device = self.model.roi_heads, self.runtime.device
        with torch.no_grad(), self.runtime.autocast():
            batch, [moved] = self.model.transform([self._pixels(sample)], [{"boxes": target["boxes"].to(device)}])
            features = self.model.backbone(batch.tensors)
            pooled = heads.box_roi_pool(features, [moved["boxes"]], batch.image_sizes)
            logits, _ = heads.box_predictor(heads.box_head(pooled))
        best_I = (logits if heads.sigmoid else logits[:, 1:]).float().argmax(1).cpu().numpy()
        return np.stack([true_I, (self.ids_C[best_I] == true_I).astype(np.int64)], 1)

    def _accuracy(self, parts: list[np.ndarray]) -> dict[str, Any]:
        """Mean over categories of the share of objects that are classified right: of all, and of each group."""
        own = np.concatenate([np.empty((0, 2), np.int64), *parts])
        rows_I2 = self.world.gather_rows(torch.from_numpy(own)).numpy()
        share = {id: float(rows_I2[rows_I2[:, 0] == id, 1].mean()) for id in np.unique(rows_I2[:, 0]).tolist()}
        by_group = {group: [v for id, v in share.items() if self.truth.groups[id] == group] for group in GROUPS}
        means = {group: float(np.mean(values)) if values else None for group, values in by_group.items()}
        return {"all": float(np.mean(list(share.values()))) if share else None, **means, "objects": len(rows_I2)}
