"""From parsed options to a stage: find the input, resolve the configuration, run, print the result."""

import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from .console import make_reporter, print_result

Params = dict[str, Any]


def resolve_params(stage: str, params: Params, kind: str | None = None, recipes=None):
    """Default < preset < file < flag. ``kind``: of data, for stages with presets; ``recipes``: where those stand, a module."""
    from .. import presets as presets_of_classification
    from ..config import STAGES, parse_set, read_file, resolve
    from ..engine.run_dir import CONFIG

    presets, fields = recipes or presets_of_classification, STAGES[stage].model_fields
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in params.items() if k in fields and v is not None}
    path, sets = params.get("config"), parse_set(params.get("sets") or [])
    if path is not None and path.is_dir():
        path = path / CONFIG
    values, preset = read_file(path, stage) if path else ({}, None)
    chosen, given = None, {**values, **flags, **sets}
    if kind is not None:
        name = params.get("preset") or preset
        chosen = presets.choose(stage, kind, name, on_gpu=name is None and _on_gpu(str(given.get("device", "auto"))))
    return resolve(stage, methods=presets.methods({**(chosen[1] if chosen else {}), **given}), preset=chosen,
                   preset_sources=presets.sources(stage, chosen[0]) if chosen else None,
                   file=(path, values) if path else None, flags=flags, sets=sets)  # fmt: skip


def _on_gpu(device: str) -> bool:
    from ..engine.runtime import pick_device

    return pick_device(device).type != "cpu"


def make_lt(params: Params) -> None:
    resolved = resolve_params("make-lt", params)
    if params["print_config"]:
        return print_result(resolved.to_toml().rstrip())
    from ..stages.make_lt import run

    result = run(resolved.config, params["workspace"], make_reporter(params["quiet"]), out=params["out"],
                 overwrite=params["overwrite"], dry_run=params["dry_run"])  # fmt: skip
    if params["dry_run"]:
        return None
    return print_result(result.to_json() if params["json"] else str(result.path))


