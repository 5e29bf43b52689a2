"""Balanced Softmax and the balanced sigmoid in a box head of detectron2, without balms' own trainer.

Importing this file registers ``BalancedROIHeads``: name it in the config, and say where the training annotations lie.

    import detectron2_head
    detectron2_head.add_config(cfg)
    cfg.MODEL.ROI_HEADS.NAME = "BalancedROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.BALANCED_ANNOTATIONS = "lvis_v1_train.json"
    cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE = False    # True: the balanced sigmoid

detectron2 labels regions 0..K-1, and K for background: hence ``background=K``. At test time the raw logits are used, so
nothing else changes. Written against ``FastRCNNOutputLayers`` of detectron2 0.6's main branch (with ``use_sigmoid_ce``, 2022
and later); not run with detectron2 itself, whose interface the tests stand in for.
"""

import json
import math
from pathlib import Path

import torch

try:
    from detectron2.config import configurable
    from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
    from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
except ImportError as error:
    raise ImportError("this example needs detectron2 (its main branch): see its INSTALL.md, it is not on PyPI") from error

from balms_cli.losses import BalancedSigmoidLoss, BalancedSoftmaxLoss


def class_priors(annotations: str | Path) -> list[float]:
    """The share of the annotated images that show each category, in the order of detectron2's labels: ascending id.

    Counted from the pairs (image, category) of the JSON's annotations, each once. Not instances, and no counts: several
    categories share an image, so the shares do not sum to one. Kept within [1/2N, 1 - 1/2N], N the images with annotations.
    LVIS files also bring the numerator along, as each category's ``image_count``.
    """
    document = json.loads(Path(annotations).read_text(encoding="utf-8"))
    pairs = {(a["image_id"], a["category_id"]) for a in document["annotations"] if not a.get("iscrowd")}
    images = len({image for image, _ in pairs})
    counts = dict.fromkeys(sorted(c["id"] for c in document["categories"]), 0)
    for _, category in pairs:
        counts[category] += 1
    return [min(max(n, 0.5), images - 0.5) / images for n in counts.values()]


def add_config(cfg) -> None:
    """The key that ``BalancedROIHeads`` reads."""
    cfg.MODEL.ROI_BOX_HEAD.BALANCED_ANNOTATIONS = ""


class BalancedOutputLayers(FastRCNNOutputLayers):
    """Box classifier and box regression, the classifier with a balanced loss: only ``loss_cls`` differs from the parent's."""

    @configurable
    def __init__(self, *, class_priors: list[float], **rest):
        super().__init__(**rest)
        loss = BalancedSigmoidLoss if self.use_sigmoid_ce else BalancedSoftmaxLoss
        self.balanced_loss = loss(class_priors, background=self.num_classes)
        if self.use_sigmoid_ce:  # 0.001 for every category at the start, else background would drown all
            torch.nn.init.constant_(self.cls_score.bias, -math.log((1 - 0.001) / 0.001))

    @classmethod
    def from_config(cls, cfg, input_shape):
        found = super().from_config(cfg, input_shape)
        return found | {"class_priors": class_priors(cfg.MODEL.ROI_BOX_HEAD.BALANCED_ANNOTATIONS)}

    def losses(self, predictions, proposals) -> dict[str, torch.Tensor]:
        """``loss_box_reg`` as it is; ``loss_cls`` balanced, a mean over all regions. Logits [R, K + 1]."""
        found = super().losses(predictions, proposals)
        logits, _ = predictions
        if len(logits):
            labels = torch.cat([p.gt_classes for p in proposals])
            # With sigmoids detectron2 keeps a last column that nothing reads: ``inference`` drops it.
            loss = self.balanced_loss(logits[:, :-1] if self.use_sigmoid_ce else logits, labels)
            found["loss_cls"] = loss * self.loss_weight.get("loss_cls", 1.0)
        return found


@ROI_HEADS_REGISTRY.register()
class BalancedROIHeads(StandardROIHeads):
    """The standard RoI heads with the classifier above."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        found = super()._init_box_head(cfg, input_shape)
        return found | {"box_predictor": BalancedOutputLayers(cfg, found["box_head"].output_shape)}
