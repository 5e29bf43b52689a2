"""Several runs side by side: which difference is real, and what other seeds would have given.

Runs on the same images are compared image by image, which is far sharper than two intervals. Runs that agree in all but
seeds are one method: their mean and its standard error, with the name of what varied.
"""

import json
from typing import Any

import numpy as np

from ..config import COMPUTING
from ..metrics import SCALARS
from ..metrics.accuracy import metric_weights
from ..metrics.intervals import Bounds, paired_intervals
from .run_files import parent_of
from .scored import Scored

_NOT_THE_METHOD = COMPUTING | {"seed"}  # which is what may vary


def same_images(first: Scored, other: Scored) -> np.ndarray | None:
    """Rows [N] of ``other`` in the order of ``first``'s images, or None where the two were not scored on the same images.

    Images are the same by their keys in the same source, with the same labels. Files of two folders with equal names may
    differ, so there the folders must be one.
    """
    a, b = first.manifest.source, other.manifest.source
    known = a["kind"] in ("digits", "cifar")  # the same wherever it lies
    one_source = (a["kind"], a["name"]) == (b["kind"], b["name"]) and (known or a["root"] == b["root"])
    same_index = first.manifest.sha256 == other.manifest.sha256 and first.split == other.split
    if not (one_source or same_index) or len(first.keys) != len(other.keys):
        return None
    row_of = {key: row for row, key in enumerate(other.keys)}
    try:
        rows_N = np.array([row_of[key] for key in first.keys], dtype=np.int64)
    except KeyError:
        return None
    return rows_N if np.array_equal(first.labels_N, other.labels_N[rows_N]) else None


def difference(first: Scored, other: Scored) -> Bounds | None:
    """``other`` minus ``first``, a metric each with its 95 % interval; None where the images differ.

    A metric over other classes in the two (their training counts, so their groups, differ) is None.
    """
    rows_N = same_images(first, other)
    if rows_N is None:
        return None

    def moved(before_N: np.ndarray, after_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return first.per_class(after_N & ~before_N), first.per_class(before_N & ~after_N)

    found = paired_intervals(first.counts_C, first.tested_C, moved(first.right_N, other.right_N[rows_N]),
                             moved(first.right5_N, other.right5_N[rows_N]))  # fmt: skip
    ours, theirs = (metric_weights(run.counts_C, run.tested_C) for run in (first, other))
    return {m: bounds if _same(ours[m], theirs[m]) else None for m, bounds in found.items()}


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and np.array_equal(a, b)


def differences(scored: list[Scored], names: list[str]) -> list[dict[str, Any]]:
    """Each further run on the first run's images against the first. ``real``: the interval leaves out 0."""
    found = [(name, difference(scored[0], run)) for name, run in zip(names[1:], scored[1:], strict=True)]
    return [
        {"run": name, "against": names[0], "metrics": {m: b and _with_verdict(b) for m, b in bounds.items()}}
        for name, bounds in found if bounds is not None
    ]  # fmt: skip


def _with_verdict(bounds: tuple[float, float, float]) -> dict[str, Any]:
    value, low, high = bounds
    return {"value": value, "low": low, "high": high, "real": low > 0 or high < 0}


def seeds(scored: list[Scored], names: list[str]) -> list[dict[str, Any]]:
    """Groups of two or more runs that agree in all but seeds: mean and standard error of every metric, and what varied."""
    groups: dict[str, dict[tuple, tuple[str, Scored, int | None]]] = {}
    for name, run in zip(names, scored, strict=True):
        method, parent_seed = _method(run)
        lot = (run.header.manifest_sha256, run.header.parent_sha256, run.header.recipe.get("seed"))
        groups.setdefault(method, {}).setdefault(lot, (name, run, parent_seed))  # a run given twice counts once
    found = []
    for members in groups.values():
        if len(members) < 2:
            continue
        runs = [run for _, run, _ in members.values()]
        found.append({
            "label": label(runs[0]), "runs": [name for name, _, _ in members.values()],
            "varied": _varied(list(members), [seed for _, _, seed in members.values()], runs[0].header.stage),
            "metrics": {metric: _mean_and_error([run.result[metric] for run in runs]) for metric in SCALARS},
        })  # fmt: skip
    return found


def label(run: Scored) -> str:
    """A method in a few words: stage, classifier, loss, sampler."""
    header = run.header
    parts = [header.stage, header.classifier if header.classifier != header.loss else "", header.loss,
             header.sampler if header.sampler not in ("instance", "none") else ""]  # fmt: skip
    return ", ".join(part for part in parts if part)


def _method(run: Scored) -> tuple[str, int | None]:
    """A key that runs of one method share, and the seed of the backbone.

    A classifier's method holds that of its backbone. Where the backbone's run is gone, only its checkpoint itself is known.
    """
    header, parent = run.header, parent_of(run.run, run.header)
    below = [header.parent_sha256]
    if parent is not None:
        below = [parent[1].stage, parent[1].backbone, parent[1].loss, parent[1].sampler, _values(parent[1].recipe)]
    counts = sorted(zip(run.classes, run.counts_C, strict=True))
    key = [header.stage, header.backbone, header.loss, header.sampler, header.classifier, _values(header.recipe),
           header.data.get("source"), counts, below]  # fmt: skip
    return json.dumps(key, sort_keys=True, default=str), parent[1].recipe.get("seed") if parent is not None else None


def _values(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in _NOT_THE_METHOD}


def _varied(lots: list[tuple], parent_seeds: list[int | None], stage: str) -> str:
    """Which randomness the mean is over. ``lots``: manifest, parent checkpoint and own seed of each run."""
    manifests, parents, seeds_ = (set(column) for column in zip(*lots, strict=True))
    names = ["data draws"] if len(manifests) > 1 else []
    if stage == "pretrain":
        return " and ".join([*names, "backbone seeds"] if len(seeds_) > 1 else names)
    # Another draw of the data makes another backbone; that its seed varied too is a thing of its own.
    if len(parents) > 1 and (len(manifests) == 1 or len(set(parent_seeds)) > 1):
        names.append("backbone seeds")
    return " and ".join([*names, "classifier seeds"] if len(seeds_) > 1 else names)


def _mean_and_error(values: list[float | None]) -> dict[str, Any] | None:
    if any(value is None for value in values):
        return None
    return {"mean": float(np.mean(values)), "error": float(np.std(values, ddof=1) / len(values) ** 0.5), "n": len(values)}
