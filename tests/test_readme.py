"""README is true: its Python runs, its commands exist with the options it names, its links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands():
    """Every ``balms ...`` that README shows, as words: in blocks and in inline code."""
    shown = [line.split("#")[0] for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    shown += re.findall(r"`(balms [^`]+)`", TEXT)
    for line in shown:
        for part in re.split(r"\||&&", line):
            words = shlex.split(part)
            if "balms_cli" in words:  # torchrun ... -m balms_cli
                words = ["balms", *words[words.index("balms_cli") + 1 :]]
            if words and words[0] in ("balms", ".venv/bin/balms") and words[1:] and words[1] != "COMMAND":
                yield words[1:]


def test_the_python_example_runs():
    for block in blocks("python"):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", block], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_and_option_exists(words):
    from typer.main import get_command

    from balms_cli.cli.app import app

    group = get_command(app)
    command = group.commands.get(words[0])
    if command is None:
        assert words[0] in {option for p in group.params for option in p.opts}
        return
    while hasattr(command, "commands") and len(words) > 1:  # detect has commands of its own
        words = words[1:]
        command = command.commands[words[0]]
    known = {option for p in command.params for option in p.opts}
    assert {w for w in words[1:] if w.startswith("--")} <= known


def test_there_are_commands_to_check():
    assert len(list(commands())) > 12


def test_the_table_is_that_of_the_committed_results(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import tables

    tables.readme("quick", ROOT / "examples" / "results")
    shown = re.search(r"<!-- tables -->\n(.*?)<!-- /tables -->", TEXT, re.DOTALL)[1]
    assert shown == capsys.readouterr().out


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target
