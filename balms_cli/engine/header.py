"""The header of ``model.safetensors``: all that a later stage must know of a checkpoint, as JSON beside the weights.

Read here without torch, so that a stage can name its input, or refuse it, before anything heavy is imported. A header is
a stranger's text: its size is bounded, every field is checked, and nothing in it is ever run.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..data.aside import is_plain
from ..errors import CheckpointError

FORMAT = 1
_KEY = "balms"
DETECTOR_KEY = "balms-detect"  # in its place in a detector's checkpoint: detection/header.py
_MAX_HEADER_BYTES = 50_000_000
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Header(BaseModel):
    """What ``model.safetensors`` says of itself.

    ``implied_log_prior``: the class prior that its raw logits are right for; with ``prior_exact`` false only the law that
    training was fed with, since the loss or classifier leaves no prior that could be written down.
    """

    model_config = ConfigDict(extra="ignore")

    format: int = Field(ge=1, le=FORMAT)  # the first field: what a newer format says of the others is not looked at
    created: str
    stage: Literal["pretrain", "retrain"]
    backbone: str
    feature_dim: int = Field(ge=1, le=1_000_000)
    image_size: int = Field(ge=8, le=1024)
    classes: list[str] = Field(min_length=1)
    class_counts: list[Annotated[int, Field(lt=2**53)]]
    mean: tuple[_Number, _Number, _Number]
    std: tuple[_Positive, _Positive, _Positive]
    head: Literal["linear", "cosine", "untrained"]
    classifier: str = "linear"  # how the head came about: linear (cRT), cosine, lws, tau-norm, ncm
    loss: str
    sampler: str
    implied_log_prior: list[_Number]
    prior_exact: bool = True
    recipe: dict[str, Any]
    data: dict[str, Any]
    manifest: str
    manifest_sha256: str
    parent_sha256: str | None = None

    @model_validator(mode="after")
    def _same_length(self) -> "Header":
        if not len(self.classes) == len(self.class_counts) == len(self.implied_log_prior):
            raise ValueError("classes, class_counts and implied_log_prior differ in length")
        if len(set(self.classes)) != len(self.classes) or min(self.class_counts) < 1:
            raise ValueError("class names repeat, or a class has no images")
        if not all(map(is_plain, self.classes)):
            raise ValueError("class names with control characters")
        return self

    def to_metadata(self) -> dict[str, str]:
        """For the safetensors writer, which takes text by text."""
        return {_KEY: self.model_dump_json()}


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file carries beside its tensors. Raises CheckpointError (exit 4) where it is none."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER_BYTES, path.stat().st_size - 8):
                raise ValueError("its header is longer than the file")
            metadata = json.loads(file.read(length)).get("__metadata__") or {}
            if not (isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())):
                raise ValueError("its metadata are not texts by name")
            return metadata
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (OSError, ValueError, RecursionError, struct.error, AttributeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint, or is damaged: {error}") from None


def read_header(path: Path) -> Header:
    """The header of a checkpoint file. Raises CheckpointError (exit 4) for anything that is not one of ours."""
    metadata = read_metadata(path)
    if DETECTOR_KEY in metadata:
        raise CheckpointError(f"{path} is a detector, not a classifier: use balms detect evaluate, predict or finetune with it")
    if _KEY not in metadata:
        raise CheckpointError(f"{path} was not written by balms (no '{_KEY}' header); use it as --weights of pretrain")
    try:
        return Header.model_validate_json(metadata[_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format",) and first["type"] == "less_than_equal":
            told = f"{path} has format {first['input']}, this balms reads up to {FORMAT}: update balms"
            raise CheckpointError(told) from None
        place = ".".join(map(str, first["loc"])) or "header"
        raise CheckpointError(f"{path}: bad header, {place}: {first['msg']}") from None


def sha256_of(path: Path) -> str:
    """Names a checkpoint by its content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
