"""Decoupled classifier training: a fresh linear head on a fixed feature extractor. What retrain and meta-sample share.

One iteration with a meta-learner: draw a batch; look one SGD step ahead and read a class-balanced meta batch there; one
number an example comes back, its influence on the meta loss; Adam moves the class rates by it; then the real step, on
the same batch.

Shapes: B batch, M meta batch, C classes, D features.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..config import RetrainConfig
from ..data.features import FeatureBank, build_bank, online_features, plan_views
from ..data.manifest import Manifest
from ..data.samplers import ClassIndex, batches, class_law, mix, rates_law
from ..engine.checkpoint import write_bytes
from ..engine.header import Header, sha256_of
from ..engine.loop import Job, train
from ..engine.optim import Guard, learning_rate, make_sgd
from ..engine.run_dir import RunDir
from ..engine.runtime import Runtime
from ..errors import BalmsError, ConfigError
from ..losses import BalancedSigmoidLoss, SoftmaxLoss, build_loss
from ..meta.influence import influence
from ..meta.reweigher import MetaReweigher
from ..meta.sampler import MetaSampler
from ..models.classifiers import Classifier, linear_head
from ..reporter import Reporter
from .common import Images, load_images, total_steps

# Streams of random numbers, one a purpose: (seed, stream, step) names every draw.
_HEAD, _TRAIN_VIEWS, _META_VIEWS, _DRAW, _META_DRAW = 7, 8, 9, 10, 11

FeatureReader = Callable[[Tensor, int, int], Tensor]  # (images_B, step, stream) -> features [B, D]


@dataclass(frozen=True)
class Features:
    """A split as stage 2 sees it: features by image, labels, and images by class."""

    read: FeatureReader
    labels: Tensor
    index: ClassIndex


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
    train_set = _features(config, "train", model, parent, parent_file, manifest, runtime, reporter)
    meta_set = train_set
    if config.meta_set == "meta" and (config.meta_sampler or config.meta_reweigher):
        if "meta" not in manifest.splits:
            raise ConfigError(f"{manifest.path} has no meta split; make one: balms make-lt ... --meta-per-class 10")
        meta_set = _features(config, "meta", model, parent, parent_file, manifest, runtime, reporter)

    counts_C = torch.tensor(manifest.class_counts)
    head = linear_head(parent.feature_dim, len(counts_C), torch.Generator().manual_seed(mix(config.seed, _HEAD))).to(device)
    loss = build_loss(config.loss, counts_C, config.loss_exponent).to(device)
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

    job = Job(stage, steps, parts, optimizer, lambda i: learning_rate(i, steps, peak=config.lr, warmup_steps=config.warmup_steps,
              warmup_lr=config.warmup_lr), step, config.batch_size, extras=_extras(learner))  # fmt: skip
    seconds = train(job, folder, device, reporter, resume=resume, checkpoint_seconds=config.checkpoint_seconds)
    report = {"steps": steps, "seconds": round(seconds, 2), "final_loss": job.history[-1]["loss"] if job.history else None,
              "hypergradient": config.hypergradient if learner is not None else None}  # fmt: skip
    return Fit(head.cpu(), loss.cpu(), _law(config, learner, rates_C, counts_C), learner.rates.cpu() if learner else None, report)


def plain_step(head, optimizer, loss, data: Features, draw) -> Callable[[int, Guard], Tensor]:
    """Without a meta-learner: features, loss, SGD."""

    def step(i: int, guard: Guard) -> Tensor:
        images_B = draw(i)
        value = loss(head(data.read(images_B, i, _TRAIN_VIEWS)), data.labels[images_B])
        optimizer.zero_grad()
        value.backward()
        guard.step(optimizer, value)
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
        guard.step(adam, seen.influence_B)
        # Drawn examples weigh one each, so the gradient that looked ahead is the one of the real step.
        for name, parameter in head.named_parameters():
            parameter.grad = seen.grads[name]
        guard.step(optimizer, seen.losses_B)
        return seen.losses_B.mean()

    return step


def reweigher_step(config, head, optimizer, loss, reweigher: MetaReweigher, adam, data: Features, meta: Features, draw
                   ) -> Callable[[int, Guard], Tensor]:  # fmt: skip
    """Meta Reweigher: class weights moved by influence, then the real step with the new weights."""
    ahead = _look_ahead(config, head, optimizer, loss, meta)

    def step(i: int, guard: Guard) -> Tensor:
        images_B = draw(i)
        features_BD, targets_B = data.read(images_B, i, _TRAIN_VIEWS), data.labels[images_B]
        seen = ahead(i, (features_BD, targets_B), reweigher.weights(targets_B))
        reweigher.theta.grad = reweigher.gradient(targets_B, seen.influence_B)
        guard.step(adam, seen.influence_B)
        value = (loss.per_example(head(features_BD), targets_B) * reweigher.weights(targets_B)).mean()
        optimizer.zero_grad()
        value.backward()
        guard.step(optimizer, value)
        return value.detach()

    return step


def _look_ahead(config, head, optimizer, loss, meta: Features):
    """Influence of a batch on the plain loss of a class-balanced meta batch, drawn with replacement."""
    uniform_C = torch.ones(len(meta.index.counts), dtype=torch.float64, device=meta.labels.device)
    generator = torch.Generator(meta.labels.device)
    # Without prior: cross-entropy; for the sigmoid family, equal counts leave the plain binary cross-entropies.
    plain = BalancedSigmoidLoss(uniform_C.cpu()) if isinstance(loss, BalancedSigmoidLoss) else SoftmaxLoss()
    plain = plain.to(meta.labels.device)

    def ahead(i: int, batch: tuple[Tensor, Tensor], weights_B: Tensor | None):
        images_M = meta.index.draw(uniform_C, config.meta_batch_size, generator.manual_seed(mix(config.seed, _META_DRAW, i)))
        meta_batch = (meta.read(images_M, i, _META_VIEWS), meta.labels[images_M])
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


def _features(config: RetrainConfig, split: str, model: Classifier, parent: Header, parent_file: Path, manifest: Manifest,
              runtime: Runtime, reporter: Reporter) -> Features:  # fmt: skip
    """The feature reader of a split: rows of the bank, or the backbone itself with ``features = online``."""
    device = runtime.device
    ops = parent.recipe.get("augment", []) if config.augment else []
    mean, std = torch.tensor(parent.mean, device=device), torch.tensor(parent.std, device=device)
    labels_N = torch.from_numpy(manifest.splits[split].labels)

    def extract(images: Tensor) -> Tensor:
        with runtime.autocast():
            return model.backbone(images.contiguous(memory_format=torch.channels_last))

    def images() -> Images:
        return load_images(manifest, split, parent.image_size, device, reporter)

    if config.features == "online":
        read = online_features(extract, images().pixels, mean, std, ops=ops, seed=config.seed)
    else:
        counts_C = torch.bincount(labels_N, minlength=len(parent.classes))
        views_N = plan_views(labels_N, counts_C, config.views, config.class_rows) if ops else torch.ones_like(labels_N)
        seed = int(parent.recipe.get("seed", 0))
        key = _bank_key(parent_file, manifest, split, views_N, ops, seed, runtime)
        bank = _load_bank(parent_file.parent / "features" / f"{key}.safetensors", views_N, parent.feature_dim)
        if bank is None:
            bank = build_bank(extract, images().pixels, views_N, mean, std, ops=ops, seed=seed,
                              batch_size=512, reporter=reporter)  # fmt: skip
            _keep_bank(parent_file.parent / "features" / f"{key}.safetensors", bank, reporter)
        read = _bank_reader(bank, config.seed, device)
    return Features(read, labels_N.to(device), ClassIndex(labels_N.to(device), len(parent.classes)))


def _bank_reader(bank: FeatureBank, seed: int, device: torch.device) -> FeatureReader:
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
        write_bytes(path, save({"features": bank.features.cpu()}))
    except (OSError, BalmsError) as error:
        reporter.note(f"the feature bank is not kept for next time ({error})")
