"""``balms evaluate``."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from . import options as o
from .inspect import evaluate


@o.having(o.CONFIG, o.MACHINE, o.WORKSPACE, o.TELLING)
def command(
    ctx: Context,
    runs: Annotated[list[str] | None, Argument(metavar="RUN...", help="Runs to score side by side, - for stdin "
                                               "(default: the newest run).")] = None,
    data: o.Data = None,
    report: Annotated[Path | None, Option(metavar="FOLDER", help="Write a report there: one page (index.html), its figures as "
                                          "PNG, its numbers as JSON, CSV and Markdown.")] = None,
    predictions: Annotated[Path | None, Option(metavar="FILE", help="Write each image's key, true and predicted class and raw "
                                               "logits there, as .csv or .npz: raw also with --target-prior and "
                                               "--posthoc-tau.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an earlier report in --report, or the file of "
                                      "--predictions.")] = False,
    require: Annotated[list[str] | None, Option(metavar="EXPR", help="Gate such as 'few>=0.30' or 'ece<=5%'; repeatable; "
                                                "exit 6 where one is not met.")] = None,
    split: Annotated[str | None, Option(help="test, val or train.")] = None,
    target_prior: o.TargetPrior = None,
    posthoc_tau: o.PosthocTau = None,
    bound: Annotated[bool | None, Option("--bound", help="Margins and terms of the generalisation bound, on training "
                                         "images.")] = None,
    batch_size: o.BatchSize = None,
    **options,
) -> None:  # fmt: skip
    """Score checkpoints on the test split: overall, many/medium/few-shot, class by class."""
    evaluate(ctx.params)
