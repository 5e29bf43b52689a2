"""A detector: torchvision's Mask R-CNN (or Faster R-CNN) with the heads of roi_heads.py; what it does, and its checkpoint.

Where float16 or bfloat16 would cost pixels (anchors, box deltas, the boxes made of them) float32 is kept under autocast.

Shapes: B images, R regions, N detections, D head features. Boxes are x1, y1, x2, y2 in pixels.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks, paste_mask_in_image
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import MultiScaleRoIAlign, box_iou
from torchvision.ops.poolers import initLevelMapper

from ..config import DetectEvaluateConfig, DetectPredictConfig
from ..data.aside import replace_file
from ..errors import CheckpointError, ConfigError, one_line
from ..losses import SigmoidLoss, SoftmaxLoss
from ..models.backbones import Weightless
from .backbones import empty_backbone_fpn
from .header import Architecture, DetectHeader, read_detect_header
from .roi_heads import BoxPredictor, LongTailRoIHeads

SCORE_THRESHOLD, NMS, DETECTIONS, PRE_NMS = 1e-4, 0.5, 300, 10_000  # LVIS: no detection is too unsure to be scored
_BOXES_AT_ONCE = 16  # of an image in training, held against its anchors
_LOSS = "roi_heads.cls_loss."


def build_detector(arch: Architecture, num_categories: int, cls_loss: nn.Module | None = None,
                   backbone: nn.Module | None = None) -> nn.Module:  # fmt: skip
    """A detector of ``num_categories`` in training mode; torchvision's names of tensors.

    ``cls_loss(logits, labels)``: of the box classifier, label 0 being background (default: the plain one of the family).
    ``backbone``: from ``build_backbone_fpn`` (default: one without weights).
    Raises ConfigError for an unknown backbone, or one without feature maps.
    """
    backbone = backbone or empty_backbone_fpn(arch.backbone, norm=arch.norm, fpn_channels=arch.fpn_channels)
    sigmoid, width = arch.family == "sigmoid", backbone.out_channels
    strides = [*backbone.strides, 2 * backbone.strides[-1]]
    anchors = Anchors(tuple((8 * s,) for s in strides), ((0.5, 1.0, 2.0),) * len(strides))
    boxes, masks = _pool(backbone.strides, 7), _pool(backbone.strides, 14)
    parts: dict[str, Any] = dict(
        min_size=tuple(arch.min_sizes), max_size=arch.max_size, image_mean=list(arch.mean), image_std=list(arch.std),
        rpn_anchor_generator=anchors, rpn_head=ProposalHead(width, anchors.num_anchors_per_location()[0]),
        rpn_pre_nms_top_n_train=arch.proposals, rpn_post_nms_top_n_train=arch.proposals,
        box_roi_pool=boxes, box_head=TwoMLPHead(width * 7**2, arch.head_features),
        box_predictor=BoxPredictor(arch.head_features, num_categories, sigmoid=sigmoid, class_agnostic=arch.class_agnostic),
        box_score_thresh=SCORE_THRESHOLD, box_nms_thresh=NMS, box_detections_per_img=DETECTIONS,
        box_batch_size_per_image=arch.rois_per_image, box_positive_fraction=arch.foreground_share,
    )  # fmt: skip
    if arch.masks:
        head = MaskRCNNHeads(width, (width,) * 4, 1)
        predictor = MaskRCNNPredictor(width, width, 1 if arch.class_agnostic else num_categories + 1)
        model: nn.Module = MaskRCNN(backbone, mask_roi_pool=masks, mask_head=head, mask_predictor=predictor, **parts)
    else:
        model = FasterRCNN(backbone, **parts)
    cls_loss = cls_loss or (SigmoidLoss(background=0) if sigmoid else SoftmaxLoss(background=0))
    model.roi_heads = LongTailRoIHeads(model.roi_heads, cls_loss, sigmoid=sigmoid, class_agnostic=arch.class_agnostic,
                                       pre_nms=PRE_NMS)  # fmt: skip
    model.transform = Transform(model.transform, arch.test_size)
    model.rpn.box_similarity = overlaps
    return model


def cls_score(model: nn.Module) -> nn.Linear:
    """The box classifier's layer: D features to C + 1 logits (softmax) or C (sigmoid)."""
    return model.roi_heads.box_predictor.cls_score


