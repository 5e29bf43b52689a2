"""Checkpoints: the header survives, and nothing damaged, foreign or hostile gets in."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from balms_cli.data.aside import replace_file
from balms_cli.engine import checkpoint, header
from balms_cli.engine.checkpoint import load_model, save_model
from balms_cli.engine.header import read_header
from balms_cli.errors import CheckpointError, DataError
from balms_cli.models.classifiers import CosineHead


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
    told = read_header(chain.pretrained / "model.safetensors")
    assert told.stage == "pretrain" and told.backbone == "resnet8" and told.image_size == 16
    assert told.classes == ["cat", "dog", "emu"] and told.class_counts == [32, 12, 5]
    assert told.recipe["steps"] == 12 and told.parent_sha256 is None
    shares = torch.tensor(told.class_counts) / sum(told.class_counts)
    assert torch.tensor(told.implied_log_prior).exp().tolist() == pytest.approx(shares.tolist(), rel=1e-5)


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
    with pytest.raises(CheckpointError, match=told):
        load_model(file)


@pytest.mark.parametrize("metadata", [["balms"], "balms", 5, True, {"balms": 3}, {"balms": {"classes": []}}, {"balms": None}])
def test_metadata_that_are_not_texts_are_refused(tmp_path, metadata):
    text = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="not texts by name"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("change, told", [
    ({"std": [0.2, 0.0, 0.2]}, "std"), ({"mean": [float("nan")] * 3}, "mean"), ({"class_counts": [10**30, 1, 1]}, "_counts"),
    ({"implied_log_prior": [float("-inf"), 0, 0]}, "implied_log_prior"), ({"classes": ["a\x1b[2J", "b", "c"]}, "control char"),
    ({"format": 2, "stage": "a later one", "classes": 3}, "has format 2, this balms reads up to 1: update balms"),
])  # fmt: skip
def test_a_header_says_what_can_be_worked_with(chain, tmp_path, change, told):
    file = edited(chain.pretrained / "model.safetensors", tmp_path / "model.safetensors", lambda h: h.update(change))
    with pytest.raises(CheckpointError, match=told):
        read_header(file)


def test_a_network_that_the_file_does_not_hold_is_never_built(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "build_backbone", lambda *_: pytest.fail("built"))
    file = edited(chain.pretrained / "model.safetensors", tmp_path / "m.safetensors", lambda h: h.update(backbone="resnet152"))
    with pytest.raises(CheckpointError, match="does not hold a resnet152"):
        load_model(file)


def test_a_cosine_classifier_comes_back_as_one(chain, tmp_path):
    model, told = load_model(chain.pretrained / "model.safetensors")
    model.head = CosineHead(told.feature_dim, 3).requires_grad_(False)
    save_model(tmp_path / "m.safetensors", model, told.model_copy(update={"head": "cosine"}))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_model(tmp_path / "m.safetensors")[0](images), model(images))


def test_the_length_of_a_header_is_bounded(chain, monkeypatch):
    monkeypatch.setattr(header, "_MAX_HEADER_BYTES", 1000)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_header(chain.pretrained / "model.safetensors")


def test_a_size_that_is_only_claimed_takes_no_memory(chain, tmp_path):
    """A sparse file of 240 GB, right by its own header."""
    raw = (chain.pretrained / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    outer = {"__metadata__": json.loads(raw[8 : 8 + length])["__metadata__"]}
    outer["head.weight"] = {"dtype": "F32", "shape": [3, 2 * 10**10], "data_offsets": [0, 24 * 10**10]}
    text = json.dumps(outer).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 24 * 10**10)
    with pytest.raises(CheckpointError, match=r"do not fit|unable to mmap"):
        load_model(tmp_path / "model.safetensors")


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


def test_a_network_that_asks_for_its_version_mark_loads_as_it_was(chain, tmp_path):
    """MNASNets take no weights without it, and a safetensors file has no place for it."""
    from balms_cli.models.backbones import build_backbone
    from balms_cli.models.classifiers import Classifier, linear_head

    network = build_backbone("mnasnet0_5", 32)
    model = Classifier(network, linear_head(network.feature_dim, 3)).eval()
    told = read_header(chain.pretrained / "model.safetensors").model_copy(
        update={"backbone": "mnasnet0_5", "image_size": 32, "feature_dim": network.feature_dim})  # fmt: skip
    save_model(tmp_path / "model.safetensors", model, told)
    again, _ = load_model(tmp_path / "model.safetensors")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), again(images))
