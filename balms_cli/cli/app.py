"""The ``balms`` command: its subcommands, and the one place where errors become a line and an exit code."""

import errno
import os
import sys
import traceback
from typing import Annotated

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import BalmsError, one_line
from . import audit, demo, detect, evaluate, export, make_lt, meta_sample, predict, pretrain, retrain

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}


class ErrorBoundary(TyperGroup):
    """Runs a subcommand and turns what it raises into one line on stderr and the exit code of its kind."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away: nothing to say
            raise typer.Exit(1) from None
        except (Exception, KeyboardInterrupt) as error:
            if type(error).__module__.split(".")[0] in ("typer", "click"):  # Exit and usage errors come by too
                raise
            caught, (code, message) = error, _told(error)
        from .console import print_error

        if os.environ.get("BALMS_DEBUG") == "1":
            traceback.print_exception(caught)
        if code == 1 or os.environ.get("RANK", "0") == "0":  # of several processes one tells what all of them met
            print_error(message)
        raise typer.Exit(code)


def _told(error: BaseException) -> tuple[int, str]:
    """Exit code and line for what a subcommand raised."""
    if isinstance(error, BalmsError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; run the same command again"
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        from ..data.aside import write_error

        told = write_error(error, error.filename or "the result")
        return told.exit_code, str(told)
    if isinstance(error, OSError) and error.errno in _NOT_OURS:  # read or written, who knows: a path that the user named
        return 2, f"{error.filename or 'a file'}: {error.strerror}; change that, or choose another place"
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:  # how Python keeps such bytes
        return 2, "the path of a folder or file here has bytes that are not UTF-8: rename it"
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error):
        return 1, "out of memory; give a smaller --batch-size or --image-size (detect train: --set accumulate=2)"
    return 1, f"{type(error).__name__}: {one_line(error, 300)} (a bug of balms; --debug shows where)"


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
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us: no file of ours may get its number, and be written to
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    app()
