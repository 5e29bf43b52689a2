"""What a run's own folder says beside its weights: training curves, learned rates, the recipe and where it came from.

A run may come from a stranger or lie half moved: a file that is missing, too large or not what it should be counts as
not there, and the report does without it.
"""

import json
import tomllib
from pathlib import Path
from typing import Any

from ..engine.header import Header, read_header, sha256_of
from ..engine.run_dir import CONFIG, METRICS, MODEL, RATES
from ..errors import BalmsError

_MAX_BYTES = {CONFIG: 500_000, METRICS: 50_000_000, RATES: 5_000_000}  # each many times what balms writes
# What reading such a file raises where it is not what it should be; deep nesting and 1e999 for a step included.
_NOT_OURS = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)
_MOST_POINTS = 500  # of a curve: more than a figure is wide
_OF_TRAINING = ("steps", "epochs", "lr", "warmup_steps", "warmup_lr", "momentum", "nesterov", "weight_decay", "loss", "sampler",
                "drw", "drw_start")  # fmt: skip
_LARGEST = 1e100  # what is larger, or not a number, no figure can show


def read_config(run: Path) -> dict[str, Any]:
    """The content of ``config.toml``; empty where there is none that can be read."""
    try:
        return tomllib.loads(_read(run / CONFIG))
    except _NOT_OURS:
        return {}


def parent_of(run: Path, header: Header) -> tuple[Path, Header] | None:
    """Folder and header of the stage-1 run that a classifier was trained on, where it still is what it was."""
    place = _table(read_config(run), "run").get("parent")
    if header.parent_sha256 is None or not isinstance(place, str):
        return None
    for file in (Path(place), run.parent / Path(place).parent.name / MODEL):  # the second: moved together with its child
        try:
            if file.is_file() and sha256_of(file) == header.parent_sha256:
                return file.parent, read_header(file)
        except (*_NOT_OURS, BalmsError):
            continue
    return None


def curves(run: Path, stage: str) -> dict[str, Any] | None:
    """``metrics.jsonl`` as lists: step, loss, lr, evenly thinned to 500 points with the last kept; without points that are
    not numbers, as a loss that was not finite."""
    try:
        lines = [json.loads(line) for line in _read(run / METRICS).splitlines()]
        points = [(int(p["step"]), float(p["loss"]), float(p["lr"])) for p in lines if _shown(p["loss"], p["lr"], p["step"])]
    except _NOT_OURS:
        return None
    stride = -(-len(points) // _MOST_POINTS) or 1
    points = points[::-1][::stride][::-1]
    if not points:
        return None
    steps, losses, rates = (list(column) for column in zip(*points, strict=True))
    return {"stage": stage, "step": steps, "loss": losses, "lr": rates}


def learned_rates(run: Path, header: Header, classes: list[str]) -> dict[str, Any] | None:
    """What a meta-learner found, in the order of ``classes``; None where the run had none."""
    try:
        document = json.loads(_read(run / RATES))
        values = [float(document["rates"][name]) for name in classes]
    except _NOT_OURS:
        return None
    if not _shown(*values):
        return None
    mean = sum(values) / len(values)
    return {"kind": "class weights" if "reweigher" in header.sampler else "sample rates", "values": values,
            "variance": sum((v - mean) ** 2 for v in values) / len(values)}  # fmt: skip


def recipe(run: Path, header: Header) -> dict[str, dict[str, Any]]:
    """Every value of the run's configuration and the layer it came from (default, preset, file, flag).

    Without ``config.toml`` the values are the checkpoint header's, whose sources are not known: None. A classifier that was
    made without training has none of training.
    """
    config = read_config(run)
    values, sources = _table(config, header.stage), _table(config, "source")
    if not values:
        values, sources = header.recipe, {}
    unused = _OF_TRAINING if header.stage == "retrain" and header.classifier in ("tau-norm", "ncm") else ()
    return {key: {"value": value, "source": sources.get(key)} for key, value in values.items() if key not in unused}


def taken_over(header: Header, parent: Header | None) -> dict[str, dict[str, Any]]:
    """What a classifier of stage 2 has from stage 1, as entries of its recipe: the network, and what its weights began
    with where ``parent``, the stage-1 run's header, is known."""
    if header.stage != "retrain":
        return {}
    values = {"backbone": header.backbone, "image_size": header.image_size}
    if parent is not None and "weights" in parent.recipe:
        values["weights"] = parent.recipe["weights"]
    return {key: {"value": value, "source": "stage 1"} for key, value in values.items()}


def provenance(run: Path, header: Header) -> dict[str, Any]:
    """When, where, by which command and from what a run was made; None for what is not known."""
    config = read_config(run)
    made = _table(config, "run")
    return {
        "created": header.created, "command": made.get("command"), "device": made.get("device"),
        "precision": made.get("precision"), "versions": _table(made, "versions"), "manifest": header.manifest,
        "manifest_sha256": header.manifest_sha256, "parent": made.get("parent"), "parent_sha256": header.parent_sha256,
        "preset": config.get("preset"),
    }  # fmt: skip


def _read(path: Path) -> str:
    if not path.is_file() or path.stat().st_size > _MAX_BYTES[path.name]:
        raise ValueError(f"{path} is no file, or too large")
    return path.read_text(encoding="utf-8")


def _shown(*values: Any) -> bool:
    return all(abs(value) <= _LARGEST for value in values)


def _table(document: dict[str, Any], name: str) -> dict[str, Any]:
    found = document.get(name)
    return found if isinstance(found, dict) else {}
