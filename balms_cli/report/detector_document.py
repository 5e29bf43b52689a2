"""A detectors' report as one document of plain JSON types: every number that its page, tables and figures show.

Shapes: B photos, N detections or objects, C categories. Fractions from 0 to 1; None where there is nothing to measure; lists
by category are in the order of ``categories``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.manifest import now
from ..engine.header import sha256_of
from ..errors import DataError
from ..metrics.intervals import DRAWS, LEVEL, SEED
from ..reporter import Reporter
from . import run_files
from .detector_chance import (
    Matches,
    accuracy_interval,
    groups_of,
    mean_shares,
    shown,
    swapped_accuracy,
    swapped_differences,
    swaps_of,
)
from .document import plain, unique_names

FORMAT, VERSION = "balms detectors' report", 1
GROUPS = ("r", "c", "f")
KINDS = ("segm", "bbox")  # sentences and figures are of masks where all runs have some
MOST = 10  # gains, and losses, that are listed of a pair of runs


@dataclass(frozen=True)
class Truth:
    """What was scored on. ``ids``, ``names``, ``groups`` (r, c, f) by category; ``photos``: their ids; of each object its photo
    and category as places, and its box x, y, width, height in pixels."""

    path: Path
    sha256: str
    ids: list[int]
    names: list[str]
    groups: list[str]
    photos: list[int]
    sizes: list[tuple[int, int]]
    object_photos: np.ndarray
    object_categories: np.ndarray
    object_boxes: np.ndarray
    left_out: dict[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Found:
    """Detections: photo and category as places [N], scores [N], boxes [N, 4] as x, y, width, height."""

    photos: np.ndarray
    categories: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class DetectorRun:
    """A run or a results file. ``path``: its folder, or the file; ``header``: what the detector says of itself, None of a file;
    ``result``: what ``evaluate --json`` says of it; ``matches`` by bbox and segm; ``at_boxes`` [N, 3]: photo and category as
    places of each true object, and 1 where it is classified right."""

    path: Path
    header: Any
    result: dict[str, Any]
    matches: dict[str, Matches]
    found: Found
    at_boxes: np.ndarray | None = None


def build(truth: Truth, runs: list[DetectorRun], examples: list[dict[str, Any]], why_none: str | None,
          reporter: Reporter | None = None) -> dict[str, Any]:  # fmt: skip
    """The document of ``runs``, the first of which the others are compared with. ``examples``: see
    ``detector_pictures.choose``; ``why_none``: why there are no pictures of them. Raises: DataError where the runs have neither
    boxes nor masks in common."""
    names = unique_names([run.path for run in runs])
    if not (kinds := [kind for kind in KINDS if all(kind in run.result for run in runs)]):
        raise DataError("of these results some have boxes alone and some masks alone: report each by itself")
    kinds.sort(key=lambda kind: not any(run.result[kind]["AP"] for run in runs))  # masks that none finds say nothing
    document = {
        "format": FORMAT, "version": VERSION, "created": now(), "evaluator": runs[0].result["evaluator"],
        "versions": runs[0].result["versions"], "kind": kinds[0],
        "intervals": {"method": "bootstrap over test photos", "level": LEVEL, "draws": DRAWS, "seed": SEED},
        "chance": {"method": "swaps of whole photos between two runs", "most": 1 - LEVEL, "seed": SEED},
        "data": _data(truth),
        "categories": _categories(truth),
        "runs": [_run(run, name, truth) for run, name in zip(runs, names, strict=True)],
        "differences": _differences(truth, runs, names, reporter or Reporter()) if len(runs) > 1 else [],
        "examples": examples, "no_pictures": why_none,
    }  # fmt: skip
    return plain(document)


def _data(truth: Truth) -> dict[str, Any]:
    of_C, objects_C = np.asarray(truth.groups), _counts(truth)[1]

    def group(name: str) -> dict[str, Any]:
        own = np.isin(truth.object_categories, np.flatnonzero(of_C == name))
        tested = int((objects_C[of_C == name] > 0).sum())
        return {"categories": int((of_C == name).sum()), "tested": tested, "objects": int(own.sum()),
                "photos": len(np.unique(truth.object_photos[own])),
                "lone": int((objects_C[of_C == name] == 1).sum()), "one": 1 / tested if tested else None}  # fmt: skip

    return {"name": truth.path.stem, "annotations": str(truth.path), "sha256": truth.sha256, "photos": len(truth.photos),
            "objects": len(truth.object_photos), "tested": int((objects_C > 0).sum()), "left_out": truth.left_out,
            "notes": list(truth.notes), "groups": {name: group(name) for name in GROUPS}}  # fmt: skip


def _counts(truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """Photos with an object, and objects, of each category [C]."""
    pairs = np.unique(np.stack([truth.object_categories, truth.object_photos]), axis=1)
    return (np.bincount(pairs[0], minlength=len(truth.ids)),
            np.bincount(truth.object_categories, minlength=len(truth.ids)))  # fmt: skip


def _categories(truth: Truth) -> list[dict[str, Any]]:
    photos_C, objects_C = _counts(truth)
    return [{"id": id, "name": name, "group": group, "photos": photos, "objects": objects} for id, name, group, photos, objects
            in zip(truth.ids, truth.names, truth.groups, photos_C, objects_C, strict=True)]  # fmt: skip


def _run(run: DetectorRun, name: str, truth: Truth) -> dict[str, Any]:
    header, result = run.header, run.result
    rows = result["per_category"]
    kinds = [kind for kind in KINDS if kind in result]
    return {
        "name": name, "run": str(run.path), "results": result["results"],
        "stage": header.stage if header else "results file", "loss": header and header.loss,
        "classifier": header and header.classifier, "seed": header and header.recipe.get("seed"),
        "detections": result["detections"], "metrics": {kind: result[kind] for kind in kinds},
        "gap": {kind: _gap(result[kind]) for kind in kinds},
        "train_images": [row["train_images"] for row in rows],
        "ap": {kind: [row[kind] for row in rows] for kind in kinds},
        "unfound": {kind: sum(row[kind] == 0 for row in rows) for kind in kinds},
        "true_boxes": None if run.at_boxes is None else _at_boxes(run.at_boxes, truth),
        "recipe": run_files.recipe(run.path, header) if header else {}, "provenance": _provenance(run),
    }  # fmt: skip


def _gap(metrics: dict[str, float | None]) -> dict[str, Any] | None:
    """The most and the least frequent group that were tested; None where there are not two."""
    there = [group for group in GROUPS if metrics[f"AP_{group}"] is not None]
    if len(there) < 2:
        return None
    return {"rare": there[0], "frequent": there[-1], "value": metrics[f"AP_{there[-1]}"] - metrics[f"AP_{there[0]}"]}


def _at_boxes(rows_N3: np.ndarray, truth: Truth) -> dict[str, Any]:
    """Accuracy at the true boxes of each group and of all, with intervals over photos."""
    found: dict[str, Any] = {}
    for name, rows in _by_group(rows_N3, truth).items():
        if not len(rows):
            found[name] = None
            continue
        value, low, high = accuracy_interval(*rows.T, len(truth.photos))
        found[name] = {"value": value, "low": low, "high": high, "objects": len(rows), "right": int(rows[:, 2].sum()),
                       "photos": len(np.unique(rows[:, 0])), "categories": len(np.unique(rows[:, 1]))}  # fmt: skip
    return found


def _by_group(rows_N3: np.ndarray, truth: Truth) -> dict[str, np.ndarray]:
    of_N = np.asarray(truth.groups)[rows_N3[:, 1]]
    return {"all": rows_N3, **{group: rows_N3[of_N == group] for group in GROUPS}}


def _differences(truth: Truth, runs: list[DetectorRun], names: list[str], reporter: Reporter) -> list[dict[str, Any]]:
    found = []
    with reporter.task("telling differences from chance", len(runs) - 1, unit="pair") as task:
        for run, name in zip(runs[1:], names[1:], strict=True):
            found.append(_difference(truth, runs[0], run, names[0], name, len(runs) - 1))
            task.advance()
    return found


def _difference(truth: Truth, first: DetectorRun, run: DetectorRun, against: str, name: str, others: int) -> dict[str, Any]:
    """``run`` minus ``first``."""
    metrics, moved, swaps = {}, {}, {}
    for kind in (kind for kind in KINDS if kind in run.result and kind in first.result):
        swaps[kind] = swaps_of(first.matches[kind], run.matches[kind])
        found = swapped_differences(first.matches[kind], run.matches[kind], groups_of(truth.groups), len(truth.photos))
        metrics[kind] = {metric: found.get(metric) and _judged(*found[metric], others) for metric in groups_of(truth.groups)}
        moved[kind] = _moved(first.result["per_category"], run.result["per_category"], kind)
    return {"run": name, "against": against, "swaps": swaps, "metrics": metrics, "moved": moved,
            "true_boxes": _box_difference(truth, first, run, others)}  # fmt: skip


def _judged(value: float, p: float, others: int) -> dict[str, Any]:
    return {"value": value, "p": p, "shown": shown(p, others)}


def _box_difference(truth: Truth, first: DetectorRun, run: DetectorRun, others: int) -> dict[str, Any] | None:
    """Of the same true boxes, in whatever order the two runs have them."""
    if first.at_boxes is None or run.at_boxes is None:
        return None
    found, before = {}, _by_group(first.at_boxes, truth)
    for group, rows in _by_group(run.at_boxes, truth).items():
        found[group] = None
        if len(rows) and np.array_equal(rows[:, :2], before[group][:, :2]):
            gained = rows[:, 2] - before[group][:, 2]
            found[group] = _judged(*swapped_accuracy(rows[:, 0], mean_shares(rows[:, 1]), gained, len(truth.photos)), others)
    return found


def _moved(before: list[dict[str, Any]], after: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """How many categories went up, down or stayed, and the furthest of them; ``category``: the place in ``categories``."""
    rows = [{"category": c, "before": a[kind], "after": b[kind], "value": b[kind] - a[kind]}
            for c, (a, b) in enumerate(zip(before, after, strict=True)) if a[kind] is not None]  # fmt: skip
    up = sorted((row for row in rows if row["value"] > 0), key=lambda row: -row["value"])
    down = sorted((row for row in rows if row["value"] < 0), key=lambda row: row["value"])
    same = len(rows) - len(up) - len(down)
    return {"up": len(up), "down": len(down), "same": same, "gains": up[:MOST], "losses": down[:MOST]}


def _provenance(run: DetectorRun) -> dict[str, Any]:
    """When, where, by which command and from what a run was made, and how it was scored; None for what is not known."""
    scored = {"scored": run.result["date"], "scored_on": run.result.get("device"), "scored_versions": run.result["versions"],
              "settings": run.result.get("settings")}  # fmt: skip
    if run.header is None:
        return {"sha256": sha256_of(run.path)} | scored
    config, header = run_files.read_config(run.path), run.header
    made = config.get("run") if isinstance(config.get("run"), dict) else {}
    return {
        "created": header.created, "preset": config.get("preset"),
        **{key: made.get(key) for key in ("command", "device", "precision", "versions", "parent")},
        "annotations": header.annotations, "annotations_sha256": header.annotations_sha256,
        "parent_sha256": header.parent_sha256, "backbone": header.architecture.backbone,
        "sha256": run.result.get("sha256"),
    } | scored  # fmt: skip
