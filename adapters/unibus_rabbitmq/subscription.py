"""Receiving: deliveries are pushed into a deque, at most `prefetch` of them unsettled."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiormq.abc import AbstractChannel

from unibus.adapter import Move, Outcome, Outgoing, Results, Source, Standing
from unibus.channel import Group, Inbox, Queue, stem
from unibus.clock import Clock
from unibus.delivery import Delivery
from unibus.errors import ConnectionLost, LeaseLost, NotFound, TransportError, UnibusError, Unsupported
from unibus.message import ORIGINAL_DESTINATION, ORIGINAL_SUBSCRIPTION
from unibus_rabbitmq import errors, frames, wire
from unibus_rabbitmq.intake import Intake
from unibus_rabbitmq.link import Link
from unibus_rabbitmq.topology import Place, Plan

log = logging.getLogger("unibus.rabbitmq")


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a subscription needs of its adapter."""

    rehold: Callable[[Outgoing], Awaitable[TransportError | None]]
    closed: Callable[[RabbitMQSubscription], None]


class RabbitMQSubscription:
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
        self._buffer: deque[wire.Received] = deque()
        # Every tag that the server counts as unsettled, ascending; the delivery once it was given out.
        self._open: OrderedDict[int, Delivery[Any] | None] = OrderedDict()
        self._waiter: asyncio.Future[None] | None = None
        self._over: UnibusError | None = None  # why nothing comes any more
        self._dead = False  # the channel is gone, and with it all tags
        self._stopped = False
        self._tags: list[str] = []  # consumer tags
        self._taken = 0  # by browsing
        self._tasks: set[asyncio.Task[None]] = set()
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
        self._open[received.tag] = None
        self._buffer.append(received)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- receive ----------------------------------------------------------------------------------------------

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        deadline = self._clock.monotonic() + timeout
        while True:
            if self._over is not None:
                raise self._over
            if self._buffer and not self._stopped:
                found = self._take(limit)
                if found:
                    return found
            left = deadline - self._clock.monotonic()
            if left <= 0:
                return []
            if self.source.browse and self._taken == len(self._tags) * self.source.prefetch:
                await self.consume(left)  # the first page is in hand, unsettled: another consumer gets the next one
            await self._wait(left)

    async def _wait(self, timeout: float) -> None:
        """Until something arrives or ends; several callers share the future."""
        if self._waiter is None or self._waiter.done():
            self._waiter = asyncio.get_running_loop().create_future()
        waiter = self._waiter
        timer = self._clock.call_later(timeout, self._wake)
        try:
            await asyncio.shield(waiter)
        finally:
            timer.cancel()

    def _take(self, limit: int) -> list[Delivery[Any]]:
        found: list[Delivery[Any]] = []
        buffer, source, queue, counted = self._buffer, self.source, self._place.queue, self._place.counted
        while buffer and len(found) < limit:
            received = buffer.popleft()
            headers = received.properties.headers
            due = wire.not_before(received) if headers else None
            message = wire.decode(
                received, inbox=self._inbox, fallback=f"{queue}@{self._number}.{received.tag}.{id(self):x}"
            )
            delivery: Delivery[Any] = Delivery(
                message,
                source,
                self,
                deliveries=wire.deliveries(received, counted=counted),
                native=received,
                position=f"{queue}@{received.tag}",
            )
            self._open[received.tag] = delivery
            if due is not None and due > self._clock.time() and not source.browse:
                self._start(self._hold_again(delivery, due))
                continue
            if self._place.letters and headers and wire.DEATH in headers:
                self._explain(delivery)
            found.append(delivery)
        self._taken += len(found)
        return found

    def _explain(self, delivery: Delivery[Any]) -> None:
        """Give what the server dead-lettered the headers that the core would have given it."""
        added = wire.broker_death(delivery.native)  # type: ignore[arg-type]  # we made it
        if not added:
            return
        origin = self._plan.logical.get(added[ORIGINAL_DESTINATION])
        if origin is not None:
            topic = origin.topic if isinstance(origin, Group) else origin
            added |= {ORIGINAL_DESTINATION: stem(topic), ORIGINAL_SUBSCRIPTION: origin.name}
        delivery.message.headers = {**delivery.message.headers, **added}

    async def _hold_again(self, delivery: Delivery[Any], due: float) -> None:
        """The next hop of a long delay: to the next hold queue, confirmed, and only then away from here."""
        error = await self._hooks.rehold(Outgoing(self.address, delivery.message, due, delivery))
        if error is None:
            self._settle_now(Outcome.ACCEPTED, [delivery])
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
        results = self._settle_now(outcome, deliveries)
        if not self._dead:
            try:
                await self._link.drain()
            except ConnectionLost as error:
                return [error if result is None else result for result in results]
        return results

    def _settle_now(self, outcome: Outcome, deliveries: Sequence[Delivery[Any]]) -> list[TransportError | None]:
        """One write. Unknown tags never reach the server: it would close the channel."""
        results: list[TransportError | None] = [None] * len(deliveries)
        unsettled = self._open
        tags = []
        for index, delivery in enumerate(deliveries):
            tag = delivery.native.tag if isinstance(delivery.native, wire.Received) else 0
            if delivery.token is not self or self._dead or delivery.lost or unsettled.pop(tag, None) is None:
                results[index] = LeaseLost(
                    f"{delivery.position}: no longer ours: settled before, or its channel is gone"
                )
            else:
                tags.append(tag)
        if tags:
            tags.sort()
            try:
                self._link.write(self._settle_frames(outcome, tags))
            except ConnectionLost as error:
                return [error if result is None else result for result in results]
        return results

    def _settle_frames(self, outcome: Outcome, tags: list[int]) -> bytes:
        number = self._number
        if outcome is Outcome.RELEASED:
            return b"".join(frames.nack_frame(number, tag) for tag in tags)
        # One ack for all tags below the first that stays open. It names a tag that is open: the server knows no other.
        first_open = next(iter(self._open), None)
        upto = 0
        if first_open is None:
            upto = len(tags)
        else:
            while upto < len(tags) and tags[upto] < first_open:
                upto += 1
        parts = [frames.ack_frame(number, tags[upto - 1], True)] if upto else []
        parts += [frames.ack_frame(number, tag, False) for tag in tags[upto:]]
        return b"".join(parts)

    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        raise Unsupported("RabbitMQ has no atomic move; send, then accept")

    async def extend(self, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
        raise Unsupported("RabbitMQ deliveries have no lease; consumer_timeout bounds how long one may be held")

    # -- the end ----------------------------------------------------------------------------------------------

    async def check(self) -> Standing:
        """RabbitMQ does not say whether a single active consumer is active: alive is `consuming`."""
        return "gone" if self._over is not None or self._stopped else "consuming"

    async def stop(self) -> None:
        if self._stopped or self._dead:
            self._stopped = True
            return
        self._stopped = True
        self._wake()
        try:
            async with asyncio.timeout(_TIMEOUT):
                for consumer in self._tags:
                    await self._channel.basic_cancel(consumer)
        except Exception as exc:
            log.warning("stop receiving from %s: %s", self.address, errors.translate(exc, "basic.cancel"))
        back = [received.tag for received in self._buffer]
        self._buffer.clear()
        if back and not self._dead:
            for tag in back:
                self._open.pop(tag, None)
            self._link.write(self._settle_frames(Outcome.RELEASED, back))

    async def close(self) -> None:
        self._hooks.closed(self)
        await self.stop()
        for task in self._tasks:
            task.cancel()
        if self._dead:
            return
        self._dead = True
        self._mark_lost(self._held())
        try:
            async with asyncio.timeout(_TIMEOUT):
                await self._channel.close()  # gives back what is still unsettled
        except Exception as exc:
            log.warning("close the channel of %s: %s", self.address, errors.translate(exc, "channel.close"))
        self._leave()

    def _held(self) -> list[Delivery[Any]]:
        return [delivery for delivery in self._open.values() if delivery is not None]

    def _mark_lost(self, deliveries: Sequence[Delivery[Any]]) -> None:
        for delivery in deliveries:
            delivery.lost = True
        self._open.clear()

    def _leave(self) -> None:
        self._dead = True
        if self._link.wire.sinks.get(self._number) is self._intake:
            del self._link.wire.sinks[self._number]

    def _cancelled(self, frame: Any) -> None:
        """The server ended the consumer: its queue was deleted, or its node went. What is held can still be settled."""
        self._end(NotFound(f"{self.address}: its queue {self._place.queue!r} was deleted, or its node is gone"))

    def _closed(self, closing: asyncio.Future[Any]) -> None:
        mine = self._dead and self._stopped
        self._leave()
        if mine:
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
        self._start(self._lose(self._held()))

    def _end(self, error: UnibusError) -> None:
        if self._over is None:
            self._over = error
        self._wake()

    async def _lose(self, held: list[Delivery[Any]]) -> None:
        try:
            if held:
                await self.source.losing(held, 0)
        finally:
            self._mark_lost(held)

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("subscription of %s: %r", self.address, exc)


_TIMEOUT = 10.0


async def _never(message: Any) -> None:
    """The callback that aiormq wants: the tap takes every delivery before aiormq sees it."""
    raise AssertionError(f"a delivery went past the tap: {message.delivery!r}")
