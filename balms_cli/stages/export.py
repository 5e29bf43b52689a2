"""``balms export``: a run's network in a format that others run, checked against ours on real images before it is written.

Shapes: N images of the check, C classes, S pixels a side.
"""

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..config import ExportConfig
from ..data.aside import folder_aside, printable, replace_file, write_error
from ..data.images import load_pixels
from ..data.index import Split
from ..data.transforms import normalise
from ..engine.checkpoint import load_model
from ..engine.header import Header, read_header, sha256_of
from ..engine.run_dir import EXPORT, check_place, manifest_of
from ..engine.runtime import versions
from ..errors import CheckpointError, ConfigError, DataError, GateError
from ..models.classifiers import Classifier
from ..reporter import Reporter
from .common import check_trained
from .export_formats import (
    FORMAT,
    ONNX_PACKAGES,
    SIDECAR,
    WEIGHTS,
    Exported,
    rebuild,
    require_packages,
    to_onnx,
    to_safetensors,
    to_torch,
    with_shift,
)
from .prior import adjustment, warn_of_inexact

__all__ = ["Export", "rebuild", "run"]

_BATCH = 16  # images a forward pass of the check
_SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
_WRITERS = {"onnx": to_onnx, "torch": to_torch, "safetensors": to_safetensors}


@dataclass(frozen=True)
class Export:
    """What was written, and how far it is from the run's own network."""

    path: Path
    result: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"export": str(self.path)} | self.result


@dataclass(frozen=True)
class _Sample:
    """Images to check on: pixels uint8 [N, 3, S, S], a name each, and where they come from."""

    pixels: Tensor
    names: list[str]
    origin: str


def run(config: ExportConfig, file: Path, out: Path | None = None, data: Path | None = None, reporter: Reporter | None = None,
        *, overwrite: bool = False) -> Export:  # fmt: skip
    """Write the network of the checkpoint ``file`` as ``config.to`` says: to ``out``, else into ``export/`` of its run.

    Nothing is written unless the exported model, run from the bytes that will be written, gives the run's own answers.
    Raises: ConfigError (a package or a place), CheckpointError, DataError (``data``), GateError where the answers differ.
    """
    reporter = reporter or Reporter()
    header = read_header(file)
    check_trained(header, file)
    target = _target(config.to, out, file, overwrite=overwrite)
    require_packages(config.to)
    shift_C = adjustment(config, header)
    warn_of_inexact(shift_C, header, file.parent.name, reporter)
    model, header = load_model(file)
    model.requires_grad_(False)
    sample = _sample(config, header, file, data, reporter)
    reporter.note(f"exporting {header.backbone} at {header.image_size} px, {len(header.classes)} classes, to {config.to}")
    exported = _WRITERS[config.to](with_shift(model, shift_C), _about(config, header, file, shift_C))
    found = _compare(config, header, model, shift_C, sample, exported, reporter)
    _write(target, exported.files)
    size = sum(map(len, exported.files.values()))
    reporter.note(f"{target}, {size / 1e6:.1f} MB: on {len(sample.names)} images ({sample.origin}) its logits differ by at "
                  f"most {found['difference']:.1e} from the run's")  # fmt: skip
    return Export(target, {"run": str(file.parent), "to": config.to, "bytes": size, **found, "versions": _versions(config.to)})


def _target(to: str, out: Path | None, file: Path, *, overwrite: bool) -> Path:
    """The file, or for safetensors the folder, that will be made. Raises ConfigError for one that must not be."""
    suffix = _SUFFIX.get(to)
    if out is None:
        target = file.parent / EXPORT / (f"model{suffix}" if suffix else "safetensors")
    elif suffix is None:
        target = out
    else:
        target = out / f"model{suffix}" if out.is_dir() else out
        if target.suffix != suffix:
            raise ConfigError(f"--to {to} writes a {suffix} file: say --out {out.with_suffix(suffix)}, or an existing folder")
    check_place(target.parent)
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} is there already; add --overwrite to replace it, or choose another --out")
    if suffix is None and target.exists():
        held = {p.name for p in target.iterdir()} if target.is_dir() else None
        if held is None or not held <= {WEIGHTS, SIDECAR} or target.resolve() == file.parent.resolve():
            raise ConfigError(f"{target} is not a folder of --to safetensors, so it is left alone; choose another --out")
    elif target.is_dir():
        raise ConfigError(f"{target} is a folder; choose another --out")
    return target


def _write(target: Path, files: dict[str, bytes]) -> None:
    if target.suffix in _SUFFIX.values() and len(files) == 1:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, target) from None
        return replace_file(target, next(iter(files.values())))
    with folder_aside(target) as fresh:
        for name, content in files.items():
            (fresh / name).write_bytes(content)
    return None


