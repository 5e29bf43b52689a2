"""A split's images as batches: from memory where they fit, else read ahead from their files by decoder threads.

Which images a step sees is known before it comes (``Plan``, a function of the step), so the files of the next batches are
decoded while this one is trained on. Workers are threads: Pillow decodes and resizes without the interpreter's lock, so
they run side by side like processes would, but need no shared memory, no fork, and no signal ever reaches them. What a
batch holds depends on the plan alone: not on their number, and not on who finishes first.

Shapes: N images, B batch, S pixels a side.
"""

import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..reporter import Reporter
from . import moved
from .aside import printable
from .decode import BadImage, Box, read_image
from .images import default_workers, inside, root_of
from .manifest import Manifest
from .samplers import mix

AHEAD = 2  # batches that are being read while one is trained on
_CHUNK = 8  # images a thread takes at a time


@dataclass(frozen=True)
class View:
    """Names the random crops of a batch: that of image b is keyed by (seed, stream, samples_B[b]) alone."""

    samples_B: Tensor
    seed: int
    stream: int


def view_of(ops: list[str], samples_B: Tensor, seed: int, stream: int) -> View | None:
    """The crops that an augmentation asks for: random ones with ``resized-crop`` among ``ops``, else none."""
    return View(samples_B, seed, stream) if "resized-crop" in ops else None


Plan = Callable[[int], tuple[Tensor, View | None]]  # step -> images [B], and their crops (None: the centre of each)
Batches = Callable[[int], tuple[Tensor, Tensor]]  # step -> pixels uint8 [B, 3, S, S] on the device, images [B]


@dataclass
class Pace:
    """Who waits for whom, since the last look: images a second that reading could give, and that the steps could take."""

    images: int = 0
    read_seconds: float = 0.0  # summed over the threads
    wait_seconds: float = 0.0  # of the step for its images
    began: float = 0.0

    def rates(self, workers: int) -> dict[str, float]:
        spent = max(time.perf_counter() - self.began - self.wait_seconds, 1e-9)
        return {"input_images_per_second": round(self.images * max(workers, 1) / max(self.read_seconds, 1e-9), 1),
                "step_images_per_second": round(self.images / spent, 1)}  # fmt: skip


class InMemory:
    """All pixels of a split as one tensor, on the device where they fit well."""

    def __init__(self, pixels: Tensor, labels: Tensor, device: torch.device):
        self.pixels, self.labels, self.device = pixels, labels, device

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, images_B: Tensor, view: View | None = None) -> Tensor:
        """Pixels [B, 3, S, S] on the device. Random crops are cut from files: there are none here."""
        return self.pixels[images_B.to(self.pixels.device)].to(self.device, non_blocking=True)

    def batches(self, plan: Plan, stop: int) -> Batches:
        def read(step: int) -> tuple[Tensor, Tensor]:
            images_B, view = plan(step)
            return self.rows(images_B, view), images_B

        return read

    def paces(self) -> dict[str, float]:
        """Nothing to tell: an index into memory keeps nobody waiting."""
        return {}

    def waited(self) -> float | None:
        return None

    def close(self) -> None:
        pass


