"""``balms detect train``: a whole detector, Mask R-CNN on a feature pyramid, from LVIS-format annotations to a checkpoint.

One step: the share of a batch that this process has, part by part: mirror, scale, forward, the sum of
torchvision's losses (classifier, boxes, masks, objectness, proposals), backward; then SGD. Images come by repeat factors.
"""

import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..config import DetectTrainConfig, Resolved, family_of
from ..data.manifest import now
from ..data.samplers import mix
from ..engine.distributed import ALONE, World
from ..engine.loop import Job, train
from ..engine.optim import Guard, make_sgd
from ..engine.run_dir import RunDir, clear_run
from ..engine.runtime import Runtime, setup, versions
from ..engine.tensorboard import event_files, require_tensorboard
from ..reporter import Reporter
from .annotations import Annotations, tell_left_out
from .backbones import build_backbone_fpn
from .dataset import DetectImages, Reader
from .header import FORMAT, Architecture, DetectHeader
from .losses import region_loss
from .model import build_detector
from .sampling import draw_batches, repeat_factors
from .steps import DetectResult, LossParts, complete, on_device, peak_memory_gb, provenance, schedule, seed_share, shares

STAGE = "detect-train"
_INITIAL, _VIEWS = 6, 40  # streams of random numbers
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def run(resolved: Resolved[DetectTrainConfig], annotations: Annotations, images: Path, folder: RunDir,
        reporter: Reporter | None = None, *, resume: bool = False, offline: bool = False, world: World = ALONE
        ) -> DetectResult:  # fmt: skip
    """Train a detector on ``annotations``, whose pictures lie in ``images``, in the run folder ``folder``; ``resume`` goes on
    where it stopped.

    Raises: DataError, CheckpointError (weights), ConfigError, DivergedError, Interrupted.
    """
    config, reporter = resolved.config, reporter or Reporter()
    require_tensorboard(config)
    shares(config.batch_size, config.accumulate, world)  # told before anything is read or written
    begun = _begin(config, annotations, images, reporter, offline)
    runtime, annotations = begun.runtime, begun.data.annotations
    if not resume:
        clear_run(folder)
        folder.create(resolved, provenance(annotations, images, runtime))
    if config.weights is None and not resume:
        reporter.warn("the backbone starts from scratch, which takes many images and steps: where you can, say --weights "
                      "imagenet, timm, pip:PACKAGE or a file")  # fmt: skip
    read = _reader(config, begun.data, world)
    job = _job(config, begun, read, world)
    reporter.note(f"{config.backbone}-FPN at {config.min_sizes[0]}-{config.min_sizes[-1]} px, {len(annotations.categories):,} "
                  f"categories, {job.steps:,} steps of {config.batch_size} on {runtime.describe()}")  # fmt: skip
    with closing(read), event_files(config, folder):
        seconds = train(job, folder, runtime.device, reporter, resume=resume, checkpoint_seconds=config.checkpoint_seconds,
                        world=world)  # fmt: skip

    header = DetectHeader(
        format=FORMAT, created=now(), stage=STAGE, architecture=begun.architecture, categories=annotations.categories,
        num_images=annotations.num_images, loss=config.loss, recipe=config.model_dump(mode="json"),
        annotations=str(annotations.path.resolve()), annotations_sha256=annotations.sha256, images=str(images.resolve()),
    )  # fmt: skip
    report = {
        "stage": STAGE, "loss": config.loss, "seed": config.seed, "images": len(begun.data),
        "categories": len(annotations.categories), "annotations_sha256": annotations.sha256, "steps": job.steps,
        "seconds": round(seconds, 1), "images_per_second": round(job.steps * config.batch_size / max(seconds, 1e-9), 2),
        "final_loss": folder.final_loss(), "peak_memory_gb": peak_memory_gb(runtime.device), "device": runtime.describe(),
        "versions": versions(),
    }  # fmt: skip
    complete(folder, begun.model, header, report, resolved)
    return DetectResult(folder.path, report)


def seconds_a_step(config: DetectTrainConfig, annotations: Annotations, images: Path, reporter: Reporter, *, offline: bool,
                   trial_steps: int) -> tuple[float, float | None]:  # fmt: skip
    """What a step of ``run`` takes here, by a few after the first, and the peak memory in 10^9 bytes; nothing is written.

    Raises: as ``run``.
    """
    begun = _begin(config, annotations, images, reporter, offline)
    with closing(_reader(config, begun.data, ALONE)) as read:
        job, guard = _job(config, begun, read, ALONE), Guard(begun.runtime.device)
        for step in range(1 + trial_steps):
            job.take(step % job.steps, guard)
            guard.check()  # waits for the device
            if step == 0:  # the start-up is in it
                began = time.monotonic()
    return (time.monotonic() - began) / trial_steps, peak_memory_gb(begun.runtime.device)


