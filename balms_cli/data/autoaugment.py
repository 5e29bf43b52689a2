"""AutoAugment's policy for CIFAR-10 (Cubuk et al., CVPR 2019), on a whole batch at once, on the device where it lies.

An image meets one of 25 sub-policies: two operations in a row, each applied with its own probability at its own level 0..9.
Law and pixels are those of ``torchvision.transforms.AutoAugment`` on uint8 tensors (nearest pixel, empty corners black).
What happens to an image is a hash of (seed, stream, sample) as in ``transforms``, and decided on the CPU: the host has to
know how the batch splits into groups, and must not wait for the device to learn it.

Every operation is a function of (images uint8 [B, 3, H, W], magnitude_B float64 on the CPU) and returns new images. Sums are
taken of integers and products one at a time, so that the outcome does not hang on batch size or device.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from .samplers import mix
from .transforms import keyed_uniform

_LEVELS = 10
_KEY = 21  # sets these numbers apart from those of ``augment``, which is called with the same seed and stream

# Twice (operation, probability, level): the appendix of arXiv 1805.09501, reduced CIFAR-10. The paper also has levels for
# invert, autocontrast and equalize, which have no strength; they are 0 here.
POLICIES = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)


def auto_augment(pixels_u8: Tensor, samples: Tensor, *, seed: int, stream: int) -> Tensor:
    """One sub-policy an image: uint8 [B, 3, H, W] to the same on the same device; the input is left alone.

    Give ``samples`` on the CPU: from a GPU they have to be fetched first, and the host waits for all that is queued there.
    """
    policy_B, applied_B2, sign_B2 = decide(samples.cpu(), seed=seed, stream=stream)
    op_B2, level_B2 = _OP_P2[policy_B], _LEVEL_P2[policy_B]
    table, signed = magnitude_table(*pixels_u8.shape[-2:])
    magnitude_B2 = table[op_B2, level_B2] * torch.where(signed[op_B2], sign_B2, 1)
    op_B2 = torch.where(applied_B2, op_B2, len(OPS))  # the number past the last operation: leave it
    out = pixels_u8.clone(memory_format=torch.contiguous_format)
    for op_B, magnitude_B in zip(op_B2.T, magnitude_B2.T, strict=True):
        order_B = op_B.argsort(stable=True)
        rows_B, magnitude_B = order_B.to(out.device, non_blocking=True), magnitude_B[order_B]
        sizes = torch.bincount(op_B, minlength=len(OPS) + 1).tolist()[:-1]
        first = 0
        for op, size in zip(OPS.values(), sizes, strict=True):
            if size:
                group = slice(first, first + size)
                out.index_copy_(0, rows_B[group], op(out.index_select(0, rows_B[group]), magnitude_B[group]))
            first += size
    return out


def decide(samples_B: Tensor, *, seed: int, stream: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sub-policy [B], whether each of its two operations is applied [B, 2], and the sign of each magnitude (+-1) [B, 2]."""
    u = keyed_uniform(mix(seed, _KEY), stream, samples_B, 5).double()
    policy_B = (u[:, 0] * len(POLICIES)).long()
    return policy_B, u[:, 1:3] < _PROBABILITY_P2[policy_B], torch.where(u[:, 3:5] < 0.5, -1, 1)


