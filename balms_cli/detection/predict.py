"""``balms detect predict``: what a detector finds in photos without labels, as pictures and as JSON lines.

A photo is turned upright as its EXIF says, and all boxes and masks are in pixels of the upright photo. A photo that cannot
be read is named and left out.
"""

import io
import json
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import DetectPredictConfig
from ..data.aside import printable, write_error
from ..data.decode import BIG, BadImage
from ..data.folders import is_inside
from ..data.unlabelled import Found, find_images
from ..engine.run_dir import check_place
from ..engine.runtime import Runtime, setup
from ..errors import ConfigError
from ..reporter import Reporter
from .dataset import read_pixels
from .draw import Detection, draw
from .header import DetectHeader, detector_file
from .model import detect, load_detector, paste_rle, set_detections

LINES = "predictions.jsonl"  # in the folder of the pictures: what --json prints
_AHEAD = 2  # photos that are read while one is worked on
_QUALITY = 90  # of the pictures, JPEG
_LONGEST = 200  # bytes of a picture's name before its number and ending; file systems take 255
_LONGEST_LINE = 1 << 24  # letters, of an earlier result


@dataclass(frozen=True)
class Photo:
    """One photo and what was found in it, the surest first; or why it was not read. ``pixels``: uint8 [3, H, W]."""

    path: str
    pixels: Tensor | None
    detections: list[Detection]
    error: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pixels.shape[2], self.pixels.shape[1]

    def to_json(self, picture: Path | None = None) -> dict[str, Any]:
        """One line of ``--json``: boxes as x, y, width, height; masks as COCO's run lengths."""
        if self.error is not None:
            return {"image": self.path, "error": self.error}
        width, height = self.size
        line = {"image": self.path, "width": width, "height": height, "detections": [_entry(d) for d in self.detections]}
        return line if picture is None else line | {"picture": str(picture)}


def _entry(found: Detection) -> dict[str, Any]:
    x1, y1, x2, y2 = found.box
    entry = {"category": found.name, "category_id": found.category_id, "score": float(f"{found.score:.6g}"),
             "box": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)]}  # fmt: skip
    if found.rle is None:
        return entry
    counts = found.rle["counts"]
    return entry | {"segmentation": {"size": [int(v) for v in found.rle["size"]],
                                     "counts": counts.decode() if isinstance(counts, bytes) else counts}}  # fmt: skip


@dataclass(frozen=True)
class DetectPredictor:
    """A detector that is ready to look at photos."""

    header: DetectHeader
    model: torch.nn.Module
    runtime: Runtime

    def predict(self, paths: Iterable[str | Path], passed: Counter[str] | None = None, *, out: Path | None = None
                ) -> Iterator[Photo]:  # fmt: skip
        """The photos of files and folders, in order. ``passed`` counts other files of the folders by their ending.

        Photos within ``out``, where pictures are written meanwhile, are not read.
        """
        found = find_images(map(str, paths), passed)
        with closing(_read_ahead(found if out is None else _but_those_in(os.path.realpath(out), found))) as photos:
            for path, pixels_3HW in photos:
                if isinstance(pixels_3HW, str):
                    yield Photo(path, None, [], pixels_3HW)
                else:
                    yield Photo(path, pixels_3HW, self.detections(pixels_3HW))

    def detections(self, pixels_3HW: Tensor) -> list[Detection]:
        """What is in a photo, uint8 [3, H, W] on the CPU: the surest first."""
        height, width = pixels_3HW.shape[1:]
        # The network sees far fewer pixels than the largest photos have, but in float32, several times.
        step = max(1, round((height * width / BIG) ** 0.5 + 0.5)) if height * width > BIG else 1
        seen_3HW = pixels_3HW if step == 1 else _reduced(pixels_3HW, step)
        scale_4 = torch.tensor([width / seen_3HW.shape[2], height / seen_3HW.shape[1]] * 2)
        with torch.no_grad(), self.runtime.autocast():
            answer = detect(self.model, [seen_3HW.to(self.runtime.device).float() / 255])[0]
        answer = {name: value.cpu() for name, value in answer.items()}
        boxes_N4, scores_N = answer["boxes"].float() * scale_4, answer["scores"].float()
        rles = [None] * len(boxes_N4)
        if "masks_28" in answer:
            rles = paste_rle(answer["masks_28"].float(), boxes_N4, height, width)
        order_N = scores_N.argsort(descending=True, stable=True).tolist()
        labels_N, boxes, scores = answer["labels"].tolist(), boxes_N4.tolist(), scores_N.tolist()
        named = [self.header.categories[labels_N[i] - 1] for i in range(len(labels_N))]
        return [Detection(labels_N[i], named[i].id, named[i].name, scores[i], tuple(boxes[i]), rles[i]) for i in order_N]


def load(run: str | Path, config: DetectPredictConfig | None = None) -> DetectPredictor:
    """The detector of a run's folder or ``model.safetensors``. Raises: CheckpointError (exit 4), ConfigError (device)."""
    config = config or DetectPredictConfig()
    runtime = setup(config.device, config.precision)
    model, header = load_detector(detector_file(Path(run)))
    return DetectPredictor(header, set_detections(model, config).to(runtime.device), runtime)


def describe(predictor: DetectPredictor, name: str, reporter: Reporter) -> None:
    """Tell what looks at the photos."""
    header = predictor.header
    kind = "boxes and masks" if header.architecture.masks else "boxes"
    reporter.note(f"{name}: {header.architecture.backbone}, {kind} of {len(header.categories)} categories, on "
                  f"{predictor.runtime.describe()}")  # fmt: skip


