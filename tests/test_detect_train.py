"""``balms detect train``: its schedule and draws by hand, runs that stop and go on, what is trained, and what is said where."""

import json
import math
import os
import signal
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from balms_cli import presets_detect
from balms_cli.config import STAGES, resolve
from balms_cli.detection.annotations import load_annotations
from balms_cli.detection.steps import LossParts, flip_some, mirror, shares
from balms_cli.detection.train import clipped, initial_detector
from balms_cli.engine.distributed import World
from balms_cli.engine.optim import step_drops
from balms_cli.engine.run_dir import open_run
from balms_cli.errors import ConfigError

from .conftest import invoke
from .detect_tools import draw_lvis

SMALL = ["--backbone", "mobilenet_v3_small", "--steps", "5", "--batch-size", "2", "--lr", "0.005", "--precision", "fp32"]
for _pair in ("min_sizes=[64, 80]", "max_size=96", "test_size=64", "fpn_channels=32", "head_features=32", "proposals=64",
              "rois_per_image=16", "warmup_steps=2", "lr_drops=[4]"):  # fmt: skip
    SMALL += ["--set", _pair]


@pytest.fixture(scope="module")
def lvis(tmp_path_factory) -> Path:
    return draw_lvis(tmp_path_factory.mktemp("lvis"))


@pytest.fixture(scope="module")
def trained(lvis) -> Path:
    """A run of five steps from scratch."""
    done = invoke("detect", "train", lvis, *SMALL, "--out", lvis.parent / "trained", "--quiet")
    assert done.code == 0, done.err
    return lvis.parent / "trained"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A ResNet-18 whose branches are weak, so that it neither grows nor vanishes where BatchNorm is frozen."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    state = resnet18().state_dict()
    for name in state:
        if name.endswith("bn2.weight"):
            state[name] *= 0.2
    file = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(state, file)
    return file


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if not k.endswith("_per_second")} for record in records(run)]


# The schedule


def test_schedule_at_every_step_of_the_papers_recipe():
    """Three lines by hand: 1,000 steps up from a thousandth, then 0.01, 0.001 from step 60,000, 0.0001 from step 80,000."""
    for i in range(90_000):
        if i < 1000:
            expected = 1e-5 + i * (1e-2 - 1e-5) / 1000
        else:
            expected = 1e-2 if i < 60_000 else 1e-3 if i < 80_000 else 1e-4
        found = step_drops(i, peak=0.01, drops=[60_000, 80_000], warmup_steps=1000, warmup_factor=0.001)
        assert math.isclose(found, expected, rel_tol=1e-12), i


