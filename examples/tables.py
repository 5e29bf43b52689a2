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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from balms_cli.cli.console import make_reporter, stderr
from balms_cli.config import EvaluateConfig, MakeLTConfig, Resolved, resolve
from balms_cli.data.aside import replace_file
from balms_cli.data.manifest import Manifest
from balms_cli.engine.header import read_header
from balms_cli.engine.run_dir import MODEL, RESUME, RunDir
from balms_cli.presets import choose, kind_of_data, methods
from balms_cli.reporter import Reporter
from balms_cli.stages import evaluate, make_lt, pretrain, retrain

PAPER = Path(__file__).with_name("paper_figures.json")
METRICS = ("top1", "balanced_accuracy", "many", "medium", "few", "rarest3")

# Stage 1: what differs from the preset. A logit-adjusted network is a Balanced Softmax one, so they share it.
BACKBONES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "cbs": {"sampler": "class"},
    "balanced": {"loss": "balanced"},
    "balanced-quarter": {"loss": "balanced", "loss_exponent": 0.25},
    "cost-sensitive": {"loss": "cost-sensitive"},
    "focal": {"loss": "focal"},
    "class-balanced": {"loss": "class-balanced"},
    "class-balanced-sigmoid": {"loss": "class-balanced-sigmoid"},
    "class-balanced-focal": {"loss": "class-balanced-focal"},
    "ldam": {"loss": "ldam"},
    "ldam-drw": {"loss": "ldam", "drw": True},
    "equalization": {"loss": "equalization"},
    "l2rw": {"reweight": "l2rw"},
    "meta-weight-net": {"reweight": "meta-weight-net"},
    # The same recipe on a draw that leaves validation images out: where tau-norm's tau is chosen.
    "softmax-val": {},
}
VAL_PER_CLASS = {"cifar10": 100, "cifar100": 20}


@dataclass(frozen=True)
class Row:
    """A line of a table: its stage 1, what stage 2 adds (None: the stage-1 network itself), how it is scored."""

    name: str
    label: str
    tables: tuple[str, ...]
    backbone: str
    head: dict[str, Any] | None = None
    score: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def random_head(self) -> bool:
        """Does a classifier seed make a difference?"""
        return self.head is not None and self.head.get("classifier") not in ("ncm", "tau-norm")


