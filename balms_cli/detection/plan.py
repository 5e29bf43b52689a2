"""``balms detect train --dry-run``: all that a run would meet, checked, and a few real steps to say how long it would take."""

from pathlib import Path

from ..config import DetectTrainConfig, Resolved
from ..engine.run_dir import RunDir
from ..engine.runtime import setup
from ..reporter import Reporter
from .annotations import Annotations

_TRIAL_STEPS = 3


def show_plan(resolved: Resolved[DetectTrainConfig], annotations: Annotations, images: Path, folder: RunDir, reporter: Reporter,
              *, offline: bool) -> None:  # fmt: skip
    """Print what would run. The images are looked for and a few steps taken, so that time and memory are measured."""
    from .train import seconds_a_step

    config = resolved.config
    seconds, gigabytes = seconds_a_step(config, annotations, images, reporter, offline=offline, trial_steps=_TRIAL_STEPS)
    passes = config.steps * config.batch_size / annotations.num_images
    reporter.table("dry run: nothing was written", ["what", "value"], [
        ["annotations", f"{annotations.path} ({annotations.num_images:,} images, {len(annotations.categories):,} categories)"],
        ["images", str(images)],
        ["detector", f"{config.backbone}-FPN, {'masks and boxes' if config.masks else 'boxes'}, {config.loss}"],
        ["weights", config.weights or "from scratch"],
        ["steps", f"{config.steps:,} of {config.batch_size} ({passes:.1f} passes over the images)"],
        ["device", setup(config.device, config.precision).describe()],
        ["result", str(folder.path)],
        ["time", f"about {seconds * config.steps / 60:.1f} minutes by {_TRIAL_STEPS} trial steps of {seconds:.2f} s"],
        ["memory", "not known here" if gigabytes is None else f"{gigabytes:.1f} GB at most so far"],
    ])  # fmt: skip
