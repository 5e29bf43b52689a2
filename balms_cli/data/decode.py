"""One image file to an array: whatever its format and mode, and whoever made it."""

import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .aside import printable

# Plain raster formats only: Pillow's others can start programs (EPS) or hold no pixels of their own.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")


Box = tuple[int, int, int, int]  # left, top, width, height in pixels


class BadImage(Exception):
    """One image that cannot be read; the message is the reason, in a word or two."""


def read_image(path: str | Path, size: int | None, crop: Callable[[int, int], Box] | None = None, *,
               resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray | None:  # fmt: skip
    """One image as uint8 [3, size, size], RGB; ``size`` None: decode it in full and give nothing back.

    ``crop``: which part of the upright image to keep, from its width and height (default: the centre square). EXIF
    orientation is applied, alpha dropped, gray repeated, an animation's first frame taken, 16 bits scaled to 8.
    Raises: BadImage for whatever goes wrong, with a file from anywhere.
    """
    try:
        with open_image(path) as image:
            check_size(image)
            if size is None:
                image.load()
                return None
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            whole = image.size[::-1] if turned else image.size
            box = None if crop is None else crop(*whole)
            _draft(image, size, min(image.size) if box is None else min(box[2:]))
            upright = _to_rgb(ImageOps.exif_transpose(image))
            if box is None:
                return fit(upright, size, resample)
            x, y = upright.width / whole[0], upright.height / whole[1]  # as the decoder scaled it
            left, top, width, height = box
            edges = (left * x, top * y, (left + width) * x, (top + height) * y)
            return np.asarray(upright.resize((size, size), resample, box=edges)).transpose(2, 0, 1)
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on hostile bytes; each is a bad image, not a bug
        raise BadImage(_reason(error, path)) from None


def open_image(path: str | Path) -> Image.Image:
    """The image, its pixels not yet decoded. A pipe or device is refused: to open one may wait for ever."""
    if isinstance(path, str | os.PathLike) and not stat.S_ISREG(os.stat(path).st_mode):
        raise BadImage("not a regular file")
    Image.init()
    return Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN])


def check_size(image: Image.Image) -> None:
    """Raises: BadImage for an image of more pixels than Pillow lets pass; nothing of it is decoded yet."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:
        raise BadImage(f"{image.width}x{image.height} pixels, more than {limit}")


def _draft(image: Image.Image, size: int, shorter: int) -> None:
    """Let the JPEG decoder scale a large photo down (by 2, 4 or 8): ``shorter``, the shorter side of what is kept of it,
    to no less than twice what is needed."""
    if image.format == "JPEG" and shorter >= 4 * size:
        scale = 2 * size / shorter
        image.draft(None, (round(image.width * scale), round(image.height * scale)))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode[0] in "IF":  # 16 and 32 bits a pixel: Pillow would clip, not scale
        values = np.asarray(image, dtype=np.float64)
        highest = values.max(initial=0)
        top = 65535.0
        if image.mode in ("I", "F") and highest <= 255:  # the mode does not say its range; its values do
            top = 1.0 if image.mode == "F" and highest <= 1 else 255.0
        image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # by way of alpha: a transparent palette entry keeps its colour
    return image.convert("RGB")


def fit(image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """The centre square, resized; the same as resizing the shorter side and cropping, at less cost for long images."""
    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((size, size), resample, box=(left, top, left + side, top + side))
    return np.asarray(image).transpose(2, 0, 1)


def _reason(error: Exception, path: str | Path) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, UnidentifiedImageError):
        return "not an image" if os.path.getsize(path) else "empty"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or str(error)
    text = printable(str(error)) or type(error).__name__
    return "truncated" if "truncated" in text.lower() else text[:80]


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow's warnings (bombs, odd EXIF) silenced, as what matters is checked here. Set once, before any thread."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
