"""``balms meta-sample``."""

from pathlib import Path

from typer import Context

from . import options as o
from .execute import train_stage


def command(
    ctx: Context,
    run: o.Checkpoint = None,
    data: o.Data = None,
    loss: o.Loss = None,
    loss_exponent: o.LossExponent = None,
    meta_estimator: o.MetaEstimator = None,
    gumbel_temperature: o.GumbelTemperature = None,
    hypergradient: o.Hypergradient = None,
    meta_set: o.MetaSet = None,
    features: o.FeatureMode = None,
    views: o.Views = None,
    preset: o.Preset = None,
    steps: o.Steps = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    lr: o.Lr = None,
    seed: o.Seed = None,
    config: o.ConfigFile = None,
    sets: o.Sets = None,
    print_config: o.PrintConfig = False,
    device: o.Device = None,
    precision: o.Precision = None,
    workers: o.Workers = None,
    resume: o.Resume = None,
    workspace: o.Workspace = Path("balms-runs"),
    out: o.Out = None,
    overwrite: o.Overwrite = False,
    tensorboard: o.Tensorboard = None,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Learn the class sample rates alone; writes rates.json, rates.csv and rates.png."""
    train_stage("meta-sample", ctx.params)