T2, ABLATION, T3 = ("table2",), ("ablation",), ("table3",)
ROWS = (
    Row("softmax", "Softmax", T2, "softmax"),
    Row("cost-sensitive", "Cost-sensitive (CBW)", T2, "cost-sensitive"),
    Row("cbs", "Class-balanced sampling (CBS)", T2, "cbs"),
    Row("focal", "Focal", T2, "focal"),
    Row("class-balanced", "Class-balanced loss", T2, "class-balanced"),
    Row("class-balanced-sigmoid", "Class-balanced, sigmoid form", T2, "class-balanced-sigmoid"),
    Row("class-balanced-focal", "Class-balanced, focal form", T2, "class-balanced-focal"),
    Row("ldam", "LDAM", T2, "ldam"),
    Row("ldam-drw", "LDAM-DRW", T2, "ldam-drw"),
    Row("equalization", "Equalization (softmax form)", T2, "equalization", note="CIFAR values of another repository"),
    Row("l2rw", "L2RW", T2, "l2rw", note="meta set: training images"),
    Row("meta-weight-net", "Meta-Weight-Net", T2, "meta-weight-net", note="meta set: training images"),
    Row("posthoc", "Softmax, post-hoc logit adjustment", T2, "softmax", score={"posthoc_tau": 1.0}),
    Row("logit-adjusted", "Logit-adjusted loss", T2, "balanced", note="the same function as Balanced Softmax"),
    Row("ncm", "NCM", T2, "softmax", {"classifier": "ncm"}),
    Row("tau-norm", "tau-norm", T2, "softmax", {"classifier": "tau-norm"}, note="tau from a validation draw"),
    Row("cosine", "Cosine classifier, CBS", T2, "softmax", {"classifier": "cosine", "loss": "softmax", "sampler": "class"}),
    Row("crt", "cRT (linear, CBS)", T2 + T3, "softmax", {"loss": "softmax", "sampler": "class"}),
    Row("lws", "LWS", T2, "softmax", {"classifier": "lws"}),
    Row("balms", "BALMS (Balanced Softmax, DT, MS)", T2 + ABLATION, "softmax", {"loss": "balanced", "meta_sampler": True}),
    Row("balanced-quarter", "Balanced Softmax 1/4, end to end", ABLATION, "balanced-quarter"),
    Row("balanced", "Balanced Softmax, end to end", ABLATION, "balanced"),
    Row("balanced-quarter-dt", "Balanced Softmax 1/4, DT", ABLATION, "softmax", {"loss": "balanced", "loss_exponent": 0.25}),
    Row("balanced-quarter-dt-ms", "Balanced Softmax 1/4, DT, MS", ABLATION, "softmax",
        {"loss": "balanced", "loss_exponent": 0.25, "meta_sampler": True}),
    Row("balanced-dt", "Balanced Softmax, DT", ABLATION + T3, "softmax", {"loss": "balanced"}),
    Row("balanced-cbs-dt", "Balanced Softmax, CBS, DT", ABLATION, "softmax", {"loss": "balanced", "sampler": "class"}),
    Row("softmax-dt-ms", "Softmax, DT, MS", ABLATION, "softmax", {"loss": "softmax", "meta_sampler": True}),
    Row("balanced-dt-mr", "Balanced Softmax, DT, MR", ABLATION, "softmax", {"loss": "balanced", "meta_reweigher": True}),
    Row("softmax-dt", "features softmax, classifier softmax", T3, "softmax", {"loss": "softmax"}),
    Row("cbs-softmax", "features CBS, classifier softmax", T3, "cbs", {"loss": "softmax"}),
    Row("bs-softmax", "features Balanced Softmax, classifier softmax", T3, "balanced", {"loss": "softmax"}),
    Row("cbs-crt", "features CBS, classifier CBS", T3, "cbs", {"loss": "softmax", "sampler": "class"}),
    Row("bs-crt", "features Balanced Softmax, classifier CBS", T3, "balanced", {"loss": "softmax", "sampler": "class"}),
    Row("cbs-balanced", "features CBS, classifier Balanced Softmax", T3, "cbs", {"loss": "balanced"}),
    Row("bs-balanced", "features Balanced Softmax, classifier Balanced Softmax", T3, "balanced", {"loss": "balanced"}),
)  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}
TITLES = {
    "table2": "Comparison (main text, Table 2; supplement, Table 2)",
    "ablation": "Ablation (main text, Table 5): DT decoupled training, MS meta sampler, MR meta reweigher",
    "table3": "Features against classifiers (supplement, Table 3)",
}


@dataclass(frozen=True)
class Study:
    """One data set, imbalance factor and preset in a workspace: where its parts lie."""

    data: str
    imbalance: float
    preset: str
    workspace: Path
    options: dict[str, Any]  # device, precision and the like, for every stage

    @property
    def name(self) -> str:
        return f"{self.data}-if{self.imbalance:g}-{self.preset}"

    def manifest(self, reporter: Reporter, *, val: bool = False) -> Manifest:
        per_class = VAL_PER_CLASS.get(self.data, 20) if val else 0
        config = MakeLTConfig(source=self.data, imbalance=self.imbalance, val_per_class=per_class)
        return make_lt.run(config, self.workspace, reporter).manifest

    def recipe(self, stage: str, manifest: Manifest, flags: dict[str, Any]) -> Resolved:
        kind = kind_of_data(manifest.source["name"], tuple(manifest.image_size))
        preset, flags = choose(stage, kind, self.preset, on_gpu=False), {**self.options, **flags}
        return resolve(stage, methods=methods({**preset[1], **flags}), preset=preset, flags=flags)

    def backbone_dir(self, key: str, seed: int) -> RunDir:
        return RunDir(self.workspace / "backbones" / f"{self.name}-{key}-seed{seed}")

    def row_file(self, row: Row, backbone_seed: int, seed: int) -> Path:
        return self.workspace / "rows" / self.name / f"{row.name}-b{backbone_seed}-c{seed}.json"

    def cells(self, row: Row, backbone_seeds: list[int], seeds: list[int]) -> list[tuple[int, int]]:
        """The runs behind a row: classifier seeds only where a classifier is drawn at random."""
        return [(b, c) for b in backbone_seeds for c in (seeds if row.random_head else seeds[:1])]


