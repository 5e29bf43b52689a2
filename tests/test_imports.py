"""Imports run one way, and the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "balms_cli"
# A room may import from rooms of a lower level, and from its own.
LEVELS = {"cli": 6, "stages": 5, "report": 4, "detection": 4, "engine": 3, "meta": 2, "models": 2, "data": 2, "metrics": 2,
          "losses": 1, "presets": 2, "presets_detect": 2,
          "bound": 0, "config": 1, "reporter": 1, "errors": 0, "__init__": 0}  # fmt: skip
# Neighbours on a level that may still meet: metrics knows the shot groups of data, and detectors have cards too.
ALLOWED = {("metrics", "data"), ("detection", "report")}


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_rooms(path: Path):
    parts = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*parts[:-1]][: len(parts) - node.level]
            target = [*base, *(node.module.split(".") if node.module else [])]
            names = [target[0]] if target else [alias.name for alias in node.names]
            yield from ("__init__" if name.startswith("__") else name for name in names)


def test_rooms_import_downwards_only():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        if room in ("__main__", "__init__"):
            continue
        for other in imported_rooms(path):
            if other != room and (room, other) not in ALLOWED and LEVELS[other] >= LEVELS[room]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert not wrong


def test_the_walker_sees_imports():
    rooms = set(imported_rooms(PACKAGE / "stages" / "decoupled.py"))
    assert {"config", "data", "engine", "meta", "models", "reporter", "stages"} <= rooms


@pytest.mark.parametrize("code", [
    "import balms_cli", "from balms_cli.cli import app", "from balms_cli.cli import inputs",
    "from typer.testing import CliRunner; from balms_cli.cli.app import app; CliRunner().invoke(app, ['retrain', '--help'])",
])  # fmt: skip
def test_nothing_heavy_is_loaded_to_start(code):
    heavy = ("torch", "torchvision", "matplotlib", "sklearn", "scipy")
    check = f"import sys; {code}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there():
    import balms_cli

    for name in balms_cli.__all__:
        assert getattr(balms_cli, name) is not None
    with pytest.raises(AttributeError):
        balms_cli.nothing  # noqa: B018
