"""``balms predict``: the likeliest classes of images without labels, and how far their scores can be believed.

Scores are softmax(logits / T + shift). The shift is that of another class prior, where one is asked for (``prior.py``).
The temperature T is fitted on the validation split of the run's own data; without one the scores are uncalibrated, and
every result says so.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import PredictConfig
from ..data.aside import replace_file
from ..data.features import extract_all
from ..data.transforms import normalise
from ..data.unlabelled import find_images, read_batches
from ..engine.checkpoint import load_model
from ..engine.header import Header, read_header, sha256_of
from ..engine.run_dir import TEMPERATURE, manifest_of, model_file
from ..engine.runtime import Runtime, setup
from ..errors import BalmsError, CheckpointError, DataError
from ..metrics.temperature import HIGHEST, LOWEST, fit_temperature
from ..models.classifiers import Classifier
from ..report.card import implied_prior
from ..reporter import Reporter
from .common import check_classes, check_trained, load_images
from .prior import adjustment, warn_of_inexact

_MAX_BYTES = 10_000  # of temperature.json


@dataclass(frozen=True)
class Prediction:
    """One image: its likeliest classes and their scores (fractions of 1), the likeliest first; or why it was not read."""

    path: str
    classes: list[str]
    scores: list[float]
    error: str | None = None


@dataclass(frozen=True)
class Temperature:
    """What the logits are divided by, from how many validation images; ``value`` None: uncalibrated, and ``reason`` why."""

    value: float | None
    images: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Predictor:
    """A run that is ready to classify. ``shift_C``: see :func:`balms_cli.stages.prior.adjustment`, in the header's order."""

    header: Header
    model: Classifier
    runtime: Runtime
    config: PredictConfig
    shift_C: Tensor | None
    temperature: Temperature

    def predict(self, paths: Iterable[str | Path]) -> Iterator[Prediction]:
        """Files and folders, one prediction an image, in order. An image that cannot be read has an ``error``."""
        for batch in self.batches(paths):
            yield from batch

    def batches(self, paths: Iterable[str | Path], passed: Counter[str] | None = None) -> Iterator[list[Prediction]]:
        """The same, ``config.batch_size`` images at a time; ``passed`` counts other files of the folders by their ending.

        Raises: CheckpointError where the network's answer is not a number.
        """
        found = find_images(map(str, paths), passed)
        size, kind, config = self.header.image_size, self.header.data.get("kind"), self.config
        with closing(read_batches(found, size, config.batch_size, config.workers, kind=kind)) as reader:
            for batch in reader:
                good = [pixels for _, pixels in batch if not isinstance(pixels, str)]
                named = iter(self._top(torch.from_numpy(np.stack(good))) if good else ())
                yield [Prediction(path, [], [], pixels) if isinstance(pixels, str) else Prediction(path, *next(named))
                       for path, pixels in batch]  # fmt: skip

    def logits(self, pixels_B3SS: Tensor) -> Tensor:
        """Raw logits [B, C] on the CPU, classes in the header's order, of pixels uint8 [B, 3, S, S]."""
        device = self.runtime.device
        mean, std = (torch.tensor(v, device=device) for v in (self.header.mean, self.header.std))
        with torch.no_grad():
            return _forward(self.model, self.runtime)(normalise(pixels_B3SS.to(device), mean, std)).float().cpu()

    def scores(self, logits_BC: Tensor) -> Tensor:
        """float64 [B, C], rows that add up to 1."""
        a_BC = logits_BC.double() / (self.temperature.value or 1.0)
        return (a_BC if self.shift_C is None else a_BC + self.shift_C).softmax(1)

    def _top(self, pixels_B3SS: Tensor) -> list[tuple[list[str], list[float]]]:
        logits_BC = self.logits(pixels_B3SS)
        if not logits_BC.isfinite().all():
            raise CheckpointError("the network's answer is not a finite number; its weights are damaged, repeat the run")
        k = min(self.config.top_k, logits_BC.shape[1])
        scores_BC, order_BC = self.scores(logits_BC).sort(dim=1, descending=True, stable=True)  # ties: the first class
        return [([self.header.classes[c] for c in order], scores)
                for order, scores in zip(order_BC[:, :k].tolist(), scores_BC[:, :k].tolist(), strict=True)]  # fmt: skip

    def to_json(self, found: Prediction) -> dict[str, Any]:
        """One line of ``--json``: scores with six significant digits."""
        if found.error is not None:
            return {"path": found.path, "error": found.error}
        named = [{"class": name, "score": float(f"{score:.6g}")}
                 for name, score in zip(found.classes, found.scores, strict=True)]  # fmt: skip
        prior = {} if self.shift_C is None else {"target_prior": self.config.target_prior or "uniform",
                                                 "prior_exact": self.header.prior_exact}  # fmt: skip
        return {"path": found.path, "predictions": named, "calibrated": self.temperature.value is not None,
                "temperature": self.temperature.value} | prior  # fmt: skip


