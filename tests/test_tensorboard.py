"""TensorBoard: the numbers of metrics.jsonl, once a step also after a resume; training is the same with and without it."""

import itertools
import json
import os
import signal
import time
import tomllib
from types import SimpleNamespace

import pytest
import torch

from balms_cli.config import PretrainConfig
from balms_cli.engine import tensorboard
from balms_cli.engine.run_dir import RunDir
from balms_cli.engine.tensorboard import event_files
from balms_cli.errors import DivergedError, Interrupted

from .conftest import SMALL, invoke
from .test_loop import losses, regression, run, weights

pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
ON = PretrainConfig(tensorboard=True)


@pytest.fixture(autouse=True)
def sittings_a_second_apart(monkeypatch):
    """TensorBoard reads the files of a run by their names, which begin with the second they were opened in."""
    from tensorboard.summary.writer import event_file_writer

    clock = itertools.count(int(time.time()))
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: next(clock)))


def read(folder):
    """As TensorBoard itself reads a run: {tag: [(step, value), ...]}, and the accumulator."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}, found


def logged(folder):
    """What metrics.jsonl says, in the same form."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {name for record in records for name in record} - {"step"}
    return {name: [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records if name in r] for name in names}


def test_the_event_files_say_what_the_log_says_and_training_is_the_same(chain, tmp_path):
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    for folder, option in ((plain, []), (watched, ["--tensorboard"])):
        done = invoke("pretrain", chain.manifest, *SMALL, "--out", folder, "--quiet", *option)
        assert (done.code, done.out.strip(), done.err) == (0, str(folder), "")
    scalars, _ = read(watched)
    assert set(scalars) == {"loss", "lr", "images_per_second"} and scalars == logged(watched)
    assert [step for step, _ in scalars["loss"]] == list(range(1, 13))
    assert losses(RunDir(plain)) == losses(RunDir(watched)) and not (plain / "tensorboard").exists()
    first, second = weights(plain), weights(watched)
    assert all(torch.equal(first[k], second[k]) for k in first)
    (watched / "export").mkdir()
    done = invoke("pretrain", chain.manifest, *SMALL, "--out", watched, "--quiet", "--overwrite")
    assert done.code == 0 and not (watched / "tensorboard").exists()  # those of the run that was replaced
    assert not (watched / "export").exists()


LEARNERS = [("retrain", "--meta-sampler"), ("retrain", "--meta-reweigher"), ("meta-sample", "-q")]


@pytest.mark.parametrize("stage, option", LEARNERS)
def test_learned_rates_are_there_as_histogram_and_text(chain, tmp_path, stage, option):
    done = invoke(stage, chain.pretrained, option, "--steps", "20", "--set", "meta_batch_size=16", "--set", "class_rows=16",
                  "--out", tmp_path / "r", "--quiet", "--tensorboard")  # fmt: skip
    assert done.code == 0, done.err
    scalars, found = read(tmp_path / "r")
    assert scalars == logged(tmp_path / "r") and "rates_variance" in scalars
    rates = json.loads((tmp_path / "r" / "rates.json").read_text())["rates"]
    (event,) = found.Histograms("class_rates")
    assert event.step == 20 and event.histogram_value.num == 3
    assert event.histogram_value.sum == pytest.approx(sum(rates.values()), abs=1e-5)
    text = found.Tensors("class_rates/text_summary")[0].tensor_proto.string_val[0].decode()
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == ["| cat", "| dog", "| emu"]
    assert float(text.splitlines()[-1].split("|")[3]) == pytest.approx(rates["emu"], abs=1e-4)


def watched(job, folder, resume=False):
    with event_files(ON, folder):
        run(job, folder, resume=resume)


