"""What people see off a terminal: plain lines with an ETA, and names shown as they are."""

import io
import os
import sys

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


def test_names_are_not_emoji_and_do_not_steer_the_terminal(capsys):
    reporter = console.ConsoleReporter()
    reporter.note("data: /photos/:cat:/:100:")
    reporter.warn("\x1b[2Jgone\x07")
    reporter.table("t", ["class", "n"], [["\x1b]0;title\x07emu", "91.7\n64-98"]])
    reporter.bars("x", ["\x9b1m"], [2.0], ["2"])
    console.print_error("no \x1b[31mred\udcff")
    shown = capsys.readouterr().err
    assert "data: /photos/:cat:/:100:\n" in shown and "64-98" in shown.splitlines()[7]
    for text in (r"\x1b[2Jgone\x07", r"\x1b]0;title\x07emu", r"\x9b1m", r"error: no \x1b[31mred\udcff"):
        assert text in shown
    assert not any(control in shown for control in "\x1b\x07\x9b")


def test_bars_begin_below_each_other_whatever_the_names(capsys):
    console.ConsoleReporter().bars("rates", ["a", "[b]c", "\u732b\u732b", "emu"], [1.0, 0.5, 0.25, 0.0], ["1", "2", "3", "4"])
    _, *lines = capsys.readouterr().err.splitlines()
    assert [line.split(" \u2588")[0] for line in lines[:3]] == ["   a", "[b]c", "\u732b\u732b"]
    assert [line.count("\u2588") for line in lines] == [60, 30, 15, 0] and lines[3] == " emu  4"


def test_the_work_goes_on_where_nobody_reads_the_log_any_more(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(os.fdopen(writer, "wb", buffering=0), write_through=True))
    reporter = console.ConsoleReporter()
    reporter.note("one")
    reporter.warn("two")
    reporter.table("t", ["class"], [["emu"]])
    with reporter.task("pretrain", 3) as task:
        task.advance(3, loss=1.0)
    console.print_error("three")
    assert reporter.console.quiet  # no more is tried, and nothing was raised


@pytest.mark.parametrize("kind, bars", [("dumb", False), ("xterm", True)])
def test_bars_are_for_terminals_that_can_move_the_cursor(monkeypatch, kind, bars):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", kind)
    with console.ConsoleReporter().task("pretrain", 3) as task:
        task.advance(3, loss=1.0)
    assert ("\x1b" in shown.getvalue()) is bars and "3/3" in shown.getvalue()
    assert bars or shown.getvalue().startswith("pretrain: 3/3 steps")


def test_quiet_is_silent(capsys):
    reporter = console.make_reporter(quiet=True)
    reporter.warn("x")
    with reporter.task("t", 3) as task:
        task.skip(1)
        task.advance(2, loss=1.0)
    assert capsys.readouterr() == ("", "")


class TestNarrow:
    """80 columns: text folds, numbers never do, and what does not fit stands in a second table, led by the same names."""

    NAME = "retrain-cifar100-if200-balanced-meta"

    def drawn(self, capsys, monkeypatch, columns, rows, width="80") -> str:
        monkeypatch.setenv("COLUMNS", width)
        console.ConsoleReporter().table("title", columns, rows)
        shown = capsys.readouterr().err
        assert max(map(len, shown.splitlines())) <= int(width)
        return shown

    def test_intervals_stay_whole(self, capsys, monkeypatch):
        values = [f"{n}5.9\n{n}3.9–{n}7.2" for n in range(1, 8)]
        heads = ["run", "top-1", "top-5", "balanced", "many", "medium", "few", "rarest 3", "ECE"]
        shown = self.drawn(capsys, monkeypatch, heads, [[self.NAME, *values, "12.4"], ["b", *values[:6], "–", "3.1"]])
        for text in [*(line for value in values for line in value.split("\n")), "12.4", "3.1"]:
            assert f" {text} " in shown
        assert shown.count("title") == 1 and shown.count("┃ run") == 2 and self.NAME[:16] in shown

    def test_metrics_of_a_detector_stay_whole(self, capsys, monkeypatch):
        values = [f"1{n}.2{n}" for n in range(9)]
        heads = ["run", "of", "AP", "AP50", "AP75", "AP_s", "AP_m", "AP_l", "AP_r", "AP_c", "AP_f"]
        shown = self.drawn(capsys, monkeypatch, heads, [[self.NAME, "boxes", *values], [self.NAME, "masks", *["-"] * 9]])
        assert all(f" {text} " in shown for text in values)
        assert shown.count("boxes") == 2  # what a row is stands in each part

    def test_what_fits_is_one_table(self, capsys, monkeypatch):
        shown = self.drawn(capsys, monkeypatch, ["class", "training images", "note"], [["cat", "1,200", "no number"]])
        assert shown.count("┃ class ┃") == 1 and "training images" in shown

    def test_a_long_text_folds_and_odd_cells_take_no_time(self, capsys, monkeypatch):
        shown = self.drawn(capsys, monkeypatch, ["what", "value"], [["a", "1" * 5000 + "x"], ["b", "word " * 40]])
        assert shown.count("1") == 5000
