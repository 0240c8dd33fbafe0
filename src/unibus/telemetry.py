"""What happened, counted; and what a log record is about. The names are the events below; exporters read `Counts`."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Hashable

from unibus.channel import Address, Group
from unibus.correlation import handling, place

# Events
SENT = "sent"  # confirmed by the broker, whatever it was
UNROUTED = "unrouted"  # a publish that no group was there to get
RECEIVED = "received"
HANDLED = "handled"  # acked after its handler succeeded
REPEATED = "repeated"  # acked without its handler: its store says that it was handled before
POSTPONED = "postponed"  # waits uncounted, since another run of it is in progress, or its store can't be asked
RETRIED = "retried"
DEAD_LETTERED = "dead_lettered"
DISCARDED = "discarded"
INVALID = "invalid"
EXPIRED = "expired"
RELEASED = "released"
SUSPECTED = "suspected"  # by the crash guard
LEASE_LOST = "lease_lost"  # no longer ours before it was settled: it will come again, or has
OVERDUE = "overdue"  # a handler in a thread ran beyond its timeout
REPLIED = "replied"
REPLIES_FAILED = "replies_failed"  # refused address, requester gone, or not confirmed
LATE_REPLIES = "late_replies"
REDRIVEN = "redriven"
PURGED = "purged"
RECONNECTED = "reconnected"
RESUBSCRIBED = "resubscribed"  # by the watchdog, which found that nothing is received any more


class Counter:
    """One number. Who counts often keeps the counter and adds to `n`."""

    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class Counts:
    """Counters by event and address. Never reset while a bus is open."""

    def __init__(self) -> None:
        self._counters: defaultdict[tuple[str, Hashable], Counter] = defaultdict(Counter)

    def counter(self, event: str, address: Hashable) -> Counter:
        return self._counters[event, address]

    def add(self, event: str, address: Hashable, n: int = 1) -> None:
        self._counters[event, address].n += n

    def of(self, address: Hashable) -> dict[str, int]:
        """Event -> count of one address."""
        return {event: counter.n for (event, at), counter in self._counters.items() if at == address and counter.n}

    def totals(self) -> dict[str, int]:
        """Event -> count over all addresses."""
        totals: defaultdict[str, int] = defaultdict(int)
        for (event, _), counter in self._counters.items():
            totals[event] += counter.n
        return {event: n for event, n in totals.items() if n}


def names_of(address: Address) -> dict[str, str | None]:
    """`channel` and `group` of a log record; a queue has no group."""
    if isinstance(address, Group):
        return {"channel": address.topic.name, "group": address.name}
    return {"channel": address.name, "group": None}


class LogIds(logging.Filter):
    """Gives each log record that a handler's code writes the ids of its message. Lets every record pass.

    `handler.addFilter(LogIds())`, or `{"()": "unibus.telemetry.LogIds"}` among the filters of a dictConfig. On a logging
    handler, not on a logger: a logger's filters see its own records alone. Where records go through a QueueHandler it
    belongs on that one, since it asks the context in which the record is written.

    The attributes are `channel`, `group`, `message_id`, `correlation_id`: None where there is none, such as outside of handlers.
    A `batch=n` handler has a channel and no message. What the record already says of itself stays.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        known, message, address = record.__dict__, handling.get(), place.get()
        found: dict[str, str | None] = {"channel": None, "group": None} if address is None else names_of(address)
        found["message_id"] = None if message is None else message.id
        found["correlation_id"] = None if message is None else message.correlation_id or message.id
        for name, value in found.items():
            known.setdefault(name, value)
        return True