def in_world(stage: Callable[[Params, Any], None], params: Params) -> None:
    """Run a stage alone, or as one of the processes that torchrun started: process 0 speaks for all."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return stage(params, None)
    from ..engine.distributed import join
    from ..errors import ConfigError

    if "-" in (params.get("data"), params.get("run"), params.get("source"), *(params.get("runs") or [])):
        raise ConfigError("processes of torchrun have no stdin to read: give the path instead of -")
    with join(params.get("device") or "auto") as world:
        if world.main:
            return stage(params, world)
        with redirect_stdout(io.StringIO()):
            return stage({**params, "quiet": True}, world)


def train_stage(stage: str, params: Params) -> None:
    """pretrain, retrain and meta-sample: a new run, or ``--resume``."""
    in_world(lambda params, world: _train(stage, params, world), params)


def _train(stage: str, params: Params, world) -> None:
    from . import inputs

    reporter = make_reporter(params["quiet"])
    if params.get("profile"):
        _check_profile(params, world)
    if again := restarted(params):
        params = again
    if params["resume"] is not None:
        return _resume(stage, params, reporter, world)
    from .. import presets
    from ..engine.run_dir import new_run
    from ..errors import ConfigError

    parent = None
    if stage == "pretrain":
        manifest = inputs.find_manifest(params["data"], params["workspace"], reporter)
    else:
        from ..engine.header import read_header
        from ..engine.run_dir import manifest_of

        argument = params["run"]
        parents = inputs.find_checkpoints([argument] if argument else None, params["workspace"], ("pretrain",), reporter)
        if len(parents) != 1:
            raise ConfigError(f"{stage} takes one run, stdin names {len(parents)}")
        parent = parents[0]
        manifest = manifest_of(parent, read_header(parent), params["data"])
    _warn_of_other_data(params["config"], manifest, reporter)
    resolved = resolve_params(stage, params, presets.kind_of_data(manifest.source["name"], tuple(manifest.image_size)))
    resolved = presets.with_fitting_warm_up(resolved, len(manifest.splits["train"]))
    if params["print_config"]:
        return print_result(resolved.to_toml().rstrip())
    from ..engine.tensorboard import require_tensorboard
    from ..stages.plan import run_label, show_plan

    require_tensorboard(resolved.config)
    if params.get("profile"):
        return _profile(resolved, manifest, run_label(resolved, manifest), reporter, params)
    folder = new_run(stage, run_label(resolved, manifest), workspace=params["workspace"], out=params["out"],
                     overwrite=params["overwrite"])  # fmt: skip
    folder = agreed(folder, world)
    reporter.note(f"preset {resolved.preset}; {sum(s != 'default' for s in resolved.sources.values())} values set by preset, "
                  f"file or flag; all of them: --print-config, or {folder.path}/config.toml")  # fmt: skip
    if parent is not None and folder.path.resolve() == parent.parent.resolve():
        raise ConfigError(f"--out {folder.path} is the run that {stage} starts from: choose another, or it is lost")
    if params["dry_run"]:
        return show_plan(resolved, manifest, parent, folder, reporter)
    return _run(stage, resolved, manifest, parent, folder, reporter, params, world, resume=False)


def _warn_of_other_data(config: Path | None, manifest, reporter) -> None:
    """``--config`` of a run takes its values, not its data."""
    from ..data.aside import printable
    from ..engine.run_dir import CONFIG, read_run

    if config is None:
        return
    file = config / CONFIG if config.is_dir() else config
    _, run = read_run(file)
    if run.get("manifest_sha256", manifest.sha256) != manifest.sha256:
        reporter.warn(f"{manifest.path} is not the data of {file}; to repeat that run name its own: "
                      f"{printable(str(run.get('manifest')))}")  # fmt: skip


def _check_profile(params: Params, world) -> None:
    """``--profile`` looks at the first steps of a new run, in one process. The others are refused in one line."""
    from ..errors import ConfigError

    for other in ("resume", "dry_run"):
        if params[other]:
            raise ConfigError(f"--profile and --{other.replace('_', '-')} are two things: leave one of them out")
    if world is not None or "TORCHELASTIC_RESTART_COUNT" in os.environ:
        raise ConfigError("--profile looks at the steps of one process: start it without torchrun")


def _profile(resolved, manifest, label: str, reporter, params: Params) -> None:
    """No run is made: the trace is the result."""
    from ..engine.profile import trace_path
    from ..stages import pretrain

    trace = trace_path(label, workspace=params["workspace"], out=params["out"], overwrite=params["overwrite"])
    found, runtime = pretrain.profile(resolved, manifest, trace, reporter, offline=bool(params["offline"]))
    print_result({"trace": str(trace), "milliseconds": found.milliseconds, "images_per_second": found.images_per_second,
                  "device": runtime.describe()} if params["json"] else str(trace))  # fmt: skip


def restarted(params: Params) -> Params | None:
    """After torchrun's own restart (``--max-restarts``) the same command goes on with the run in its ``--out``. A run of
    another command there is none of its own: that was refused, or is to be replaced, and so it is again."""
    from ..engine.run_dir import CONFIG, read_run

    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if not again or params["out"] is None:
        return None
    if read_run(params["out"] / CONFIG)[1].get("command") != shlex.join(["balms", *sys.argv[1:]]):
        return None
    kept = ("workspace", "quiet", "json", "debug", "offline", "workers", "tensorboard")
    return {k: v if k in kept else None for k, v in params.items()} | {"resume": params["out"]}


def agreed(folder, world):
    """Of several processes, all use the folder that process 0 chose, and that one writes in it."""
    if world is not None:
        folder.path, folder.writes = Path(world.agree(str(folder.path))), world.main
    return folder


def _resume(stage: str, params: Params, reporter, world) -> None:
    from ..data.manifest import Manifest
    from ..engine.run_dir import check_unchanged
    from ..errors import CheckpointError
    from ..stages.rates import rates_record

    folder, resolved, record = reopen(stage, params, world)
    if folder.complete(stage):
        return told_complete(folder, reporter)
    manifest = Manifest.load(record["manifest"])
    parent = Path(record["parent"]) if "parent" in record else None
    check_unchanged(folder, record, manifest, parent)
    known = rates_record(getattr(resolved.config, "sampler", ""))
    if "rates_sha256" in record and known and known["rates_sha256"] != record["rates_sha256"]:
        raise CheckpointError(f"{folder.path} cannot go on: {resolved.config.sampler} no longer has the rates it began with")
    return _run(stage, resolved, manifest, parent, folder, reporter, params, world, resume=True)


def reopen(stage: str, params: Params, world):
    """``--resume``: the run's folder, its configuration and the record of what it began with.

    Everything comes from the run's own folder, so any other training option is refused; the number of decoder threads and
    event files change nothing of what is trained.
    """
    from ..config import STAGES
    from ..engine.run_dir import open_run
    from ..errors import ConfigError

    free = ("workers", "tensorboard")
    names = (*(k for k in STAGES[stage].model_fields if k not in free), "config", "preset", "out", "data", "run", "source")
    given = [k for k in names if params.get(k) is not None]
    given += [k for k in ("sets", "overwrite", "dry_run", "print_config") if params.get(k)]
    if given:
        names = ", ".join("--" + k.replace("_", "-").replace("sets", "set").replace("source", "from") for k in given)
        raise ConfigError(
            f"--resume goes on with the run as it was configured and takes no other training option (given: {names})"
        )
    folder, resolved, record = open_run(params["resume"], stage)
    update = {"device": record["device"], "precision": record["precision"]}
    update |= {k: params[k] for k in free if params.get(k) is not None}
    config = resolved.config.model_copy(update=update)
    return agreed(folder, world), type(resolved)(stage, config, resolved.sources, resolved.preset), record


def told_complete(folder, reporter) -> None:
    """A run that has nothing left to do is its own result."""
    reporter.note(f"{folder.path} is complete: nothing to resume")
    print_result(str(folder.path))


@contextmanager
def resumable(stage: str, folder) -> Iterator[None]:
    """Ctrl-C before the first step (features take their time) or after the last one: how to go on is told here too."""
    from ..engine.run_dir import CONFIG
    from ..errors import Interrupted

    try:
        yield
    except KeyboardInterrupt:
        if not (folder / CONFIG).is_file():
            raise
        raise Interrupted(f"stopped; go on with: {folder.resume_command(stage)}") from None


def _run(stage: str, resolved, manifest, parent, folder, reporter, params: Params, world, *, resume: bool) -> None:
    from ..engine.distributed import ALONE
    from ..stages import meta_sample, pretrain, retrain

    shared = {"resume": resume, "world": world or ALONE}
    with resumable(stage, folder):
        if stage == "pretrain":
            result = pretrain.run(resolved, manifest, folder, reporter, offline=bool(params.get("offline")), **shared)
        else:
            stage_run = retrain.run if stage == "retrain" else meta_sample.run
            result = stage_run(resolved, parent, manifest, folder, reporter, **shared)
    print_result(result.to_json() if params["json"] else str(result.path))


def print_backbones(params: Params) -> None:
    """``pretrain --list``: a name a line, then a tab and what ``--weights`` takes for it besides a file."""
    from ..models.backbones import list_backbones

    found = list_backbones()
    if not any(name.startswith("timm:") for name, _ in found):
        make_reporter(params["quiet"]).note("timm's networks are not among them: pip install 'balms[timm]'")
    print_result([{"name": name, "weights": weights} for name, weights in found] if params["json"] else
                 "\n".join(f"{name}\t{weights}".rstrip() for name, weights in found))  # fmt: skip


def demo(params: Params) -> None:
    from ..stages.demo import run

    result = run(params["workspace"], params["seed"] or 0, make_reporter(params["quiet"]))
    print_result(result.to_json() if params["json"] else str(result.path))
