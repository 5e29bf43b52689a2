"""What the training stages of detection share: inputs on the device, the schedule, provenance, and the end of a run.

Every draw of a step is named by (seed, stream, step, share). A share is what one forward pass sees: of a batch of 8 in two
processes that accumulate twice, images 0-1, 2-3 (process 0), 4-5 and 6-7 (process 1). What is random in a share, from the
mirrored images to the sampled proposals, so does not depend on how many processes the shares fall to.
"""

import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DetectSGDConfig, DetectTrainConfig, Resolved
from ..data.aside import replace_file
from ..data.samplers import mix
from ..engine.distributed import World
from ..engine.optim import step_drops
from ..engine.run_dir import CARD, MODEL, REPORT, RunDir
from ..engine.runtime import Runtime, versions
from ..errors import ConfigError
from .annotations import Annotations
from .card import detector_card
from .dataset import Example, unpacked
from .header import DetectHeader
from .model import save_detector

try:
    import resource
except ImportError:  # Windows
    resource = None


@dataclass(frozen=True)
class DetectResult:
    """What a training stage leaves: the run's folder and its report."""

    path: Path
    report: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"run": str(self.path)} | self.report


def shares(batch_size: int, accumulate: int, world: World) -> list[tuple[int, slice]]:
    """The shares of a batch that this process takes, one after another: the number of each, and its places in the batch.

    Raises ConfigError (exit 2) where the shares would differ in size.
    """
    mine = world.share(batch_size)
    size, left = divmod(mine.stop - mine.start, accumulate)
    if left or not size:
        each = world.size * accumulate
        raise ConfigError(f"--batch-size {batch_size} does not divide into {world.size} x {accumulate} parts (processes x "
                          f"accumulate); try {max(1, round(batch_size / each)) * each}")  # fmt: skip
    return [(world.rank * accumulate + part, slice(mine.start + part * size, mine.start + (part + 1) * size))
            for part in range(accumulate)]  # fmt: skip


def seed_share(seed: int, stream: int, step: int, share: int) -> None:
    """From here on torch's generators, on all devices, draw what belongs to this share of this step."""
    torch.manual_seed(mix(seed, stream, step, share))


def on_device(samples: list[Example], device: torch.device, *, flip: bool) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """What a detector takes: images [3, H, W] in 0..1 and targets, half of them mirrored where ``flip`` (drawn by torch)."""
    images, targets = [], []
    for pixels, read in samples:
        images.append(pixels.to(device, non_blocking=True).float() / 255)
        target = {k: v.to(device, non_blocking=True) for k, v in read.items() if k in ("boxes", "labels", "mask_bits")}
        if "mask_bits" in target:
            target["masks"] = unpacked(target.pop("mask_bits"), pixels.shape[-1])
        targets.append(target)
    return flip_some(images, targets) if flip else (images, targets)


def flip_some(images: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Each image mirrored with probability 1/2, its boxes and masks with it; drawn by torch's CPU generator."""
    drawn = torch.rand(len(images)) < 0.5
    pairs = [mirror(*pair) if yes else pair for yes, *pair in zip(drawn.tolist(), images, targets, strict=True)]
    return [image for image, _ in pairs], [target for _, target in pairs]


def mirror(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Left and right exchanged: image [3, H, W], boxes (x1, y1, x2, y2) in pixels of it, masks [N, H, W] where there are."""
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    width = image.shape[-1]
    turned = target | {"boxes": torch.stack([width - x2, y1, width - x1, y2], 1)}
    if "masks" in target:
        turned["masks"] = target["masks"].flip(-1)
    return image.flip(-1), turned


def schedule(config: DetectSGDConfig) -> Callable[[int], float]:
    """The learning rate as a function of the step: warm-up, then drops by ten."""
    return lambda i: step_drops(i, peak=config.lr, drops=config.lr_drops, warmup_steps=config.warmup_steps,
                                warmup_factor=config.warmup_factor)  # fmt: skip


def provenance(annotations: Annotations, images: Path, runtime: Runtime, **more: Any) -> dict[str, Any]:
    """The ``[run]`` table of config.toml: what the values were applied to, where, and by which command."""
    return {"command": shlex.join(["balms", *sys.argv[1:]]), "manifest": str(annotations.path.resolve()),
            "manifest_sha256": annotations.sha256, "images": str(images.resolve()), "device": str(runtime.device),
            "precision": runtime.precision, "versions": versions(), **more}  # fmt: skip


def run_label(resolved: Resolved[DetectSGDConfig], annotations: Path) -> str:
    """A readable name for a run's folder: data, loss, and what else sets it apart."""
    config = resolved.config
    extra = []
    if isinstance(config, DetectTrainConfig):
        extra += [config.backbone.rpartition(":")[2]] if config.backbone != "resnet50" else []
        extra += [] if config.masks else ["boxes"]
        extra += ["agnostic"] if config.class_agnostic else []
    else:
        extra += ["lws"] if config.classifier == "lws" else []
        extra += ["reweigher"] if config.meta_reweigher else []
    extra += [f"seed{config.seed}"] if config.seed else []
    return re.sub(r"[^\w.-]+", "-", "-".join([annotations.stem, config.loss, *extra]))


def peak_memory_gb(device: torch.device) -> float | None:
    """The most memory so far, in 10^9 bytes: of a GPU what torch held at once, else what this process had in RAM. None: the
    system does not say."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


class LossParts:
    """The parts of a detector's loss, summed since the last log line. Saved with the run, so that a resumed log goes on."""

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self.names, self.count, self.sum_P = names, 0, torch.zeros(len(names), device=device)

    def add(self, value_P: Tensor) -> None:
        self.sum_P += value_P
        self.count += 1

    def take(self) -> dict[str, float]:
        """The mean of each part over the steps since; the count begins anew."""
        means = dict(zip(self.names, (self.sum_P / max(1, self.count)).tolist(), strict=True))
        self.sum_P.zero_()
        self.count = 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum_P.clone(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sum_P.copy_(state["sum"])
        self.count = int(state["count"])


def complete(folder: RunDir, model: nn.Module, header: DetectHeader, report: dict[str, Any], resolved: Resolved) -> None:
    """Report, card, and last of all the model: its presence means that the run is complete. One process writes."""
    folder.write_json(REPORT, report)
    if folder.writes:
        command = shlex.join(["balms", *sys.argv[1:]])
        replace_file(folder / CARD, detector_card(header, report, resolved.sources, command))
        save_detector(folder / MODEL, model.cpu(), header)