def test_schedule_is_torchs_own_of_these_two():
    """Also where a drop comes before the warm-up ends."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    both = torch.optim.lr_scheduler
    chained = both.ChainedScheduler([both.LinearLR(optimizer, 0.25, total_iters=8), both.MultiStepLR(optimizer, [5, 12])])
    for i in range(20):
        found = step_drops(i, peak=0.4, drops=[5, 12], warmup_steps=8, warmup_factor=0.25)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), i
        optimizer.step()
        chained.step()


def test_schedule_without_warm_up_and_drops_is_flat():
    assert {step_drops(i, peak=0.3, drops=[]) for i in range(50)} == {0.3}


# Shares and views


@pytest.mark.parametrize(("size", "accumulate"), [(1, 1), (1, 4), (2, 2), (4, 1), (4, 3)])
def test_shares_of_all_processes_are_the_batch_in_order(size, accumulate):
    found = [share for rank in range(size) for share in shares(24, accumulate, World(rank, size))]
    assert [number for number, _ in found] == list(range(size * accumulate))
    assert [place for _, places in found for place in range(*places.indices(24))] == list(range(24))


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(ConfigError, match=r"--batch-size 10 does not divide into 2 x 2 parts .*; try 8"):
        shares(10, 2, World(0, 2))
    with pytest.raises(ConfigError, match="try 4"):
        shares(2, 4, World())


def test_a_mirrored_image_keeps_its_object_under_its_box_and_mask():
    image, mask = torch.zeros(3, 5, 8), torch.zeros(1, 5, 8, dtype=torch.uint8)
    image[:, 1:3, 1:4], mask[:, 1:3, 1:4] = 1, 1  # columns 1, 2 and 3 of 8: mirrored 4, 5 and 6
    target = {"boxes": torch.tensor([[1.0, 1.0, 4.0, 3.0]]), "labels": torch.tensor([7]), "masks": mask}
    turned, told = mirror(image, target)
    assert told["boxes"].tolist() == [[4.0, 1.0, 7.0, 3.0]] and told["labels"].tolist() == [7]
    x1, y1, x2, y2 = map(int, told["boxes"][0])
    assert turned[:, y1:y2, x1:x2].all() and turned.sum() == image.sum() == 3 * 6
    assert torch.equal(told["masks"][0].bool(), turned[0].bool())
    back, again = mirror(turned, told)
    assert torch.equal(back, image) and torch.equal(again["boxes"], target["boxes"])
    assert target["boxes"].tolist() == [[1.0, 1.0, 4.0, 3.0]]  # the reader's own is left alone


def test_half_of_the_images_are_mirrored_and_the_seed_says_which():
    images = [torch.arange(6.0).view(1, 1, 6).expand(3, 2, 6)] * 2000
    targets = [{"boxes": torch.tensor([[0.0, 0.0, 1.0, 1.0]]), "labels": torch.ones(1)}] * 2000

    def turned(seed: int) -> list[bool]:
        torch.manual_seed(seed)
        found, told = flip_some(images, targets)
        flags = [bool(image[0, 0, 0] == 5) for image in found]
        assert flags == [target["boxes"][0, 0].item() == 5 for target in told]
        return flags

    first = turned(1)
    assert abs(sum(first) - 1000) < 112 and first == turned(1) != turned(2)  # 5 standard deviations


# Training


def test_a_run_is_a_detector_with_its_recipe(trained, lvis):
    from balms_cli.detection.model import load_detector

    model, header = load_detector(trained / "model.safetensors")
    document = json.loads((lvis / "lvis_train.json").read_text())
    assert [c.id for c in header.categories] == sorted(c["id"] for c in document["categories"])
    assert header.stage == "detect-train" and header.architecture.family == "softmax" and header.architecture.norm == "batch"
    assert header.recipe["backbone"] == "mobilenet_v3_small" and header.recipe["steps"] == 5
    assert model.roi_heads.box_predictor.cls_score.out_features == len(header.categories) + 1
    report = json.loads((trained / "report.json").read_text())
    assert report["steps"] == 5 and math.isfinite(report["final_loss"]) and 0 < report["peak_memory_gb"] < 100


def test_the_log_has_each_part_of_the_loss_and_they_add_up(trained):
    for record in records(trained):
        parts = [v for k, v in record.items() if k.startswith("loss_")]
        assert len(parts) == 5 and sum(parts) == pytest.approx(record["loss"], rel=1e-5)
    assert [r["step"] for r in records(trained)] == [1, 2, 3, 4, 5]


def test_its_card_names_every_category_and_who_set_what(trained, lvis):
    card = (trained / "MODEL_CARD.md").read_text()
    document = json.loads((lvis / "lvis_train.json").read_text())
    for category in document["categories"]:
        images = {a["image_id"] for a in document["annotations"] if a["category_id"] == category["id"]}
        assert f"| {len(images)} |" in next(line for line in card.splitlines() if line.startswith(f"| {category['name']} |"))
    assert "| `backbone` | mobilenet\\_v3\\_small | flag |" in card and str(lvis) not in card.split("The command")[0]
    assert "Mask R-CNN on a feature pyramid over mobilenet" in card and "Ren et al." not in card


def test_the_config_says_what_it_was_applied_to(trained, lvis):
    document = tomllib.loads((trained / "config.toml").read_text())
    assert document["preset"] == "quick" and document["detect-train"]["annotations"] == str(lvis / "lvis_train.json")
    assert document["run"]["manifest"] == str(lvis / "lvis_train.json")
    assert document["run"]["images"] == str(lvis / "images") == document["detect-train"]["images"]
    assert document["source"]["backbone"] == "flag" and document["source"]["proposals"] == "flag --set"


@pytest.mark.parametrize(("cut", "options"), [
    (1, []), (3, ["--loss", "sigmoid", "--no-masks", "--set", "accumulate=2", "--set", "clip_norm=1.0"]),
])  # fmt: skip
def test_interrupted_and_resumed_equals_uninterrupted(lvis, tmp_path, monkeypatch, cut, options):
    """Stopped by a signal after ``cut`` of six steps that are logged two by two, and resumed with another number of decoder
    threads: the same weights and log bit for bit."""
    from balms_cli.engine import loop
    from balms_cli.engine.optim import Guard

    monkeypatch.setattr(loop, "LOGS_A_RUN", 3)
    command = ["detect", "train", lvis, *SMALL, "--steps", "6", *options]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert invoke(*command, "--out", whole, "--quiet").code == 0
    step = Guard.step

    def stop_after_cut(self, loss, *optimizers):
        step(self, loss, *optimizers)
        if self.step_now == cut - 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Guard, "step", stop_after_cut)
        stopped = invoke(*command, "--out", parted, "--quiet")
    assert stopped.code == 130 and f"balms detect train --resume {parted}" in stopped.err and stopped.out == ""
    assert not (parted / "model.safetensors").exists()
    resumed = invoke("detect", "train", "--resume", parted, "--workers", "0", "--quiet")
    assert resumed.code == 0, resumed.err
    assert resumed.out.strip() == str(parted)
    first, second = (load_file(run / "model.safetensors") for run in (whole, parted))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert untimed(whole) == untimed(parted) and [r["step"] for r in untimed(whole)] == [2, 4, 6]


def test_a_frozen_backbone_stays_as_it_was_loaded(lvis, weights, tmp_path):
    """Bit for bit, BatchNorm's statistics too; pyramid, proposals and heads move from where the seed put them."""
    options = [*SMALL, "--backbone", "resnet18", "--weights", weights, "--set", "trainable_layers=0", "--steps", "3"]
    done = invoke("detect", "train", lvis, *options, "--out", tmp_path / "r", "--quiet")
    assert done.code == 0, done.err
    given, found = load_file(weights), load_file(tmp_path / "r" / "model.safetensors")
    body = {k.removeprefix("backbone.body."): v for k, v in found.items() if k.startswith("backbone.body.")}
    assert len(body) > 90 and all(torch.equal(tensor, given[name]) for name, tensor in body.items())
    _, resolved, _ = open_run(tmp_path / "r", "detect-train")
    first = initial_detector(resolved.config, load_annotations(lvis / "lvis_train.json"), offline=True)[1].state_dict()
    moved = {".".join(name.split(".")[:2]) for name in found if not torch.equal(found[name], first[name])}
    assert moved == {"backbone.fpn", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor", "roi_heads.mask_head",
                     "roi_heads.mask_predictor"}  # fmt: skip


