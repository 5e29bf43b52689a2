"""``balms evaluate``: the only place that reads test data."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..bound import bound_terms
from ..config import EvaluateConfig
from ..data.features import extract_all
from ..data.manifest import Manifest, now
from ..engine.checkpoint import load_model
from ..engine.distributed import ALONE, World
from ..engine.header import Header, read_header
from ..engine.run_dir import manifest_of
from ..engine.runtime import Runtime, setup, versions
from ..errors import CheckpointError, DataError, GateError
from ..metrics import Gate, Scores, summarise
from ..metrics.calibration import calibration
from ..metrics.intervals import accuracy_intervals
from ..models.classifiers import Classifier
from ..report.scored import Scored
from ..reporter import Reporter
from .common import Images, check_classes, load_images
from .evaluate_show import percent, show, show_bound
from .prior import adjustment


@dataclass(frozen=True)
class Evaluation:
    """What was found of each checkpoint, in the order asked for."""

    scored: list[Scored]

    @property
    def runs(self) -> list[dict[str, Any]]:
        return [one.result for one in self.scored]

    def to_json(self) -> dict[str, Any]:
        return self.runs[0] if len(self.runs) == 1 else {"runs": self.runs}


def run(config: EvaluateConfig, files: list[Path], data: Path | None = None, reporter: Reporter | None = None, *,
        world: World = ALONE) -> Evaluation:  # fmt: skip
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
    for header in headers:
        adjustment(config, header)
    cache = _Cache(config, runtime, reporter, world)
    scored = [
        _score(config, file, manifest, manifests[0].classes, runtime, cache, reporter)
        for file, manifest in zip(files, manifests, strict=True)
    ]
    results = [one.result for one in scored]
    show(results, reporter)
    for result in results:
        if "bound" in result:
            show_bound(result, reporter)
    if gate:
        for result in results:
            gate.met_by(result)  # an empty group is told before anything is printed as a result
    return Evaluation(scored)


def hold_gate(config: EvaluateConfig, evaluation: Evaluation) -> None:
    """Raises GateError (exit 6) for the first run that does not meet ``config.require``."""
    if config.require is None:
        return
    gate = Gate.parse(config.require)
    for result in evaluation.runs:
        if not gate.met_by(result):
            raise GateError(f"--require {gate} is not met: {gate.metric} is {result[gate.metric]:.4f} ({result['run']})")


def _score(config: EvaluateConfig, file: Path, manifest: Manifest, classes: list[str], runtime, cache: "_Cache",
           reporter: Reporter) -> Scored:  # fmt: skip
    model, header = load_model(file)
    logits_NC, labels_N = cache.logits(model, header, manifest, config.split, file.parent.name)
    shift_C = adjustment(config, header)
    if shift_C is not None:
        logits_NC = logits_NC + shift_C.to(logits_NC)
        if not header.prior_exact:
            reporter.warn(f"{file.parent.name}: {header.classifier} with {header.loss} leaves no exact prior in its logits; "
                          "re-scored as if it were that of its training law")  # fmt: skip
    # Classes are matched by name: columns and labels into the order of ``classes``, whatever the checkpoint's and the data's.
    order = [header.classes.index(name) for name in classes]
    counts = [header.class_counts[c] for c in order]
    truth_N = np.array([classes.index(name) for name in manifest.classes])[labels_N.numpy()]
    try:
        scores = Scores.of(logits_NC[:, order].numpy(), truth_N)
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be scored: {error}; its weights are damaged, repeat the run") from None
    result = summarise(scores, truth_N, classes, counts)
    one = Scored(file.parent, header, manifest, config.split, classes, scores, truth_N, counts, result)
    result |= _statistics(one)
    if shift_C is not None:
        result |= {"target_prior": config.target_prior or "uniform", "prior_exact": header.prior_exact,
                   "posthoc_tau": 1.0 if config.posthoc_tau is None else config.posthoc_tau}  # fmt: skip
    if config.bound:
        train_NC, train_N = cache.logits(model, header, manifest, "train", file.parent.name)
        own = [header.classes.index(name) for name in manifest.classes]
        losses_N = torch.nn.functional.cross_entropy(train_NC[:, own].double(), train_N, reduction="none")
        result["bound"] = bound_terms(losses_N.numpy(), train_N.numpy(), [header.class_counts[c] for c in own],
                                      total=config.bound_beta, delta=config.bound_delta)  # fmt: skip
        result["bound"]["classes"] = manifest.classes
    result |= {
        "run": str(file.parent), "stage": header.stage, "classifier": header.classifier, "loss": header.loss,
        "sampler": header.sampler, "seed": header.recipe["seed"], "split": config.split, "images": len(labels_N),
        "data": header.data, "manifest_sha256": manifest.sha256, "device": runtime.describe(), "versions": versions(),
        "date": now()[:10],
    }  # fmt: skip
    return one


def _statistics(one: Scored) -> dict[str, Any]:
    """Intervals of the scalar metrics, and the expected calibration error."""
    found = accuracy_intervals(one.counts_C, one.tested_C, one.per_class(one.right_N), one.per_class(one.right5_N))
    return {"intervals": {metric: bounds and list(bounds[1:]) for metric, bounds in found.items()},
            "ece": calibration(one.scores.confidence_N, one.right_N)["ece"]}  # fmt: skip


class _Cache:
    """Logits of a split, with the images of the last split and the features of the last backbone kept: checkpoints that
    share a frozen backbone cost one pass over the images. Several processes share that pass."""

    def __init__(self, config: EvaluateConfig, runtime: Runtime, reporter: Reporter, world: World):
        self.config, self.runtime, self.reporter, self.world = config, runtime, reporter, world
        self.images: tuple[Any, Images | None] = (None, None)
        self.features: tuple[Any, torch.Tensor | None] = (None, None)

    def logits(self, model: Classifier, header: Header, manifest: Manifest, split: str, name: str
               ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Raw logits [N, C] in the checkpoint's class order, and labels [N] in the manifest's."""
        key = (manifest.path, split, header.image_size)
        if self.images[0] != key:
            self.images = (None, None)  # one split in memory at a time
            size, cpu = header.image_size, torch.device("cpu")
            self.images = (key, load_images(manifest, split, size, cpu, self.reporter, self.config))
        images = self.images[1]
        key = (*key, header.mean, header.std, _fingerprint(model.backbone))
        if self.features[0] != key:
            self.features = (key, self._extract(model.backbone, header, images, name))
        with torch.no_grad():
            return model.head(self.features[1]), images.labels

    def _extract(self, backbone: torch.nn.Module, header: Header, images: Images, name: str) -> torch.Tensor:
        device = self.runtime.device
        backbone.to(device, memory_format=torch.channels_last)

        def features(batch: torch.Tensor) -> torch.Tensor:
            with self.runtime.autocast():
                return backbone(batch.contiguous(memory_format=torch.channels_last))

        mean, std = (torch.tensor(v, device=device) for v in (header.mean, header.std))
        rows = extract_all(features, images, mean, std, batch_size=self.config.batch_size, reporter=self.reporter, what=name,
                           part=self.world.rows(len(images)))  # fmt: skip
        return self.world.gather(rows, len(images))


def _fingerprint(module: torch.nn.Module) -> str:
    """Names a network by its weights."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
