"""``balms audit``."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from . import options as o
from .inspect import audit

_sources = ("cifar10", "cifar100", "digits")


def command(
    ctx: Context,
    data: Annotated[
        str | None,
        Argument(help="A folder of images by class, a list file of 'path label' lines, a CSV file, tar shards, cifar10, "
                 "cifar100, digits, a manifest, or - for stdin (default: the newest manifest).",
                 autocompletion=lambda incomplete: [s for s in _sources if s.startswith(incomplete)]),
    ] = None,
    decode: Annotated[bool | None, Option("--decode/--no-decode", help="Read every image in full (default), or only list the "
                                          "files and look at their status.")] = None,
    hashes: Annotated[bool | None, Option("--hash/--no-hash", help="Look for files with the same content (default: where "
                                          "images are decoded).")] = None,
    strict: Annotated[bool, Option("--strict", help="Exit 3 where a problem was found.")] = False,
    images: o.ImagesFolder = None,
    names: o.ClassNames = None,
    leaf_classes: o.LeafClasses = None,
    data_root: Annotated[Path | None, Option(envvar="BALMS_DATA", help="Where known data sets lie on disk.")] = None,
    offline: o.Offline = None,
    workers: o.Workers = None,
    config: o.ConfigFile = None,
    sets: o.Sets = None,
    print_config: o.PrintConfig = False,
    workspace: o.Workspace = Path("balms-runs"),
    out: Annotated[Path | None, Option(metavar="FILE", help="Write the JSON there.", rich_help_panel="Output")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file of --out.", rich_help_panel="Output")] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:  # fmt: skip
    """Look at a data set before anything is trained: counts, tail, leakage, bad files, and what to do about them."""
    audit(ctx.params)
