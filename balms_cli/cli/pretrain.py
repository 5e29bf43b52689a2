"""``balms pretrain``."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from . import options as o
from .execute import print_backbones, train_stage


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
    batch_size: o.BatchSize = None,
    lr: o.Lr = None,
    seed: o.Seed = None,
    config: o.ConfigFile = None,
    sets: o.Sets = None,
    print_config: o.PrintConfig = False,
    device: o.Device = None,
    precision: o.Precision = None,
    workers: o.Workers = None,
    compile: Annotated[str | None, Option(help="torch.compile the network: auto (in long runs), off, on, or cuda-graphs (GPU).",
                                          autocompletion=o.complete("auto", "off", "on", "cuda-graphs"),
                                          rich_help_panel="Run")] = None,
    offline: o.Offline = None,
    resume: o.Resume = None,
    workspace: o.Workspace = Path("balms-runs"),
    out: o.Out = None,
    overwrite: o.Overwrite = False,
    tensorboard: o.Tensorboard = None,
    dry_run: o.DryRun = False,
    profile: o.Profile = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Stage 1: train the backbone (by default with softmax on instance-balanced batches)."""
    if list_backbones:
        return print_backbones(ctx.params)
    return train_stage("pretrain", ctx.params)
