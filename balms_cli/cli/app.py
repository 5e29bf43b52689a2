"""The ``balms`` command: its subcommands, and the one place where errors become a line and an exit code."""

import errno
import os
import sys
import traceback
from typing import Annotated

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import BalmsError
from . import audit, demo, detect, evaluate, export, make_lt, meta_sample, predict, pretrain, retrain

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class ErrorBoundary(TyperGroup):
    """Runs a subcommand and turns what it raises into one line on stderr and the exit code of its kind."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BalmsError as error:
            caught, code, message = error, error.exit_code, str(error)
        except KeyboardInterrupt as error:
            caught, code, message = error, 130, "interrupted; nothing to resume, run the same command again"
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away: nothing to say
                raise typer.Exit(1) from None
            from ..data.aside import write_error

            told = write_error(error, error.filename or "the result")
            caught, code, message = error, 1, _bug(error)
            if error.errno in _NO_ROOM:
                code, message = told.exit_code, str(told)
        except Exception as error:  # Exit and usage errors come by too: they are not bugs
            if type(error).__module__.split(".")[0] in ("typer", "click"):
                raise
            caught, code, message = error, 1, _bug(error)
        from .console import print_error

        if os.environ.get("BALMS_DEBUG") == "1":
            traceback.print_exception(caught)
        if code == 1 or os.environ.get("RANK", "0") == "0":  # of several processes one tells what all of them met
            print_error(message)
        raise typer.Exit(code)


def _bug(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return "out of device memory; give a smaller --batch-size or --image-size (detect train: --set accumulate=2)"
    return f"{type(error).__name__}: {error} (a bug of balms; --debug shows where)"


app = typer.Typer(
    cls=ErrorBoundary,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Classifiers that know their rare classes: Balanced Meta-Softmax for images with a long tail.",
    epilog="Start with: balms demo. A path printed by one stage is the next one's input, also through a pipe: "
    "balms make-lt cifar100 --imbalance 200 | balms pretrain - | balms retrain - --meta-sampler | balms evaluate -",
)


def _version(value: bool) -> None:
    if value:
        print(f"balms {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
):
    pass


app.command("make-lt")(make_lt.command)
app.command("audit")(audit.command)
app.command("pretrain")(pretrain.command)
app.command("retrain")(retrain.command)
app.command("meta-sample")(meta_sample.command)
app.command("evaluate")(evaluate.command)
app.command("predict")(predict.command)
app.command("export")(export.command)
app.add_typer(detect.app, name="detect")
app.command("demo")(demo.command)


def main() -> None:
    app()
