"""``balms detect stats``."""

from ...errors import ConfigError


def command() -> None:
    """Not built yet."""
    raise ConfigError("balms detect stats is not built yet")
