"""Kafka without Kafka: what `memory://?profile=kafka` and plans are told. Imports no client library."""

from __future__ import annotations

from unibus.adapter import Endpoint, Outgoing, Profile
from unibus.channel import Inbox
from unibus.errors import TransportError
from unibus_kafka import config, topology, wire
from unibus_kafka.capabilities import known


def profile(endpoint: Endpoint, version: str | None = None) -> Profile:
    given = config.settings(endpoint.settings)
    most = given.max_request_size

    def refusal(outgoing: Outgoing) -> TransportError | None:
        if isinstance(outgoing.to, Inbox):
            return None  # its address is not one of Kafka
        return wire.too_large(outgoing, wire.encode(outgoing, endpoint.clock.time(), later=False), most)

    return Profile(known(version, max_request_size=most), lambda asked: topology.plan(asked, given), refusal)
