"""Regions that a box classifier is tuned on: from the frozen detector anew in every step, or from the cache beside it.

Either way a step's images are drawn for the whole batch, and each process reads those that are its own.

Shapes: B images, R regions, D features.
"""

import hashlib
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..config import DetectFinetuneConfig
from ..data.samplers import mix
from ..engine.distributed import ALONE, World
from ..engine.runtime import Runtime
from ..errors import BalmsError, DataError
from ..reporter import Reporter
from .annotations import Annotations
from .cache import RegionCache, Regions, fill
from .dataset import DetectImages, Example
from .header import DetectHeader
from .model import region_features
from .steps import on_device, seed_share, shares

_VIEWS = 45  # stream of random numbers

Draw = Callable[[int], np.ndarray]  # step -> the images of the whole batch
Reader = Callable[[int], Regions]  # step -> the regions of this process's images


@dataclass(frozen=True)
class Frozen:
    """A detector in which nothing learns, its checkpoint's header, and the images that it is shown."""

    runtime: Runtime
    data: DetectImages
    parent: DetectHeader
    parent_file: Path
    parent_sha256: str
    model: nn.Module

    @property
    def annotations(self) -> Annotations:
        return self.data.annotations


def looked_at(model: nn.Module, samples: list[Example], flip: bool, runtime: Runtime) -> Regions:
    """Regions of one augmented view of each image: features [R, D] float32, labels [R]. All that is random, flips, scales and
    which proposals are sampled, is drawn by torch's generators."""
    with torch.no_grad(), runtime.autocast():
        features_RD, labels_R = region_features(model, *on_device(samples, runtime.device, flip=flip))
    return features_RD.float(), labels_R


def online_regions(frozen: Frozen, draw: Draw, batch_size: int, stream: int, config: DetectFinetuneConfig, world: World
                   ) -> Reader:  # fmt: skip
    """The frozen part run on fresh views in every step."""
    mine, parts = world.share(batch_size), shares(batch_size, 1, world)
    read = frozen.data.reader(lambda i: [int(image) for image in draw(i)[mine]], config.steps)

    def regions(i: int) -> Regions:
        samples, found = read(i), []
        for share, places in parts:
            seed_share(config.seed, stream, i, share)
            some = samples[places.start - mine.start : places.stop - mine.start]
            found.append(looked_at(frozen.model, some, config.flip, frozen.runtime))
        return joined(found)

    return regions


def joined(found: list[Regions]) -> Regions:
    features, labels = zip(*found, strict=True)
    return torch.cat(features), torch.cat(labels)


def cached_regions(cache: RegionCache, draw: Draw, batch_size: int, stream: int, config: DetectFinetuneConfig,
                   device: torch.device, world: World) -> Reader:  # fmt: skip
    """Rows of the cache: of each image one of its views, drawn uniformly."""
    mine, generator = world.share(batch_size), torch.Generator()

    def regions(i: int) -> Regions:
        view_B = torch.randint(config.views, (batch_size,), generator=generator.manual_seed(mix(config.seed, stream, i)))
        rows = [int(image) * config.views + view for image, view in zip(draw(i)[mine], view_B[mine].tolist(), strict=True)]
        features_RD, labels_R = joined([cache.read(row) for row in rows])
        return features_RD.to(device).float(), labels_R.to(device)

    return regions


def region_cache(config: DetectFinetuneConfig, frozen: Frozen) -> RegionCache:
    """The cache beside the checkpoint, named by all that its rows depend on, of the images' files by how large they are. Every
    classifier tuned on a detector shares it."""
    runtime, annotations, architecture = frozen.runtime, frozen.annotations, frozen.parent.architecture
    files = [(image.id, size) for image, size in zip(annotations.images, frozen.data.file_sizes(), strict=True)]
    images = hashlib.sha256(repr(files).encode()).hexdigest()
    parts = (frozen.parent_sha256, annotations.sha256, images, config.views, config.flip, config.min_sizes, config.max_size,
             _cache_seed(frozen.parent), runtime.device.type, runtime.precision)  # fmt: skip
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return RegionCache(frozen.parent_file.parent / "features" / key, views=len(frozen.data) * config.views,
                       rows=architecture.rois_per_image, features=architecture.head_features,
                       categories=len(frozen.parent.categories))  # fmt: skip


def make_cache(cache: RegionCache, config: DetectFinetuneConfig, frozen: Frozen, reporter: Reporter, world: World = ALONE
               ) -> None:  # fmt: skip
    """Write the shards that are not there; of several processes each its part of them. The size is told first.

    Raises: DataError or ConfigError where they cannot be written.
    """
    with ExitStack() as writing:
        problem, missing = None, []
        if world.main:
            try:
                missing = _claimed(cache, writing, reporter)
            except BalmsError as error:
                problem = error
        problem, missing = world.agree((problem, missing))
        if problem is not None:
            raise problem
        mine = missing[world.rows(len(missing))]
        views = [view for number in mine for view in cache.shard(number)]
        read = writing.enter_context(closing(frozen.data.reader(lambda k: [views[k] // config.views], len(views))))

        def regions(k: int) -> Regions:
            seed_share(_cache_seed(frozen.parent), _VIEWS, views[k], 0)
            return looked_at(frozen.model, read(k), config.flip, frozen.runtime)

        fill(cache, mine, regions, reporter)
        world.any(False, frozen.runtime.device)  # all have written theirs
    if left := cache.missing():
        raise DataError(f"{len(left)} of {cache.shards} parts of {cache.folder} are not there: several processes that make a "
                        "cache together need one folder that all of them see")  # fmt: skip


def _claimed(cache: RegionCache, writing: ExitStack, reporter: Reporter) -> list[int]:
    """The shards that are to be written, while ``writing`` is open by this run alone."""
    missing = cache.missing()
    reporter.note(f"feature cache: {cache.describe()}, kept in {cache.folder} for every classifier tuned on this detector")
    if missing:
        cache.check_space(len(missing))
        writing.enter_context(cache.held(lambda: reporter.note("another run is making this cache: waiting for it")))
        missing = cache.missing()
    if 0 < len(missing) < cache.shards:
        reporter.note(f"{cache.shards - len(missing)} of its {cache.shards} parts are there already")
    return missing


def _cache_seed(parent: DetectHeader) -> int:
    """The detector's, not the run's: runs that differ in their seed share a cache."""
    seed = parent.recipe.get("seed", 0)
    return seed if isinstance(seed, int) else 0
