"""The report as one document of plain JSON types: every number that the page, the tables and the figures show.

Shapes: N images, C classes. Fractions from 0 to 1; None where there is nothing to measure; lists "by class" are in the
order of ``data.classes``.
"""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..data.aside import printable
from ..data.longtail import shot_groups
from ..data.manifest import now
from ..metrics import GROUPS, SCALARS
from ..metrics.calibration import BINS, calibration
from ..metrics.confusion import confused_pairs, group_confusion, marginal
from ..metrics.intervals import DRAWS, LEVEL, SEED, wilson
from ..metrics.tail import gini, head_share
from . import run_files
from .compare import differences, same_images, seeds
from .html import six_digits
from .scored import Scored

FORMAT, VERSION = "balms report", 1
_EXAMPLES = 3  # images shown of a confused pair


def build(scored: list[Scored]) -> dict[str, Any]:
    """The document of the runs ``scored``, the first of which the others are compared with.

    ``Scored.result`` must hold what ``evaluate`` says of the run, its intervals with it.
    """
    first, names = scored[0], unique_names([one.run for one in scored])
    result, prior = first.result, None
    if "target_prior" in result:
        prior = {"prior": result["target_prior"], "tau": result["posthoc_tau"]}
    return plain({
        "format": FORMAT, "version": VERSION, "created": now(), "split": first.split, "images": len(first.labels_N),
        "device": first.result["device"], "versions": first.result["versions"], "target_prior": prior,
        "intervals": {"method": "stratified bootstrap over test images", "level": LEVEL, "draws": DRAWS, "seed": SEED},
        "data": _data(first),
        "runs": [_run(one, name, first) for one, name in zip(scored, names, strict=True)],
        "differences": differences(scored, names),
        "seeds": seeds(scored, names),
    })  # fmt: skip


def unique_names(runs: list[Path]) -> list[str]:
    """A short name for each run: its folder's, with as many parents as tell it from the others.

    A run that is given twice gets a number.
    """
    paths = [tuple(map(printable, run.resolve().parts)) for run in runs]
    names = ["/".join(parts[-1:]) for parts in paths]
    depth = 1
    while len(set(names)) < len(set(paths)):
        depth += 1
        often = Counter(dict(zip(paths, names, strict=True)).values())
        names = ["/".join(p[-depth:]) if often[name] > 1 else name for p, name in zip(paths, names, strict=True)]
    folders, given = set(names), []
    for name in names:
        again = (f"{name} ({n})" for n in itertools.count(2))
        given.append(name if name not in given else next(one for one in again if one not in folders and one not in given))
    return given


def _data(first: Scored) -> dict[str, Any]:
    manifest, counts = first.manifest, _manifest_counts(first)
    groups_C = np.asarray(shot_groups(counts))

    def group(name: str) -> dict[str, int]:
        of_C = groups_C == name
        return {"classes": int(of_C.sum()), "train_images": int(np.asarray(counts)[of_C].sum()),
                "test_images": int(first.tested_C[of_C].sum())}  # fmt: skip

    return {
        "name": manifest.name, "source": manifest.source["name"], "manifest_sha256": manifest.sha256,
        "profile": manifest.profile, "seed": manifest.seed, "classes": first.classes, "train_counts": counts,
        "test_counts": first.tested_C, "group_of": groups_C, "train_images": sum(counts),
        "imbalance_factor": manifest.imbalance_factor, "gini": gini(counts), "head_share": head_share(counts),
        "groups": {name: group(name) for name in GROUPS}, "splits": {name: len(s) for name, s in manifest.splits.items()},
        "untested": int((first.tested_C == 0).sum()),
    }  # fmt: skip


def _manifest_counts(one: Scored) -> list[int]:
    """Training images a class in the manifest that is scored; a checkpoint may have seen another."""
    place = {name: c for c, name in enumerate(one.manifest.classes)}
    return [one.manifest.class_counts[place[name]] for name in one.classes]


