"""What a detector's ``model.safetensors`` says of itself, and finding the newest one. Torch is not imported here.

A header is a stranger's text: its size is bounded, every field is checked, and nothing in it is ever run.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..engine.header import DETECTOR_KEY as KEY
from ..engine.header import read_metadata
from ..engine.run_dir import MODEL, model_file
from ..errors import CheckpointError

FORMAT = 1
RARE, COMMON = 10, 100  # images that a rare, and a common, category is in at most (LVIS)


def frequency_group(images: int) -> Literal["r", "c", "f"]:
    """Rare, common or frequent, by the number of images that a category is in."""
    return "r" if images <= RARE else "c" if images <= COMMON else "f"


_MOST = 2**53  # of a count; a header is a stranger's, and larger numbers do not fit where counts go
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Category(BaseModel):
    """One category as the training annotations have it. ``id`` is the JSON's own; a detector's label is its place plus 1."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: int
    name: str
    image_count: int = Field(ge=1, le=_MOST)  # training images with at least one instance
    instance_count: int = Field(ge=1, le=_MOST)
    frequency: Literal["r", "c", "f"]  # rare (1-10 images), common (11-100), frequent: the JSON's, else by image_count


class Architecture(BaseModel):
    """All that decides the shapes and the forward pass of a detector, beside its number of categories."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    backbone: str
    norm: Literal["frozen", "batch"]  # FrozenBatchNorm where weights were given; from scratch it would give NaN
    fpn_channels: int = Field(ge=16, le=1024)
    head_features: int = Field(ge=16, le=4096)
    masks: bool
    class_agnostic: bool
    family: Literal["softmax", "sigmoid"]  # C + 1 scores with background first, or C scores
    min_sizes: list[Annotated[int, Field(ge=32, le=4096)]] = Field(min_length=1)  # in training
    test_size: int = Field(ge=32, le=4096)
    max_size: int = Field(ge=32, le=4096)
    proposals: int = Field(ge=1, le=_MOST)
    rois_per_image: int = Field(ge=1, le=_MOST)
    foreground_share: float = Field(gt=0, le=1)
    mean: tuple[_Number, _Number, _Number]
    std: tuple[_Positive, _Positive, _Positive]


class DetectHeader(BaseModel):
    """What ``model.safetensors`` of a detector says of itself."""

    model_config = ConfigDict(extra="ignore")

    format: int = Field(ge=1, le=FORMAT)  # the first field: what a newer format says of the others is not looked at
    created: str
    stage: Literal["detect-train", "detect-finetune"]
    architecture: Architecture
    categories: list[Category] = Field(min_length=1)  # in the order of the labels 1..C
    num_images: int = Field(ge=1, le=_MOST)  # training images with annotations: what image_count is a share of
    loss: str
    classifier: Literal["linear", "lws"] = "linear"
    recipe: dict[str, Any]
    annotations: str
    annotations_sha256: str
    images: str
    parent_sha256: str | None = None
    rates: list[_Number] | None = None  # category weights that a meta reweigher learned

    @model_validator(mode="after")
    def _each_once(self) -> "DetectHeader":
        ids, names = {c.id for c in self.categories}, {c.name for c in self.categories}
        if min(len(ids), len(names)) < len(self.categories):
            raise ValueError("category ids or names repeat")
        return self

    def to_metadata(self) -> dict[str, str]:
        """For the safetensors writer, which takes text by text."""
        return {KEY: self.model_dump_json()}


def read_detect_header(path: Path) -> DetectHeader:
    """The header of a detector's file. Raises CheckpointError (exit 4) for anything else."""
    metadata = read_metadata(path)
    if KEY not in metadata:
        what = "is a classifier, not a detector" if "balms" in metadata else "was not written by balms detect"
        raise CheckpointError(f"{path} {what}; make a detector by balms detect train")
    try:
        return DetectHeader.model_validate_json(metadata[KEY])
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format",) and first["type"] == "less_than_equal":
            told = f"{path} has format {first['input']}, this balms reads up to {FORMAT}: update balms"
            raise CheckpointError(told) from None
        place = ".".join(map(str, first["loc"])) or "header"
        raise CheckpointError(f"{path}: bad header, {place}: {first['msg']}") from None


def detector_file(path: Path) -> Path:
    """The checkpoint file that a path names: the file itself, or the one in a run's folder. Raises CheckpointError where the
    run is not complete."""
    return model_file(path)


def newest_detector(workspace: Path, stages: Iterable[str]) -> Path | None:
    """The folder of the newest complete run of one of ``stages`` (detect-train, detect-finetune) in the workspace, by the
    creation time in its header."""
    best: tuple[str, Path] | None = None
    for file in (workspace / "runs").glob(f"*/{MODEL}"):
        try:
            header = read_detect_header(file)
        except CheckpointError:
            continue
        if header.stage in stages and (best is None or header.created > best[0]):
            best = (header.created, file.parent)
    return best[1] if best else None
