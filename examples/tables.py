"""Every method of the paper's tables, from the same data, engine and evaluation.

    python examples/tables.py run --data cifar10 --imbalance 200 --preset quick --seeds 0,1,2
    python examples/tables.py show --data cifar10 --imbalance 200 --preset quick

``run`` trains what is missing, row by row: a row that is done is a JSON file in the workspace and is not done again, a
stage-1 run that was cut off goes on where it stopped, and rows share their stage-1 backbones. ``show`` puts the rows that
are done beside the paper's figures (examples/paper_figures.json) and writes one JSON and one Markdown table.

Two processes may work on one workspace with different ``--rows`` (on a CPU two of one thread each are faster than one of
two: OMP_NUM_THREADS=1).
"""

import json as json_module
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from table_report import METRICS, markdown, percent, readme_table, summary, write_result
from table_rows import BACKBONES, BY_NAME, ROWS, VAL_PER_CLASS, WITH_META_SET, Row

from balms_cli.cli.console import make_reporter, stderr
from balms_cli.config import COMPUTING, EvaluateConfig, MakeLTConfig, Resolved, resolve
from balms_cli.data.aside import replace_file
from balms_cli.data.manifest import Manifest
from balms_cli.engine.header import read_header
from balms_cli.engine.run_dir import MODEL, RESUME, RunDir
from balms_cli.presets import choose, kind_of_data, methods
from balms_cli.reporter import Reporter
from balms_cli.stages import evaluate, make_lt, pretrain, retrain


@dataclass(frozen=True)
class Study:
    """One data set, imbalance factor and preset in a workspace: where its parts lie."""

    data: str
    imbalance: float
    preset: str
    workspace: Path
    options: dict[str, Any] | None  # device, and --set for every stage; None: whatever the rows were made with
    meta_per_class: int = 0  # L2RW and Meta-Weight-Net: images held out for their meta set (0: the training images)

    @property
    def name(self) -> str:
        return f"{self.data}-if{self.imbalance:g}-{self.preset}"

    def manifest(self, backbone: str = "softmax") -> Manifest:
        """The draw that a backbone is trained on: one for all of them, but where images must be held out."""
        val = VAL_PER_CLASS.get(self.data, 20) if backbone.endswith("-val") else 0
        meta = self.meta_per_class if backbone in WITH_META_SET else 0
        config = MakeLTConfig(source=self.data, imbalance=self.imbalance, val_per_class=val, meta_per_class=meta)
        return make_lt.run(config, self.workspace).manifest

    def recipe(self, stage: str, manifest: Manifest, flags: dict[str, Any]) -> Resolved:
        kind = kind_of_data(manifest.source["name"], tuple(manifest.image_size))
        preset, flags = choose(stage, kind, self.preset, on_gpu=False), {**self.options, **flags}
        return resolve(stage, methods=methods({**preset[1], **flags}), preset=preset, flags=flags)

    def backbone_dir(self, key: str, seed: int) -> RunDir:
        return RunDir(self.workspace / "backbones" / f"{self.name}-{key}{self.meta_mark(key)}-seed{seed}")

    def row_file(self, row: Row, backbone_seed: int, seed: int) -> Path:
        name = f"{row.name}{self.meta_mark(row.backbone)}-b{backbone_seed}-c{seed}.json"
        return self.workspace / "rows" / self.name / name

    @property
    def recipe_options(self) -> dict[str, Any]:
        """Those options that change a result."""
        return {k: v for k, v in self.options.items() if k not in COMPUTING | {"precision"}}

    def done(self, row: Row, backbone_seed: int, seed: int) -> dict[str, Any] | None:
        """The kept result of a run, or None. One of other options is never taken for this one."""
        file = self.row_file(row, backbone_seed, seed)
        if not file.is_file():
            return None
        run = json_module.loads(file.read_text(encoding="utf-8"))
        if self.options is not None and run.get("recipe_options", {}) != self.recipe_options:
            raise typer.BadParameter(f"{file} was made with other --set values: choose another --workspace")
        return run

    def meta_mark(self, key: str) -> str:
        return f"-meta{self.meta_per_class}" if self.meta_per_class and key in WITH_META_SET else ""

    def cells(self, row: Row, backbone_seeds: list[int], seeds: list[int]) -> list[tuple[int, int]]:
        """The runs behind a row: classifier seeds only where a classifier is drawn at random."""
        return [(b, c) for b in backbone_seeds for c in (seeds if row.random_head else seeds[:1])]


