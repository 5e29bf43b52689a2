"""``balms pretrain``: stage 1, representation learning. One network, one loss, one sampler, from images to a checkpoint."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import PretrainConfig, Resolved
from ..data.feed import View, view_of
from ..data.manifest import Manifest, now
from ..data.samplers import ClassIndex, batches, class_law, mix, rates_law
from ..data.transforms import augment
from ..engine.compiling import choose_compile, compile_in_place
from ..engine.distributed import ALONE, World
from ..engine.header import FORMAT, Header
from ..engine.loop import Job, train
from ..engine.optim import Guard, learning_rate, make_sgd
from ..engine.profile import WARM_UP, Profile, phase, profile_steps
from ..engine.run_dir import RunDir, clear_run
from ..engine.runtime import Runtime, setup
from ..engine.tensorboard import event_files, require_tensorboard
from ..errors import ConfigError
from ..losses import SoftmaxLoss
from ..models.backbones import CIFAR_NAMES, build_backbone
from ..models.classifiers import Classifier
from ..models.weights import load_weights
from ..reporter import Reporter
from .common import (
    Images,
    RunResult,
    channel_statistics,
    check_meta_set,
    data_summary,
    finish,
    load_images,
    provenance,
)
from .end_to_end import Read, class_balanced, make_weigher, plain_step, reweighted_step
from .heads import fresh_head, loss_name, training_loss, undecayed
from .rates import rates_record, read_rates

_AUGMENT_STREAM, _META_STREAM = 0, 13
_MUCH_WAITING = 0.1  # of the time
_LEAST_PRETRAINED = 64  # pixels a side


def run(resolved: Resolved[PretrainConfig], manifest: Manifest, folder: RunDir, reporter: Reporter | None = None, *,
        resume: bool = False, offline: bool = False, world: World = ALONE) -> RunResult:  # fmt: skip
    """Train a backbone and its linear head on ``manifest`` in the run folder ``folder``; ``resume`` goes on where it stopped.

    Raises: DataError, CheckpointError (weights), ConfigError, DivergedError, Interrupted.
    """
    config, reporter = resolved.config, reporter or Reporter()
    if config.reweight != "none" and world.size > 1:
        raise ConfigError("--reweight looks one step ahead in one process: start it without torchrun")
    require_tensorboard(config)
    world.share(config.batch_size)  # a batch that does not divide is told before anything is read or written
    begun = _begin(config, manifest, reporter, offline)
    runtime, model, loss, counts_C = begun.runtime, begun.model, begun.loss, torch.tensor(manifest.class_counts)
    if not resume:
        clear_run(folder)
        folder.create(resolved, provenance(manifest, runtime, **rates_record(config.sampler)))

    report: dict[str, Any] = {"steps": 0, "seconds": 0.0}
    if config.frozen:
        reporter.note("frozen backbone: nothing is trained in stage 1; balms retrain gives it a classifier")
        if config.weights is None:
            reporter.warn("--frozen without --weights keeps a network that has learned nothing: name its weights")
    else:
        job = _job(config, begun, world)
        reporter.note(f"{config.backbone} at {config.image_size} px, {job.steps} steps of {config.batch_size} on "
                      f"{runtime.describe()}")  # fmt: skip
        with closing(begun.images), closing(begun.meta_images), event_files(config, folder):
            seconds = train(job, folder, runtime.device, reporter, resume=resume,
                            checkpoint_seconds=config.checkpoint_seconds, world=world)  # fmt: skip
        report = {"steps": job.steps, "seconds": round(seconds, 1), "final_loss": folder.final_loss(),
                  "images_per_second": round(job.steps * config.batch_size / max(seconds, 1e-9), 1)}  # fmt: skip
        report |= _tell_wait(begun.images.waited(), reporter)
    if config.reweight != "none":
        report |= {"reweight": config.reweight, "meta_set": config.meta_set}

    law_C = rates_law(begun.rates_C, counts_C) if begun.rates_C is not None else class_law(config.sampler, counts_C)
    prior = torch.zeros(len(counts_C)) if config.frozen else loss.cpu().implied_log_prior(law_C.log())
    header = Header(
        format=FORMAT, created=now(), stage="pretrain", backbone=config.backbone, feature_dim=model.backbone.feature_dim,
        image_size=config.image_size, classes=manifest.classes, class_counts=manifest.class_counts,
        mean=begun.mean, std=begun.std,
        head="untrained" if config.frozen else config.head, classifier=config.head, loss=loss_name(config),
        sampler=config.sampler + ("" if config.reweight == "none" else f" + {config.reweight}"),
        implied_log_prior=prior.tolist(), prior_exact=loss.prior_is_exact and config.reweight == "none",
        recipe=config.model_dump(mode="json"), data=data_summary(manifest),
        manifest=str(manifest.path.resolve()), manifest_sha256=manifest.sha256,
    )  # fmt: skip
    return finish(folder, model, header, manifest, report, runtime)


def profile(resolved: Resolved[PretrainConfig], manifest: Manifest, trace: Path, reporter: Reporter | None = None, *,
            offline: bool = False) -> tuple[Profile, Runtime]:  # fmt: skip
    """Take the first steps of ``run`` and say where their time went; nothing is written but the file ``trace``.

    Raises: DataError, CheckpointError (weights), ConfigError, DivergedError.
    """
    config, reporter = resolved.config, reporter or Reporter()
    if config.frozen:
        raise ConfigError("--frozen trains nothing in stage 1, so --profile has no step to look at: leave one of them out")
    begun = _begin(config, manifest, reporter, offline)
    found = profile_steps(_job(config, begun, ALONE), begun.runtime.device, trace)
    columns = ["phase", "GPU ms", "share", "host ms"] if begun.runtime.device.type == "cuda" else ["phase", "ms", "share"]
    reporter.table("where a step's time goes", columns, found.rows())
    reporter.note(f"{found.images_per_second:,.0f} images/s: {config.backbone} at {config.image_size} px, {config.batch_size} "
                  f"a step, {begun.runtime.describe()}; mean of {found.steps} steps after {WARM_UP}, slowed a little by "
                  "being watched; the trace opens in ui.perfetto.dev")  # fmt: skip
    return found, begun.runtime


def seconds_a_step(config: PretrainConfig, manifest: Manifest, reporter: Reporter, *, trial_steps: int) -> float:
    """What a step of ``run`` takes here, by a few after the first; nothing is written. Raises: as ``profile``."""
    begun = _begin(config, manifest, reporter, offline=False)
    job, guard = _job(config, begun, ALONE), Guard(begun.runtime.device)
    with closing(begun.images), closing(begun.meta_images):
        for step in range(1 + trial_steps):
            job.take(step % job.steps, guard)
            guard.check()  # waits for the device
            if step == 0:  # the start-up is in it
                began = time.monotonic()
    return (time.monotonic() - began) / trial_steps


def _tell_wait(share: float | None, reporter: Reporter) -> dict[str, float]:
    """How much of the time the steps waited for their images, for the report; said where it is worth a change."""
    if share is None:
        return {}
    if share > _MUCH_WAITING:
        reporter.note(f"{100 * share:.0f} % of the time went into waiting for images: reading held the steps back. Smaller "
                      "files, more --workers where there are more processors, or --set loading=memory")  # fmt: skip
    return {"input_wait": round(share, 4)}


@dataclass(frozen=True)
class _Begun:
    """Everything that stage 1 has in hand before its first step."""

    runtime: Runtime
    images: Images | None
    meta_images: Images | None
    rates_C: Tensor | None
    mean: tuple
    std: tuple
    loss: SoftmaxLoss
    model: Classifier


def _begin(config: PretrainConfig, manifest: Manifest, reporter: Reporter, offline: bool) -> _Begun:
    """Check, load and build; nothing is written."""
    runtime = setup(config.device, config.precision, deterministic=config.deterministic)
    device = runtime.device
    if config.compile == "cuda-graphs" and device.type != "cuda":
        raise ConfigError("--compile cuda-graphs needs a GPU; on a CPU try --compile on")
    if config.sync_batch_norm and device.type != "cuda":  # torch has it nowhere else
        raise ConfigError("sync_batch_norm works between GPUs only: leave it out, or give each process a larger batch")
    rates_C = read_rates(config.sampler, manifest)
    backbone, mean, std = _backbone(config, offline)
    _warn_of_shrinking(config, manifest, reporter)
    if config.weights is not None and config.image_size < _LEAST_PRETRAINED and config.backbone not in CIFAR_NAMES:
        reporter.warn(f"pretrained networks have seen larger images than {config.image_size} px, and their features say less "
                      "at that size: try --image-size 128, also for small images (slower)")  # fmt: skip
    held_out = config.reweight != "none" and config.meta_set == "meta"
    if held_out:
        check_meta_set(config.meta_set, manifest)

    cropped = "resized-crop" in config.augment

    def load(split: str) -> Images:
        return load_images(manifest, split, config.image_size, device, reporter, config, cropped=cropped)

    # A frozen network with a normalisation of its own needs no image here.
    images = load("train") if mean is None or not config.frozen else None
    meta_images = load("meta") if held_out else images
    if mean is None:
        mean, std = channel_statistics(images)

    counts_C = torch.tensor(manifest.class_counts)
    loss = training_loss(config, counts_C).to(device)
    head = fresh_head(config, backbone.feature_dim, loss, len(counts_C), mix(config.seed, 5))
    model = Classifier(backbone, head).to(device, memory_format=torch.channels_last)
    if config.reweight == "none" and not config.frozen:
        pixels = config.total_steps(len(manifest.splits["train"])) * config.batch_size * config.image_size**2
        compile_in_place(model.backbone, choose_compile(config.compile, pixels, device, reporter))
    return _Begun(runtime, images, meta_images, rates_C, mean, std, loss, model)


def _backbone(config: PretrainConfig, offline: bool):
    """The network as it starts: initialised from the seed, or from ``--weights`` with the normalisation they expect."""
    torch.manual_seed(mix(config.seed, 6))
    backbone = build_backbone(config.backbone, config.image_size)
    if config.weights is None:
        return backbone, None, None
    return backbone, *load_weights(backbone, config.backbone, config.weights, offline=offline)


def _job(config: PretrainConfig, begun: _Begun, world: World) -> Job:
    """What stage 1 trains, and the step: draw, augment, forward, loss, backward, SGD."""
    runtime, model, loss, images, device = begun.runtime, begun.model, begun.loss, begun.images, begun.runtime.device
    steps = config.total_steps(len(images.labels))
    index = ClassIndex(images.labels, len(model.head.weight))
    draw = batches(config.sampler, index, config.batch_size, steps, config.seed, begun.rates_C)
    optimizer = make_sgd(model, config, undecayed(model.head, loss))
    parts = {"model": model, "optimizer": optimizer}
    mean, std = torch.tensor(begun.mean, device=device), torch.tensor(begun.std, device=device)
    model.train()

    def reader(images: Images, draw: Callable[[int], Tensor], batch_size: int, stream: int) -> Read:
        return _reader(config, images, draw, batch_size, stream, mean, std, steps, world)

    read = reader(images, draw, config.batch_size, _AUGMENT_STREAM)
    if config.reweight == "none":
        shared = world.wrap(model, device, sync_batch_norm=config.sync_batch_norm)
        step = plain_step(shared, optimizer, loss, read, runtime, world)
    else:
        weigher = make_weigher(config, device)
        parts |= weigher.parts
        meta_index = ClassIndex(begun.meta_images.labels, len(model.head.weight))
        meta_draw = class_balanced(meta_index, config.meta_batch_size, config.seed)
        meta_read = reader(begun.meta_images, meta_draw, config.meta_batch_size, _META_STREAM)
        step = reweighted_step(config, model, optimizer, loss, weigher, read, meta_read, runtime)

    # What a loss draws it draws for the rows of one process: each has draws of its own.
    loss_seed = config.seed if world.size == 1 else mix(config.seed, 17, world.rank)

    def told_step(i: int, guard: Guard) -> Tensor:
        loss.at_step(i, steps, loss_seed)
        return step(i, guard)

    def schedule(i: int) -> float:
        return learning_rate(i, steps, peak=config.lr, warmup_steps=config.warmup_steps, warmup_lr=config.warmup_lr)

    return Job("pretrain", steps, parts, optimizer, schedule, told_step, config.batch_size, extras=images.paces)


def _reader(config: PretrainConfig, images: Images, draw: Callable[[int], Tensor], batch_size: int, stream: int, mean: Tensor,
            std: Tensor, steps: int, world: World) -> Read:  # fmt: skip
    """This process's share of a batch as augmented, normalised network inputs; the view of an image is keyed by (seed,
    stream, step, place in the whole batch)."""
    share, device = world.share(batch_size), mean.device
    place_B = torch.arange(batch_size)[share]

    def plan(i: int) -> tuple[Tensor, View | None]:
        return draw(i)[share], view_of(config.augment, place_B + i * batch_size, config.seed, stream)

    batches = images.batches(plan, steps)

    def read(i: int) -> tuple[Tensor, Tensor]:
        with phase("input"):
            pixels, images_B = batches(i)
            labels_B = images.labels[images_B].to(device, non_blocking=True)
        with phase("augment"):
            inputs = augment(pixels, place_B + i * batch_size, mean, std, seed=config.seed, stream=stream, ops=config.augment)
            return inputs.contiguous(memory_format=torch.channels_last), labels_B

    return read


def _warn_of_shrinking(config: PretrainConfig, manifest: Manifest, reporter: Reporter) -> None:
    width, height = manifest.image_size
    if config.image_size <= 32 and min(width, height) >= 2 * config.image_size:
        reporter.warn(f"images of about {width} x {height} px are shrunk to {config.image_size} px, where fine classes look "
                      "alike; for photos try --image-size 128 --backbone resnet18 (slower)")  # fmt: skip
