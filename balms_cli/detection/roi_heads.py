"""The heads of a detector with a long-tailed box classifier: torchvision's RoIHeads with a loss of one's own.

torchvision computes the classifier's loss in a function that cannot be set, and its masks for all categories at once. Here the
loss is a module, and of an instance's masks only that of its category is computed, in training and at test time: the same
numbers without C + 1 masks a region (C 1,203, 128 regions an image: 0.4 MB in place of 483 MB).

Shapes: R regions (RoIs), N detections or foreground regions, C categories, D features. Labels are 1..C, 0 is background.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads, project_masks_on_boxes
from torchvision.ops import boxes as box_ops

_BETA = 1 / 9  # torchvision's: from where on the box loss is linear
_MASKS_AT_ONCE = 64  # regions in the mask head at test time: 64 x 256 x 28 x 28 floats are 51 MB
_TRUE_MASKS_AT_ONCE = 32  # of an image in training, as floats: 32 x 800 x 1,066 of them are 109 MB


class BoxPredictor(nn.Module):
    """Features [R, D] to logits and box deltas, by torchvision's names.

    Softmax: C + 1 logits, the background's first. Sigmoid: C logits, which start as sure of nothing, p = 0.001 (Lin et al.
    2017; the released code). Deltas [R, 4 (C + 1)] (the background's are not used), or [R, 4] where ``class_agnostic``.
    Computed in float32 (or float64) whatever precision the features come in.
    """

    def __init__(self, features: int, num_categories: int, *, sigmoid: bool, class_agnostic: bool):
        super().__init__()
        self.cls_score = nn.Linear(features, num_categories + (not sigmoid))
        self.bbox_pred = nn.Linear(features, 4 * (1 if class_agnostic else num_categories + 1))
        if sigmoid:
            nn.init.normal_(self.cls_score.weight, std=0.01)
            nn.init.constant_(self.cls_score.bias, -math.log(999))

    def forward(self, features_RD: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(features_RD.device.type, enabled=False):
            features_RD = features_RD if features_RD.dtype == torch.float64 else features_RD.float()
            return self.cls_score(features_RD), self.bbox_pred(features_RD)


class LongTailRoIHeads(RoIHeads):
    """torchvision's RoIHeads with ``cls_loss(logits, labels)`` for the box classifier, background rows included.

    At test time raw logits are scored, softmax or sigmoid: no prior is added. What may be set: ``score_thresh``,
    ``nms_thresh``, ``detections_per_img``, and ``pre_nms``, how many boxes an image, the best over all categories, are
    handed to non-maximum suppression.
    """

    def __init__(self, parts: RoIHeads, cls_loss: nn.Module, *, sigmoid: bool, class_agnostic: bool, pre_nms: int = 10_000):
        """With the modules and settings of ``parts``."""
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in parts.__dict__.items() if not k.startswith("_") and k != "training"})
        for name, module in parts.named_children():
            self.add_module(name, module)
        self.cls_loss, self.sigmoid, self.class_agnostic, self.pre_nms = cls_loss, sigmoid, class_agnostic, pre_nms

    def check_targets(self, targets) -> None:
        """Masks are asked for where their loss is computed: regions for the box classifier do without."""
        if targets is None or not all("boxes" in t and "labels" in t for t in targets):
            raise ValueError("every target needs boxes and labels")

    def forward(self, features, proposals, image_shapes, targets=None):
        """In training the losses of the heads; in eval mode per image boxes, labels, scores and masks [N, 1, 28, 28]."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        found = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        results = [{"boxes": b, "labels": n, "scores": s} for b, s, n in zip(*found, strict=True)]
        if self.has_mask():
            sizes = [len(r["labels"]) for r in results]
            masks = self._masks(features, [r["boxes"] for r in results], [r["labels"] for r in results], image_shapes)
            for result, masks_N1MM in zip(results, masks.split(sizes), strict=True):
                result["masks"] = masks_N1MM
        return results, {}

    def _losses(self, features, proposals, image_shapes, targets) -> dict[str, Tensor]:
        proposals, matched, labels, box_targets = self.select_training_samples(proposals, targets)
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        labels_R = torch.cat(labels)
        losses = {"loss_classifier": self.cls_loss(logits, labels_R),
                  "loss_box_reg": self._box_loss(deltas, labels_R, torch.cat(box_targets))}  # fmt: skip
        if self.has_mask():
            places = [torch.where(x > 0)[0] for x in labels]
            boxes = [p[i] for p, i in zip(proposals, places, strict=True)]
            matched = [m[i] for m, i in zip(matched, places, strict=True)]
            logits_N1MM = self._mask_logits(self.mask_roi_pool(features, boxes, image_shapes), labels_R[labels_R > 0])
            losses["loss_mask"] = self._mask_loss(logits_N1MM, [t["masks"] for t in targets], boxes, matched)
        return losses

    def _box_loss(self, deltas: Tensor, labels_R: Tensor, targets_R4: Tensor) -> Tensor:
        """torchvision's: smooth L1 on the deltas of the true category of foreground rows, over the number of all rows."""
        rows = torch.where(labels_R > 0)[0]
        deltas_N4 = self._deltas_of(deltas, rows, labels_R[rows])
        return F.smooth_l1_loss(deltas_N4, targets_R4[rows], beta=_BETA, reduction="sum") / labels_R.numel()

    def _mask_loss(self, logits_N1MM: Tensor, masks: list[Tensor], boxes: list[Tensor], matched: list[Tensor]) -> Tensor:
        """torchvision's: binary cross-entropy with what of the true mask lies in each region's box, but of a crowded image's
        masks only some are floats at a time."""
        if not len(logits_N1MM):
            return logits_N1MM.sum() * 0
        truths = []
        for masks_IHW, boxes_N4, matched_N in zip(masks, boxes, matched, strict=True):
            truth_NMM = boxes_N4.new_empty(len(boxes_N4), *logits_N1MM.shape[2:])
            for first in range(0, len(masks_IHW), _TRUE_MASKS_AT_ONCE):
                some_KHW = masks_IHW[first : first + _TRUE_MASKS_AT_ONCE]
                rows = torch.where((matched_N >= first) & (matched_N < first + len(some_KHW)))[0]
                truth_NMM[rows] = project_masks_on_boxes(some_KHW, boxes_N4[rows], matched_N[rows] - first, truth_NMM.shape[-1])
            truths.append(truth_NMM)
        return F.binary_cross_entropy_with_logits(logits_N1MM[:, 0], torch.cat(truths))

    def _deltas_of(self, deltas: Tensor, rows_N: Tensor, labels_N: Tensor) -> Tensor:
        """[N, 4]: the box deltas of these rows for these categories."""
        deltas = deltas.reshape(len(deltas), deltas.shape[1] // 4, 4)
        return deltas[rows_N, torch.zeros_like(labels_N) if self.class_agnostic else labels_N]

    def scores(self, logits: Tensor) -> Tensor:
        """[R, C] of the categories alone."""
        return logits.sigmoid() if self.sigmoid else logits.softmax(1)[:, 1:]

    def postprocess_detections(self, class_logits, box_regression, proposals, image_shapes):
        """Boxes, scores and labels of each image: over ``score_thresh``, the ``pre_nms`` best, non-maximum suppression within
        each category, the ``detections_per_img`` best. Only boxes that come so far are decoded."""
        found = []
        sizes = [len(p) for p in proposals]
        for logits, deltas, boxes_R4, shape in zip(class_logits.split(sizes), box_regression.split(sizes), proposals,
                                                   image_shapes, strict=True):  # fmt: skip
            scores_RC = self.scores(logits)
            rows, columns = torch.where(scores_RC > self.score_thresh)
            scores_K = scores_RC[rows, columns]
            if len(scores_K) > self.pre_nms:
                scores_K, best = scores_K.topk(self.pre_nms)
                rows, columns = rows[best], columns[best]
            labels_K = columns + 1
            deltas_K4 = self._deltas_of(deltas, rows, labels_K)
            boxes_K4 = self.box_coder.decode(deltas_K4, [boxes_R4[rows]]).reshape(-1, 4)
            boxes_K4 = box_ops.clip_boxes_to_image(boxes_K4, shape)
            kept = box_ops.remove_small_boxes(boxes_K4, min_size=1e-2)
            boxes_K4, scores_K, labels_K = boxes_K4[kept], scores_K[kept], labels_K[kept]
            # In float64: boxes of a category are moved away from all others, by up to C image widths.
            kept = box_ops.batched_nms(boxes_K4.double(), scores_K.double(), labels_K, self.nms_thresh)
            kept = kept[: self.detections_per_img]
            found.append((boxes_K4[kept], scores_K[kept], labels_K[kept]))
        boxes, scores, labels = (list(x) for x in zip(*found, strict=True))
        return boxes, scores, labels

    def _mask_logits(self, maps: Tensor, labels_N: Tensor) -> Tensor:
        """[N, 1, 28, 28]: mask logits of each region for its own category."""
        x = self.mask_predictor.relu(self.mask_predictor.conv5_mask(self.mask_head(maps)))
        last = self.mask_predictor.mask_fcn_logits
        channels_N = torch.zeros_like(labels_N) if self.class_agnostic else labels_N
        with torch.autocast(x.device.type, enabled=False):
            x_NKM = x.float().flatten(2)
            logits_N1M = torch.baddbmm(last.bias[channels_N][:, None, None], last.weight.flatten(1)[channels_N][:, None], x_NKM)
        return logits_N1M.view(len(x), 1, *x.shape[2:])

    def _masks(self, features, boxes: list[Tensor], labels: list[Tensor], image_shapes) -> Tensor:
        """[N, 1, 28, 28] of all images: probability that a pixel of the box belongs to the instance."""
        found = []
        for image, (boxes_N4, labels_N) in enumerate(zip(boxes, labels, strict=True)):
            own = {name: m[image : image + 1] for name, m in features.items()}
            for chunk_K4, labels_K in zip(boxes_N4.split(_MASKS_AT_ONCE), labels_N.split(_MASKS_AT_ONCE), strict=True):
                if len(labels_K):
                    maps = self.mask_roi_pool(own, [chunk_K4], [image_shapes[image]])
                    found.append(self._mask_logits(maps, labels_K).sigmoid())
        if not found:
            side = 2 * self.mask_roi_pool.output_size[0]
            return boxes[0].new_zeros(0, 1, side, side)
        return torch.cat(found)
