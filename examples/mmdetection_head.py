"""Balanced Softmax and the balanced sigmoid in a box head of mmdetection 3, without balms' own trainer.

In a config:

    custom_imports = dict(imports=["mmdetection_head"])    # this file, on PYTHONPATH
    model = dict(roi_head=dict(bbox_head=dict(
        type="BalancedBBoxHead", num_classes=1203,
        loss_cls=dict(type="BalancedLoss", annotations="lvis_v1_train.json", use_sigmoid=False))))

mmdetection labels regions 0..C-1, and C for background: hence ``background=C``. At test time the raw logits are used. Written
against ``BBoxHead`` and ``Shared2FCBBoxHead`` of mmdetection 3.0 to 3.3, by the hooks that its Seesaw loss uses
(``custom_cls_channels``); not run with mmdetection itself, whose interface the tests stand in for.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

try:
    from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
    from mmdet.registry import MODELS
except ImportError as error:
    raise ImportError("this example needs mmdetection 3: pip install openmim, then mim install mmdet") from error

from balms_cli.losses import BalancedSigmoidLoss, BalancedSoftmaxLoss


def class_priors(annotations: str | Path) -> list[float]:
    """The share of the annotated images that show each category, in the order of the JSON and of mmdetection's labels.

    Counted from the pairs (image, category) of the JSON's annotations, each once. Not instances, and no counts: several
    categories share an image, so the shares do not sum to one. Kept within [1/2N, 1 - 1/2N], N the images with annotations.
    LVIS files also bring the numerator along, as each category's ``image_count``.
    """
    document = json.loads(Path(annotations).read_text(encoding="utf-8"))
    pairs = {(a["image_id"], a["category_id"]) for a in document["annotations"] if not a.get("iscrowd")}
    images = len({image for image, _ in pairs})
    counts = dict.fromkeys((c["id"] for c in document["categories"]), 0)
    for _, category in pairs:
        counts[category] += 1
    return [min(max(n, 0.5), images - 0.5) / images for n in counts.values()]


@MODELS.register_module()
class BalancedLoss(nn.Module):
    """``loss_cls`` of a box head: the logits are [R, C + 1] with background last, or [R, C] with ``use_sigmoid``."""

    custom_cls_channels = True  # the head asks this loss for its number of outputs, and for the scores at test time

    def __init__(self, annotations: str, use_sigmoid: bool = False, loss_weight: float = 1.0):
        super().__init__()
        priors = class_priors(annotations)
        self.use_sigmoid, self.loss_weight, self.num_classes = use_sigmoid, loss_weight, len(priors)
        self.loss = (BalancedSigmoidLoss if use_sigmoid else BalancedSoftmaxLoss)(priors, background=len(priors))

    def get_cls_channels(self, num_classes: int) -> int:
        if num_classes != self.num_classes:
            raise ValueError(f"the head has num_classes={num_classes}, the annotations {self.num_classes} categories")
        return num_classes if self.use_sigmoid else num_classes + 1

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Scores [R, C + 1]. mmdetection drops the last column, the background's."""
        if not self.use_sigmoid:
            return cls_score.softmax(-1)
        return torch.cat([cls_score.sigmoid(), cls_score.new_zeros(len(cls_score), 1)], 1)

    def forward(self, cls_score: Tensor, label: Tensor, weight: Tensor | None = None, avg_factor: float | None = None,
                reduction_override: str | None = None) -> Tensor:  # fmt: skip
        """The terms [R] with ``reduction_override="none"``, else their sum over ``avg_factor`` (default: the regions)."""
        losses_R = self.loss.per_example(cls_score, label) * self.loss_weight
        if weight is not None:
            losses_R = losses_R * weight
        if reduction_override == "none":
            return losses_R
        if reduction_override == "sum":
            return losses_R.sum()
        return losses_R.sum() / (len(losses_R) if avg_factor is None else avg_factor)


@MODELS.register_module()
class BalancedBBoxHead(Shared2FCBBoxHead):
    """The usual two-layer box head; sigmoids start from a score of 0.001, else background would drown all."""

    def init_weights(self) -> None:
        super().init_weights()
        if self.loss_cls.use_sigmoid:
            nn.init.constant_(self.fc_cls.bias, -math.log((1 - 0.001) / 0.001))
