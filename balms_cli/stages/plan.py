"""``--dry-run``: what a run would begin with, checked, and a few real steps of stage 1 to say how long it would take."""

import re
from pathlib import Path

from ..config import PretrainConfig, Resolved, TrainConfig
from ..data.manifest import Manifest
from ..engine.run_dir import RunDir
from ..engine.runtime import setup
from ..reporter import Reporter

_TRIAL_STEPS = 4


def run_label(resolved: Resolved[TrainConfig], manifest: Manifest) -> str:
    """A readable name for a run's folder: data, loss, and what else sets it apart."""
    config = resolved.config
    sampler = "rates" if config.sampler.endswith(".json") else config.sampler
    extra = [f"tau{config.loss_exponent:g}"] if config.loss_exponent != 1 else []
    extra += ["drw"] if config.drw else []
    extra += [sampler] if sampler != "instance" else []
    loss = config.loss
    if config.head not in ("linear", "cosine"):
        loss = config.head if config.head in ("tau-norm", "ncm") else f"{config.head}-{loss}"
    elif config.head == "cosine" and loss != "ldam":
        extra += ["cosine"]
    if isinstance(config, PretrainConfig):
        extra += [config.reweight] if config.reweight != "none" else []
        extra += [config.backbone] if config.backbone != "resnet32" else []
        extra += ["frozen"] if config.frozen else []
    else:
        extra += ["meta"] if config.meta_sampler else ["reweigher"] if config.meta_reweigher else []
    extra += [f"seed{config.seed}"] if config.seed else []
    return re.sub(r"[^\w.-]+", "-", "-".join([manifest.name, loss, *extra]))


def show_plan(
    resolved: Resolved[TrainConfig], manifest: Manifest, parent: Path | None, folder: RunDir, reporter: Reporter
) -> None:
    """Print what would run. For pretrain the images are loaded and four steps taken, so the time is measured; for stage 2
    all is checked that needs no image."""
    config = resolved.config
    runtime = setup(config.device, config.precision)
    images = len(manifest.splits["train"])
    steps = config.total_steps(images)
    rows = [
        ["data", f"{manifest.path} ({images} images, {len(manifest.classes)} classes)"],
        ["checkpoint", str(parent or config.model_dump().get("weights") or "from scratch")],
        ["loss, sampler", f"{config.loss}, {config.sampler}"],
        ["steps", f"{steps} of {config.batch_size} ({steps * config.batch_size / images:.1f} passes over the images)"],
        ["device", runtime.describe()],
        ["result", str(folder.path)],
    ]
    if isinstance(config, PretrainConfig) and not config.frozen:
        from .pretrain import seconds_a_step

        seconds = seconds_a_step(config, manifest, reporter, trial_steps=_TRIAL_STEPS)
        rows.append(["time", f"about {seconds * steps / 60:.1f} minutes by {_TRIAL_STEPS} trial steps"])
    elif parent is not None:
        from .decoupled import open_parent

        header = open_parent(config, parent, manifest)[1]
        if config.features == "bank" and config.head not in ("tau-norm", "ncm"):
            from .features import BankFile, describe_bank, views_of

            views_N = views_of(config, "train", header, manifest)
            file = BankFile(parent.parent / "features" / "bank.safetensors", int(views_N.sum()), header.feature_dim)
            rows.insert(-1, ["feature bank", describe_bank(file)])
    reporter.table("dry run: nothing was written", ["what", "value"], rows)
