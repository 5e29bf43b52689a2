"""Images with boxes, labels and masks, read ahead by threads. Pixels and targets are a function of the image alone.

Threads, as in ``data/feed.py``: Pillow decodes without the interpreter's lock, and polygons take little time beside it.

Shapes: I instances of an image, H x W its height and width in pixels as the JSON file has them.
"""

import os
import warnings
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.aside import name_some, printable
from ..data.decode import BadImage, check_size, open_image, reason, turn_for, upright_rgb, upright_size
from ..data.folders import is_inside
from ..data.images import default_workers, inside
from ..errors import DataError
from ..reporter import Reporter
from .annotations import Annotations, ImageInfo, keep_images

AHEAD = 2  # steps that are being read while one is trained on
MISSING, UNREADABLE = "missing images", "unreadable images"
Example = tuple[Tensor, dict[str, Any]]  # pixels uint8 [3, H, W], target


class DetectImages:
    """The images of ``annotations`` in ``folder``.

    At the start every file is looked for, each folder listed once. A missing one is a DataError (exit 3); with ``skip_bad``
    it is left out and counted, as is one that cannot be decoded whole or has another size than the JSON file says. Then
    ``annotations`` itself loses those images, and its counts, priors and labels are made anew: whoever holds it sees the
    images that are read here.
    """

    def __init__(self, annotations: Annotations, folder: str | Path, *, masks: bool = True, workers: int | None = None,
                 skip_bad: bool = False, reporter: Reporter | None = None):  # fmt: skip
        if masks and not annotations.masks:
            raise ValueError("these annotations were loaded without masks")
        self.annotations, self.folder, self.masks = annotations, Path(folder), masks
        self.workers = default_workers() if workers is None else workers
        warnings.filterwarnings("ignore", module=r"PIL\.")  # odd EXIF and the like; what matters is checked, see decode.py
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"pycocotools\.")
        self._root = os.path.realpath(self.folder)
        self._readers: list[Reader] = []
        self.paths = find_files(annotations.images, self.folder)
        missing = [image for image, path in zip(annotations.images, self.paths, strict=True) if path is None]
        if len(missing) == len(self) or (missing and not skip_bad):
            raise DataError(_missing_text(missing, len(self), self.folder))
        if skip_bad:
            self._keep([i for i, path in enumerate(self.paths) if path is not None], MISSING)
            self._keep(self._readable(reporter or Reporter()), UNREADABLE)

    def __len__(self) -> int:
        return len(self.annotations.images)

    def read(self, i: int) -> Example:
        """Pixels uint8 [3, H, W] and target: ``boxes`` float32 [I, 4] (x1, y1, x2, y2), ``labels`` int64 [I] in 1..C,
        ``mask_bits`` (where masks are wanted) as ``raster`` has them, ``image_id``. Raises: DataError that names the file."""
        image = self.annotations.images[i]
        try:
            pixels_3HW = self._pixels(i)
        except BadImage as error:
            raise DataError(f"{printable(self.paths[i])}: {error}; bring the right file back, or leave it out: "
                            "--set skip_bad=true") from None  # fmt: skip
        target = {"boxes": torch.from_numpy(image.boxes.astype(np.float32)), "labels": torch.from_numpy(image.labels.copy()),
                  "image_id": image.id}  # fmt: skip
        if self.masks:
            target["mask_bits"] = torch.from_numpy(raster(image))
        return pixels_3HW, target

    def file_sizes(self) -> list[int]:
        """Bytes of each image's file, -1 where it is gone: to tell other files from those that were seen before."""

        def size(path: str) -> int:
            try:
                return os.path.getsize(os.path.join(self._root, path))
            except OSError:
                return -1

        return [size(path) for path in self.paths]

    def reader(self, draw: Callable[[int], Sequence[int]], steps: int) -> "Reader":
        """``read(step) -> [(pixels, target), ...]`` of the images ``draw(step)``; the next steps', up to ``steps``, are read
        meanwhile. Any step may be the first, and one out of order begins anew there."""
        self._readers.append(Reader(self, draw, steps))
        return self._readers[-1]

    def close(self) -> None:
        """Stop reading ahead, in all readers."""
        for reader in self._readers:
            reader.close()

    def _pixels(self, i: int) -> Tensor:
        image = self.annotations.images[i]
        return read_pixels(inside(self._root, self.paths[i]), (image.width, image.height))

    def _keep(self, indices: list[int], reason: str) -> None:
        if len(indices) < len(self):
            self.paths = [self.paths[i] for i in indices]
            vars(self.annotations).update(vars(keep_images(self.annotations, indices, reason)))

    def _readable(self, reporter: Reporter) -> list[int]:
        def fine(i: int) -> bool:
            try:
                self._pixels(i)
            except BadImage:
                return False
            return True

        kept, count = [], len(self)
        with ThreadPoolExecutor(max(1, self.workers)) as pool, reporter.task("checking images", count, "image") as task:
            try:
                for i, good in enumerate(pool.map(fine, range(count))):
                    kept += [i] * good
                    task.advance()
            except BaseException:  # Ctrl-C: do not decode the rest first
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return kept


class Reader:
    """Steps of images, AHEAD of them under way; see :meth:`DetectImages.reader`."""

    def __init__(self, images: DetectImages, draw: Callable[[int], Sequence[int]], steps: int):
        self.images, self.draw, self.steps = images, draw, steps
        self.pool = ThreadPoolExecutor(images.workers, "balms-decode") if images.workers else None
        self.pending: dict[int, list[Future]] = {}

    def __call__(self, step: int) -> list[Example]:
        if self.pool is None:
            return [self.images.read(int(i)) for i in self.draw(step)]
        if step not in self.pending:
            self._cancel()
        for later in range(step, min(step + 1 + AHEAD, max(self.steps, step + 1))):
            if later not in self.pending:
                self.pending[later] = [self.pool.submit(self.images.read, int(i)) for i in self.draw(later)]
        return [future.result() for future in self.pending.pop(step)]

    def close(self) -> None:
        """Stop reading ahead."""
        self._cancel()
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def _cancel(self) -> None:
        for futures in self.pending.values():
            for future in futures:
                future.cancel()
        self.pending.clear()


