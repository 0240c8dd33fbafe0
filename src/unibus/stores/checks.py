"""What all stores check of their options."""

from __future__ import annotations

from unibus.errors import ConfigError


def seconds(store: str, *, lease: float, keep: float) -> None:
    """Raises ConfigError for what can't be a time."""
    for name, value in (("lease", lease), ("keep", keep)):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{store}({name}={value}): use seconds, more than 0")
    if keep < lease:
        raise ConfigError(f"{store}(keep={keep}): what is done is kept for longer than lease={lease}")
