"""A run is a folder: config.toml, metrics.jsonl, resume.pt, report.json, and last of all model.safetensors.

The presence of ``model.safetensors`` (of ``rates.json`` for meta-sample) means that the run is complete. Torch is not
imported here, so that the newest fitting run is found before anything heavy is.
"""

import errno
import json
import os
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

from ..config import STAGES, Resolved, resolve
from ..data.aside import remove_half_written, replace_file, write_error
from ..data.manifest import Manifest
from ..errors import CheckpointError, ConfigError, DataError
from .header import Header, read_header, sha256_of

MODEL, RATES, CONFIG, METRICS, RESUME, REPORT = (
    "model.safetensors", "rates.json", "config.toml", "metrics.jsonl", "resume.pt", "report.json")  # fmt: skip
EVENTS, EXPORT = "tensorboard", "export"  # folders: event files, and where exported models go by default
CARD, TEMPERATURE = "MODEL_CARD.md", "temperature.json"  # for people; what predict found on the validation split


class RunDir:
    """One run's folder. Made by ``create``, or opened to go on with.

    ``writes``: of several processes that share a run, one writes; in the others every writing method does nothing.
    ``watch``: is handed each record after it is in ``metrics.jsonl``.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes
        self.watch: Callable[[dict[str, Any]], None] | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def complete(self, stage: str) -> bool:
        return (self / (RATES if stage == "meta-sample" else MODEL)).is_file()

    def create(self, resolved: Resolved, run: dict[str, Any]) -> None:
        """Make the folder and write ``config.toml``: all values, where each came from, and what they are applied to."""
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, self.path) from None
        replace_file(self / CONFIG, resolved.to_toml(run))

    def write_json(self, name: str, value: Any) -> None:
        if not self.writes:
            return
        replace_file(self / name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def append_metrics(self, record: dict[str, Any]) -> None:
        if not self.writes:
            return
        try:
            with (self / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if self.watch is not None:
                self.watch(record)
        except OSError as error:
            raise write_error(error, self.path) from None

    def trim_metrics(self, step: int) -> None:
        """Forget what was logged after the checkpoint of ``step``, as the resumed run logs it again, and half-written files."""
        if self.writes:
            remove_half_written(self.path)
        if self.writes and (self / METRICS).is_file():
            lines = (self / METRICS).read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            replace_file(self / METRICS, "".join(f"{line}\n" for line in kept))

    def final_loss(self) -> float | None:
        """The loss of the last log line, the mean over its steps."""
        lines = (self / METRICS).read_text(encoding="utf-8").splitlines() if (self / METRICS).is_file() else []
        return json.loads(lines[-1])["loss"] if lines else None

    def resume_command(self, stage: str) -> str:
        return f"{command(stage)} --resume {shlex.quote(str(self.path))}"


def command(stage: str) -> str:
    """What a user types for a stage: ``balms pretrain``, ``balms detect train``."""
    return f"balms {stage.replace('detect-', 'detect ', 1)}"


def new_run(stage: str, label: str, *, workspace: Path, out: Path | None, overwrite: bool) -> RunDir:
    """The folder that a new run will have; nothing is made yet. A non-empty ``--out`` is refused (exit 2)."""
    check_place(out or workspace)
    if out is None:
        base = workspace / "runs" / f"{stage}-{label}"
        path, n = base, 1
        while path.exists():
            n += 1
            path = base.with_name(f"{base.name}-{n}")
        return RunDir(path)
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ConfigError(f"--out {out} is not empty; add --overwrite to replace the run in it, go on with it by "
                              f"'{command(stage)} --resume {out}', or choose another folder")  # fmt: skip
        if not (out / CONFIG).is_file():
            raise ConfigError(f"--out {out} is not empty and not a run's folder: --overwrite leaves it alone; choose another")
    return RunDir(out)


def check_place(path: Path) -> None:
    """Told before anything is computed: a folder can be made or written here. Raises ConfigError (exit 2)."""
    while not path.exists() and path != path.parent:
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        code = errno.EACCES if path.is_dir() else errno.ENOTDIR
        raise write_error(OSError(code, os.strerror(code)), path)


def clear_run(run: RunDir) -> None:
    """Take away what an earlier run wrote here (``--overwrite``); the completeness mark goes first."""
    if not run.writes:
        return
    for name in (MODEL, RATES, RESUME, REPORT, METRICS, CONFIG, CARD, TEMPERATURE):
        (run / name).unlink(missing_ok=True)
    for name in ("features", EVENTS, EXPORT):
        shutil.rmtree(run / name, ignore_errors=True)


def open_run(path: Path, stage: str) -> tuple[RunDir, Resolved, dict[str, Any]]:
    """A run to go on with: its folder, configuration and provenance. Raises CheckpointError (exit 4)."""
    path = path.parent if path.is_file() else path
    try:
        document = tomllib.loads((path / CONFIG).read_text(encoding="utf-8"))
        values, sources, run = document[stage], document["source"], document["run"]
        missing = {"manifest", "manifest_sha256", "device", "precision"} - run.keys()
        if missing or ("parent" in run and "parent_sha256" not in run):
            raise CheckpointError(f"{path / CONFIG} is damaged: its [run] table does not say what the run began with")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a run's folder: it has no {CONFIG}") from None
    except KeyError:
        found = next((s for s in STAGES if s in document), "nothing")
        raise CheckpointError(f"{path} holds a run of {found}: use '{command(found)} --resume {path}'") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CheckpointError(f"{path / CONFIG} cannot be read: {error}") from None
    # TOML has no null: what is absent was None, or is an option that the run's own version did not have yet.
    may_be_none = {k for k, field in STAGES[stage].model_fields.items() if type(None) in get_args(field.annotation)}
    values = {k: values.get(k) for k in STAGES[stage].model_fields if k in values or k in may_be_none}
    config = resolve(stage, flags=values).config
    return RunDir(path), Resolved(stage, config, dict(sources), document.get("preset")), run


def model_file(path: Path) -> Path:
    """The checkpoint file that a path names: the file itself, or the one in a run's folder."""
    if path.is_dir():
        if not (path / MODEL).is_file() and (path / CONFIG).is_file():
            raise CheckpointError(f"{path} is not complete: it has no {MODEL} yet; resume or repeat that run first")
        return path / MODEL
    return path


