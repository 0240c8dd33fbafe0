"""Settings of `[sqs]` and of the channels' `sqs` tables, checked; the URL as the client takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from unibus.adapter import Declared, Url
from unibus.channel import Group, Topic
from unibus.config_tables import DriverTable, check_options, check_table
from unibus.errors import ConfigError
from unibus.tls import check_ca_file
from unibus_sqs.capabilities import LEASE

RETENTION = 14 * 86400


class Settings(DriverTable):
    """`[sqs]`. Times are seconds."""

    endpoint_url: str | None = Field(None, pattern=r"^https?://[^@\s]+$")  # of a local server; default: AWS
    ca_file: Path | None = None  # who has signed the certificate of endpoint_url; default: AWS' own list
    account_id: str | None = Field(None, pattern=r"^[0-9]{12}$")  # of the topics; default: that of the credentials
    lease: int = Field(int(LEASE), ge=3, le=3600)  # visibility timeout; extended as long as a message is in hand
    wait: int = Field(20, ge=1, le=20)  # of a long poll; how long a consumer may take to stop
    connect_timeout: float = Field(5.0, gt=0)
    connections: int = Field(50, ge=2)  # HTTP connections at most, to SQS and to SNS each


class QueueOptions(DriverTable):
    """Of a queue, when it is made; they stand for its dead-letter and invalid-message queues too."""

    retention: int = Field(RETENTION, ge=60, le=RETENTION)
    kms_key: str | None = None  # default: SQS' own encryption


class TopicOptions(DriverTable):
    """Of a topic. `attributes`: headers that are message attributes as well, for filter policies."""

    kms_key: str | None = None
    attributes: list[str] = Field([], max_length=7)


class GroupOptions(QueueOptions):
    """Of a group: what its subscription lets through. SNS' own format."""

    filter_policy: dict[str, Any] | None = None
    filter_scope: Literal["MessageAttributes", "MessageBody"] = "MessageAttributes"


def settings(table: Any) -> Settings:
    given = check_table(Settings, table, "sqs")
    if given.ca_file is not None:
        if (given.endpoint_url or "https:").startswith("http:"):
            raise ConfigError("sqs.ca_file needs TLS; use https:// in sqs.endpoint_url")
        check_ca_file("sqs", given.ca_file)
    return given


def options(declared: Declared) -> QueueOptions | TopicOptions:
    if isinstance(declared.address, Group):
        return check_options(GroupOptions, declared, "sqs")
    if isinstance(declared.address, Topic):
        return check_options(TopicOptions, declared, "sqs")
    return check_options(QueueOptions, declared, "sqs")


def region(url: Url) -> str | None:
    """The host of the URL; None where AWS' own configuration says it."""
    if url.path or len(url.hosts) > 1 or (url.hosts and url.hosts[0][1]):
        raise ConfigError(
            f"url {url}: the host is the region, as in sqs://eu-west-1; a local server goes into ?endpoint_url=http://..."
        )
    if (url.username is None) != (url.password is None):
        raise ConfigError(
            "url: the user is the access key, the password its secret: give both, or none for AWS' own chain"
        )
    return url.hosts[0][0] if url.hosts else None
