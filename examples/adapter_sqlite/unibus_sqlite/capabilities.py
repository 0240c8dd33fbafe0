"""What a table in SQLite can do. Imports nothing but unibus, so that plans need no client library."""

from __future__ import annotations

from unibus.capabilities import Capabilities, emulated, native, refused

LEASE = 30.0
POLL = 0.05


def known(version: str | None = None, *, lease: float = LEASE, poll: float = POLL) -> Capabilities:
    """The capabilities of this version of the library with these settings."""
    return Capabilities(
        adapter="sqlite",
        version=version,
        order=native("one message of a key is out at a time, whoever has it"),
        delay=native("a row is not seen before its time"),
        priority=native("rows are read highest first", limit=10),
        replay=refused("a row is deleted once it is settled, so there is no history"),
        browse=native("a SELECT"),
        reply=emulated(f"a place of its own, which consumers in other processes find by polling, every {poll:g} s"),
        release=native("the row is seen again, in its old place in line"),
        lease=native("a row is hidden until its time, and whose it is stands in it", limit=lease),
        atomic_move=native("one transaction"),
        delivery_count=native("a column"),
        attempt=emulated("counted in a header; a crash forgets failures in place since the last copy"),
        settle_confirmed=native("a settled row is gone from the file"),
        dedup=refused("every message that is sent is a row, also one that was sent before"),
        inbox=emulated("the place of a process that was killed takes replies until it expires, a minute later"),
        max_body=64 * 1024 * 1024,  # SQLite would take 1 GB, and hold it in memory several times
        max_header_bytes=1024 * 1024,
        ordered_batches=True,  # a call of send is one transaction
    )
