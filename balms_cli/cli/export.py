"""``balms export``."""

from pathlib import Path
from typing import Annotated

from typer import Context, Option

from ..config import EXPORTS
from . import options as o
from .inspect import export


def command(
    ctx: Context,
    run: o.Checkpoint = None,
    to: Annotated[str | None, Option(help="onnx (default), torch (a torch.export program) or safetensors (plain weights).",
                                     autocompletion=o.complete(*EXPORTS))] = None,
    images: Annotated[int | None, Option(help="Images that the exported model is checked on (default 64).")] = None,
    tolerance: Annotated[float | None, Option(help="Largest difference of an answer that is let pass (default 1e-4).")] = None,
    target_prior: o.TargetPrior = None,
    posthoc_tau: o.PosthocTau = None,
    data: o.Data = None,
    config: o.ConfigFile = None,
    sets: o.Sets = None,
    print_config: o.PrintConfig = False,
    workers: o.Workers = None,
    workspace: o.Workspace = Path("balms-runs"),
    out: Annotated[Path | None, Option(help="The file, for safetensors the folder (default: in export/ of the run).",
                                       rich_help_panel="Output")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an earlier export.", rich_help_panel="Output")] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:  # fmt: skip
    """Write a run's network for use elsewhere, checked against the run's own answers on real images."""
    export(ctx.params)
