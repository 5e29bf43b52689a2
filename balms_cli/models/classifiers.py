"""A classifier: a backbone that makes features and a head that makes logits."""

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """``backbone``: images [B, 3, H, W] to features [B, D]; ``head``: features to logits [B, C].

    The head computes in float32 whatever precision the backbone ran in.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())


def linear_head(features: int, classes: int, generator: torch.Generator | None = None) -> nn.Linear:
    """A fresh linear layer with torch's own initial law, U(-1/sqrt(D), 1/sqrt(D)), drawn from ``generator``."""
    head = nn.Linear(features, classes)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.uniform_(-(features**-0.5), features**-0.5, generator=generator)
    return head
