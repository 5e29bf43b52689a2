"""The loop: a stopped and resumed run equals one that never stopped; a bad loss stops it; signals are heard."""

import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from balms_cli.engine import loop
from balms_cli.engine.loop import Job, stop_signals, train
from balms_cli.engine.run_dir import RunDir, clear_run
from balms_cli.errors import CheckpointError, ConfigError, DivergedError, Interrupted
from balms_cli.reporter import Reporter, Task

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
    _, job = regression(steps=205)
    seen.clear()
    inner3 = job.step
    job.step = lambda i, guard: (seen.append(inner3(i, guard)), seen[-1])[1]
    run(job, RunDir(tmp_path / "t"))
    *_, last = losses(RunDir(tmp_path / "t"))
    assert last == {"step": 205, "loss": pytest.approx(seen[-1].item()), "lr": 0.1 / 205}


@pytest.mark.parametrize("checkpoint_seconds, saved, logged", [(1e-9, 25, 24), (1e9, None, 24)])
def test_a_bad_loss_that_is_told_late_is_neither_logged_nor_saved(tmp_path, checkpoint_seconds, saved, logged):
    """As on a GPU, where no step waits for its loss: the guard only notes that step 26 went wrong."""
    _, job = regression()
    inner = job.step

    def step(i, guard):
        if i == 25:
            guard.bad.fill_(1)
        return inner(i, guard)

    job.step, folder = step, RunDir(tmp_path / "r")
    folder.path.mkdir()
    with pytest.raises(DivergedError) as told:
        train(job, folder, CPU, Reporter(), resume=False, checkpoint_seconds=checkpoint_seconds)
    assert ("the last checkpoint is whole (" + str(folder / "resume.pt") in str(told.value)) == (saved is not None)
    assert losses(folder)[-1]["step"] == logged
    at = folder / "resume.pt"
    assert (torch.load(at, weights_only=True)["step"] if at.exists() else None) == saved


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


