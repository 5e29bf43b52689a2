"""``balms meta-sample``."""

from typer import Context

from . import options as o
from .execute import train_stage


@o.having(o.TRAINING, o.CONFIG, o.MACHINE, o.RUN, o.TELLING)
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
    **options,
) -> None:
    """Learn the class sample rates alone; writes rates.json, rates.csv and rates.png."""
    train_stage("meta-sample", ctx.params)
