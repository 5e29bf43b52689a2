"""What the training stages share: images as tensors, the length of a run, provenance, and the end of a run."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig
from ..data.aside import replace_file
from ..data.feed import Images, InMemory, OnDisk
from ..data.images import fits_memory, load_pixels
from ..data.manifest import Manifest
from ..engine.checkpoint import save_model
from ..engine.header import Header
from ..engine.run_dir import CARD, MODEL, REPORT, RunDir
from ..engine.runtime import Runtime, versions
from ..errors import CheckpointError, ConfigError, DataError
from ..models.classifiers import Classifier
from ..report import run_files
from ..report.card import model_card
from ..reporter import Reporter

_PART = 256  # images whose pixels are counted at a time


@dataclass(frozen=True)
class RunResult:
    """What a training stage leaves: the run's folder and its report."""

    path: Path
    report: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"run": str(self.path)} | self.report


def load_images(manifest: Manifest, split: str, size: int, device: torch.device, reporter: Reporter | None,
                config: RunConfig | None = None, *, cropped: bool = False) -> Images:  # fmt: skip
    """A split as training and scoring read it: in memory where its pixels fit well, else from its files as needed.

    ``config`` says how (``loading``, ``workers``, ``decode``); ``cropped``: random crops of the files will be asked for.
    """
    config, reporter = config or RunConfig(), reporter or Reporter()
    files = manifest.source["kind"] not in ("digits", "cifar")  # those are small, and have no files of their own
    memory = config.loading == "memory" or (
        config.loading == "auto" and not cropped and fits_memory(len(manifest.splits[split]), size)
    )
    if cropped and (not files or config.loading == "memory"):
        raise ConfigError("augment 'resized-crop' cuts from image files: leave it out here, or leave out loading=memory")
    if files and not memory:
        found = OnDisk(manifest, split, size, device, workers=config.workers, decode=config.decode, reporter=reporter)
        reporter.note(f"{len(found):,} {split} images are read as they are needed, by {found.workers} decoder threads")
        return found
    pixels = torch.from_numpy(load_pixels(manifest, split, size, reporter, threads=config.workers))
    labels = torch.from_numpy(manifest.splits[split].labels).to(device)
    if device.type == "cuda" and pixels.numel() < torch.cuda.mem_get_info(device)[0] // 4:
        pixels = pixels.to(device)
    return InMemory(pixels, labels, device)


def channel_statistics(images: Images) -> tuple[tuple, tuple]:
    """Mean and standard deviation a channel (of pixels in 0..1) over all images, or evenly spaced ones of many: at least
    20,000, or 2,000 where each is read from its file, and under twice that."""
    most = 2_000 if isinstance(images, OnDisk) else 20_000
    seen_3V = torch.zeros(3, 256, dtype=torch.float64)  # how often each value occurs
    for part in torch.arange(0, len(images), max(1, len(images) // most)).split(_PART):
        pixels = images.rows(part)
        seen_3V += torch.stack([torch.bincount(pixels[:, c].flatten(), minlength=256) for c in range(3)]).cpu()
    value_V, count = torch.arange(256, dtype=torch.float64) / 255, seen_3V[0].sum()
    mean_3 = seen_3V @ value_V / count
    std_3 = ((seen_3V * (value_V - mean_3[:, None]) ** 2).sum(1) / (count - 1)).sqrt().clamp(min=1e-3)
    return tuple(round(m, 6) for m in mean_3.tolist()), tuple(round(s, 6) for s in std_3.tolist())


def provenance(manifest: Manifest, runtime: Runtime, **more: Any) -> dict[str, Any]:
    """The ``[run]`` table of config.toml: what the values were applied to, where, and by which command."""
    return {"command": shlex.join(["balms", *sys.argv[1:]]), "manifest": str(manifest.path.resolve()),
            "manifest_sha256": manifest.sha256, "device": str(runtime.device), "precision": runtime.precision,
            "versions": versions(), **more}  # fmt: skip


def check_trained(header: Header, file: Path) -> None:
    """Raises CheckpointError (exit 4) for a checkpoint whose backbone was taken as it was and has no classifier yet."""
    if header.head == "untrained":
        raise CheckpointError(f"{file} has no trained classifier (--frozen): run balms retrain {file.parent} first")


def check_classes(header: Header, manifest: Manifest, path: Path) -> None:
    """A checkpoint and a data set must have the same classes, by name. Raises CheckpointError (exit 4)."""
    ours, theirs = set(manifest.classes), set(header.classes)
    if ours != theirs:
        only, gone = (", ".join(sorted(names)[:3]) or "none" for names in (ours - theirs, theirs - ours))
        raise CheckpointError(
            f"{path} was trained on other classes than {manifest.path} (only in the data: {only}; only in "
            f"the checkpoint: {gone}); to reuse its backbone: balms pretrain --weights {path} --frozen"
        )


def check_meta_set(meta_set: str, manifest: Manifest) -> None:
    """Raises ConfigError (exit 2) where the meta split that the configuration asks for is not there, DataError (exit 3) where
    it lacks a class: meta batches are balanced over all of them."""
    if meta_set != "meta":
        return
    if "meta" not in manifest.splits:
        raise ConfigError(f"{manifest.path} has no meta split; make one: balms make-lt ... --meta-per-class 10")
    if missing := set(range(len(manifest.classes))) - set(manifest.splits["meta"].labels.tolist()):
        raise DataError(f"the meta split of {manifest.path} has no image of '{manifest.classes[min(missing)]}': make one with "
                        "every class in it (balms make-lt ... --meta-per-class 10), or leave out --meta-set")  # fmt: skip


def data_summary(manifest: Manifest) -> dict[str, Any]:
    return {"name": manifest.name, "source": manifest.source["name"], "kind": manifest.source["kind"],
            "images": len(manifest.splits["train"]), "imbalance_factor": manifest.imbalance_factor}  # fmt: skip


def finish(run: RunDir, model: Classifier, header: Header, manifest: Manifest, report: dict[str, Any], runtime: Runtime
           ) -> RunResult:  # fmt: skip
    """Write the report, the model card and, last of all, the model, whose presence means that the run is complete."""
    report = {"stage": header.stage, "loss": header.loss, "sampler": header.sampler, "data": header.data,
              "manifest_sha256": header.manifest_sha256, "seed": header.recipe["seed"], **report,
              "device": runtime.describe(), "versions": versions()}  # fmt: skip
    run.write_json(REPORT, report)
    if run.writes:
        replace_file(run / CARD, _card(run.path, model, header, manifest, report))
        save_model(run / MODEL, model, header)
    return RunResult(run.path, report)


def _card(run: Path, model: Classifier, header: Header, manifest: Manifest, report: dict[str, Any]) -> str:
    parent = run_files.parent_of(run, header)
    return model_card(header, report, run_files.recipe(run, header), run_files.provenance(run, header), manifest,
                      sum(p.numel() for p in model.parameters()), parent and parent[1])  # fmt: skip