def train_backbone(study: Study, key: str, seed: int, reporter: Reporter) -> RunDir:
    """The stage-1 run of ``key``, from an earlier sitting where it is complete and of this very recipe."""
    folder = study.backbone_dir(key, seed)
    manifest, flags = study.manifest(key), {**BACKBONES[key], "seed": seed}
    if study.meta_mark(key):
        flags["meta_set"] = "meta"
    resolved = study.recipe("pretrain", manifest, flags)
    if folder.complete("pretrain"):
        known = type(resolved.config)(**read_header(folder / MODEL).recipe)
        ignored = COMPUTING | {"precision"}
        if known.model_dump(exclude=ignored) != resolved.config.model_dump(exclude=ignored):
            raise typer.BadParameter(
                f"{folder.path} was trained by another recipe: move it away, or choose another --workspace"
            )
        return folder
    pretrain.run(resolved, manifest, folder, reporter, resume=(folder / RESUME).is_file())
    return folder


def run_row(study: Study, row: Row, backbone_seed: int, seed: int, reporter: Reporter) -> dict[str, Any]:
    """Train what the row needs, score it on the test split, and keep the result."""
    began = time.monotonic()
    run_dir = train_backbone(study, row.backbone, backbone_seed, reporter)
    extra: dict[str, Any] = {}
    if row.head is not None:
        head = dict(row.head)
        manifest = study.manifest()
        if head.get("classifier") == "tau-norm":
            head["tau_norm"] = extra["tau_norm"] = choose_tau(study, backbone_seed, reporter)
        resolved = study.recipe("retrain", manifest, {**head, "seed": seed})
        parent, run_dir = run_dir, RunDir(study.workspace / "heads" / f"{study.name}-{row.name}-b{backbone_seed}-c{seed}")
        report = retrain.run(resolved, parent / MODEL, manifest, run_dir, Reporter()).report
        extra |= {k: report[k] for k in ("rates_variance",) if k in report}
    if row.backbone in WITH_META_SET:
        extra["meta_set"] = read_header(run_dir / MODEL).recipe["meta_set"]
    config = EvaluateConfig(**{k: v for k, v in study.options.items() if k in ("device", "precision")}, **row.score)
    found = evaluate.run(config, [run_dir / MODEL], reporter=Reporter()).runs[0]
    return {
        "row": row.name, "backbone_seed": backbone_seed, "classifier_seed": seed if row.random_head else None,
        **{k: found[k] for k in METRICS}, "class_accuracy": [c["accuracy"] for c in found["per_class"]],
        "class_counts": [c["train_count"] for c in found["per_class"]], **extra,
        **{k: found[k] for k in ("manifest_sha256", "device", "versions", "date")},
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def choose_tau(study: Study, seed: int, reporter: Reporter) -> float:
    """tau-norm's exponent by the validation images of another draw of the tail; a number then, whatever the test says."""
    parent = train_backbone(study, "softmax-val", seed, reporter)
    manifest = study.manifest("softmax-val")
    folder = RunDir(study.workspace / "heads" / f"{study.name}-choose-tau-b{seed}")
    resolved = study.recipe("retrain", manifest, {"classifier": "tau-norm"})
    return retrain.run(resolved, parent / MODEL, manifest, folder, Reporter()).report["tau_norm"]


def integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a list of whole numbers such as 0,1,2") from None


def numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a list of numbers such as 200,100,10") from None


def chosen_rows(names: str | None, table: str) -> list[Row]:
    if names is None:
        return [row for row in ROWS if table in ("all", *row.tables)]
    unknown = [n for n in names.split(",") if n not in BY_NAME]
    if unknown:
        raise typer.BadParameter(f"no row '{unknown[0]}'; rows: {', '.join(BY_NAME)}")
    return [BY_NAME[n] for n in names.split(",")]


app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__.splitlines()[0])
Data = Annotated[str, typer.Option(help="Data sets, such as cifar10,cifar100; or digits, or any source of balms make-lt.")]
Imbalance = Annotated[str, typer.Option(help="Imbalance factors, such as 200,100,10.")]
Preset = Annotated[str, typer.Option(help="quick or paper.")]
Seeds = Annotated[str, typer.Option(help="Classifier seeds.")]
BackboneSeeds = Annotated[str, typer.Option(help="Backbone seeds.")]
Workspace = Annotated[Path, typer.Option(help="Where backbones, heads and rows are kept.")]
Out = Annotated[Path, typer.Option(help="Where the tables are written.")]


Held = Annotated[int, typer.Option(help="L2RW and Meta-Weight-Net by their original protocol: so many images a class held "
                                   "out for the meta set (10 there; 0: the training images).")]  # fmt: skip


