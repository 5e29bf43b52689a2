"""``balms demo``: the whole chain on scikit-learn's handwritten digits, made long-tailed."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import EvaluateConfig, MakeLTConfig, Resolved, resolve
from ..data.aside import write_error
from ..data.manifest import Manifest
from ..engine.run_dir import MODEL, RATES, RunDir
from ..errors import ConfigError
from ..presets import choose
from ..report.plots import methods_chart
from ..reporter import Reporter
from . import evaluate, make_lt, meta_sample, pretrain, retrain
from .evaluate_show import percent
from .rates import load_rates

IMBALANCE = 40  # 128 images down to 3: all three shot groups exist
MARK = ".balms-demo"


@dataclass(frozen=True)
class DemoResult:
    """Where everything lies, and the figures of the three methods."""

    path: Path
    methods: dict[str, dict[str, Any]]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"methods": self.methods, "seconds": self.seconds, "workspace": str(self.path)}


def run(workspace: Path, seed: int = 0, reporter: Reporter | None = None) -> DemoResult:
    """make-lt, pretrain, retrain (Balanced Softmax; BALMS), meta-sample (softmax), evaluate; ends in a table and a chart.

    A workspace of its own is used, and what an earlier demo left in it is replaced.
    """
    reporter, began = reporter or Reporter(), time.monotonic()
    _claim(workspace)
    made = make_lt.run(MakeLTConfig(source="digits", imbalance=IMBALANCE, seed=seed), workspace, reporter)
    data = made.manifest

    def folder(name: str) -> RunDir:
        return RunDir(workspace / "runs" / name)

    def recipe(stage: str, **flags: Any) -> Resolved:
        return resolve(stage, preset=choose(stage, "digits", "quick", on_gpu=False), flags={"seed": seed, **flags})

    first = folder("softmax")
    pretrain.run(recipe("pretrain"), data, first, reporter)
    parent = first / MODEL
    retrain.run(recipe("retrain", loss="balanced"), parent, data, folder("balanced"), reporter)
    retrain.run(recipe("retrain", loss="balanced", meta_sampler=True), parent, data, folder("balms"), reporter)
    meta_sample.run(recipe("meta-sample", loss="softmax"), parent, data, folder("rates-softmax"), Reporter())

    names = ("softmax", "balanced", "balms")
    found = evaluate.run(EvaluateConfig(), [folder(n) / MODEL for n in names], data.path, Reporter())
    methods = dict(zip(names, found.runs, strict=True))
    rates = {"softmax": load_rates(folder("rates-softmax") / RATES), "balanced": load_rates(folder("balms") / RATES)}
    chart = workspace / "demo.png"
    methods_chart(methods, rates, chart, f"Digits, {data.class_counts[0]} to {min(data.class_counts)} training images a class")
    result = DemoResult(workspace, methods, round(time.monotonic() - began, 1))
    _show(result, rates, chart, data, reporter)
    return result


def _claim(workspace: Path) -> None:
    """The demo writes over its own last result, never over anything else."""
    try:
        if workspace.is_dir() and any(workspace.iterdir()) and not (workspace / MARK).exists():
            raise ConfigError(f"{workspace} is not the demo's own folder; choose another: balms demo --workspace DIR")
        workspace.mkdir(parents=True, exist_ok=True)
        (workspace / MARK).touch()
    except OSError as error:
        raise write_error(error, workspace) from None


def _show(result: DemoResult, rates: dict[str, dict], chart: Path, data: Manifest, reporter: Reporter) -> None:
    shown = {"softmax": "softmax (pretrain)", "balanced": "+ balanced (retrain)", "balms": "+ meta sampler: BALMS"}
    columns = ["accuracy %", "many-shot", "medium-shot", "few-shot", "all classes"]
    keys = ("many", "medium", "few", "balanced_accuracy")
    rows = [[shown[name], *(percent(r[k]) for k in keys)] for name, r in result.methods.items()]
    tested = len(data.splits["test"])
    reporter.table(f"digits made long-tailed, {tested} test images, {result.seconds:.0f} s", columns, rows)
    for name, document in rates.items():
        order = sorted(document["class_counts"], key=lambda c: -document["class_counts"][c])
        reporter.bars(f"sample rates learned with {name} (variance {document['variance']:.3f})",
                      [f"{c} ({document['class_counts'][c]})" for c in order], [document["rates"][c] for c in order],
                      [f"{document['rates'][c]:.2f}" for c in order])  # fmt: skip
    reporter.note(f"chart: {chart}")
    reporter.note(f"next, class by class:   balms evaluate {result.path}/runs/balms")
    reporter.note("your own photos:        balms make-lt ./photos --as-is | balms pretrain - | balms retrain - --meta-sampler")
    reporter.note("the paper's data:       balms make-lt cifar100 --imbalance 200")
