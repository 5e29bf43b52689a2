"""``balms detect finetune``: the box classifier of a trained detector anew, and nothing else.

Only ``cls_score`` is trained, from the weights that it has (or a scale for each of its rows, LWS, multiplied into it at the
end); every other tensor of the checkpoint stays bit for bit. Thus the frozen part runs once a step, without gradients and
without the losses of proposals, boxes and masks, or comes from a cache. The prior is the share of the images that a category
is in; it moves the logits of foreground regions alone.

With the Meta Reweigher (supplement B.2): look one SGD step ahead on the batch's regions, read the meta loss there on the
regions of class-balanced images, move the category weights by what comes back, then take the real step on the same batch.

Several processes share a batch by its images. What a step computes is that of one process with the regions of all: sums go
over all of them, and gradients are of the whole.

Shapes: B images, R regions, D features, C categories.
"""

import copy
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DetectFinetuneConfig, Resolved, family_of
from ..data.aside import printable
from ..data.manifest import now
from ..engine.distributed import ALONE, World
from ..engine.header import sha256_of
from ..engine.loop import Job, train
from ..engine.optim import Guard, make_sgd
from ..engine.run_dir import RunDir, clear_run
from ..engine.runtime import setup, versions
from ..engine.tensorboard import event_files, require_tensorboard
from ..errors import CheckpointError, ConfigError, Interrupted
from ..meta.influence import influence
from ..meta.reweigher import MetaReweigher
from ..models.classifiers import LWSHead
from ..reporter import Reporter
from .annotations import Annotations, tell_left_out
from .cache import RegionCache, Regions
from .dataset import DetectImages
from .header import DetectHeader, read_detect_header
from .losses import region_loss
from .model import cls_score, load_detector
from .regions import Draw, Frozen, Reader, cached_regions, make_cache, online_regions, region_cache
from .reweigh import region_weights, theta_gradient
from .sampling import class_balanced_images, draw_batches, repeat_factors
from .steps import DetectResult, complete, peak_memory_gb, provenance, schedule, shares

STAGE = "detect-finetune"
# Streams of random numbers, one a purpose: (seed, stream, step, share) names every draw.
_VIEWS, _META_VIEWS, _META_DRAW, _DRAW = 41, 42, 43, 44


def run(resolved: Resolved[DetectFinetuneConfig], parent_file: Path, annotations: Annotations, images: Path, folder: RunDir,
        reporter: Reporter | None = None, *, resume: bool = False, world: World = ALONE) -> DetectResult:  # fmt: skip
    """Tune the box classifier of the detector ``parent_file``; writes the whole detector to ``folder``.

    Raises: CheckpointError (damaged, of other categories, or of the other family), DataError, ConfigError, DivergedError,
    Interrupted.
    """
    config, reporter = resolved.config, reporter or Reporter()
    require_tensorboard(config)
    for count in (config.batch_size, *([config.meta_batch_size] if config.meta_reweigher else [])):
        shares(count, 1, world)  # told before anything is read or written
    route = route_of(config, world)
    frozen = begin(config, parent_file, annotations, images, reporter)
    if not resume:
        clear_run(folder)
        folder.create(resolved, provenance(annotations, images, frozen.runtime, parent=str(parent_file.resolve()),
                                           parent_sha256=frozen.parent_sha256))  # fmt: skip
    cache = None
    if config.cache:
        cache = region_cache(config, frozen)
        try:
            make_cache(cache, config, frozen, reporter, world)
        except KeyboardInterrupt:
            again = folder.resume_command(STAGE)
            raise Interrupted(f"stopped while features were computed; go on with: {again}") from None

    learnt = learn(config, frozen, cache, world)
    with closing(frozen.data), event_files(config, folder) as events:
        seconds = train(learnt.job, folder, frozen.runtime.device, reporter, resume=resume,
                        checkpoint_seconds=config.checkpoint_seconds, world=world)  # fmt: skip
        if learnt.reweigher is not None:
            names, counts = [c.name for c in frozen.annotations.categories], frozen.annotations.image_counts.tolist()
            events.rates(config.steps, learnt.reweigher.rates, names, counts)
    report = {"steps": config.steps, "seconds": round(seconds, 2), "final_loss": folder.final_loss(),
              "features": "online" if cache is None else "cache", "hypergradient": route}  # fmt: skip
    if cache is not None:
        report["cache"] = str(cache.folder)
    if learnt.reweigher is not None:
        show_weights(learnt.reweigher, frozen.annotations, reporter)
    return finish(folder, resolved, frozen, images, learnt, report)


