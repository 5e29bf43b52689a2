"""The detector against torchvision's own, by hand, and as a checkpoint that may be a stranger's."""

import json
import resource
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN, MaskRCNN, maskrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_loss, paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_iou

from balms_cli.detection.header import DetectHeader, detector_file, newest_detector, read_detect_header
from balms_cli.detection.model import (
    build_detector,
    cls_score,
    detect,
    load_detector,
    overlaps,
    paste_rle,
    region_features,
    save_detector,
)
from balms_cli.engine.header import read_header
from balms_cli.errors import CheckpointError
from balms_cli.losses import SoftmaxLoss
from tests.detect_tools import tiny_architecture, tiny_detector, tiny_header, tiny_targets

FOUND = dict(box_score_thresh=1e-4, box_nms_thresh=0.5, box_detections_per_img=20)


def stock_and_ours(categories: int = 3, masks: bool = True, seed: int = 0):
    """A detector of torchvision's own parts, 32 channels wide, and ours with the same weights."""
    torch.manual_seed(seed)
    backbone = BackboneWithFPN(resnet18(), {f"layer{k + 1}": str(k) for k in range(4)}, [64, 128, 256, 512], 32)
    mask_parts = dict(mask_head=MaskRCNNHeads(32, (32,) * 4, 1), mask_predictor=MaskRCNNPredictor(32, 32, categories + 1))
    make = MaskRCNN if masks else FasterRCNN
    stock = make(backbone, box_head=TwoMLPHead(32 * 49, 32), box_predictor=FastRCNNPredictor(32, categories + 1),
                 min_size=64, max_size=96, box_batch_size_per_image=16, rpn_pre_nms_top_n_train=64,
                 rpn_post_nms_top_n_train=64, **(mask_parts if masks else {}), **FOUND)  # fmt: skip
    ours = build_detector(tiny_architecture(masks=masks), categories)
    ours.load_state_dict(stock.state_dict())  # strict: all names are torchvision's
    ours.roi_heads.detections_per_img = 20
    return stock, ours


class Largest(TorchDispatchMode):
    """The most numbers, and the most floats, that any one tensor had."""

    numel = floats = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
                self.floats = max(self.floats, x.numel() * x.is_floating_point())
        return out


def assert_same_step(stock, ours, images, targets):
    """One step of both: the losses, and the gradient of every parameter."""
    told = []
    for model in (stock, ours):
        torch.manual_seed(1)
        losses = model(images, targets)
        sum(losses.values()).backward()
        told.append(losses)
    assert told[0].keys() == told[1].keys()
    for name, loss in told[0].items():
        assert told[1][name].item() == pytest.approx(loss.item(), rel=2e-5), name
    theirs, own = (dict(m.named_parameters()) for m in (stock, ours))
    for name, parameter in theirs.items():
        scale = parameter.grad.abs().max()
        assert (own[name].grad - parameter.grad).abs().max() <= 2e-3 * scale + 1e-7, name


