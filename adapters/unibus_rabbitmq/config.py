"""The settings of this driver: the table `[rabbitmq]`, and `rabbitmq = {...}` of a queue, topic or group."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from unibus.adapter import Url
from unibus.config_tables import DriverTable
from unibus.errors import ConfigError
from unibus.tls import TlsTable, client_context

if TYPE_CHECKING:  # the settings need no client library
    from yarl import URL

ExchangeType = Literal["direct", "fanout", "topic", "headers"]


class Settings(TlsTable):
    """`[rabbitmq]`. Times are seconds."""

    connect_timeout: float = Field(10.0, gt=0)  # for each host
    heartbeat: int = Field(20, ge=1, le=600)  # a dead link is noticed after three of these


class QueueOptions(DriverTable):
    """Of a queue. With `exchange`, sends go through it, and the queue is bound to it."""

    queue_type: Literal["quorum", "classic"] | None = None
    exchange: str | None = Field(None, min_length=1, max_length=255)
    exchange_type: ExchangeType = "direct"
    routing_key: str | None = Field(None, max_length=255)
    arguments: dict[str, str | int | bool] = Field({})  # of the binding


class TopicOptions(DriverTable):
    """Of a topic: the exchange behind it and the key that publishes carry."""

    exchange: str | None = Field(None, min_length=1, max_length=255)
    exchange_type: ExchangeType = "topic"
    routing_key: str | None = Field(None, max_length=255)


class GroupOptions(DriverTable):
    """Of a group: its queue and its binding."""

    queue_type: Literal["quorum", "classic"] | None = None
    routing_key: str | None = Field(None, max_length=255)
    arguments: dict[str, str | int | bool] = Field({})  # of the binding


def check_name(name: str, of: object) -> str:
    """A name as AMQP takes it: at most 255 bytes, and not the server's own."""
    if not 0 < len(name.encode()) <= 255:
        raise ConfigError(
            f"{of}: RabbitMQ names have 1 to 255 bytes, this one has {len(name.encode())}; set a shorter name"
        )
    if name.startswith("amq."):
        raise ConfigError(f"{of}: names that begin with 'amq.' belong to RabbitMQ; set another name")
    return name


def check_exchange(name: str, of: object) -> str:
    """As `check_name`, but the server's own exchanges may be used."""
    return name if name.startswith("amq.") else check_name(name, of)


def urls(url: Url, given: Settings, service: str, role: str) -> list[URL]:
    """One URL for aio-pika for each host; with the password, so never to be shown."""
    from yarl import URL

    if "%" in url.path:  # aiormq would decode it once more
        raise ConfigError(
            f"url: the vhost {url.path!r} holds a %, which the client library can't address; rename the vhost"
        )
    return [
        URL.build(
            scheme=url.scheme,
            user=url.username or "guest",
            password=url.password.value if url.password is not None else "guest",
            host=host,
            port=port,
            path="/" + url.path.replace("/", "%2F") if url.path else "/",
            encoded=False,
        ).update_query({"heartbeat": str(given.heartbeat), "name": f"{service} ({role})"})
        for host, port in url.targets(5671 if url.scheme == "amqps" else 5672)
    ]


def tls(url: Url, given: Settings) -> ssl.SSLContext | None:
    """The TLS context of amqps, or None. Reads files: not for the event loop. Raises ConfigError."""
    return client_context("rabbitmq", "amqps", url.scheme, given)
