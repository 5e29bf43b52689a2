"""Weights in and out: ``model.safetensors`` (complete, for the next stage) and ``resume.pt`` (to go on with this one)."""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..data.aside import replace_file
from ..errors import CheckpointError, ConfigError, one_line
from ..models.backbones import build_backbone, holds
from ..models.classifiers import Classifier, CosineHead, linear_head
from ..models.weights import fill
from .header import Header, read_header


def save_model(path: Path, model: Classifier, header: Header) -> None:
    """Weights and header as one safetensors file."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    replace_file(path, save(tensors, metadata=header.to_metadata()))


def load_model(path: Path) -> tuple[Classifier, Header]:
    """A checkpoint's network, in eval mode on the CPU, and its header. Raises CheckpointError (exit 4)."""
    header = read_header(path)
    try:
        tensors = load_file(path)  # mapped: sizes that the file only claims take no memory
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    # The file decides how large a network is built, so its own tensors must bear its header out first.
    head = tensors.get("head.weight")
    if head is None or tuple(head.shape) != (len(header.classes), header.feature_dim):
        raise CheckpointError(f"{path}: the classifier's weights do not fit {len(header.classes)} classes x "
                              f"{header.feature_dim} features")  # fmt: skip
    own = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    try:
        fits = holds(own, header.backbone, header.image_size)
    except ConfigError as error:  # a name that is not known, or a size that its network does not take
        if "pip install" in str(error):  # timm or torchvision is missing: the file is not to blame
            raise
        raise CheckpointError(f"{path}: {error}") from None
    if not fits:
        raise CheckpointError(f"{path} does not hold a {header.backbone} for {header.image_size} px: tensors are missing, or "
                              "have another shape")  # fmt: skip
    backbone = build_backbone(header.backbone, header.image_size)
    make_head = CosineHead if header.head == "cosine" else linear_head
    model = Classifier(backbone, make_head(header.feature_dim, len(header.classes)))
    try:
        fill(model, tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not hold a {header.backbone}: {one_line(error)}") from None
    return model.eval(), header


def save_resume(path: Path, state: dict[str, Any]) -> None:
    """Tensors, dicts and plain types only, so that it loads with ``weights_only=True``."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, buffer.getvalue())


def load_resume(path: Path) -> dict[str, Any]:
    """Raises CheckpointError (exit 4) for a missing, damaged or foreign file."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch never compresses, but would unpack what a stranger did
            entries = archive.infolist()
        if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > path.stat().st_size:
            raise ValueError("it is larger inside than outside")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there") from None
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None
    if not isinstance(state, dict) or "step" not in state or "parts" not in state:
        raise CheckpointError(f"{path} was not written by balms")
    return state
