"""What RabbitMQ can do, by server version. Imports nothing but unibus, so that plans need no client library."""

from __future__ import annotations

from unibus.capabilities import Capabilities, emulated, native, refused

VERSIONS = ("3.10", "4.0", "4.3")  # from which on something is different
NEWEST = VERSIONS[-1]
LONGEST_DELAY = 366 * 86400.0  # longer ones are a calendar's business; each 4096 s of it costs a hop


def number(version: str) -> tuple[int, int]:
    """(major, minor); what can't be read counts as the newest."""
    try:
        major, minor = version.split(".")[:2]
        return int(major), int("".join(c for c in minor if c.isdigit()) or 0)
    except ValueError:
        return number(NEWEST)


def known(version: str | None = None) -> Capabilities:
    """The capabilities of a server of this version, default the newest that is known."""
    server = number(version or NEWEST)
    return Capabilities(
        adapter="rabbitmq",
        version=version,
        order=emulated(
            "single active consumer on the queue: one process has the work, the others stand by; lanes by key inside it"
        ),
        delay=emulated(
            "held in shared queues whose messages expire (x-message-ttl, dead-lettered to unibus.return): the declared delays "
            "exactly, others in hops of powers of two and rounded up to a second",
            limit=LONGEST_DELAY,
        ),
        priority=native("classic queue with x-max-priority: kept on one node, not replicated", limit=10),
        replay=refused("a queue keeps nothing that was acked"),
        browse=emulated("messages are taken and handed back, which moves them and counts as a delivery"),
        reply=native(
            "an exclusive queue per process; addresses of direct reply-to (amq.rabbitmq.reply-to.*) are not answered, since "
            "a forged one closes the connection"
        ),
        release=native(
            "basic.nack with requeue, at once: a delay is refused"
            + (
                ""
                if server >= (4, 3)
                else "; the server counts it, so from the second time on by a copy at the end of the queue"
            )
        ),
        lease=refused(
            "a delivery is held until it is settled or the channel ends; consumer_timeout (30 min) ends the channel"
        ),
        atomic_move=refused("AMQP transactions are not atomic over several queues"),
        delivery_count=native(
            "x-delivery-count on quorum queues; on classic ones only whether it was handed out before"
        ),
        attempt=emulated(
            "a retry after a wait is a confirmed copy with its count; immediate ones and those of ordered channels run in "
            "place, and a crash forgets them"
        ),
        settle_confirmed=refused("AMQP 0-9-1 has no answer to an ack: one lost on the way is a redelivery"),
        dedup=refused("RabbitMQ stores what it is sent, twice if sent twice"),
        max_body=(16 if server >= (4, 0) else 128) * 1024 * 1024,
        max_header_bytes=128 * 1024 - 1024,  # all of it travels in one frame
        send_batch=1000,
        send_bytes=8 * 1024 * 1024,
        receive_batch=1000,
        settle_batch=5000,
        flights=4,
        delay_steps=True,
        park_limit=900.0,  # half of consumer_timeout
    )
