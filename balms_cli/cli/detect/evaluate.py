"""``balms detect evaluate``."""

from ...errors import ConfigError


def command() -> None:
    """Not built yet."""
    raise ConfigError("balms detect evaluate is not built yet")
