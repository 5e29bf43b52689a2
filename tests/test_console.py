"""What people see off a terminal: plain lines with an ETA, and names shown as they are."""

import pytest

from balms_cli.cli import console


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_plain_line_every_few_seconds_and_one_at_the_end(capsys, clock):
    reporter = console.ConsoleReporter()
    with reporter.task("pretrain", 100) as task:
        for _ in range(10):
            clock[0] += 2
            task.advance(10, loss=0.5, images_per_second=321.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "pretrain: 30/100 steps, 14 s left  loss 0.5  images/s 321"  # 6 s for 30: 14 s for 70
    assert lines[-1] == "pretrain: 100/100 steps, 20 s  loss 0.5  images/s 321"
    assert len(lines) == 4  # after 6, 12, 18 seconds, and at the end


def test_a_resumed_task_counts_its_own_pace(capsys, clock):
    with console.ConsoleReporter().task("pretrain", 100) as task:
        task.skip(80)
        clock[0] += 10
        task.advance(10)
    assert capsys.readouterr().err == "pretrain: 90/100 steps, 10 s left\n"


def test_names_are_text_not_markup(capsys):
    reporter = console.ConsoleReporter()
    reporter.table("[bold]t", ["[red]class", "n"], [["[blink]emu[/]", "3"]])
    reporter.bars("[b]x", ["[i]a"], [2.0], ["[u]2"])
    reporter.note("see [1]")
    reporter.warn("[2]")
    console.print_error("no such file: [3].png")
    shown = capsys.readouterr().err
    for text in ("[bold]t", "[red]class", "[blink]emu[/]", "[b]x", "[i]a", "[u]2", "see [1]", "warning: [2]"):
        assert text in shown
    assert "error: no such file: [3].png" in shown


def test_quiet_is_silent(capsys):
    reporter = console.make_reporter(quiet=True)
    reporter.warn("x")
    with reporter.task("t", 3) as task:
        task.skip(1)
        task.advance(2, loss=1.0)
    assert capsys.readouterr() == ("", "")