def test_a_resumed_run_has_every_step_once(tmp_path):
    """Logged up to step 75 by a sitting that died without a checkpoint after step 48: those are logged again."""
    folder = RunDir(tmp_path / "r")
    _, job = regression(stop_at=47)
    with pytest.raises(Interrupted):
        watched(job, folder)
    _, job = regression(spoil_at=75)
    with pytest.raises(DivergedError):
        watched(job, folder, resume=True)
    assert read(folder)[0]["loss"][-1][0] == 75  # beyond the checkpoint
    _, job = regression()
    watched(job, folder, resume=True)
    scalars, _ = read(folder)
    assert scalars == logged(folder) and [step for step, _ in scalars["loss"]] == list(range(3, 301, 3))
    whole, job = RunDir(tmp_path / "whole"), regression()[1]
    watched(job, whole)
    assert [value for _, value in read(whole)[0]["loss"]] == [value for _, value in scalars["loss"]]


def test_a_run_that_ended_but_for_its_rates_keeps_its_last_step(tmp_path):
    folder, rates = RunDir(tmp_path / "r"), torch.tensor([0.25, 0.5])
    watched(regression()[1], folder)
    with event_files(ON, folder) as events:
        events.rates(300, rates, ["a|b", "<i>c"], [3, 9])
    scalars, found = read(folder)
    assert scalars == logged(folder) and found.Histograms("class_rates")[0].histogram_value.sum == 0.75
    text = found.Tensors("class_rates/text_summary")[0].tensor_proto.string_val[0].decode().splitlines()
    assert text[2:] == ["| &#60;i&#62;c | 9 | 0.5000 |", "| a&#124;b | 3 | 0.2500 |"]  # a name is never markup


def test_it_can_be_turned_on_by_resume_and_is_remembered(chain, tmp_path, monkeypatch):
    from balms_cli.engine.optim import Guard

    taken, step = [], Guard.step

    def stop_at_7(self, loss, *optimizers):
        step(self, loss, *optimizers)
        taken.append(1)
        if len(taken) in (7, 10):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Guard, "step", stop_at_7)
    out = tmp_path / "r"
    assert invoke("pretrain", chain.manifest, *SMALL, "--out", out, "--quiet", "--tensorboard").code == 130
    text = (out / "config.toml").read_text()
    assert tomllib.loads(text)["pretrain"]["tensorboard"] is True
    # A run begun by a version without the option says nothing of it.
    (out / "config.toml").write_text("".join(line for line in text.splitlines(True) if not line.startswith("tensorboard")))
    assert invoke("pretrain", "--resume", out, "--quiet").code == 130
    assert read(out)[0]["loss"][-1][0] == 7
    resumed = invoke("pretrain", "--resume", out, "--quiet", "--tensorboard")
    assert resumed.code == 0, resumed.err
    assert [step for step, _ in read(out)[0]["loss"]] == [1, 2, 3, 4, 5, 6, 7, 11, 12]
    refused = invoke("pretrain", "--resume", out, "--tensorboard", "--lr", "0.1")
    assert refused.code == 2 and "(given: --lr)" in refused.err


def test_a_missing_package_is_told_before_anything_is_made(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    done = invoke("pretrain", chain.manifest, *SMALL, "--out", tmp_path / "r", "--tensorboard", "--quiet")
    assert done.code == 2 and done.err.count("\n") == 1 and "pip install 'balms[tensorboard]'" in done.err
    assert not (tmp_path / "r").exists()
    assert invoke("pretrain", chain.manifest, *SMALL, "--out", tmp_path / "r", "--quiet").code == 0  # not asked for: not needed


def test_what_the_log_has_is_on_disk_already(tmp_path):
    """A killed run closes nothing, and its checkpoint may be just behind."""
    folder = RunDir(tmp_path / "r")
    folder.path.mkdir()
    with event_files(ON, folder):
        folder.append_metrics({"step": 4, "loss": 2.5})
        assert read(folder)[0] == {"loss": [(4, 2.5)]}
    folder.append_metrics({"step": 8, "loss": 2.0})  # to the log alone
    assert read(folder)[0] == {"loss": [(4, 2.5)]}


def test_of_several_processes_only_the_one_that_writes_has_files(tmp_path):
    folder = RunDir(tmp_path / "r", writes=False)
    folder.path.mkdir()
    with event_files(ON, folder) as events:
        folder.append_metrics({"step": 1, "loss": 2.0})
        events.rates(1, torch.ones(1), ["a"], [1])
    assert list(folder.path.iterdir()) == []
