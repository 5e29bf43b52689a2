"""Features of a split for stage 2: from the bank (computed once, kept beside the checkpoint), or anew every step."""

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..config import RetrainConfig
from ..data.aside import replace_file
from ..data.features import FeatureBank, build_bank, online_features, plan_views
from ..data.manifest import Manifest
from ..data.samplers import ClassIndex, mix
from ..engine.distributed import ALONE, World
from ..engine.header import Header, sha256_of
from ..engine.runtime import Runtime
from ..errors import BalmsError
from ..models.classifiers import Classifier
from ..reporter import Reporter
from .common import Images, load_images

FeatureReader = Callable[[Tensor, int, int], Tensor]  # (images_B, step, stream) -> features [B, D]


@dataclass(frozen=True)
class Features:
    """A split as stage 2 sees it: features by image, labels, and images by class."""

    read: FeatureReader
    labels: Tensor
    index: ClassIndex


def read_features(config: RetrainConfig, split: str, model: Classifier, parent: Header, parent_file: Path,
                  manifest: Manifest, runtime: Runtime, reporter: Reporter, world: World = ALONE) -> Features:  # fmt: skip
    """The feature reader of a split: rows of the bank, or the backbone itself with ``features = online``.

    Several processes extract a bank together, each its part of the rows, and all of them get the whole of it.
    """
    device = runtime.device
    ops = parent.recipe.get("augment", []) if config.augment else []
    mean, std = torch.tensor(parent.mean, device=device), torch.tensor(parent.std, device=device)
    labels_N = torch.from_numpy(manifest.splits[split].labels)

    def extract(images: Tensor) -> Tensor:
        with runtime.autocast():
            return model.backbone(images.contiguous(memory_format=torch.channels_last))

    def images() -> Images:
        cropped = "resized-crop" in ops
        return load_images(manifest, split, parent.image_size, device, reporter, config, cropped=cropped)

    if config.features == "online":
        read = online_features(extract, images(), mean, std, ops=ops, seed=config.seed)
    else:
        counts_C = torch.bincount(labels_N, minlength=len(parent.classes))
        views_N = plan_views(labels_N, counts_C, config.views, config.class_rows) if ops else torch.ones_like(labels_N)
        seed = int(parent.recipe.get("seed", 0))
        key = _bank_key(parent_file, manifest, split, views_N, ops, seed, runtime)
        file, rows = parent_file.parent / "features" / f"{key}.safetensors", int(views_N.sum())
        bank = _load_bank(file, views_N, parent.feature_dim)
        if world.any(bank is None, device):
            with closing(images()) as source:
                bank = build_bank(extract, source, views_N, mean, std, ops=ops, seed=seed, batch_size=512,
                                  reporter=reporter, part=world.rows(rows))  # fmt: skip
            bank = FeatureBank(world.gather(bank.features, rows), bank.starts, bank.views)
            if world.main:
                _keep_bank(file, bank, reporter)
        read = bank_reader(bank, config.seed, device)
    return Features(read, labels_N.to(device), ClassIndex(labels_N.to(device), len(parent.classes)))


def bank_reader(bank: FeatureBank, seed: int, device: torch.device) -> FeatureReader:
    bank = FeatureBank(bank.features.to(device), bank.starts.to(device), bank.views.to(device))
    generator = torch.Generator(device)
    return lambda images_B, step, stream: bank.rows(images_B, generator.manual_seed(mix(seed, stream, step)))


def _bank_key(parent_file: Path, manifest: Manifest, split: str, views_N: Tensor, ops: list[str], seed: int, runtime: Runtime
              ) -> str:  # fmt: skip
    """Names a bank by all that its rows depend on. Every classifier trained on a backbone shares it."""
    views = hashlib.sha256(views_N.numpy().tobytes()).hexdigest()
    parts = (sha256_of(parent_file), manifest.sha256, split, views, ops, seed, runtime.device.type, runtime.precision)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _load_bank(path: Path, views_N: Tensor, features: int) -> FeatureBank | None:
    try:
        rows = load_file(path)["features"] if path.is_file() else None
    except (OSError, SafetensorError, KeyError):
        return None
    if rows is None or rows.shape != (int(views_N.sum()), features) or rows.dtype != torch.float32:
        return None
    return FeatureBank(rows, views_N.cumsum(0) - views_N, views_N)


def _keep_bank(path: Path, bank: FeatureBank, reporter: Reporter) -> None:
    """A convenience: where it cannot be kept (read-only run, full disk) the next retrain computes it again."""
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, save({"features": bank.features.cpu()}))
    except (OSError, BalmsError) as error:
        reporter.note(f"the feature bank is not kept for next time ({error})")