def test_from_scratch_every_stage_learns_and_clipped_to_nothing_none_does(lvis, trained, tmp_path):
    done = invoke("detect", "train", lvis, *SMALL, "--steps", "2", "--set", "clip_norm=1e-9", "--set", "weight_decay=0",
                  "--out", tmp_path / "r", "--quiet")  # fmt: skip
    assert done.code == 0, done.err
    _, resolved, _ = open_run(trained, "detect-train")
    first = initial_detector(resolved.config, load_annotations(lvis / "lvis_train.json"), offline=True)[1].named_parameters()
    learned, clipped_run = (load_file(run / "model.safetensors") for run in (trained, tmp_path / "r"))
    body = {name: p.detach() for name, p in first if name.startswith("backbone.body.")}
    assert len(body) > 90 and not [name for name, p in body.items() if torch.equal(learned[name], p)]
    assert all(torch.allclose(clipped_run[name], p, rtol=0, atol=1e-9) for name, p in body.items())


def test_clipping_scales_all_gradients_alike():
    layer = nn.Linear(2, 1)
    layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert clipped(layer, 0.5) == 5
    assert layer.weight.grad.tolist() == [[pytest.approx(0.3), 0]] and layer.bias.grad.tolist() == [pytest.approx(0.4)]
    layer.weight.grad = None  # what is frozen has none
    assert clipped(layer, 10.0) == pytest.approx(0.4)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_spoils_anything(lvis, tmp_path):
    done = invoke("detect", "train", lvis, *SMALL, "--lr", "1e12", "--set", "warmup_steps=0", "--set", "lr_drops=[]", "--steps",
                  "30", "--out", tmp_path / "r")  # fmt: skip
    assert done.code == 5 and "not finite" in done.err and done.out == ""
    assert not (tmp_path / "r" / "model.safetensors").exists()


