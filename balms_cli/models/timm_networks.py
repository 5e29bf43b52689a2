"""timm's networks (the extra ``timm``) as backbones: ``timm:NAME`` or ``timm:NAME.TAG``.

A name may stand in a stranger's checkpoint, so it is looked up in timm's own list and never taken for a place to load from
(timm itself would follow ``hf-hub:`` and ``local-dir:``). Weights are handed over as tensors that we read ourselves.
"""

import difflib
import logging
import re
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, one_line

PREFIX = "timm:"
_NAME = re.compile(r"[a-z0-9_]+(\.[A-Za-z0-9_]+)?")


def list_names() -> list[tuple[str, str]]:
    """(``timm:NAME``, ``timm`` where it has weights), or nothing where timm is not installed."""
    try:
        import timm
    except ImportError:
        return []
    trained = {name.partition(".")[0] for name in timm.list_models(pretrained=True)}
    return [(PREFIX + name, "timm" if name in trained else "") for name in timm.list_models()]


def build(name: str, image_size: int) -> nn.Module:
    """Images [B, 3, image_size, image_size] to features [B, D], with ``feature_dim`` D.

    Raises ConfigError: no timm, an unknown name, or a size that the network cannot take.
    """
    network = create(name, image_size)
    network.feature_dim = _feature_dim(network, name, image_size)
    return network


def create(name: str, image_size: int) -> nn.Module:
    """The same before its ``feature_dim`` is looked for; builds on torch's meta device too. Raises ConfigError."""
    timm, name = _timm(), _checked(name)
    sized = {"img_size": image_size} if _config(name).get("fixed_input_size") else {}
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0, **sized)
    except Exception as error:  # timm's networks raise what they like
        raise ConfigError(f"{PREFIX}{name} cannot be built for {image_size} px: {one_line(error)}") from None
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None) or 1
    patch = patch if isinstance(patch, int) else max(patch)
    if image_size % patch:
        near = max(1, image_size // patch) * patch
        raise ConfigError(f"{PREFIX}{name} takes patches of {patch} px, of which {image_size} px is no multiple: "
                          f"say --image-size {near} or {near + patch}")  # fmt: skip
    return network


def adapt(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights in the form of ``network``, where timm knows how: position codes of another image size, names of the original
    release. What timm makes nothing of comes back as it is: whether it fits is for the caller to see."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numpy-style indexing in timm's interpolation
            return convert(dict(state), network) if convert else state
    except Exception:  # it meets the names of another network
        return state


def normalisation(name: str) -> tuple[tuple, tuple]:
    """Channel mean and standard deviation that timm's weights of this network expect."""
    config = _config(_checked(name))
    return tuple(config["mean"]), tuple(config["std"])


def pretrained_file(name: str, *, offline: bool) -> str:
    """The safetensors file of timm's weights, from the local Hugging Face cache, else downloaded into it.

    Raises ConfigError (there are no weights), DataError (offline and not in the cache, or no network).
    """
    config = _config(name := _checked(name))
    place, file = config.get("hf_hub_id"), config.get("hf_hub_filename") or "model.safetensors"
    if not place or not file.endswith(".safetensors"):
        raise ConfigError(f"timm has no weights of {PREFIX}{name} in safetensors form; give --weights FILE")
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import disable_progress_bars

    cached = try_to_load_from_cache(place, file)
    if isinstance(cached, str):
        return cached
    mend = f"where there is a network, run: hf download {place} {file}; or give --weights FILE"
    if offline:
        raise DataError(f"offline, and {file} of {place} is not in {constants.HF_HUB_CACHE}; {mend}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells each of its five tries
    disable_progress_bars()
    try:
        return hf_hub_download(place, file)
    except Exception as error:  # of the network, the hub or the disk
        raise DataError(f"cannot fetch {file} of {place} ({one_line(error).rstrip('. ')}); {mend}") from None


def _timm():
    try:
        import timm
    except ImportError:
        raise ConfigError("timm is not installed; run: pip install 'balms[timm]'") from None
    return timm


def _checked(name: str) -> str:
    """timm's own name, without the prefix, if timm knows it."""
    name, timm = name.removeprefix(PREFIX), _timm()
    architecture, _, tag = name.partition(".")
    if not _NAME.fullmatch(name) or not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        tried = f"; try {', '.join(PREFIX + one for one in near)}" if near else ""
        raise ConfigError(f"timm knows no '{name[:80]}'{tried}; all of them: balms pretrain --list")
    if tag and tag not in (tags := [n.partition(".")[2] for n in timm.list_models(f"{architecture}.*", pretrained=True)]):
        raise ConfigError(f"{PREFIX}{architecture} has no weights tagged '{tag}'; there are: {', '.join(tags) or 'none'}")
    return name


def _config(name: str) -> dict[str, Any]:
    from timm.models import get_pretrained_cfg

    found = get_pretrained_cfg(name)
    return found.to_dict() if found is not None else {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def _feature_dim(network: nn.Module, name: str, image_size: int) -> int:
    """By one look at an empty image: timm's ``num_features`` is not always the width of what comes out."""
    training = network.training
    try:
        with torch.no_grad():
            out = network.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:
        raise ConfigError(f"{name} does not take images of {image_size} px: {one_line(error)}; "
                          "choose another --image-size") from None  # fmt: skip
    network.train(training)
    if out.ndim != 2:
        raise ConfigError(f"{name} gives no feature vector, but {list(out.shape)}: choose another backbone")
    return out.shape[1]