class TestAgainstTorchvision:
    @pytest.mark.parametrize("masks", [True, False])
    def test_training_losses_and_gradients(self, masks):
        stock, ours = stock_and_ours(masks=masks)
        images, targets = tiny_targets(2, 3)
        assert_same_step(stock, ours, images, targets)

    def test_detections(self):
        stock, ours = stock_and_ours()
        images, _ = tiny_targets(2, 3, size=48)
        with torch.no_grad():
            for model in (stock, ours):
                model.train()(*tiny_targets(2, 3))  # statistics to normalise by
            theirs, own = stock.eval()(images), ours.eval()(images)
        mine = detect(ours, images)
        for a, b, c in zip(theirs, own, mine, strict=True):
            assert len(a["boxes"]) == 20
            for name in ("boxes", "scores"):
                assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-4) and torch.equal(b[name], c[name])
            assert torch.equal(a["labels"], b["labels"]) and torch.equal(b["labels"], c["labels"])
            assert torch.allclose(a["masks"], b["masks"], atol=1e-4)
            assert torch.equal(paste_masks_in_image(c["masks_28"], c["boxes"], (48, 48)), b["masks"])

    @pytest.mark.slow
    def test_a_step_of_resnet50_at_800_pixels(self):
        torch.manual_seed(0)
        stock = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=80)
        ours = build_detector(tiny_architecture(
            backbone="resnet50", fpn_channels=256, head_features=1024, min_sizes=[800], test_size=800, max_size=1333,
            proposals=2000, rois_per_image=512), 79)  # fmt: skip
        ours.load_state_dict(stock.state_dict())
        images, targets = tiny_targets(1, 79, size=200)
        assert_same_step(stock, ours, images, targets)

    def test_region_features_are_those_of_a_training_step(self):
        """All proposals are taken, so nothing is drawn: torchvision in training mode, with the statistics of test time."""
        _, ours = stock_and_ours()
        stock, _ = stock_and_ours()
        for model in (stock, ours):
            model.roi_heads.fg_bg_sampler.batch_size_per_image, model.roi_heads.fg_bg_sampler.positive_fraction = 1000, 1.0
        images, targets = tiny_targets(2, 3)
        stock.train()
        for module in stock.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        seen, drawn = [], stock.roi_heads.select_training_samples
        stock.roi_heads.box_head.register_forward_hook(lambda module, given, out: seen.append(out.detach()))
        stock.roi_heads.select_training_samples = lambda *given: seen.append(out := drawn(*given)) or out
        with torch.no_grad():
            stock(images, targets)
        samples, features_RD = seen
        ours_RD, labels_R = region_features(ours, images, [{k: t[k] for k in ("boxes", "labels")} for t in targets])
        assert torch.equal(labels_R, torch.cat(samples[2])) and len(labels_R) > 60 and (labels_R > 0).any()
        assert torch.allclose(ours_RD, features_RD, atol=1e-4) and not ours_RD.requires_grad


