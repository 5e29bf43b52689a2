"""``balms pretrain``."""

from typing import Annotated

from typer import Argument, Context, Option

from . import options as o
from .execute import print_backbones, train_stage


@o.having(o.TRAINING, o.CONFIG, o.MACHINE, o.RUN, o.TELLING)
def command(
    ctx: Context,
    data: Annotated[str | None, Argument(metavar="DATA", help="A manifest, - for stdin (default: the newest).")] = None,
    loss: o.Loss = None,
    loss_exponent: o.LossExponent = None,
    drw: o.Drw = None,
    classifier: o.Head = None,
    sampler: o.Sampler = None,
    reweight: o.Reweight = None,
    meta_set: o.MetaSet = None,
    backbone: Annotated[
        str | None, Option(help="resnet32 (CIFAR), any torchvision classifier (resnet18, vit_b_16), or timm:NAME; see --list.")
    ] = None,
    list_backbones: Annotated[bool, Option("--list", help="Print all backbones, and what --weights takes for each.")] = False,
    weights: Annotated[
        str | None, Option(help="Start from imagenet (torchvision's), timm, pip:PACKAGE (a file in it), or a weights file.")
    ] = None,
    frozen: Annotated[bool | None, Option("--frozen", help="Take the backbone as it is; train nothing here.")] = None,
    image_size: Annotated[int | None, Option(help="Pixels a side fed to the network.")] = None,
    preset: o.Preset = None,
    steps: o.Steps = None,
    epochs: o.Epochs = None,
    compile: o.Compile = None,
    offline: o.Offline = None,
    profile: o.Profile = False,
    **options,
) -> None:
    """Stage 1: train the backbone (by default with softmax on instance-balanced batches)."""
    if list_backbones:
        return print_backbones(ctx.params)
    return train_stage("pretrain", ctx.params)
