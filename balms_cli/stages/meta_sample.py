"""``balms meta-sample``: learn the class sample rates alone, to look at them or to train with them later."""

import csv
import io
from pathlib import Path

from ..config import MetaSampleConfig, Resolved
from ..data.aside import inert, replace_file
from ..data.manifest import Manifest
from ..engine.distributed import ALONE, World
from ..engine.header import sha256_of
from ..engine.run_dir import RATES, REPORT, RunDir, clear_run
from ..engine.runtime import setup, versions
from ..engine.tensorboard import require_tensorboard
from ..reporter import Reporter
from .common import RunResult, data_summary, provenance
from .decoupled import fit_head, open_parent
from .rates import rates_document, show_rates


def run(resolved: Resolved[MetaSampleConfig], parent_file: Path, manifest: Manifest, folder: RunDir,
        reporter: Reporter | None = None, *, resume: bool = False, world: World = ALONE) -> RunResult:  # fmt: skip
    """Run the meta sampler on a checkpoint's features; writes rates.csv, rates.png and, last, rates.json.

    Raises as ``retrain`` does.
    """
    from ..report.plots import rates_chart

    config, reporter = resolved.config, reporter or Reporter()
    require_tensorboard(config)
    runtime = setup(config.device, config.precision, deterministic=config.deterministic)
    model, parent, _ = open_parent(config, parent_file, manifest)
    if not resume:
        clear_run(folder)
        folder.create(resolved, provenance(manifest, runtime, parent=str(parent_file.resolve()),
                                           parent_sha256=sha256_of(parent_file)))  # fmt: skip
    fit = fit_head(config, "meta-sample", model, parent, parent_file, manifest, None, folder, runtime, reporter, resume=resume,
                   world=world)  # fmt: skip
    if fit is None:
        return RunResult(folder.path, {})

    document = rates_document(fit.rates, manifest.classes, manifest.class_counts)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["class", "train_count", "rate"])
    order = sorted(range(len(manifest.classes)), key=lambda c: -manifest.class_counts[c])
    writer.writerows([inert(manifest.classes[c]), manifest.class_counts[c], f"{fit.rates[c]:.6f}"] for c in order)
    replace_file(folder / "rates.csv", table.getvalue())
    rates_chart({config.loss: document}, folder / "rates.png")
    show_rates(fit.rates, manifest, "sample rates", reporter)
    reporter.note(f"variance of the rates over classes: {document['variance']:.4f}")
    report = {"stage": "meta-sample", "loss": config.loss, "estimator": config.meta_estimator, **fit.report,
              "rates_variance": document["variance"], "data": data_summary(manifest), "manifest_sha256": manifest.sha256,
              "seed": config.seed, "device": runtime.describe(), "versions": versions()}  # fmt: skip
    folder.write_json(REPORT, report)
    folder.write_json(RATES, document | {"loss": config.loss, "estimator": config.meta_estimator, "seed": config.seed,
                                         "manifest_sha256": manifest.sha256})  # fmt: skip
    return RunResult(folder.path, report)
