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
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

from ..config import COMPUTING, STAGES, Resolved, resolve
from ..data.aside import is_plain, lock, printable, remove_half_written, replace_file, write_error
from ..data.manifest import Manifest
from ..errors import CheckpointError, ConfigError, DataError
from .header import Header, read_header, sha256_of

MODEL, RATES, CONFIG, METRICS, RESUME, REPORT = (
    "model.safetensors", "rates.json", "config.toml", "metrics.jsonl", "resume.pt", "report.json")  # fmt: skip
EVENTS, EXPORT = "tensorboard", "export"  # folders: event files, and where exported models go by default
CARD, TEMPERATURE = "MODEL_CARD.md", "temperature.json"  # for people; what predict found on the validation split
_PLACES = {"annotations", "images", "weights"}  # of the configuration: where things lie, not what they are


class RunDir:
    """One run's folder. Made by ``claim``, or opened to go on with.

    ``writes``: of several processes that share a run, one writes; in the others every writing method does nothing.
    ``watch``: is handed each record after it is in ``metrics.jsonl``. ``fresh``: whose name was free when it was chosen,
    ``named``: by the user.
    """

    def __init__(self, path: Path, writes: bool = True, *, fresh: bool = False, named: bool = True):
        self.path, self.writes, self.fresh, self.named = path, writes, fresh, named
        self.watch: Callable[[dict[str, Any]], None] | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def complete(self, stage: str) -> bool:
        return (self / (RATES if stage == "meta-sample" else MODEL)).is_file()

    def create(self, resolved: Resolved, run: dict[str, Any]) -> None:
        """Write ``config.toml``: all values, where each came from, and what they are applied to."""
        if not self.writes:
            return
        replace_file(self / CONFIG, resolved.to_toml(run))

    def claim(self) -> None:
        """Make the folder of a new run. Where another run took the name since it was chosen, the next free one is taken, or
        it is told (ConfigError) where the user chose it."""
        try:
            while self.fresh and not self.named:
                try:
                    self.path.mkdir(parents=True)
                    return
                except FileExistsError:
                    self.path = free_name(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, self.path) from None
        if self.fresh and (self / CONFIG).exists():
            raise ConfigError(f"another run has begun in {self.path} meanwhile: choose another folder")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process trains in this folder while the block runs. Raises ConfigError (exit 2) where one does.

        The lock leaves no file and goes with the process, however that ends; where the system has none, none is held.
        """

        def refuse() -> None:
            raise ConfigError(f"another process is at work in {self.path}: wait for it, or choose another folder")

        with ExitStack() as held:
            if self.writes:
                with suppress(OSError):  # Windows opens no folder
                    folder = os.open(self.path, os.O_RDONLY)
                    held.callback(os.close, folder)
                    lock(folder, refuse)
            yield

    def recipe(self, stage: str) -> dict[str, Any] | None:
        """What ``config.toml`` says is trained; how and where it is computed may change on the way."""
        try:
            values = tomllib.loads((self / CONFIG).read_text(encoding="utf-8"))[stage]
        except (OSError, ValueError, KeyError):
            return None
        return {key: value for key, value in values.items() if key not in COMPUTING | _PLACES}

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
            lines = (self / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
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
        return RunDir(free_name(workspace / "runs" / f"{stage}-{label}"), fresh=True, named=False)
    if not out.exists() or not any(out.iterdir()):
        return RunDir(out, fresh=True)
    if not overwrite:
        raise ConfigError(f"--out {out} is not empty; add --overwrite to replace the run in it, go on with it by "
                          f"'{RunDir(out).resume_command(stage)}', or choose another folder")  # fmt: skip
    if not (out / CONFIG).is_file():
        raise ConfigError(f"--out {out} is not empty and not a run's folder: --overwrite leaves it alone; choose another")
    return RunDir(out)


def free_name(path: Path) -> Path:
    """``path``, or where that is taken ``path-2``, ``path-3`` and so on."""
    base, n = path, 1
    while path.exists():
        n += 1
        path = base.with_name(f"{base.name}-{n}")
    return path


def check_place(path: Path) -> None:
    """Told before anything is computed: a folder can be made or written here. Raises ConfigError (exit 2)."""
    if not is_plain(str(path)):  # stdout names it on a line, config.toml as UTF-8
        raise ConfigError(f"{printable(str(path))} has control characters, or bytes that are not UTF-8: choose another name")
    try:
        while not path.exists() and path != path.parent:
            path = path.parent
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise write_error(error, path) from None
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        code = errno.EACCES if path.is_dir() else errno.ENOTDIR
        raise write_error(OSError(code, os.strerror(code)), path)


def clear_run(run: RunDir) -> None:
    """Take away what an earlier run wrote here (``--overwrite``). The completeness mark goes first; last what makes it a
    run's folder, so that a stop on the way leaves one that can be overwritten again."""
    if not run.writes:
        return
    run.claim()
    with run.alone():
        for name in (MODEL, RATES, RESUME, REPORT, METRICS, CARD, TEMPERATURE, "rates.csv", "rates.png"):
            (run / name).unlink(missing_ok=True)
        for name in ("features", EVENTS, EXPORT):
            shutil.rmtree(run / name, ignore_errors=True)
        (run / CONFIG).unlink(missing_ok=True)


