"""SQS without SQS: what `memory://?profile=sqs` and plans are told. Imports no client library."""

from __future__ import annotations

from unibus.adapter import Endpoint, Outgoing, Profile
from unibus.errors import TransportError
from unibus_sqs import config, topology, wire
from unibus_sqs.capabilities import known


def profile(endpoint: Endpoint, version: str | None = None) -> Profile:
    given = config.settings(endpoint.settings)
    return Profile(known(version, lease=float(given.lease)), topology.plan, _refusal)


def _refusal(outgoing: Outgoing) -> TransportError | None:
    *_, size = wire.encode(outgoing, outgoing.not_before)
    return wire.too_large(outgoing, size)