def _run(one: Scored, name: str, first: Scored) -> dict[str, Any]:
    header, result = one.header, one.result
    predicted_C = np.bincount(one.scores.predicted_N, minlength=len(one.classes))
    parent = run_files.parent_of(one.run, header)
    return {
        "name": name, "run": str(one.run), "stage": header.stage, "classifier": header.classifier, "loss": header.loss,
        "sampler": header.sampler, "seed": header.recipe.get("seed"), "prior_exact": header.prior_exact,
        "images": len(one.labels_N), "same_data": header.manifest_sha256 == one.manifest.sha256,
        "same_images": same_images(first, one) is not None,
        **_unless_same(one, first),
        "metrics": {m: result["intervals"][m] and {"value": result[m], "low": result["intervals"][m][0],
                                                   "high": result["intervals"][m][1]} for m in SCALARS},
        "per_class": _per_class(one, predicted_C),
        "never_predicted": int((predicted_C == 0).sum()),
        "trend": _trend(one),
        "marginal": marginal(one.scores.mean_score_C, one.tested_C, one.groups_C),
        "confusion": {"groups": group_confusion(one.labels_N, one.scores.predicted_N, one.groups_C), "pairs": _pairs(one)},
        "calibration": _calibration(one),
        "rates": run_files.learned_rates(one.run, header, one.classes),
        "curves": run_files.curves(one.run, header.stage),
        "parent_curves": run_files.curves(parent[0], parent[1].stage) if parent else None,
        "recipe": run_files.recipe(one.run, header) | run_files.taken_over(header, parent and parent[1]),
        "provenance": run_files.provenance(one.run, header),
    }  # fmt: skip


def _unless_same(one: Scored, first: Scored) -> dict[str, Any]:
    """The run's own training and test counts and groups, where they are not those of ``data``; else None."""
    counts = _manifest_counts(first)
    pairs = {"train_counts": (one.counts_C, counts), "test_counts": (one.tested_C, first.tested_C),
             "group_of": (one.groups_C, shot_groups(counts))}  # fmt: skip
    return {key: None if np.array_equal(ours, theirs) else ours for key, (ours, theirs) in pairs.items()}


def _per_class(one: Scored, predicted_C: np.ndarray) -> dict[str, Any]:
    hits_C = one.per_class(one.right_N)
    low_C, high_C = wilson(hits_C, one.tested_C)
    accuracy_C = np.divide(hits_C, one.tested_C, out=np.full(len(hits_C), np.nan), where=one.tested_C > 0)
    return {"accuracy": accuracy_C, "low": low_C, "high": high_C, "predicted": predicted_C,
            "mean_score": one.scores.mean_score_C}  # fmt: skip


def _trend(one: Scored) -> dict[str, Any] | None:
    """Class accuracy against the logarithm of training images: least squares, and Spearman's rank correlation.

    None where all tested classes have as many training images: there is no trend to see.
    """
    tested_C = one.tested_C > 0
    x_T = np.log10(np.asarray(one.counts_C)[tested_C])
    y_T = one.per_class(one.right_N)[tested_C] / one.tested_C[tested_C]
    if np.unique(x_T).size < 2:
        return None
    dx_T, flat = x_T - x_T.mean(), np.unique(y_T).size == 1
    slope = 0.0 if flat else float(dx_T @ y_T / (dx_T @ dx_T))  # where all are alike not the noise of rounding
    spearman = None
    if not flat:
        from scipy.stats import spearmanr

        spearman = float(spearmanr(x_T, y_T).statistic)
    return {"slope": slope, "intercept": float(y_T.mean() - slope * x_T.mean()), "spearman": spearman}


def _pairs(one: Scored) -> list[dict[str, Any]]:
    """The most confused pairs, each with the images that were mistaken with the highest scores."""
    pairs = confused_pairs(one.labels_N, one.scores.predicted_N, one.classes)
    for pair in pairs:
        rows = np.flatnonzero((one.labels_N == pair["true"]) & (one.scores.predicted_N == pair["predicted"]))
        surest = sorted(rows, key=lambda row: (-one.scores.confidence_N[row], one.keys[row]))[:_EXAMPLES]
        pair["examples"] = [{"key": one.keys[row], "score": float(one.scores.confidence_N[row])} for row in surest]
    return pairs


def _calibration(one: Scored) -> dict[str, Any]:
    def of(rows_N: np.ndarray | slice) -> dict[str, Any] | None:
        return calibration(one.scores.confidence_N[rows_N], one.right_N[rows_N])

    return {"bins": BINS, "all": of(slice(None)), **{group: of(one.groups_C[one.labels_N] == group) for group in GROUPS}}


def plain(value: Any) -> Any:
    """Plain JSON types: arrays as lists, NaN as None, floats with six significant digits, text without control characters."""
    if isinstance(value, dict):
        return {printable(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (float, np.floating)):
        return six_digits(value) if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if value is None or isinstance(value, int):
        return value
    return printable(str(value))  # dates of a TOML file are no JSON, and a folder's name need not be Unicode
