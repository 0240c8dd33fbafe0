"""What comes in by one subscription: the loop of its `receive`, and its end. The same for every driver, whatever it waits for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from unibus.adapter import Outgoing, Results
from unibus.channel import Address
from unibus.clock import Clock
from unibus.delivery import Delivery
from unibus.errors import ConnectionLost, UnibusError
from unibus.waiting import Waiter

log = logging.getLogger("unibus")


class Inflow:
    """`error`: why nothing comes any more. `stopped`: nothing is wanted any more. Several may receive at once."""

    def __init__(self, clock: Clock) -> None:
        self.error: UnibusError | None = None
        self.stopped = False
        self._clock = clock
        waiter = Waiter(clock)
        self.wake, self.wait = waiter.wake, waiter.wait  # as they are, since a driver may wake for every message

    @property
    def over(self) -> bool:
        """Will it never bring anything again?"""
        return self.stopped or self.error is not None

    def stop(self) -> None:
        self.stopped = True
        self.wake()

    def end(self, error: UnibusError) -> None:
        """All who receive are told; the first reason stays."""
        self.error = self.error or error
        self.wake()

    async def receive(
        self,
        timeout: float,
        take: Callable[[], Sequence[Delivery[Any]]],
        more: Callable[[float], Awaitable[object]] | None = None,
    ) -> Sequence[Delivery[Any]]:
        """`Subscription.receive`: what `take` finds; none after `timeout` seconds, or once stopped. Raises `error`.

        `more` sees to it that there is something to take, for so many seconds at most. It may return early, and with nothing.
        Default: wait until woken.
        """
        await asyncio.sleep(0)  # a consumer that always finds something must not starve the others
        more = more or self.wait
        deadline = self._clock.monotonic() + timeout
        while True:
            if self.error is not None:
                raise self.error
            if self.stopped:
                return []
            if found := take():
                return found
            left = deadline - self._clock.monotonic()
            if left <= 0:
                return []
            await more(left)

    async def hop(
        self,
        send: Callable[[Sequence[Outgoing]], Awaitable[Results]],
        address: Address,
        delivery: Delivery[Any],
        due: float,
    ) -> bool:
        """The next hop of a long delay: a copy is confirmed where it waits next. True: now it is to be settled here.

        Else it stays here, unsettled, and this is the end: the core subscribes again, with back-off, and declares again what is
        missing.
        """
        (error,) = await send([Outgoing(address, delivery.message, due, delivery)])
        if error is not None:
            log.warning("a delayed message of %s can't go on to where it waits next: %s", address, error)
            self.end(error)
        return error is None


def closed(address: Address) -> ConnectionLost:
    """Of a subscription that is used after its end."""
    return ConnectionLost(f"the subscription of {address} is closed")
