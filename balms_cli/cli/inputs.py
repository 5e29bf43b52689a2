"""What a stage starts from: an argument, ``-`` for stdin, or the newest fitting artefact of the workspace. No torch here."""

import json
import os
import shlex
import sys
from pathlib import Path

from ..data.manifest import Manifest, newest_manifest
from ..engine.run_dir import model_file, newest_run
from ..errors import DataError
from ..reporter import Reporter


def read_paths(argument: str) -> list[Path]:
    """The path that an argument is, or those on stdin for ``-``: one a line, or the JSON of ``--json``."""
    if argument != "-":
        return [Path(argument)]
    text = sys.stdin.read().strip()
    if not text:
        raise DataError("the previous stage printed no path: stdin is empty")
    if not text.startswith("{"):
        return [Path(line.strip()) for line in text.splitlines() if line.strip()]
    try:
        document = json.loads(text)
        paths = [Path(entry.get("run") or entry["manifest"]) for entry in document.get("runs", [document])]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"stdin holds no JSON of a balms stage (no 'run' or 'manifest' in it: {error})") from None
    if not paths:
        raise DataError("the previous stage printed no path: its list of runs is empty")
    return paths


def find_manifest(argument: str | None, workspace: Path, reporter: Reporter) -> Manifest:
    """The data set of ``pretrain``. Raises DataError (exit 3) where there is none."""
    if argument is not None:
        paths = read_paths(argument)
        if len(paths) > 1:
            raise DataError(f"one data set is needed, stdin names {len(paths)}")
        path = paths[0]
        if os.path.isdir(path) and not os.path.isfile(path / "manifest.json"):
            raise DataError(f"{path} is not a manifest; make one of its images: balms make-lt {shlex.quote(str(path))} --as-is")
        return Manifest.load(path)
    newest = newest_manifest(workspace)
    if newest is None:
        raise DataError(f"there is no data set in {workspace}; make one first, e.g. balms make-lt cifar100 --imbalance 200")
    reporter.note(f"data: {newest} (the newest of {workspace})")
    return Manifest.load(newest)


def find_checkpoints(arguments: list[str] | None, workspace: Path, stages: tuple[str, ...], reporter: Reporter) -> list[Path]:
    """The checkpoint files that later stages start from, at least one. Raises DataError or CheckpointError."""
    if arguments:
        return [model_file(path) for argument in arguments for path in read_paths(argument)]
    newest = newest_run(workspace, stages)
    if newest is None:
        raise DataError(f"there is no complete {' or '.join(stages)} run in {workspace}; run balms {stages[-1]} first")
    reporter.note(f"checkpoint: {newest} (the newest of {workspace})")
    return [model_file(newest)]
