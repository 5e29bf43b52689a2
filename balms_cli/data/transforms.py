"""Augmentation of a whole batch at once, on the device where it lies: crop, flip, AutoAugment, Cutout.

Every random number is a hash of (seed, stream, sample): an image looks the same in a batch of any size, on any device, in
a resumed run and in any shard. ``sample`` is whatever names a draw uniquely: its place in the endless row of draws while
training (step * batch + i), image and view in the feature bank.

Shapes: B batch, H = W pixels a side; images uint8 [B, 3, H, W] in, float32 [B, 3, H, W] out, normalised.
"""

import torch
from torch import Tensor

from .samplers import mix


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


_M1, _M2, _GOLDEN = (_signed(c) for c in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def keyed_uniform(seed: int, stream: int, samples_B: Tensor, k: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 [B, k]: column j of sample i depends on (seed, stream, sample i, j) alone.

    splitmix64 (Steele et al., OOPSLA 2014) run as vector arithmetic on int64, whose overflow wraps as it must.
    """
    columns_K = torch.arange(1, k + 1, device=samples_B.device)
    x = samples_B[:, None] * _M1 + columns_K * _GOLDEN + _signed(mix(seed, stream) << 1)
    x = (x ^ _shift(x, 30)) * _M1
    x = (x ^ _shift(x, 27)) * _M2
    x = (x ^ _shift(x, 31)) * _M1
    x = x ^ _shift(x, 33)
    return _shift(x, 40).float() * 2**-24  # 24 bits: every value is exact in float32


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float32 with the given channel means and deviations (of pixels in 0..1)."""
    scale = 1 / (255 * std)
    return images.float().mul_(scale[:, None, None]).sub_((mean / std)[:, None, None])


def augment(images: Tensor, samples_B: Tensor, mean: Tensor, std: Tensor, *, seed: int, stream: int, ops: list[str]
            ) -> Tensor:  # fmt: skip
    """Crop (zero padding of 1/8 a side: 4 at 32 px), flip (p 1/2), AutoAugment (CIFAR policy), normalise, Cutout (a square
    of half the side): those in ``ops``, always in this order.

    ``samples_B`` is best on the CPU, wherever the images are: what is decided there needs no waiting for a GPU.
    """
    u = keyed_uniform(seed, stream, samples_B, 5).to(images.device, non_blocking=True)
    images = crop_flip(images, u[:, 0:2] if "crop" in ops else None, u[:, 2] if "flip" in ops else None)
    if "autoaugment" in ops:
        from .autoaugment import auto_augment

        images = auto_augment(images, samples_B, seed=seed, stream=stream)
    out = normalise(images, mean, std)
    return cutout(out, u[:, 3:5], out.shape[-1] // 2) if "cutout" in ops else out


def crop_flip(images: Tensor, u_crop_B2: Tensor | None, u_flip_B: Tensor | None) -> Tensor:
    """Random crop after zero padding, and horizontal flip, as one gather."""
    if u_crop_B2 is None and u_flip_B is None:
        return images
    batch, _, height, width = images.shape
    rows = torch.arange(height, device=images.device).expand(batch, height)
    columns = torch.arange(width, device=images.device).expand(batch, width)
    if u_flip_B is not None:
        columns = torch.where(u_flip_B[:, None] < 0.5, columns.flip(1), columns)
    if u_crop_B2 is not None:
        pad = max(1, height // 8)
        images = torch.nn.functional.pad(images, (pad, pad, pad, pad))
        offsets = (u_crop_B2 * (2 * pad + 1)).long()
        rows, columns = rows + offsets[:, :1], columns + offsets[:, 1:]
    which = torch.arange(batch, device=images.device)[:, None, None]
    # Indexing [B, H, W, 3] copies three neighbours a pixel; the result is a channels_last view of [B, 3, H, W].
    return images.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutout(images: Tensor, u_B2: Tensor, side: int) -> Tensor:
    """Cutout (DeVries and Taylor, 2017): a square around a uniform centre, clipped at the borders, set to the mean (0)."""
    height, width = images.shape[-2:]
    limits = torch.tensor([height, width], device=images.device)
    top_left = (u_B2 * limits).long() - side // 2

    def outside(length: int, first_B: Tensor) -> Tensor:
        place = torch.arange(length, device=images.device)
        return (place < first_B[:, None]) | (place >= first_B[:, None] + side)

    keep = outside(height, top_left[:, 0])[:, :, None] | outside(width, top_left[:, 1])[:, None, :]
    return images.mul_(keep[:, None])