class TestCrowds:
    """Images with many objects: the same numbers as torchvision's, of which only some are floats at a time."""

    def crowded(self, count: int, size: int = 64):
        images, targets = tiny_targets(1, 3, size=size)
        generator = torch.Generator().manual_seed(1)
        corner_N2 = torch.rand(count, 2, generator=generator) * 0.6 * size
        boxes_N4 = torch.cat([corner_N2, corner_N2 + 3 + torch.rand(count, 2, generator=generator) * 0.3 * size], 1)
        masks = (torch.rand(count, size, size, generator=generator) < 0.5).byte()
        targets[0] = {"boxes": boxes_N4, "labels": 1 + torch.arange(count) % 3, "masks": masks}
        return images, targets

    @pytest.mark.parametrize("count", [1, 32, 33, 70])
    def test_a_step_is_torchvisions(self, count):
        stock, ours = stock_and_ours()
        for model in (stock, ours):  # every region is taken, so that masks of every chunk are asked for
            model.roi_heads.fg_bg_sampler.batch_size_per_image, model.roi_heads.fg_bg_sampler.positive_fraction = 1000, 1.0
        assert_same_step(stock, ours, *self.crowded(count))

    def test_the_loss_of_masks_is_torchvisions_bit_for_bit_and_nothing_where_no_region_has_an_object(self):
        heads, (_, targets) = tiny_detector(3).roi_heads, self.crowded(70)
        generator = torch.Generator().manual_seed(2)
        matched = [torch.randint(70, (50,), generator=generator), torch.randint(2, (9,), generator=generator), torch.arange(0)]
        corner = [torch.rand(len(m), 2, generator=generator) * 40 for m in matched]
        boxes = [torch.cat([c, c + 1 + torch.rand(len(c), 2, generator=generator) * 20], 1) for c in corner]
        masks = [targets[0]["masks"], targets[0]["masks"][:2], targets[0]["masks"][:1]]
        logits = torch.randn(59, 1, 28, 28, generator=generator, requires_grad=True)
        ours = heads._mask_loss(logits, masks, boxes, matched)
        theirs = maskrcnn_loss(logits, boxes, masks, [torch.zeros(len(m), dtype=torch.int64) for m in masks], matched)
        assert torch.equal(ours, theirs)
        assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))
        none = logits[:0]
        assert heads._mask_loss(none, masks[2:], boxes[2:], matched[2:]).item() == 0

    def test_overlaps_are_torchvisions(self):
        generator = torch.Generator().manual_seed(0)
        for count in (0, 1, 16, 17, 40):
            boxes, anchors = (torch.rand(n, 4, generator=generator) * 50 for n in (count, 30))
            boxes, anchors = (torch.cat([b[:, :2], b[:, :2] + b[:, 2:]], 1) for b in (boxes, anchors))
            assert torch.equal(overlaps(boxes, anchors), box_iou(boxes, anchors))
        assert tiny_detector(3).rpn.box_similarity is overlaps

    @pytest.mark.parametrize("size", [(48, 64), (63, 37), (9, 90), (100, 100)])
    def test_masks_are_scaled_as_torchvision_does_without_a_float(self, size):
        ours = tiny_detector(3, min_sizes=[75], max_size=110).transform
        stock = GeneralizedRCNNTransform(75, 110, [0.5] * 3, [0.5] * 3)
        masks = (torch.rand(5, *size, generator=torch.Generator().manual_seed(0)) < 0.5).byte()
        target = {"boxes": torch.tensor([[1.0, 2, 5, 6]] * 5), "masks": masks}
        for given in (target, target | {"masks": masks.bool()}, {"boxes": target["boxes"]}):
            image, got = ours.resize(torch.rand(3, *size), dict(given))
            _, expected = stock.resize(torch.rand(3, *size), dict(given))
            assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in got)
            assert "masks" not in got or (got["masks"].dtype == torch.uint8 and got["masks"].shape[1:] == image.shape[1:])
        assert ours.resize(torch.rand(3, *size))[1] is None

    def test_a_crowd_takes_little_memory_beyond_its_masks(self):
        """At 160 px, 400 objects: 10 MB of masks, of which torchvision makes 41 MB of floats; its overlaps with anchors are 10
        MB, and the corners that it has for them 20 MB at a time."""
        model, given = tiny_detector(3, min_sizes=[160], max_size=160), self.crowded(400, 160)
        with Largest() as seen:
            sum(model(*given).values()).backward()
        anchors = 3 * (40 * 40 + 20 * 20 + 10 * 10 + 5 * 5 + 3 * 3)
        assert seen.numel == 400 * 160 * 160 and 400 * anchors <= seen.floats < 2 * 400 * anchors


class TestRegions:
    def test_modes_and_statistics_come_back(self):
        model = tiny_detector(3)
        model.roi_heads.eval()
        modes, state = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
        images, targets = tiny_targets(2, 3)
        region_features(model, images, targets)
        detect(model, images)
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    def test_modes_come_back_after_an_error(self):
        model = tiny_detector(3)
        with pytest.raises(KeyError):
            region_features(model, *([x[:1] for x in (tiny_targets(1, 3)[0], [{"boxes": torch.zeros(0, 4)}])]))
        assert all(m.training for m in model.modules())

    def test_draws_belong_to_the_seed(self):
        model = tiny_detector(3, min_sizes=[48, 64])
        images, targets = tiny_targets(3, 3)

        def look(seed):
            torch.manual_seed(seed)
            return region_features(model, images, targets)[0]

        assert torch.equal(look(1), look(1)) and not torch.equal(look(1), look(2))

    def test_sizes_are_drawn_as_in_training_and_pooling_does_not_guess_the_strides(self):
        model, seen = tiny_detector(3, min_sizes=[33, 96]), set()
        model.backbone.register_forward_hook(lambda module, given, out: seen.add(given[0].shape[-1]))
        images, targets = tiny_targets(1, 3)
        for seed in range(12):
            torch.manual_seed(seed)
            region_features(model, images, targets)
        assert seen == {64, 96}  # 33 pixels are padded to 64, which looks like half of the stride
        assert model.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]

    def test_scales_of_training_and_of_test(self):
        model = tiny_detector(3, min_sizes=[32, 40, 48], test_size=64, max_size=200)
        images, _ = tiny_targets(40, 3, size=50)
        assert {tuple(s) for s in model.transform(images)[0].image_sizes} == {(32, 32), (40, 40), (48, 48)}
        model.transform.min_size = (56,)
        assert set(model.transform(images)[0].image_sizes) == {(56, 56)}
        assert set(model.eval().transform(images)[0].image_sizes) == {(64, 64)}

    def test_a_sliver_of_an_image(self):
        model = tiny_detector(3)
        (found,) = detect(model, [torch.rand(3, 1, 400)])
        assert (found["boxes"][:, 3] <= 1).all() and found["boxes"][:, 2].max() <= 400.01

    def test_masks_are_not_needed(self):
        images, targets = tiny_targets(2, 3)
        for target in targets:
            del target["masks"]
        features_RD, labels_R = region_features(tiny_detector(3), images, targets)
        assert features_RD.shape == (len(labels_R), 32)


