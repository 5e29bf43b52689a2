"""Checkpoints: the header survives, and nothing damaged, foreign or hostile gets in."""

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from balms_cli.data.aside import replace_file
from balms_cli.engine.checkpoint import load_model
from balms_cli.engine.header import read_header
from balms_cli.errors import CheckpointError, ConfigError, DataError
from balms_cli.models.backbones import build_backbone, load_weights


def edited(source, target, change):
    """A copy of a checkpoint with its header changed by ``change(header)``."""
    raw = source.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    outer = json.loads(raw[8 : 8 + length])
    header = json.loads(outer["__metadata__"]["balms"])
    change(header)
    outer["__metadata__"]["balms"] = json.dumps(header)
    text = json.dumps(outer).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return target


def test_the_header_says_what_a_later_stage_must_know(chain):
    header = read_header(chain.pretrained / "model.safetensors")
    assert header.stage == "pretrain" and header.backbone == "resnet8" and header.image_size == 16
    assert header.classes == ["cat", "dog", "emu"] and header.class_counts == [32, 12, 5]
    assert header.recipe["steps"] == 12 and header.parent_sha256 is None
    shares = torch.tensor(header.class_counts) / sum(header.class_counts)
    assert torch.tensor(header.implied_log_prior).exp().tolist() == pytest.approx(shares.tolist(), rel=1e-5)


def test_a_checkpoint_loads_as_it_was(chain):
    model, _ = load_model(chain.pretrained / "model.safetensors")
    stored = load_file(chain.pretrained / "model.safetensors")
    assert all(torch.equal(stored[k], v) for k, v in model.state_dict().items()) and not model.training
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize("damage, told", [
    (lambda b: b[:-10], "damaged"), (lambda b: b"", "damaged"), (lambda b: b[:100], "damaged"),
    (lambda b: struct.pack("<Q", 2**60) + b[8:], "longer than the file"), (lambda b: b[:8] + b"{" * 200 + b[208:], "damaged"),
    (lambda b: b"PK\x03\x04" + b, "damaged"),
])  # fmt: skip
def test_damage_is_one_line_and_exit_4(chain, tmp_path, damage, told):
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage((chain.pretrained / "model.safetensors").read_bytes()))
    with pytest.raises(CheckpointError, match=told) as error:
        load_model(file)
    assert error.value.exit_code == 4 and "\n" not in str(error.value)


@pytest.mark.parametrize("change, told", [
    (lambda h: h.pop("classes"), "classes"), (lambda h: h.update(format=99), "update balms"),
    (lambda h: h["classes"].append("fox"), "differ in length"), (lambda h: h.update(image_size=10**6), "image_size"),
    (lambda h: h.update(feature_dim=7), "do not fit"), (lambda h: h.update(classes=["a", "a", "b"]), "repeat"),
    (lambda h: h.update(head="os.system"), "head"), (lambda h: h.update(backbone="resnet20"), "does not hold a resnet20"),
    (lambda h: h.update(backbone="../evil"), "unknown"), (lambda h: h.update(class_counts=[0, 1, 2]), "no images"),
])  # fmt: skip
def test_a_wrong_header_is_refused(chain, tmp_path, change, told):
    file = edited(chain.pretrained / "model.safetensors", tmp_path / "model.safetensors", change)
    with pytest.raises((CheckpointError, ConfigError), match=told):
        load_model(file)


def test_a_foreign_safetensors_file_is_told_what_it_is_good_for(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"not written by balms.*--weights"):
        read_header(tmp_path / "x.safetensors")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    replace_file(tmp_path / "f", b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="No space left"):
        replace_file(tmp_path / "f", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_bytes() == b"old"


class TestWeights:
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

    def test_another_network_a_pickle_and_a_missing_file_are_refused(self, chain, tmp_path):
        fresh = build_backbone("resnet20", 32)
        with pytest.raises(CheckpointError, match="not of a resnet20"):
            load_weights(fresh, "resnet20", str(chain.pretrained / "model.safetensors"), offline=True)

        class Bomb:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "exploded"),))

        (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError, match="cannot be read as tensors"):
            load_weights(fresh, "resnet20", str(tmp_path / "bomb.pt"), offline=True)
        assert not (tmp_path / "exploded").exists()
        with pytest.raises(DataError, match="no such file"):
            load_weights(fresh, "resnet20", str(tmp_path / "none.pt"), offline=True)

    def test_imagenet_weights_are_not_for_cifar_networks_and_not_fetched_offline(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(ConfigError, match="no ImageNet weights for resnet8"):
            load_weights(build_backbone("resnet8", 16), "resnet8", "imagenet", offline=True)
        with pytest.raises(DataError, match=r"offline, and .*resnet18.*is not there"):
            load_weights(build_backbone("resnet18", 64), "resnet18", "imagenet", offline=True)


@pytest.mark.parametrize(
    "name, size, features", [("resnet18", 32, 512), ("mobilenet_v3_small", 32, 1024), ("vit_b_32", 64, 768)]
)
def test_torchvision_networks_become_feature_extractors(name, size, features):
    backbone = build_backbone(name, size).eval()
    assert backbone.feature_dim == features
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, size, size)).shape == (1, features)


def test_resnet32_is_the_papers_network():
    """0.46 M parameters (He et al., 2016, table 6), 64 features, option-A shortcuts without parameters."""
    network = build_backbone("resnet32", 32)
    convolutions = [p for n, p in network.named_parameters() if p.ndim == 4]
    assert len(convolutions) == 31 and sum(p.numel() for p in network.parameters()) + 650 == 464_154
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 64)


def test_unknown_backbones_get_suggestions():
    with pytest.raises(ConfigError, match="resnet18"):
        build_backbone("resnet19", 32)
    with pytest.raises(ConfigError, match="unknown"):
        build_backbone("inception_v3", 299)
