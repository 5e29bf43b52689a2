"""``balms demo``."""

from pathlib import Path
from typing import Annotated

from typer import Context, Option

from . import options as o
from .execute import demo


def command(
    ctx: Context,
    workspace: Annotated[Path, Option(help="The demo's own workspace.")] = Path("balms-demo"),
    seed: o.Seed = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """The whole chain on handwritten digits made long-tailed, in under two minutes."""
    demo(ctx.params)
