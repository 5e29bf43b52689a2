"""JPEG files decoded by the GPU (nvJPEG, through torchvision), where ``decode = gpu`` asks for it.

Workers then only read bytes and headers. What is not a plain RGB or gray JPEG, or what this decoder refuses, is left to
Pillow. Its pixels differ a little from Pillow's (another inverse transform, another resize), so that a run stays with the
decoder that it began with.
"""

import os
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .decode import BadImage, Box, check_size, open_image

_MAX_BYTES = 200_000_000


def jpeg_bytes(path: str, crop: Callable[[int, int], Box] | None) -> tuple[Tensor, Box] | None:
    """A JPEG's content, uint8 [bytes], and the part of the upright image to keep; None for what Pillow has to read."""
    try:
        with open_image(path) as image:
            check_size(image)
            if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L") or os.path.getsize(path) > _MAX_BYTES:
                return None
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            width, height = image.size[::-1] if turned else image.size
        box = crop(width, height) if crop else centre(width, height)
        return torch.from_numpy(np.fromfile(path, np.uint8)), box  # read here: a map would be, by whoever decodes
    except BadImage:
        raise
    except Exception:  # whatever it is, Pillow will name it
        return None


def centre(width: int, height: int) -> Box:
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def decode_into(pixels: Tensor, coded: dict[int, tuple[Tensor, Box]], size: int) -> None:
    """Decode on the device of ``pixels``, uint8 [B, 3, S, S], and fill in the places b that ``coded`` names."""
    from torchvision.io import ImageReadMode, decode_jpeg

    contents = [content for content, _ in coded.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision 0.29: to move to TorchCodec one day
        images = decode_jpeg(contents, mode=ImageReadMode.RGB, device=pixels.device, apply_exif_orientation=True)
    for (b, (_, (left, top, width, height))), image in zip(coded.items(), images, strict=True):
        part = image[None, :, top : top + height, left : left + width].float()
        fitted = interpolate(part, (size, size), mode="bicubic", antialias=True, align_corners=False)
        pixels[b] = fitted[0].round().clamp(0, 255).to(torch.uint8)
