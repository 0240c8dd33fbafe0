"""What SQS and SNS can do. Imports nothing but unibus, so that plans need no client library."""

from __future__ import annotations

from unibus.capabilities import Capabilities, emulated, native, refused

LEASE = 30.0
LONGEST_HOLD = 12 * 3600.0  # seconds from the receipt of a message; no extension goes beyond
RUN = 900.0  # of which a handler may take this much after it was parked
LONGEST_DELAY = 14 * 86400.0  # the longest that a queue keeps a message
LIMIT = 1024 * 1024  # bytes of a message, and of a batch, on SQS
TOPIC_LIMIT = 256 * 1024  # the same on SNS
RESERVE = 8 * 1024  # for what the policies write into a message's headers later: a dead letter must fit too
HEADERS = 128 * 1024


def known(version: str | None = None, *, lease: float = LEASE) -> Capabilities:
    """The capabilities of the service; it has no versions."""
    return Capabilities(
        adapter="sqs",
        version=version,
        order=native("FIFO queues and topics: the message group is the key"),
        delay=emulated(
            "DelaySeconds up to 15 minutes, further in hops: the consumer re-sends the message with the rest; from a topic, "
            "and beyond, it runs only while a consumer does; on ordered channels the message is held invisible, with its key",
            limit=LONGEST_DELAY,
        ),
        priority=refused("SQS has none; use one queue for each priority"),
        replay=refused("a queue keeps nothing that was deleted"),
        browse=emulated("messages are taken and handed back, which moves them and counts as a delivery"),
        reply=emulated(
            "a queue for each process, deleted with it; those of dead processes are deleted by the next one"
        ),
        release=native(
            "visibility timeout 0; SQS counts the delivery, so from the third time on an unordered message goes back as a copy"
        ),
        lease=native("the visibility timeout, 12 hours in all", limit=lease),
        atomic_move=refused("SQS has no transactions"),
        delivery_count=native("ApproximateReceiveCount: looking at a queue raises it too"),
        attempt=emulated("counted in a header; a crash forgets failures in place since the last copy"),
        settle_confirmed=native(),
        dedup=refused(
            "a standard queue stores what it is sent, twice if sent twice; ordered channels (FIFO) drop a message of the same "
            "id and key within five minutes"
        ),
        # Any bytes of this size fit, as base64 and with 128 KiB of headers.
        max_body=(LIMIT - HEADERS - RESERVE) * 3 // 4,
        max_header_bytes=HEADERS // 2,  # as JSON they are longer
        send_batch=100,  # ten requests of ten
        receive_batch=10,
        settle_batch=100,
        flights=3,
        receivers=8,
        release_counts=True,
        park_limit=LONGEST_HOLD - RUN,
    )
