"""Looking at a queue: AMQP can't, so messages are taken, kept, and handed back in the end. It reorders the queue."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from unibus.delivery import Delivery
from unibus.driver import OnlyLooks
from unibus_rabbitmq import errors
from unibus_rabbitmq.subscription import TIMEOUT, RabbitMQSubscription

log = logging.getLogger("unibus.rabbitmq")

_SEEN_AGAIN = 0.5  # seconds to wait for the queue to count what was handed back


class Browser(OnlyLooks, RabbitMQSubscription):
    """Receives page by page, `prefetch` messages each, and settles nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._holds = False  # what waits for its next hop is looked at like the rest
        self._taken = 0

    def _take(self, limit: int) -> list[Delivery[Any]]:
        found = super()._take(limit)
        self._taken += len(found)
        return found

    async def _ask_for_more(self, timeout: float) -> bool:
        if self._taken != len(self._tags) * self.source.prefetch:
            return False
        # All of this page is in hand, unsettled, so another consumer gets the next one. Shielded, since aiormq closes a channel
        # whose call is cancelled.
        await asyncio.shield(self._tasks.start(self.consume(TIMEOUT)))
        return True

    async def stop(self) -> None:
        self._stopped = True
        self._waiter.wake()

    async def close(self) -> None:
        """Hand all back, and wait until the queue counts them again, unless someone else takes them."""
        self._stopped = True
        if not self._dead:
            try:
                async with asyncio.timeout(TIMEOUT):
                    await self._give_back()
            except Exception as exc:
                log.warning("hand back what was looked at in %s: %s", self.address, errors.translate(exc, "basic.nack"))
        await super().close()

    async def _give_back(self) -> None:
        for consumer in self._tags:
            await self._channel.basic_cancel(consumer)
        self._buffer.clear()
        tags = self._unsettled.tags()
        if not tags:
            return
        self._link.write(self._unsettled.release(tags))
        deadline = self._clock.monotonic() + _SEEN_AGAIN
        while self._clock.monotonic() < deadline:
            found = await self._channel.queue_declare(self._place.queue, passive=True)
            if (found.message_count or 0) >= len(tags):
                return
