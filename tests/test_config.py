"""Layers, sources, and what is refused."""

import tomllib

import pytest

from balms_cli import presets
from balms_cli.config import DETECT_LOSSES, family_of, parse_set, read_file, resolve
from balms_cli.errors import ConfigError


def test_later_layers_win_and_every_value_knows_its_source(tmp_path):
    file = tmp_path / "exp.toml"
    file.write_text("[retrain]\nsteps = 30\nlr = 0.3\n")
    found = resolve("retrain", preset=("quick", {"steps": 20, "lr": 0.2, "batch_size": 64}),
                    file=(file, read_file(file, "retrain")[0]),
                    flags={"lr": 0.4}, sets={"views": 9})  # fmt: skip
    config = found.config
    assert (config.batch_size, config.steps, config.lr, config.views, config.momentum) == (64, 30, 0.4, 9, 0.9)
    assert {k: found.sources[k] for k in ("batch_size", "steps", "lr", "views", "momentum")} == {
        "batch_size": "preset quick", "steps": "file exp.toml", "lr": "flag", "views": "flag --set", "momentum": "default",
    }  # fmt: skip


def test_the_dump_reads_back_as_the_same_configuration(tmp_path):
    found = resolve("pretrain", preset=presets.choose("pretrain", "cifar", "paper", on_gpu=False), flags={"seed": 3})
    (tmp_path / "config.toml").write_text(found.to_toml({"command": "balms pretrain"}))
    values, preset = read_file(tmp_path / "config.toml", "pretrain")
    assert resolve("pretrain", flags=values).config == found.config
    assert preset == "paper"
    document = tomllib.loads(found.to_toml())
    assert document["source"]["steps"] == "preset paper" and document["source"]["seed"] == "flag"
    assert document["source"].keys() == document["pretrain"].keys()  # TOML has no null


def test_all_unknown_keys_are_told_at_once_with_the_nearest_known_one():
    with pytest.raises(ConfigError) as error:
        resolve("pretrain", sets={"batchsize": 3, "warmup": 2})
    assert "unknown key 'batchsize'" in str(error.value) and "did you mean 'batch_size'" in str(error.value)
    assert "unknown key 'warmup'" in str(error.value)


def test_wrong_values_name_key_value_and_layer():
    with pytest.raises(ConfigError, match=r"lr: .*greater than 0.*got -1 \(flag\)") as error:
        resolve("pretrain", flags={"lr": -1}, sets={"loss": "balaced"})
    assert "loss: " in str(error.value) and "'balanced'" in str(error.value)


@pytest.mark.parametrize("text, told", [
    ("steps = 3\n", "put it under [pretrain]"), ("[pretain]\nsteps = 3\n", "did you mean 'pretrain'"),
    ("[pretrain\n", "--config"), ("colour = 3\n", "unknown table or key 'colour'"),
    ("preset = ['quick']\n", "preset is the name of a recipe"), ("preset = 3\n", "preset is the name of a recipe"),
    ("[[pretrain]]\nsteps = 3\n", "'pretrain' is no table; write [pretrain]"), ("retrain = 3\n", "'retrain' is no table"),
    ("a = " + "[" * 50_000, "--config"), ("[pretrain]\nseed = " + "9" * 5000, "--config"),
])  # fmt: skip
def test_a_file_with_a_mistake_is_refused(tmp_path, text, told):
    (tmp_path / "f.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_file(tmp_path / "f.toml", "pretrain")
    assert told in str(error.value)


def test_tables_of_other_stages_are_left_alone(tmp_path):
    (tmp_path / "f.toml").write_text('preset = "paper"\n[pretrain]\nsteps = 3\n[retrain]\nviews = 2\n')
    assert read_file(tmp_path / "f.toml", "retrain") == ({"views": 2}, "paper")
    assert read_file(tmp_path / "f.toml", "evaluate") == ({}, "paper")


def test_steps_and_epochs_replace_one_another_across_layers():
    assert resolve("pretrain", preset=("p", {"epochs": 5}), flags={"steps": 7}).config.epochs is None
    assert resolve("pretrain", preset=("p", {"steps": 5}), flags={"epochs": 2.5}).config.steps is None
    with pytest.raises(ConfigError, match="either steps or epochs"):
        resolve("pretrain", flags={"steps": None})


def test_steps_and_epochs_in_one_breath_are_a_contradiction(tmp_path):
    for layer in ({"flags": {"steps": 3, "epochs": 2.0}}, {"sets": parse_set(["epochs=2", "steps=3"])}):
        with pytest.raises(ConfigError, match="either steps or epochs"):
            resolve("pretrain", **layer)
    assert resolve("pretrain", preset=("p", {"steps": 3}), flags={"epochs": None}).config.steps == 3
    assert resolve("pretrain", flags={"steps": 3}, sets={"epochs": 2}).config.steps is None


@pytest.mark.parametrize("key, text, told", [
    ("steps", "true", "steps: should be a number, got True"), ("lr", "false", "lr: should be a number"),
    ("workers", "true", "workers: should be a number"), ("frozen", "7", "frozen: "), ("augment", "crop", "augment: "),
    ("lr", "inf", "lr: should be a finite number"), ("epochs", "nan", "epochs: should be"), ("loss", "3", "loss: "),
    ("checkpoint_seconds", "inf", "checkpoint_seconds: "), ("steps", "9" * 5000, "steps: "), ("device", "[1]", "device: "),
    ("augment", "[" * 50_000, "augment: "), ("seed", "1979-05-27", "seed: "), ("steps", "3\nlr = 9", "steps: "),
])  # fmt: skip
def test_a_value_of_the_wrong_kind_is_one_short_line(key, text, told):
    with pytest.raises(ConfigError) as error:
        resolve("pretrain", sets=parse_set([f"{key}={text}"]))
    assert str(error.value).startswith(told) and "flag --set" in str(error.value) and len(str(error.value)) < 500


def test_keys_may_be_written_as_their_options_are(tmp_path):
    assert parse_set(["batch_size=1", "batch-size=2", "batch_size=3"]) == {"batch_size": 3}
    (tmp_path / "f.toml").write_text("[retrain]\nmeta-sampler = true\n")
    assert read_file(tmp_path / "f.toml", "retrain")[0] == {"meta_sampler": True}


def test_set_reads_toml_and_falls_back_to_text():
    assert parse_set(["steps=3", "augment=['crop']", "loss=balanced", "frozen=true", "meta_betas=[0.8,0.9]"]) == {
        "steps": 3, "augment": ["crop"], "loss": "balanced", "frozen": True, "meta_betas": [0.8, 0.9],
    }  # fmt: skip
    with pytest.raises(ConfigError, match="key=value"):
        parse_set(["steps"])


@pytest.mark.parametrize("values, told", [
    ({"lr_drops": [3, 3]}, "lr_drops are steps in rising order"), ({"lr_drops": [5, 3]}, "lr_drops are steps in rising order"),
    ({"lr_drops": [0, 3]}, "lr_drops are steps in rising order"), ({"min_sizes": [31, 320]}, "min_sizes are pixels"),
    ({"min_sizes": []}, "min_sizes: "), ({"meta_betas": [0.9, 1.0]}, "meta_betas: "), ({"require": 3}, "unknown key 'require'"),
])  # fmt: skip
def test_what_no_detector_can_be_tuned_with(values, told):
    with pytest.raises(ConfigError, match=f"^{told}"):
        resolve("detect-finetune", flags=values)


def test_betas_that_adam_refuses_are_refused_before_it():
    with pytest.raises(ConfigError, match=r"^meta_betas: "):
        resolve("retrain", sets=parse_set(["meta_betas=[2,3]"]))


def test_a_misspelt_word_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"got 'balance' \(flag\); did you mean 'balanced'\?$"):
        resolve("retrain", flags={"loss": "balance"})
    with pytest.raises(ConfigError, match=r"got 'xyzzy' \(flag\)$"):
        resolve("retrain", flags={"loss": "xyzzy"})


