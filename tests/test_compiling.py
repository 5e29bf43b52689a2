"""Compiled networks: what --compile means, when it is chosen, and that training goes on as without."""

import os
import subprocess
import sys

import pytest
import torch

from balms_cli.engine import compiling
from balms_cli.engine.run_dir import RunDir
from balms_cli.reporter import Reporter

from .conftest import SMALL, interrupted_after, invoke
from .test_loop import losses, weights


@pytest.mark.slow
def test_a_compiled_network_trains_like_the_plain_one(chain, tmp_path):
    """The same sums in another order: the first losses agree to a part in a thousand, and the checkpoint has the same names."""
    for how in ("off", "on"):
        options = [*SMALL, "--compile", how, "--precision", "fp32"]
        done = invoke("pretrain", chain.manifest, *options, "--out", tmp_path / how, "--quiet")
        assert done.code == 0, done.err
    plain, compiled = losses(RunDir(tmp_path / "off")), losses(RunDir(tmp_path / "on"))
    assert [r["loss"] for r in compiled[:6]] == pytest.approx([r["loss"] for r in plain[:6]], rel=1e-3)
    assert weights(tmp_path / "on").keys() == weights(tmp_path / "off").keys()


@pytest.mark.slow
def test_a_long_training_is_compiled_by_itself_and_goes_on_bit_for_bit(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "PAYS", 0)  # every training is long
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    done = invoke("pretrain", chain.manifest, *SMALL, "--out", whole)
    assert done.code == 0 and "compiling the network first" in done.err
    with interrupted_after(7):
        assert invoke("pretrain", chain.manifest, *SMALL, "--out", parted, "--quiet").code == 130
    assert invoke("pretrain", "--resume", parted, "--quiet").code == 0
    first, second = weights(whole), weights(parted)
    assert all(torch.equal(first[k], second[k]) for k in first)
    plain = tmp_path / "plain"
    assert invoke("pretrain", chain.manifest, *SMALL, "--compile", "off", "--out", plain, "--quiet").code == 0
    assert any(not torch.equal(tensor, first[k]) for k, tensor in weights(plain).items())  # so it was compiled


@pytest.mark.parametrize(("how", "pixels", "works", "chosen", "told"), [
    ("auto", compiling.PAYS, True, "on", "compiling the network first"),
    ("auto", compiling.PAYS - 1, True, "off", ""),
    ("auto", compiling.PAYS, False, "off", "not compiled: no compiler at all"),
    ("off", compiling.PAYS, True, "off", ""),
    ("on", 1, True, "on", ""),
    ("cuda-graphs", 1, True, "cuda-graphs", ""),
])  # fmt: skip
def test_a_network_is_compiled_where_it_pays_and_can_be_done(monkeypatch, how, pixels, works, chosen, told):
    notes = []
    reporter = Reporter()
    reporter.note = notes.append
    monkeypatch.setattr(compiling, "_fails", lambda device: None if works else RuntimeError("no compiler at all\nand more"))
    assert compiling.choose_compile(how, pixels, torch.device("cpu"), reporter) == chosen
    assert (told in notes[0] and "\n" not in notes[0]) if told else not notes


@pytest.mark.slow
def test_without_a_compiler_one_line_says_so(chain, tmp_path):
    """The real toolchain, with a compiler that fails; torch's own cache is emptied so that it asks it."""
    environment = os.environ | {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "balms_cli", "pretrain", str(chain.manifest), *SMALL, "--compile", "on",
               "--device", "cpu", "--out", str(tmp_path / "no")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "g++ or clang++" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3 and not (tmp_path / "no").exists()


def test_compile_is_said_in_words_or_as_older_runs_say_it(chain, tmp_path):
    from balms_cli.config import PretrainConfig

    assert [PretrainConfig(compile=v).compile for v in (True, False, "cuda-graphs")] == ["on", "off", "cuda-graphs"]
    assert PretrainConfig().compile == "auto" and PretrainConfig(reweight="l2rw").compile == "auto"
    for options, told in {
        ("--compile", "cuda-graphs", "--device", "cpu"): "needs a GPU",
        ("--compile", "on", "--reweight", "l2rw"): "leave out compile",
        ("--compile", "always"): "compile: ",
        ("--set", "sync_batch_norm=true", "--device", "cpu"): "between GPUs only",
    }.items():
        refused = invoke("pretrain", chain.manifest, *SMALL, *options, "--out", tmp_path / "no")
        assert refused.code == 2 and told in refused.err and not (tmp_path / "no").exists()
