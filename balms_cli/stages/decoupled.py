"""Decoupled classifier training: a fresh linear head on a fixed feature extractor. What retrain and meta-sample share.

One iteration with a meta-learner: draw a batch; look one SGD step ahead and read a class-balanced meta batch there; one
number an example comes back, its influence on the meta loss; Adam moves the class rates by it; then the real step, on
the same batch.

Shapes: B batch, M meta batch, C classes, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import RetrainConfig
from ..data.manifest import Manifest
from ..data.samplers import batches, class_law, mix, rates_law
from ..engine.header import Header
from ..engine.loop import Job, train
from ..engine.optim import Guard, learning_rate, make_sgd
from ..engine.run_dir import RunDir
from ..engine.runtime import Runtime, one_thread
from ..errors import ConfigError
from ..losses import BalancedSigmoidLoss, SoftmaxLoss, build_loss
from ..meta.influence import influence
from ..meta.reweigher import MetaReweigher
from ..meta.sampler import MetaSampler
from ..models.classifiers import Classifier, linear_head
from ..reporter import Reporter
from .common import total_steps
from .features import Features, read_features

# Streams of random numbers, one a purpose: (seed, stream, step) names every draw.
_HEAD, _TRAIN_VIEWS, _META_VIEWS, _DRAW, _META_DRAW = 7, 8, 9, 10, 11


@dataclass(frozen=True)
class Fit:
    """What classifier training yields. ``law``: the class law of its draws, as far as they are weighted; ``rates``: learned."""

    head: nn.Linear
    loss: SoftmaxLoss
    law: Tensor
    rates: Tensor | None
    report: dict[str, Any]


def fit_head(config: RetrainConfig, stage: str, model: Classifier, parent: Header, parent_file: Path, manifest: Manifest,
             rates_C: Tensor | None, folder: RunDir, runtime: Runtime, reporter: Reporter, *, resume: bool) -> Fit:  # fmt: skip
    """Train a fresh head on the features of ``model``'s backbone, which stays bit for bit what it was."""
    device = runtime.device
    model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    train_set = read_features(config, "train", model, parent, parent_file, manifest, runtime, reporter)
    meta_set = train_set
    if config.meta_set == "meta" and (config.meta_sampler or config.meta_reweigher):
        meta_set = read_features(config, "meta", model, parent, parent_file, manifest, runtime, reporter)

    counts_C = torch.tensor(manifest.class_counts)
    head = linear_head(parent.feature_dim, len(counts_C), torch.Generator().manual_seed(mix(config.seed, _HEAD))).to(device)
    loss = build_loss(config.loss, counts_C, config.loss_exponent).to(device).float()
    steps = total_steps(config, len(train_set.labels))
    optimizer = make_sgd(head, config)
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

    def schedule(i: int) -> float:
        return learning_rate(i, steps, peak=config.lr, warmup_steps=config.warmup_steps, warmup_lr=config.warmup_lr)

    job = Job(stage, steps, parts, optimizer, schedule, step, config.batch_size, extras=_extras(learner))
    with one_thread(device):
        seconds = train(job, folder, device, reporter, resume=resume, checkpoint_seconds=config.checkpoint_seconds)
    report = {"steps": steps, "seconds": round(seconds, 2), "final_loss": folder.final_loss(),
              "hypergradient": config.hypergradient if learner is not None else None}  # fmt: skip
    law_C, rates = _law(config, learner, rates_C, counts_C), learner.rates.cpu() if learner else None
    return Fit(head.cpu(), loss.cpu(), law_C, rates, report)


def check_meta_set(config: RetrainConfig, manifest: Manifest) -> None:
    """Raises ConfigError (exit 2) where the meta split that the configuration asks for is not there."""
    if config.meta_set == "meta" and "meta" not in manifest.splits:
        raise ConfigError(f"{manifest.path} has no meta split; make one: balms make-lt ... --meta-per-class 10")


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
        value = seen.losses_B.mean()
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
        value = (loss.per_example(head(features_BD), targets_B) * reweigher.weights(targets_B)).mean()
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
    # Without prior: cross-entropy; for the sigmoid family, equal counts leave the plain binary cross-entropies.
    plain = BalancedSigmoidLoss(uniform_C.cpu()) if isinstance(loss, BalancedSigmoidLoss) else SoftmaxLoss()
    plain = plain.to(meta.labels.device).float()

    def ahead(i: int, batch: tuple[Tensor, Tensor], weights_B: Tensor | None):
        images_M = meta.index.draw(edges_C, config.meta_batch_size, generator.manual_seed(mix(config.seed, _META_DRAW, i)))
        meta_batch = (meta.read(images_M, i, _META_VIEWS), meta.labels.index_select(0, images_M))
        return influence(head, optimizer, loss, batch, meta_batch, weights_B=weights_B, meta_loss=plain,
                         method=config.hypergradient)  # fmt: skip

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
