"""What an evaluation hands to the report: one checkpoint's scores of one split, with all that they came from."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..data.longtail import shot_groups
from ..data.manifest import Manifest
from ..engine.header import Header
from ..metrics import Scores


@dataclass(frozen=True)
class Scored:
    """One run on its own data. Shapes: N images of the split, C classes.

    Classes are in the order of ``classes``: that of the first run's manifest, into which every other run is put by name,
    whatever order its checkpoint and its manifest have.
    """

    run: Path  # the run's folder
    header: Header
    manifest: Manifest
    split: str
    classes: list[str]
    scores: Scores  # of the raw logits, or of those re-scored for another prior where that was asked for
    labels_N: np.ndarray  # int64
    counts_C: list[int]  # the training images a class that the checkpoint saw
    result: dict[str, Any] = field(default_factory=dict)  # the run's part of ``evaluate --json``

    @property
    def keys(self) -> list[str]:
        """The images' keys in the manifest, in the order of ``labels_N``."""
        return self.manifest.splits[self.split].keys

    @cached_property
    def groups_C(self) -> np.ndarray:
        """Shot group of each class, by the training images that the checkpoint saw: str [C]."""
        return np.asarray(shot_groups(self.counts_C))

    @cached_property
    def tested_C(self) -> np.ndarray:
        """Images of the split a class: int64 [C]."""
        return np.bincount(self.labels_N, minlength=len(self.classes))

    @cached_property
    def right_N(self) -> np.ndarray:
        """Whether the prediction is right: bool [N]."""
        return self.scores.predicted_N == self.labels_N

    @cached_property
    def right5_N(self) -> np.ndarray:
        """Whether the true class is among the five with the largest logits: bool [N]."""
        return self.scores.rank_N < 5

    def per_class(self, of_N: np.ndarray) -> np.ndarray:
        """How many images of each class are in ``of_N`` (bool [N]): int64 [C]."""
        return np.bincount(self.labels_N[of_N], minlength=len(self.classes))