@lru_cache(maxsize=32)
def magnitude_table(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Magnitudes [operation, level] float64 in the order of ``OPS``, and which operations take either sign [operation]."""
    last = {"shear_x": 0.3, "shear_y": 0.3, "translate_x": 150 / 331 * width, "translate_y": 150 / 331 * height,
            "rotate": 30.0, "brightness": 0.9, "color": 0.9, "contrast": 0.9, "sharpness": 0.9}  # fmt: skip
    rows = {op: torch.linspace(0, end, _LEVELS) for op, end in last.items()}  # float32: a threshold of 170 stays 170
    rows["posterize"] = 8 - (torch.arange(_LEVELS) * 4 / (_LEVELS - 1)).round()
    rows["solarize"] = torch.linspace(255, 0, _LEVELS)
    table = torch.stack([rows.get(op, torch.zeros(_LEVELS)) for op in OPS]).double()
    return table, torch.tensor([op in last for op in OPS])


def shear_x(images: Tensor, magnitude_B: Tensor) -> Tensor:
    """Rows slide sideways by ``magnitude`` pixels a row; the top edge stays."""
    return _move(images, "shear_x", magnitude_B)


def shear_y(images: Tensor, magnitude_B: Tensor) -> Tensor:
    """Columns slide up or down by ``magnitude`` pixels a column; the left edge stays."""
    return _move(images, "shear_y", magnitude_B)


def translate_x(images: Tensor, magnitude_B: Tensor) -> Tensor:
    """To the right by the whole part of ``magnitude``, in pixels."""
    return _move(images, "translate_x", magnitude_B)


def translate_y(images: Tensor, magnitude_B: Tensor) -> Tensor:
    """Down by the whole part of ``magnitude``, in pixels."""
    return _move(images, "translate_y", magnitude_B)


def rotate(images: Tensor, magnitude_B: Tensor) -> Tensor:
    """About the centre by ``magnitude`` degrees, anticlockwise."""
    return _move(images, "rotate", magnitude_B)


def brightness(images: Tensor, magnitude_B: Tensor) -> Tensor:
    """Away from black: (1 + magnitude) times the image."""
    return _blend(images, torch.zeros((), device=images.device), magnitude_B)


def color(images: Tensor, magnitude_B: Tensor) -> Tensor:
    """Away from the grey image: more or less saturated."""
    return _blend(images, _grey(images), magnitude_B)


def contrast(images: Tensor, magnitude_B: Tensor) -> Tensor:
    """Away from the mean of the grey image."""
    grey = _grey(images)
    # Whole numbers summed exactly, then one quotient in float64: the float32 nearest to the mean, on every device.
    mean = grey.sum((1, 2, 3), dtype=torch.int64).double() / grey[0].numel()
    return _blend(images, mean.float()[:, None, None, None], magnitude_B)


def sharpness(images: Tensor, magnitude_B: Tensor) -> Tensor:
    """Away from the smoothed image: 3 x 3 neighbours, the middle five-fold; the outermost pixels count as smooth."""
    if min(images.shape[-2:]) <= 2:
        return images.clone()
    smooth = images.float()
    three = smooth[..., :-2, :] + smooth[..., 1:-1, :] + smooth[..., 2:, :]
    nine = three[..., :-2] + three[..., 1:-1] + three[..., 2:]
    # A whole number over 13 is never nearer to a half than 1/26: no order of the sums can round it another way.
    smooth[..., 1:-1, 1:-1] = nine.add_(smooth[..., 1:-1, 1:-1], alpha=4).mul_(1 / 13).round_()
    return _blend(images, smooth, magnitude_B)


def posterize(images: Tensor, magnitude_B: Tensor) -> Tensor:
    """Keep the ``magnitude`` highest bits of every value."""
    mask_B = (256 - 2 ** (8 - magnitude_B.long())).to(torch.uint8)
    return images & _spread(mask_B, images)


def solarize(images: Tensor, magnitude_B: Tensor) -> Tensor:
    """Invert the values from ``magnitude`` upwards."""
    threshold_B = magnitude_B.ceil().to(torch.uint8)  # of whole numbers, the same ones reach it
    return torch.where(images >= _spread(threshold_B, images), ~images, images)


def autocontrast(images: Tensor, magnitude_B: Tensor) -> Tensor:
    """Stretch every channel to 0..255; a flat channel stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = low == high
    scale = torch.where(flat, 1, 255 / (high - low))
    return images.float().sub_(torch.where(flat, 0, low)).mul_(scale).clamp_(0, 255).to(torch.uint8)


def equalize(images: Tensor, magnitude_B: Tensor) -> Tensor:
    """Spread the values of every channel so that each is about equally frequent; a channel too flat for it stays."""
    value = images.flatten(2).long()
    count = torch.zeros(*value.shape[:2], 256, dtype=torch.int64, device=images.device)
    count.scatter_add_(2, value, torch.ones((), dtype=torch.int64, device=images.device).expand_as(value))
    brightest = count.gather(2, value.amax(2, keepdim=True))
    step = (value.shape[2] - brightest) // 255
    below = count.cumsum(2) - count
    lookup = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    lookup = torch.where(step == 0, torch.arange(256, device=images.device), lookup).to(torch.uint8)
    return lookup.gather(2, value).view_as(images)


def invert(images: Tensor, magnitude_B: Tensor) -> Tensor:
    """The negative."""
    return ~images


OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {op.__name__: op for op in (
    shear_x, shear_y, translate_x, translate_y, rotate, brightness, color, contrast, sharpness, posterize, solarize,
    autocontrast, equalize, invert)}  # fmt: skip

_PROBABILITY_P2 = torch.tensor([[p for _, p, _ in pair] for pair in POLICIES], dtype=torch.float64)
_OP_P2 = torch.tensor([[list(OPS).index(op) for op, _, _ in pair] for pair in POLICIES])
_LEVEL_P2 = torch.tensor([[level for _, _, level in pair] for pair in POLICIES])


def _spread(values_B: Tensor, images: Tensor) -> Tensor:
    """A number an image, [B, 1, 1, 1] beside the images."""
    return values_B.to(images.device, non_blocking=True)[:, None, None, None]


def _blend(images: Tensor, other: Tensor, magnitude_B: Tensor) -> Tensor:
    """(1 + magnitude) images - magnitude other, clipped, its fraction dropped."""
    factor_B = 1 + magnitude_B
    ours, theirs = _spread(torch.stack([factor_B, 1 - factor_B], 1).float(), images).unbind(-1)
    return images.float().mul_(ours).add_(other * theirs).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Luma (ITU-R 601) in whole steps: uint8 [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).to(torch.uint8)


def _move(images: Tensor, op: str, magnitude_B: Tensor) -> Tensor:
    """Every pixel from its source under ``op``; magnitudes are few, so that each one's map is made once and kept."""
    height, width = images.shape[-2:]
    distinct, which_B = magnitude_B.unique(return_inverse=True)
    maps = torch.stack([_sources(op, m, height, width, images.device) for m in distinct.tolist()])
    source = maps.index_select(0, which_B.to(images.device, non_blocking=True))[:, None].expand(-1, 3, -1)
    return torch.nn.functional.pad(images.flatten(2), (1, 0)).gather(2, source).view_as(images)


@lru_cache(maxsize=128)
def _sources(op: str, magnitude: float, height: int, width: int, device: torch.device) -> Tensor:
    """Where each pixel comes from, int64 [H * W]: 1 + the number of the source pixel, 0 for none."""
    turn = math.radians(magnitude)
    x_x, x_y, x_1, y_x, y_y, y_1 = {
        "shear_x": (1, magnitude, magnitude * height / 2, 0, 1, 0),
        "shear_y": (1, 0, 0, magnitude, 1, magnitude * width / 2),
        "translate_x": (1, 0, -int(magnitude), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -int(magnitude)),
        "rotate": (math.cos(turn), -math.sin(turn), 0, math.sin(turn), math.cos(turn), 0),
    }[op]
    # In float32 from the centre of the image, half its side as the unit: where the source lies midway between two pixels,
    # this decides as torchvision does, but on processors whose matrix product rounds otherwise than plain sums. We have none:
    # autocast would do it in bfloat16.
    x = torch.arange(0.5 - width / 2, width / 2)
    y = torch.arange(0.5 - height / 2, height / 2)[:, None]
    a, b, c, d, e, f = torch.tensor([x_x, x_y, x_1, y_x, y_y, y_1], dtype=torch.float32) / torch.tensor(
        [width / 2] * 3 + [height / 2] * 3)  # fmt: skip
    grid = torch.stack([a * x + b * y + c, d * x + e * y + f], -1)[None]
    number = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, 1, height, width)
    return torch.nn.functional.grid_sample(number, grid, mode="nearest", align_corners=False).long().flatten().to(device)
