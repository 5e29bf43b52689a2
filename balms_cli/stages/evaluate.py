"""``balms evaluate``: the only place that reads test data."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..bound import bound_terms
from ..config import EvaluateConfig
from ..data.aside import name_some
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
from ..report import compare, document, write
from ..report.scored import Scored
from ..reporter import Reporter
from .common import Images, check_classes, check_trained, load_images
from .evaluate_predictions import check_file, writing
from .evaluate_show import show, show_bound, show_differences, show_seeds
from .prior import adjustment, warn_of_inexact


@dataclass(frozen=True)
class Evaluation:
    """What was found of each checkpoint, in the order asked for.

    ``differences`` and ``seeds``: of several runs, as in the report's document, with runs named by their folders' paths.
    ``report``: the folder that a report was written to; ``predictions``: the file of logits.
    """

    scored: list[Scored]
    differences: list[dict[str, Any]] = field(default_factory=list)
    seeds: list[dict[str, Any]] = field(default_factory=list)
    report: Path | None = None
    predictions: Path | None = None

    @property
    def runs(self) -> list[dict[str, Any]]:
        return [one.result for one in self.scored]

    def to_json(self) -> dict[str, Any]:
        several = {"runs": self.runs, "differences": self.differences, "seeds": self.seeds}
        written = {"report": self.report, "predictions": self.predictions}
        return (self.runs[0] if len(self.runs) == 1 else several) | {key: str(to) for key, to in written.items() if to}


def run(config: EvaluateConfig, files: list[Path], data: Path | None = None, reporter: Reporter | None = None, *,
        report: Path | None = None, predictions: Path | None = None, overwrite: bool = False, world: World = ALONE
        ) -> Evaluation:  # fmt: skip
    """Score the checkpoints ``files`` on the test split of their manifest, or of ``data``.

    ``report``: a folder to write a report to; ``predictions``: a .csv or .npz file for each image's raw logits;
    ``overwrite``: earlier ones there may go. Process 0 writes them.
    Raises: CheckpointError, DataError, ConfigError (a gate that cannot be read, or on an empty group; a place that cannot
    be written to). Gates are held by :func:`hold_gates`, after the result is out.
    """
    reporter = reporter or Reporter()
    runtime = setup(config.device, config.precision)
    gates = [Gate.parse(text) for text in config.require]
    if report is not None:
        world.by_main(lambda: write.check_folder(report, overwrite=overwrite))
    if predictions is not None:
        world.by_main(lambda: check_file(predictions, overwrite=overwrite))
    headers = [read_header(file) for file in files]  # every input is refused before any is scored
    manifests = [manifest_of(file, header, data) for header, file in zip(headers, files, strict=True)]
    for header, manifest, file in zip(headers, manifests, files, strict=True):
        check_trained(header, file)
        check_classes(header, manifest, file)
        if config.split not in manifest.splits or not len(manifest.splits[config.split]):
            raise DataError(f"{manifest.path} has no {config.split} images; name another split by --split, or data by --data")
        if header.manifest_sha256 != manifest.sha256:
            reporter.warn(f"{file.parent.name} was trained on another draw of the data than {manifest.path.name}")
    _check_same_classes(manifests, files)
    for header in headers:
        adjustment(config, header)
    cache = _Cache(config, runtime, reporter, world)
    classes, scored = manifests[0].classes, []
    with _predictions(predictions, [str(file.parent) for file in files], classes, world) as put:
        for n, (file, manifest) in enumerate(zip(files, manifests, strict=True)):
            scored.append(_score(config, file, manifest, classes, runtime, cache, reporter, partial(put, n)))
        names = document.unique_names([one.run for one in scored])
        show(scored, names, reporter)
        for one in scored:
            if "bound" in one.result:
                show_bound(one.result, reporter)
        for one in scored:  # an empty group is told before anything is printed or written as a result
            if gates:
                one.result["gates"] = [{"require": str(gate), "value": one.result[gate.metric], "met": gate.met_by(one.result)}
                                       for gate in gates]  # fmt: skip
    if predictions is not None:
        reporter.note(f"predictions: {predictions}")
    differences, seeds = ([], []) if len(scored) == 1 else _compare(scored, names, reporter)
    if report is not None and world.main:
        write.write_report(document.build(scored), scored, report, reporter, overwrite=overwrite)
        reporter.note(f"report: {report / write.PAGE}")
    return Evaluation(scored, differences, seeds, report, predictions)


def hold_gates(config: EvaluateConfig, evaluation: Evaluation) -> None:
    """All of ``config.require`` must be met by every run. Raises GateError (exit 6), which names each gate that is not."""
    told = []
    for gate in map(Gate.parse, config.require):
        missed = [f"{r[gate.metric]:.6g} ({r['run']})" for r in evaluation.runs if not gate.met_by(r)]
        if missed:
            told.append(f"--require {gate} is not met: {gate.metric} is {', '.join(missed)}")
    if told:
        raise GateError("; ".join(told))


@contextmanager
def _predictions(file: Path | None, runs: list[str], classes: list[str], world: World) -> Iterator[Callable[..., None]]:
    """What :func:`_score` hands each run's raw logits to: they go into ``file``, where one is asked for."""
    if file is None:
        yield lambda *_: None
        return
    with writing(file, runs, classes) if world.main else nullcontext() as add:
        yield lambda *of: world.by_main(lambda: add(*of))


