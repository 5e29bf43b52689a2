"""``balms detect finetune``: what changes and what does not, its steps by hand, runs that stop and go on."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from balms_cli.config import DETECT_LOSSES, DetectFinetuneConfig, family_of
from balms_cli.data.samplers import mix
from balms_cli.detection import cache, finetune, regions
from balms_cli.detection.annotations import find_annotations, load_annotations
from balms_cli.detection.header import FORMAT, DetectHeader, read_detect_header
from balms_cli.detection.losses import region_loss
from balms_cli.detection.model import cls_score, load_detector, save_detector
from balms_cli.engine.distributed import ALONE, World
from balms_cli.engine.optim import Guard
from balms_cli.meta.reweigher import MetaReweigher
from balms_cli.reporter import Reporter

from .conftest import invoke
from .detect_tools import draw_lvis, tiny_architecture, tiny_detector
from .test_distributed import ENV, torchrun

FEW = ["--steps", "4", "--batch-size", "2", "--lr", "0.05", "--precision", "fp32", "--quiet",
       "--set", "warmup_steps=0", "--set", "lr_drops=[3]", "--set", "meta_batch_size=2"]  # fmt: skip
CLS = {"roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.cls_score.bias"}


@dataclass(frozen=True)
class Made:
    """A small LVIS set, and an untrained detector of each family with its header."""

    data: Path
    softmax: Path
    sigmoid: Path


def make_detector(folder: Path, data: Path, family: str) -> Path:
    file = find_annotations(data, "train")
    annotations = load_annotations(file)
    over = {"family": family, "backbone": "mobilenet_v3_small"}
    architecture, model = tiny_architecture(**over), tiny_detector(len(annotations.categories), **over)
    header = DetectHeader(
        format=FORMAT, created="2026-01-01T00:00:00+00:00", stage="detect-train", architecture=architecture,
        categories=annotations.categories, num_images=annotations.num_images, loss=family,
        recipe={"seed": 0, "flip": True, "repeat_threshold": 0.3}, annotations=str(file), annotations_sha256=annotations.sha256,
        images=str(data / "images"),
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("")
    save_detector(folder / "model.safetensors", model, header)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    root = tmp_path_factory.mktemp("finetune")
    data = draw_lvis(root / "lvis")
    return Made(data, *(make_detector(root / "ws" / "runs" / family, data, family) for family in ("softmax", "sigmoid")))


@pytest.fixture(scope="module")
def begun(made) -> dict:
    """Each family's detector as the stage holds it, and its annotations."""
    annotations = load_annotations(find_annotations(made.data, "train"))
    config = DetectFinetuneConfig(min_sizes=[64], max_size=96, precision="fp32", device="cpu", workers=0)
    return {family: (finetune.begin(config.model_copy(update={"loss": family}), getattr(made, family) / "model.safetensors",
                                    annotations, made.data / "images", Reporter()), annotations)
            for family in ("softmax", "sigmoid")}  # fmt: skip


def tuned(parent: Path, out: Path, *options) -> Path:
    done = invoke("detect", "finetune", parent, *FEW, "--out", out, *options)
    assert done.code == 0, done.err
    assert done.out.strip() == str(out)
    return out


def raw_tensors(run: Path) -> dict[str, bytes]:
    """Name, type, shape and bytes of every tensor of a checkpoint."""
    return {k: (str(t.dtype) + str(tuple(t.shape))).encode() + t.numpy().tobytes()
            for k, t in load_file(run / "model.safetensors").items()}  # fmt: skip


