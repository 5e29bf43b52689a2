"""Small pictures of single test images, as data: URIs. Read by the project's own readers, which believe no file."""

import base64
import io
from dataclasses import replace

import numpy as np

from ..data.decode import BadImage, quiet_pillow, read_image
from ..data.images import inside, load_pixels, root_of
from ..data.index import Split
from ..errors import DataError
from .scored import Scored

SIZE = 96  # pixels of a side, at most: about 3 kB


def thumbnails(scored: list[Scored], wanted: list[tuple[int, str]]) -> dict[tuple[int, str], str]:
    """``data:`` URIs of images by (run, key). One that can no longer be read is not there."""
    found: dict[tuple[int, str], str] = {}
    seen: dict[tuple[str, str, str], str | None] = {}  # runs of one data set show the same images
    for run in sorted({run for run, _ in wanted}):
        one = scored[run]
        source = (one.manifest.source["kind"], one.manifest.source["root"])
        keys = [key for r, key in dict.fromkeys(wanted) if r == run]
        new = [key for key in keys if (*source, key) not in seen]
        seen |= {(*source, key): uri for key, uri in zip(new, _read(one, new), strict=True)}
        found |= {(run, key): seen[(*source, key)] for key in keys if seen[(*source, key)] is not None}
    return found


def _read(one: Scored, keys: list[str]) -> list[str | None]:
    size = max(8, min(SIZE, min(one.manifest.image_size)))
    if not keys:
        return []
    if one.manifest.source["kind"] in ("digits", "cifar"):
        part = Split(keys, np.zeros(len(keys), dtype=np.int64))
        try:
            return [_uri(pixels) for pixels in load_pixels(replace(one.manifest, splits={"test": part}), "test", size)]
        except (DataError, OSError):
            return [None] * len(keys)
    try:
        root = root_of(one.manifest)
    except DataError:
        return [None] * len(keys)
    with quiet_pillow():
        return [_read_file(root, key, size) for key in keys]


def _read_file(root: str, key: str, size: int) -> str | None:
    try:
        return _uri(read_image(inside(root, key), size))
    except (BadImage, OSError, ValueError):
        return None


def _uri(pixels: np.ndarray) -> str:
    """uint8 [3, H, W] as a WebP where Pillow writes it, else a PNG; small ones without loss."""
    from PIL import Image, features

    image, stream = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))), io.BytesIO()
    if features.check("webp") and min(image.size) > 40:
        image.save(stream, "WEBP", quality=80, method=4)
        kind = "webp"
    else:
        image.save(stream, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
