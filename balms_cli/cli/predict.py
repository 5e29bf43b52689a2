"""``balms predict``."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from . import options as o
from .inspect import predict


def command(
    ctx: Context,
    run: Annotated[str, Argument(metavar="RUN", help="A run's folder or its model.safetensors, - for stdin.")],
    images: Annotated[list[str], Argument(metavar="IMAGES...", help="Image files, and folders with images at any depth; - "
                                          "reads paths from stdin, one a line.")],
    top_k: Annotated[int | None, Option("--top-k", "-k", min=1, help="Classes named for an image (default 5).")] = None,
    json: Annotated[bool, Option("--json", help="Print one JSON object a line, for each image.",
                                 rich_help_panel="Output")] = False,
    target_prior: o.TargetPrior = None,
    posthoc_tau: o.PosthocTau = None,
    calibrate: Annotated[bool | None, Option("--calibrate/--no-calibrate", help="Scale the scores by a temperature fitted on "
                                             "the validation split, where the run's data has one (default: yes).")] = None,
    data: Annotated[Path | None, Option(help="Where the run's manifest is now, for its validation split.")] = None,
    batch_size: Annotated[int | None, Option(help="Images a forward pass (default 64).", rich_help_panel="Recipe")] = None,
    config: o.ConfigFile = None,
    sets: o.Sets = None,
    print_config: o.PrintConfig = False,
    device: o.Device = None,
    precision: o.Precision = None,
    workers: o.Workers = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:  # fmt: skip
    """Classify images: the likeliest classes of each, and their scores.

    Into a pipe or a file: a line an image, PATH, CLASS, SCORE, CLASS, SCORE ... between tabs. What cannot be read is told
    on stderr and left out; exit 3 where nothing could be read.
    """
    predict(ctx.params)
