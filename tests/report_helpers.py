"""Scored runs without training: logits, a manifest and a header made up in memory, as ``evaluate`` would hand them on."""

from pathlib import Path
from typing import Any

import numpy as np

from balms_cli.data.index import Split
from balms_cli.data.longtail import imbalance_factor
from balms_cli.data.manifest import Manifest
from balms_cli.engine.header import Header
from balms_cli.metrics import Scores, summarise
from balms_cli.report.scored import Scored
from balms_cli.stages.evaluate import statistics


def make_manifest(counts: list[int], labels: np.ndarray, *, names: list[str] | None = None, sha256: str = "a" * 64,
                  root: str = "/nowhere", keys: list[str] | None = None) -> Manifest:  # fmt: skip
    """A folder's manifest: ``counts`` training images a class, and test images with ``labels``."""
    names = names or [f"class {c}" for c in range(len(counts))]
    train = np.repeat(np.arange(len(counts)), counts)
    keys = keys or [f"test/{i}.png" for i in range(len(labels))]
    splits = {"train": Split([f"train/{i}.png" for i in range(len(train))], train), "test": Split(keys, labels)}
    source = {"kind": "folder", "name": "photos", "root": root}
    return Manifest(Path("/nowhere/data"), "photos", source, names, list(counts), splits, "as-is", None,
                    imbalance_factor(counts), 0, sha256, [32, 32])  # fmt: skip


def make_header(manifest: Manifest, *, seed: int = 0, stage: str = "retrain", counts: list[int] | None = None,
                **more: Any) -> Header:  # fmt: skip
    k = len(manifest.classes)
    values = {
        "format": 1, "created": "2026-01-01", "stage": stage, "backbone": "resnet32", "feature_dim": 64, "image_size": 32,
        "classes": manifest.classes, "class_counts": counts or manifest.class_counts, "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2), "head": "linear", "loss": "balanced", "sampler": "instance", "implied_log_prior": [0.0] * k,
        "recipe": {"seed": seed, "lr": 0.1}, "data": {"name": "photos", "source": "photos"}, "manifest": str(manifest.path),
        "manifest_sha256": manifest.sha256, "parent_sha256": "b" * 64 if stage == "retrain" else None,
    }  # fmt: skip
    return Header.model_validate(values | more)


def make_scored(manifest: Manifest, logits: np.ndarray | Scores, *, run: str = "/nowhere/run", header: Header | None = None,
                **more: Any) -> Scored:  # fmt: skip
    """As ``evaluate`` makes it; ``more`` goes into its result."""
    header = header or make_header(manifest)
    labels = manifest.splits["test"].labels
    scores = logits if isinstance(logits, Scores) else Scores.of(logits, labels)
    result = summarise(scores, labels, manifest.classes, header.class_counts)
    one = Scored(Path(run), header, manifest, "test", manifest.classes, scores, labels, header.class_counts, result)
    result |= statistics(one)
    result |= {"run": run, "device": "cpu", "versions": {"balms": "0"}} | more
    return one


def long_tail(k: int, n_max: int = 500, imbalance: float = 200) -> list[int]:
    return [max(1, int(n_max * imbalance ** (-c / max(k - 1, 1)))) for c in range(k)]


def noisy_logits(rng: np.random.Generator, labels: np.ndarray, k: int, margin: float = 1.5) -> np.ndarray:
    return rng.normal(size=(len(labels), k)) + margin * np.eye(k)[labels]