@dataclass(frozen=True)
class _Begun:
    """What a run starts with."""

    runtime: Runtime
    data: DetectImages
    architecture: Architecture
    model: nn.Module


def _begin(config: DetectTrainConfig, annotations: Annotations, images: Path, reporter: Reporter, offline: bool) -> _Begun:
    runtime = setup(config.device, config.precision, deterministic=config.deterministic)
    data = DetectImages(annotations, images, masks=config.masks, workers=config.workers, skip_bad=config.skip_bad,
                        reporter=reporter)  # fmt: skip
    tell_left_out(data.annotations, reporter)
    architecture, model = initial_detector(config, data.annotations, offline)
    # Convolutions of channels-last weights give channels-last maps: quicker on GPUs and on CPUs alike.
    return _Begun(runtime, data, architecture, model.to(runtime.device, memory_format=torch.channels_last))


def initial_detector(config: DetectTrainConfig, annotations: Annotations, offline: bool) -> tuple[Architecture, nn.Module]:
    """The detector as training starts: from the seed, and from ``--weights`` for its backbone."""
    torch.manual_seed(mix(config.seed, _INITIAL))
    # FrozenBatchNorm keeps the statistics of the weights that were loaded; without any it would keep none at all.
    norm = "batch" if config.weights is None else "frozen"
    trained = 5 if config.weights is None else config.trainable_layers
    backbone, mean, std = build_backbone_fpn(config.backbone, norm=norm, fpn_channels=config.fpn_channels,
                                             trainable_layers=trained, weights=config.weights, offline=offline)  # fmt: skip
    architecture = Architecture(
        backbone=config.backbone, norm=norm, fpn_channels=config.fpn_channels, head_features=config.head_features,
        masks=config.masks, class_agnostic=config.class_agnostic, family=family_of(config.loss),
        min_sizes=config.min_sizes, test_size=config.test_size, max_size=config.max_size, proposals=config.proposals,
        rois_per_image=config.rois_per_image, foreground_share=config.foreground_share,
        mean=mean or _IMAGENET[0], std=std or _IMAGENET[1],
    )  # fmt: skip
    loss = region_loss(config.loss, annotations.frequencies, annotations.image_counts).float()
    return architecture, build_detector(architecture, len(annotations.categories), cls_loss=loss, backbone=backbone)


def _reader(config: DetectTrainConfig, data: DetectImages, world: World) -> Reader:
    """This process's images of each step, drawn by their repeat factors."""
    draw = draw_batches(repeat_factors(data.annotations, config.repeat_threshold), config.batch_size, config.seed)
    mine = world.share(config.batch_size)
    return data.reader(lambda i: draw(i)[mine], config.steps)


def _job(config: DetectTrainConfig, begun: _Begun, read: Reader, world: World) -> Job:
    """What is trained, and the step: read, and part by part forward and backward; then SGD."""
    runtime, model, device = begun.runtime, begun.model, begun.runtime.device
    mine, parts = world.share(config.batch_size), shares(config.batch_size, config.accumulate, world)
    optimizer = make_sgd(model, config)
    names = ("loss_classifier", "loss_box_reg", *(["loss_mask"] if config.masks else []), "loss_objectness", "loss_rpn_box_reg")
    tally = LossParts(names, device)
    shared = world.wrap(model.train(), device)

    def backward(i: int, share: int, samples: list, last: bool) -> torch.Tensor:
        seed_share(config.seed, _VIEWS, i, share)
        images, targets = on_device(samples, device, flip=config.flip)
        # Of several processes the gradients meet once, in the last backward pass.
        alone = nullcontext() if last or world.size == 1 else shared.no_sync()
        with alone:
            with runtime.autocast():
                losses = shared(images, targets)
            value_P = torch.stack([losses[name].float() for name in names]) / len(parts)
            value_P.sum().backward()
        return value_P.detach()

    def step(i: int, guard: Guard) -> torch.Tensor:
        samples = read(i)
        optimizer.zero_grad()
        value_P = torch.zeros(len(names), device=device)
        for n, (share, places) in enumerate(parts):
            some = samples[places.start - mine.start : places.stop - mine.start]
            value_P += backward(i, share, some, n == len(parts) - 1)
        value_P = world.mean(value_P)  # the same for all: they log, and give up, together
        tally.add(value_P)
        value = value_P.sum()
        guard.step(value if config.clip_norm is None else value + 0 * clipped(model, config.clip_norm), optimizer)
        return value

    saved = {"model": model, "optimizer": optimizer, "losses": tally}
    return Job(STAGE, config.steps, saved, optimizer, schedule(config), step, config.batch_size, extras=tally.take)


def clipped(model: nn.Module, norm: float) -> torch.Tensor:
    """Scale the gradients to at most ``norm`` in all; their norm before. Not finite: no step may be taken."""
    return nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], norm)