# Reading


def _reduced(pixels_3HW: Tensor, step: int) -> Tensor:
    """The photo at a ``step``-th of its width and height."""
    photo = Image.fromarray(pixels_3HW.permute(1, 2, 0).contiguous().numpy()).reduce(step)
    return torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(photo.height, photo.width, 3).permute(2, 0, 1)


def _but_those_in(folder: str, found: Iterable[Found]) -> Iterator[Found]:
    for path, problem in found:
        yield path, "lies in the folder of the results" if is_inside(os.path.realpath(path), folder) else problem


def _read_ahead(found: Iterable[Found]) -> Iterator[tuple[str, Tensor | str]]:
    """Paths in order, each with its pixels uint8 [3, H, W] or why there are none."""
    pool = ThreadPoolExecutor(_AHEAD, "balms-decode")
    pending: deque[tuple[str, Future]] = deque()
    try:
        for path, problem in found:
            pending.append((path, pool.submit(_read, path, problem)))
            if len(pending) > _AHEAD:
                first, pixels = pending.popleft()
                yield first, pixels.result()
        while pending:
            first, pixels = pending.popleft()
            yield first, pixels.result()
    finally:  # Ctrl-C, or nobody wants more
        pool.shutdown(wait=False, cancel_futures=True)


def _read(path: str, problem: str | None) -> Tensor | str:
    try:
        return problem or read_pixels(path)
    except BadImage as error:
        return str(error)


# The folder of results


class Results:
    """A folder of pictures, and ``predictions.jsonl`` with a line for each photo. Nothing is made before the first photo."""

    def __init__(self, folder: Path, *, overwrite: bool = False):
        """Raises: ConfigError (exit 2) for a folder that is not empty, or that cannot be written in."""
        check_place(folder)
        self.folder, self._names, self._began = folder, set(), False
        if folder.exists() and any(folder.iterdir()):
            if not overwrite:
                raise ConfigError(f"--out {folder} is not empty; add --overwrite to replace the pictures in it, or choose "
                                  "another folder")  # fmt: skip
            if not (folder / LINES).is_file():
                raise ConfigError(f"--out {folder} is not empty and has no {LINES} of an earlier predict: --overwrite leaves "
                                  "it alone; choose another")  # fmt: skip

    def write(self, photo: Photo) -> Path | None:
        """The picture of a photo (None: it was not read), each whole or not there. Raises: see ``data.aside.write_error``."""
        self._begin()
        picture = None
        if photo.error is None:
            picture = self.folder / self._name(photo.path)
            image = Image.fromarray(photo.pixels.permute(1, 2, 0).contiguous().numpy())
            buffer = io.BytesIO()
            draw(image, photo.detections).save(buffer, "JPEG", quality=_QUALITY)
            _write_whole(picture, buffer.getvalue())
        try:
            with (self.folder / LINES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(photo.to_json(picture)) + "\n")
        except OSError as error:
            raise write_error(error, self.folder) from None
        return picture

    def _begin(self) -> None:
        if self._began:
            return
        self._began = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for picture in _pictures_of(self.folder):
                picture.unlink(missing_ok=True)
            (self.folder / LINES).unlink(missing_ok=True)
        except OSError as error:
            raise write_error(error, self.folder) from None

    def _name(self, path: str) -> str:
        """The photo's own name, with a number where another folder's photo has it already."""
        stem = Path(path).stem
        while len(os.fsencode(stem)) > _LONGEST:
            stem = stem[:-1]  # a letter at a time: half of one is no name on every file system
        name, number = f"{stem}.jpg", 1
        while name.casefold() in self._names or (self.folder / name).exists():
            number += 1
            name = f"{stem}-{number}.jpg"
        self._names.add(name.casefold())
        return name


def _write_whole(picture: Path, content: bytes) -> None:
    """Written aside, then moved; without waiting for the disk, which may take longer than the detector."""
    aside = picture.with_name(f".new-{os.getpid()}.jpg")
    try:
        aside.write_bytes(content)
        os.replace(aside, picture)
    except OSError as error:
        raise write_error(error, picture) from None
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def _pictures_of(folder: Path) -> Iterator[Path]:
    """The pictures that an earlier result in ``folder`` has, by its lines: files of the folder itself, whatever they say."""
    if not (folder / LINES).is_file():
        return
    with (folder / LINES).open(encoding="utf-8", errors="replace") as file:
        for line in iter(lambda: file.readline(_LONGEST_LINE), ""):
            with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                name = re.split(r"[/\\]", json.loads(line)["picture"])[-1]
                if name.endswith(".jpg") and (folder / name).is_file():
                    yield folder / name


def default_folder(workspace: Path, run: Path) -> Path:
    """A new folder of the workspace, named after the run; nothing is made yet."""
    base = workspace / "predictions" / run.name
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def text_line(photo: Photo, found: Detection) -> str:
    """PATH, CATEGORY, SCORE, X, Y, WIDTH, HEIGHT between tabs."""
    x1, y1, x2, y2 = found.box
    numbers = [f"{found.score:.6f}", *(f"{v:.1f}" for v in (x1, y1, x2 - x1, y2 - y1))]
    return "\t".join([printable(photo.path), printable(found.name), *numbers])
