"""``balms retrain``: stage 2. A new classifier for a pretrained backbone, trained for the rare classes too."""

from pathlib import Path

from ..config import Resolved, RetrainConfig
from ..data.manifest import Manifest, now
from ..engine.distributed import ALONE, World
from ..engine.header import FORMAT, Header, sha256_of
from ..engine.run_dir import RATES, RunDir, clear_run
from ..engine.runtime import setup
from ..engine.tensorboard import require_tensorboard
from ..models.classifiers import Classifier, CosineHead
from ..reporter import Reporter
from .common import RunResult, data_summary, finish, provenance
from .decoupled import fit_head, open_parent
from .heads import loss_name
from .rates import rates_document, rates_record, show_rates


def run(resolved: Resolved[RetrainConfig], parent_file: Path, manifest: Manifest, folder: RunDir,
        reporter: Reporter | None = None, *, resume: bool = False, world: World = ALONE) -> RunResult:  # fmt: skip
    """Train a classifier on the features of the checkpoint ``parent_file``; writes the whole network to ``folder``.

    Raises: CheckpointError (damaged, or of other classes), DataError, ConfigError, DivergedError, Interrupted.
    """
    config, reporter = resolved.config, reporter or Reporter()
    require_tensorboard(config)
    runtime = setup(config.device, config.precision, deterministic=config.deterministic)
    model, parent, rates_C = open_parent(config, parent_file, manifest)
    parent_sha256 = sha256_of(parent_file)
    if not resume:
        clear_run(folder)
        folder.create(resolved, provenance(manifest, runtime, parent=str(parent_file.resolve()), parent_sha256=parent_sha256,
                                           **rates_record(config.sampler)))  # fmt: skip

    fit = fit_head(config, "retrain", model, parent, parent_file, manifest, rates_C, folder, runtime, reporter, resume=resume,
                   world=world)  # fmt: skip
    if fit is None:
        return RunResult(folder.path, {})
    if fit.rates is not None:
        document = rates_document(fit.rates, manifest.classes, manifest.class_counts)
        folder.write_json(RATES, document)
        fit.report["rates_variance"] = document["variance"]
        show_rates(fit.rates, manifest, "sample rates" if config.meta_sampler else "class weights", reporter)

    trained = config.head not in ("tau-norm", "ncm")
    sampler = f"meta ({config.meta_estimator})" if config.meta_sampler else config.sampler
    header = Header(
        format=FORMAT, created=now(), stage="retrain", backbone=parent.backbone, feature_dim=parent.feature_dim,
        image_size=parent.image_size, classes=manifest.classes, class_counts=manifest.class_counts, mean=parent.mean,
        std=parent.std, head="cosine" if isinstance(fit.head, CosineHead) else "linear",
        classifier=config.head, loss=loss_name(config) if trained else config.head,
        sampler=(sampler if trained else "none") + (" + reweigher" if config.meta_reweigher else ""),
        implied_log_prior=fit.log_prior.tolist(), prior_exact=fit.prior_exact, recipe=config.model_dump(mode="json")
        | {"augment": parent.recipe.get("augment", [])}, data=data_summary(manifest), manifest=str(manifest.path.resolve()),
        manifest_sha256=manifest.sha256, parent_sha256=parent_sha256,
    )  # fmt: skip
    return finish(folder, Classifier(model.backbone.cpu(), fit.head), header, manifest, fit.report, runtime)
