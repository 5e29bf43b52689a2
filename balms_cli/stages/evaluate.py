"""``balms evaluate``: the only place that reads test data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import EvaluateConfig
from ..data.features import extract_all
from ..data.manifest import Manifest, now
from ..engine.checkpoint import load_model
from ..engine.header import read_header
from ..engine.run_dir import manifest_of
from ..engine.runtime import setup, versions
from ..errors import CheckpointError, DataError, GateError
from ..metrics import Gate, summarise
from ..reporter import Reporter
from .common import check_classes, load_images

_SHOWN = 30


@dataclass(frozen=True)
class Evaluation:
    """One result a checkpoint, in the order asked for."""

    runs: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return self.runs[0] if len(self.runs) == 1 else {"runs": self.runs}


def run(config: EvaluateConfig, files: list[Path], data: Path | None = None, reporter: Reporter | None = None) -> Evaluation:
    """Score the checkpoints ``files`` on the test split of their manifest, or of ``data``.

    Raises: CheckpointError, DataError, ConfigError (a gate that cannot be read, or on an empty group). Gates are held by
    :func:`hold_gate`, after the result is out.
    """
    reporter = reporter or Reporter()
    runtime = setup(config.device, config.precision)
    gate = Gate.parse(config.require) if config.require else None
    headers = [read_header(file) for file in files]  # every input is refused before any is scored
    manifests = [manifest_of(file, header, data) for header, file in zip(headers, files, strict=True)]
    for header, manifest, file in zip(headers, manifests, files, strict=True):
        if header.head == "untrained":
            raise CheckpointError(f"{file} has no trained classifier (--frozen): run balms retrain {file.parent} first")
        check_classes(header, manifest, file)
        if config.split not in manifest.splits or not len(manifest.splits[config.split]):
            raise DataError(f"{manifest.path} has no {config.split} images")
        if header.manifest_sha256 != manifest.sha256:
            reporter.warn(f"{file.parent.name} was trained on another draw of the data than {manifest.path.name}")
    loaded: dict[tuple, Any] = {}
    results = [
        _score(config, file, manifest, runtime, loaded, reporter) for file, manifest in zip(files, manifests, strict=True)
    ]
    show(results, reporter)
    if gate:
        for result in results:
            gate.met_by(result)  # an empty group is told before anything is printed as a result
    return Evaluation(results)


def hold_gate(config: EvaluateConfig, evaluation: Evaluation) -> None:
    """Raises GateError (exit 6) for the first run that does not meet ``config.require``."""
    if config.require is None:
        return
    gate = Gate.parse(config.require)
    for result in evaluation.runs:
        if not gate.met_by(result):
            raise GateError(f"--require {gate} is not met: {gate.metric} is {result[gate.metric]:.4f} ({result['run']})")


def _score(config: EvaluateConfig, file: Path, manifest: Manifest, runtime, loaded: dict, reporter: Reporter) -> dict[str, Any]:
    model, header = load_model(file)
    key = (manifest.path, header.image_size)
    if key not in loaded:
        loaded.clear()  # one split in memory at a time
        loaded[key] = load_images(manifest, config.split, header.image_size, torch.device("cpu"), reporter)
    images = loaded[key]
    model.to(runtime.device, memory_format=torch.channels_last)

    def logits(batch: torch.Tensor) -> torch.Tensor:
        with runtime.autocast():
            return model(batch.contiguous(memory_format=torch.channels_last))

    mean, std = (torch.tensor(v, device=runtime.device) for v in (header.mean, header.std))
    logits_NC = extract_all(
        logits, images.pixels, mean, std, batch_size=config.batch_size, reporter=reporter, what=file.parent.name
    )
    # Classes are matched by name: columns into the manifest's order, whatever order the checkpoint has.
    order = [header.classes.index(name) for name in manifest.classes]
    counts = [header.class_counts[c] for c in order]
    result = summarise(logits_NC[:, order].numpy(), images.labels.numpy(), manifest.classes, counts)
    return result | {
        "run": str(file.parent), "stage": header.stage, "loss": header.loss, "sampler": header.sampler,
        "seed": header.recipe["seed"], "split": config.split, "images": len(images.labels), "data": header.data,
        "manifest_sha256": manifest.sha256, "device": runtime.describe(), "versions": versions(), "date": now()[:10],
    }  # fmt: skip


def percent(value: float | None) -> str:
    """How an accuracy is shown: percent with one decimal, an en dash for an empty group."""
    return "–" if value is None else f"{100 * value:.1f}"


def show(results: list[dict[str, Any]], reporter: Reporter) -> None:
    """One table over the runs; for a single run, its classes too."""
    columns = ["run", "top-1", "top-5", "balanced", "many", "medium", "few", "rarest 3"]
    keys = ["top1", "top5", "balanced_accuracy", "many", "medium", "few", "rarest3"]
    first = results[0]
    title = f"{first['data']['name']}, {first['split']} split, {first['images']} images, accuracy %"
    reporter.table(title, columns, [[Path(r["run"]).name, *(percent(r[k]) for k in keys)] for r in results])
    if len(results) == 1:
        rows = sorted(first["per_class"], key=lambda c: -c["train_count"])
        half = _SHOWN // 2
        shown = rows if len(rows) <= _SHOWN else [*rows[:half], None, *rows[-half:]]
        reporter.table("class by class", ["class", "training images", "test images", "accuracy"],
                       [["...", "", "", ""] if c is None else [c["name"], str(c["train_count"]), str(c["test_count"]),
                        percent(c["accuracy"])] for c in shown])  # fmt: skip
