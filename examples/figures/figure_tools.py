"""What the paper's figures share: the runs behind them, trained where they are missing, and how a figure is written."""

import inspect
import io
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from balms_cli.cli.console import print_error
from balms_cli.config import STAGES, MakeLTConfig, Resolved, RunConfig, resolve
from balms_cli.data.aside import replace_file, write_error
from balms_cli.data.manifest import Manifest
from balms_cli.engine.header import sha256_of
from balms_cli.engine.run_dir import CONFIG, MODEL, RATES, REPORT, RESUME, RunDir, open_run
from balms_cli.errors import BalmsError, ConfigError
from balms_cli.presets import choose, kind_of_data, methods
from balms_cli.reporter import Reporter
from balms_cli.stages import make_lt, meta_sample, pretrain
from balms_cli.stages.rates import load_rates

RESULTS = Path(__file__).parents[1] / "results"
Out = Annotated[Path, typer.Option(help="Where picture and data are written.", show_default="examples/results")]

# What a run was computed with, not what it computes: such values may differ in a run that is taken again.
_NOT_RECIPE = {*RunConfig.model_fields, "checkpoint_seconds", "compile", "tensorboard"} - {"seed"}


@dataclass(frozen=True)
class Runs:
    """A workspace, and the one draw of the data that every run in it is of. ``options``: --set values and device."""

    workspace: Path
    manifest: Manifest
    preset: str
    seed: int
    options: dict[str, Any]
    reporter: Reporter

    def pretrained(self, name: str, **flags: Any) -> RunDir:
        """The stage-1 run of that name, trained unless it is there."""
        folder, resolved = RunDir(self.workspace / name), self._recipe("pretrain", flags)
        if not self._ready(folder, resolved, None):
            self.reporter.note(f"{name}: training stage 1 in {folder.path}")
            if not self.manifest.path.is_dir():
                self.manifest.save(self.manifest.path)
            pretrain.run(resolved, self.manifest, folder, self.reporter, resume=(folder / RESUME).is_file())
        return folder

    def rates(self, name: str, parent: RunDir, **flags: Any) -> RunDir:
        """The run of that name of the meta sampler on the features of ``parent``, made unless it is there."""
        folder, resolved = RunDir(self.workspace / name), self._recipe("meta-sample", flags)
        if not self._ready(folder, resolved, parent / MODEL):
            self.reporter.note(f"{name}: learning sample rates in {folder.path}")
            meta_sample.run(resolved, parent / MODEL, self.manifest, folder, self.reporter,
                            resume=(folder / RESUME).is_file())  # fmt: skip
        return folder

    def _recipe(self, stage: str, flags: dict[str, Any]) -> Resolved:
        kind = kind_of_data(self.manifest.source["name"], tuple(self.manifest.image_size))
        preset = choose(stage, kind, self.preset, on_gpu=False)
        # What only stage 1 knows (backbone ...) is left out of stage 2; what neither knows is refused.
        unfit = STAGES["pretrain"].model_fields.keys() - STAGES[stage].model_fields.keys()
        flags = {**{k: v for k, v in self.options.items() if k not in unfit}, **flags, "seed": self.seed}
        return resolve(stage, methods=methods({**preset[1], **flags}), preset=preset, flags=flags)

    def _ready(self, folder: RunDir, resolved: Resolved, parent: Path | None) -> bool:
        """Whether the run is complete. Raises ConfigError where what is there is another run than the one asked for."""
        if not (folder / CONFIG).is_file():
            return False
        _, known, made = open_run(folder.path, resolved.stage)
        ours, theirs = (r.config.model_dump(exclude=_NOT_RECIPE) for r in (resolved, known))
        odd = [key for key in ours if ours[key] != theirs[key]]
        odd += ["data"] if made["manifest_sha256"] != self.manifest.sha256 else []
        odd += ["stage-1 run"] if parent is not None and made["parent_sha256"] != sha256_of(parent) else []
        if odd:
            raise ConfigError(f"{folder.path} holds a run with another {', '.join(odd[:3])}: name another folder by --runs")
        return folder.complete(resolved.stage)


def open_runs(workspace: Path, source: str, imbalance: float, data_root: Path | None, preset: str, seed: int,
              sets: dict[str, Any], reporter: Reporter) -> Runs:  # fmt: skip
    """A workspace for runs on one draw of ``source``. The draw's own seed is 0, whatever that of the runs; it is written
    when a run needs it, so that drawing from complete runs leaves their folder alone."""
    root = None if data_root is None else str(data_root)
    config = MakeLTConfig(source=source, imbalance=imbalance, data_root=root)
    return Runs(workspace, make_lt.run(config, workspace, dry_run=True).manifest, preset, seed, sets, reporter)


def rates_of(folder: RunDir) -> dict[str, Any]:
    return load_rates(folder / RATES)


def report_of(folder: RunDir) -> dict[str, Any]:
    return json.loads((folder / REPORT).read_text(encoding="utf-8"))


def data_record(manifest: Manifest) -> dict[str, Any]:
    """What a figure must say of its data."""
    return {"name": manifest.source["name"], "imbalance": manifest.imbalance, "imbalance_factor": manifest.imbalance_factor,
            "train_images": len(manifest.splits["train"]), "test_images": len(manifest.splits["test"]),
            "draw_seed": manifest.seed, "manifest_sha256": manifest.sha256}  # fmt: skip


def record(script: str, arguments: list[str], options: dict[str, Any], made: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Where a figure came from. ``options``: those that change it, by the name of the option without its dashes; ``made``:
    device and versions of what is drawn, such as a run's report."""
    words = ["python", f"examples/figures/{script}", *arguments]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name}", f"{one:g}" if isinstance(one, float) else str(one)]
    tools = {name: version(name) for name in ("matplotlib", "scikit-learn")}
    return {"command": shlex.join(words), **more, "device": made["device"], "versions": made["versions"] | tools,
            "date": date.today().isoformat()}  # fmt: skip


def title_of(what: str, manifest: Manifest, preset: str) -> str:
    """A figure's title: what it shows, and of which data."""
    names = {"cifar10": "CIFAR-10-LT", "cifar100": "CIFAR-100-LT"}
    name = manifest.source["name"]
    factor = manifest.imbalance_factor if manifest.imbalance is None else manifest.imbalance
    return f"{what}: {names.get(name, name)}, imbalance factor {factor:g} (preset {preset}, data {manifest.sha256[:8]})"


def new_figure(width: float, height: float, **options: Any):
    """An empty figure, drawn off screen. Inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.figure(figsize=(width, height), **options)


def write(figure, data: dict[str, Any], name: str, out: Path) -> Path:
    """``name.png`` and ``name.json`` in ``out``; the JSON has a line a key, so that a change reads well."""
    from matplotlib import pyplot

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, out) from None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    pyplot.close(figure)
    picture = with_palette(buffer)
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in data.items())
    replace_file(out / f"{name}.json", "{\n" + lines + "\n}\n")
    replace_file(out / f"{name}.png", picture)
    return out / f"{name}.png"


def with_palette(picture: io.BytesIO) -> bytes:
    """A PNG with 256 colours of its own: a third of the size, and no difference that the eye would see."""
    from PIL import Image

    smaller = io.BytesIO()
    Image.open(picture).convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE).save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


def start(main: Callable) -> None:
    """Run ``main`` as a command, with its file's first line as help: a user's error is one line and its exit code."""
    main.__doc__ = inspect.getmodule(main).__doc__.splitlines()[0]
    try:
        typer.run(main)
    except BalmsError as error:
        print_error(str(error))
        raise SystemExit(error.exit_code) from None
