"""What happened, counted. The names are the events below; exporters read `Counts`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

# Events
SENT = "sent"  # confirmed by the broker, whatever it was
UNROUTED = "unrouted"  # a publish that no group was there to get
RECEIVED = "received"
HANDLED = "handled"  # acked after its handler succeeded
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
RECONNECTED = "reconnected"


class Counts:
    """Counters by event and address. Never reset while a bus is open."""

    def __init__(self) -> None:
        self._counts: defaultdict[tuple[str, Hashable], int] = defaultdict(int)

    def add(self, event: str, address: Hashable, n: int = 1) -> None:
        self._counts[event, address] += n

    def of(self, address: Hashable) -> dict[str, int]:
        """Event -> count of one address."""
        return {event: n for (event, at), n in self._counts.items() if at == address}

    def totals(self) -> dict[str, int]:
        """Event -> count over all addresses."""
        totals: defaultdict[str, int] = defaultdict(int)
        for (event, _), n in self._counts.items():
            totals[event] += n
        return dict(totals)
