"""A classifier: a backbone that makes features and a head that makes logits. And every head there is.

On disk there are two: linear and cosine. LWS and tau-normalisation change the scale of a linear layer's rows, so they
fold back into one; the nearest class mean is a cosine head whose rows are the means.

Shapes: B batch, C classes, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError

COSINE_SCALE = 30.0


class Classifier(nn.Module):
    """``backbone``: images [B, 3, H, W] to features [B, D]; ``head``: features to logits [B, C].

    The head computes in float32 (or float64) whatever precision the backbone ran in.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features if features.dtype == torch.float64 else features.float())


class CosineHead(nn.Module):
    """Logits scale * cos(feature, w_c), without bias (the head of LDAM: Cao et al., NeurIPS 2019). [B, D] to [B, C].

    ``scale``: 30, LDAM's s. It is kept beside the weights, so that a checkpoint says all of its logits.
    """

    def __init__(self, features: int, classes: int, scale: float = COSINE_SCALE):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features))
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, features_BD: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features_BD, dim=1), F.normalize(self.weight, dim=1))


class LWSHead(nn.Module):
    """Learnable weight scaling (Kang et al., ICLR 2020): logits f_c * (w_c x + b_c), where f alone is learned, from 1 on.

    The scale multiplies the bias too, as in the authors' code.
    """

    def __init__(self, stage1: nn.Linear):
        super().__init__()
        self.register_buffer("weight", stage1.weight.detach().clone())
        self.register_buffer("bias", stage1.bias.detach().clone())
        self.scale = nn.Parameter(torch.ones(len(self.bias)))

    def forward(self, features_BD: Tensor) -> Tensor:
        return self.scale * F.linear(features_BD, self.weight, self.bias)

    def fold(self) -> nn.Linear:
        """The linear layer with the same logits."""
        scale_C = self.scale.detach()
        return _linear(self.weight * scale_C[:, None], self.bias * scale_C)


def linear_head(features: int, classes: int, generator: torch.Generator | None = None) -> nn.Linear:
    """A fresh linear layer with torch's own initial law, U(-1/sqrt(D), 1/sqrt(D)), drawn from ``generator``."""
    head = nn.Linear(features, classes)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.uniform_(-(features**-0.5), features**-0.5, generator=generator)
    return head


def cosine_head(
    features: int, classes: int, generator: torch.Generator | None = None, scale: float = COSINE_SCALE
) -> CosineHead:
    """A fresh cosine head; only the directions of its rows matter."""
    head = CosineHead(features, classes, scale)
    with torch.no_grad():
        head.weight.uniform_(-1, 1, generator=generator)
    return head


def tau_normalised(stage1: nn.Linear, tau: float) -> nn.Linear:
    """tau-normalisation (Kang et al., ICLR 2020, eq 5): rows w_c / |w_c|^tau, the bias kept. tau = 0: stage 1 itself.

    Classifiers trained on a long tail give frequent classes long rows; tau = 1 makes all of one length.
    """
    # Kept above zero as a power: a row of zeros stays one, whatever tau.
    length_C1 = (stage1.weight.detach().norm(dim=1, keepdim=True) ** tau).clamp_min(torch.finfo(stage1.weight.dtype).tiny)
    return _linear(stage1.weight.detach() / length_C1, stage1.bias.detach().clone())


def nearest_class_mean(features_ND: Tensor, labels_N: Tensor, classes: int, scale: float = COSINE_SCALE) -> CosineHead:
    """Nearest class mean by cosine (Kang et al., ICLR 2020): a cosine head whose rows are the means of the features.

    Raises ValueError for a class without features.
    """
    counts_C = torch.bincount(labels_N, minlength=classes)
    if not (counts_C > 0).all():
        raise ValueError("a class without images has no mean")
    sums_CD = features_ND.new_zeros(classes, features_ND.shape[1]).index_add_(0, labels_N, features_ND)
    head = CosineHead(features_ND.shape[1], classes, scale)
    head.weight.data = sums_CD / counts_C[:, None]
    return head


def stage1_linear(head: nn.Module, kind: str, method: str) -> nn.Linear:
    """The trained linear classifier that ``method`` (lws, tau-norm) starts from. Raises CheckpointError (exit 4) where the
    checkpoint has none: a fresh or a cosine layer would give a result too, and a silently low one."""
    if kind != "linear" or not isinstance(head, nn.Linear):
        what = "has no trained classifier (--frozen)" if kind == "untrained" else f"has a {kind} classifier"
        raise CheckpointError(f"--classifier {method} starts from the linear classifier of stage 1, but the checkpoint {what}; "
                              "take a checkpoint of balms pretrain --loss softmax")  # fmt: skip
    return head


def _linear(weight_CD: Tensor, bias_C: Tensor) -> nn.Linear:
    head = nn.Linear(weight_CD.shape[1], weight_CD.shape[0])
    head.weight.data, head.bias.data = weight_CD, bias_C
    return head
