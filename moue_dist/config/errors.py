"""How a configuration is refused: one error, whose message names the option and the way out."""

from __future__ import annotations

BAD_CONFIGURATION = 2  # the exit code of a command that a ConfigError ended


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the option and the way out."""


def refuse(condition: bool, message: str) -> None:
    """Raise ConfigError where `condition` holds."""
    if condition:
        raise ConfigError(message)
