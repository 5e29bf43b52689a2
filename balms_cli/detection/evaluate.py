"""``balms detect evaluate``: LVIS metrics of detectors and of results files, boxes and masks beside one another.

A detector's categories and the annotations' are matched by name; results carry the annotations' ids.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DetectEvaluateConfig
from ..data.aside import printable
from ..data.manifest import now
from ..engine.distributed import ALONE, World
from ..engine.runtime import Runtime, setup, versions
from ..errors import BalmsError, CheckpointError, ConfigError, DataError, GateError
from ..metrics import Gate
from ..report.document import unique_names
from ..report.write import check_folder
from ..reporter import Reporter
from .annotations import find_annotations, find_images
from .detector import Detector
from .ground_truth import GROUPS, GroundTruth, load_ground_truth
from .header import DetectHeader, read_detect_header
from .per_category import category_rows
from .report import for_report, write_report
from .results import KINDS, Results, read_results
from .scoring import METRICS, official_cost, score

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
        save: Path | None = None, gt_boxes: bool = False, report: Path | None = None, overwrite: bool = False,
        world: World = ALONE) -> DetectEvaluation:  # fmt: skip
    """Score the checkpoints ``files`` and the results files ``results``.

    ``save``: where a single run's results file is written (default: ``results_<annotations>.json`` in each run's folder).
    ``gt_boxes``: also classify the true boxes. ``report``: a folder to write a report to; ``overwrite``: an earlier one may go.
    Gates are held by :func:`hold_gates`, after the result is out.
    Raises: CheckpointError, DataError, ConfigError (a gate that cannot be read, or on an empty group).
    """
    reporter, results = reporter or Reporter(), results or []
    gates = [parse_gate(text) for text in config.require]
    if report is not None:
        world.by_main(lambda: check_folder(report, overwrite=overwrite))
    headers = [read_detect_header(file) for file in files]  # every input is refused before any is scored
    _check_save(save, len(files))
    if results and config.annotations is None:
        raise ConfigError("a results file does not say what it is of: name the annotations by --data")
    inputs = [(path, header, _annotations_of(config, header))
              for path, header in [*zip(files, headers, strict=True), *((path, None) for path in results)]]  # fmt: skip
    if report is not None and len({place for *_, place in inputs}) > 1:
        raise ConfigError("the runs are scored on different annotations, so no report can hold them: name one by --data")
    photos = find_images(inputs[0][2], config.images) if report is not None else None
    truths: dict[Path, GroundTruth] = {}
    for path, header, place in inputs:
        if place not in truths:
            truths[place] = _truth(place, header, config, reporter)
        if header is not None and not {c.name for c in header.categories} & set(truths[place].names.values()):
            what = f"{path.parent} and {printable(place.name)}"
            raise CheckpointError(f"{what} have no category in common: evaluate it on its own")
    scored, told = [], []
    runtime = setup(config.device, config.precision) if files else None
    for path, header, place in inputs:
        truth, found, at_boxes = truths[place], None, None
        if header is not None:
            found, at_boxes = Detector(config, path, header, truth, runtime, reporter, world).look(gt_boxes)

        def finish(path=path, header=header, truth=truth, found=found, at_boxes=at_boxes):
            one, found = _finish(config, path, header, truth, found, runtime, reporter, save)
            if at_boxes is not None:
                one["gt_box_accuracy"] = _accuracy(at_boxes, truth)
            if report is not None:
                told.append(for_report(path, header, one, found, truth, config, at_boxes, several=len(inputs) > 1))
            return one

        scored.append(world.by_main(finish))
    show(scored, reporter)
    for gate in gates:
        for one in scored:
            gate.met_by(flat(one))  # an empty group is told before anything is printed or written as a result
    if report is not None:
        world.by_main(lambda: write_report(told, truth, photos, report, reporter, overwrite=overwrite))
    return DetectEvaluation(scored)


def _check_save(save: Path | None, runs: int) -> None:
    if save is not None and runs != 1:
        raise ConfigError(f"--save-results is one file, for one run: {runs} are evaluated")
    if save is not None and (save.is_dir() or not save.parent.is_dir()):
        raise ConfigError(f"--save-results {save} is a folder, or lies in none: give a file's name in a folder that exists")


def _finish(config: DetectEvaluateConfig, path: Path, header: DetectHeader | None, truth: GroundTruth, found: Results | None,
            runtime: Runtime | None, reporter: Reporter, save: Path | None) -> tuple[dict[str, Any], Results]:  # fmt: skip
    """What is said of a run whose detections are ``found``, or of a results file (``header`` None), which is read."""
    by = {"annotations": str(truth.path), "versions": versions(), "date": now()[:10]}
    if header is None:
        found = read_results(path, truth.sizes, truth.names)
        own = {"run": None, "results": str(path)} | by
    else:
        target = save or path.parent / f"results_{truth.path.stem}.json"
        written = _write(found, target, truth, reporter, asked=save is not None)
        own = {"run": str(path.parent), "results": written and str(written), "stage": header.stage, "loss": header.loss,
               "classifier": header.classifier, "seed": header.recipe.get("seed"),
               "device": runtime.describe(), **by}  # fmt: skip
    return own | _score(found, truth, config, header, reporter), found


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


def names_of(scored: list[dict[str, Any]]) -> list[str]:
    """Short names that tell the runs from one another, on one line each."""
    return [printable(name) for name in unique_names([Path(name_of(one)) for one in scored])]


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

    names = names_of(scored)
    rows = [[name, KINDS[kind], *(percent(one[kind][metric]) for metric in shown)]
            for name, one in zip(names, scored, strict=True) for kind in KINDS if kind in one]  # fmt: skip
    reporter.table("LVIS metrics, in percent (AR: of 300 detections an image)", ["run", "of", *shown], rows)
    with_boxes = [(name, one["gt_box_accuracy"]) for name, one in zip(names, scored, strict=True) if "gt_box_accuracy" in one]
    if with_boxes:
        reporter.table("Accuracy at the true boxes, mean over categories, in percent",
                       ["run", "all", "rare", "common", "frequent", "objects"],
                       [[name, *(percent(found[key]) for key in ("all", *GROUPS)), f"{found['objects']:,}"]
                        for name, found in with_boxes])  # fmt: skip


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


def _accuracy(rows_I3: np.ndarray, truth: GroundTruth) -> dict[str, Any]:
    """Mean over categories of the share of objects that are classified right: of all, and of each group."""
    share = {id: float(rows_I3[rows_I3[:, 1] == id, 2].mean()) for id in np.unique(rows_I3[:, 1]).tolist()}
    by_group = {group: [v for id, v in share.items() if truth.groups[id] == group] for group in GROUPS}
    means = {group: float(np.mean(values)) if values else None for group, values in by_group.items()}
    return {"all": float(np.mean(list(share.values()))) if share else None, **means, "objects": len(rows_I3)}