class Anchors(AnchorGenerator):
    """Anchors in float32, whatever the maps are in: to bfloat16, pixel 801 is pixel 800."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32 if dtype != torch.float64 else dtype, device)


class ProposalHead(RPNHead):
    """Objectness and box deltas in float32, whatever the convolutions computed in."""

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(maps)
        return [_at_least_float32(x) for x in scores], [_at_least_float32(x) for x in deltas]


def overlaps(boxes_N4: Tensor, anchors_A4: Tensor) -> Tensor:
    """torchvision's ``box_iou`` [N, A], some boxes at a time: it has several times as much in memory while it computes, and an
    image of 800 pixels has some 200,000 anchors."""
    found_NA = boxes_N4.new_empty(len(boxes_N4), len(anchors_A4))
    for part_NA, part_N4 in zip(found_NA.split(_BOXES_AT_ONCE), boxes_N4.split(_BOXES_AT_ONCE), strict=True):
        part_NA.copy_(box_iou(part_N4, anchors_A4))
    return found_NA


class Transform(GeneralizedRCNNTransform):
    """torchvision's, with a size of its own at test time: in training the shorter side is drawn from ``min_size``, which may
    be set; in eval mode it is ``test_size``. An image so narrow that nothing would be left of it keeps a pixel. Masks are
    scaled as they are, not as floats four times as large: the nearest pixel is the same."""

    def __init__(self, stock: GeneralizedRCNNTransform, test_size: int):
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in stock.__dict__.items() if not k.startswith("_") and k != "training"})
        self._skip_resize, self.test_size = False, test_size

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        before = self.min_size, self.fixed_size, self.training
        height, width = image.shape[-2:]
        try:
            self.min_size = (self.torch_choice(self.min_size),) if self.training else (self.test_size,)
            self.training = False  # a second size would be drawn, else
            scale = min(self.min_size[0] / min(height, width), self.max_size / max(height, width))
            if scale * min(height, width) < 1:
                self.fixed_size = (max(1, int(scale * width)), max(1, int(scale * height)))
            rest = target and {k: v for k, v in target.items() if k != "masks"}
            image, rest = super().resize(image, rest)
        finally:
            self.min_size, self.fixed_size, self.training = before
        if target and "masks" in target:
            rest["masks"] = F.interpolate(target["masks"][:, None].byte(), image.shape[-2:])[:, 0]
        return image, rest


def _pool(strides: list[int], size: int) -> MultiScaleRoIAlign:
    """Pooling by the backbone's strides. torchvision guesses them from the first batch, and wrongly where it was padded to
    much more than its own size."""
    pool = MultiScaleRoIAlign([str(i) for i in range(len(strides))], output_size=size, sampling_ratio=2)
    pool.scales = [1 / s for s in strides]
    pool.map_levels = initLevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))
    return pool


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# Looking


@contextmanager
def _modes(model: nn.Module, *training: nn.Module) -> Iterator[None]:
    """The whole model in eval mode but for the flags of ``training`` (not of what is in them); afterwards all as before."""
    before = [(m, m.training) for m in model.modules()]
    model.eval()
    for module in training:
        module.training = True
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@torch.no_grad()
def region_features(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """What the box classifier is trained on: features [R, D] and labels [R] (0: background) of the sampled regions.

    ``images`` [3, H, W] in 0..1, ``targets`` with boxes and labels. Sizes, proposals and sampling are those of training,
    BatchNorm that of test time. Nothing is computed for masks or for the losses of proposals. The model's modes stay.
    """
    rpn, heads = model.rpn, model.roi_heads
    with _modes(model, model.transform, rpn):
        batch, targets = model.transform(images, [{k: t[k] for k in ("boxes", "labels")} for t in targets])
        features = model.backbone(batch.tensors)
        maps = list(features.values())
        objectness, deltas = rpn.head(maps)
        anchors = rpn.anchor_generator(batch, maps)
        counts = [o[0].numel() for o in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        proposals_BA4 = rpn.box_coder.decode(deltas, anchors).view(len(anchors), -1, 4)
        proposals, _ = rpn.filter_proposals(proposals_BA4, objectness, batch.image_sizes, counts)
        proposals, _, labels, _ = heads.select_training_samples(proposals, targets)
        return heads.box_head(heads.box_roi_pool(features, proposals, batch.image_sizes)), torch.cat(labels)


@torch.no_grad()
def detect(model: nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
    """Detections of each image [3, H, W] in 0..1: boxes [N, 4] in pixels of the image as given, labels [N] in 1..C, scores
    [N] falling, and where there are masks masks_28 [N, 1, 28, 28], the probability over the box: see ``paste_rle``."""
    with _modes(model):
        batch, _ = model.transform(images)
        features = model.backbone(batch.tensors)
        proposals, _ = model.rpn(batch, features)
        found, _ = model.roi_heads(features, proposals, batch.image_sizes)
    for result, image, size in zip(found, images, batch.image_sizes, strict=True):
        result["boxes"] = resize_boxes(result["boxes"], size, tuple(image.shape[-2:]))
        if "masks" in result:
            result["masks_28"] = result.pop("masks")
    return found


def paste_rle(masks_28: Tensor, boxes: Tensor, height: int, width: int) -> list[dict[str, Any]]:
    """Masks [N, 1, 28, 28] in their boxes [N, 4] as COCO RLE of an image of that size, one by one: 300 masks of 4,000 x 3,000
    pixels would be 14 GB. A pixel of probability 0.5 or more is the instance's. ``counts`` is text, as in a results file."""
    from pycocotools import mask as coco_mask

    masks_28, scale = expand_masks(masks_28.detach().float().cpu(), padding=1)
    boxes = expand_boxes(boxes.detach().float().cpu(), scale).to(torch.int64)
    rles = []
    for mask_1MM, box_4 in zip(masks_28, boxes, strict=True):
        pixels_HW = paste_mask_in_image(mask_1MM[0], box_4, height, width) >= 0.5
        rle = coco_mask.encode(np.asfortranarray(pixels_HW.numpy().view(np.uint8)))
        rles.append({"size": [height, width], "counts": rle["counts"].decode("ascii")})
    return rles


