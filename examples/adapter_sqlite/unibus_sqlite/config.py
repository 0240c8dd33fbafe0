"""The settings of this driver: the table `[sqlite]`."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from unibus.adapter import Url
from unibus.config_tables import DriverTable, check_table
from unibus.errors import ConfigError
from unibus_sqlite.capabilities import LEASE, POLL


class Settings(DriverTable):
    """`[sqlite]`. Times are seconds."""

    lease: float = Field(LEASE, ge=1, le=43200)
    poll: float = Field(POLL, gt=0, le=10)  # how often a consumer looks for what other processes have sent
    busy_timeout: float = Field(5.0, ge=0, le=60)  # how long to wait for another process to finish its transaction


def settings(table: Mapping[str, object]) -> Settings:
    """Raises ConfigError."""
    return check_table(Settings, table, "sqlite")


def file(url: Url) -> str:
    """The path of the file, relative with three slashes and absolute with four. Raises ConfigError."""
    if url.hosts or url.username or not url.path:
        raise ConfigError("url: write sqlite:///file.db, or sqlite:////folder/file.db for an absolute path")
    return url.path