def test_an_exponent_that_does_nothing_is_refused():
    assert resolve("retrain", flags={"loss": "balanced", "loss_exponent": 0.25}).config.loss_exponent == 0.25
    with pytest.raises(ConfigError, match="--loss softmax has none"):
        resolve("pretrain", flags={"loss": "softmax", "loss_exponent": 2})


def test_every_loss_of_a_detector_is_of_one_family():
    assert [loss for loss in DETECT_LOSSES if family_of(loss) == "sigmoid"] == [
        "sigmoid", "balanced-sigmoid", "focal", "equalization"]  # fmt: skip
    assert family_of("ldam") == family_of("class-balanced") == "softmax"
    assert resolve("detect-evaluate", flags={"require": "AP>=0.1"}).config.require == ["AP>=0.1"]


def test_contradictions_between_keys():
    with pytest.raises(ConfigError, match="exclude each other"):
        resolve("retrain", flags={"meta_sampler": True, "meta_reweigher": True})
    with pytest.raises(ConfigError, match="leave out --sampler"):
        resolve("retrain", flags={"meta_sampler": True, "sampler": "class"})
    with pytest.raises(ConfigError, match="did you mean 'square-root'"):
        resolve("retrain", flags={"sampler": "squareroot"})


def test_every_preset_is_a_valid_configuration():
    for stage, kinds in presets._PRESETS.items():
        for kind, named in kinds.items():
            for name, values in named.items():
                assert resolve(stage, preset=(name, values)).config.batch_size > 0, (stage, kind, name)


def test_the_paper_preset_holds_the_papers_values():
    """Supplement, C.3."""
    one = resolve("pretrain", preset=presets.choose("pretrain", "cifar", "paper", on_gpu=False)).config
    two = resolve("retrain", preset=presets.choose("retrain", "cifar", "paper", on_gpu=False)).config
    assert (one.steps, one.batch_size, one.warmup_steps, one.warmup_lr, one.lr) == (13_000, 512, 800, 0.05, 0.1)
    assert (one.momentum, one.nesterov, one.weight_decay, one.backbone) == (0.9, True, 5e-4, "resnet32")
    assert (two.steps, two.batch_size, two.meta_lr, two.meta_betas, two.meta_batch_size) == (2000, 512, 0.01, (0.9, 0.99), 512)


def test_presets_by_device_and_data():
    assert presets.choose("pretrain", "cifar", None, on_gpu=True)[0] == "paper"
    assert presets.choose("pretrain", "photos", None, on_gpu=True)[0] == "general"
    assert presets.choose("pretrain", "photos", None, on_gpu=False)[0] == "quick"
    with pytest.raises(ConfigError, match="quick or general"):
        presets.choose("pretrain", "photos", "paper", on_gpu=False)
    assert presets.kind_of_data("holiday", (4000, 3000)) == "photos" and presets.kind_of_data("icons", (32, 32)) == "small"
