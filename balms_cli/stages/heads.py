"""From a configuration to its loss and its head: what pretrain and retrain build alike."""

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..losses import DeferredReweighting, SoftmaxLoss, build_loss
from ..models.classifiers import cosine_head, linear_head


def training_loss(config: TrainConfig, counts_C: Tensor) -> SoftmaxLoss:
    """The loss that ``config`` names with its hyper-parameters, under deferred re-weighting where it says so."""
    loss = build_loss(config.loss, counts_C, exponent=config.loss_exponent, gamma=config.focal_gamma, beta=config.cb_beta,
                      max_margin=config.ldam_margin, scale=config.cosine_scale, eql_gamma=config.eql_gamma,
                      eql_threshold=config.eql_threshold)  # fmt: skip
    return DeferredReweighting(loss, counts_C, config.cb_beta, config.drw_start) if config.drw else loss


def fresh_head(config: TrainConfig, features: int, loss: SoftmaxLoss, classes: int, seed: int) -> nn.Module:
    """An untrained linear or cosine head, the bias where ``loss`` wants it at the start."""
    generator = torch.Generator().manual_seed(seed)
    if config.head == "cosine":
        return cosine_head(features, classes, generator, config.cosine_scale)
    head = linear_head(features, classes, generator)
    if loss.initial_bias is not None:
        head.bias.data.fill_(loss.initial_bias)
    return head


def undecayed(head: nn.Module, loss: SoftmaxLoss) -> list[nn.Parameter]:
    """Parameters that weight decay would pull away from where the loss wants them."""
    return [head.bias] if loss.initial_bias is not None and isinstance(head, nn.Linear) else []


def loss_name(config: TrainConfig) -> str:
    """For headers and reports."""
    return config.loss + (" + drw" if config.drw else "")
