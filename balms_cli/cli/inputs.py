"""What a stage starts from: an argument, ``-`` for stdin, or the newest fitting artefact of the workspace. No torch here."""

import json
import os
import shlex
import sys
from pathlib import Path

from ..data.aside import printable
from ..data.manifest import HEADER, Manifest, newest_manifest
from ..engine.run_dir import CONFIG, RunDir, interrupted_run, model_file, newest_run, one_held, read_run
from ..errors import CheckpointError, DataError
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
        if os.path.isdir(path) and not os.path.isfile(path / HEADER):
            raise DataError(_no_manifest(path))
        return Manifest.load(path)
    newest = newest_manifest(workspace)
    if newest is None:
        raise DataError(f"there is no data set in {workspace}; make one first, e.g. balms make-lt cifar100 --imbalance 200")
    reporter.note(f"data: {newest} (the newest of {workspace})")
    return Manifest.load(newest)


def _no_manifest(path: Path) -> str:
    """What a folder without a manifest is, and what to do about it."""
    stage, run = read_run(path / CONFIG)
    if stage is not None:
        return (f"{path} is a run of {stage}, not a data set; its data: {printable(str(run.get('manifest')))}; to go on with "
                f"it: {RunDir(path).resume_command(stage)}")  # fmt: skip
    if one := one_held(path, "data", HEADER):
        return f"{path} is not a data set but holds some: name one of them, such as {one}"
    if one_held(path, "runs", CONFIG):
        return f"{path} holds runs, not a data set; make one first, e.g. balms make-lt FOLDER --as-is"
    return f"{path} is not a manifest; make one of its images: balms make-lt {shlex.quote(str(path))} --as-is"


def find_checkpoints(arguments: list[str] | None, workspace: Path | None, stages: tuple[str, ...], reporter: Reporter
                     ) -> list[Path]:  # fmt: skip
    """The checkpoint files that later stages start from, at least one. ``workspace``: None for predict, whose run is always
    named. Raises DataError or CheckpointError."""
    if arguments:
        paths = [path for argument in arguments for path in read_paths(argument)]
        try:
            return [model_file(path) for path in paths]
        except CheckpointError as error:
            if workspace is not None or (paths[0] / CONFIG).is_file():
                raise
            raise CheckpointError(f"{error}; the run comes first: balms predict RUN IMAGES...") from None
    newest = newest_run(workspace, stages)
    if newest is None:
        begun = interrupted_run(workspace, stages)
        advice = f"go on with the interrupted one: {begun}" if begun else f"run balms {stages[-1]} first"
        raise DataError(f"there is no complete {' or '.join(stages)} run in {workspace}; {advice}")
    reporter.note(f"checkpoint: {newest} (the newest of {workspace})")
    return [model_file(newest)]