def show_plan(resolved: Resolved[DetectFinetuneConfig], parent_file: Path, annotations: Annotations, images: Path,
              folder: RunDir, reporter: Reporter) -> None:  # fmt: skip
    """``--dry-run``: everything checked and told, nothing computed or written. Raises: as ``run``."""
    config = resolved.config
    route = route_of(config, ALONE)
    frozen = begin(config, parent_file, annotations, images, reporter)
    passes = config.steps * config.batch_size / len(frozen.data)
    reporter.table("dry run: nothing was written", ["what", "value"], [
        ["annotations", f"{annotations.path} ({len(frozen.data):,} images, {len(annotations.categories):,} categories)"],
        ["detector", f"{parent_file} ({frozen.parent.architecture.backbone}, {frozen.parent.architecture.family})"],
        ["loss", config.loss + (", LWS" if config.classifier == "lws" else "")],
        ["reweigher", f"{route}, meta loss {config.meta_loss}" if route else "none"],
        ["features", region_cache(config, frozen).describe() if config.cache else "anew in every step"],
        ["steps", f"{config.steps:,} of {config.batch_size} ({passes:.1f} passes over the images)"],
        ["device", frozen.runtime.describe()],
        ["result", str(folder.path)],
    ])  # fmt: skip


def begin(config: DetectFinetuneConfig, parent_file: Path, annotations: Annotations, images: Path, reporter: Reporter
          ) -> Frozen:  # fmt: skip
    """The detector, frozen, and its data. Raises: CheckpointError, DataError."""
    runtime = setup(config.device, config.precision, deterministic=config.deterministic)
    parent = read_detect_header(parent_file)
    check_family(parent, config.loss, parent_file)
    tell_left_out(annotations, reporter)
    data = DetectImages(annotations, images, masks=False, workers=config.workers, skip_bad=config.skip_bad, reporter=reporter)
    check_categories(parent, data.annotations, parent_file)
    model, parent = load_detector(parent_file)
    freeze(model, config, runtime.device)
    return Frozen(runtime, data, parent, parent_file, sha256_of(parent_file), model)


@dataclass(frozen=True)
class Learnt:
    """What is trained, and how."""

    job: Job
    head: nn.Module
    reweigher: MetaReweigher | None
    tally: "Tally"


def learn(config: DetectFinetuneConfig, frozen: Frozen, cache: RegionCache | None, world: World = ALONE) -> Learnt:
    """The head, its loss and optimizer, and the step of the loop; with the regions of the cache, or of the detector itself."""
    device, annotations, route = frozen.runtime.device, frozen.annotations, route_of(config, world)
    loss = training_loss(config, annotations).to(device)
    head = tuned_head(config, frozen.model).to(device)
    optimizer = make_sgd(head, config)
    parts: dict[str, Any] = {"head": head, "optimizer": optimizer}
    reweigher, tally, extras = None, Tally(), dict

    def reader(draw: Draw, batch_size: int, stream: int) -> Reader:
        if cache is not None:
            return cached_regions(cache, draw, batch_size, stream, config, device, world)
        return online_regions(frozen, draw, batch_size, stream, config, world)

    regions = reader(batch_draw(config, annotations), config.batch_size, _VIEWS)
    if config.meta_reweigher:
        reweigher = MetaReweigher(len(annotations.categories), norm=config.weight_norm).to(device)
        adam = torch.optim.Adam(reweigher.parameters(), lr=config.meta_lr, betas=config.meta_betas, fused=True)
        parts |= {"reweigher": reweigher, "adam": adam, "tally": tally}
        meta_draw = class_balanced_images(annotations, config.meta_batch_size, config.seed, _META_DRAW)
        meta_regions = reader(meta_draw, config.meta_batch_size, _META_VIEWS)
        step = reweigher_step(head, optimizer, loss, reweigher, adam, regions, meta_regions,
                              loss_on_meta(loss, config.meta_loss), route, tally, world)  # fmt: skip

        def extras() -> dict[str, float]:
            return {"rates_variance": round(reweigher.rates.var(correction=0).item(), 6)}
    else:
        step = plain_step(head, optimizer, loss, regions, world)

    job = Job(STAGE, config.steps, parts, optimizer, schedule(config), step, config.batch_size, extras)
    return Learnt(job, head, reweigher, tally)


# What is tuned, and by which loss


def check_family(parent: DetectHeader, loss: str, path: Path) -> None:
    """A softmax classifier has a row for the background, sigmoids have none: one's losses are not the other's.

    Raises CheckpointError (exit 4).
    """
    ours, theirs = family_of(loss), parent.architecture.family
    if ours != theirs:
        fitting = {"softmax": "softmax, balanced-softmax, class-balanced or ldam",
                   "sigmoid": "sigmoid, balanced-sigmoid, focal or equalization"}  # fmt: skip
        raise CheckpointError(f"{path} has a {theirs} classifier and --loss {loss} is for a {ours} one: use --loss "
                              f"{fitting[theirs]}, or balms detect train --loss {ours} first")  # fmt: skip


