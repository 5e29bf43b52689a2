"""Shared fixtures: an isolated environment, the command line in process, and a small trained chain."""

import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

SMALL = ["--set", "image_size=16", "--backbone", "resnet8", "--steps", "12", "--batch-size", "16", "--lr", "0.05"]


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path_factory):
    """No setting of the machine reaches a test, and no test leaves one behind."""
    for name in [n for n in os.environ if n.startswith("BALMS_") and n != "BALMS_TEST_DATA"]:
        monkeypatch.delenv(name)
    for name in ("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("COLUMNS", "160")
    yield
    os.environ.pop("BALMS_DEBUG", None)


@dataclass
class Outcome:
    code: int
    out: str
    err: str


def invoke(*arguments, stdin: str | None = None) -> Outcome:
    """``balms ARGUMENTS`` in this process."""
    from balms_cli.cli.app import app

    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, prog_name="balms")
    return Outcome(result.exit_code, result.stdout, result.stderr)


@contextmanager
def interrupted_after(steps: int):
    """Within it SIGINT comes right after so many optimizer steps."""
    from balms_cli.engine.optim import Guard

    taken, step = [], Guard.step

    def counted(self, loss, *optimizers):
        step(self, loss, *optimizers)
        taken.append(1)
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "step", counted)
        yield


@pytest.fixture
def balms(tmp_path, monkeypatch):
    """The command line with a workspace of the test's own."""
    monkeypatch.setenv("BALMS_WORKSPACE", str(tmp_path / "ws"))
    return invoke


def draw_photos(root: Path, counts: dict[str, int], size: int = 24, seed: int = 0) -> Path:
    """Images a network can tell apart: noise over one colour a class."""
    rng = np.random.default_rng(seed)
    colours = rng.permutation([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40], [40, 200, 200], [160, 160, 160]])
    for colour, (name, count) in zip(colours, counts.items(), strict=False):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = rng.integers(-39, 39, (size, size, 3))
            Image.fromarray((colour + noise).astype(np.uint8)).save(root / name / f"{i:03}.png")
    return root


@dataclass(frozen=True)
class Chain:
    """A manifest of a small photo folder, and a pretrained run on it."""

    workspace: Path
    photos: Path
    manifest: Path
    pretrained: Path


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Chain:
    root = tmp_path_factory.mktemp("chain")
    photos = draw_photos(root / "photos", {"cat": 40, "dog": 15, "emu": 6})
    workspace = root / "ws"
    made = invoke("make-lt", photos, "--as-is", "--workspace", workspace, "--quiet")
    assert made.code == 0, made.err
    trained = invoke("pretrain", made.out.strip(), "--workspace", workspace, "--quiet", *SMALL)
    assert trained.code == 0, trained.err
    return Chain(workspace, photos, Path(made.out.strip()), Path(trained.out.strip()))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tensors here are tiny: a second thread only waits, and waits long where other work runs beside the tests."""
    import torch

    torch.set_num_threads(1)
