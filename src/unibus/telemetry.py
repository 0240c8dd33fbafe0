"""What happened, counted. The names are the events below; exporters read `Counts`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

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
LEASE_LOST = "lease_lost"  # settled too late: it will come again, or has
OVERDUE = "overdue"  # a handler in a thread ran beyond its timeout
REPLIED = "replied"
REPLIES_FAILED = "replies_failed"  # refused address, requester gone, or not confirmed
LATE_REPLIES = "late_replies"
REDRIVEN = "redriven"
PURGED = "purged"
RECONNECTED = "reconnected"


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