def check_categories(parent: DetectHeader, annotations: Annotations, path: Path) -> None:
    """The rows of the classifier are the categories of the annotations, one by one. Raises CheckpointError (exit 4)."""
    theirs, ours = ([c.name for c in x.categories] for x in (parent, annotations))
    if ours == theirs:
        return
    only, gone = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    told = (("only in the annotations", only), ("only in the checkpoint", gone))
    differ = [f"{what}: {printable(', '.join(names[:3]))}" for what, names in told if names]
    raise CheckpointError(f"{path} was trained on other categories than {annotations.path} has ("
                          f"{'; '.join(differ) or 'the same ones in another order'}): use the annotations that it was "
                          "trained on, or train a detector on these")  # fmt: skip


def training_loss(config: DetectFinetuneConfig, annotations: Annotations) -> nn.Module:
    """The loss that ``config`` names, with the priors of the annotations: float32, like the logits."""
    return region_loss(config.loss, annotations.frequencies, annotations.image_counts, gamma=config.focal_gamma,
                       beta=config.cb_beta, margin=config.ldam_margin, eql_threshold=config.eql_threshold).float()  # fmt: skip


def loss_on_meta(loss: nn.Module, kind: str) -> nn.Module:
    """What is read on the meta batch. ``plain``: the loss without the prior, as the paper has it for a balanced meta set.

    ``adjusted``: with it. The released code means the plain one and calls it so, but its balanced loss shifts the logits in
    place before the other is computed on them.
    """
    return loss.plain() if kind == "plain" else loss


def freeze(model: nn.Module, config: DetectFinetuneConfig, device: torch.device) -> None:
    """The detector as it is run here: on ``device``, nothing in it learns, images scaled as ``config`` says."""
    model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    model.transform.min_size, model.transform.max_size = tuple(config.min_sizes), config.max_size


def tuned_head(config: DetectFinetuneConfig, model: nn.Module) -> nn.Module:
    """What learns: a copy of ``cls_score``, or a scale a row of it. [R, D] to logits."""
    linear = copy.deepcopy(cls_score(model))
    return LWSHead(linear) if config.classifier == "lws" else linear.requires_grad_(True)


def route_of(config: DetectFinetuneConfig, world: World) -> str | None:
    """The way to the hypergradient that is meant. Raises ConfigError where several processes cannot go it."""
    if not config.meta_reweigher:
        return None
    route = config.hypergradient
    if route == "auto":
        route = "closed-form" if config.classifier == "linear" else "jvp"
    if route == "closed-form" and config.classifier != "linear":
        raise ConfigError("hypergradient closed-form is for the linear classifier: with lws use jvp or higher")
    if route != "closed-form" and world.size > 1:
        raise ConfigError(f"the reweigher of several processes is computed in closed form, not by {route}: use "
                          "--classifier linear and --set hypergradient=auto, or one process")  # fmt: skip
    return route


def batch_draw(config: DetectFinetuneConfig, annotations: Annotations) -> Draw:
    """The images of each step: by repeat factors, or class-balanced."""
    if config.sampler == "class":
        return class_balanced_images(annotations, config.batch_size, config.seed, _DRAW)
    return draw_batches(repeat_factors(annotations, config.repeat_threshold), config.batch_size, config.seed)


# Steps


class Tally:
    """Meta steps that were passed over, for want of foreground regions. Saved with the run, so that a resumed one goes on."""

    def __init__(self) -> None:
        self.skipped = 0

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = int(state["skipped"])


def real_step(head: nn.Module, optimizer: torch.optim.Optimizer, loss: nn.Module, batch: Regions, weights_R: Tensor | None,
              world: World, guard: Guard) -> Tensor:  # fmt: skip
    """The step of SGD on the regions of all processes; its loss."""
    features_RD, labels_R = batch
    losses_R = loss.per_example(head(features_RD), labels_R)
    if weights_R is not None:
        losses_R = losses_R * weights_R.to(losses_R)
    count = world.sum(torch.as_tensor(loss.denominator(labels_R), dtype=losses_R.dtype, device=losses_R.device))
    value = losses_R.sum() / count
    optimizer.zero_grad()
    value.backward()
    for parameter in head.parameters():
        parameter.grad = world.sum(parameter.grad)
    value = world.sum(value.detach())
    guard.step(value, optimizer)
    return value