def open_run(path: Path, stage: str) -> tuple[RunDir, Resolved, dict[str, Any]]:
    """A run to go on with: its folder, configuration and provenance. Raises CheckpointError (exit 4)."""
    path = path.parent if path.is_file() else path
    try:
        document = tomllib.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a run's folder: it has no {CONFIG}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / CONFIG} cannot be read: {error}") from None
    found = next((s for s in STAGES if s in document), stage)
    if stage not in document and found != stage:
        raise CheckpointError(f"{path} holds a run of {found}: use '{RunDir(path).resume_command(found)}'")
    values, sources, run = (document.get(table) for table in (stage, "source", "run"))
    if not all(isinstance(table, dict) for table in (values, sources, run)):
        raise CheckpointError(f"{path / CONFIG} is damaged: it has no tables [{stage}], [source] and [run]")
    began = {"manifest", "manifest_sha256", "device", "precision"} | ({"parent", "parent_sha256"} if "parent" in run else set())
    if not all(isinstance(run.get(key), str) for key in began):
        raise CheckpointError(f"{path / CONFIG} is damaged: its [run] table does not say what the run began with")
    # TOML has no null: what is absent was None, or is an option that the run's own version did not have yet.
    may_be_none = {k for k, field in STAGES[stage].model_fields.items() if type(None) in get_args(field.annotation)}
    values = {k: values.get(k) for k in STAGES[stage].model_fields if k in values or k in may_be_none}
    config = resolve(stage, file=(path / CONFIG, values)).config
    return RunDir(path), Resolved(stage, config, dict(sources), document.get("preset")), run


def read_run(file: Path) -> tuple[str | None, dict[str, Any]]:
    """What a ``config.toml`` says of its run: the stage, and the table [run]; (None, {}) where it can't be read as one."""
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None, {}
    run = document.get("run")
    return next((stage for stage in STAGES if stage in document), None), run if isinstance(run, dict) else {}


def one_held(path: Path, place: str, name: str) -> Path | None:
    """The first folder with a file ``name`` in ``path``, or in its ``place`` where it is a workspace."""
    return next((file.parent for where in (path / place, path) for file in sorted(where.glob(f"*/{name}"))), None)


def model_file(path: Path) -> Path:
    """The checkpoint file that a path names: the file itself, or the one in a run's folder. Raises CheckpointError (exit 4)
    for a folder without one, and says what it is."""
    if not path.is_dir():
        return path
    if (path / MODEL).is_file():
        return path / MODEL
    stage, _ = read_run(path / CONFIG)
    if stage == "meta-sample":
        raise CheckpointError(f"{path} is a run of meta-sample, which learns rates and has no model; train one with them: "
                              f"balms retrain --sampler {shlex.quote(str(path / RATES))}")  # fmt: skip
    if (path / CONFIG).is_file():
        on = f"go on with it: {RunDir(path).resume_command(stage)}" if stage else "repeat that run first"
        raise CheckpointError(f"{path} is not complete: it has no {MODEL} yet; {on}")
    if one := one_held(path, "runs", CONFIG):
        raise CheckpointError(f"{path} is not a run but holds runs: name one of them, such as {one}")
    raise CheckpointError(f"{path} is not a run: it has no {CONFIG}; runs lie in balms-runs/runs unless --workspace said "
                          "otherwise")  # fmt: skip


def interrupted_run(workspace: Path, stages: Iterable[str]) -> str | None:
    """The command that goes on with the run of one of ``stages`` that was last interrupted in the workspace."""
    found = [(file.stat().st_mtime, RunDir(file.parent), read_run(file.with_name(CONFIG))[0])
             for file in (workspace / "runs").glob(f"*/{RESUME}") if not file.with_name(MODEL).exists()]  # fmt: skip
    found = [(when, run, stage) for when, run, stage in found if stage in stages]
    if not found:
        return None
    _, run, stage = max(found, key=lambda one: one[0])
    return run.resume_command(stage)


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
