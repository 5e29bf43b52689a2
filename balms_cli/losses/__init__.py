"""Balanced Softmax, Balanced Sigmoid, and the losses that they are compared with: each small, with its equation and source."""

from .balanced import BalancedSigmoidLoss, BalancedSoftmaxLoss, LogitAdjustedLoss, SigmoidLoss
from .base import SoftmaxLoss, class_counts, log_softmax
from .equalization import EqualizationLoss, SigmoidEqualizationLoss
from .margin import LDAMLoss
from .reweighted import (
    ClassBalancedLoss,
    CostSensitiveLoss,
    DeferredReweighting,
    FocalLoss,
    ReweightedLoss,
    SigmoidFocalLoss,
    effective_number,
)

__all__ = [
    "BalancedSigmoidLoss", "BalancedSoftmaxLoss", "ClassBalancedLoss", "CostSensitiveLoss", "DeferredReweighting",
    "EqualizationLoss", "FocalLoss", "LDAMLoss", "LogitAdjustedLoss", "ReweightedLoss", "SigmoidEqualizationLoss",
    "SigmoidFocalLoss", "SigmoidLoss", "SoftmaxLoss", "build_loss", "class_counts", "effective_number", "log_softmax",
]  # fmt: skip


def build_loss(name: str, class_counts, *, exponent: float = 1.0, gamma: float = 1.0, beta: float = 0.9999,
               max_margin: float = 0.5, scale: float = 30.0, eql_gamma: float = 0.9, eql_threshold: float = 0.005
               ) -> SoftmaxLoss:  # fmt: skip
    """The loss that a configuration names; each takes the hyper-parameters that are its own.

    ``exponent``: balanced, logit-adjusted, cost-sensitive; ``gamma``: focal; ``beta``: class-balanced; ``max_margin``
    and ``scale``: ldam; ``eql_gamma`` and ``eql_threshold``: equalization. Raises KeyError for an unknown name.
    """
    builders = {
        "softmax": lambda n: SoftmaxLoss(n),
        "balanced": lambda n: BalancedSoftmaxLoss(n, exponent),
        "logit-adjusted": lambda n: LogitAdjustedLoss(n, exponent),
        "balanced-sigmoid": lambda n: BalancedSigmoidLoss(n),
        "focal": lambda n: FocalLoss(n, gamma),
        "cost-sensitive": lambda n: CostSensitiveLoss(n, exponent),
        "class-balanced": lambda n: ClassBalancedLoss(n, beta),
        "class-balanced-sigmoid": lambda n: ClassBalancedLoss(n, beta, "sigmoid"),
        "class-balanced-focal": lambda n: ClassBalancedLoss(n, beta, "focal", gamma),
        "ldam": lambda n: LDAMLoss(n, max_margin, scale),
        "equalization": lambda n: EqualizationLoss(n, eql_gamma, eql_threshold),
    }
    return builders[name](class_counts)
