"""A classifier's network as the backbone of a detector: its feature maps at strides 4, 8, 16 and 32, and a pyramid on them.

The network is built and filled with weights as a classifier, by the names and ``--weights`` of ``balms pretrain``, and only
then cut. torchvision's are cut at their top-level layers, timm's by timm. State names are those of torchvision's detectors:
``body`` and ``fpn``.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.misc import FrozenBatchNorm2d

from ..errors import ConfigError, one_line
from ..models import timm_networks
from ..models.backbones import build_backbone
from ..models.weights import load_weights

STRIDES = (4, 8, 16, 32)
_PROBE = (64, 96)  # pixels; not square, so that maps with channels last are told from those with channels first
_INNER = ("features", "layers", "trunk_output")  # where torchvision keeps a network's layers, if not at the top
_SIZE = 224  # pixels that a classifier is built for; convolutions do not mind


class PyramidBackbone(nn.Module):
    """Images [B, 3, H, W] to maps of ``out_channels`` channels each, by name: "0" for the finest, of stride ``strides[0]``,
    and so on, then "pool", of twice the last stride."""

    def __init__(self, cut: "_Cut", out_channels: int):
        super().__init__()
        self.body, self.strides, self.out_channels = cut.body, cut.strides, out_channels
        self._taken, self._channels_last = cut.taken, cut.channels_last
        self.fpn = FeaturePyramidNetwork(cut.channels, out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        maps = _as_list(self.body(images_B3HW))
        taken = [maps[i].permute(0, 3, 1, 2) if last else maps[i]
                 for i, last in zip(self._taken, self._channels_last, strict=True)]  # fmt: skip
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(taken)))


def build_backbone_fpn(name: str, *, norm: str, fpn_channels: int, trainable_layers: int, weights: str | None, offline: bool
                       ) -> tuple[PyramidBackbone, tuple | None, tuple | None]:  # fmt: skip
    """The backbone called ``name`` with ``weights`` (as ``--weights`` of ``balms pretrain`` takes them), and the channel mean
    and std that they expect, None where they do not say.

    ``norm``: frozen (the weights' statistics are kept as constants) or batch. ``trainable_layers``: how many of the five
    stages (up to stride 2, 4, 8, 16, 32) are trained, from the last.
    Raises ConfigError (unknown, or no maps at strides 8, 16 and 32), DataError and CheckpointError (weights).
    """
    if norm == "frozen" and weights is None:
        raise ConfigError("FrozenBatchNorm without weights has no statistics, and training gives NaN: use norm 'batch', or "
                          "give --weights")  # fmt: skip
    network = _classifier(name)
    mean, std = load_weights(network, name, weights, offline=offline) if weights is not None else (None, None)
    return _pyramid(name, network, norm, fpn_channels, trainable_layers), mean, std


def empty_backbone_fpn(name: str, *, norm: str, fpn_channels: int) -> PyramidBackbone:
    """The same without weights: to be filled from a checkpoint. Raises ConfigError."""
    return _pyramid(name, _classifier(name), norm, fpn_channels, trainable_layers=5)


@dataclass(frozen=True)
class _Cut:
    """A network up to its last feature map."""

    body: nn.Module  # images to maps, a list or a dict
    taken: list[int]  # which of the maps the pyramid takes,
    strides: list[int]  # and the stride and the channels of each,
    channels: list[int]
    channels_last: list[bool]  # and whether it is [B, H, W, channels]
    ends: list[tuple[str, int]]  # layers in the order they run, each with the stride of its output


def _classifier(name: str) -> nn.Module:
    create = timm_networks.create if name.startswith(timm_networks.PREFIX) else build_backbone
    return create(name, _SIZE)


def _pyramid(name: str, network: nn.Module, norm: str, fpn_channels: int, trainable_layers: int) -> PyramidBackbone:
    timms = name.startswith(timm_networks.PREFIX)
    cut = _cut_timm(name, network) if timms else _cut(name, network)
    _freeze(cut, trainable_layers)
    backbone = PyramidBackbone(cut, fpn_channels)
    if norm == "frozen":
        backbone.body = _freeze_norms_timm(backbone.body) if timms else _freeze_norms(backbone.body)
    return backbone


def _cut(name: str, network: nn.Module) -> _Cut:
    """One of torchvision's networks, cut at its layers: those at the top, which run one after another."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for child_name, child in network.named_children():
        inner = child_name in _INNER and isinstance(child, nn.Sequential)
        layers.update(child.named_children() if inner else [(child_name, child)])
    maps = _run(layers)
    seen = {layer: found for layer, m in maps.items() if (found := _stride(m)) is not None}
    ends = [(layer, stride) for layer, (stride, _, _) in seen.items()]
    last = {stride: layer for layer, stride in ends}  # of each stride the last layer
    strides = _pyramid_strides(name, last)
    body = IntermediateLayerGetter(nn.Sequential(layers), {last[s]: str(i) for i, s in enumerate(strides)})
    ends = [end for end in ends if end[0] in body]
    return _Cut(body, list(range(len(strides))), strides, [seen[last[s]][1] for s in strides],
                [seen[last[s]][2] for s in strides], ends)  # fmt: skip


def _cut_timm(name: str, network: nn.Module) -> _Cut:
    """One of timm's networks, cut by timm, with the weights of ``network``."""
    import timm

    own_name = name.removeprefix(timm_networks.PREFIX)
    try:
        body = timm.create_model(own_name, features_only=True, pretrained=False)
        maps = _as_list(_look(body))
    except Exception as error:  # timm's networks raise what they like
        raise ConfigError(f"backbone '{name}' gives no feature maps of images of any size ({one_line(error)}); choose a "
                          "convolutional network") from None  # fmt: skip
    # timm takes the first layers of a network out of their rooms: stages.0 is stages_0 then.
    given = {key.replace(".", "_"): tensor for key, tensor in network.state_dict().items()}
    own = body.state_dict()
    filled = {key: given.get(key.replace(".", "_")) for key in own}
    if any(tensor is None or tensor.shape != own[key].shape for key, tensor in filled.items()):
        raise ConfigError(f"backbone '{name}': timm's cut of it has other layers than the network; choose another backbone")
    body.load_state_dict(filled, assign=own and next(iter(own.values())).is_meta)
    seen = [(i, *found) for i, m in enumerate(maps) if (found := _stride(m)) is not None]
    last = {stride: (i, channels, flag) for i, stride, channels, flag in seen}
    strides = _pyramid_strides(name, last)
    ends = list(zip(body.feature_info.module_name(), body.feature_info.reduction(), strict=True))
    return _Cut(body, [last[s][0] for s in strides], strides, [last[s][1] for s in strides],
                [last[s][2] for s in strides], ends)  # fmt: skip


def _pyramid_strides(name: str, there: Iterable[int]) -> list[int]:
    """Strides of the maps that a pyramid is built on. Raises ConfigError where they are too few."""
    strides = [s for s in STRIDES if s in there]
    if not {8, 16, 32} <= set(strides):
        told = ", ".join(str(s) for s in sorted(there)) or "none"
        raise ConfigError(f"backbone '{name}' has no feature maps at strides 8, 16 and 32 to build a pyramid on (its strides: "
                          f"{told}); try resnet50, mobilenet_v3_large, or timm:NAME of a convolutional network")  # fmt: skip
    return strides


def _run(layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What comes out of each layer, run one after another up to the pooling, or the place, of the classifier."""
    maps: dict[str, Tensor] = {}
    x = None
    for name, layer in layers.items():
        if isinstance([*layer.modules()][-1], nn.AdaptiveAvgPool2d | nn.Identity):  # Identity: where the classifier was
            break
        try:
            x = _look(layer, x)
        except Exception:  # a layer that does not follow the one before it: what comes next is no longer a map
            break
        maps[name] = x
    return maps


def _look(layer: nn.Module, x: Tensor | None = None):
    """One look at an empty image, or at ``x``, in eval mode."""
    modes = [(m, m.training) for m in layer.modules()]
    layer.eval()
    try:
        with torch.no_grad():
            return layer(torch.zeros(1, 3, *_PROBE) if x is None else x)
    finally:
        for m, training in modes:
            m.training = training


def _stride(m: Tensor) -> tuple[int, int, bool] | None:
    """Stride and channels of a map of the empty image, and whether its channels come last; None for anything else."""
    if isinstance(m, Tensor) and m.ndim == 4:
        for channels_last, (rows, columns) in ((False, m.shape[2:]), (True, m.shape[1:3])):
            stride = _PROBE[0] // rows if rows else 0
            if (rows * stride, columns * stride) == _PROBE:
                return stride, m.shape[3 if channels_last else 1], channels_last
    return None


def _as_list(maps) -> list[Tensor]:
    return list(maps.values()) if isinstance(maps, dict) else list(maps)


def _freeze(cut: _Cut, trainable_layers: int) -> None:
    """Stop the first stages from learning: of five, by the stride of what they put out (up to 2, 4, 8, 16, 32)."""
    modules = [(name.replace(".", "_") + "_", module) for name, module in cut.body.named_modules()]
    done = 0
    for layer, stride in cut.ends:
        prefix = layer.replace(".", "_") + "_"
        after = max((i + 1 for i, (name, _) in enumerate(modules) if name.startswith(prefix)), default=done)
        stage = sum(stride >= s for s in STRIDES)
        for _, module in modules[done:after]:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(stage >= 5 - trainable_layers)
        done = max(done, after)


def _freeze_norms(module: nn.Module) -> nn.Module:
    """BatchNorm2d layers as FrozenBatchNorm2d of the same numbers, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(child.state_dict(), assign=child.running_mean.is_meta)
            setattr(module, name, frozen)
        else:
            _freeze_norms(child)
    return module


def _freeze_norms_timm(module: nn.Module) -> nn.Module:
    """The same of timm's layers, some of which normalise and activate in one."""
    from timm.layers import freeze_batch_norm_2d

    return freeze_batch_norm_2d(module)