def report(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


# What changes


@pytest.mark.parametrize("options", [
    ["--loss", "balanced-softmax"], ["--loss", "balanced-softmax", "--cache"], ["--loss", "ldam", "--meta-reweigher"],
    ["--classifier", "lws"],
], ids=["online", "cache", "reweigher", "lws"])  # fmt: skip
def test_nothing_but_the_box_classifier_changes_by_a_bit(made, tmp_path, options):
    run = tuned(made.softmax, tmp_path / "run", *options)
    header, told = read_detect_header(run / "model.safetensors"), report(run)
    assert (header.loss, header.stage, header.classifier) == (told["loss"], "detect-finetune", told["classifier"])
    assert header.architecture == read_detect_header(made.softmax / "model.safetensors").architecture
    assert told["features"] == ("cache" if "--cache" in options else "online") and told["steps"] == 4
    assert told["hypergradient"] == ("closed-form" if "--meta-reweigher" in options else None)
    before, after = raw_tensors(made.softmax), raw_tensors(run)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == CLS


@pytest.mark.parametrize("loss", DETECT_LOSSES)
def test_every_loss_trains_the_classifier_of_its_family(made, begun, loss):
    """The first loss that is logged is the named one of the detector's own classifier on the regions of that step."""
    frozen, annotations = begun[family_of(loss)]
    config = DetectFinetuneConfig(loss=loss, steps=3, batch_size=2, lr=0.05, lr_drops=[], warmup_steps=0, min_sizes=[64],
                                  max_size=96)  # fmt: skip
    learnt, guard = finetune.learn(config, frozen, None), Guard(torch.device("cpu"))
    draw = finetune.batch_draw(config, annotations)
    features_RD, labels_R = regions.online_regions(frozen, draw, 2, finetune._VIEWS, config, ALONE)(0)
    named = region_loss(loss, annotations.frequencies, annotations.image_counts)
    expected = named.float()(cls_score(frozen.model)(features_RD), labels_R)
    assert learnt.job.take(0, guard).item() == pytest.approx(expected.item(), rel=1e-6)
    learnt.job.take(1, guard)
    assert (learnt.head.weight - cls_score(frozen.model).weight).abs().max() > 0


def test_lws_scales_each_row_and_its_bias_and_is_folded_in(made, tmp_path):
    run = tuned(made.softmax, tmp_path / "run", "--classifier", "lws", "--cache")
    before, after = (load_file(r / "model.safetensors") for r in (made.softmax, run))
    weight, bias = sorted(CLS)[::-1]
    ratio_CD = after[weight] / before[weight]
    assert torch.allclose(ratio_CD, ratio_CD[:, :1].expand_as(ratio_CD), rtol=1e-5)
    assert torch.allclose(after[bias], before[bias] * ratio_CD[:, 0], rtol=1e-5, atol=1e-8)
    assert (ratio_CD[:, 0] - 1).abs().min() > 0  # every scale has moved
    assert report(run)["classifier"] == read_detect_header(run / "model.safetensors").classifier == "lws"
    assert (report(run)["loss"], report(run)["sampler"]) == ("softmax", "class")  # as its authors learn the scales


def test_category_weights_are_in_header_and_report(made, tmp_path):
    run = tuned(made.sigmoid, tmp_path / "run", "--cache", "--meta-reweigher", "--set", "meta_lr=0.1")
    header, told = read_detect_header(run / "model.safetensors"), report(run)
    assert told["loss"] == "balanced-sigmoid" and told["hypergradient"] == "closed-form" and told["meta_loss"] == "plain"
    assert told["meta_steps_skipped"] == 0
    assert list(told["rates"]) == [c.name for c in header.categories]
    assert list(told["rates"].values()) == pytest.approx(header.rates, abs=1e-6)
    assert max(abs(rate - 0.5) for rate in header.rates) > 0.01
    variance = torch.tensor(header.rates).double().var(correction=0).item()
    assert told["rates_variance"] == pytest.approx(variance, rel=1e-4)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["rates_variance"] == pytest.approx(variance, abs=1e-6)


# Steps, by hand


def some_regions(seed: int, rows: int = 24, background: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels_R = torch.randint(1, 4, (rows,), generator=generator)
    labels_R[torch.rand(rows, generator=generator) < background] = 0
    return torch.randn(rows, 6, generator=generator, dtype=torch.float64), labels_R


FREQUENCIES, COUNTS = torch.tensor([0.6, 0.2, 0.05]).double().numpy(), torch.tensor([12, 4, 1]).numpy()


def formula(name: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The terms [R] of the balanced losses, row by row from their definition."""
    f = torch.as_tensor(FREQUENCIES)
    terms = []
    for z, y in zip(logits, labels.tolist(), strict=True):
        if name.endswith("softmax"):
            q = torch.cat([torch.zeros(1), f.log() - f.log().mean()]) if name.startswith("balanced") and y else torch.zeros(4)
            terms.append(torch.logsumexp(z + q, 0) - (z + q)[y])
        else:
            q = (f / (1 - f)).log() if name.startswith("balanced") and y else torch.zeros(3)
            target = torch.tensor([float(c + 1 == y) for c in range(3)]).double()
            terms.append(F.binary_cross_entropy_with_logits(z + q, target, reduction="sum"))
    return torch.stack(terms)


def linear(name: str) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(6, 4 if name.endswith("softmax") else 3).double()


@pytest.mark.parametrize("name", ["balanced-softmax", "balanced-sigmoid"])
def test_a_plain_step_is_sgd_on_the_formula(name):
    head = linear(name)
    by_hand = [p.detach().clone().requires_grad_() for p in head.parameters()]
    optimizer = torch.optim.SGD(head.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
    step = finetune.plain_step(head, optimizer, region_loss(name, FREQUENCIES, COUNTS).double(), some_regions, ALONE)
    velocity = [torch.zeros_like(p) for p in by_hand]
    for i in range(3):
        features, labels = some_regions(i)
        value = formula(name, F.linear(features, *by_hand), labels).mean()
        assert step(i, Guard(torch.device("cpu"))).item() == pytest.approx(value.item(), rel=1e-12)
        for k, (p, g) in enumerate(zip(by_hand, torch.autograd.grad(value, by_hand), strict=True)):
            velocity[k] = 0.9 * velocity[k] + g + 0.01 * p.detach()
            p.data -= 0.3 * velocity[k]
    for p, expected in zip(head.parameters(), by_hand, strict=True):
        assert torch.allclose(p, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("route", ["closed-form", "jvp", "higher"])
@pytest.mark.parametrize("meta", ["plain", "adjusted"])
@pytest.mark.parametrize("name", ["balanced-softmax", "balanced-sigmoid"])
def test_a_step_with_the_reweigher_differentiates_through_the_look_ahead(name, meta, route):
    """Two steps, the second with momentum in the buffers, against autograd through a step of SGD that is written out."""
    head, loss = linear(name), region_loss(name, FREQUENCIES, COUNTS).double()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
    reweigher = MetaReweigher(3).double()
    adam = torch.optim.Adam(reweigher.parameters(), lr=0.05, betas=(0.9, 0.99))
    read = finetune.loss_on_meta(loss, meta)
    step = finetune.reweigher_step(head, optimizer, loss, reweigher, adam, some_regions, lambda i: some_regions(100 + i), read,
                                   route, finetune.Tally(), ALONE)  # fmt: skip
    weights, velocity = [p.detach().clone() for p in head.parameters()], None
    theta = torch.zeros(3, dtype=torch.float64)
    other = torch.optim.Adam([theta], lr=0.05, betas=(0.9, 0.99))

    def terms_weights(theta, labels):
        rates = theta.sigmoid()[(labels - 1).clamp_min(0)]
        found = labels > 0
        return torch.where(found, rates * found.sum() / rates[found].sum(), torch.ones(()).double())

    def ahead(at, s, features, labels):
        value = (formula(name, F.linear(features, *at), labels) * s).mean()
        v = [g + 0.01 * p for p, g in zip(at, torch.autograd.grad(value, at, create_graph=True), strict=True)]
        v = v if velocity is None else [0.9 * old + new for old, new in zip(velocity, v, strict=True)]
        return [p - 0.3 * x for p, x in zip(at, v, strict=True)], v, value

    for i in range(2):
        (features, labels), (meta_features, meta_labels) = some_regions(i), some_regions(100 + i)
        at = [p.clone().requires_grad_() for p in weights]
        asked = theta.clone().requires_grad_()
        w, _, _ = ahead(at, terms_weights(asked, labels), features, labels)
        read_by = name.removeprefix("balanced-") if meta == "plain" else name
        meta_value = formula(read_by, F.linear(meta_features, *w), meta_labels).mean()
        (gradient,) = torch.autograd.grad(meta_value, [asked])
        value = step(i, Guard(torch.device("cpu")))
        assert torch.allclose(reweigher.theta.grad, gradient, rtol=1e-8, atol=1e-12)
        theta.grad = gradient
        other.step()
        assert torch.allclose(reweigher.theta, theta, rtol=1e-8)
        w, velocity, expected = ahead(at, terms_weights(theta, labels), features, labels)
        velocity, weights = [v.detach() for v in velocity], [p.detach() for p in w]
        assert value.item() == pytest.approx(expected.item(), rel=1e-9)
        for p, q in zip(head.parameters(), weights, strict=True):
            assert torch.allclose(p, q, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("empty", ["batch", "meta batch"])
def test_without_foreground_the_meta_step_is_skipped_and_the_real_one_taken(empty):
    head, loss, tally = linear("softmax"), region_loss("softmax", FREQUENCIES, COUNTS).double(), finetune.Tally()
    before = head.weight.detach().clone()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.3)
    reweigher = MetaReweigher(3).double()
    adam = torch.optim.Adam(reweigher.parameters(), lr=0.05)

    def read(name):
        return lambda i: some_regions(i, background=i < 1 if name == empty else 0.5)

    step = finetune.reweigher_step(head, optimizer, loss, reweigher, adam, read("batch"), read("meta batch"), loss.plain(),
                                   "closed-form", tally, ALONE)  # fmt: skip
    step(0, Guard(torch.device("cpu")))
    assert tally.skipped == 1 and not reweigher.theta.any() and not torch.equal(head.weight, before)
    step(1, Guard(torch.device("cpu")))
    assert tally.skipped == 1 and reweigher.theta.any()


# Regions


def test_the_cache_is_told_shared_by_seeds_and_holds_what_the_detector_says(made, tmp_path):
    done = invoke("detect", "finetune", made.sigmoid, *FEW[:-7], "--cache", "--views", "3", "--out", tmp_path / "a",
                  "--set", "warmup_steps=0", "--set", "lr_drops=[3]")  # fmt: skip
    assert done.code == 0, done.err
    folder = Path(report(tmp_path / "a")["cache"])
    assert folder.parent == made.sigmoid / "features"
    assert "feature cache: 18 views x 16 regions x 32 features, at most" in done.err and "on disk" in done.err
    stamps = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    tuned(made.sigmoid, tmp_path / "b", "--cache", "--views", "3", "--seed", "5")
    assert stamps == {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} and len(stamps) == 2
    assert losses(tmp_path / "a") != losses(tmp_path / "b")
    with safe_open(folder / "00000.safetensors", "pt") as file:
        labels_R, starts_V = file.get_tensor("labels"), file.get_tensor("starts")
    assert len(starts_V) == 17 and 0 < int((labels_R > 0).sum()) < len(labels_R)
    images = load_annotations(find_annotations(made.data, "train")).images
    for view in range(16):  # every category that is found is one of the image, true boxes being among the regions
        found = set(labels_R[starts_V[view] : starts_V[view + 1]].tolist()) - {0}
        assert found and found <= set(images[view // 3].labels.tolist())


def test_an_extraction_that_was_stopped_goes_on(made, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_VIEWS", 4)
    whole = tuned(made.softmax, tmp_path / "whole", "--cache", "--views", "2")
    folder = Path(report(whole)["cache"])
    content = {f.name: f.read_bytes() for f in folder.iterdir()}
    assert len(content) == 3
    for f in folder.iterdir():
        f.unlink()
    looked_at, seen = regions.looked_at, []

    def stopped(*arguments):
        seen.append(1)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return looked_at(*arguments)

    monkeypatch.setattr(regions, "looked_at", stopped)
    cut = invoke("detect", "finetune", made.softmax, *FEW, "--cache", "--views", "2", "--out", tmp_path / "cut")
    assert cut.code == 130 and f"balms detect finetune --resume {tmp_path / 'cut'}" in cut.err
    assert [f.name for f in folder.iterdir()] == ["00000.safetensors"]
    seen.clear()
    monkeypatch.setattr(regions, "looked_at", lambda *arguments: seen.append(1) or looked_at(*arguments))
    done = invoke("detect", "finetune", "--resume", tmp_path / "cut")
    assert done.code == 0 and "1 of its 3 parts are there already" in done.err
    assert len(seen) == 12 - 4
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == content
    assert raw_tensors(tmp_path / "cut") == raw_tensors(whole)


def test_rows_are_what_the_frozen_detector_says_of_each_view(begun, tmp_path):
    """Mirrored, scaled and sampled by draws that are named by the detector's seed and the view alone."""
    frozen, _ = begun["softmax"]
    config = DetectFinetuneConfig(views=3, min_sizes=[64], max_size=96)
    store = cache.RegionCache(tmp_path / "c", views=18, rows=16, features=32, categories=3)
    regions.make_cache(store, config, frozen, Reporter())
    mirrored = 0
    for view in range(18):
        sample = frozen.data.read(view // 3)
        for flip in (True, False):
            torch.manual_seed(mix(0, 45, view, 0))
            features_RD, labels_R = regions.looked_at(frozen.model, [sample], flip, frozen.runtime)
            if flip:
                assert torch.equal(store.read(view)[0], features_RD.half()) and torch.equal(store.read(view)[1], labels_R)
        mirrored += not torch.equal(store.read(view)[0], features_RD.half())
    assert mirrored > 3


def test_a_cache_is_named_by_all_that_its_rows_depend_on(begun):
    frozen, _ = begun["softmax"]
    config = DetectFinetuneConfig(views=2, min_sizes=[64], max_size=96)

    def name(config=config, **changed):
        return regions.region_cache(config, replace(frozen, **changed)).folder.name

    data, header, images = copy.copy(frozen.data), frozen.parent, frozen.annotations.images
    data.annotations = replace(frozen.annotations, images=[replace(images[0], id=999), *images[1:]])
    other = copy.copy(frozen.data)
    other.annotations = replace(frozen.annotations, sha256="0" * 64)
    larger = copy.copy(frozen.data)
    larger.file_sizes = lambda: [1] * len(images)
    names = [name(), *(name(config.model_copy(update=change)) for change in (
        {"views": 3}, {"flip": False}, {"min_sizes": [64, 80]}, {"max_size": 97})),
        name(parent_sha256="0" * 64), name(parent=header.model_copy(update={"recipe": {"seed": 1}})), name(data=data),
        name(data=other), name(data=larger), name(runtime=replace(frozen.runtime, precision="bf16")),
        name(runtime=replace(frozen.runtime, device=torch.device("cuda")))]  # fmt: skip
    assert len(set(names)) == len(names)
    assert name(config.model_copy(update={"lr": 0.5, "seed": 3, "loss": "ldam", "meta_reweigher": True})) == names[0]


def test_a_disk_too_small_for_the_cache_is_told_before_anything_is_computed(made, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2048))
    monkeypatch.setattr(regions, "looked_at", lambda *_: pytest.fail("computed"))
    said = error_of(made.softmax, *FEW, "--cache", "--views", "7", "--out", tmp_path / "r", code=3)
    assert "the feature cache needs up to" in said and "leave out --cache" in said


def test_other_files_of_images_have_a_cache_of_their_own(made, tmp_path):
    """Under the same annotations the features of some pictures are not taken for those of others."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for file in (made.data / "images").iterdir():
        with Image.open(file) as image:
            image.convert("L").convert("RGB").save(pictures / file.name)
    first = tuned(made.softmax, tmp_path / "first", "--cache")
    other = tuned(made.softmax, tmp_path / "other", "--cache", "--images", pictures)
    assert report(first)["cache"] != report(other)["cache"] and losses(first) != losses(other)
    again = tuned(made.softmax, tmp_path / "again", "--cache")
    assert report(first)["cache"] == report(again)["cache"] and losses(first) == losses(again)


def test_a_run_that_finds_another_at_its_cache_takes_over_what_that_made(made, tmp_path, monkeypatch):
    parent = tmp_path / "parent"
    shutil.copytree(made.softmax, parent, ignore=shutil.ignore_patterns("features"))
    whole = tuned(parent, tmp_path / "whole", "--cache")
    folder = Path(report(whole)["cache"])
    content = {f.name: f.read_bytes() for f in folder.iterdir()}
    for f in folder.iterdir():
        f.unlink()
    held, done = threading.Event(), threading.Event()

    def other_run():
        with cache.RegionCache(folder, views=1, rows=1, features=1, categories=1).held():
            held.set()
            done.wait(30)
            for name, shard in content.items():
                (folder / name).write_bytes(shard)

    thread = threading.Thread(target=other_run)
    thread.start()
    assert held.wait(10)
    monkeypatch.setattr(Reporter, "note", lambda _, said: done.set() if said.startswith("another run is making") else None)
    monkeypatch.setattr(regions, "looked_at", lambda *_: pytest.fail("the other run has done this"))
    second = tuned(parent, tmp_path / "second", "--cache")
    assert done.is_set() and raw_tensors(second) == raw_tensors(whole)
    thread.join(30)


def test_rows_of_the_cache_are_views_of_the_images_that_were_drawn():
    class Told:
        """A cache whose view v says v, in as many rows as it is odd."""

        def read(self, view: int):
            return torch.full((1 + view % 2, 2), view).half(), torch.full((1 + view % 2,), view % 4)

    def read(world):
        config = DetectFinetuneConfig(views=3)
        return regions.cached_regions(Told(), lambda i: [7, 0, 7, 5], 4, 9, config, torch.device("cpu"), world)

    chosen = []
    for i in range(200):
        features_RD, labels_R = read(ALONE)(i)
        rows = features_RD[:, 0].int().tolist()
        views = [view for k, view in enumerate(rows) if k == 0 or view != rows[k - 1] or view % 2 == 0]
        chosen += views
        assert labels_R.tolist() == [row % 4 for row in rows] and features_RD.dtype == torch.float32
        halves = [read(World(rank, 2))(i)[0] for rank in (0, 1)]
        assert torch.equal(torch.cat(halves), features_RD)
    assert {view // 3 for view in chosen} == {0, 5, 7}
    counts = [chosen.count(view) for view in (0, 1, 2, 15, 16, 17)]
    assert all(40 < count < 100 for count in counts)  # 66.7 of 200 each: 5 standard deviations are 33


# Runs that stop and go on


@pytest.mark.parametrize("options", [["--meta-reweigher"], ["--cache", "--classifier", "lws"]], ids=["reweigher", "cache"])
def test_a_resumed_run_ends_as_it_would_have(made, tmp_path, monkeypatch, options):
    whole = tuned(made.sigmoid, tmp_path / "whole", *options)
    real_step, taken = finetune.real_step, []

    def stopping(*arguments):
        taken.append(1)
        if len(taken) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real_step(*arguments)

    monkeypatch.setattr(finetune, "real_step", stopping)
    cut = invoke("detect", "finetune", made.sigmoid, *FEW, "--out", tmp_path / "cut", *options)
    assert cut.code == 130 and "stopped after step 2 of 4" in cut.err
    assert f"go on with: balms detect finetune --resume {tmp_path / 'cut'}" in cut.err
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    monkeypatch.setattr(finetune, "real_step", real_step)
    told = invoke("detect", "finetune", "--resume", tmp_path / "cut")
    assert told.code == 0 and told.out.strip() == str(tmp_path / "cut"), told.err
    assert raw_tensors(tmp_path / "cut") == raw_tensors(whole) and losses(tmp_path / "cut") == losses(whole)
    headers = [read_detect_header(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert headers[0].rates == headers[1].rates
    again = invoke("detect", "finetune", "--resume", tmp_path / "cut")
    assert again.code == 0 and "is complete" in again.err
    if "--meta-reweigher" in options:
        assert "category weights, most images first" in told.err
    refused = invoke("detect", "finetune", "--resume", tmp_path / "cut", "--from", made.sigmoid)
    assert refused.code == 2 and "--from" in refused.err


# What is said where


def error_of(*arguments, code: int, **more) -> str:
    done = invoke("detect", "finetune", *arguments, **more)
    assert done.code == code, done.err
    lines = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in done.err
    return lines[0]


def test_losses_of_the_other_family_are_refused_with_the_fix(made, tmp_path):
    out = ["--out", tmp_path / "run"]
    said = error_of(made.softmax, *FEW, *out, "--loss", "balanced-sigmoid", code=4)
    assert "softmax classifier" in said and "use --loss softmax, balanced-softmax" in said and "train --loss sigmoid" in said
    said = error_of(made.sigmoid, *FEW, *out, "--loss", "ldam", code=4)
    assert "sigmoid classifier" in said and "focal" in said and "train --loss softmax" in said
    assert not (tmp_path / "run").exists()


def test_annotations_of_other_categories_are_refused(made, tmp_path):
    document = json.loads(find_annotations(made.data, "train").read_text())
    document["categories"][0]["name"] = "un\x1b[31mknown"
    other = tmp_path / "train.json"
    other.write_text(json.dumps(document))
    said = error_of(made.softmax, *FEW, "--data", other, "--images", made.data / "images", "--out", tmp_path / "r", code=4)
    assert "was trained on other categories" in said and "only in the checkpoint: " in said
    assert "un\\x1b[31mknown" in said and "\x1b[31m" not in said
    document["categories"][0]["name"] = read_detect_header(made.softmax / "model.safetensors").categories[0].name
    gone = document["images"][1]["id"]  # an image that has the first category alone
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != gone]
    other.write_text(json.dumps(document))
    run = tuned(made.softmax, tmp_path / "r", "--data", other, "--images", made.data / "images", "--cache")
    header = read_detect_header(run / "model.safetensors")
    assert header.annotations == str(other) and header.num_images == header.categories[0].image_count == 5


def test_annotations_that_are_gone_are_asked_for(made, tmp_path):
    parent = tmp_path / "parent"
    parent.mkdir()
    model, header = load_detector(made.softmax / "model.safetensors")
    for there in (tmp_path / "gone.json", "/dev/zero"):  # not a file: it would never end
        save_detector(parent / "model.safetensors", model, header.model_copy(update={"annotations": str(there)}))
        said = error_of(parent, *FEW, "--out", tmp_path / "r", code=3)
        assert f"are no longer at {there}" in said and "--data" in said


def test_the_detector_is_an_option_or_from_a_pipe_or_the_newest(made, tmp_path, monkeypatch):
    few = [option for option in FEW if option != "--quiet"] + ["--dry-run"]
    monkeypatch.setenv("BALMS_WORKSPACE", str(made.softmax.parents[1]))
    for arguments, stdin in ((["--from", made.softmax / "model.safetensors"], None), (["-"], f"{made.softmax}\n")):
        done = invoke("detect", "finetune", *arguments, *few, "--out", tmp_path / "r", stdin=stdin)
        assert done.code == 0 and "dry run: nothing was written" in done.err and done.out == "", done.err
        assert not (tmp_path / "r").exists()
    newest = invoke("detect", "finetune", *few)
    assert newest.code == 0 and f"detector: {made.softmax.parent}" in newest.err.replace("\n", "")
    assert "leave one of them out" in error_of(made.softmax, "--from", made.softmax, code=2)
    monkeypatch.setenv("BALMS_WORKSPACE", str(tmp_path / "empty"))
    assert "run balms detect train first" in error_of(code=3)
    assert "or it is lost" in error_of(made.softmax, "--out", made.softmax, "--overwrite", code=2)


def test_what_the_detector_was_trained_with_stands_before_the_preset(made):
    done = invoke("detect", "finetune", made.sigmoid, "--preset", "paper", "--print-config", "--batch-size", "4")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    header = read_detect_header(made.sigmoid / "model.safetensors")
    assert f"max_size = {header.architecture.max_size}" in lines and 'loss = "balanced-sigmoid"' in lines
    assert "repeat_threshold = 0.3" in lines and "steps = 22000" in lines and "batch_size = 4" in lines
    assert 'max_size = "the detector"' in lines and 'loss = "the detector\'s family"' in lines
    flag = invoke("detect", "finetune", made.sigmoid, "--print-config", "--repeat-threshold", "0.2", "--set", "min_sizes=[50]")
    assert "repeat_threshold = 0.2" in flag.out and 'min_sizes = "flag --set"' in flag.out


def test_routes_that_cannot_be_gone_are_refused(made, tmp_path):
    few = [*FEW, "--meta-reweigher", "--out", tmp_path / "r"]
    said = error_of(made.softmax, *few, "--classifier", "lws", "--hypergradient", "closed-form", code=2)
    assert "jvp or higher" in said
    run = tuned(made.softmax, tmp_path / "r", "--meta-reweigher", "--classifier", "lws", "--cache")
    assert report(run)["hypergradient"] == "jvp"


def test_a_detector_is_frozen_whole_and_a_copy_learns(begun):
    model = begun["softmax"][0].model
    config = DetectFinetuneConfig(min_sizes=[40], max_size=64)
    finetune.freeze(model, config, torch.device("cpu"))
    head = finetune.tuned_head(config, model)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in head.parameters()) and head is not cls_score(model)
    assert tuple(model.transform.min_size) == (40,) and model.transform.max_size == 64


# Several processes

ONE = """
from balms_cli.detection import regions, steps
from balms_cli.cli.app import main

regions.shares = lambda batch_size, accumulate, world: steps.shares(batch_size, 2, world)
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--loss", "balanced-softmax"], ["--meta-reweigher", "--set", "meta_lr=0.05"],
                                     ["--meta-reweigher", "--cache", "--set", "meta_lr=0.05"]],
                         ids=["plain", "reweigher", "cache"])  # fmt: skip
def test_two_processes_equal_one_with_two_half_batches(made, tmp_path, options):
    """Also where the halves have different numbers of foreground regions, as they do."""
    few = ["detect", "finetune", made.softmax, *FEW[:3], "4", *FEW[4:-1], "meta_batch_size=4", *options, "--out"]
    two = torchrun(*few, tmp_path / "two")
    assert two.returncode == 0, two.stderr
    assert two.stdout.strip() == str(tmp_path / "two")  # one process prints
    shards = {}
    if "--cache" in options:
        for f in Path(report(tmp_path / "two")["cache"]).iterdir():
            shards[f] = f.read_bytes()
            f.unlink()
    one = subprocess.run([sys.executable, "-c", ONE, *map(str, few), str(tmp_path / "one")], capture_output=True, text=True,
                         env=ENV, check=False)  # fmt: skip
    assert one.returncode == 0, one.stderr
    assert {f: f.read_bytes() for f in shards} == shards  # the cache of two is that of one
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("two", "one"))
    before = load_file(made.softmax / "model.safetensors")
    for name in CLS:
        assert (ours[name] - before[name]).abs().max() > 1e-3
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    rates = [read_detect_header(tmp_path / n / "model.safetensors").rates for n in ("two", "one")]
    if "--meta-reweigher" in options:
        assert rates[0] == pytest.approx(rates[1], abs=1e-5) and max(abs(r - 0.5) for r in rates[0]) > 0.01


@pytest.mark.slow
def test_what_several_processes_cannot_do_is_one_line(made, tmp_path):
    out = ["--out", tmp_path / "r"]
    done = torchrun("detect", "finetune", made.softmax, *FEW, "--classifier", "lws", "--meta-reweigher", *out)
    assert done.returncode != 0 and done.stderr.count("error: the reweigher of several processes") == 1
    done = torchrun("detect", "finetune", made.softmax, *FEW, "--batch-size", "3", *out)
    assert done.returncode != 0 and "--batch-size 3 does not divide" in done.stderr
