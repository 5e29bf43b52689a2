"""balms: Balanced Meta-Softmax for images with a long tail.

The public names below are loaded when first used, so that ``import balms_cli`` does not import torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "SoftmaxLoss": "losses", "BalancedSoftmaxLoss": "losses", "BalancedSigmoidLoss": "losses", "class_counts": "losses",
    "MetaSampler": "meta.sampler", "MetaReweigher": "meta.reweigher", "influence": "meta.influence",
}  # fmt: skip
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
