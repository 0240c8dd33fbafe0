"""The settings of this driver: the table `[redis]`, and `redis = {...}` of a queue or topic."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from pydantic import Field
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from unibus.adapter import Url
from unibus.config_tables import DriverTable, check_table
from unibus.errors import ConfigError
from unibus.tls import TlsTable, check_files
from unibus_redis.capabilities import LEASE

_SILENCE = 20  # seconds after which a peer that does not answer is dead, as the operating system sees it


class Settings(TlsTable):
    """`[redis]`. Times are seconds."""

    connect_timeout: float = Field(10.0, gt=0)  # for each host
    lease: float = Field(LEASE, ge=1, le=43200)  # the same in every process that consumes from one server
    retention: float = Field(0.0, ge=0)  # how long topics keep what all groups have read
    allow_eviction: bool = False


class QueueOptions(DriverTable):
    group: str = Field("unibus", min_length=1, max_length=255)  # the consumer group on the queue's stream


class NoOptions(DriverTable):
    """Of topics and groups."""


def settings(table: Mapping[str, object]) -> Settings:
    return check_table(Settings, table, "redis")


def database(url: Url) -> int:
    if not url.path:
        return 0
    if not (url.path.isascii() and url.path.isdecimal()):
        raise ConfigError("url: the path of a Redis URL is the number of its database, as in redis://host/0")
    return int(url.path)


def connections(url: Url, given: Settings, name: str) -> list[tuple[str, type[AbstractConnection], dict[str, Any]]]:
    """For each host: its name for people, the client's class and arguments. These hold the password: never to be shown."""
    secure = check_files("redis", "rediss", url.scheme, given)
    tls: dict[str, Any] = {
        "ssl_ca_certs": given.ca_file,
        "ssl_certfile": given.cert_file,
        "ssl_keyfile": given.key_file,
        "ssl_cert_reqs": "required" if given.verify else "none",
        "ssl_check_hostname": given.verify,
    }
    return [
        (
            f"{host}:{port}",
            SSLConnection if secure else Connection,
            {
                "host": host,
                "port": port,
                "db": database(url),
                "username": url.username,
                "password": None if url.password is None else url.password.value,
                "client_name": "".join(c if c.isalnum() and c.isascii() else "-" for c in name),
                "protocol": 2,  # the shape of the replies that we read
                "socket_timeout": None,  # each call has its own, and a blocking read none
                "socket_connect_timeout": given.connect_timeout,
                "socket_keepalive": True,
                "socket_keepalive_options": _keepalive(),
                "retry": Retry(NoBackoff(), 0),  # its default sends a command again whose answer was lost
                "health_check_interval": 0,
                **(tls if secure else {}),
            },
        )
        for host, port in url.targets(6379)
    ]


def _keepalive() -> dict[int, int]:
    """So that a peer that vanished is noticed, also while nothing is sent. Names that this system does not know are left out."""
    wanted = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": _SILENCE * 1000}
    return {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}
