"""Stage 2 on real features: what it must leave alone, what it may reuse, and what its header claims."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from balms_cli.config import MakeLTConfig, resolve
from balms_cli.data.features import FeatureBank, build_bank, extract_all, online_features, plan_views
from balms_cli.data.feed import InMemory
from balms_cli.data.index import Split, index_sha256
from balms_cli.data.manifest import Manifest
from balms_cli.data.transforms import augment
from balms_cli.engine.checkpoint import load_model
from balms_cli.engine.distributed import World
from balms_cli.engine.header import read_header
from balms_cli.engine.run_dir import RunDir
from balms_cli.reporter import Reporter
from balms_cli.stages.features import bank_reader
from balms_cli.stages.rates import rates_document, read_rates

from .conftest import SMALL, invoke

FEW = ["--steps", "30", "--set", "meta_batch_size=16", "--batch-size", "16", "--set", "class_rows=8", "--views", "2"]


def run(*arguments) -> Path:
    done = invoke(*arguments, "--quiet")
    assert done.code == 0, done.err
    return Path(done.out.strip())


@pytest.mark.parametrize("mode", ["bank", "online"])
def test_the_feature_extractor_is_bit_identical_afterwards(chain, tmp_path, mode):
    """Running statistics of BatchNorm included; only the head is new."""
    before = load_file(chain.pretrained / "model.safetensors")
    after = load_file(run("retrain", chain.pretrained, *FEW, "--meta-sampler", "--features", mode, "--out", tmp_path / "r")
                      / "model.safetensors")  # fmt: skip
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != name.startswith("head.")


def test_bank_rows_are_the_features_of_the_views_that_were_planned(chain):
    model, header = load_model(chain.pretrained / "model.safetensors")
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    views = torch.tensor([1, 3, 2, 1, 4])
    mean, std = torch.tensor(header.mean), torch.tensor(header.std)
    images = InMemory(pixels, torch.zeros(5), torch.device("cpu"))
    bank = build_bank(model.backbone, images, views, mean, std, ops=["crop", "flip"], seed=3, batch_size=4, reporter=Reporter())
    other = build_bank(
        model.backbone, images, views, mean, std, ops=["crop", "flip"], seed=3, batch_size=11, reporter=Reporter()
    )
    assert bank.features.shape == (11, 64) and torch.allclose(bank.features, other.features, atol=1e-5)
    assert bank.starts.tolist() == [0, 1, 4, 6, 7]
    assert not torch.allclose(bank.features[1], bank.features[2])  # two views of image 1
    plain = build_bank(model.backbone, images, torch.ones(5, dtype=torch.int64), mean, std, ops=[], seed=3, batch_size=5,
                       reporter=Reporter())  # fmt: skip
    with torch.no_grad():
        direct = model.backbone(augment(pixels, torch.arange(5), mean, std, seed=0, stream=0, ops=[]))
    assert torch.allclose(plain.features, direct, atol=1e-6)


def test_rows_are_drawn_evenly_over_the_views_of_an_image():
    bank = FeatureBank(torch.arange(7.0)[:, None], torch.tensor([0, 2]), torch.tensor([2, 5]))
    rows = bank.rows(torch.tensor([0] * 2000 + [1] * 5000), torch.Generator().manual_seed(0)).flatten()
    assert torch.bincount(rows.long()).tolist() == pytest.approx([1000] * 7, rel=0.12)


def test_views_are_drawn_anew_for_every_step_and_purpose():
    bank = FeatureBank(torch.arange(1000.0)[:, None], torch.tensor([0]), torch.tensor([1000]))
    read = bank_reader(bank, seed=1, device=torch.device("cpu"))
    images = torch.zeros(50, dtype=torch.int64)
    first = read(images, 5, 8)
    assert torch.equal(read(images, 5, 8), first)
    for other in (read(images, 6, 8), read(images, 5, 9), bank_reader(bank, 2, torch.device("cpu"))(images, 5, 8)):
        assert not torch.equal(other, first)


def test_online_views_are_new_in_every_step_and_apart_for_each_purpose():
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images, mean, std = InMemory(pixels, torch.zeros(8), torch.device("cpu")), torch.zeros(3), torch.ones(3)

    def views(step, stream, seed=0):
        read = online_features(lambda x: x.flatten(1), images, mean, std, ops=["crop", "flip"], seed=seed)
        return read(torch.arange(8), step, stream)

    first = views(3, 8)
    assert torch.equal(views(3, 8), first) and first.shape == (8, 768)
    assert all((other != first).any(1).float().mean() > 0.8 for other in (views(4, 8), views(3, 9), views(3, 8, seed=1)))


def test_views_of_different_images_are_different_views():
    """Of the same picture twice, and of images beside each other: what keys a view names the image and the view."""
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(6, -1, -1, -1)
    views, images = torch.full((6,), 8), InMemory(pixels, torch.zeros(6), torch.device("cpu"))
    bank = build_bank(lambda x: x.flatten(1), images, views, torch.zeros(3), torch.ones(3), ops=["crop", "flip", "cutout"],
                      seed=0, batch_size=5, reporter=Reporter())  # fmt: skip
    assert len(bank.features.unique(dim=0)) > 44  # of 48; with keys that run into each other 13 at most


def test_rare_classes_get_more_views():
    labels = torch.tensor([0] * 100 + [1] * 10 + [2])
    views = plan_views(labels, torch.tensor([100, 10, 1]), views=3, class_rows=50)
    assert views[0] == 3 and views[100] == 5 and views[110] == 50
    assert plan_views(labels, torch.tensor([100, 10, 1]), views=3, class_rows=51)[100] == 6  # 5 would be a row too few
    assert plan_views(labels, torch.tensor([100, 10, 1]), views=3, class_rows=500).max() == 64  # no image more than this


def test_the_bank_is_computed_once_for_all_classifiers_of_a_checkpoint(chain, tmp_path, monkeypatch):
    from balms_cli.stages import features

    run("retrain", chain.pretrained, *FEW, "--set", "views=3", "--out", tmp_path / "a")
    monkeypatch.setattr(features, "write_bank", lambda *a, **k: pytest.fail("computed again"))
    run("retrain", chain.pretrained, *FEW, "--set", "views=3", "--sampler", "class", "--seed", "2", "--out", tmp_path / "b")
    with pytest.raises(pytest.fail.Exception):
        invoke("retrain", chain.pretrained, *FEW, "--set", "views=5", "--out", tmp_path / "c")


def test_a_damaged_bank_is_computed_again(chain, tmp_path):
    first = run("retrain", chain.pretrained, *FEW, "--set", "views=4", "--out", tmp_path / "a")
    for kept in (chain.pretrained / "features").iterdir():
        kept.write_bytes(b"rubbish")
    second = run("retrain", chain.pretrained, *FEW, "--set", "views=4", "--out", tmp_path / "b")
    assert all(
        torch.equal(v, load_file(second / "model.safetensors")[k]) for k, v in load_file(first / "model.safetensors").items()
    )


@pytest.mark.parametrize("learner", ["--meta-sampler", "--meta-reweigher"])
@pytest.mark.parametrize("loss", ["softmax", "balanced", "balanced-sigmoid"])
def test_three_hypergradients_lead_to_the_same_rates(chain, tmp_path, learner, loss):
    rates = []
    for route in ("closed-form", "jvp", "higher"):
        folder = run(
            "retrain", chain.pretrained, *FEW, learner, "--loss", loss, "--hypergradient", route, "--out", tmp_path / route
        )
        rates.append(list(json.loads((folder / "rates.json").read_text())["rates"].values()))
    assert rates[1] == pytest.approx(rates[0], abs=2e-3) and rates[2] == pytest.approx(rates[0], abs=2e-3)
    assert max(abs(r - 0.5) for r in rates[0]) > 0.01  # they moved


@pytest.mark.parametrize("estimator", ["class", "image", "expected"])
def test_every_estimator_trains_and_is_named_in_the_result(chain, tmp_path, estimator):
    folder = run("retrain", chain.pretrained, *FEW, "--meta-sampler", "--meta-estimator", estimator, "--out", tmp_path / "r")
    assert read_header(folder / "model.safetensors").sampler == f"meta ({estimator})"


def log_share(values):
    values = torch.tensor(values, dtype=torch.float64)
    return (values / values.sum()).log().tolist()


@pytest.mark.parametrize("options, prior", [
    (["--loss", "softmax"], [32, 12, 5]), (["--loss", "balanced"], [1, 1, 1]),
    (["--loss", "softmax", "--sampler", "class"], [1, 1, 1]),
    (["--loss", "balanced", "--sampler", "class"], [1 / 32, 1 / 12, 1 / 5]),
    (["--loss", "balanced", "--loss-exponent", "0"], [32, 12, 5]),
])  # fmt: skip
def test_the_header_states_the_prior_that_raw_logits_mean(chain, tmp_path, options, prior):
    folder = run("retrain", chain.pretrained, *FEW, *options, "--out", tmp_path / "r")
    assert read_header(folder / "model.safetensors").implied_log_prior == pytest.approx(log_share(prior), abs=1e-6)


@pytest.mark.parametrize("loss, with_counts", [("softmax", True), ("balanced", False)])
@pytest.mark.parametrize("learner", ["--meta-reweigher", "--meta-sampler"])
def test_the_prior_of_a_classifier_follows_what_was_learned_beside_it(chain, tmp_path, learner, loss, with_counts):
    folder = run("retrain", chain.pretrained, *FEW, learner, "--loss", loss, "--out", tmp_path / "r")
    learned = list(json.loads((folder / "rates.json").read_text())["rates"].values())
    expected = [n * r for n, r in zip([32, 12, 5], learned, strict=True)] if with_counts else learned
    assert read_header(folder / "model.safetensors").implied_log_prior == pytest.approx(log_share(expected), abs=1e-4)


def test_a_held_out_meta_set_is_used_when_asked_for(chain, tmp_path):
    made = invoke("make-lt", chain.photos, "--imbalance", "4", "--meta-per-class", "2", "--workspace", tmp_path, "--json", "-q")
    assert json.loads(made.out)["splits"]["meta"] == 6
    pretrained = run("pretrain", json.loads(made.out)["manifest"], *SMALL, "--workspace", tmp_path)
    folders = [
        run("retrain", pretrained, *FEW, "--meta-sampler", "--meta-set", kind, "--workspace", tmp_path)
        for kind in ("train", "meta")
    ]
    assert (folders[0] / "rates.json").read_text() != (folders[1] / "rates.json").read_text()


@pytest.mark.parametrize("options", [["retrain", "--meta-sampler"], ["retrain", "--meta-sampler", "--features", "online"],
                                     ["meta-sample"], ["pretrain", "--reweight", "l2rw"]])  # fmt: skip
def test_a_meta_set_that_lacks_a_class_is_refused_in_a_line(chain, tmp_path, options):
    """Its batches are balanced over all classes: there is nothing to draw for that one."""
    made = invoke("make-lt", chain.photos, "--imbalance", "4", "--meta-per-class", "2", "--out", tmp_path / "data", "-q")
    manifest = Manifest.load(made.out.strip())
    keys, labels = manifest.splits["meta"].keys, manifest.splits["meta"].labels
    manifest.splits["meta"] = Split([k for k, label in zip(keys, labels, strict=True) if label < 2], labels[labels < 2])
    sha256 = index_sha256(manifest.classes, manifest.index_texts())
    data, (command, *options) = tmp_path / "lacking", options
    dataclasses.replace(manifest, sha256=sha256).save(data)
    first = [data, *SMALL] if command == "pretrain" else [chain.pretrained, "--data", data, *FEW]
    done = invoke(command, *first, *options, "--meta-set", "meta", "--out", tmp_path / "r", "-q")
    assert done.code == 3 and "no image of 'emu'" in done.err and len(done.err.splitlines()) == 1
    assert not (tmp_path / "r").exists()


RATES = {"cat": 0.25, "dog": 0.5, "emu": 1}


@pytest.mark.parametrize("text, told", [
    (json.dumps({"rates": RATES | {"emu": 0}}), "above 0"), (json.dumps({"rates": RATES | {"emu": 1e308}}), "1e100"),
    (json.dumps({"rates": RATES | {"emu": float("nan")}}), "above 0"), (json.dumps({"rates": {"cat": 1, "dog": 1}}), "'emu'"),
    (json.dumps({"rates": RATES | {"yak": 1}}), "'yak'"), (json.dumps({"rates": RATES | {"emu": 10**400}}), "not a rates.json"),
    ("[" * 100_000, "not a rates.json"), ("[]", "not a rates.json"), ('{"rates": [1, 2, 3]}', "not a rates.json"),
    ('{"rates": {"cat": "x"}}', "not a rates.json"), ("", "not a rates.json"), (None, "not a rates.json"),
])  # fmt: skip
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_file_of_rates_that_will_not_do_is_refused_in_a_line(chain, tmp_path, text, told, more):
    if text is not None:
        (tmp_path / "rates.json").write_text(text)
    done = invoke("retrain", chain.pretrained, *FEW, "--sampler", tmp_path / "rates.json", "--out", tmp_path / "r", "-q", *more)
    assert done.code == 3 and told in done.err and len(done.err.splitlines()) == 1 and not (tmp_path / "r").exists()


def test_the_last_pass_over_the_images_is_not_cut_short():
    config = resolve("retrain", flags={"epochs": 1.5, "batch_size": 16}).config
    assert [config.total_steps(images) for images in (1, 32, 33, 49)] == [1, 3, 4, 5]


def test_rates_are_written_so_that_they_can_be_read_back(chain, tmp_path):
    manifest = Manifest.load(chain.manifest)
    document = rates_document(torch.tensor([0.25, 0.123456789, 1e-8]), manifest.classes, manifest.class_counts)
    (tmp_path / "rates.json").write_text(json.dumps(document))
    assert read_rates(str(tmp_path / "rates.json"), manifest).tolist() == [0.25, 0.123457, 1e-6]
    document["rates"] = dict(reversed(document["rates"].items()))  # by name, whatever the file's order
    (tmp_path / "rates.json").write_text(json.dumps(document))
    assert read_rates(str(tmp_path / "rates.json"), manifest).tolist() == [0.25, 0.123457, 1e-6]
    assert read_rates("class", manifest) is None


def test_a_process_whose_part_of_the_images_is_empty_has_no_rows(chain):
    model, _ = load_model(chain.pretrained / "model.safetensors")
    images = InMemory(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), torch.zeros(3), torch.device("cpu"))
    found = [extract_all(model.backbone.eval(), images, torch.zeros(3), torch.ones(3), batch_size=2, reporter=Reporter(),
                         part=World(rank, 4).rows(3)) for rank in range(4)]  # fmt: skip
    assert [len(rows) for rows in found] == [0, 1, 1, 1] and torch.cat(found).shape == (3, 64)


def test_stages_run_from_python_without_the_command_line(tmp_path):
    from balms_cli.stages import make_lt, pretrain, retrain

    data = make_lt.run(MakeLTConfig(source="digits", imbalance=40, head_size=30), tmp_path).manifest
    assert data.class_counts[0] == 30
    small = {"backbone": "resnet8", "image_size": 8, "steps": 3, "batch_size": 8}
    first = pretrain.run(resolve("pretrain", flags=small), data, RunDir(tmp_path / "one"))
    second = retrain.run(resolve("retrain", flags={"steps": 3, "batch_size": 8}), first.path / "model.safetensors", data,
                         RunDir(tmp_path / "two"))  # fmt: skip
    assert read_header(second.path / "model.safetensors").parent_sha256 and first.report["steps"] == 3