def _about(config: ExportConfig, header: Header, file: Path, shift_C: Tensor | None) -> dict[str, Any]:
    """What travels with the model: how to feed it, what its answers mean, and where it comes from."""
    size = header.image_size
    prior_C = torch.tensor(header.implied_log_prior, dtype=torch.float64)
    prior_C = (prior_C if shift_C is None else prior_C + shift_C).log_softmax(0)
    strength = 1.0 if config.posthoc_tau is None else config.posthoc_tau
    rescored = {} if shift_C is None else {"target_prior": config.target_prior or "uniform", "posthoc_tau": strength}
    return {
        "format": FORMAT,
        "input": f"images: float32 [N, 3, {size}, {size}], RGB in 0..1, not normalised yet; a photo's shorter side is resized "
                 f"to {size} px (bicubic, antialiased) and its centre cropped",
        "output": "logits and probabilities, float32 [N, C], columns as in classes; probabilities are softmax(logits), not "
                  "scaled by a temperature",
        "classes": header.classes, "class_counts": header.class_counts, "image_size": size,
        "mean": list(header.mean), "std": list(header.std),
        "implied_log_prior": prior_C.tolist(), "prior_exact": header.prior_exact, **rescored,
        "backbone": header.backbone, "feature_dim": header.feature_dim, "head": header.head,
        "stage": header.stage, "classifier": header.classifier, "loss": header.loss, "sampler": header.sampler,
        "data": header.data, "manifest_sha256": header.manifest_sha256, "run": printable(file.resolve().parent.name),
        "run_sha256": sha256_of(file), "run_created": header.created, "balms_version": __version__,
    }  # fmt: skip


def _sample(config: ExportConfig, header: Header, file: Path, data: Path | None, reporter: Reporter) -> _Sample:
    """Evenly spaced images of the run's test split, else of its training split; noise where its data is gone."""
    try:
        manifest = manifest_of(file, header, data)
        split = "test" if len(manifest.splits["test"]) else "train"
        part = manifest.splits[split]
        chosen = np.unique(np.linspace(0, len(part) - 1, config.images).astype(int))
        few = Split([part.keys[i] for i in chosen], part.labels[chosen])
        pixels = load_pixels(replace(manifest, splits={split: few}), split, header.image_size, reporter, threads=config.workers)
        return _Sample(torch.from_numpy(pixels), few.keys, f"{split} split")
    except DataError as error:
        if data is not None:  # asked for by name: not to be passed over
            raise
        reporter.warn(f"no real images to check on ({error}); {config.images} synthetic ones are used, a weaker check")
    shape, generator = (config.images, 3, header.image_size, header.image_size), torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return _Sample(pixels, [f"noise-{i}" for i in range(config.images)], "synthetic")


def _compare(config: ExportConfig, header: Header, model: Classifier, shift_C: Tensor | None, sample: _Sample,
             exported: Exported, reporter: Reporter) -> dict[str, Any]:  # fmt: skip
    """Ours as ``evaluate`` computes it in float32, and the exported model's: alone, then in batches.

    The difference of an image is the largest one of its logits, relative to its largest logit where that is over 1 (float32
    rounds in proportion), and of its probabilities. Raises GateError where one is over the tolerance.
    """
    mean, std = torch.tensor(header.mean), torch.tensor(header.std)
    ours, theirs = [], []
    starts = [0, *range(1, len(sample.names), _BATCH)]  # the first image by itself: a batch of one must do
    with torch.inference_mode(), reporter.task("checking", len(sample.names), unit="image") as task:
        for first, last in zip(starts, [*starts[1:], len(sample.names)], strict=True):
            pixels = sample.pixels[first:last]
            logits = model(normalise(pixels, mean, std))
            ours.append(logits if shift_C is None else logits + shift_C.to(logits))
            theirs.append([t.detach().clone() for t in exported.run(pixels.float() / 255)])
            task.advance(last - first)
    ours_NC, theirs_NC, given_NC = torch.cat(ours), *(torch.cat(part) for part in zip(*theirs, strict=True))
    if not ours_NC.isfinite().all():
        raise CheckpointError("the run's own answers are not finite numbers; its weights are damaged, repeat the run")
    logit_NC, probability_NC = (theirs_NC - ours_NC).abs(), (given_NC - ours_NC.softmax(1)).abs()
    logits_N = logit_NC.amax(1) / ours_NC.abs().amax(1).clamp_min(1)
    worst_N = torch.maximum(logits_N, probability_NC.amax(1))
    image = int(worst_N.nan_to_num(torch.inf).argmax())
    place = {"image": sample.names[image], "class": header.classes[int(logit_NC[image].nan_to_num(torch.inf).argmax())]}
    if not float(worst_N[image]) <= config.tolerance:
        alike = float(logits_N[image]) <= config.tolerance
        what, off_NC = ("probabilities", probability_NC) if alike else ("logits", logit_NC)
        raise GateError(f"the exported model's {what} differ by {float(off_NC[image].max()):.2e} from the run's at "
                        f"{printable(place['image'])}, class {printable(place['class'])}: over --tolerance "
                        f"{config.tolerance:g}, so nothing is written")  # fmt: skip
    same = float((ours_NC.argmax(1) == theirs_NC.argmax(1)).double().mean())
    return {"difference": float(logit_NC.max()), "probability_difference": float(probability_NC.max()), "largest_at": place,
            "same_top1": same, "images": len(sample.names), "images_from": sample.origin,
            "tolerance": config.tolerance}  # fmt: skip


def _versions(to: str) -> dict[str, str]:
    return versions() | ({name: import_module(name).__version__ for name in ONNX_PACKAGES} if to == "onnx" else {})