def plain_step(head, optimizer, loss, regions: Reader, world: World) -> Callable[[int, Guard], Tensor]:
    """Without a reweigher: regions, loss, SGD."""

    def step(i: int, guard: Guard) -> Tensor:
        return real_step(head, optimizer, loss, regions(i), None, world, guard)

    return step


def reweigher_step(head, optimizer, loss, reweigher: MetaReweigher, adam, regions: Reader, meta_regions: Reader, meta_loss,
                   route: str, tally: Tally, world: World) -> Callable[[int, Guard], Tensor]:  # fmt: skip
    """Meta Reweigher: category weights moved by the influence of the batch's foreground, then the real step with the new ones.

    Where a whole batch or meta batch has no foreground there is nothing to weigh or to learn from: the weights stay.
    """

    def step(i: int, guard: Guard) -> Tensor:
        batch, meta_batch = regions(i), meta_regions(i)
        found = torch.stack([(labels_R > 0).sum() for _, labels_R in (batch, meta_batch)])
        if world.sum(found).all():
            weights_R = region_weights(reweigher, batch[1], world)
            seen = influence(head, optimizer, loss, batch, meta_batch, weights_B=weights_R, meta_loss=meta_loss, method=route,
                             total=world.sum if world.size > 1 else None)  # fmt: skip
            reweigher.theta.grad = theta_gradient(reweigher, batch[1], seen.influence_B, world)
            guard.step(seen.meta_loss, adam)
        else:
            tally.skipped += 1
        return real_step(head, optimizer, loss, batch, region_weights(reweigher, batch[1], world), world, guard)

    return step


# The end


def rates_report(reweigher: MetaReweigher, annotations: Annotations) -> dict[str, Any]:
    """The category weights by name, and their variance over the categories."""
    rates_C = reweigher.rates.cpu()
    names = [c.name for c in annotations.categories]
    return {"rates": {name: round(r, 6) for name, r in zip(names, rates_C.tolist(), strict=True)},
            "rates_variance": rates_C.double().var(correction=0).item()}  # fmt: skip


def show_weights(reweigher: MetaReweigher, annotations: Annotations, reporter: Reporter, rows: int = 20) -> None:
    """The category weights as bars, categories by decreasing number of images: all of them, or evenly spaced ones."""
    order = sorted(range(len(annotations.categories)), key=lambda c: -annotations.categories[c].image_count)
    shown = order if len(order) <= rows else [order[round(i * (len(order) - 1) / (rows - 1))] for i in range(rows)]
    labels = [f"{printable(annotations.categories[c].name)} ({annotations.categories[c].image_count})" for c in shown]
    weights = [float(reweigher.rates[c]) for c in shown]
    reporter.bars("category weights, most images first", labels, weights, [f"{w:.3f}" for w in weights])


def finish(folder: RunDir, resolved: Resolved[DetectFinetuneConfig], frozen: Frozen, images: Path, learnt: Learnt,
           report: dict[str, Any]) -> DetectResult:  # fmt: skip
    """Put the tuned rows into the detector; write the report, and last of all the model: the run is then complete."""
    config, model, annotations, reweigher = resolved.config, frozen.model.cpu(), frozen.annotations, learnt.reweigher
    linear = learnt.head.fold() if isinstance(learnt.head, LWSHead) else learnt.head
    own = cls_score(model)
    with torch.no_grad():
        own.weight.copy_(linear.weight)
        own.bias.copy_(linear.bias)
    header = frozen.parent.model_copy(update={
        "created": now(), "stage": STAGE, "categories": annotations.categories, "num_images": annotations.num_images,
        "loss": config.loss, "classifier": config.classifier, "recipe": config.model_dump(mode="json"),
        "annotations": str(annotations.path.resolve()), "annotations_sha256": annotations.sha256,
        "images": str(images.resolve()), "parent_sha256": frozen.parent_sha256,
        "rates": reweigher.rates.tolist() if reweigher is not None else None,
    })  # fmt: skip
    report = {"stage": STAGE, "loss": config.loss, "classifier": config.classifier, "sampler": config.sampler,
              "meta_reweigher": config.meta_reweigher, "seed": config.seed, "images": len(frozen.data),
              "categories": len(annotations.categories), "annotations_sha256": annotations.sha256,
              "parent_sha256": frozen.parent_sha256, **report}  # fmt: skip
    if reweigher is not None:
        report |= {"meta_loss": config.meta_loss, "meta_steps_skipped": learnt.tally.skipped,
                   **rates_report(reweigher, annotations)}  # fmt: skip
    runtime = frozen.runtime
    report |= {"peak_memory_gb": peak_memory_gb(runtime.device), "device": runtime.describe(), "versions": versions()}
    complete(folder, model, header, report, resolved)
    return DetectResult(folder.path, report)
