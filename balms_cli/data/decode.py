"""One image file to an array: whatever its format and mode, and whoever made it."""

import logging
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from . import tar_entry
from .aside import printable

# Plain raster formats only: Pillow's others can start programs (EPS) or hold no pixels of their own.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")
BIG = 32_000_000  # pixels; images above that are decoded one at a time, so that threads do not multiply their memory
_one_big = threading.Lock()
_STRIP = 1 << 20  # values that are scaled to 8 bits at a time
_DAMAGED = ("truncated", "not enough image data", "broken data stream", "unrecognized data stream", "decoder object")
_HEIF = (b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1")  # from byte 4 on, of a phone's HEIC photo
_DRAFTED = ("JPEG", "MPO")  # MPO: a JPEG file with further pictures behind the first
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else what it logs of odd files goes to stderr

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
            with turn_for(image, size):
                return _read(image, size, crop, resample)
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on hostile bytes; each is a bad image, not a bug
        raise BadImage(reason(error, path)) from None


def _read(image: Image.Image, size: int | None, crop: Callable[[int, int], Box] | None, resample: Image.Resampling
          ) -> np.ndarray | None:  # fmt: skip
    if size is None or image.format not in _DRAFTED:
        image.load()  # all of it: a PNG file may have its EXIF behind the pixels
    if size is None:
        return None
    whole = upright_size(image)
    box = None if crop is None else crop(*whole)
    _draft(image, size, min(image.size) if box is None else min(box[2:]))
    upright = upright_rgb(image)
    if box is None:
        return fit(upright, size, resample)
    x, y = upright.width / whole[0], upright.height / whole[1]  # as the decoder scaled it
    left, top, width, height = box
    edges = (left * x, top * y, (left + width) * x, (top + height) * y)
    return np.asarray(upright.resize((size, size), resample, box=edges)).transpose(2, 0, 1)


def turn_for(image: Image.Image, size: int | None) -> AbstractContextManager:
    """To decode it within: a large image waits until no other such is. A JPEG that is scaled down row by row takes little."""
    scaled = image.format in _DRAFTED and not image.info.get("progressive") and size and min(image.size) >= 17 * size
    much = image.width * image.height > BIG and not scaled  # 17: random crops are a quarter as long at least, see _draft
    return _one_big if much else nullcontext()


def open_image(path: str | Path | BinaryIO) -> Image.Image:
    """The image of a path or an open file, its pixels not yet decoded. A pipe or device is refused: it may wait for ever."""
    if isinstance(path, str | os.PathLike) and (entry := tar_entry.open_entry(path)) is not None:
        path = entry
    if isinstance(path, str | os.PathLike) and not stat.S_ISREG(os.stat(path).st_mode):
        raise BadImage("not a regular file")
    Image.init()
    return Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN])


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height once EXIF's turn is applied, from what was read so far. Pillow turns those of a TIFF file itself."""
    turned = image.format != "TIFF" and Image.Image.getexif(image).get(0x0112, 1) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def check_size(image: Image.Image) -> None:
    """Raises: BadImage for an image of more pixels than Pillow lets pass; nothing of it is decoded yet."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:
        raise BadImage(f"{image.width}x{image.height} pixels, more than {limit}")


def _draft(image: Image.Image, size: int, shorter: int) -> None:
    """Let the JPEG decoder scale a large photo down (by 2, 4 or 8): ``shorter``, the shorter side of what is kept of it,
    to no less than twice what is needed."""
    if image.format in _DRAFTED and shorter >= 4 * size:
        scale = 2 * size / shorter
        image.draft(None, (round(image.width * scale), round(image.height * scale)))


def upright_rgb(image: Image.Image, turn: bool = True) -> Image.Image:
    """A decoded image turned upright (``turn`` False: as it is stored), as RGB of 8 bits; ``image`` itself where it is that
    already."""
    # A TIFF file of 16 bits whose 0 is white: the only kind that Pillow leaves as a negative.
    negative = image.format == "TIFF" and image.mode == "I;16" and image.tag_v2.get(262) == 0
    if turn:
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":
        image = _to_8_bits(image, negative)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # by way of alpha: a transparent palette entry keeps its colour
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image, negative: bool) -> Image.Image:
    """16 and 32 bits a pixel scaled to 8, where Pillow would clip. A strip at a time, as this takes ten times the memory."""
    values = np.asarray(image)
    top = 65535.0
    if image.mode in ("I", "F"):  # the mode does not say its range; its values do
        highest = values.max(initial=0, where=np.isfinite(values))
        if highest <= 255:
            top = 1.0 if image.mode == "F" and highest <= 1 else 255.0
    table = np.rint(np.arange(int(top) + 1) * (255 / top)).astype(np.uint8)
    table = 255 - table if negative else table
    scaled = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _STRIP // max(1, image.width))
    for first in range(0, len(values), rows):
        strip = values[first : first + rows]
        if strip.dtype.kind == "f":
            scaled[first : first + rows] = np.rint(np.nan_to_num(strip.astype(np.float64)).clip(0, top) * (255 / top))
        else:
            scaled[first : first + rows] = table[strip.clip(0, int(top))]
    return Image.fromarray(scaled)


def fit(image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """The centre square, resized; the same as resizing the shorter side and cropping, at less cost for long images."""
    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((size, size), resample, box=(left, top, left + side, top + side))
    return np.asarray(image).transpose(2, 0, 1)


def reason(error: Exception, source: str | Path | BinaryIO) -> str:
    """Why ``source``, a file or its path, could not be read as an image: a word or two."""
    if isinstance(error, BadImage):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, UnidentifiedImageError):
        first = _first_bytes(source)
        if first[4:].startswith(_HEIF):
            return "a HEIC photo: convert it to JPEG"
        return "not an image" if first else "empty"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or str(error)
    text = printable(str(error)) or type(error).__name__
    if "MAX_TEXT" in text:
        return "text or profile too large"  # Pillow names its own constant
    return "truncated" if any(part in text.lower() for part in _DAMAGED) else text[:80]


def _first_bytes(source: str | Path | BinaryIO) -> bytes:
    if not isinstance(source, str | os.PathLike):
        source.seek(0)
        return source.read(12)
    with tar_entry.open_entry(source) or open(source, "rb") as file:
        return file.read(12)


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow's warnings (bombs, odd EXIF) silenced, as what matters is checked here. Set once, before any thread."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
