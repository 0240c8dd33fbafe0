"""What Redis can do. Imports nothing but unibus, so that plans need no client library."""

from __future__ import annotations

from unibus.capabilities import Capabilities, Support, emulated, native, refused

LEASE = 30.0


def known(version: str | None = None, *, lease: float = LEASE, retention: float = 0.0) -> Capabilities:
    """The capabilities of a server of this version with these settings. Nothing here depends on the version yet."""
    replay: Support = refused("a topic keeps only what a group has still to read; redis.retention keeps more")
    if retention:
        replay = native("what redis.retention keeps", limit=retention)
    return Capabilities(
        adapter="redis",
        version=version,
        order=emulated("one consumer of a queue or group has the work, by a lease on a key; lanes by key inside it"),
        delay=emulated(
            "a sorted set beside the channel; any consumer of it moves what is due into its stream, so without one nothing "
            "falls due"
        ),
        priority=emulated("a stream for each level, read highest first", limit=10),
        replay=replay,
        browse=native("XRANGE"),
        reply=native("a stream per process, which expires a minute after its process has died"),
        release=emulated("a fresh copy at the end, in one step; ordered channels keep the place in line"),
        lease=native("pending entries that are idle for longer are claimed by others (XAUTOCLAIM)", limit=lease),
        atomic_move=native("one script"),
        delivery_count=native("of the pending entry; a copy that was released begins anew"),
        attempt=emulated(
            "a retry after a wait is a copy with its count, in one step with the settling; immediate ones and those of ordered "
            "channels run in place, and a crash forgets them"
        ),
        settle_confirmed=native(),
        dedup=refused("Redis stores what it is sent, twice if sent twice"),
        max_body=64 * 1024 * 1024,
        max_header_bytes=1024 * 1024,
        send_batch=200,  # beyond that a message costs the same, and the server has the first ones while the next are packed
        send_bytes=8 * 1024 * 1024,
        receive_batch=1000,
        settle_batch=1000,
        flights=4,
    )
