"""The settings of this driver: the table `[redis]`, and `redis = {...}` of a queue or topic."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from unibus.adapter import Secret, Url
from unibus.config_tables import DriverTable, check_table
from unibus.errors import ConfigError
from unibus.inboxes import plain
from unibus.tls import TlsTable, client_context
from unibus_redis.capabilities import LEASE

if TYPE_CHECKING:  # the settings need no client library
    from redis.asyncio import Redis, RedisCluster


class Settings(TlsTable):
    """`[redis]`. Times are seconds."""

    connect_timeout: float = Field(10.0, gt=0)  # for each host
    sentinel: str | None = Field(None, min_length=1)  # name of the master; the hosts of the URL are the sentinels
    lease: float = Field(LEASE, ge=1, le=43200)  # the same in every process that consumes from one server
    retention: float = Field(0.0, ge=0)  # how long topics keep what all groups have read
    allow_eviction: bool = False
    wait_replicas: int = Field(0, ge=0, le=100)  # a send is confirmed once so many replicas have it


class QueueOptions(DriverTable):
    group: str = Field("unibus", min_length=1, max_length=255)  # the consumer group on the queue's stream


@dataclass(frozen=True, slots=True)
class Login:
    """How to connect to every server of one installation."""

    name: str
    timeout: float
    tls: ssl.SSLContext | None
    username: str | None
    password: Secret | None
    database: int

    def commands(self) -> list[tuple[Any, ...]]:
        """The last one is answered with the number of the connection."""
        first: list[tuple[Any, ...]] = []
        if self.username is not None or self.password is not None:
            user = () if self.username is None else (self.username,)
            first.append(("AUTH", *user, "" if self.password is None else self.password.value))
        if self.database:
            first.append(("SELECT", self.database))
        return [*first, ("CLIENT", "SETNAME", self.name), ("CLIENT", "ID")]


def settings(table: Mapping[str, object]) -> Settings:
    return check_table(Settings, table, "redis")


def database(url: Url) -> int:
    if not url.path:
        return 0
    if not (url.path.isascii() and url.path.isdecimal()):
        raise ConfigError("url: the path of a Redis URL is the number of its database, as in redis://host/0")
    return int(url.path)


def login(url: Url, given: Settings, name: str) -> Login:
    """Reads the TLS files. Raises ConfigError."""
    context = client_context("redis", "rediss", url.scheme, given)
    return Login(plain(name), given.connect_timeout, context, url.username, url.password, database(url))


def client(given: Settings, login: Login, host: str, port: int, *, cluster: bool) -> Redis | RedisCluster:
    """redis-py's, for what unibus does not cover."""
    from redis.asyncio import Redis, RedisCluster
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    arguments: dict[str, Any] = {
        "host": host,
        "port": port,
        "username": login.username,
        "password": login.password and login.password.value,
        "client_name": login.name,
        "retry": Retry(NoBackoff(), 0),  # its default sends a command again whose answer was lost
        "ssl": login.tls is not None,
        "ssl_ca_certs": given.ca_file,
        "ssl_certfile": given.cert_file,
        "ssl_keyfile": given.key_file,
        "ssl_cert_reqs": "required" if given.verify else "none",
        "ssl_check_hostname": given.verify,
    }
    return RedisCluster(**arguments) if cluster else Redis(db=login.database, **arguments)
