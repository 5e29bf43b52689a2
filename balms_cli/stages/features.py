"""Features of a split for stage 2: from the bank (computed once, kept beside the checkpoint), or anew every step."""

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import RetrainConfig
from ..data.bank import BankFile, bank_bytes, size_text
from ..data.features import FeatureBank, build_bank, online_features, plan_views, write_bank
from ..data.images import available_memory
from ..data.manifest import Manifest
from ..data.samplers import ClassIndex, mix
from ..engine.distributed import ALONE, World
from ..engine.header import Header, sha256_of
from ..engine.runtime import Runtime
from ..errors import BalmsError, DataError
from ..models.classifiers import Classifier
from ..reporter import Reporter
from .common import Images, load_images

_MEMORY_SHARE = 0.25  # of the memory that is free: a bank up to this size is held there

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
    ops = _ops(config, parent)
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
        views_N = views_of(config, split, parent, manifest)
        seed = int(parent.recipe.get("seed", 0))
        key = _bank_key(parent_file, manifest, split, views_N, ops, seed, runtime)
        file = BankFile(parent_file.parent / "features" / f"{key}.safetensors", int(views_N.sum()), parent.feature_dim)

        def build(make, **how):
            with closing(images()) as source:
                return make(extract, source, views_N, mean, std, ops=ops, seed=seed, batch_size=512, reporter=reporter, **how)

        read = bank_reader(_bank(config, file, views_N, build, device, reporter, world), config.seed, device)
    return Features(read, labels_N.to(device), ClassIndex(labels_N.to(device), len(parent.classes)))


def views_of(config: RetrainConfig, split: str, parent: Header, manifest: Manifest) -> Tensor:
    """Views of each image of the split [N] in the bank: their sum is its rows."""
    labels_N = torch.from_numpy(manifest.splits[split].labels)
    if not _ops(config, parent):
        return torch.ones_like(labels_N)
    return plan_views(labels_N, torch.bincount(labels_N, minlength=len(parent.classes)), config.views, config.class_rows)


def _ops(config: RetrainConfig, parent: Header) -> list[str]:
    return parent.recipe.get("augment", []) if config.augment else []


def bank_reader(bank: FeatureBank, seed: int, device: torch.device) -> FeatureReader:
    """Rows of the bank, on ``device``; the bank itself goes there too, unless it is a file or takes over half of a GPU."""
    features_RD, on_disk = bank.features, bank.will_need is not None
    if device.type == "cuda" and not on_disk and 2 * features_RD.nbytes < torch.cuda.mem_get_info(device)[0]:
        features_RD = features_RD.to(device)
    bank = FeatureBank(features_RD, bank.starts.to(device), bank.views.to(device), bank.will_need)
    generator = torch.Generator(device)
    return lambda images_B, step, stream: bank.rows(images_B, generator.manual_seed(mix(seed, stream, step)))


def _bank(config: RetrainConfig, file: BankFile, views_N: Tensor, build: Callable, device: torch.device, reporter: Reporter,
          world: World) -> FeatureBank:  # fmt: skip
    """The bank of ``file``: as it is there, or written now, or built in memory for want of a place to write to; the rows are
    the same. Of several processes the first trains, and holds it in memory where it fits; the others only look.

    Raises: DataError (exit 3) where neither the memory nor the disk holds it.
    """
    in_memory = world.main and _in_memory(config, file)
    found = _read(file, views_N, in_memory)
    if not world.any(found is None, device):
        if world.main:
            file.tidy()
        return found
    problem, shards, alone = None, [], False
    try:
        if world.main:
            reporter.note(f"feature bank: {describe_bank(file)}, read from {'memory' if in_memory else 'the disk'}")
            problem, shards = _begin(file, reporter)
            alone = in_memory and config.bank != "disk"
        problem, shards, alone = world.agree((problem, shards, alone))
        if problem is not None and alone:
            reporter.note(f"the feature bank is not kept for next time ({problem})")
            part = build(build_bank, part=world.rows(file.rows))
            return FeatureBank(world.gather(part.features, file.rows), part.starts, part.views)
        if problem is None and shards:
            if len(shards) < file.shards:
                reporter.note(f"{file.rows - file.rows_of(shards):,} rows are there from a run that was stopped")
            if mine := shards[world.rows(len(shards))]:
                build(write_bank, file=file, shards=mine)
        world.any(False, device)  # all have written theirs
        if problem is None and world.main:
            problem = _finished(file)
        if problem := world.agree(problem):
            raise problem
    finally:
        file.release()
    if (found := _read(file, views_N, in_memory)) is None:
        raise DataError(f"{file.target} cannot be read back: its disk is damaged, or some process does not see it")
    return found


def _bank_key(parent_file: Path, manifest: Manifest, split: str, views_N: Tensor, ops: list[str], seed: int, runtime: Runtime
              ) -> str:  # fmt: skip
    """Names a bank by all that its rows depend on. Every classifier trained on a backbone shares it."""
    views = hashlib.sha256(views_N.numpy().tobytes()).hexdigest()
    root = manifest.source.get("root")  # its sha256 does not cover that: other pictures may have the same names
    parts = (sha256_of(parent_file), manifest.sha256, root, split, views, ops, seed, runtime.device.type, runtime.precision)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _in_memory(config: RetrainConfig, file: BankFile) -> bool:
    """Whether the rows are to be held in memory. Raises DataError (exit 3) where they are to, and do not fit."""
    size, free = bank_bytes(file.rows, file.features), available_memory()
    if config.bank == "memory" and free is not None and size > free:
        raise DataError(f"the feature bank takes {size_text(size)} and {size_text(free)} of memory are free: "
                        "leave out --set bank=memory, and it is read from the disk")  # fmt: skip
    return config.bank == "memory" or (config.bank == "auto" and (free is None or size <= _MEMORY_SHARE * free))


def _read(file: BankFile, views_N: Tensor, in_memory: bool) -> FeatureBank | None:
    starts_N = views_N.cumsum(0) - views_N
    if in_memory:
        features_RD = file.loaded()
        return None if features_RD is None else FeatureBank(features_RD, starts_N, views_N)
    rows = file.mapped()
    return None if rows is None else FeatureBank(rows.features, starts_N, views_N, rows.will_need)


def describe_bank(file: BankFile) -> str:
    """How large a bank is, and how much room there is for it."""
    free = file.free()
    room = "" if free is None else f" ({size_text(free)} free)"
    return (f"{file.rows:,} rows x {file.features:,} features, {size_text(bank_bytes(file.rows, file.features))} "
            f"on disk{room}")  # fmt: skip


def _begin(file: BankFile, reporter: Reporter) -> tuple[BalmsError | None, list[int]]:
    """What stands in the way of writing the bank, and which shards are to be written."""
    try:
        file.begin(waiting=lambda: reporter.note("another run is computing this bank: waiting for it"))
        return None, file.missing()
    except BalmsError as error:
        return error, []


def _finished(file: BankFile) -> BalmsError | None:
    try:
        file.finish()
    except BalmsError as error:
        return error
    return None