def set_detections(model: nn.Module, config: DetectEvaluateConfig | DetectPredictConfig) -> nn.Module:
    """``model`` with the thresholds and limits of ``config`` for its detections."""
    heads = model.roi_heads
    heads.score_thresh, heads.nms_thresh = config.score_threshold, config.nms
    heads.detections_per_img, heads.pre_nms = config.detections, config.pre_nms
    return model


# Checkpoints


def save_detector(path: Path, model: nn.Module, header: DetectHeader) -> None:
    """Weights and header as one safetensors file. What belongs to the loss is not among them."""
    tensors = {k: t.detach().cpu().contiguous() for k, t in model.state_dict().items() if not k.startswith(_LOSS)}
    replace_file(path, save(tensors, metadata=header.to_metadata()))


def load_detector(path: Path) -> tuple[nn.Module, DetectHeader]:
    """A checkpoint's detector, in eval mode on the CPU, and its header. Raises CheckpointError (exit 4).

    A stranger's header may name a network of any size: the file's own list of tensors must bear it out before one is built.
    """
    header = read_detect_header(path)
    arch, count = header.architecture, len(header.categories)
    try:
        with safe_open(path, "pt") as file:
            there = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118  (it is no dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None
    try:
        with Weightless():
            claimed = build_detector(arch, count).state_dict()
    except ConfigError as error:
        raise CheckpointError(f"{path}: its backbone cannot be built: {error}") from None
    claimed = {k: tuple(t.shape) for k, t in claimed.items() if not k.startswith(_LOSS)}
    if there != claimed:
        raise CheckpointError(f"{path} does not hold a {arch.backbone} detector of {count:,} categories: "
                              f"{_differ(there, claimed)}")  # fmt: skip
    model = build_detector(arch, count)
    try:
        tensors = load(path.read_bytes())
        own = model.state_dict()
        if odd := next((k for k, t in tensors.items() if t.dtype != own[k].dtype), None):
            raise ValueError(f"'{odd}' is {tensors[odd].dtype}")
        # With such a number in it the heads drop every detection, and all would be nothing without a word.
        if odd := next((k for k, t in tensors.items() if not t.isfinite().all()), None):
            raise ValueError(f"numbers of '{odd}' are not finite")
        model.load_state_dict(tensors, strict=False)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None
    return model.eval(), header


def _differ(there: dict[str, tuple], claimed: dict[str, tuple]) -> str:
    for key, shape in claimed.items():
        if key not in there:
            return f"'{key}' is missing"
        if there[key] != shape:
            return f"'{key}' has shape {list(there[key])}, not {list(shape)}"
    return f"'{next(iter(there.keys() - claimed.keys()))[:80]}' is too much"