def newest_run(workspace: Path, stages: Iterable[str]) -> Path | None:
    """The newest complete run of one of ``stages`` in the workspace, by the creation time in its header."""
    best: tuple[str, Path] | None = None
    for file in (workspace / "runs").glob(f"*/{MODEL}"):
        try:
            header = read_header(file)
        except CheckpointError:
            continue
        if header.stage in stages and (best is None or header.created > best[0]):
            best = (header.created, file.parent)
    return best[1] if best else None


def manifest_of(file: Path, header: Header, data: Path | None) -> Manifest:
    """The data set of a checkpoint: its own, or ``data``. Raises DataError (exit 3) where it is gone."""
    if data is None and not Path(header.manifest).is_dir():
        raise DataError(f"the data of {file} is no longer at {header.manifest}; say where it is by --data")
    return Manifest.load(data or header.manifest)


def check_unchanged(folder: RunDir, record: dict[str, Any], manifest: Manifest, parent: Path | None) -> None:
    """A run goes on only with the very data and checkpoint that it began with. Raises CheckpointError (exit 4)."""
    if manifest.sha256 != record["manifest_sha256"]:
        raise CheckpointError(f"{folder.path} cannot go on: {manifest.path} is no longer the data it began with")
    if parent is not None and (not parent.is_file() or sha256_of(parent) != record["parent_sha256"]):
        raise CheckpointError(f"{folder.path} cannot go on: {parent} is no longer the checkpoint it began with")