def _check_same_classes(manifests: list[Manifest], files: list[Path]) -> None:
    """Runs stand side by side where their classes are the same set of names. Raises CheckpointError (exit 4)."""
    known = set(manifests[0].classes)
    for manifest, file in zip(manifests, files, strict=True):
        if (found := set(manifest.classes)) != known:
            only, gone = (name_some(sorted(names), 3) or "none" for names in (found - known, known - found))
            raise CheckpointError(
                f"{file.parent} and {files[0].parent} have other classes (only in the first: {only}; only in the second: "
                f"{gone}), so they cannot stand side by side: evaluate each by itself"
            )


def _compare(scored: list[Scored], names: list[str], reporter: Reporter) -> tuple[list[dict], list[dict]]:
    """Shows differences and seeds under short names, and returns them with the runs' paths as ``--json`` has them."""
    differences, seeds = compare.differences(scored, names), compare.seeds(scored, names)
    compared = {one["run"] for one in differences}
    show_differences(differences, [name for name in names[1:] if name not in compared], reporter)
    show_seeds(seeds, reporter)
    path = {name: str(one.run) for name, one in zip(names, scored, strict=True)}
    return (
        [one | {"run": path[one["run"]], "against": path[one["against"]]} for one in differences],
        [one | {"runs": [path[name] for name in one["runs"]]} for one in seeds],
    )


def _score(config: EvaluateConfig, file: Path, manifest: Manifest, classes: list[str], runtime, cache: "_Cache",
           reporter: Reporter, put: Callable[..., None]) -> Scored:  # fmt: skip
    model, header = load_model(file)
    logits_NC, labels_N = cache.logits(model, header, manifest, config.split, file.parent.name)
    # Classes are matched by name: columns and labels into the order of ``classes``, whatever the checkpoint's and the data's.
    place = {name: c for c, name in enumerate(header.classes)}
    order = [place[name] for name in classes]
    counts = [header.class_counts[c] for c in order]
    rank = {name: c for c, name in enumerate(classes)}
    truth_N = np.array([rank[name] for name in manifest.classes])[labels_N.numpy()]
    put(manifest.splits[config.split].keys, truth_N, logits_NC, order)
    shift_C = adjustment(config, header)
    if shift_C is not None:
        logits_NC = logits_NC + shift_C.to(logits_NC)
        warn_of_inexact(shift_C, header, file.parent.name, reporter)
    try:
        scores = Scores.of(logits_NC[:, order].numpy(), truth_N)
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be scored: {error}; its weights are damaged, repeat the run") from None
    result = summarise(scores, truth_N, classes, counts)
    one = Scored(file.parent, header, manifest, config.split, classes, scores, truth_N, counts, result)
    result |= statistics(one)
    if shift_C is not None:
        result |= {"target_prior": config.target_prior or "uniform", "prior_exact": header.prior_exact,
                   "posthoc_tau": 1.0 if config.posthoc_tau is None else config.posthoc_tau}  # fmt: skip
    if config.bound:
        train_NC, train_N = cache.logits(model, header, manifest, "train", file.parent.name)
        own = [place[name] for name in manifest.classes]
        losses_N = torch.nn.functional.cross_entropy(train_NC[:, own].double(), train_N, reduction="none")
        result["bound"] = bound_terms(losses_N.numpy(), train_N.numpy(), [header.class_counts[c] for c in own],
                                      total=config.bound_beta, delta=config.bound_delta)  # fmt: skip
        result["bound"]["classes"] = manifest.classes
    result |= {
        "run": str(file.parent), "stage": header.stage, "classifier": header.classifier, "loss": header.loss,
        "sampler": header.sampler, "seed": header.recipe.get("seed"), "split": config.split, "images": len(labels_N),
        "data": header.data, "manifest_sha256": manifest.sha256, "device": runtime.describe(), "versions": versions(),
        "date": now()[:10],
    }  # fmt: skip
    return one


def statistics(one: Scored) -> dict[str, Any]:
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
