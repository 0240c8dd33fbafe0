"""The settings of this driver: the table `[kafka]`, and `kafka = {...}` of a queue, topic or group."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from unibus.adapter import Declared, Url
from unibus.config_tables import DriverTable, check_options, check_table
from unibus.driver import quiet
from unibus.errors import ConfigError
from unibus.tls import TlsTable, client_context
from unibus.url import masked

# At DEBUG the client library prints whole requests: bodies, and the password of SASL PLAIN. At INFO and WARNING it tells
# of rebalances and reconnects, which are everyday things and the adapter's to report. Who wants them sets a level before.
quiet(logging.CRITICAL, "aiokafka")


class TopicOptions(DriverTable):
    """Of a topic that is made: a queue's, a topic's or a group's own. None: what `[kafka]` says, then what the broker does."""

    partitions: int | None = Field(None, ge=1)
    replication: int | None = Field(None, ge=1)
    config: dict[str, str] = Field({})  # `retention.ms` and the like


class Settings(TlsTable, TopicOptions):
    """`[kafka]`. Times are seconds, sizes bytes."""

    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    connect_timeout: float = Field(10.0, gt=0)
    session_timeout: float = Field(10.0, ge=1)  # a consumer that is silent this long has lost its partitions
    heartbeat: float = Field(1.0, gt=0)  # how soon a consumer hears of a rebalance
    rebalance_grace: float = Field(25.0, ge=0)  # for handlers that run when their partition goes to another consumer
    commit_interval: float = Field(0.2, gt=0)
    max_request_size: int = Field(1024 * 1024, ge=64 * 1024)
    batch_size: int = Field(256 * 1024, ge=1024)  # not above `max.message.bytes` of any topic
    compression: Literal["gzip", "snappy", "lz4", "zstd"] | None = None
    metadata_max_age: float = Field(300.0, gt=0)  # how soon new partitions are noticed


def settings(table: Mapping[str, object]) -> Settings:
    return check_table(Settings, table, "kafka")


def options(declared: Declared, given: Settings) -> TopicOptions:
    """Of the topics behind one address."""
    own = check_options(TopicOptions, declared, "kafka")
    return TopicOptions(
        partitions=own.partitions or given.partitions,
        replication=own.replication or given.replication,
        config={**given.config, **own.config},
    )


def tls(url: Url, given: Settings) -> ssl.SSLContext | None:
    """The TLS context of kafkas, or None. Reads files: not for the event loop. Raises ConfigError."""
    _, plus, engine = url.scheme.partition("+")
    return client_context("kafka", "kafkas" + plus + engine, url.scheme, given)


class Options(dict[str, Any]):
    """Prints like a dict, without the password."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(masked("", dict(self)))


def client(url: Url, given: Settings, context: ssl.SSLContext | None, client_id: str) -> dict[str, Any]:
    """What every client of the library is made with."""
    more: dict[str, Any] = {}
    if url.username is not None:
        # In the clear a password is not sent, unless that was asked for.
        mechanism = given.sasl_mechanism or ("PLAIN" if context is not None else "SCRAM-SHA-512")
        more = {
            "sasl_mechanism": mechanism,
            "sasl_plain_username": url.username,
            "sasl_plain_password": url.password.value if url.password is not None else "",
        }
    elif given.sasl_mechanism is not None:
        raise ConfigError("kafka.sasl_mechanism needs a user; set username and UNIBUS_PASSWORD")
    protocol = ("SASL_" if more else "") + ("SSL" if context is not None else "PLAINTEXT")
    return Options(
        {
            "bootstrap_servers": [
                f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in url.targets(9092)
            ],
            "client_id": client_id,
            "security_protocol": protocol,
            "ssl_context": context,
            "metadata_max_age_ms": round(given.metadata_max_age * 1000),
            **more,
        }
    )