def load(run: str | Path, config: PredictConfig | None = None, data: Path | None = None, reporter: Reporter | None = None
         ) -> Predictor:  # fmt: skip
    """The classifier of a run's folder or ``model.safetensors``, calibrated where its data has a validation split.

    ``data``: where the run's manifest is now. Raises: CheckpointError (damaged, or without a classifier), ConfigError.
    """
    config, reporter, file = config or PredictConfig(), reporter or Reporter(), model_file(Path(run))
    runtime, header = setup(config.device, config.precision), read_header(file)
    check_trained(header, file)
    shift_C = adjustment(config, header)
    model, header = load_model(file)
    warn_of_inexact(shift_C, header, file.parent.name, reporter)
    model.to(runtime.device, memory_format=torch.channels_last)
    temperature = _temperature(config, file, model, header, data, runtime, reporter)
    return Predictor(header, model, runtime, config, shift_C, temperature)


def describe(predictor: Predictor, file: Path, reporter: Reporter) -> None:
    """Tell what classifies, and what its scores mean."""
    header, found = predictor.header, predictor.temperature
    reporter.note(f"{file.parent.name}: {header.backbone} at {header.image_size} px, {len(header.classes)} classes, on "
                  f"{predictor.runtime.describe()}")  # fmt: skip
    if found.value is None:
        reporter.note(f"scores are uncalibrated: {found.reason}")
    else:
        reporter.note(f"scores are calibrated: temperature {found.value:.3g}, fitted on {found.images} validation images")
    if predictor.shift_C is None:
        reporter.note(implied_prior(header))


def _forward(model: Classifier, runtime: Runtime):
    """Normalised images [B, 3, S, S] to logits [B, C], in the precision of the runtime."""

    def forward(images: Tensor) -> Tensor:
        with runtime.autocast():
            return model(images.contiguous(memory_format=torch.channels_last))

    return forward


def _temperature(config: PredictConfig, file: Path, model: Classifier, header: Header, data: Path | None, runtime: Runtime,
                 reporter: Reporter) -> Temperature:  # fmt: skip
    """As it was found before, or fitted now on the validation images; never on others than the run's own."""
    if not config.calibrate:
        return Temperature(None, reason="as asked for")
    key = {"model_sha256": sha256_of(file), "manifest_sha256": header.manifest_sha256, "precision": runtime.precision}
    place = file.parent / TEMPERATURE
    if kept := _kept(place, key):
        return kept
    try:
        found = _fit(config, file, model, header, data, runtime, reporter)
    except DataError as error:
        return Temperature(None, reason=str(error))
    if found.value is not None:
        try:
            replace_file(place, json.dumps(key | {"temperature": found.value, "images": found.images}, indent=1) + "\n")
        except BalmsError as error:
            reporter.note(f"the temperature is not kept for next time ({error})")
    return found


def _kept(place: Path, key: dict[str, str]) -> Temperature | None:
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        if place.stat().st_size <= _MAX_BYTES:
            document = json.loads(place.read_text(encoding="utf-8"))
            value, images = float(document["temperature"]), int(document["images"])
            if LOWEST <= value <= HIGHEST and images > 0 and {name: document.get(name) for name in key} == key:
                return Temperature(value, images)
    return None


def _fit(config: PredictConfig, file: Path, model: Classifier, header: Header, data: Path | None, runtime: Runtime,
         reporter: Reporter) -> Temperature:  # fmt: skip
    manifest = manifest_of(file, header, data)
    check_classes(header, manifest, file)
    if not len(manifest.splits.get("val", ())):
        return Temperature(None, reason=f"{manifest.name} has no validation split (balms make-lt --val-per-class)")
    if manifest.sha256 != header.manifest_sha256:
        return Temperature(None, reason=f"{manifest.path} is another draw than the run was trained on, which may have been "
                                        "trained on its validation images")  # fmt: skip
    with closing(load_images(manifest, "val", header.image_size, torch.device("cpu"), reporter, config)) as images:
        mean, std = (torch.tensor(v, device=runtime.device) for v in (header.mean, header.std))
        logits_NC = extract_all(_forward(model, runtime), images, mean, std, batch_size=config.batch_size, reporter=reporter,
                                what="calibrating")  # fmt: skip
        place = [header.classes.index(name) for name in manifest.classes]
        labels_N = np.array(place)[images.labels.numpy()]
    value = fit_temperature(logits_NC.numpy(), labels_N, _val_shift(header, labels_N))
    if value is None:
        return Temperature(None, reason=f"{len(labels_N)} validation images did not tell a temperature from {LOWEST:g} to "
                                        f"{HIGHEST:g}")  # fmt: skip
    return Temperature(value, len(labels_N))


def _val_shift(header: Header, labels_N: np.ndarray) -> np.ndarray | None:
    """Log of the validation images' class shares over the prior that the raw logits are right for [C].

    Validation images are as many a class, while softmax on a long tail learns its prior: without this, T would take the
    difference of the two for too much or too little sureness. Where no exact prior is known, T has to take what comes.
    """
    if not header.prior_exact:
        return None
    shares_C = np.bincount(labels_N, minlength=len(header.classes)) / len(labels_N)
    log_shares_C = np.array([math.log(share) if share else -math.inf for share in shares_C])
    return log_shares_C - np.array(header.implied_log_prior)
