"""The feature bank: what a fixed feature extractor says of every training image, computed once.

Decoupled training never changes the extractor, so stage 2 reads rows of a matrix instead of running a network. Rows are
features of augmented views; rare classes get more views an image, so that every class has enough distinct rows.

Shapes: N images, R rows, D features, B batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reporter import Reporter
from .bank import BankFile
from .feed import Images, View, view_of
from .samplers import mix
from .transforms import augment, normalise

_MAX_VIEWS = 64
_VIEW_STREAM = 3


@dataclass(frozen=True)
class FeatureBank:
    """Rows of image i are ``features[starts[i] : starts[i] + views[i]]``. ``features`` may lie elsewhere than the others."""

    features: Tensor  # [R, D] float32
    starts: Tensor  # [N]
    views: Tensor  # [N]
    will_need: Callable[[Tensor], None] | None = None  # told of the rows that are about to be read

    def rows(self, images_B: Tensor, generator: torch.Generator) -> Tensor:
        """Features [B, D] of one view of each image, drawn uniformly."""
        u_B = torch.rand(len(images_B), generator=generator, device=self.starts.device)
        rows_B = self.starts.index_select(0, images_B) + (u_B * self.views.index_select(0, images_B)).long()
        place_B = rows_B.to(self.features.device)
        if self.will_need is not None:
            self.will_need(place_B)
        return self.features.index_select(0, place_B).to(self.starts.device)


def plan_views(labels_N: Tensor, counts_C: Tensor, views: int, class_rows: int) -> Tensor:
    """Views of each image [N]: at least ``views``, and so many that its class has ``class_rows`` rows (at most 64 views)."""
    needed_C = (class_rows + counts_C - 1) // counts_C
    return needed_C.clamp(min=views, max=max(views, _MAX_VIEWS))[labels_N]


def build_bank(extract: Callable[[Tensor], Tensor], images: Images, views_N: Tensor, mean: Tensor, std: Tensor, *,
               ops: list[str], seed: int, batch_size: int, reporter: Reporter, part: slice = slice(None)
               ) -> FeatureBank:  # fmt: skip
    """Features of every planned view, or of the rows in ``part`` alone (one process of several), in memory.

    ``extract``: normalised images [B, 3, H, W] to features [B, D], in eval mode.
    View v of image i is keyed by (seed, i, v): the bank does not depend on batch size, order or device.
    """
    rows = range(int(views_N.sum()))[part]
    held: list[Tensor] = []

    def put(span: range, out: Tensor) -> None:
        if not held:
            held.append(torch.empty(len(rows), out.shape[1], device=out.device))
        held[0][span.start - rows.start : span.stop - rows.start] = out

    _extract(extract, images, views_N, mean, std, ops, seed, _spans(rows, batch_size), put, reporter)
    return FeatureBank(held[0], views_N.cumsum(0) - views_N, views_N)


def write_bank(extract: Callable[[Tensor], Tensor], images: Images, views_N: Tensor, mean: Tensor, std: Tensor, *,
               ops: list[str], seed: int, batch_size: int, reporter: Reporter, file: BankFile, shards: list[int]
               ) -> None:  # fmt: skip
    """The rows of these ``shards`` of the same bank, into the growing file; each shard is marked when it is whole."""
    spans = [span for shard in shards for span in _spans(file.shard(shard), batch_size)]
    shard_of = {file.shard(shard).stop: shard for shard in shards}  # by the row at which it ends
    with file.writer() as writer:

        def put(span: range, out: Tensor) -> None:
            writer.write(span.start, out)
            if span.stop in shard_of:
                writer.mark(shard_of[span.stop])

        _extract(extract, images, views_N, mean, std, ops, seed, spans, put, reporter)


def _spans(rows: range, batch_size: int) -> list[range]:
    """Rows cut into batches."""
    return [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]


def _extract(extract, images: Images, views_N: Tensor, mean: Tensor, std: Tensor, ops: list[str], seed: int,
             spans: list[range], put: Callable[[range, Tensor], None], reporter: Reporter) -> None:  # fmt: skip
    """Features [B, D] float32 of the rows in each span are handed to ``put``, one span after the other."""
    ends_N = views_N.cumsum(0)
    starts_N = ends_N - views_N

    def named(step: int) -> tuple[Tensor, Tensor]:
        """The images whose views are the rows of a span, and the numbers that key these views."""
        rows_B = torch.arange(spans[step].start, spans[step].stop, device=views_N.device)
        images_B = torch.searchsorted(ends_N, rows_B, right=True)
        return images_B, images_B * _MAX_VIEWS * 1024 + rows_B - starts_N.index_select(0, images_B)

    def plan(step: int) -> tuple[Tensor, View | None]:
        images_B, samples_B = named(step)
        return images_B, view_of(ops, samples_B, seed, _VIEW_STREAM)

    read = images.batches(plan, len(spans))
    with torch.no_grad(), reporter.task("features", sum(map(len, spans)), unit="image") as task:
        for step, span in enumerate(spans):
            pixels = augment(read(step)[0], named(step)[1], mean, std, seed=seed, stream=_VIEW_STREAM, ops=ops)
            put(span, extract(pixels).float())
            task.advance(len(span))


def extract_all(model: Callable[[Tensor], Tensor], images: Images, mean: Tensor, std: Tensor, *, batch_size: int,
                reporter: Reporter, what: str = "images", part: slice = slice(None)) -> Tensor:  # fmt: skip
    """``model`` over all images in order (or those in ``part``), un-augmented: [N, ...] on the CPU."""
    parts, wanted = [], torch.arange(len(images))[part]
    batches = wanted.split(batch_size)
    read = images.batches(lambda step: (batches[step], None), len(batches))
    with torch.no_grad(), reporter.task(what, len(wanted), unit="image") as task:
        for step in range(len(batches)):
            out = model(normalise(read(step)[0].to(mean.device), mean, std))
            parts.append(out.float().cpu())
            task.advance(len(out))
    return torch.cat(parts)


def online_features(extract: Callable[[Tensor], Tensor], images: Images, mean: Tensor, std: Tensor, *, ops: list[str],
                    seed: int) -> Callable[[Tensor, int, int], Tensor]:  # fmt: skip
    """``features(images_B, step, stream)``: fresh augmented views through the extractor, as the paper's code does it."""

    def features(images_B: Tensor, step: int, stream: int) -> Tensor:
        samples = torch.arange(len(images_B)) + step * len(images_B)
        pixels = images.rows(images_B, view_of(ops, samples, mix(seed, 4), stream))
        with torch.no_grad():
            out = extract(augment(pixels, samples, mean, std, seed=mix(seed, 4), stream=stream, ops=ops)).float()
        return out

    return features