def test_parts_of_the_loss_are_means_since_the_last_log_and_go_on_from_a_checkpoint():
    parts = LossParts(("a", "b"), torch.device("cpu"))
    parts.add(torch.tensor([1.0, 2.0]))
    again = LossParts(("a", "b"), torch.device("cpu"))
    again.load_state_dict(parts.state_dict())
    for one in (parts, again):
        one.add(torch.tensor([3.0, 6.0]))
        assert one.take() == {"a": 2.0, "b": 4.0}
        one.add(torch.tensor([5.0, 5.0]))
        assert one.take() == {"a": 5.0, "b": 5.0}


@pytest.mark.slow
def test_the_loss_falls(lvis, tmp_path):
    """Six drawn pictures are soon known by heart."""
    done = invoke("detect", "train", lvis, *SMALL, "--steps", "150", "--lr", "0.02", "--set", "warmup_steps=20", "--set",
                  "lr_drops=[120]", "--out", tmp_path / "r", "--quiet")  # fmt: skip
    assert done.code == 0, done.err
    log = records(tmp_path / "r")
    first, last = (sum(r["loss"] for r in some) / 10 for some in (log[:10], log[-10:]))
    assert last < 0.6 * first


def test_a_system_that_does_not_say_how_much_memory_was_taken(balms, lvis, monkeypatch):
    monkeypatch.setattr("balms_cli.detection.steps.resource", None)  # as on Windows
    done = balms("detect", "train", lvis, *SMALL, "--dry-run")
    assert done.code == 0 and "not known here" in done.err, done.err


# Presets


@pytest.mark.parametrize("stage", ["detect-train", "detect-finetune"])
@pytest.mark.parametrize("name", ["paper", "reference", "quick"])
def test_every_value_of_a_preset_is_an_option_with_a_source(stage, name):
    values = presets_detect.choose(stage, "any", name, on_gpu=False)[1]
    sources = presets_detect.sources(stage, name)
    assert set(values) == set(sources) <= set(STAGES[stage].model_fields) and all(sources.values())
    resolve(stage, preset=(name, values))


def test_the_papers_preset_holds_the_supplements_values_and_the_reference_those_of_the_code():
    def of(stage: str, name: str):
        return resolve(stage, preset=presets_detect.choose(stage, "any", name, on_gpu=False)).config

    for name, batch, lr in (("paper", 8, 0.01), ("reference", 16, 0.02)):
        first = of("detect-train", name)
        assert (first.steps, first.batch_size, first.lr, first.lr_drops) == (90_000, batch, lr, [60_000, 80_000])
        assert (first.momentum, first.weight_decay, first.backbone, first.repeat_threshold) == (0.9, 1e-4, "resnet50", 0.001)
        assert (min(first.min_sizes), max(first.min_sizes), first.test_size, first.max_size) == (640, 800, 800, 1333)
        assert first.masks and not first.class_agnostic and first.clip_norm is None and first.rois_per_image == 512
    for name, batch, meta_lr, meta_loss in (("paper", 8, 0.001, "plain"), ("reference", 16, 0.01, "adjusted")):
        second = of("detect-finetune", name)
        assert (second.steps, second.batch_size, second.lr, second.lr_drops) == (22_000, batch, 0.02, [11_000, 18_000])
        assert (second.meta_lr, second.meta_batch_size) == (meta_lr, batch)
        assert (second.meta_loss, second.weight_norm) == (meta_loss, "mean")


def test_which_preset_holds_where_none_is_named():
    assert [presets_detect.choose("detect-train", "any", None, on_gpu=gpu)[0] for gpu in (True, False)] == ["paper", "quick"]


def test_print_config_needs_no_data_and_reads_back(balms, tmp_path):
    done = balms("detect", "train", "--preset", "paper", "--lr", "0.02", "--print-config")
    assert done.code == 0, done.err
    document = tomllib.loads(done.out)
    assert document["preset"] == "paper" and document["detect-train"]["lr"] == 0.02 and document["source"]["lr"] == "flag"
    assert document["source"]["steps"] == "preset paper: supplement C.3 (Ren et al. 2020)"
    (tmp_path / "again.toml").write_text(done.out)
    again = balms("detect", "train", "--config", tmp_path / "again.toml", "--print-config")
    assert tomllib.loads(again.out)["detect-train"] == document["detect-train"]


