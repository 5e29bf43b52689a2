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
from .feed import Batches, Images, View, view_of
from .samplers import mix
from .transforms import augment, normalise

_MAX_VIEWS = 64
_VIEW_STREAM = 3


@dataclass(frozen=True)
class FeatureBank:
    """Rows of image i are ``features[starts[i] : starts[i] + views[i]]``."""

    features: Tensor  # [R, D] float32
    starts: Tensor  # [N]
    views: Tensor  # [N]

    def rows(self, images_B: Tensor, generator: torch.Generator) -> Tensor:
        """Features [B, D] of one view of each image, drawn uniformly."""
        u_B = torch.rand(len(images_B), generator=generator, device=self.features.device)
        rows_B = self.starts.index_select(0, images_B) + (u_B * self.views.index_select(0, images_B)).long()
        return self.features.index_select(0, rows_B)


def plan_views(labels_N: Tensor, counts_C: Tensor, views: int, class_rows: int) -> Tensor:
    """Views of each image [N]: at least ``views``, and so many that its class has ``class_rows`` rows (at most 64 views)."""
    needed_C = (class_rows + counts_C - 1) // counts_C
    return needed_C.clamp(min=views, max=max(views, _MAX_VIEWS))[labels_N]


def build_bank(extract: Callable[[Tensor], Tensor], images: Images, views_N: Tensor, mean: Tensor, std: Tensor, *,
               ops: list[str], seed: int, batch_size: int, reporter: Reporter, part: slice = slice(None)
               ) -> FeatureBank:  # fmt: skip
    """Features of every planned view, or of the rows in ``part`` alone (one process of several).

    ``extract``: normalised images [B, 3, H, W] to features [B, D], in eval mode.
    View v of image i is keyed by (seed, i, v): the bank does not depend on batch size, order or device.
    """
    image_R = torch.repeat_interleave(views_N)
    starts_N = views_N.cumsum(0) - views_N
    view_R = (torch.arange(len(image_R), device=views_N.device) - starts_N[image_R])[part]
    image_R = image_R[part]
    sample_R = image_R * _MAX_VIEWS * 1024 + view_R
    read, count = _in_order(images, image_R, batch_size, lambda rows: view_of(ops, sample_R[rows], seed, _VIEW_STREAM))
    features = None
    with torch.no_grad(), reporter.task("features", len(image_R), unit="image") as task:
        for step in range(count):
            rows = slice(step * batch_size, (step + 1) * batch_size)
            out = extract(augment(read(step)[0], sample_R[rows], mean, std, seed=seed, stream=_VIEW_STREAM, ops=ops)).float()
            if features is None:
                features = torch.empty(len(image_R), out.shape[1], device=out.device)
            features[rows] = out
            task.advance(len(out))
    return FeatureBank(features, starts_N, views_N)


def _in_order(images: Images, image_R: Tensor, batch_size: int, view: Callable[[slice], View | None]) -> tuple[Batches, int]:
    """The images ``image_R`` in batches, one after the other, and how many batches they are."""

    def plan(step: int) -> tuple[Tensor, View | None]:
        rows = slice(step * batch_size, (step + 1) * batch_size)
        return image_R[rows], view(rows)

    count = -(-len(image_R) // batch_size)
    return images.batches(plan, count), count


def extract_all(model: Callable[[Tensor], Tensor], images: Images, mean: Tensor, std: Tensor, *, batch_size: int,
                reporter: Reporter, what: str = "images", part: slice = slice(None)) -> Tensor:  # fmt: skip
    """``model`` over all images in order (or those in ``part``), un-augmented: [N, ...] on the CPU."""
    parts, wanted = [], torch.arange(len(images))[part]
    read, count = _in_order(images, wanted, batch_size, lambda rows: None)
    with torch.no_grad(), reporter.task(what, len(wanted), unit="image") as task:
        for step in range(count):
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
