"""Hardships: adapters that are right, and whose clients and brokers behave as real ones do on a bad day. The core has to bear them.

Each is what a bug of the core was found under. For all but `breaks-again` it was tried that without the cure the contracts named here are broken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from unibus.adapter import Endpoint, Outcome, Outgoing, Results
from unibus.delivery import Delivery
from unibus.errors import ConnectionLost
from unibus.memory_subscription import _deliver

from .base import Adapter, Subscription, hardship

LATE = 7  # connects that fail before one does not
SOON_AGAIN = 3  # links that break at their first message
ON_THE_WAY = 0.05  # seconds


class CancelledReceive(Subscription):
    adapter: CancelsItsCalls

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        self.adapter.call("receive")
        return await super().receive(limit, timeout)

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        self.adapter.call("settle")
        return await super().settle(outcome, deliveries, delays=delays)


@hardship(
    "The client cancels calls of its own, each kind once, instead of saying that the link is lost.",
    "fault.cut_keeps_order",
    "fault.cut_loses_nothing",
)
class CancelsItsCalls(Adapter):
    subscription = CancelledReceive

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.uncalled: set[str] = set()
        self.connected = False

    def call(self, name: str) -> None:
        if name in self.uncalled:
            self.uncalled.remove(name)
            self.inner.lose("the client cancels its calls")
            raise asyncio.CancelledError

    async def connect(self) -> None:
        self.call("connect")
        await super().connect()
        if not self.connected:
            self.connected, self.uncalled = True, {"connect", "receive", "send", "settle"}

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        self.call("send")
        return await super().send(batch, timeout)


@hardship(
    "A link that was lost can't be made anew at once: several tries fail.",
    "fault.cut_ends_requests",
    "fault.cut_heals_who_looks",
    "fault.cut_loses_nothing",
    "fault.restart_loses_nothing",
)
class ComesBackLate(Adapter):
    tries = LATE

    async def connect(self) -> None:
        if self.tries < LATE:
            self.tries += 1
            raise ConnectionLost("it is not back yet")
        self.tries = 0
        await super().connect()


@hardship(
    "A link that was made anew breaks at once, several times.", "fault.cut_loses_nothing", "fault.cut_counts_no_attempt"
)
class BreaksAgain(Adapter):
    links = 0

    async def connect(self) -> None:
        await super().connect()
        self.links += 1

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        if 1 < self.links <= 1 + SOON_AGAIN:
            self.inner.lose("it broke again")
        return await super().send(batch, timeout)


@hardship(
    "What is received is on its way for a while, in which the link may be lost.",
    "fault.cut_counts_no_attempt",
    "fault.cut_keeps_order",
    "fault.cut_loses_nothing",
    "fault.cut_repeats_what_runs",
)
class ArrivesLater(Subscription):
    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        found = [*await super().receive(1, timeout)]
        await asyncio.sleep(ON_THE_WAY)
        if self.inner.over is not None:  # a broker that sends ahead had sent that, too
            found += [_deliver(entry, self.inner.source, None) for entry in list(self.inner.place)[1::2]]
        return found