def test_resume_without_a_checkpoint_starts_from_the_first_step_and_says_so(tmp_path, monkeypatch):
    whole, job = regression(steps=50)
    run(job, RunDir(tmp_path / "whole"))
    again, job = regression(steps=50)
    folder = RunDir(tmp_path / "again")
    folder.path.mkdir()
    folder.append_metrics({"step": 5, "loss": 9.0})  # logged before a kill that left no checkpoint
    warned = []
    monkeypatch.setattr(Reporter, "warn", lambda self, message: warned.append(message))
    run(job, folder, resume=True)
    assert len(warned) == 1 and "resume.pt is not there" in warned[0] and warned[0].endswith("training starts from step 0")
    assert torch.equal(whole.weight, again.weight) and losses(folder) == losses(RunDir(tmp_path / "whole"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x80\x04."])
def test_a_damaged_resume_file_is_refused(tmp_path, content):
    _, job = regression()
    folder = RunDir(tmp_path / "r")
    folder.path.mkdir()
    (folder / "resume.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"resume\.pt"):
        run(job, folder, resume=True)


def test_time_and_progress_over_three_sittings(tmp_path, monkeypatch):
    """A second a step by the clock of the test, so 8 images a second in every line: 10 steps a line, cut at the 9th and 1st."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])

    def ticking(**options):
        _, job = regression(steps=1000, **options)
        inner = job.step

        def step(i, guard):
            now[0] += 1
            return inner(i, guard)

        job.step = step
        return job

    class Told(Reporter, Task):
        skipped = done = 0

        @contextmanager
        def task(self, *_):
            yield self

        def skip(self, amount):
            self.skipped += amount

        def advance(self, amount=1, **_):
            self.done += amount

    saves, save = [], loop._save
    monkeypatch.setattr(loop, "_save", lambda job, run, step, *rest: (saves.append(step), save(job, run, step, *rest)))
    folder, told = RunDir(tmp_path / "r"), [Told() for _ in range(3)]
    folder.path.mkdir()
    for i, cut in enumerate((508, 700)):
        with pytest.raises(Interrupted):
            train(ticking(stop_at=cut), folder, CPU, told[i], resume=i > 0, checkpoint_seconds=99.5)
    spent = train(ticking(stop_at=999), folder, CPU, told[2], resume=True, checkpoint_seconds=99.5)
    assert spent == 1000  # asked to stop after its last step, it is through
    assert saves == [100, 200, 300, 400, 500, 509, 609, 701, 801, 901, 1000, 1000]
    paces = [json.loads(line)["images_per_second"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert paces == [8.0] * 100
    assert [(one.skipped, one.done) for one in told] == [(0, 500), (509, 191), (701, 299)]
    assert all(record["lr"] == 0.1 / record["step"] for record in losses(folder))


def stopped(folder, config='[pretrain]\nlr = 0.1\nsteps = 300\nworkers = 2\nweights = "a.pt"\n'):
    """A run with this ``config.toml``, cut after 21 of 300 steps."""
    folder.path.mkdir()
    (folder / "config.toml").write_text(config)
    with pytest.raises(Interrupted):
        run(regression(stop_at=20)[1], folder)
    return folder


def test_a_run_goes_on_only_with_the_configuration_that_it_began_with(tmp_path):
    folder = stopped(RunDir(tmp_path / "r"))
    (folder / "config.toml").write_text("[pretrain]\nlr = 0.2\nsteps = 300\ndrw = true\n")
    with pytest.raises(CheckpointError, match=r"config\.toml was changed \(drw, lr\)"):
        run(regression()[1], folder, resume=True)
    # How and where it is computed may change, and a run of an older version says nothing of it.
    (folder / "config.toml").write_text('[pretrain]\nlr = 0.1\nsteps = 300\nworkers = 1\nweights = "b.pt"\n')
    state = torch.load(folder / "resume.pt", weights_only=True)
    run(regression()[1], folder, resume=True)
    del state["recipe"]
    torch.save(state, folder / "resume.pt")
    (folder / "config.toml").write_text("[pretrain]\nlr = 0.2\n")
    run(regression()[1], folder, resume=True)


@pytest.mark.parametrize("spoil", [
    lambda state: state.pop("seconds"), lambda state: state.update(window=3.0), lambda state: state.update(step=301),
    lambda state: state.update(step=-1), lambda state: state["parts"].pop("optimizer"), lambda state: state.update(parts=[1]),
    lambda state: state["parts"].update(model={"weight": torch.zeros(1, 4), "bias": torch.zeros(1)}),
    lambda state: state["parts"].update(optimizer={}),
])  # fmt: skip
def test_the_state_of_another_run_is_refused(tmp_path, spoil):
    folder = stopped(RunDir(tmp_path / "r"))
    state = torch.load(folder / "resume.pt", weights_only=True)
    spoil(state)
    torch.save(state, folder / "resume.pt")
    log = (folder / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match=r"resume\.pt is not of this run"):
        run(regression()[1], folder, resume=True)
    assert (folder / "metrics.jsonl").read_text() == log


def test_a_resume_file_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    folder = stopped(RunDir(tmp_path / "r"))
    whole = folder / "resume.pt"
    with zipfile.ZipFile(whole) as plain, zipfile.ZipFile(tmp_path / "small", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    os.replace(tmp_path / "small", whole)
    with pytest.raises(CheckpointError, match="damaged"):
        run(regression()[1], folder, resume=True)


def test_a_log_line_torn_by_a_crash_is_forgotten(tmp_path):
    folder = stopped(RunDir(tmp_path / "r"))
    with (folder / "metrics.jsonl").open("ab") as log:
        log.write(b'{"step": 22, "loss": 1.0}\n{"step": 3, "lo\n\x00\xff\x00')
    (folder / ".new-4711-resume.pt").write_bytes(b"half wri")
    run(regression()[1], folder, resume=True)
    assert [record["step"] for record in losses(folder)] == list(range(3, 301, 3))
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.toml", "metrics.jsonl", "resume.pt"]


def test_of_several_processes_the_others_write_nothing(tmp_path):
    folder = RunDir(tmp_path / "r", writes=False)
    run(regression(steps=20)[1], folder)
    clear_run(folder)
    folder.write_json("report.json", {})
    assert list(folder.path.iterdir()) == []


def test_a_folder_is_trained_in_by_one_process(tmp_path):
    folder, holds = stopped(RunDir(tmp_path / "r")), "import sys; from pathlib import Path\n"
    holds += "from balms_cli.engine.run_dir import RunDir\n"
    holds += "with RunDir(Path(sys.argv[1])).alone(): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", holds, folder.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    before = {p.name: p.read_bytes() for p in folder.path.iterdir()}
    for act in (lambda: run(regression()[1], folder, resume=True), lambda: clear_run(folder)):
        with pytest.raises(ConfigError, match="another process is at work"):
            act()
    assert {p.name: p.read_bytes() for p in folder.path.iterdir()} == before
    other.kill()  # as abruptly as can be
    other.wait()
    run(regression()[1], folder, resume=True)
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.toml", "metrics.jsonl", "resume.pt"]


def test_a_resume_file_never_runs_code(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    folder = RunDir(tmp_path / "r")
    folder.path.mkdir()
    _, job = regression()
    (folder / "resume.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        run(job, folder, resume=True)
    torch.save({"step": 3, "parts": Bomb()}, folder / "resume.pt")
    with pytest.raises(CheckpointError, match="damaged"):
        run(job, folder, resume=True)
    assert not (tmp_path / "exploded").exists()


def test_signals_at_once_are_one_a_later_one_stops_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_signals() as flag:
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # from a scheduler, and passed on by torchrun
            os.kill(os.getpid(), signum)
        assert flag.requested
        flag.since -= 1.1
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_who_stops_at_once_is_told_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "ONE_STOP_SECONDS", -1)
    _, job = regression()
    inner = job.step

    def step(i, guard):
        if i == 30:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return inner(i, guard)

    job.step, folder = step, RunDir(tmp_path / "r")
    folder.path.mkdir()
    with pytest.raises(Interrupted, match=rf"go on with: balms pretrain --resume {folder.path}"):
        train(job, folder, CPU, Reporter(), resume=False, checkpoint_seconds=1e-9)
    assert torch.load(folder / "resume.pt", weights_only=True)["step"] == 30


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