@app.command()
def run(data: Data = "cifar10", imbalance: Imbalance = "200", preset: Preset = "quick", seeds: Seeds = "0,1,2",
        backbone_seeds: BackboneSeeds = "0", rows: Annotated[str | None, typer.Option(help="Only these, by name.")] = None,
        table: Annotated[str, typer.Option(help="table2, ablation, table3 or all.")] = "all",
        decoupled_only: Annotated[bool, typer.Option("--decoupled-only", help="Only rows on softmax features.")] = False,
        device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
        sets: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of stages 1 and 2 (steps=20 ...).")] = None,
        meta_per_class: Held = 0, workspace: Workspace = Path("balms-runs/tables"), out: Out = Path("examples/results"),
        quiet: Annotated[bool, typer.Option("--quiet", "-q")] = False) -> None:  # fmt: skip
    """Train and score the rows that are missing; print the path of each result."""
    from balms_cli.config import parse_set

    options = {"device": device, **parse_set(sets or [])}
    studies = [Study(d, f, preset, workspace, options, meta_per_class) for d in data.split(",") for f in numbers(imbalance)]
    b_seeds, c_seeds, console = integers(backbone_seeds), integers(seeds), stderr()
    wanted = [r for r in chosen_rows(rows, table) if not decoupled_only or r.backbone == "softmax"]
    todo = [(s, r, b, c) for s in studies for r in wanted for b, c in s.cells(r, b_seeds, c_seeds) if s.done(r, b, c) is None]
    costs: list[tuple[bool, float]] = []
    for i, (study, row, b, c) in enumerate(todo):
        trains = not study.backbone_dir(row.backbone, b).complete("pretrain")
        result = run_row(study, row, b, c, make_reporter(quiet)) | {"recipe_options": study.recipe_options}
        file = study.row_file(row, b, c)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json_module.dumps(result, indent=1) + "\n")
        costs.append((trains, result["seconds"]))
        if not quiet:
            left = time_left(costs, todo[i + 1 :])
            console.print(f"{i + 1}/{len(todo)}  {study.name}, {row.label}: top-1 {percent([result['top1']])} %, "
                          f"{result['seconds']:.0f} s; about {left / 60:.0f} min left", soft_wrap=True)  # fmt: skip
    for study in studies:
        finish(study, b_seeds, c_seeds, out, quiet)


def time_left(costs: list[tuple[bool, float]], todo: list[tuple[Study, Row, int, int]]) -> float:
    """Seconds to go: a row that trains a backbone costs what such rows cost so far, any other what those cost."""
    if not todo:
        return 0.0
    with_backbone, without = ([seconds for t, seconds in costs if t is kind] for kind in (True, False))
    if not with_backbone:  # none here yet: those of an earlier sitting say it too
        reports = (todo[0][0].workspace / "backbones").glob("*/report.json")
        with_backbone = [json_module.loads(f.read_text(encoding="utf-8"))["seconds"] for f in reports]
    missing = {
        s.backbone_dir(r.backbone, b).path for s, r, b, _ in todo if not s.backbone_dir(r.backbone, b).complete("pretrain")
    }
    each, other = (statistics.fmean(seconds or [0.0]) for seconds in (with_backbone, without))
    return len(missing) * each + (len(todo) - len(missing)) * other


@app.command()
def show(data: Data = "cifar10", imbalance: Imbalance = "200", preset: Preset = "quick", seeds: Seeds = "0,1,2",
         backbone_seeds: BackboneSeeds = "0", meta_per_class: Held = 0,
         workspace: Workspace = Path("balms-runs/tables"), out: Out = Path("examples/results")) -> None:  # fmt: skip
    """Write and show the tables of the rows that are done."""
    for name in data.split(","):
        for factor in numbers(imbalance):
            study = Study(name, factor, preset, workspace, None, meta_per_class)
            finish(study, integers(backbone_seeds), integers(seeds), out, quiet=False)


def finish(study: Study, backbone_seeds: list[int], seeds: list[int], out: Path, quiet: bool) -> None:
    runs_of = {row.name: [run for cell in study.cells(row, backbone_seeds, seeds) if (run := study.done(row, *cell))]
               for row in ROWS}  # fmt: skip
    result = summary({"data": study.data, "imbalance": study.imbalance, "preset": study.preset,
                      "backbone_seeds": backbone_seeds, "classifier_seeds": seeds}, runs_of)  # fmt: skip
    if not result["rows"]:
        raise typer.BadParameter(f"no row of {study.name} is done in {study.workspace}: python examples/tables.py run")
    path = write_result(result, out)
    if not quiet:
        from rich.markdown import Markdown

        stderr().print(Markdown(markdown(result)))
    sys.stdout.write(f"{path}\n")


@app.command()
def readme(preset: Preset = "quick", results: Out = Path("examples/results")) -> None:
    """Print README's table from the committed results."""
    files = (results / f"tables_{data}_if200_{preset}.json" for data in ("cifar10", "cifar100"))
    sys.stdout.write(readme_table(*(json_module.loads(f.read_text(encoding="utf-8")) for f in files)))


if __name__ == "__main__":
    app()
