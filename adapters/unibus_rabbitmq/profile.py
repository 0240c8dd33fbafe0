"""RabbitMQ without RabbitMQ: what `memory://?profile=rabbitmq` and plans are told. Imports no client library."""

from __future__ import annotations

from unibus.adapter import Endpoint, Profile
from unibus.config_tables import check_table
from unibus_rabbitmq import config, topology
from unibus_rabbitmq.capabilities import NEWEST, VERSIONS, known


def profile(endpoint: Endpoint, version: str | None = None) -> Profile:
    check_table(config.Settings, endpoint.settings, "rabbitmq")
    return Profile(
        known(version), lambda asked: topology.plan(asked, endpoint.prefix, version or NEWEST), versions=VERSIONS
    )
