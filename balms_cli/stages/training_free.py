"""Classifiers that stage 2 makes without training: tau-normalised rows, and the nearest class mean."""

from typing import Any

import torch
from torch import Tensor, nn

from ..config import RetrainConfig
from ..data.manifest import Manifest
from ..engine.header import Header
from ..errors import ConfigError
from ..models.classifiers import nearest_class_mean, stage1_linear, tau_normalised
from ..reporter import Reporter
from .features import Features

_PART = 8192  # images whose features are read at once
TAUS = [round(0.1 * i, 1) for i in range(21)]  # the grid of the authors' code: 0 to 2


def class_means(config: RetrainConfig, data: Features, classes: int) -> nn.Module:
    """NCM on the plain features of every training image, a part of them in memory at a time."""
    sums_CD = 0
    for n, images_B in enumerate(torch.arange(len(data.labels), device=data.labels.device).split(_PART)):
        features_BD = data.read(images_B, n, 0)
        if n == 0:
            sums_CD = features_BD.new_zeros(classes, features_BD.shape[1])
        sums_CD.index_add_(0, data.labels[images_B], features_BD)
    means_CD = sums_CD / data.index.counts[:, None]
    return nearest_class_mean(means_CD, torch.arange(classes, device=means_CD.device), classes, config.cosine_scale).cpu()


def tau_norm(config: RetrainConfig, head: nn.Module, parent: Header, manifest: Manifest, val: Features | None,
             reporter: Reporter) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """The tau-normalised classifier of stage 1, and what to report of tau: as given, or best on the validation split."""
    linear = stage1_linear(head.cpu(), parent.head, "tau-norm")
    if config.tau_norm is not None:
        return tau_normalised(linear, config.tau_norm), {"tau_norm": config.tau_norm, "tau_chosen_on": "given"}
    features_ND, labels_N = _all(val).cpu(), val.labels.cpu()
    curve = [_class_mean_accuracy(tau_normalised(linear, tau)(features_ND), labels_N) for tau in TAUS]
    best = max(range(len(TAUS)), key=lambda i: curve[i])  # the smallest of equals
    reporter.note(f"tau-norm: tau {TAUS[best]} is best on {len(labels_N)} validation images "
                  f"({100 * curve[best]:.1f} %; tau 0: {100 * curve[0]:.1f} %)")  # fmt: skip
    return tau_normalised(linear, TAUS[best]), {
        "tau_norm": TAUS[best], "tau_chosen_on": f"val of {manifest.name} ({len(labels_N)} images)",
        "tau_curve": {str(t): round(a, 4) for t, a in zip(TAUS, curve, strict=True)},
    }  # fmt: skip


def check_tau(config: RetrainConfig, manifest: Manifest) -> None:
    """Raises ConfigError (exit 2) where tau is neither given nor to be chosen: never on test images."""
    if config.classifier == "tau-norm" and config.tau_norm is None and not len(manifest.splits.get("val", ())):
        raise ConfigError("--classifier tau-norm: give the exponent by --tau-norm 0.7, or choose it on validation images: "
                          "balms make-lt ... --val-per-class 20, pretrain and retrain on that")  # fmt: skip


def _all(data: Features) -> Tensor:
    """The plain features of every image, in order [N, D]."""
    return data.read(torch.arange(len(data.labels), device=data.labels.device), 0, 0)


def _class_mean_accuracy(logits_NC: Tensor, labels_N: Tensor) -> float:
    right_N = (logits_NC.argmax(1) == labels_N).double()
    counts_C = torch.bincount(labels_N, minlength=logits_NC.shape[1])
    hits_C = torch.zeros(len(counts_C), dtype=torch.float64).index_add_(0, labels_N, right_N)
    return (hits_C / counts_C)[counts_C > 0].mean().item()