class TestHeads:
    def test_sigmoid_starts_as_sure_of_nothing(self):
        model = tiny_detector(5, family="sigmoid")
        layer = cls_score(model)
        assert layer.weight.shape == (5, 32)
        assert torch.allclose(layer.bias.sigmoid(), torch.full((5,), 0.001))
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.2)
        assert cls_score(tiny_detector(5)).weight.shape == (6, 32)

    def test_sigmoid_loss_is_summed_over_categories_and_divided_by_regions(self):
        model = tiny_detector(4, family="sigmoid")
        logits_RC, labels_R = torch.randn(6, 4), torch.tensor([0, 2, 4, 0, 1, 3])
        target_RC = torch.zeros(6, 4)
        for row, label in enumerate(labels_R.tolist()):
            if label:
                target_RC[row, label - 1] = 1
        p_RC = logits_RC.double().sigmoid()
        expected = -(target_RC * p_RC.log() + (1 - target_RC) * (1 - p_RC).log()).sum() / 6
        assert model.roi_heads.cls_loss(logits_RC, labels_R).item() == pytest.approx(expected.item(), rel=1e-5)

    def test_the_loss_given_is_the_one_used(self):
        class Twice(SoftmaxLoss):
            def forward(self, logits, labels):
                return 2 * super().forward(logits, labels)

        images, targets = tiny_targets(2, 3)
        told = []
        for loss in (None, Twice()):
            model = tiny_detector(3, cls_loss=loss)
            torch.manual_seed(1)
            told.append(model(images, targets))
        assert told[1]["loss_classifier"].item() == pytest.approx(2 * told[0]["loss_classifier"].item(), rel=1e-5)
        assert told[1]["loss_box_reg"].item() == pytest.approx(told[0]["loss_box_reg"].item(), rel=1e-5)

    @pytest.mark.parametrize("agnostic", [False, True])
    @pytest.mark.parametrize("family", ["softmax", "sigmoid"])
    @pytest.mark.parametrize("pre_nms", [12, 10_000])
    def test_detections_by_hand(self, family, agnostic, pre_nms):
        heads = tiny_detector(3, family=family, class_agnostic=agnostic).roi_heads
        heads.pre_nms, heads.score_thresh, heads.detections_per_img, heads.nms_thresh = pre_nms, 0.2, 9, 0.3
        rng = np.random.default_rng(0)
        corner_R2 = rng.uniform(0, 50, (15, 2))
        boxes_R4 = np.concatenate([corner_R2, corner_R2 + rng.uniform(15, 30, (15, 2))], 1)
        logits = rng.normal(size=(15, 3 + (family == "softmax")))
        deltas = rng.normal(size=(15, 4 * (1 if agnostic else 4)))
        found = heads.postprocess_detections(*(torch.from_numpy(x).float() for x in (logits, deltas)),
                                             [torch.from_numpy(boxes_R4).float()], [(70, 60)])  # fmt: skip

        if family == "softmax":
            e = np.exp(logits)
            scores_RC = (e / e.sum(1, keepdims=True))[:, 1:]
        else:
            scores_RC = 1 / (1 + np.exp(-logits))
        candidates = []
        for r in range(15):
            x1, y1, x2, y2 = boxes_R4[r]
            w, h, cx, cy = x2 - x1, y2 - y1, (x1 + x2) / 2, (y1 + y2) / 2
            for c in range(3):
                if scores_RC[r, c] > 0.2:
                    dx, dy, dw, dh = deltas[r].reshape(-1, 4)[0 if agnostic else c + 1] / (10, 10, 5, 5)
                    bw, bh, bx, by = w * np.exp(dw), h * np.exp(dh), cx + dx * w, cy + dy * h
                    box = np.clip([bx - bw / 2, by - bh / 2, bx + bw / 2, by + bh / 2], 0, [60, 70, 60, 70])
                    candidates.append((scores_RC[r, c], c + 1, box))
        kept = []
        for score, label, box in sorted(candidates, key=lambda x: -x[0])[:pre_nms]:
            if all(label != other or _iou(box, that) <= 0.3 for _, other, that in kept):
                kept.append((score, label, box))
        kept = kept[:9]
        assert found[2][0].tolist() == [label for _, label, _ in kept]
        assert np.allclose(found[1][0].numpy(), [score for score, _, _ in kept], atol=1e-5)
        assert np.allclose(found[0][0].numpy(), [box for _, _, box in kept], atol=1e-3)

    def test_categories_far_along_the_list_keep_their_pixels(self):
        """Moved apart by category in float32, boxes of a category far along the list would lie on every second pixel."""
        heads = tiny_detector(3, family="sigmoid", class_agnostic=True).roi_heads
        heads.nms_thresh = 0.5
        # Overlap 9.1 / 18.4, under a half: kept both. Rounded to even pixels it would be 10 / 18.
        boxes = torch.tensor([[4000.0, 0, 4008, 9.1], [4000.0, 0, 4008, 18.4]])
        logits = torch.full((2, 5000), -20.0)
        logits[:, 4999] = torch.tensor([3.0, 2.0])
        found, _, labels = heads.postprocess_detections(logits, torch.zeros(2, 4), [boxes], [(4096, 4096)])
        assert labels[0].tolist() == [5000, 5000] and len(found[0]) == 2

    def test_no_mask_of_another_category_is_computed(self):
        """1,203 categories, 300 detections: 1.1 GB if all masks were; and 64 regions in the mask head at a time."""
        model = tiny_detector(1203, test_size=96)
        images, targets = tiny_targets(2, 1203, size=96)

        with Largest() as at_test:
            found = detect(model, images)
        with Largest() as in_training:
            sum(model(images, targets).values()).backward()
        assert min(len(f["boxes"]) for f in found) == 300 and found[0]["masks_28"].shape == (300, 1, 28, 28)
        assert at_test.numel < 5_000_000 and in_training.numel < 5_000_000
        assert 16 * 1204 * 28 * 28 > 10_000_000

    def test_nothing_detected(self):
        model = tiny_detector(3)
        images, _ = tiny_targets(2, 3)
        model.roi_heads.score_thresh = 1.0
        for found in detect(model, images):
            assert found["boxes"].shape == (0, 4) and found["masks_28"].shape == (0, 1, 28, 28)
            assert paste_rle(found["masks_28"], found["boxes"], 64, 64) == []

    def test_weights_that_are_not_numbers_detect_nothing(self):
        model = tiny_detector(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        assert all(len(found["boxes"]) == 0 for found in detect(model, tiny_targets(2, 3)[0]))

    def test_masks_are_pasted_as_torchvision_does(self):
        from pycocotools import mask as coco_mask

        masks = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round() * 0.8
        boxes = torch.tensor([[1.2, 3.4, 40.1, 50.7], [0, 0, 80, 60], [-5, -5, 20, 20], [70.4, 50, 79.9, 60], [9, 9, 9.5, 9.5]])
        rles = paste_rle(masks, boxes, 60, 80)
        pasted = paste_masks_in_image(masks, boxes, (60, 80))[:, 0] >= 0.5
        for rle, pixels in zip(rles, pasted, strict=True):
            assert rle["size"] == [60, 80] and isinstance(rle["counts"], str)
            assert np.array_equal(coco_mask.decode(rle), pixels.numpy())
        json.dumps(rles)


class TestLowPrecision:
    @pytest.mark.parametrize("over", [{}, {"family": "sigmoid", "class_agnostic": True}])
    def test_bfloat16_keeps_pixels_and_trains(self, over):
        model = tiny_detector(3, rois_per_image=1000, foreground_share=1.0, **over)  # all regions: none is drawn
        images, targets = tiny_targets(2, 3)
        torch.manual_seed(1)
        expected = model(images, targets)
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(1)
            losses = model(images, targets)
            sum(losses.values()).backward()
            features_RD, _ = region_features(model, images, targets)
            found = detect(model, images)
        for name, loss in losses.items():
            assert loss.dtype == torch.float32
            if name != "loss_box_reg":  # that of regions, some of which now match another box
                assert loss.item() == pytest.approx(expected[name].item(), rel=0.15), name
        assert features_RD.dtype == torch.bfloat16  # of the box head; the classifier itself is in float32
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        boxes = torch.cat([f["boxes"] for f in found])
        assert boxes.dtype == torch.float32 and not torch.equal(boxes, boxes.bfloat16().float())

    def test_anchors_and_proposals_are_float32(self):
        model = tiny_detector(3, max_size=384, min_sizes=[384], test_size=384, backbone="resnet10").eval()
        images, seen = [torch.rand(3, 384, 384)], []
        model.rpn.anchor_generator.register_forward_hook(lambda module, given, out: seen.append(out[0]))
        with torch.no_grad():
            for enabled in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    batch, _ = model.transform(images)
                    (proposals,), _ = model.rpn(batch, model.backbone(batch.tensors))
        assert torch.equal(*seen) and proposals.dtype == torch.float32
        assert not torch.equal(seen[1], seen[1].bfloat16().float())  # what bfloat16 would have lost


class TestCheckpoint:
    @pytest.mark.parametrize("over", [{"family": "sigmoid"}, {"masks": False, "class_agnostic": True}, *(
        pytest.param(over, marks=pytest.mark.slow) for over in (
            {}, {"norm": "frozen"}, {"backbone": "mobilenet_v3_small"}, {"backbone": "regnet_y_400mf"}))])  # fmt: skip
    def test_comes_back(self, tmp_path, over):
        path, model, header = tmp_path / "model.safetensors", tiny_detector(3, **over), tiny_header(3, **over)
        images, targets = tiny_targets(2, 3)
        model(images, targets)
        save_detector(path, model.to(memory_format=torch.channels_last), header)
        again, read = load_detector(path)
        assert read == header and not any(m.training for m in again.modules())
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
        for a, b in zip(detect(model, images), detect(again, images), strict=True):
            assert torch.allclose(a["boxes"], b["boxes"], atol=1e-3) and torch.equal(a["labels"], b["labels"])

    def test_the_loss_leaves_no_trace(self, tmp_path):
        class Counting(SoftmaxLoss):
            def __init__(self):
                super().__init__()
                self.register_buffer("seen", torch.zeros(3))

        path = tmp_path / "model.safetensors"
        save_detector(path, tiny_detector(3, cls_loss=Counting()), tiny_header(3))
        assert not any("cls_loss" in name for name in load_file(path))
        load_detector(path)

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, tmp_path_factory):
        path = tmp_path_factory.mktemp("detector") / "model.safetensors"
        save_detector(path, tiny_detector(3, backbone="resnet10"), tiny_header(3, backbone="resnet10"))
        return path

    @pytest.mark.parametrize(("change", "told"), [
        (lambda t: t.pop("rpn.head.cls_logits.weight"), "'rpn.head.cls_logits.weight' is missing"),
        (lambda t: t.update(more=torch.zeros(2)), "'more' is too much"),
        (lambda t: t.update({"roi_heads.box_predictor.cls_score.bias": torch.zeros(5)}), r"has shape \[5\], not \[4\]"),
        (lambda t: t.update({"roi_heads.box_predictor.cls_score.bias": torch.zeros(4).double()}), "is torch.float64"),
        (lambda t: t.update({"roi_heads.box_predictor.cls_score.bias": torch.zeros(4, dtype=torch.complex64)}), "complex64"),
        (lambda t: t["rpn.head.cls_logits.bias"].fill_(float("inf")), "numbers of 'rpn.head.cls_logits.bias' are not finite"),
    ], ids=["missing", "more", "shape", "float64", "complex", "infinite"])  # fmt: skip
    def test_tensors_that_do_not_fit(self, made, tmp_path, change, told):
        tensors = load_file(made)
        change(tensors)
        path = tmp_path / "model.safetensors"
        save_file(tensors, path, metadata=read_detect_header(made).to_metadata())
        with pytest.raises(CheckpointError, match=told):
            load_detector(path)

    @pytest.mark.parametrize(("change", "told"), [
        ({"backbone": "resnet18"}, "is missing"), ({"backbone": "regnet_y_128gf"}, "does not hold"),
        ({"backbone": "vit_h_14"}, "cannot be built: backbone 'vit_h_14' has no feature maps"),
        ({"backbone": "timm:hf-hub:a/b"}, "cannot be built"), ({"backbone": "timm:convnext_xxlarge"}, "does not hold"),
        ({"backbone": "../resnet10"}, "cannot be built"), ({"head_features": 4096}, "has shape"),
        ({"fpn_channels": 1024}, "has shape"), ({"masks": False}, "too much"), ({"family": "sigmoid"}, "has shape"),
        ({"class_agnostic": True}, "has shape"), ({"norm": "frozen"}, "num_batches_tracked' is too much"),
    ])  # fmt: skip
    def test_a_header_that_claims_another_network(self, made, tmp_path, change, told):
        header = read_detect_header(made)
        claimed = header.model_copy(update={"architecture": header.architecture.model_copy(update=change)})
        path = tmp_path / "model.safetensors"
        path.write_bytes(save(load_file(made), metadata=claimed.to_metadata()))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CheckpointError, match=told):
            load_detector(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB; regnet_y_128gf alone: 2.6 GB

    def test_a_header_that_claims_a_hundred_thousand_categories(self, made, tmp_path):
        one = json.dumps({"id": 0, "name": "x", "image_count": 1, "instance_count": 1, "frequency": "r"})
        many = "[" + ",".join(one.replace("0", str(i)).replace("x", f"x{i}") for i in range(100_000)) + "]"
        document = json.loads(read_detect_header(made).model_dump_json()) | {"categories": "HERE"}
        text = json.dumps(document).replace('"HERE"', many)
        path = tmp_path / "model.safetensors"
        path.write_bytes(save(load_file(made), metadata={"balms-detect": text}))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CheckpointError, match=r"of 100,000 categories: .* has shape"):
            load_detector(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000

    def test_values_that_lie_outside_the_header_never_pass(self, made):
        document = json.loads(read_detect_header(made).model_dump_json())
        for change in ({"min_sizes": [10**9]}, {"min_sizes": []}, {"std": [0, 1, 1]}, {"mean": [float("nan")] * 3},
                       {"test_size": 10**7}, {"proposals": 0}, {"foreground_share": 2}, {"norm": "other"},
                       {"rois_per_image": 10**400}, {"proposals": 10**30}):  # fmt: skip
            with pytest.raises(ValueError):
                DetectHeader.model_validate_json(json.dumps(document | {"architecture": document["architecture"] | change}))
        one, two, *rest = document["categories"]
        for change in ({"format": 0}, {"num_images": 10**30}, {"rates": [float("nan")]}, {"categories": [one, two, one]},
                       {"categories": [one, two | {"name": one["name"]}, *rest]},
                       {"categories": [one | {"image_count": 10**400}, two]}):  # fmt: skip
            with pytest.raises(ValueError):
                DetectHeader.model_validate_json(json.dumps(document | change))

    def test_a_newer_format_is_named_whatever_else_it_says(self, made, tmp_path):
        document = json.loads(read_detect_header(made).model_dump_json()) | {"format": 2, "categories": "elsewhere"}
        path = tmp_path / "model.safetensors"
        path.write_bytes(save(load_file(made), metadata={"balms-detect": json.dumps(document)}))
        with pytest.raises(CheckpointError, match="has format 2, this balms reads up to 1: update balms"):
            read_detect_header(path)

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04", struct.pack("<Q", 2**60) + b"{}", b"\0" * 100,
                                         struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 60_000) + b"[" * 60_000],
                             ids=["empty", "zip", "long", "zeros", "list", "deep"])  # fmt: skip
    def test_damaged_files(self, tmp_path, content):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            load_detector(path)

    def test_truncated(self, made, tmp_path):
        path = tmp_path / "model.safetensors"
        path.write_bytes(made.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match="damaged"):
            load_detector(path)

    def test_metadata_that_is_no_text(self, made, tmp_path):
        path = tmp_path / "model.safetensors"
        header = json.dumps({"__metadata__": {"balms-detect": 5}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(CheckpointError, match="texts by name"):
            read_detect_header(path)


class TestHeader:
    def test_each_kind_of_checkpoint_says_what_it_is(self, tmp_path, chain):
        path = tmp_path / "model.safetensors"
        save_detector(path, tiny_detector(2, backbone="resnet10"), tiny_header(2, backbone="resnet10"))
        with pytest.raises(CheckpointError, match="is a detector, not a classifier: use balms detect"):
            read_header(path)
        with pytest.raises(CheckpointError, match=r"is a classifier, not a detector; .* balms detect train"):
            load_detector(chain.pretrained / "model.safetensors")
        save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match="was not written by balms detect"):
            read_detect_header(tmp_path / "other.safetensors")

    def test_a_detector_given_to_the_classifiers_commands(self, balms, tmp_path):
        path = tmp_path / "model.safetensors"
        save_detector(path, tiny_detector(2, backbone="resnet10"), tiny_header(2, backbone="resnet10"))
        for command in ("evaluate", "retrain", "export"):
            done = balms(command, path)
            assert done.code == 4 and "balms detect" in done.err and len(done.err.strip().splitlines()) <= 2, done.err

    def test_newest(self, tmp_path):
        assert newest_detector(tmp_path, ("detect-train",)) is None
        model = tiny_detector(2, backbone="resnet10", masks=False)
        for name, created, stage in (("a", "2026-01-02", "detect-train"), ("b", "2026-01-01", "detect-train"),
                                     ("c", "2026-01-03", "detect-finetune")):  # fmt: skip
            header = tiny_header(2, backbone="resnet10", masks=False)
            (tmp_path / "runs" / name).mkdir(parents=True)
            save_detector(tmp_path / "runs" / name / "model.safetensors", model,
                          header.model_copy(update={"created": created, "stage": stage}))  # fmt: skip
        (tmp_path / "runs" / "d").mkdir()
        (tmp_path / "runs" / "d" / "model.safetensors").write_bytes(b"nothing")
        assert newest_detector(tmp_path, ("detect-train",)).name == "a"
        assert newest_detector(tmp_path, ("detect-train", "detect-finetune")).name == "c"
        assert detector_file(tmp_path / "runs" / "a") == tmp_path / "runs" / "a" / "model.safetensors"
        (tmp_path / "half").mkdir()
        (tmp_path / "half" / "config.toml").write_text("")
        with pytest.raises(CheckpointError, match="not complete"):
            detector_file(tmp_path / "half")


def _iou(a, b) -> float:
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return w * h / (sum(areas) - w * h)