# Files


def find_files(images: list[ImageInfo], folder: Path) -> list[str | None]:
    """Paths of the images relative to ``folder``; None: not there. Each folder is listed once.

    Looked for by the whole name, by its last part (``--images train2017`` with names ``train2017/...``), and without the
    ``COCO_train2014_`` of LVIS v0.5. Raises: DataError where ``folder`` is none, or a link leads out of it.
    """
    if not folder.is_dir():
        raise DataError(f"the images' folder {folder} does not exist: name another by --images")
    root = os.path.realpath(folder)
    listed: dict[str, dict[str, bool]] = {}  # by folder: its files, and which of them are links

    def there(name: str) -> bool:
        parent, _, file = name.rpartition("/")
        if parent not in listed:
            path = os.path.join(root, parent)
            if os.path.isdir(path) and not is_inside(os.path.realpath(path), root):
                raise DataError(_link_text(parent, folder))
            try:
                with os.scandir(path) as entries:
                    listed[parent] = {entry.name: entry.is_symlink() for entry in entries}
            except (OSError, ValueError):  # a name that is none on this system
                listed[parent] = {}
        if listed[parent].get(file) and not is_inside(os.path.realpath(os.path.join(root, name)), root):
            raise DataError(_link_text(name, folder))
        return file in listed[parent]

    return [next(filter(there, _possible_names(image.file_name)), None) for image in images]


def _link_text(name: str, folder: Path) -> str:
    return f"{folder / printable(name)} is a link that leaves the images' folder: name the folder it leads to by --images"


def _possible_names(name: str) -> list[str]:
    last = name.rpartition("/")[2]
    return [name, last, last[-16:]] if last.startswith("COCO_") else [name, last]


def _missing_text(missing: list[ImageInfo], total: int, folder: Path) -> str:
    names = name_some([printable(image.file_name) for image in missing], 1)
    hint = "name the images' folder by --images"
    if len(missing) < total:
        hint += ", or leave them out: --set skip_bad=true"
    return f"{len(missing)} of {total} images are not in {folder}: {names}; {hint}"


# Pixels and masks


def read_pixels(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """One image, RGB, uint8 [3, H, W]. ``size`` None: upright, as EXIF says.

    ``size``, width and height: that of the annotations. An image that has it as it is stored is not turned, since tools that
    draw polygons differ in whether they turn; one that has it only when turned is. Raises: BadImage for any other size, and
    for a file that cannot be decoded whole.
    """
    try:
        with open_image(path) as image:
            check_size(image)
            stored, upright = image.size, upright_size(image)
            if size is not None and size not in (stored, upright):
                raise BadImage(f"{stored[0]}x{stored[1]} pixels, where the annotations say {size[0]}x{size[1]}")
            with turn_for(image, None):
                image.load()
                found = upright_rgb(image, turn=size is None or size != stored)
            if size is not None and found.size != size:
                raise BadImage(f"{found.width}x{found.height} pixels once decoded, not {size[0]}x{size[1]}")
            array_HW3 = np.asarray(found)
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on hostile bytes; each is a bad image, not a bug
        raise BadImage(reason(error, path)) from None
    return torch.from_numpy(np.ascontiguousarray(array_HW3.transpose(2, 0, 1)))


def raster(image: ImageInfo) -> np.ndarray:
    """Masks of an image's instances, by pycocotools: to the pixel those that COCO and LVIS score. uint8 [I, H, W / 8 rounded
    up], eight pixels of a row a byte, as ``unpacked`` reads them: some images have 300 objects, and many images are read ahead.

    An instance that covers no pixel centre gets its box's pixels, one at least: it keeps its place among the boxes, so that
    image counts, the prior and the repeat factors remain those of the annotations.
    """
    from pycocotools import mask as coco_mask

    height, width = image.height, image.width
    bits_IHK = np.empty((len(image.packed), height, -(-width // 8)), np.uint8)
    for bits_HK, packed, box in zip(bits_IHK, image.packed, image.boxes, strict=True):
        rle = _rle(packed, height, width)
        if rle is not None and coco_mask.area(rle):
            mask_HW = coco_mask.decode(rle)
        else:
            mask_HW = np.zeros((height, width), np.uint8)
            x, y = (min(int(low), side - 1) for low, side in zip(box[:2], (width, height), strict=True))
            mask_HW[y : max(y + 1, round(box[3])), x : max(x + 1, round(box[2]))] = 1
        bits_HK[:] = np.packbits(np.ascontiguousarray(mask_HW), axis=1)  # column by column it would take four times as long
    return bits_IHK


def unpacked(bits_IHK: Tensor, width: int) -> Tensor:
    """Masks uint8 [I, H, W] of 0 and 1 from the bits of ``raster``, on the device where these are."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits_IHK.device)
    masks_IHK8 = (bits_IHK[..., None] >> shifts).bitwise_and_(1)
    return masks_IHK8.flatten(2)[..., :width]


def _rle(packed: tuple[array, ...] | dict[str, Any] | None, height: int, width: int) -> dict[str, Any] | None:
    from pycocotools import mask as coco_mask

    if isinstance(packed, tuple):
        return coco_mask.merge(coco_mask.frPyObjects(list(packed), height, width))
    return packed
