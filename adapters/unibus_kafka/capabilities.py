"""What Kafka can do. Imports nothing but unibus, so that plans need no client library."""

from __future__ import annotations

from unibus.capabilities import Capabilities, emulated, native, refused

HOLD_BELOW = 10.0  # seconds, the shortest rung: what is due sooner waits with the consumer
LONGEST_DELAY = 366 * 86400.0  # longer ones are a calendar's business; each hour of it is a hop
LONGEST_PARK = 86400.0  # well below the 7 days that a topic keeps by default: what is parked must still be there
ENVELOPE_BYTES = 48_576  # of the largest request, kept for key, headers and what retries add to them


def known(version: str | None = None, *, max_request_size: int = 1024 * 1024) -> Capabilities:
    """The capabilities of a server of this version; the same for all that the client library speaks to (1.0 and later)."""
    return Capabilities(
        adapter="kafka",
        version=version,
        order=native("a key's messages are in one partition, and one consumer has it; lanes by key inside the process"),
        delay=emulated(
            "below 10 s held by the consumer; else in topics for 10 s, 1 min, 10 min and 1 h of each queue or group, which its "
            "consumers read with a pause, in hops; exact but for the time of a fetch",
            limit=LONGEST_DELAY,
        ),
        priority=refused("a partition is read in its order"),
        replay=native("from the beginning, a time or offsets, as far as the topic's retention reaches"),
        browse=native("read without a group"),
        reply=emulated(
            "one reply topic a service, read from its end by every process, which drops what is not its own"
        ),
        release=emulated("handed out again by the same consumer, by another one only when that has left"),
        lease=refused("a partition is a consumer's until the group rebalances; no delivery has an end of its own"),
        atomic_move=refused("the client library's transactions don't fence a consumer that has lost its partition"),
        delivery_count=refused(
            "a partition has an offset; only after a consumer died is counted, for a minute, what its heir hands out"
        ),
        attempt=emulated("failures in place are kept in the commit; a crash forgets those since the last one"),
        settle_confirmed=refused(
            "settled messages are committed together, a moment later; a crash in between repeats them"
        ),
        dedup=refused("the idempotent producer drops its own repeats only; what is sent twice is stored twice"),
        share=refused("a partition belongs to one consumer: what is in it waits for that one, or for it to leave"),
        inbox=refused(
            "the reply topic is the service's: what nobody waits for is dropped by its retention, an hour later"
        ),
        start_positions=True,
        same_in_names="._",
        max_body=max_request_size - ENVELOPE_BYTES,
        max_header_bytes=32 * 1024,
        max_key=4096,
        send_batch=250,  # of 500 messages under way one half is made while the other is written
        receive_batch=1000,
        settle_batch=5000,
        ordered_batches=True,
        flights=4,
        park_limit=LONGEST_PARK,
    )
