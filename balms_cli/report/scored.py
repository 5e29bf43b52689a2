"""What an evaluation hands to the report: one checkpoint's scores of one split, with all that they came from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.manifest import Manifest
from ..engine.header import Header


@dataclass(frozen=True)
class Scored:
    """Shapes: N images of the split, C classes in the manifest's order (whatever order the checkpoint has)."""

    run: Path  # the run's folder
    header: Header
    manifest: Manifest
    split: str
    logits_NC: np.ndarray  # float32, after re-scoring for another prior where that was asked for
    labels_N: np.ndarray  # int64
    counts_C: list[int]  # the training images a class that the checkpoint saw
    result: dict[str, Any]  # the run's part of ``evaluate --json``

    @property
    def keys(self) -> list[str]:
        """The images' keys in the manifest, in the order of ``labels_N``."""
        return self.manifest.splits[self.split].keys
