"""balms: Balanced Meta-Softmax for images with a long tail.

The public names below are loaded when first used, so that ``import balms_cli`` does not import torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_LOSSES = (
    "SoftmaxLoss", "BalancedSoftmaxLoss", "BalancedSigmoidLoss", "LogitAdjustedLoss", "SigmoidLoss", "FocalLoss",
    "CostSensitiveLoss", "ClassBalancedLoss", "LDAMLoss", "DeferredReweighting", "EqualizationLoss", "ReweightedLoss",
    "SigmoidFocalLoss", "SigmoidEqualizationLoss", "class_counts",
)  # fmt: skip
_PUBLIC = dict.fromkeys(_LOSSES, "losses") | {
    "MetaSampler": "meta.sampler", "MetaReweigher": "meta.reweigher", "influence": "meta.influence",
    "MetaWeightNet": "meta.weight_net", "l2rw_weights": "meta.l2rw", "optimal_margins": "bound",
    "CosineHead": "models.classifiers",
}  # fmt: skip
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