class OnDisk:
    """The image files of a split, decoded when they are needed by ``workers`` threads (0: by the caller itself).

    Every step of the same plan gives the same pixels, whatever the number of workers. Raises DataError (exit 3) where a
    file that ``make-lt`` could read can no longer be read.
    """

    def __init__(self, manifest: Manifest, split: str, size: int, device: torch.device, *, workers: int | None = None,
                 decode: str = "cpu", reporter: Reporter | None = None):  # fmt: skip
        if reporter is not None:
            moved.tell(manifest.moved_from, manifest.source["root"], reporter)
        self.root, self.keys, self.size, self.device = root_of(manifest), manifest.splits[split].keys, size, device
        self.labels = torch.from_numpy(manifest.splits[split].labels)
        self.workers = default_workers() if workers is None else workers
        self.pool = ThreadPoolExecutor(self.workers, "balms-decode") if self.workers else None
        self.pace, self.total = Pace(began=time.perf_counter()), Pace(began=time.perf_counter())
        self.decode = decode
        warnings.filterwarnings("ignore", module=r"PIL\.")  # odd EXIF and the like; what matters is checked, see decode.py

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, images_B: Tensor, view: View | None = None) -> Tensor:
        """Pixels [B, 3, S, S] on the device, read now."""
        return self._collect(self._submit(images_B, view))

    def batches(self, plan: Plan, stop: int) -> Batches:
        """Batch by batch, AHEAD of them under way. A step out of order begins anew there. ``stop``: the plan's length."""
        pending: dict[int, tuple[Tensor, _Reading]] = {}
        self.pace, self.total = Pace(began=time.perf_counter()), Pace(began=time.perf_counter())

        def read(step: int) -> tuple[Tensor, Tensor]:
            if step not in pending:
                for _, reading in pending.values():
                    reading.cancel()
                pending.clear()
            for later in range(step, min(step + 1 + AHEAD, stop)):
                if later not in pending:
                    images_B, view = plan(later)
                    pending[later] = (images_B, self._submit(images_B, view))
            images_B, reading = pending.pop(step)
            return self._collect(reading), images_B

        return read

    def paces(self) -> dict[str, float]:
        """Images a second that reading could give and that the steps could take, since the last call.

        Both while they share the processors: on a busy CPU each is slower than it would be alone.
        """
        rates = self.pace.rates(self.workers)
        self.pace = Pace(began=time.perf_counter())
        return rates

    def waited(self) -> float:
        """Share of the time since the last plan began that was spent waiting for images."""
        return self.total.wait_seconds / max(time.perf_counter() - self.total.began, 1e-9)

    def close(self) -> None:
        """Stop reading ahead."""
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, images_B: Tensor, view: View | None) -> "_Reading":
        images, samples = images_B.tolist(), view.samples_B.tolist() if view is not None else None
        out = torch.empty(len(images), 3, self.size, self.size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        reading = _Reading(images, out, {}, [])

        def read(first: int) -> float:
            began = time.perf_counter()
            for b in range(first, min(first + _CHUNK, len(images))):
                crop = None if view is None else keyed_crop(mix(view.seed, view.stream, samples[b]))
                self._read(images[b], b, crop, reading, gpu=self.decode == "gpu")
            return time.perf_counter() - began

        chunks = range(0, len(images), _CHUNK)
        reading.chunks = [self.pool.submit(read, c) for c in chunks] if self.pool else [_Now(read, c) for c in chunks]
        return reading

    def _read(self, image: int, b: int, crop: Callable[[int, int], Box] | None, reading: "_Reading", *, gpu: bool) -> None:
        key = self.keys[image]
        try:
            path = inside(self.root, key)
            if gpu:
                from .gpu_decode import jpeg_bytes

                if (found := jpeg_bytes(path, crop)) is not None:
                    reading.coded[b] = found
                    return
            reading.out[b] = torch.from_numpy(np.ascontiguousarray(read_image(path, self.size, crop)))
        except BadImage as error:
            raise DataError(f"{printable(key)} can no longer be read ({error}); bring it back, or make the data anew: "
                            "balms make-lt --skip-bad leaves it out") from None  # fmt: skip

    def _collect(self, reading: "_Reading") -> Tensor:
        began = time.perf_counter()
        try:
            read_seconds = sum(chunk.result() for chunk in reading.chunks)
        except BaseException:  # a bad file, Ctrl-C: this is the end, whoever asked; do not decode what is under way first
            self.close()
            raise
        pixels = reading.out.to(self.device, non_blocking=True)
        if reading.coded:
            from .gpu_decode import decode_into

            try:
                decode_into(pixels, reading.coded, self.size)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a file that it refuses: Pillow reads it, or says what is wrong with it
                for b, (_, box) in reading.coded.items():
                    self._read(reading.images[b], b, lambda *_, box=box: box, reading, gpu=False)
                pixels = reading.out.to(self.device, non_blocking=True)
        waited = time.perf_counter() - began
        for pace in (self.pace, self.total):
            pace.images, pace.read_seconds = pace.images + len(pixels), pace.read_seconds + read_seconds
            pace.wait_seconds += waited
        return pixels


@dataclass
class _Reading:
    """A batch under way: pixels that arrive in ``out``, files left to a GPU's decoder in ``coded`` by place."""

    images: list[int]
    out: Tensor
    coded: dict[int, tuple[Tensor, Box | None]]
    chunks: list["Future | _Now"]

    def cancel(self) -> None:
        for chunk in self.chunks:
            chunk.cancel()


class _Now:
    """A future that does its work when it is asked for it: without workers the caller reads."""

    def __init__(self, read: Callable[[int], float], first: int):
        self.read, self.first = read, first

    def result(self) -> float:
        return self.read(self.first)

    def cancel(self) -> None:
        pass


Images = InMemory | OnDisk


def keyed_crop(key: int) -> Callable[[int, int], Box]:
    """The random crop that ``key`` names, as a function of the image's width and height: (left, top, width, height).

    Area 8 to 100 % of the image, aspect ratio 3/4 to 4/3, uniform in its logarithm (Szegedy et al. 2015), in law that of
    torchvision's RandomResizedCrop.
    """

    def crop(width: int, height: int) -> Box:
        rng = np.random.Generator(np.random.Philox(key))
        for _ in range(10):
            area, aspect = width * height * rng.uniform(0.08, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # too long for any: its middle
        return (width - w) // 2, (height - h) // 2, w, h

    return crop
