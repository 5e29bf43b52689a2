"""Backbones by name: CIFAR ResNets of our own, and every torchvision classifier that ends in a linear layer.

torchvision is imported inside the functions: it costs a second, and the CIFAR networks do without it.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ..errors import CheckpointError, ConfigError, DataError, one_line
from .resnet_cifar import DEPTHS, ResNetCifar

CIFAR_NAMES = tuple(f"resnet{depth}" for depth in DEPTHS)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Auxiliary heads while training, or a convolution as the classifier: no plain feature vector to take.
_UNFIT = ("googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1")


def backbone_names() -> list[str]:
    """Every name that ``build_backbone`` knows."""
    return [*CIFAR_NAMES, *(n for n in _torchvision().list_models(module=_torchvision()) if n not in _UNFIT)]


def build_backbone(name: str, image_size: int) -> nn.Module:
    """A network from images [B, 3, image_size, image_size] to features [B, D], with ``feature_dim`` D.

    Raises ConfigError for an unknown name, with the nearest known one.
    """
    if name in CIFAR_NAMES:
        return ResNetCifar(int(name.removeprefix("resnet")))
    if name not in (known := backbone_names()):
        import difflib

        near = difflib.get_close_matches(name, known, n=3)
        raise ConfigError(f"backbone '{name}' is unknown; {'try ' + ', '.join(near) if near else 'try resnet32, resnet18'}")
    # Vision transformers have one position code a patch, so they must know the size when they are built.
    network = _torchvision().get_model(name, weights=None, **({"image_size": image_size} if name.startswith("vit") else {}))
    path, last = [(path, m) for path, m in network.named_modules() if isinstance(m, nn.Linear)][-1]
    parent, _, attribute = path.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    network.feature_dim = last.in_features
    return network


def load_weights(backbone: nn.Module, name: str, weights: str, *, offline: bool) -> tuple[tuple | None, tuple | None]:
    """Fill ``backbone`` from a file or from torchvision's ImageNet weights; returns the channel mean and std they expect.

    A checkpoint of balms says them itself; another file of a torchvision network is taken to be trained on ImageNet; of a
    CIFAR network's file nothing is known (None: take those of the data).
    Raises DataError (no file, no network), CheckpointError (unreadable, or not weights of this network).
    """
    if weights == "imagenet":
        state, mean, std = _imagenet_state(name, offline)
    else:
        state, (mean, std) = _file_state(Path(weights)), _file_normalisation(Path(weights), name)
    own = backbone.state_dict()
    wrong = [k for k in own if k in state and state[k].shape != own[k].shape]
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    if wrong or missing:
        what = f"'{wrong[0]}' has another shape" if wrong else f"{len(missing)} of {len(own)} tensors are missing"
        raise CheckpointError(f"--weights {weights} is not of a {name}: {what}, e.g. '{(wrong or missing)[0]}'")
    backbone.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    return mean, std


def _torchvision():
    try:
        import torchvision.models as models
    except (ImportError, RuntimeError) as error:  # a CPU-only torch beside torchvision's own build: "nms does not exist"
        raise ConfigError(f"torchvision does not load beside this torch ({error}); "
                          "run: pip install --force-reinstall torch torchvision") from None  # fmt: skip
    return models


def _imagenet_state(name: str, offline: bool) -> tuple[dict, tuple, tuple]:
    if name in CIFAR_NAMES:
        raise ConfigError(f"there are no ImageNet weights for {name}; choose a torchvision backbone such as resnet18")
    weights = _torchvision().get_model_weights(name).DEFAULT
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    if not cached.is_file() and (offline or os.environ.get("BALMS_OFFLINE", "") not in ("", "0")):
        raise DataError(f"offline, and {cached} is not there; put {weights.url} in that place or give --weights FILE")
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot fetch {weights.url} ({error}); put it at {cached} or give --weights FILE") from None
    preset = weights.transforms()
    return state, tuple(preset.mean), tuple(preset.std)


def _file_normalisation(path: Path, name: str) -> tuple[tuple | None, tuple | None]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("balms", "{}"))
        if "mean" in header and "std" in header:
            return tuple(header["mean"]), tuple(header["std"])
    return (None, None) if name in CIFAR_NAMES else (IMAGENET_MEAN, IMAGENET_STD)


def _file_state(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a safetensors file or a torch file of plain tensors; nothing in it is ever run."""
    if not path.is_file():
        raise DataError(f"--weights {path}: no such file (or say 'imagenet')")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen kinds here
        raise CheckpointError(f"--weights {path} cannot be read as tensors: {one_line(error)}") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    return {k.removeprefix("module.").removeprefix("backbone."): v for k, v in tensors.items()}
