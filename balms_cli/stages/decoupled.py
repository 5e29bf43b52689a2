"""Decoupled classifier training: a new head on a fixed feature extractor. What retrain and meta-sample share.

One iteration with a meta-learner: draw a batch; look one SGD step ahead and read a class-balanced meta batch there; one
number an example comes back, its influence on the meta loss; Adam moves the class rates by it; then the real step, on
the same batch.

Shapes: B batch, M meta batch, C classes, D features.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import RetrainConfig
from ..data.manifest import Manifest
from ..data.samplers import batches, class_law, mix, rates_law
from ..engine.checkpoint import load_model
from ..engine.distributed import ALONE, World
from ..engine.header import Header
from ..engine.loop import Job, train
from ..engine.optim import Guard, learning_rate, make_sgd
from ..engine.run_dir import RunDir
from ..engine.runtime import Runtime, one_thread
from ..engine.tensorboard import event_files
from ..meta.influence import influence
from ..meta.reweigher import MetaReweigher
from ..meta.sampler import MetaSampler
from ..models.classifiers import Classifier, LWSHead, stage1_linear
from ..reporter import Reporter
from .common import check_classes, check_meta_set
from .features import Features, read_features
from .heads import fresh_head, training_loss, undecayed
from .rates import read_rates
from .training_free import check_tau, class_means, tau_norm

# Streams of random numbers, one a purpose: (seed, stream, step) names every draw.
_HEAD, _TRAIN_VIEWS, _META_VIEWS, _DRAW, _META_DRAW = 7, 8, 9, 10, 11
_LARGE = 100_000_000  # multiplications of one pass through the head: some milliseconds of a thread


@dataclass(frozen=True)
class Fit:
    """What stage 2 yields. ``log_prior``: what its raw logits are right for, exactly or not; ``rates``: learned ones."""

    head: nn.Module
    log_prior: Tensor
    prior_exact: bool
    rates: Tensor | None
    report: dict[str, Any]


def open_parent(config: RetrainConfig, parent_file: Path, manifest: Manifest) -> tuple[Classifier, Header, Tensor | None]:
    """What stage 2 starts from: the network, its header, and the rates [C] of ``--sampler FILE``, where that is one. The
    classes of all three are in the order of ``manifest``, which need not be that of the checkpoint's own data.

    Raises: CheckpointError, DataError, ConfigError for all that does not go together; nothing is computed before.
    """
    model, parent = load_model(parent_file)
    check_classes(parent, manifest, parent_file)
    check_meta_set(config.meta_set, manifest)
    check_tau(config, manifest)
    if config.classifier in ("lws", "tau-norm"):
        stage1_linear(model.head, parent.head, config.classifier)
    place = {name: c for c, name in enumerate(parent.classes)}
    order = [place[name] for name in manifest.classes]
    for rows in model.head.parameters():
        rows.data = rows.data[order]
    parent = parent.model_copy(update={
        "classes": manifest.classes, "class_counts": [parent.class_counts[c] for c in order],
        "implied_log_prior": [parent.implied_log_prior[c] for c in order]})  # fmt: skip
    return model, parent, read_rates(config.sampler, manifest)


def fit_head(config: RetrainConfig, stage: str, model: Classifier, parent: Header, parent_file: Path, manifest: Manifest,
             rates_C: Tensor | None, folder: RunDir, runtime: Runtime, reporter: Reporter, *, resume: bool,
             world: World = ALONE) -> Fit | None:  # fmt: skip
    """A new head on the features of ``model``'s backbone, which stays bit for bit what it was: trained, or made (tau-norm,
    ncm) without training. Several processes extract features together; the head, a matter of seconds, is trained by
    process 0 alone, and the others get None."""
    device = runtime.device
    model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def features(split: str, config: RetrainConfig = config) -> Features:
        return read_features(config, split, model, parent, parent_file, manifest, runtime, reporter, world)

    plain_views = config.model_copy(update={"augment": False, "features": "bank"})
    if config.head == "tau-norm":
        val = None if config.tau_norm is not None else features("val", plain_views)
        head, report = tau_norm(config, model.head, parent, manifest, val, reporter)
        log_prior_C = torch.tensor(parent.implied_log_prior, dtype=torch.float64)
        return Fit(head, log_prior_C, config.tau_norm == 0 and parent.prior_exact, None, report)
    if config.head == "ncm":
        head = class_means(config, features("train", plain_views), len(parent.classes))
        return Fit(head, torch.zeros(len(parent.classes)), False, None, {})

    counts_C = torch.tensor(manifest.class_counts)
    loss = training_loss(config, counts_C).to(device).float()
    if config.head == "lws":
        head = LWSHead(stage1_linear(model.head, parent.head, "lws")).to(device)
    else:
        head = fresh_head(config, parent.feature_dim, loss, len(counts_C), mix(config.seed, _HEAD)).to(device)
    train_set = features("train")
    with_meta_split = config.meta_set == "meta" and (config.meta_sampler or config.meta_reweigher)
    meta_set = features("meta") if with_meta_split else train_set

    if not world.main:
        return None

    steps = config.total_steps(len(train_set.labels))
    optimizer = make_sgd(head, config, undecayed(head, loss))
    parts: dict[str, Any] = {"head": head, "optimizer": optimizer}
    learner = _learner(config, counts_C, device)
    draw = batches(config.sampler, train_set.index, config.batch_size, steps, config.seed, rates_C)
    if learner is None:
        step = plain_step(head, optimizer, loss, train_set, draw)
    else:
        adam = torch.optim.Adam(learner.parameters(), lr=config.meta_lr, betas=config.meta_betas, fused=True)
        parts |= {"learner": learner, "adam": adam}
        make = sampler_step if config.meta_sampler else reweigher_step
        step = make(config, head, optimizer, loss, learner, adam, train_set, meta_set, draw)

    def told_step(i: int, guard: Guard) -> Tensor:
        loss.at_step(i, steps, config.seed)
        return step(i, guard)

    def schedule(i: int) -> float:
        return learning_rate(i, steps, peak=config.lr, warmup_steps=config.warmup_steps, warmup_lr=config.warmup_lr)

    job = Job(stage, steps, parts, optimizer, schedule, told_step, config.batch_size, extras=_extras(learner))
    with threads_for(head, config.batch_size, device), event_files(config, folder) as events:
        seconds = train(job, folder, device, reporter, resume=resume, checkpoint_seconds=config.checkpoint_seconds)
        if learner is not None:
            events.rates(steps, learner.rates, manifest.classes, manifest.class_counts)
    report = {"steps": steps, "seconds": round(seconds, 2), "final_loss": folder.final_loss(),
              "hypergradient": _route(config) if learner is not None else None}  # fmt: skip
    log_prior_C = loss.cpu().implied_log_prior(_law(config, learner, rates_C, counts_C).log())
    head = head.cpu().fold() if isinstance(head, LWSHead) else head.cpu()
    return Fit(head, log_prior_C, loss.prior_is_exact, learner.rates.cpu() if learner else None, report)


def threads_for(head: nn.Module, batch_size: int, device: torch.device) -> AbstractContextManager:
    """One thread on a CPU, but for heads whose matrices are worth more (1,000 classes of 512 features at batch 512 are)."""
    large = batch_size * sum(p.numel() for p in head.parameters()) > _LARGE
    return nullcontext() if large else one_thread(device)


def _route(config: RetrainConfig) -> str:
    """The way to the hypergradient that is meant: ``auto`` is the closed form where the head is linear."""
    return config.hypergradient if config.hypergradient != "auto" else "closed-form" if config.head == "linear" else "jvp"


def plain_step(head, optimizer, loss, data: Features, draw) -> Callable[[int, Guard], Tensor]:
    """Without a meta-learner: features, loss, SGD."""

    def step(i: int, guard: Guard) -> Tensor:
        images_B = draw(i)
        value = loss(head(data.read(images_B, i, _TRAIN_VIEWS)), data.labels.index_select(0, images_B))
        optimizer.zero_grad()
        value.backward()
        guard.step(value, optimizer)
        return value.detach()

    return step


def sampler_step(config, head, optimizer, loss, sampler: MetaSampler, adam, data: Features, meta: Features, draw
                 ) -> Callable[[int, Guard], Tensor]:  # fmt: skip
    """Meta Sampler: the batch is drawn by the rates that its own influence then moves."""
    ahead = _look_ahead(config, head, optimizer, loss, meta)
    generator = torch.Generator(sampler.theta.device)

    def step(i: int, guard: Guard) -> Tensor:
        drawn = sampler.draw(config.batch_size, generator.manual_seed(mix(config.seed, _DRAW, i)))
        features_BD = data.read(data.index.images(drawn.classes_B, drawn.positions_B), i, _TRAIN_VIEWS)
        seen = ahead(i, (features_BD, drawn.classes_B), None)
        sampler.theta.grad = sampler.gradient(drawn, seen.influence_B)
        # Drawn examples weigh one each, so the gradient that looked ahead is the one of the real step.
        for name, parameter in head.named_parameters():
            parameter.grad = seen.grads[name]
        value = loss.reduce(seen.losses_B, drawn.classes_B)
        guard.step(value + seen.meta_loss, adam, optimizer)
        return value

    return step


def reweigher_step(config, head, optimizer, loss, reweigher: MetaReweigher, adam, data: Features, meta: Features, draw
                   ) -> Callable[[int, Guard], Tensor]:  # fmt: skip
    """Meta Reweigher: class weights moved by influence, then the real step with the new weights."""
    ahead = _look_ahead(config, head, optimizer, loss, meta)

    def step(i: int, guard: Guard) -> Tensor:
        images_B = draw(i)
        features_BD, targets_B = data.read(images_B, i, _TRAIN_VIEWS), data.labels.index_select(0, images_B)
        seen = ahead(i, (features_BD, targets_B), reweigher.weights(targets_B))
        reweigher.theta.grad = reweigher.gradient(targets_B, seen.influence_B)
        guard.step(seen.meta_loss, adam)
        losses_B = loss.per_example(head(features_BD), targets_B)
        value = loss.reduce(losses_B * reweigher.weights(targets_B), targets_B)
        optimizer.zero_grad()
        value.backward()
        guard.step(value, optimizer)
        return value.detach()

    return step


def _look_ahead(config, head, optimizer, loss, meta: Features):
    """Influence of a batch on the plain loss of a class-balanced meta batch, drawn with replacement."""
    uniform_C = torch.ones(len(meta.index.counts), dtype=torch.float64, device=meta.labels.device)
    edges_C = uniform_C.cumsum(0)
    generator = torch.Generator(meta.labels.device)
    plain = loss.plain()

    def ahead(i: int, batch: tuple[Tensor, Tensor], weights_B: Tensor | None):
        images_M = meta.index.draw(edges_C, config.meta_batch_size, generator.manual_seed(mix(config.seed, _META_DRAW, i)))
        meta_batch = (meta.read(images_M, i, _META_VIEWS), meta.labels.index_select(0, images_M))
        return influence(head, optimizer, loss, batch, meta_batch, weights_B=weights_B, meta_loss=plain,
                         method=_route(config))  # fmt: skip

    return ahead


def _learner(config: RetrainConfig, counts_C: Tensor, device: torch.device) -> MetaSampler | MetaReweigher | None:
    if config.meta_sampler:
        return MetaSampler(counts_C, estimator=config.meta_estimator, temperature=config.gumbel_temperature).to(device)
    return MetaReweigher(len(counts_C), norm=config.weight_norm).to(device) if config.meta_reweigher else None


def _extras(learner) -> Callable[[], dict[str, float]]:
    if learner is None:
        return dict
    return lambda: {"rates_variance": round(learner.rates.var(correction=0).item(), 6)}


def _law(config: RetrainConfig, learner, rates_C: Tensor | None, counts_C: Tensor) -> Tensor:
    """P(class) [C] of what the head learned from: of the draws, times class weights where there are some."""
    if isinstance(learner, MetaSampler):
        return learner.log_law.cpu().double().exp()
    law_C = rates_law(rates_C, counts_C) if rates_C is not None else class_law(config.sampler, counts_C)
    return law_C * learner.rates.cpu().double() if learner is not None else law_C
