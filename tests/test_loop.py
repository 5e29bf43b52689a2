"""The loop: a stopped and resumed run equals one that never stopped; a bad loss stops it; signals are heard."""

import json
import os
import signal
import threading

import pytest
import torch
from torch import nn

from balms_cli.engine.loop import Job, stop_signals, train
from balms_cli.engine.run_dir import RunDir
from balms_cli.errors import CheckpointError, DivergedError, Interrupted
from balms_cli.reporter import Reporter

from .conftest import SMALL, invoke

CPU = torch.device("cpu")


def regression(steps=300, stop_at=None, spoil_at=None):
    """A linear regression whose batches are a function of the step; sends itself SIGINT at ``stop_at``."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)

    def step(i, guard):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(i))
        value = (model(x) - x.sum(1, keepdim=True)).square().mean() * (float("inf") if i == spoil_at else 1)
        optimizer.zero_grad()
        value.backward()
        guard.step(value, optimizer)
        if i == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return value.detach()

    return model, Job("pretrain", steps, {"model": model, "optimizer": optimizer}, optimizer, lambda i: 0.1 / (1 + i), step, 8)


def run(job, folder, resume=False):
    folder.path.mkdir(parents=True, exist_ok=True)
    return train(job, folder, CPU, Reporter(), resume=resume, checkpoint_seconds=1e9)


def losses(folder):
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("_per_second")}
            for line in (folder / "metrics.jsonl").read_text().splitlines()]  # fmt: skip


@pytest.mark.parametrize("cut", [0, 1, 150, 151, 298])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, cut):
    whole, job = regression()
    run(job, RunDir(tmp_path / "whole"))
    _, job = regression(stop_at=cut)
    with pytest.raises(Interrupted, match=rf"after step {cut + 1} of 300; go on with: balms pretrain --resume"):
        run(job, RunDir(tmp_path / "cut"))
    model, job = regression()
    with torch.no_grad():
        model.weight.add_(1)  # whatever the fresh model is, the checkpoint decides
    run(job, RunDir(tmp_path / "cut"), resume=True)
    assert torch.equal(model.weight, whole.weight) and torch.equal(model.bias, whole.bias)
    assert losses(RunDir(tmp_path / "cut")) == losses(RunDir(tmp_path / "whole"))


def test_the_logged_loss_is_the_mean_of_its_window(tmp_path):
    _, job = regression(steps=7)
    seen = []
    inner = job.step
    job.step = lambda i, guard: (seen.append(inner(i, guard)), seen[-1])[1]
    run(job, RunDir(tmp_path / "r"))
    assert [r["loss"] for r in losses(RunDir(tmp_path / "r"))] == pytest.approx([v.item() for v in seen])
    _, job = regression(steps=250)  # two steps a line
    seen.clear()
    inner2 = job.step
    job.step = lambda i, guard: (seen.append(inner2(i, guard)), seen[-1])[1]
    run(job, RunDir(tmp_path / "s"))
    pairs = [(seen[i].item() + seen[i + 1].item()) / 2 for i in range(0, 250, 2)]
    assert [r["loss"] for r in losses(RunDir(tmp_path / "s"))] == pytest.approx(pairs)
    assert [r["step"] for r in losses(RunDir(tmp_path / "s"))] == list(range(2, 251, 2))


def test_a_bad_loss_stops_before_its_step_and_keeps_the_last_checkpoint(tmp_path):
    model, job = regression(stop_at=20)
    with pytest.raises(Interrupted):
        run(job, RunDir(tmp_path / "r"))
    saved = (tmp_path / "r" / "resume.pt").read_bytes()
    model, job = regression(spoil_at=25)
    with pytest.raises(DivergedError, match="by step 25"):
        run(job, RunDir(tmp_path / "r"), resume=True)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert (tmp_path / "r" / "resume.pt").read_bytes() == saved


def test_resume_without_a_checkpoint_starts_from_the_first_step(tmp_path):
    whole, job = regression(steps=50)
    run(job, RunDir(tmp_path / "whole"))
    again, job = regression(steps=50)
    folder = RunDir(tmp_path / "again")
    folder.path.mkdir()
    folder.append_metrics({"step": 5, "loss": 9.0})  # logged before a kill that left no checkpoint
    run(job, folder, resume=True)
    assert torch.equal(whole.weight, again.weight) and losses(folder) == losses(RunDir(tmp_path / "whole"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x80\x04."])
def test_a_damaged_resume_file_is_refused(tmp_path, content):
    _, job = regression()
    folder = RunDir(tmp_path / "r")
    folder.path.mkdir()
    (folder / "resume.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"resume\.pt"):
        run(job, folder, resume=True)


def test_a_resume_file_never_runs_code(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    folder = RunDir(tmp_path / "r")
    folder.path.mkdir()
    (folder / "resume.pt").write_bytes(pickle.dumps(Bomb()))
    _, job = regression()
    with pytest.raises(CheckpointError):
        run(job, folder, resume=True)
    assert not (tmp_path / "exploded").exists()


def test_a_second_signal_stops_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_signals() as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.requested
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_training_in_a_thread_takes_no_signals(tmp_path):
    _, job = regression(steps=20)
    worker = threading.Thread(target=run, args=(job, RunDir(tmp_path / "r")))
    worker.start()
    worker.join()
    assert (tmp_path / "r" / "resume.pt").is_file()


def weights(run_path):
    from safetensors.torch import load_file

    return load_file(run_path / "model.safetensors")


STAGES = {
    "pretrain": ["pretrain", *SMALL],
    "pretrain from disk": ["pretrain", *SMALL, "--set", "loading=disk", "--set", "augment=['resized-crop']", "--workers", "1"],
    "pretrain l2rw": ["pretrain", *SMALL, "--reweight", "l2rw", "--set", "meta_batch_size=8"],
    "retrain plain": ["retrain", "--sampler", "class", "--steps", "40"],
    "retrain meta": ["retrain", "--meta-sampler", "--steps", "40"],
    "retrain reweigher": ["retrain", "--meta-reweigher", "--steps", "40"],
    "retrain online": ["retrain", "--meta-sampler", "--steps", "12", "--features", "online", "--batch-size", "8"],
    "meta-sample": ["meta-sample", "--steps", "40"],
}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("cut", [1, 7, 11])
def test_every_stage_resumes_bit_for_bit(chain, tmp_path, monkeypatch, name, cut):
    """Stopped after ``cut`` steps by a signal, then resumed: the same weights, log and rates as in one go, also with
    another number of decoder threads."""
    stage, *options = STAGES[name]
    source = chain.manifest if stage == "pretrain" else chain.pretrained
    options += ["--set", "meta_batch_size=16", "--set", "class_rows=16"] if stage != "pretrain" else []
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    done = invoke(stage, source, *options, "--out", whole, "--quiet")
    assert done.code == 0, done.err

    from balms_cli.engine.optim import Guard

    taken, step = [], Guard.step

    def stop_after_cut(self, loss, *optimizers):
        step(self, loss, *optimizers)
        if any(isinstance(optimizer, torch.optim.SGD) for optimizer in optimizers):
            taken.append(1)
            if len(taken) == cut:
                os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Guard, "step", stop_after_cut)
        stopped = invoke(stage, source, *options, "--out", parted, "--quiet")
    assert stopped.code == 130 and f"balms {stage} --resume {parted}" in stopped.err and stopped.out == ""
    assert not (parted / "model.safetensors").exists() and not (parted / "rates.json").exists()
    resumed = invoke(stage, "--resume", parted, "--quiet", *(["--workers", "3"] if "disk" in name else []))
    assert resumed.code == 0, resumed.err
    assert resumed.out.strip() == str(parted)
    if stage != "meta-sample":
        first, second = weights(whole), weights(parted)
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert losses(RunDir(whole)) == losses(RunDir(parted))
    if "meta" in name:
        assert (whole / "rates.json").read_text() == (parted / "rates.json").read_text()
