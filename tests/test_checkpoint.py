"""Checkpoints: the header survives, and nothing damaged, foreign or hostile gets in."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from balms_cli.data.aside import replace_file
from balms_cli.engine.checkpoint import load_model
from balms_cli.engine.header import read_header
from balms_cli.errors import CheckpointError, ConfigError, DataError


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
