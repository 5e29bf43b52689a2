"""``balms make-lt``."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from . import options as o
from .execute import make_lt

_sources = ("cifar10", "cifar100", "digits")


def command(
    ctx: Context,
    source: Annotated[
        str | None,
        Argument(
            help="cifar10, cifar100, digits (the default), a folder of images by class, a list file of 'path label' lines, a "
            "CSV file (path,label[,split]), or WebDataset shards (a folder of tars, or 'train-{000..012}.tar').",
            autocompletion=lambda incomplete: [s for s in _sources if s.startswith(incomplete)],
        ),
    ] = None,
    imbalance: Annotated[float | None, Option(help="Imbalance factor: largest class count / smallest.")] = None,
    profile: Annotated[str | None, Option(help="exponential (the paper's for CIFAR), step, or pareto (ImageNet-LT's).")] = None,
    alpha: Annotated[float | None, Option(help="Exponent of --profile pareto (default 6).")] = None,
    as_is: Annotated[bool | None, Option("--as-is", help="Keep every image: long-tailed by nature.")] = None,
    head_size: Annotated[int | None, Option(help="Images of the largest class (default: all it has).")] = None,
    val_per_class: Annotated[
        int | None, Option(help="Images a class kept for validation, cut before the tail is made.")
    ] = None,
    meta_per_class: Annotated[
        int | None, Option(help="Images a class kept as a meta set, cut before the tail is made.")
    ] = None,
    skip_bad: Annotated[bool | None, Option("--skip-bad", help="Leave out unreadable images, and record them.")] = None,
    images: o.ImagesFolder = None,
    names: o.ClassNames = None,
    leaf_classes: o.LeafClasses = None,
    data_root: Annotated[Path | None, Option(envvar="BALMS_DATA", help="Where known data sets lie on disk.")] = None,
    offline: o.Offline = None,
    seed: o.Seed = None,
    config: o.ConfigFile = None,
    sets: o.Sets = None,
    print_config: o.PrintConfig = False,
    workspace: o.Workspace = Path("balms-runs"),
    out: o.Out = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Make a long-tailed data set: a manifest over images that stay where they are."""
    make_lt(ctx.params)
