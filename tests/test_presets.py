"""The published recipes for large sets: their values by the sources' own figures, and where each is said to come from."""

import tomllib

import pytest

from balms_cli import presets, presets_detect
from balms_cli.config import PretrainConfig, RetrainConfig, resolve
from balms_cli.errors import ConfigError
from balms_cli.models.backbones import backbone_names

from .conftest import draw_photos

RECIPES = ("imagenet-lt", "places-lt", "inaturalist18")


def one(stage: str, name: str):
    return resolve(stage, preset=presets.choose(stage, "photos", name, on_gpu=False)).config


def test_imagenet_lt_holds_the_papers_values():
    """Supplement, C.3; weight decay by the repository of Kang et al."""
    first, second = one("pretrain", "imagenet-lt"), one("retrain", "imagenet-lt")
    assert (first.backbone, first.epochs, first.steps, first.batch_size, first.image_size) == ("resnet10", 90, None, 512, 224)
    assert (first.lr, first.momentum, first.nesterov, first.weight_decay, first.warmup_steps) == (0.2, 0.9, False, 5e-4, 0)
    assert first.weights is None and first.loss == "softmax" and first.sampler == "instance"
    assert (second.epochs, second.batch_size, second.lr, second.momentum, second.nesterov) == (10, 512, 0.2, 0.9, False)
    assert (second.meta_lr, second.meta_betas, second.meta_batch_size, second.meta_set) == (0.01, (0.9, 0.99), 512, "train")


def test_places_lt_holds_the_papers_values():
    first, second = one("pretrain", "places-lt"), one("retrain", "places-lt")
    assert (first.backbone, first.weights, first.epochs) == ("resnet152", "imagenet:IMAGENET1K_V1", 30)
    assert (first.batch_size, first.lr, first.image_size, first.nesterov) == (512, 0.2, 224, False)
    assert (second.epochs, second.batch_size, second.lr, second.nesterov) == (10, 128, 0.01, False)


def test_inaturalist18_holds_the_values_of_the_decoupling_repository():
    first, second = one("pretrain", "inaturalist18"), one("retrain", "inaturalist18")
    assert (first.backbone, first.epochs, first.batch_size, first.lr, first.weight_decay) == ("resnet50", 90, 512, 0.2, 1e-4)
    assert (second.epochs, second.batch_size, second.lr, second.weight_decay) == (30, 512, 0.2, 1e-4)


@pytest.mark.parametrize("stage", ["pretrain", "retrain", "meta-sample"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_value_of_a_recipe_has_a_source(stage, name):
    values = presets.choose(stage, "photos", name, on_gpu=False)[1]
    assert set(presets.sources(stage, name)) == set(values) and all(presets.sources(stage, name).values())
    config = PretrainConfig if stage == "pretrain" else RetrainConfig
    assert set(values) <= set(config.model_fields)


def test_those_of_detectors_by_device_each_value_with_a_source():
    for stage in ("detect-train", "detect-finetune"):
        assert [presets_detect.choose(stage, "any", None, on_gpu=gpu)[0] for gpu in (True, False)] == ["paper", "quick"]
        for name in ("paper", "reference", "quick"):
            chosen = presets_detect.choose(stage, "any", name, on_gpu=False)
            assert presets_detect.sources(stage, name).keys() == chosen[1].keys() and resolve(stage, preset=chosen)
        with pytest.raises(ConfigError, match="choose paper or reference or quick"):
            presets_detect.choose(stage, "any", "general", on_gpu=False)


def test_other_presets_have_no_sources_of_their_own():
    assert presets.sources("pretrain", "quick") == presets.sources("evaluate", "quick") == {}


def test_the_backbones_of_the_recipes_are_known():
    chosen = {one("pretrain", name).backbone for name in RECIPES}
    assert chosen == {"resnet10", "resnet152", "resnet50"} and chosen | {"resnext50_32x4d"} <= set(backbone_names())


def test_they_are_for_photos_and_never_chosen_by_themselves():
    with pytest.raises(ConfigError, match="none for this data; choose paper or quick"):
        presets.choose("pretrain", "cifar", "imagenet-lt", on_gpu=False)
    assert {presets.choose("pretrain", "photos", None, on_gpu=gpu)[0] for gpu in (True, False)} == {"general", "quick"}


def test_print_config_says_where_each_value_comes_from(balms, tmp_path):
    photos = draw_photos(tmp_path / "photos", {"cat": 12, "dog": 6}, size=56)
    manifest = balms("make-lt", photos, "--as-is").out.strip()
    done = balms("pretrain", manifest, "--preset", "imagenet-lt", "--backbone", "resnet50", "--set", "weight_decay=1e-4",
                 "--print-config")  # fmt: skip
    assert done.code == 0, done.err
    document = tomllib.loads(done.out)
    value, source = document["pretrain"], document["source"]
    assert document["preset"] == "imagenet-lt" and (value["epochs"], value["lr"], value["backbone"]) == (90, 0.2, "resnet50")
    assert source["lr"] == source["epochs"] == "preset imagenet-lt: supplement C.3 (Ren et al. 2020)"
    assert source["augment"].startswith("preset imagenet-lt: repository of Kang et al. 2020")
    assert (source["backbone"], source["weight_decay"], source["momentum"]) == ("flag", "flag --set", "default")
    (tmp_path / "again.toml").write_text(done.out)  # the dump, sources and all, reads back
    again = balms("pretrain", manifest, "--config", tmp_path / "again.toml", "--print-config")
    assert tomllib.loads(again.out)["pretrain"] == value


@pytest.mark.parametrize(("images", "flags", "kept", "told"), [
    (172, {}, 5, "preset quick, cut from 50 to a tenth of the steps"),  # 20 epochs of 3 batches
    (40, {}, 1, "preset quick, cut from 50 to a tenth of the steps"),
    (1_600, {}, 50, "preset quick"),  # 500 steps
    (1_599, {"steps": 499}, 49, "preset quick, cut from 50 to a tenth of the steps"),
    (40, {"warmup_steps": 15}, 15, "flag"),  # who says it, means it
])  # fmt: skip
def test_a_warm_up_leaves_room_for_the_training(images, flags, kept, told):
    found = resolve("pretrain", preset=presets.choose("pretrain", "photos", "quick", on_gpu=False), flags=flags)
    fitting = presets.with_fitting_warm_up(found, images)
    assert (fitting.config.warmup_steps, fitting.sources["warmup_steps"]) == (kept, told)


def test_lws_draws_by_class_for_softmax_alone():
    def layers(**chosen):
        return resolve("retrain", methods=presets.methods(chosen), flags=chosen).config

    assert (layers(classifier="lws").loss, layers(classifier="lws").sampler) == ("softmax", "class")
    both = layers(classifier="lws", loss="balanced")
    assert (both.loss, both.sampler) == ("balanced", "instance")
    assert layers(classifier="lws", loss="balanced", sampler="class").sampler == "class"
