"""``balms retrain``."""

from typing import Annotated

from typer import Context, Option

from . import options as o
from .execute import train_stage


@o.having(o.TRAINING, o.CONFIG, o.MACHINE, o.RUN, o.TELLING)
def command(
    ctx: Context,
    run: o.Checkpoint = None,
    data: o.Data = None,
    classifier: o.Classifier = None,
    tau_norm: o.TauNorm = None,
    loss: o.Loss = None,
    loss_exponent: o.LossExponent = None,
    drw: o.Drw = None,
    sampler: o.Sampler = None,
    meta_sampler: Annotated[bool | None, Option("--meta-sampler", help="Learn the class sample rates (BALMS).")] = None,
    meta_estimator: o.MetaEstimator = None,
    gumbel_temperature: o.GumbelTemperature = None,
    meta_reweigher: Annotated[bool | None, Option("--meta-reweigher", help="Learn class weights instead.")] = None,
    weight_norm: Annotated[str | None, Option(help="Reweigher: mean (1 in a batch) or none.")] = None,
    hypergradient: o.Hypergradient = None,
    meta_set: o.MetaSet = None,
    features: o.FeatureMode = None,
    views: o.Views = None,
    preset: o.Preset = None,
    steps: o.Steps = None,
    epochs: o.Epochs = None,
    **options,
) -> None:
    """Stage 2: a new classifier on the fixed features of a checkpoint (default loss: Balanced Softmax)."""
    train_stage("retrain", ctx.params)