def train_backbone(study: Study, key: str, seed: int, reporter: Reporter) -> RunDir:
    """The stage-1 run of ``key``, from an earlier sitting where it is complete and of this very recipe."""
    folder = study.backbone_dir(key, seed)
    manifest = study.manifest(Reporter(), val=key.endswith("-val"))
    resolved = study.recipe("pretrain", manifest, {**BACKBONES[key], "seed": seed})
    if folder.complete("pretrain"):
        known = type(resolved.config)(**read_header(folder / MODEL).recipe)
        ignored = {"device", "precision", "checkpoint_seconds"}
        if known.model_dump(exclude=ignored) != resolved.config.model_dump(exclude=ignored):
            raise SystemExit(f"{folder.path} was trained by another recipe: move it away, or choose another --workspace")
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
        manifest = study.manifest(Reporter())
        if head.get("classifier") == "tau-norm":
            head["tau_norm"] = extra["tau_norm"] = choose_tau(study, backbone_seed, reporter)
        resolved = study.recipe("retrain", manifest, {**head, "seed": seed})
        parent, run_dir = run_dir, RunDir(study.workspace / "heads" / f"{study.name}-{row.name}-b{backbone_seed}-c{seed}")
        report = retrain.run(resolved, parent / MODEL, manifest, run_dir, Reporter()).report
        extra |= {k: report[k] for k in ("rates_variance",) if k in report}
    if row.backbone in ("l2rw", "meta-weight-net"):
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
    manifest = study.manifest(Reporter(), val=True)
    folder = RunDir(study.workspace / "heads" / f"{study.name}-choose-tau-b{seed}")
    resolved = study.recipe("retrain", manifest, {"classifier": "tau-norm"})
    return retrain.run(resolved, parent / MODEL, manifest, folder, Reporter()).report["tau_norm"]


def summary(study: Study, backbone_seeds: list[int], seeds: list[int]) -> dict[str, Any]:
    """Every row that is done: mean and standard error over its runs, and the published figures."""
    paper = json_module.loads(PAPER.read_text(encoding="utf-8"))
    cell, rows, meta = f"{study.data}/{study.imbalance:g}", {}, {}
    for row in ROWS:
        files = [study.row_file(row, *which) for which in study.cells(row, backbone_seeds, seeds)]
        runs = [json_module.loads(f.read_text(encoding="utf-8")) for f in files if f.is_file()]
        if not runs:
            continue
        meta = {k: runs[0][k] for k in ("manifest_sha256", "class_counts", "device", "versions", "date")}
        entry: dict[str, Any] = {"label": row.label, "tables": list(row.tables), "runs": len(runs), "varied": varied(row, runs)}
        if row.note:
            entry["note"] = row.note
        for metric in METRICS:
            values = [run[metric] for run in runs]
            entry[metric] = None if None in values else mean_and_error(values)
        entry["class_accuracy"] = [
            round(statistics.fmean(a), 4) for a in zip(*(r["class_accuracy"] for r in runs), strict=True)
        ]
        entry |= {k: runs[0][k] for k in ("tau_norm", "meta_set", "rates_variance") if k in runs[0]}
        published = {t: paper["tables"][t][row.name][cell] for t in (*row.tables, "reported")
                     if cell in paper["tables"][t].get(row.name, {})}  # fmt: skip
        rows[row.name] = entry | {"published": published}
    return {"data": study.data, "imbalance": study.imbalance, "preset": study.preset, "backbone_seeds": backbone_seeds,
            "classifier_seeds": seeds, **meta, "sources": paper["sources"], "rows": rows}  # fmt: skip