# The command line


def test_stdout_holds_the_folder_alone_and_the_rest_is_told_beside(balms, lvis, tmp_path):
    done = balms("detect", "train", lvis, *SMALL, "--steps", "2")
    assert done.code == 0, done.err
    run = Path(done.out.strip())
    assert done.out == f"{run}\n" and run == tmp_path / "ws" / "runs" / "detect-train-lvis_train-softmax-mobilenet_v3_small"
    for told in ("preset quick", "mobilenet_v3_small-FPN at 64-80 px, 3 categories, 2 steps of 2", "detect-train: 2/2 steps"):
        assert told in done.err
    again = balms("detect", "train", lvis, *SMALL, "--steps", "2", "--loss", "sigmoid", "--no-masks", "--class-agnostic",
                  "--json", "--quiet")  # fmt: skip
    result = json.loads(again.out)
    assert again.err == "" and result["stage"] == "detect-train" and result["steps"] == 2
    assert Path(result["run"]).name == "detect-train-lvis_train-sigmoid-mobilenet_v3_small-boxes-agnostic"
    assert {k for k in records(Path(result["run"]))[0] if k.startswith("loss_")} == {
        "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}  # fmt: skip


def test_a_dry_run_measures_and_writes_nothing(balms, lvis, tmp_path):
    done = balms("detect", "train", lvis, *SMALL, "--dry-run")
    assert done.code == 0, done.err
    assert done.out == "" and "trial steps" in done.err and "5 of 2" in done.err and not (tmp_path / "ws").exists()


def test_a_complete_run_has_nothing_to_resume(trained):
    done = invoke("detect", "train", "--resume", trained)
    assert (done.code, done.out.strip()) == (0, str(trained)) and "nothing to resume" in done.err


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        ([], 2, "no data is named: balms detect train DATA"),
        (["{nowhere}"], 3, "nowhere"),
        (["{lvis}", "--images", "{nowhere}"], 3, "--images"),
        (["{lvis}", "--preset", "quik"], 2, "choose paper or reference or quick"),
        (["{lvis}", "--loss", "balanced-softmax"], 2, "'softmax' or 'sigmoid'"),
        (["{lvis}", "--set", "lr_drop=[3]"], 2, "did you mean 'lr_drops'"),
        (["{lvis}", "--set", "lr_drops=[5, 3]"], 2, "rising order"),
        (["{lvis}", "--set", "accumulate=4", "--batch-size", "6"], 2, "try 8"),
        (["{lvis}", "--backbone", "resnet19"], 2, "resnet1"),
        (["{lvis}", "--weights", "{nowhere}"], 3, "no such file"),
        (["{lvis}", "--device", "cuda:7"], 2, "--device cuda:7"),
        (["{lvis}", "--out", "{lvis}"], 2, "is not empty"),
        (["--resume", "{lvis}"], 4, "not a run's folder"),
        (["--resume", "{trained}", "--lr", "0.1", "--images", "x", "--no-masks"], 2, "(given: --images, --lr, --masks)"),
    ],
)
def test_a_mistake_is_one_line_and_a_code(balms, lvis, trained, tmp_path, options, code, told):
    places = {"lvis": lvis, "trained": trained, "nowhere": tmp_path / "nowhere"}
    done = balms("detect", "train", *(option.format(**places) for option in options))
    lines = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert done.code == code and len(lines) == 1 and told in lines[0] and done.out == "", done.err
    assert not (tmp_path / "ws").exists()


def test_a_run_goes_on_only_with_the_annotations_it_began_with(lvis, tmp_path):
    """Touched since: exit 4, and the run is left as it is."""
    import shutil

    data = tmp_path / "data"
    shutil.copytree(lvis, data)
    done = invoke("detect", "train", data, *SMALL, "--steps", "1", "--out", tmp_path / "r", "--quiet")
    assert done.code == 0, done.err
    (tmp_path / "r" / "model.safetensors").unlink()
    text = (data / "lvis_train.json").read_text()
    (data / "lvis_train.json").write_text(text + " ")
    refused = invoke("detect", "train", "--resume", tmp_path / "r")
    assert refused.code == 4 and "no longer the data it began with" in refused.err
    (data / "lvis_train.json").write_text(text)
    assert invoke("detect", "train", "--resume", tmp_path / "r").code == 0
