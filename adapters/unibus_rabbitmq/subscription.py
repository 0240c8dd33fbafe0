"""Receiving: deliveries are pushed into a deque, at most `prefetch` of them unsettled."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiormq.abc import AbstractChannel

from unibus import deadletter
from unibus.adapter import Outcome, Outgoing, Results, Source, Standing
from unibus.channel import Group, Inbox, Queue
from unibus.clock import Clock
from unibus.delivery import Delivery
from unibus.driver import NoLease, NoMove, held
from unibus.errors import ConnectionLost, NotFound, UnibusError, Unsupported
from unibus.message import ORIGINAL_DESTINATION
from unibus.retry import SUSPECT_AFTER, handed_out_often
from unibus.waiting import Tasks, Waiter
from unibus_rabbitmq import errors, wire
from unibus_rabbitmq.intake import Intake
from unibus_rabbitmq.link import Link
from unibus_rabbitmq.topology import Place, Plan
from unibus_rabbitmq.unsettled import Unsettled

log = logging.getLogger("unibus.rabbitmq")

TIMEOUT = 10.0  # of each call


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a subscription needs of its adapter."""

    send: Callable[[Sequence[Outgoing]], Awaitable[Results]]
    closed: Callable[[RabbitMQSubscription], None]


class RabbitMQSubscription(NoMove, NoLease):
    """One consumer on a channel of its own. Delivery tags belong to the channel and end with it."""

    def __init__(
        self,
        source: Source,
        place: Place,
        link: Link,
        channel: AbstractChannel,
        clock: Clock,
        plan: Plan,
        hooks: Hooks,
    ) -> None:
        self.source = source
        self.address: Queue[Any] | Group | Inbox = source.address
        self._place = place
        self._link = link
        self._channel = channel
        self._number = channel.number
        self._clock = clock
        self._plan = plan
        self._hooks = hooks
        self._inbox = isinstance(source.address, Inbox)
        self._fallback = f"{secrets.token_hex(8)}-"  # of the ids of messages that have none
        self._buffer: deque[wire.Received] = deque()
        self._unsettled = Unsettled(channel.number)
        self._waiter = Waiter(clock)
        self._over: UnibusError | None = None  # why nothing comes any more
        self._dead = False  # the channel is gone, and with it all tags
        self._stopped = False
        self._handed_back = False
        self._holds = True  # what came back from a hold queue early goes to the next one
        self._closing = False
        self._losing: asyncio.Task[None] | None = None
        self._tags: list[str] = []  # consumer tags
        self._tasks = Tasks(lambda exc: log.error("subscription of %s: %r", self.address, exc))
        link.wire.sinks[channel.number] = self._intake = Intake(self._arrived, self._leave)
        channel.on_consumer_cancel_callbacks.add(self._cancelled)
        channel.closing.add_done_callback(self._closed)

    async def consume(self, timeout: float) -> None:
        """Start to receive; returns when a message sent now would arrive."""
        try:
            async with asyncio.timeout(timeout):
                await self._channel.basic_qos(prefetch_count=self.source.prefetch)
                ok = await self._channel.basic_consume(self._place.queue, _never)
        except Exception as exc:
            raise errors.translate(exc, f"consume from {self._place.queue!r}") from exc
        self._tags.append(str(ok.consumer_tag))

    def _arrived(self, received: wire.Received) -> None:
        self._unsettled.arrived(received.tag)
        self._buffer.append(received)
        if self._handed_back:  # a quorum queue may deliver after its answer to the cancel
            self._tasks.start(self._hand_back())
        self._waiter.wake()

    # -- receive ----------------------------------------------------------------------------------------------

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        await asyncio.sleep(0)  # a consumer that always finds something must not starve the others
        deadline = self._clock.monotonic() + timeout
        while True:
            if self._over is not None:
                if self._losing is not None:
                    await asyncio.shield(self._losing)
                raise self._over
            if self._stopped:
                return []
            if self._buffer:
                found = self._take(limit)
                if found:
                    return found
            left = deadline - self._clock.monotonic()
            if left <= 0:
                return []
            if not await self._ask_for_more(left):
                await self._waiter.wait(left)

    async def _ask_for_more(self, timeout: float) -> bool:
        """For browsing; elsewhere the server sends by itself."""
        return False

    def _take(self, limit: int) -> list[Delivery[Any]]:
        found: list[Delivery[Any]] = []
        buffer = self._buffer
        while buffer and len(found) < limit:
            delivery = self._delivery(buffer.popleft())
            headers = delivery.native.properties.headers  # type: ignore[attr-defined]  # we made it
            if headers:
                due = wire.not_before(headers)
                if due is not None and due > self._clock.time() and self._holds:
                    self._tasks.start(self._hold_again(delivery, due))
                    continue
                if self._place.letters and wire.DEATH in headers:
                    self._explain(delivery)
            found.append(delivery)
        return found

    def _delivery(self, received: wire.Received) -> Delivery[Any]:
        position = f"{self._place.queue}@{received.tag}"
        message = wire.decode(received, inbox=self._inbox, fallback=self._fallback + position)
        count = wire.deliveries(received, counted=self._place.counted)
        delivery: Delivery[Any] = Delivery(
            message, self.source, self, deliveries=count, native=received, position=position
        )
        self._unsettled.given(received.tag, delivery)
        return delivery

    def _explain(self, delivery: Delivery[Any]) -> None:
        """Give what the server dead-lettered the headers that the core would have given it."""
        added = wire.broker_death(delivery.native)  # type: ignore[arg-type]  # we made it
        if not added:
            return
        origin = self._plan.logical.get(added[ORIGINAL_DESTINATION])
        if origin is not None:
            added |= deadletter.origin(origin)
        delivery.message.headers = {**delivery.message.headers, **added}

    async def _hold_again(self, delivery: Delivery[Any], due: float) -> None:
        """The next hop of a long delay: to the next hold queue, confirmed, and only then away from here."""
        (error,) = await self._hooks.send([self._again(delivery, due)])
        if error is None:
            await self.settle(Outcome.ACCEPTED, [delivery])
            return
        # The message stays here, unsettled. The core subscribes again, with back-off, and declares again what is missing.
        log.warning("a delayed message of %s can't go on to its next hold queue: %s", self.address, error)
        self._end(error)

    # -- settle -----------------------------------------------------------------------------------------------

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        if outcome is Outcome.RELEASED and any(delays):
            raise Unsupported("RabbitMQ gives a message back at once; send a delayed copy, then accept this one")
        results, mine = held(deliveries, lambda d: not self._dead and self._unsettled.has(d), "its channel is gone")
        try:
            if outcome is Outcome.ACCEPTED:
                self._accept([_tag(deliveries[index]) for index in mine])
            else:
                await self._release([deliveries[index] for index in mine])
            await self._link.drain()
        except ConnectionLost as error:
            for index in mine:
                results[index] = error
        return results

    def _accept(self, tags: list[int]) -> None:
        if tags:
            self._link.write(self._unsettled.accept(tags))

    async def _release(self, deliveries: list[Delivery[Any]]) -> None:
        """Back to the queue. Where the server counts that, one which was handed out often goes back as a fresh copy.

        Its count would make it a suspect of the crash guard, and a dead letter in the end, for nothing but restarts. With a
        single active consumer that is about to leave, they go back when the channel ends, in their order.
        """
        if self._place.single and self._stopped:
            self._unsettled.keep(deliveries)
            return
        # One below the core's limit: what is on its way while the channel ends is counted once more.
        nack: list[Delivery[Any]] = []
        copy: list[Delivery[Any]] = []
        for delivery in deliveries:
            (copy if self._place.copies and handed_out_often(delivery, SUSPECT_AFTER - 1) else nack).append(delivery)
        if copy:
            for delivery, error in zip(copy, await self._hooks.send([self._again(d) for d in copy]), strict=True):
                if not self._unsettled.has(delivery):
                    continue  # the channel went meanwhile
                if error is None:
                    self._accept([_tag(delivery)])
                else:
                    nack.append(delivery)
        if nack and not self._dead:
            self._link.write(self._unsettled.release([_tag(delivery) for delivery in nack]))

    def _again(self, delivery: Delivery[Any], not_before: float | None = None) -> Outgoing:
        return Outgoing(self.address, delivery.message, not_before, delivery)

    # -- the end ----------------------------------------------------------------------------------------------

    async def check(self) -> Standing:
        """RabbitMQ does not say whether a single active consumer is active: alive is `consuming`."""
        return "gone" if self._over is not None or self._stopped else "consuming"

    async def stop(self) -> None:
        if self._stopped or self._dead:
            self._stopped = True
            return
        self._stopped = True
        self._waiter.wake()
        if self._place.single:
            # The next consumer would be active at once and overtake what is still in hand here. The end of the channel gives
            # back the rest and makes it active in one step.
            return
        try:
            async with asyncio.timeout(TIMEOUT):
                for consumer in self._tags:
                    await self._channel.basic_cancel(consumer)
        except Exception as exc:
            log.warning("stop receiving from %s: %s", self.address, errors.translate(exc, "basic.cancel"))
        self._handed_back = True
        await self._hand_back()

    async def _hand_back(self) -> None:
        """What was not given out."""
        back = [self._delivery(received) for received in self._buffer]
        self._buffer.clear()
        if back and not self._dead:
            await self.settle(Outcome.RELEASED, back)

    async def close(self) -> None:
        self._hooks.closed(self)
        await self.stop()
        for task in self._tasks:
            task.cancel()
        if self._dead:
            return
        self._closing = self._dead = True
        self._unsettled.lose_all()
        self._end(ConnectionLost(f"the subscription of {self.address} is closed"))
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._channel.close()  # gives back what is still unsettled
        except Exception as exc:
            log.warning("close the channel of %s: %s", self.address, errors.translate(exc, "channel.close"))
        self._leave()

    def _leave(self) -> None:
        self._dead = True
        if self._link.wire.sinks.get(self._number) is self._intake:
            del self._link.wire.sinks[self._number]

    def _cancelled(self, frame: Any) -> None:
        """The server ended the consumer: its queue was deleted, or its node went. What is held can still be settled."""
        self._end(NotFound(f"{self.address}: its queue {self._place.queue!r} was deleted, or its node is gone"))

    def _closed(self, closing: asyncio.Future[Any]) -> None:
        self._leave()
        if self._closing:
            return
        cause = None if closing.cancelled() else closing.exception()
        if self._link.lost is not None:
            error: UnibusError = self._link.lost
        elif cause is None:
            error = ConnectionLost(f"the channel of {self.address} was closed")
        else:
            error = errors.translate(cause, f"consume from {self._place.queue!r}")
            error.__cause__ = cause
        self._end(error)
        self._buffer.clear()
        self._losing = self._tasks.start(self._lose(self._unsettled.given_out()))

    def _end(self, error: UnibusError) -> None:
        if self._over is None:
            self._over = error
        self._waiter.wake()

    async def _lose(self, held: list[Delivery[Any]]) -> None:
        try:
            if held:
                await self.source.losing(held, 0)
        finally:
            self._unsettled.lose_all()


async def _never(message: Any) -> None:
    """The callback that aiormq wants: the tap takes every delivery before aiormq sees it."""
    raise AssertionError(f"a delivery went past the tap: {message.delivery!r}")


def _tag(delivery: Delivery[Any]) -> int:
    return delivery.native.tag if isinstance(delivery.native, wire.Received) else 0
