"""Redis without Redis: what `memory://?profile=redis` and plans are told. Imports no client library."""

from __future__ import annotations

from unibus.adapter import Endpoint, Profile
from unibus_redis import config, topology
from unibus_redis.capabilities import known


def profile(endpoint: Endpoint, version: str | None = None) -> Profile:
    given = config.settings(endpoint.settings)
    return Profile(
        known(version, lease=given.lease, retention=given.retention),
        lambda asked: topology.plan(asked, endpoint.clock.time(), given.retention),
    )
