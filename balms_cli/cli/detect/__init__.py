"""``balms detect``: long-tailed instance segmentation, one file a subcommand."""

import typer

from . import evaluate, finetune, predict, stats, train

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Instance segmentation with a long tail (LVIS): train, rebalance the classifier, evaluate, predict.",
)
app.command("stats")(stats.command)
app.command("train")(train.command)
app.command("finetune")(finetune.command)
app.command("evaluate")(evaluate.command)
app.command("predict")(predict.command)
