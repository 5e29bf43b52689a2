"""``balms detect finetune``."""

from ...errors import ConfigError


def command() -> None:
    """Not built yet."""
    raise ConfigError("balms detect finetune is not built yet")
