"""The command line as a user and as a script meets it: streams, artefacts, options, exit codes."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from balms_cli.engine.run_dir import clear_run, new_run
from balms_cli.errors import ConfigError

from .conftest import SMALL, draw_photos, interrupted_after, invoke

FEW = ["--steps", "20", "--set", "meta_batch_size=16", "--batch-size", "16", "--set", "class_rows=8", "--views", "2"]


def error_of(outcome, code):
    """The one line that an error is."""
    assert outcome.code == code, (outcome.code, outcome.err)
    assert outcome.out == "" and "Traceback" not in outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and outcome.err.rstrip().splitlines()[-1] == lines[0]
    return lines[0]


class TestStreams:
    def test_stdout_is_the_path_and_nothing_else(self, balms, chain):
        made = balms("make-lt", chain.photos, "--as-is")
        assert made.out == f"{Path(made.out.strip())}\n" and (Path(made.out.strip()) / "manifest.json").is_file()
        assert "training images" in made.err
        trained = balms("pretrain", "-", *SMALL, stdin=made.out)
        assert (Path(trained.out.strip()) / "model.safetensors").is_file() and trained.out.count("\n") == 1
        classified = balms("retrain", "-", *FEW, "--meta-sampler", stdin=trained.out)
        assert (Path(classified.out.strip()) / "rates.json").is_file() and classified.out.count("\n") == 1
        scored = balms("evaluate", "-", stdin=classified.out)
        assert scored.out == classified.out and "balanced" in scored.err and "emu" in scored.err

    def test_json_is_one_object_and_feeds_the_next_stage(self, balms, chain):
        made = json.loads(balms("make-lt", chain.photos, "--as-is", "--json").out)
        assert made["class_counts"] == [32, 12, 5] and made["total"] == 49
        trained = balms("pretrain", "-", *SMALL, "--json", stdin=json.dumps(made))
        assert json.loads(trained.out)["steps"] == 12
        scored = json.loads(balms("evaluate", "-", "--json", "--quiet", stdin=trained.out).out)
        assert set(scored) >= {
            "top1",
            "top5",
            "balanced_accuracy",
            "many",
            "medium",
            "few",
            "per_class",
            "run",
            "manifest_sha256",
        }
        assert [c["name"] for c in scored["per_class"]] == ["cat", "dog", "emu"] and scored["many"] is None

    def test_several_runs_side_by_side(self, balms, chain):
        other = balms("retrain", chain.pretrained, *FEW).out.strip()
        both = json.loads(balms("evaluate", chain.pretrained, other, "--json").out)
        assert [r["run"] for r in both["runs"]] == [str(chain.pretrained), other]
        again = balms("evaluate", "-", "--json", stdin=json.dumps(both))
        assert json.loads(again.out)["runs"] == both["runs"]

    def test_quiet_says_nothing(self, balms, chain):
        assert balms("evaluate", chain.pretrained, "--quiet").err == ""

    def test_streams_that_are_closed_are_done_without(self, chain, tmp_path):
        """A file that is opened then would get the number of stdout or stderr, and whatever is written there."""
        command = f"{sys.executable} -m balms_cli make-lt {chain.photos} --as-is --workspace {tmp_path} --json <&- >&- 2>&-"
        assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
        (made,) = (tmp_path / "data").iterdir()
        assert all((made / name).read_bytes() == (chain.manifest / name).read_bytes() for name in ("train.csv", "test.csv"))

    def test_who_closes_stdout_ends_it_without_a_word(self, chain):
        command = [sys.executable, "-m", "balms_cli", "make-lt", str(chain.photos), "--as-is", "--dry-run", "--print-config"]
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, "")

    def test_no_terminal_codes_reach_a_pipe(self, balms, chain):
        outcome = balms("evaluate", chain.pretrained)
        assert "\x1b" not in outcome.err and "\x1b" not in outcome.out


class TestArtefacts:
    def test_the_newest_fitting_run_is_taken_and_named(self, balms, chain):
        manifest = balms("make-lt", chain.photos, "--as-is").out.strip()
        balms("make-lt", chain.photos, "--imbalance", "4")
        again = balms("make-lt", chain.photos, "--as-is")  # made again: the same folder, and the newest once more
        assert again.out.strip() == manifest
        trained = balms("pretrain", *SMALL)
        assert f"data: {manifest}" in trained.err
        classified = balms("retrain", *FEW)
        assert f"checkpoint: {trained.out.strip()}" in classified.err
        balms("retrain", *FEW, "--sampler", "class")
        second = balms("retrain", *FEW, "--meta-reweigher")
        assert f"checkpoint: {second.out.strip()}" in balms("evaluate").err
        # meta-sample and retrain start from stage 1, whatever came later
        assert f"checkpoint: {trained.out.strip()}" in balms("meta-sample", *FEW).err

    def test_an_incomplete_run_is_never_taken(self, balms, chain, tmp_path):
        trained = Path(balms("pretrain", chain.manifest, *SMALL).out.strip())
        torn = trained.with_name("torn")
        shutil.copytree(trained, torn)
        (torn / "model.safetensors").unlink()
        assert balms("retrain", *FEW).code == 0
        assert "not complete" in error_of(balms("retrain", torn, *FEW), 4)

    def test_empty_workspace_and_empty_stdin(self, balms):
        assert "balms make-lt" in error_of(balms("pretrain"), 3)
        assert "run balms pretrain first" in error_of(balms("retrain"), 3)
        assert "printed no path" in error_of(balms("pretrain", "-", stdin=""), 3)
        assert "no 'run' or 'manifest'" in error_of(balms("pretrain", "-", stdin="{}"), 3)

    def test_an_interrupted_run_is_named_where_no_other_is_there(self, balms, chain, tmp_path):
        runs = tmp_path / "ws" / "runs"
        for name, when in (("new", 2e9), ("old", 1e9)):
            shutil.copytree(chain.pretrained, runs / name)
            (runs / name / "model.safetensors").unlink()
            os.utime(runs / name / "resume.pt", (when, when))
        for stage in ("retrain", "evaluate"):
            assert error_of(balms(stage), 3).endswith(f"the interrupted one: balms pretrain --resume {runs / 'new'}")
        for name in ("new", "old"):
            (runs / name / "resume.pt").unlink()
        assert "run balms pretrain first" in error_of(balms("retrain"), 3)

    def test_a_folder_of_another_kind_is_told_what_it_is(self, balms, chain, tmp_path):
        runs, at = chain.workspace / "runs", f"such as {chain.pretrained}"
        for stage in ("retrain", "evaluate"):
            told = error_of(balms(stage, chain.photos), 4)
            assert "photos is not a run" in told and "balms-runs/runs" in told and "first" not in told
            assert all(error_of(balms(stage, path), 4).endswith(at) for path in (chain.workspace, runs))
        assert error_of(balms("predict", chain.photos, chain.pretrained), 4).endswith("first: balms predict RUN IMAGES...")
        assert f"balms make-lt {chain.photos} --as-is" in error_of(balms("pretrain", chain.photos), 3)
        told = error_of(balms("pretrain", chain.pretrained), 3)
        assert f"is a run of pretrain, not a data set; its data: {chain.manifest};" in told
        assert error_of(balms("pretrain", chain.workspace), 3).endswith(f"name one of them, such as {chain.manifest}")
        told = error_of(balms("pretrain", runs), 3)
        assert "holds runs" in told and str(runs) not in told.partition("make-lt")[2]
        rates = tmp_path / "rates"
        assert balms("meta-sample", chain.pretrained, *FEW, "--out", rates).code == 0
        told = error_of(balms("evaluate", rates), 4)
        assert "no model" in told and told.endswith(f"balms retrain --sampler {rates / 'rates.json'}")

    def test_out_is_refused_when_not_empty_and_overwritten_on_request(self, balms, chain, tmp_path):
        out = tmp_path / "mine"
        assert balms("pretrain", chain.manifest, *SMALL, "--out", out).out.strip() == str(out)
        told = error_of(balms("pretrain", chain.manifest, *SMALL, "--out", out), 2)
        assert "--overwrite" in told and f"balms pretrain --resume {out}" in told
        assert balms("pretrain", chain.manifest, *SMALL, "--out", out, "--overwrite", "--seed", "1").code == 0
        assert tomllib.loads((out / "config.toml").read_text())["pretrain"]["seed"] == 1
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
        assert "leaves it alone" in error_of(balms("pretrain", chain.manifest, "--out", tmp_path / "thesis", "--overwrite"), 2)
        assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"

    def test_two_runs_that_begin_together_never_share_a_folder(self, tmp_path):
        """Both have looked for a free name before either has made its folder: reading the images comes between."""
        ours, theirs, third = (new_run("pretrain", "x", workspace=tmp_path, out=None, overwrite=False) for _ in range(3))
        assert ours.path == theirs.path
        for run in (theirs, ours, third):
            clear_run(run)
            (run / "config.toml").write_text("")
        assert [r.path.name for r in (theirs, ours, third)] == ["pretrain-x", "pretrain-x-2", "pretrain-x-3"]
        out = tmp_path / "mine"
        first, second = (new_run("pretrain", "x", workspace=tmp_path, out=out, overwrite=True) for _ in range(2))
        clear_run(first)
        (first / "config.toml").write_text("first")
        with pytest.raises(ConfigError, match=r"has begun in .*mine meanwhile"):
            clear_run(second)
        assert (first / "config.toml").read_text() == "first"

    def test_what_overwrite_takes_away_and_in_which_order(self, tmp_path, monkeypatch):
        out = tmp_path / "run"
        out.mkdir()
        ours = ["model.safetensors", "rates.json", "resume.pt", "report.json", "metrics.jsonl", "MODEL_CARD.md",
                "temperature.json", "rates.csv", "rates.png", "config.toml"]  # fmt: skip
        for name in (*ours, "notes.txt"):
            (out / name).write_text(name)
        for name in ("features", "tensorboard", "export"):
            (out / name).mkdir()
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            clear_run(new_run("pretrain", "x", workspace=tmp_path, out=out, overwrite=True))
        assert (out / "config.toml").exists() and not (out / "model.safetensors").exists()  # still a run's, and no result
        monkeypatch.undo()
        clear_run(new_run("pretrain", "x", workspace=tmp_path, out=out, overwrite=True))
        assert [p.name for p in out.iterdir()] == ["notes.txt"]

    def test_a_run_is_never_overwritten_by_what_starts_from_it(self, balms, chain):
        before = (chain.pretrained / "model.safetensors").read_bytes()
        told = error_of(balms("retrain", chain.pretrained, *FEW, "--out", chain.pretrained, "--overwrite"), 2)
        assert "starts from" in told and (chain.pretrained / "model.safetensors").read_bytes() == before

    def test_a_damaged_configuration_is_never_gone_on_with(self, balms, chain, tmp_path):
        (tmp_path / "run").mkdir()
        file, text = tmp_path / "run" / "config.toml", (chain.pretrained / "config.toml").read_text()
        recipe, _, _ = text.partition("[source]")
        for spoilt, told in {
            text.replace("manifest = ", "was = "): "does not say what the run began with",
            text.replace('device = "cpu"', "device = 3"): "does not say what the run began with",
            recipe: "is damaged: it has no tables", "": "is damaged: it has no tables",
            "pretrain = 3\nsource = 1\nrun = 2\n": "is damaged: it has no tables",
            "x = " + "[" * 50_000: "cannot be read", "[": "cannot be read",
        }.items():  # fmt: skip
            file.write_text(spoilt)
            assert told in error_of(balms("pretrain", "--resume", tmp_path / "run"), 4)
        file.write_text(text.replace("lr = 0.05", "lr = -1"))
        assert "got -1 (file config.toml)" in error_of(balms("pretrain", "--resume", tmp_path / "run"), 2)

    def test_a_run_folder_holds_what_the_contract_says(self, chain):
        names = {p.name for p in chain.pretrained.iterdir()}
        assert {"config.toml", "metrics.jsonl", "resume.pt", "report.json", "model.safetensors"} <= names
        document = tomllib.loads((chain.pretrained / "config.toml").read_text())
        assert document["pretrain"]["steps"] == 12 and document["source"]["steps"] == "flag"
        assert document["source"]["image_size"] == "flag --set" and document["source"]["momentum"] == "default"
        assert document["run"]["manifest"] == str(chain.manifest) and document["run"]["versions"]["balms"]
        records = [json.loads(line) for line in (chain.pretrained / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == list(range(1, 13))
        assert json.loads((chain.pretrained / "report.json").read_text())["final_loss"] == records[-1]["loss"]

    def test_the_same_command_twice_makes_two_runs(self, balms, chain):
        first, second = (balms("retrain", chain.pretrained, *FEW).out.strip() for _ in range(2))
        assert first != second and Path(second).name.endswith("-2")
        assert (Path(first) / "model.safetensors").read_bytes()[-64:] == (Path(second) / "model.safetensors").read_bytes()[-64:]


class TestOptions:
    def test_print_config_prints_toml_that_config_takes(self, balms, chain, tmp_path):
        printed = balms("pretrain", chain.manifest, "--preset", "general", "--lr", "0.07", "--print-config")
        document = tomllib.loads(printed.out)
        assert document["preset"] == "general" and document["pretrain"]["epochs"] == 200
        assert document["source"]["lr"] == "flag" and document["source"]["epochs"] == "preset general"
        (tmp_path / "mine.toml").write_text(printed.out)
        again = tomllib.loads(balms("pretrain", chain.manifest, "--config", tmp_path / "mine.toml", "--print-config").out)
        assert again["pretrain"] == document["pretrain"] and again["source"]["lr"] == "file mine.toml"

    def test_a_run_can_be_repeated_from_its_own_config(self, balms, chain):
        repeated = Path(balms("pretrain", chain.manifest, "--config", chain.pretrained).out.strip())
        ours, theirs = ((p / "model.safetensors").read_bytes()[-256:] for p in (repeated, chain.pretrained))
        assert ours == theirs

    def test_a_configuration_of_other_data_is_warned_of(self, balms, chain):
        other = balms("make-lt", chain.photos, "--imbalance", "20").out.strip()
        for config in (chain.pretrained, chain.pretrained / "config.toml"):
            (told,) = (line for line in balms("pretrain", other, "--config", config, "--print-config").err.splitlines()
                       if line.startswith("warning: "))  # fmt: skip
            assert told.startswith(f"warning: {other} is not the data of {chain.pretrained / 'config.toml'}")
            assert told.endswith(str(chain.manifest))
            assert "warning" not in balms("pretrain", chain.manifest, "--config", config, "--print-config").err

    def test_mistakes_are_told_with_the_fix(self, balms, chain):
        assert "did you mean 'batch_size'" in error_of(balms("pretrain", chain.manifest, "--set", "batchsize=3"), 2)
        assert "balanced" in error_of(balms("retrain", chain.pretrained, "--loss", "blanced"), 2)
        assert "quick or general" in error_of(balms("pretrain", chain.manifest, "--preset", "paper"), 2)
        assert "cuda" in error_of(balms("pretrain", chain.manifest, "--device", "cuda:9", *SMALL), 2)
        assert "resnet18" in error_of(balms("pretrain", chain.manifest, "--backbone", "resnet19"), 2)
        assert balms("pretrain", "--no-such-option").code == 2
        assert balms("no-such-command").code == 2

    def test_dry_run_checks_everything_and_writes_nothing(self, balms, chain, tmp_path):
        planned = balms("pretrain", chain.manifest, *SMALL, "--dry-run")
        assert planned.code == 0 and planned.out == "" and "12 of 16" in planned.err and "minutes" in planned.err
        assert balms("retrain", chain.pretrained, *FEW, "--dry-run").code == 0
        assert balms("make-lt", chain.photos, "--as-is", "--dry-run").code == 0
        assert not (tmp_path / "ws").exists()

    def test_resume_takes_no_other_training_option(self, balms, chain):
        given = ["--lr", "0.2", "--set", "steps=3", "--out", "x", "--config", "y", "--preset", "z", "--overwrite", "--dry-run"]
        told = error_of(balms("pretrain", chain.manifest, "--resume", chain.pretrained, *given, "--print-config"), 2)
        assert told.endswith("(given: --lr, --config, --preset, --out, --data, --set, --overwrite, --dry-run, --print-config)")
        assert balms("pretrain", "--resume", chain.pretrained).out.strip() == str(chain.pretrained)  # complete: nothing to do
        assert "balms pretrain --resume" in error_of(balms("retrain", "--resume", chain.pretrained), 4)
        assert "not a run" in error_of(balms("retrain", "--resume", chain.photos), 4)

    def test_interrupted_before_the_first_step_or_after_the_last(self, balms, chain, tmp_path, monkeypatch):
        from balms_cli.stages import decoupled, retrain

        def stop(*_, **__):
            raise KeyboardInterrupt

        for place, name in ((decoupled, "read_features"), (retrain, "finish")):
            out = tmp_path / name
            with monkeypatch.context() as patch:
                patch.setattr(place, name, stop)
                told = error_of(balms("retrain", chain.pretrained, *FEW, "--out", out, "--quiet"), 130)
            assert told.endswith(f"go on with: balms retrain --resume {out}")
            assert balms("retrain", "--resume", out, "--quiet").out == f"{out}\n"
        monkeypatch.setattr(retrain, "run", stop)
        told = error_of(balms("retrain", chain.pretrained, *FEW, "--out", tmp_path / "none", "--quiet"), 130)
        assert told == "error: interrupted; run the same command again" and not (tmp_path / "none").exists()

    def test_a_restart_of_torchrun_goes_on_with_its_own_run_alone(self, balms, chain, tmp_path, monkeypatch):
        """torchrun starts again after every exit code but 0, also after that of a refusal."""
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        command = ["pretrain", str(chain.manifest), *SMALL, "--out", str(tmp_path / "r"), "--quiet"]
        monkeypatch.setattr(sys, "argv", ["balms", *command])
        assert balms(*command).code == 0
        before = (tmp_path / "r" / "model.safetensors").read_bytes()
        assert balms(*command).out.strip() == str(tmp_path / "r")  # the same command: complete
        monkeypatch.setattr(sys, "argv", ["balms", *command, "--seed", "1"])
        assert "is not empty" in error_of(balms(*command, "--seed", "1"), 2)
        assert (tmp_path / "r" / "model.safetensors").read_bytes() == before
        monkeypatch.setattr(sys, "argv", ["balms", *command, "--seed", "1", "--overwrite"])
        assert balms(*command, "--seed", "1", "--overwrite").code == 0
        assert (tmp_path / "r" / "model.safetensors").read_bytes() != before
        assert tomllib.loads((tmp_path / "r" / "config.toml").read_text())["pretrain"]["seed"] == 1

    def test_a_run_goes_on_with_the_data_and_the_checkpoint_that_it_began_with(self, balms, chain, tmp_path):
        data, parent, run = tmp_path / "data", tmp_path / "parent", tmp_path / "run"
        shutil.copytree(chain.manifest, data)
        shutil.copytree(chain.pretrained, parent)
        assert balms("retrain", parent, "--data", data, *FEW, "--out", run).code == 0
        (run / "model.safetensors").unlink()  # as if stopped before its end
        assert balms("retrain", "--resume", run).code == 0
        (run / "model.safetensors").unlink()
        other = tmp_path / "other"
        assert balms("make-lt", chain.photos, "--imbalance", "20", "--out", other).code == 0
        shutil.rmtree(data)
        shutil.copytree(other, data)
        assert f"{data} is no longer the data" in error_of(balms("retrain", "--resume", run), 4)
        shutil.rmtree(data)
        assert error_of(balms("retrain", "--resume", run), 3)
        shutil.copytree(chain.manifest, data)
        with (parent / "model.safetensors").open("ab") as file:
            file.write(b" ")
        assert "is no longer the checkpoint" in error_of(balms("retrain", "--resume", run), 4)
        (parent / "model.safetensors").unlink()
        assert "is no longer the checkpoint" in error_of(balms("retrain", "--resume", run), 4)

    def test_data_that_is_gone_is_asked_for(self, balms, chain, tmp_path):
        data = tmp_path / "data"
        shutil.copytree(chain.manifest, data)
        trained = balms("pretrain", data, *SMALL, "--quiet").out.strip()
        shutil.rmtree(data)
        told = error_of(balms("retrain", trained, *FEW), 3)
        assert f"no longer at {data}; say where it is by --data" in told
        assert balms("retrain", trained, *FEW, "--data", chain.manifest, "--quiet").code == 0

    def test_seeds_repeat_and_differ(self, balms, chain):
        def head(*more):
            return (Path(balms("retrain", chain.pretrained, *FEW, *more).out.strip()) / "model.safetensors").read_bytes()[-64:]

        assert head("--seed", "4") == head("--seed", "4") != head("--seed", "5")

    def test_version_and_the_commands_of_detect(self, balms):
        from balms_cli import __version__

        assert balms("--version").out == f"balms {__version__}\n"
        told = balms("detect", "--help").out
        assert all(f" {name} " in told for name in ("stats", "train", "finetune", "evaluate", "predict"))
        assert balms("detect", "train", "--x", "3").code == 2

    def test_help_is_readable_where_terminals_are_forced(self, monkeypatch):
        monkeypatch.setenv("GITHUB_ACTIONS", "1")
        import re

        plain = re.sub(r"\x1b\[[0-9;]*m", "", invoke("retrain", "--help").out)
        assert "--meta-sampler" in plain and "--hypergradient" in plain


class TestMetaSample:
    def test_rates_are_written_shown_and_used(self, balms, chain):
        folder = Path(balms("meta-sample", chain.pretrained, "--loss", "softmax", *FEW).out.strip())
        document = json.loads((folder / "rates.json").read_text())
        values = list(document["rates"].values())
        mean = sum(values) / 3
        assert document["variance"] == pytest.approx(sum((v - mean) ** 2 for v in values) / 3, abs=1e-6)
        rows = (folder / "rates.csv").read_text().splitlines()
        assert rows[0] == "class,train_count,rate" and [r.split(",")[:2] for r in rows[1:]] == [
            ["cat", "32"],
            ["dog", "12"],
            ["emu", "5"],
        ]
        assert Image.open(folder / "rates.png").width > 600
        used = Path(balms("retrain", chain.pretrained, *FEW, "--sampler", folder / "rates.json").out.strip())
        assert json.loads((used / "report.json").read_text())["sampler"].endswith("rates.json")
        assert balms("meta-sample", "--resume", folder).out.strip() == str(folder)

    def test_rates_of_other_classes_or_of_nothing_are_refused(self, balms, chain, tmp_path):
        for text, told in (('{"rates": {"cat": 0.5}}', "classes are not"), ("{}", "not a rates.json"),
                           ("[1]", "not a rates.json"),
                           ('{"rates": {"cat": 0.5, "dog": -1, "emu": 0.5}}', "above 0")):  # fmt: skip
            (tmp_path / "r.json").write_text(text)
            assert told in error_of(balms("retrain", chain.pretrained, *FEW, "--sampler", tmp_path / "r.json"), 3)
        assert "not a rates.json" in error_of(balms("retrain", chain.pretrained, "--sampler", "gone.json"), 3)


class TestGates:
    def test_a_gate_passes_fails_or_is_refused(self, balms, chain):
        assert balms("evaluate", chain.pretrained, "--require", "top1>=0").code == 0
        failed = balms("evaluate", chain.pretrained, "--require", "top1<0", "--json")
        assert failed.code == 6 and "top1" in json.loads(failed.out) and "is not met" in failed.err
        assert "empty" in error_of(balms("evaluate", chain.pretrained, "--require", "many<=1"), 2)
        assert "say where by " in error_of(balms("evaluate", chain.pretrained, "--overwrite"), 2)
        assert "did you mean 'few'" in error_of(balms("evaluate", chain.pretrained, "--require", "fwe>=0"), 2)


class TestBadInput:
    def test_missing_and_unreadable_images(self, balms, tmp_path):
        photos = draw_photos(tmp_path / "photos", {"cat": 8, "dog": 5})
        (photos / "cat" / "001.png").write_bytes(b"not a picture")
        torn = photos / "dog" / "002.png"
        torn.write_bytes(torn.read_bytes()[:80])
        told = error_of(balms("make-lt", photos, "--as-is"), 3)
        assert "2 of 13" in told and "cat/001.png" in told and "--skip-bad" in told
        made = json.loads(balms("make-lt", photos, "--as-is", "--skip-bad", "--json").out)
        assert made["skipped"] == 2 and made["total"] + made["splits"]["test"] == 11
        gone = Path(made["manifest"])
        keys = (gone / "train.csv").read_text().splitlines()[1].split(",")[0]
        (photos / keys).unlink()
        assert keys in error_of(balms("pretrain", gone, *SMALL), 3)
        assert not list((tmp_path / "ws").glob("runs/*"))

    def test_mismatched_classes(self, balms, chain, tmp_path):
        photos = draw_photos(tmp_path / "photos", {"cat": 8, "dog": 5, "fox": 4})
        other = balms("make-lt", photos, "--as-is").out.strip()
        told = error_of(balms("retrain", chain.pretrained, "--data", other, *FEW), 4)
        assert "fox" in told and "emu" in told
        assert error_of(balms("evaluate", chain.pretrained, "--data", other), 4)

    def test_the_same_classes_in_another_order_are_matched_by_name(self, balms, chain, tmp_path):
        """Another draw makes 'emu' the head: labels change places, accuracies must not."""
        photos = draw_photos(tmp_path / "photos", {"cat": 8, "dog": 9, "emu": 30})
        other = balms("make-lt", photos, "--as-is").out.strip()
        found = json.loads(balms("evaluate", chain.pretrained, "--data", other, "--json").out)
        assert [c["name"] for c in found["per_class"]] == ["emu", "dog", "cat"]
        assert [c["train_count"] for c in found["per_class"]] == [5, 12, 32]  # of the checkpoint: what it learned from
        head_first = {c["name"]: c["accuracy"] for c in found["per_class"]}
        import torch

        from balms_cli.data.images import load_pixels
        from balms_cli.data.manifest import Manifest
        from balms_cli.data.transforms import normalise
        from balms_cli.engine.checkpoint import load_model

        model, header = load_model(chain.pretrained / "model.safetensors")
        manifest = Manifest.load(other)
        pixels = torch.from_numpy(load_pixels(manifest, "test", 16))
        with torch.no_grad():
            guesses = model(normalise(pixels, torch.tensor(header.mean), torch.tensor(header.std))).argmax(1)
        names = [header.classes[g] for g in guesses.tolist()]
        truth = [manifest.classes[y] for y in manifest.splits["test"].labels]
        for name in truth:
            right = [n == t for n, t in zip(names, truth, strict=True) if t == name]
            assert head_first[name] == pytest.approx(sum(right) / len(right))

    def test_data_that_moved_and_checkpoints_that_are_none(self, balms, chain, tmp_path):
        (tmp_path / "x.safetensors").write_bytes(b"12345678{}")
        assert error_of(balms("evaluate", tmp_path / "x.safetensors"), 4)
        assert "no such checkpoint" in error_of(balms("evaluate", tmp_path / "none"), 4)
        assert error_of(balms("pretrain", tmp_path / "none"), 3)

    def test_a_diverging_run_is_exit_5(self, balms, chain):
        outcome = balms("pretrain", chain.manifest, *SMALL, "--set", "lr=1e30", "--precision", "fp32")
        assert "not finite" in error_of(outcome, 5) and "--lr" in outcome.err and "checkpoint" not in outcome.err

    def test_a_frozen_run_has_no_classifier_until_it_is_retrained(self, balms, chain):
        frozen = balms("pretrain", chain.manifest, *SMALL, "--frozen", "--weights", chain.pretrained / "model.safetensors")
        assert frozen.code == 0, frozen.err
        assert "run balms retrain" in error_of(balms("evaluate", frozen.out.strip()), 4)
        assert balms("evaluate", "-", stdin=balms("retrain", "-", *FEW, stdin=frozen.out).out).code == 0

    def test_no_meta_split(self, balms, chain):
        told = error_of(balms("retrain", chain.pretrained, *FEW, "--meta-sampler", "--meta-set", "meta"), 2)
        assert "--meta-per-class" in told

    def test_large_photos_at_32_px_are_warned_of(self, balms, tmp_path):
        photos = draw_photos(tmp_path / "photos", {"cat": 6, "dog": 4}, size=200)
        manifest = balms("make-lt", photos, "--as-is").out.strip()
        small = balms("pretrain", manifest, "--backbone", "resnet8", "--image-size", "32", "--steps", "2", "--batch-size", "4")
        assert "shrunk to 32 px" in small.err and small.code == 0

    @pytest.mark.parametrize("place", ["fsync", "write"])
    def test_a_full_disk_is_one_line_and_leaves_no_model(self, balms, chain, tmp_path, monkeypatch, place):
        from balms_cli.engine import checkpoint

        def full(*_):
            raise OSError(28, "No space left on device")

        if place == "fsync":
            monkeypatch.setattr(os, "fsync", full)
        else:
            monkeypatch.setattr(checkpoint, "replace_file", full)
        out = tmp_path / "run"
        assert "No space left" in error_of(balms("pretrain", chain.manifest, *SMALL, "--out", out), 3)
        assert not (out / "model.safetensors").exists() and not list(out.glob(".*"))

    def test_a_read_only_out_is_one_line(self, balms, chain, tmp_path, monkeypatch):
        (tmp_path / "ro").mkdir(mode=0o500)
        if os.geteuid() == 0:  # root may write anywhere: answer for it as the system answers everyone else
            access = os.access
            monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "ro" and access(path, mode))
        assert "cannot write" in error_of(balms("pretrain", chain.manifest, *SMALL, "--out", tmp_path / "ro" / "x"), 2)
        assert not list((tmp_path / "ro").iterdir())

    def test_names_that_no_folder_can_have(self, balms, chain, tmp_path):
        for name, told in (("x" * 300, "too long"), ("a\nb", r"a\nb has control"), ("run\udcff", "not UTF-8")):
            assert told in error_of(balms("pretrain", chain.manifest, *SMALL, "--out", tmp_path / name), 2)
        assert "control characters" in error_of(balms("pretrain", chain.manifest, *SMALL, "--workspace", tmp_path / "\x1b"), 2)
        assert list(tmp_path.iterdir()) == []
        photos = draw_photos(tmp_path / "run\udcff" / "photos", {"cat": 5, "dog": 4})
        assert "not UTF-8: rename it" in error_of(balms("make-lt", photos, "--as-is"), 2)

    def test_what_may_not_be_read_is_not_told_as_written(self, balms, chain, monkeypatch):
        from balms_cli.cli import inputs

        def forbidden(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(inputs, "model_file", forbidden)
        told = error_of(balms("evaluate", chain.pretrained), 2)
        assert told.startswith(f"error: {chain.pretrained}: Permission denied") and "write" not in told

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] CPUAllocator: can't allocate memory")])
    def test_too_large_a_batch_is_no_bug(self, balms, chain, monkeypatch, error):
        from balms_cli.stages import evaluate

        monkeypatch.setattr(evaluate, "summarise", lambda *_: (_ for _ in ()).throw(error))
        assert "give a smaller --batch-size" in error_of(balms("evaluate", chain.pretrained, "--quiet"), 1)

    def test_out_below_a_file_is_one_line(self, balms, chain, tmp_path):
        (tmp_path / "file").write_text("")
        assert "cannot write" in error_of(balms("pretrain", chain.manifest, *SMALL, "--out", tmp_path / "file" / "x"), 2)


def test_a_bug_of_ours_is_exit_1_and_the_traceback_comes_with_debug(balms, chain, monkeypatch):
    from balms_cli.stages import evaluate

    def bug(*_):
        raise TypeError("a message of torch's\nwhich has\nmany lines")

    monkeypatch.setattr(evaluate, "summarise", bug)
    assert "TypeError: a message of torch's (a bug" in error_of(balms("evaluate", chain.pretrained, "--quiet"), 1)
    monkeypatch.setenv("RANK", "1")  # of several processes each tells a bug of its own; process 0 what all of them met
    assert "TypeError" in error_of(balms("evaluate", chain.pretrained, "--quiet"), 1)
    mistake = balms("evaluate", chain.pretrained, "--quiet", "--require", "fwe>=0")
    assert (mistake.code, mistake.err) == (2, "")
    assert "Traceback" in balms("evaluate", chain.pretrained, "--quiet", "--debug").err


@pytest.mark.parametrize("start", ["module", "script"])
def test_ctrl_c_while_the_command_is_imported_is_one_line(tmp_path, start):
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n")
    root = Path(__file__).parents[1]
    place, name = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]["balms"].split(":")
    how = ["-m", "balms_cli"] if start == "module" else ["-c", f"from {place} import {name}; {name}()"]
    done = subprocess.run([sys.executable, *how, "--version"], capture_output=True, text=True, check=False, timeout=60,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"})  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted; run the same command again\n")


@pytest.mark.parametrize("stage", ["retrain", "meta-sample", "audit"])
def test_a_stage_that_takes_one_refuses_several_on_stdin(chain, stage):
    named = chain.manifest if stage == "audit" else chain.pretrained
    refused = invoke(stage, "-", stdin=f"{named}\n{named}\n")
    assert refused.code == 2 and "stdin names 2" in refused.err and refused.out == ""


def test_a_run_goes_on_only_with_the_rates_that_it_began_with(chain, tmp_path):
    rates, run = tmp_path / "rates.json", tmp_path / "run"
    rates.write_text(json.dumps({"rates": {"cat": 1.0, "dog": 2.0, "emu": 3.0}}))
    with interrupted_after(3):
        assert invoke("retrain", chain.pretrained, *FEW, "--sampler", rates, "--out", run, "-q").code == 130
    told = rates.read_text()
    rates.write_text(told.replace("3.0", "4.0"))
    assert "no longer has the rates" in error_of(invoke("retrain", "--resume", run), 4)
    rates.write_text(told)
    assert invoke("retrain", "--resume", run, "-q").code == 0
