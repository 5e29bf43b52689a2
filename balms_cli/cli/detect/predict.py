"""``balms detect predict``."""

from ...errors import ConfigError


def command() -> None:
    """Not built yet."""
    raise ConfigError("balms detect predict is not built yet")
