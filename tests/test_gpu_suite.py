"""The GPU suite where there is no GPU: its checks on a CPU, and that a run which is cut short keeps what it had."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import gpu_suite

    return gpu_suite


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import gpu_checks

    return gpu_checks


@pytest.mark.parametrize("name", ["losses", "influence", "augment"])
def test_checks_pass_on_the_device_that_they_compare_with(checks, name):
    found = checks.CHECKS[name]("cpu", None)
    assert found["passed"] is True and not found.get("skipped")


def test_every_loss_is_checked(checks):
    from balms_cli.config import LOSSES

    assert set(checks.LOSSES) == set(LOSSES)


def test_a_wrong_gradient_is_found(checks, monkeypatch):
    """float32 against float64 differ by about 1e-7; a loss that is off by a thousandth must not pass."""
    from balms_cli import losses

    build = losses.build_loss

    def slightly_wrong(name, counts):
        loss = build(name, counts)
        forward = loss.forward
        loss.forward = lambda z, y: forward(z, y) * (1.001 if z.dtype.itemsize == 4 else 1)
        return loss

    monkeypatch.setattr(losses, "build_loss", slightly_wrong)
    assert checks.CHECKS["losses"]("cpu", None)["passed"] is False


def test_what_needs_a_gpu_says_so(checks):
    for name in ("sync-batch-norm", "decode"):
        found = checks.CHECKS[name]("cpu", None)
        assert found["passed"] is None and "GPU" in found["skipped"][0]


def test_parts_are_kept_as_they_end_and_skipped_by_the_name_of_what_is_missing(suite, monkeypatch, tmp_path):
    out, seen = tmp_path / "found.json", []

    def say(text: str) -> list[str]:
        return [sys.executable, "-c", text]

    peek = f"print('chatter'); print(open({str(out)!r}).read().count('status') and '{{\"ratio\": 2}}')"
    parts = [
        suite.Part("whole", say("print('{\"ratio\": 1}')"), 60),
        suite.Part("sees the first", say(peek), 60),
        suite.Part("needs", say("print('{}')"), 60, ("no_such_package_at_all",)),
        suite.Part("breaks", say("raise SystemExit('no room')"), 60),
        suite.Part("is wrong", say("print('{\"passed\": false}'); raise SystemExit(1)"), 60),
        suite.Part("hangs", say("import time; time.sleep(60)"), 1),
        suite.Part("only on a GPU", say('print(\'{"passed": null, "skipped": ["no GPU"]}\')'), 60),
    ]
    monkeypatch.setattr(suite, "plan", lambda *a: seen.append(a) or parts)
    monkeypatch.setattr("sys.argv", ["gpu_suite.py"])
    app = __import__("typer").Typer()
    app.command()(suite.main)
    done = CliRunner().invoke(app, [str(tmp_path), "--device", "cpu", "--rehearse", "--out", str(out)])
    found = json.loads(out.read_text())
    assert done.exit_code == 1 and seen == [(tmp_path, "cpu", True)] and found["rehearsal"] is True
    status = {name: part["status"] for name, part in found["parts"].items()}
    assert status == {"whole": "passed", "sees the first": "passed", "needs": "skipped", "breaks": "failed",
                      "is wrong": "failed", "hangs": "out of time", "only on a GPU": "skipped"}  # fmt: skip
    assert found["parts"]["needs"]["why"] == "missing: no_such_package_at_all"
    assert found["parts"]["breaks"]["why"] == "no room" and found["parts"]["sees the first"]["result"] == {"ratio": 2}


def test_no_time_left_is_told_not_overrun(suite):
    part = suite.Part("late", [sys.executable, "-c", "raise SystemExit(9)"], 60)
    assert suite.run(part, 3.0) == {"status": "skipped", "why": "the time was used up"}


def test_the_plan_fits_and_its_scripts_are_there(suite):
    parts = suite.plan(Path("data"), "cuda", False)
    assert all(Path(part.command[1]).is_file() for part in parts)
    assert all(importlib.util.find_spec(name) for part in parts for name in part.needs)
    assert {"bench_engine", "bench_retrain", "paper preset", "check resume"} <= {part.name for part in parts}
