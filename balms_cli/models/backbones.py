"""Backbones by name: CIFAR ResNets of our own, ResNet-10, torchvision's classifiers, and as an extra timm's networks.

torchvision and timm are imported inside the functions: they cost a second each, and the CIFAR networks do without them.
"""

import difflib

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError, one_line
from . import timm_networks
from .resnet_cifar import DEPTHS, ResNetCifar

CIFAR_NAMES = tuple(f"resnet{depth}" for depth in DEPTHS)
RESNET10 = "resnet10"
_OURS = (*CIFAR_NAMES, RESNET10)
# Auxiliary heads while training, or a convolution as the classifier: no plain feature vector to take.
_UNFIT = ("googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1")


def backbone_names() -> list[str]:
    """Every name that ``build_backbone`` knows, but timm's."""
    models = torchvision_models()
    return [*_OURS, *(name for name in models.list_models(module=models) if name not in _UNFIT)]


def in_torchvision(name: str) -> bool:
    """Whether the network of this name is torchvision's, with torchvision's weights."""
    return name not in _OURS and not name.startswith(timm_networks.PREFIX)


def describe(name: str) -> str:
    """What network it is, and by whose names its weights go."""
    if name in CIFAR_NAMES:
        return "CIFAR ResNet of balms (He et al. 2016, section 4.2; option-A shortcuts)"
    if name == RESNET10:
        return "torchvision's ResNet(BasicBlock, [1, 1, 1, 1]) without its last linear layer, by torchvision's names"
    if name.startswith(timm_networks.PREFIX):
        return "timm's network of that name with num_classes=0, by timm's names"
    return "torchvision's network of that name without its last linear layer, by torchvision's names"


def list_backbones() -> list[tuple[str, str]]:
    """(name, what ``--weights`` takes for it besides a file: ``imagenet``, ``timm`` or nothing), timm's where it is there."""
    models = torchvision_models()
    found = [(n, "imagenet" if in_torchvision(n) and len(models.get_model_weights(n)) else "") for n in backbone_names()]
    return found + timm_networks.list_names()


def build_backbone(name: str, image_size: int) -> nn.Module:
    """A network from images [B, 3, image_size, image_size] to features [B, D], with ``feature_dim`` D.

    Raises ConfigError for an unknown name, with the nearest known one, for a size that the network cannot take, and for a
    timm network where timm is missing.
    """
    if name in CIFAR_NAMES:
        return ResNetCifar(int(name.removeprefix("resnet")))
    if name.startswith(timm_networks.PREFIX):
        return timm_networks.build(name, image_size)
    if name == RESNET10:
        network = _resnet10()
    elif name not in (known := backbone_names()):
        near = difflib.get_close_matches(name, known, n=3)
        raise ConfigError(f"backbone '{name}' is unknown; {'try ' + ', '.join(near) if near else 'try resnet32, resnet18'}; "
                          "all of them: balms pretrain --list")  # fmt: skip
    else:
        # Vision transformers have one position code a patch, so they must know the size when they are built.
        sized = {"image_size": image_size} if name.startswith("vit") else {}
        try:
            network = torchvision_models().get_model(name, weights=None, **sized)
        except AssertionError as error:
            raise _wrong_size(name, image_size, error) from None
    path, last = [(path, m) for path, m in network.named_modules() if isinstance(m, nn.Linear)][-1]
    parent, _, attribute = path.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    network.feature_dim = last.in_features
    _try_size(network, name, image_size)
    return network


def _try_size(network: nn.Module, name: str, image_size: int) -> None:
    """One image through the network, on torch's meta device: nothing is computed, but sizes that do not fit are found."""
    tensors = {key: t.to("meta") for key, t in [*network.named_parameters(), *network.named_buffers()]}
    training = network.training
    try:
        with torch.no_grad():
            functional_call(network.eval(), tensors, (torch.zeros(1, 3, image_size, image_size, device="meta"),))
    except NotImplementedError:  # a layer that the meta device does not know
        pass
    except (RuntimeError, AssertionError) as error:
        raise _wrong_size(name, image_size, error) from None
    network.train(training)


def _wrong_size(name: str, image_size: int, error: Exception) -> ConfigError:
    return ConfigError(f"{name} does not take images of {image_size} px: {one_line(error)}; choose another --image-size")


class Weightless(TorchFunctionMode):
    """Within it layers are built without memory for their weights, on torch's meta device. Unlike within that device itself,
    numbers can still be computed by tensors, as torchvision's RegNets do to find their widths."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.empty, torch.zeros, torch.ones):
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def holds(state: dict[str, Tensor], name: str, image_size: int) -> bool:
    """Whether ``state`` has all tensors of this backbone, found without taking memory for them: a file from a stranger names
    its network itself, and some have billions of parameters. Raises ConfigError as ``build_backbone`` does."""
    if name in CIFAR_NAMES:
        return True
    timms = name.startswith(timm_networks.PREFIX)
    with torch.device("meta") if timms else Weightless():
        own = (timm_networks.create if timms else build_backbone)(name, image_size).state_dict()
    return all(key in state and state[key].shape == tensor.shape for key, tensor in own.items())


def torchvision_models():
    """torchvision.models. Raises ConfigError where it does not load beside this torch."""
    try:
        import torchvision.models as models
    except (ImportError, RuntimeError) as error:  # a CPU-only torch beside torchvision's own build: "nms does not exist"
        raise ConfigError(f"torchvision does not load beside this torch ({error}); "
                          "run: pip install --force-reinstall torch torchvision") from None  # fmt: skip
    return models


def _resnet10() -> nn.Module:
    """The ResNet-10 of ImageNet-LT (Liu et al., CVPR 2019): one basic block in each of the four stages, 512 features."""
    resnet = torchvision_models().resnet
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
