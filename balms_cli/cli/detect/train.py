"""``balms detect train``."""

from ...errors import ConfigError


def command() -> None:
    """Not built yet."""
    raise ConfigError("balms detect train is not built yet")
