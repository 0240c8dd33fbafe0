"""Leases: one heartbeat for all deliveries that a subscription holds, waiting and running ones alike."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from unibus.adapter import Subscription
from unibus.clock import Clock, Timer
from unibus.delivery import Delivery
from unibus.errors import LeaseLost, TransportError
from unibus.waiting import answered

log = logging.getLogger("unibus")


class Heartbeat:
    """Extends every held delivery whose lease is in its last three quarters, in one call, three times a lease. A call
    without an answer is given up when the next one is due.

    `lost` is told of those whose lease is gone: they come again, here or elsewhere.
    """

    def __init__(
        self,
        subscription: Subscription,
        holding: Iterable[Delivery[Any]],
        length: float,
        clock: Clock,
        lost: Callable[[list[Delivery[Any]]], None],
    ) -> None:
        self._subscription = subscription
        self._holding = holding
        self._length = length
        self._clock = clock
        self._lost = lost
        self._timer: Timer | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._arm()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _arm(self) -> None:
        self._timer = self._clock.call_later(self._length / 3, self._beat)

    def _beat(self) -> None:
        # Not two thirds: what the last beat has extended must be due, so that there is time for another one.
        due = self._clock.monotonic() + self._length * 3 / 4
        held = [d for d in self._holding if not d.lost and d.lease_until is not None and d.lease_until < due]
        if self._task is not None and not self._task.done():  # one call that hangs must not be the last one
            log.warning("leases could not be extended: no answer within %g s", self._length / 3)
            self._task.cancel()
        if held:
            self._task = asyncio.create_task(self._extend(held))
        self._arm()

    async def _extend(self, held: list[Delivery[Any]]) -> None:
        try:
            results = await answered(self._subscription.extend(held, self._length))
        except Exception as error:  # the receive loop sees the same and acts on it; the next beat tries again
            known = isinstance(error, TransportError)
            log.warning("%d leases could not be extended: %s", len(held), error, exc_info=not known)
            return
        lost = [d for d, result in zip(held, results, strict=True) if isinstance(result, LeaseLost)]
        if lost:
            self._lost(lost)