def varied(row: Row, runs: list[dict[str, Any]]) -> str:
    """Which randomness the mean is over. Subset: one, of seed 0, always."""
    backbones = len({run["backbone_seed"] for run in runs})
    if row.random_head:
        return f"{len(runs) // backbones} classifier seeds on {backbones} backbone{'s' if backbones > 1 else ''}"
    return f"{backbones} backbone seed{'s' if backbones > 1 else ''}"


def mean_and_error(values: list[float]) -> list[float]:
    """[mean, standard error]; [mean] of a single run, which has no error to show."""
    mean = round(statistics.fmean(values), 4)
    return [mean] if len(values) == 1 else [mean, round(statistics.stdev(values) / len(values) ** 0.5, 4)]


def markdown(result: dict[str, Any]) -> str:
    """The tables as text: published, here, and the difference, in percent and points."""
    cifar10 = result["data"] == "cifar10"
    rare = ("rarest3", "rarest 3") if cifar10 else ("few", "few-shot")
    lines = [f"# {result['data'].upper()}-LT, imbalance factor {result['imbalance']:g}, preset `{result['preset']}`", "",
             f"Top-1 accuracy in percent on the test split, last iterate, one draw of the data (index sha256 "
             f"`{result['manifest_sha256'][:12]}`), {result['device']}, torch {result['versions']['torch']}, {result['date']}. "
             "± is the standard error over the runs named in the last column.",
             "Paper: the figures of the authors' own runs; reported: those that the supplement quotes from others. "
             "Both follow longer recipes than this preset."]  # fmt: skip
    for table, title in TITLES.items():
        rows = {n: r for n, r in result["rows"].items() if table in r["tables"]}
        if not rows:
            continue
        lines += ["", f"## {title}", "",
                  f"| method | paper | reported | here | difference | {rare[1]} | runs |", "|---|---|---|---|---|---|---|"]  # fmt: skip
        for row in rows.values():
            paper, reported = row["published"].get(table), row["published"].get("reported") if table == "table2" else None
            against = paper or reported
            gap = f"{100 * row['top1'][0] - against[0]:+.1f}" if against else ""
            label = row["label"] + (f" ({row['note']})" if "note" in row else "")
            label += f", tau {row['tau_norm']:g}" if "tau_norm" in row else ""
            lines.append(f"| {label} | {plain(paper)} | {plain(reported)} | {percent(row['top1'])} | {gap} | "
                         f"{percent(row[rare[0]])} | {row['varied']} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def percent(value: list[float] | None) -> str:
    return "–" if value is None else " ± ".join(f"{100 * v:.1f}" for v in value)


def plain(value: list[float] | None) -> str:
    return " ± ".join(f"{v:.1f}" for v in value) if value else ""


def write_result(result: dict[str, Any], out: Path) -> Path:
    """One JSON (a line a row, so that a change reads well) and one Markdown file."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"tables_{result['data']}_if{result['imbalance']:g}_{result['preset']}.json"
    head = {k: v for k, v in result.items() if k != "rows"}
    rows = ",\n".join(f"  {json_module.dumps(n)}: {json_module.dumps(r)}" for n, r in result["rows"].items())
    replace_file(path, json_module.dumps(head, indent=1)[:-2] + ',\n "rows": {\n' + rows + "\n }\n}\n")
    replace_file(path.with_suffix(".md"), markdown(result))
    return path


def integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a list of whole numbers such as 0,1,2") from None


def chosen_rows(names: str | None, table: str) -> list[Row]:
    if names is None:
        return [row for row in ROWS if table in ("all", *row.tables)]
    unknown = [n for n in names.split(",") if n not in BY_NAME]
    if unknown:
        raise typer.BadParameter(f"no row '{unknown[0]}'; rows: {', '.join(BY_NAME)}")
    return [BY_NAME[n] for n in names.split(",")]


app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__.splitlines()[0])
Data = Annotated[str, typer.Option(help="cifar10, cifar100, digits, or another source of balms make-lt.")]
Imbalance = Annotated[float, typer.Option(help="Imbalance factor.")]
Preset = Annotated[str, typer.Option(help="quick or paper.")]
Seeds = Annotated[str, typer.Option(help="Classifier seeds.")]
BackboneSeeds = Annotated[str, typer.Option(help="Backbone seeds.")]
Workspace = Annotated[Path, typer.Option(help="Where backbones, heads and rows are kept.")]
Out = Annotated[Path, typer.Option(help="Where the tables are written.")]


@app.command()
def run(data: Data = "cifar10", imbalance: Imbalance = 200, preset: Preset = "quick", seeds: Seeds = "0,1,2",
        backbone_seeds: BackboneSeeds = "0", rows: Annotated[str | None, typer.Option(help="Only these, by name.")] = None,
        table: Annotated[str, typer.Option(help="table2, ablation, table3 or all.")] = "all",
        decoupled_only: Annotated[bool, typer.Option("--decoupled-only", help="Only rows on softmax features.")] = False,
        device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
        sets: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE for stage 1 and 2 alike (steps=20 ...).")] = None,
        workspace: Workspace = Path("balms-runs/tables"), out: Out = Path("examples/results"),
        quiet: Annotated[bool, typer.Option("--quiet", "-q")] = False) -> None:  # fmt: skip
    """Train and score the rows that are missing; print the path of the result."""
    from balms_cli.config import parse_set

    study = Study(data, imbalance, preset, workspace, {"device": device, **parse_set(sets or [])})
    b_seeds, c_seeds, console = integers(backbone_seeds), integers(seeds), stderr()
    wanted = [r for r in chosen_rows(rows, table) if not decoupled_only or r.backbone == "softmax"]
    todo = [(r, b, c) for r in wanted for b, c in study.cells(r, b_seeds, c_seeds) if not study.row_file(r, b, c).is_file()]
    began = time.monotonic()
    for i, (row, b, c) in enumerate(todo):
        result = run_row(study, row, b, c, make_reporter(quiet))
        file = study.row_file(row, b, c)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json_module.dumps(result, indent=1) + "\n")
        if not quiet:
            left = time_left(study, todo[: i + 1], todo[i + 1 :], time.monotonic() - began)
            console.print(f"{i + 1}/{len(todo)}  {row.label}: top-1 {percent([result['top1']])} %, {result['seconds']:.0f} s; "
                          f"about {left / 60:.0f} min left", soft_wrap=True)  # fmt: skip
    finish(study, b_seeds, c_seeds, out, quiet)


def time_left(study: Study, done: list, todo: list, spent: float) -> float:
    """Seconds to go: stage-1 runs still to train cost what those here cost, the other rows what those cost."""

    def new(cells: list) -> set:
        return {(r.backbone, b) for r, b, _ in cells}

    reports = [study.backbone_dir(k, b) / "report.json" for k, b in new(done)]
    trained = [json_module.loads(f.read_text(encoding="utf-8"))["seconds"] for f in reports if f.is_file()]
    missing = [k for k in new(todo) if not study.backbone_dir(*k).complete("pretrain")]
    rest = max(spent - sum(trained), 0.0) / max(len(done), 1)
    return len(missing) * statistics.fmean(trained or [0.0]) + rest * len(todo)


@app.command()
def show(data: Data = "cifar10", imbalance: Imbalance = 200, preset: Preset = "quick", seeds: Seeds = "0,1,2",
         backbone_seeds: BackboneSeeds = "0", workspace: Workspace = Path("balms-runs/tables"),
         out: Out = Path("examples/results")) -> None:  # fmt: skip
    """Write and show the tables of the rows that are done."""
    finish(Study(data, imbalance, preset, workspace, {}), integers(backbone_seeds), integers(seeds), out, quiet=False)


def finish(study: Study, backbone_seeds: list[int], seeds: list[int], out: Path, quiet: bool) -> None:
    result = summary(study, backbone_seeds, seeds)
    if not result["rows"]:
        raise SystemExit(f"no row of {study.name} is done in {study.workspace}: python examples/tables.py run")
    path = write_result(result, out)
    if not quiet:
        from rich.markdown import Markdown

        stderr().print(Markdown(markdown(result)))
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    app()
