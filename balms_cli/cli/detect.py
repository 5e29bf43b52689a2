"""``balms detect``: not built yet, and says so."""

from typing import Annotated

import typer

from ..errors import ConfigError


def command(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
    """Long-tailed instance segmentation (LVIS). Not built yet."""
    raise ConfigError(
        "balms detect is not built yet: Mask R-CNN training, classifier fine-tuning and LVIS evaluation are missing"
    )
