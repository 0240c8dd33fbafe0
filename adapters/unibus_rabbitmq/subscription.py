"""Receiving: deliveries are pushed into a deque, at most `prefetch` of them unsettled."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiormq.abc import AbstractChannel

from unibus import deadletter
from unibus.adapter import Outcome, Outgoing, Results, Source, Standing
from unibus.channel import Group, Inbox, Queue
from unibus.clock import Clock
from unibus.delivery import Delivery
from unibus.driver import NoLease, NoMove, OnlyLooks, held
from unibus.errors import ConnectionLost, NotFound, UnibusError, Unsupported
from unibus.inflow import Inflow, closed
from unibus.retry import SUSPECT_AFTER, handed_out_often
from unibus.waiting import Tasks, answered
from unibus_rabbitmq import errors, wire
from unibus_rabbitmq.link import CHANNEL_CLOSE, DELIVER, HEADER, METHOD, Link, ack_frame, nack_frame
from unibus_rabbitmq.topology import Place, Plan

log = logging.getLogger("unibus.rabbitmq")

_TIMEOUT = 10.0  # of each call
_SEEN_AGAIN = 0.5  # seconds to wait for a queue to count what was handed back


class RabbitMQSubscription(NoMove, NoLease):
    """One consumer on a channel of its own. Delivery tags belong to the channel and end with it.

    `send` is for what goes on to another hold queue, or back to its own queue as a copy; `closed` hears of the end.
    """

    def __init__(
        self,
        source: Source,
        place: Place,
        link: Link,
        channel: AbstractChannel,
        clock: Clock,
        plan: Plan,
        send: Callable[[Sequence[Outgoing]], Awaitable[Results]],
        closed: Callable[[RabbitMQSubscription], None],
    ) -> None:
        self.source = source
        self._inbox = isinstance(source.address, Inbox)
        self.address: Queue[Any] | Group | Inbox = Inbox(place.queue) if self._inbox else source.address
        self._place = place
        self._link = link
        self._channel = channel
        self._clock = clock
        self._plan = plan
        self._send = send
        self._when_closed = closed
        self._fallback = f"{secrets.token_hex(8)}-"  # of the ids of messages that have none
        self._method = b""  # of a delivery whose header is still coming
        self._coming: wire.Received  # one whose body is still coming
        self._parts: list[bytes] = []
        self._left = 0
        self._buffer: deque[wire.Received] = deque()
        # What the server counts as unsettled, by tag, ascending; with its delivery once that was given out. The server closes the
        # channel on a tag that it does not know (any more), so only what is in here reaches it.
        self._open: OrderedDict[int, Delivery[Any] | None] = OrderedDict()
        self._inflow = Inflow(clock)
        self._tasks = Tasks(lambda exc: log.error("subscription of %s: %r", self.address, exc))
        self._consumers: list[str] = []  # tags
        self._dead = False  # the channel is gone, and with it all tags
        self._handed_back = self._closing = False
        self._stopping: asyncio.Task[None] | None = None
        self._losing: asyncio.Task[None] | None = None
        link.sinks[channel.number] = self._frame
        channel.on_consumer_cancel_callbacks.add(self._cancelled)
        channel.closing.add_done_callback(self._closed)

    async def consume(self) -> None:
        """Start to receive; returns when a message sent now would arrive."""
        try:
            async with asyncio.timeout(_TIMEOUT):
                await self._channel.basic_qos(prefetch_count=self.source.prefetch)
                ok = await self._channel.basic_consume(self._place.queue, _never)
        except Exception as exc:
            raise errors.translate(exc, f"consume from {self._place.queue!r}") from exc
        self._consumers.append(str(ok.consumer_tag))

    # -- receive ----------------------------------------------------------------------------------------------

    def _frame(self, kind: int, payload: bytes) -> bool:
        if kind == METHOD:
            if payload[:4] == DELIVER:
                self._method = payload
                return True
            if payload[:4] == CHANNEL_CLOSE:
                self._leave()  # aiormq answers
            return False
        if kind == HEADER:
            self._coming = wire.Received(self._method, payload)
            self._left = wire.body_size(payload)
        else:
            self._parts.append(payload)
            self._left -= len(payload)
        if self._left <= 0:
            received = self._coming
            if self._parts:
                received.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                self._parts.clear()
            self._open[received.tag] = None
            self._buffer.append(received)
            if self._handed_back:  # a quorum queue may deliver after its answer to the cancel
                self._tasks.start(self._hand_back())
            self._inflow.wake()
        return True

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        try:
            return await self._inflow.receive(timeout, lambda: self._take(limit), self._more)
        except UnibusError:
            if self._losing is not None:  # the core hears of that first
                await asyncio.shield(self._losing)
            raise

    async def _more(self, seconds: float) -> None:
        """The server sends by itself."""
        await self._inflow.wait(seconds)

    def _take(self, limit: int) -> list[Delivery[Any]]:
        found: list[Delivery[Any]] = []
        buffer = self._buffer
        while buffer and len(found) < limit:
            received = buffer.popleft()
            delivery = self._delivery(received)
            if headers := received.headers:
                due = wire.not_before(headers)
                if due is not None and due > self._clock.time() and not self.source.browse:
                    self._tasks.start(self._hold_again(delivery, due))
                    continue
                if self._place.letters and isinstance(headers.get(wire.DEATH), list):
                    reason, at, queue = wire.broker_death(received)
                    deadletter.explain(delivery.message, reason, at, self._plan.owners.get(queue, queue))
            found.append(delivery)
        return found

    def _delivery(self, received: wire.Received) -> Delivery[Any]:
        position = f"{self._place.queue}@{received.tag}"
        message = wire.decode(received, inbox=self._inbox, fallback=self._fallback + position)
        count = wire.deliveries(received, counted=self._place.counted)
        delivery: Delivery[Any] = Delivery(
            message, self.source, received.tag, deliveries=count, native=received, position=position
        )
        self._open[received.tag] = delivery
        return delivery

    async def _hold_again(self, delivery: Delivery[Any], due: float) -> None:
        if await self._inflow.hop(self._send, self.address, delivery, due):
            await self.settle(Outcome.ACCEPTED, [delivery])

    # -- settle -----------------------------------------------------------------------------------------------

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        if outcome is Outcome.RELEASED and any(delays):
            raise Unsupported("RabbitMQ gives a message back at once; send a delayed copy, then accept this one")
        results, mine = held(deliveries, self._has, "its channel is gone")
        try:
            if outcome is Outcome.ACCEPTED:
                self._accept([deliveries[index].token for index in mine])
            else:
                await self._release([deliveries[index] for index in mine])
            await self._link.drain()
        except ConnectionLost as error:
            for index in mine:
                results[index] = error
        return results

    def _has(self, delivery: Delivery[Any]) -> bool:
        return not self._dead and self._open.get(delivery.token) is delivery

    def _accept(self, tags: list[Any]) -> None:
        for tag in tags:
            del self._open[tag]
        if tags:
            self._link.write(acks(self._channel.number, sorted(tags), next(iter(self._open), None)))

    def _nack(self, tags: list[Any]) -> None:
        """Back to the queue, in their order."""
        for tag in tags:
            del self._open[tag]
        if tags:
            self._link.write(b"".join(nack_frame(self._channel.number, tag) for tag in sorted(tags)))

    async def _release(self, deliveries: list[Delivery[Any]]) -> None:
        """Back to the queue. Where the server counts that, one which was handed out often goes back as a fresh copy.

        Its count would make it a suspect of the crash guard, and a dead letter in the end, for nothing but restarts. With a
        single active consumer that is about to leave, they go back when the channel ends, in their order.
        """
        if self._place.single and self._inflow.stopped:
            self._open.update(dict.fromkeys(delivery.token for delivery in deliveries))
            return
        # One below the core's limit: what is on its way while the channel ends is counted once more.
        often = [d for d in deliveries if self._place.copies and handed_out_often(d, SUSPECT_AFTER - 1)]
        errors_ = await self._send([Outgoing(self.address, d.message, None, d) for d in often]) if often else ()
        copied = [d for d, error in zip(often, errors_, strict=True) if error is None and self._has(d)]
        self._accept([delivery.token for delivery in copied])
        self._nack([delivery.token for delivery in deliveries if self._has(delivery)])

    # -- the end ----------------------------------------------------------------------------------------------

    async def check(self) -> Standing:
        """RabbitMQ does not say whether a single active consumer is active: alive is `consuming`."""
        return "gone" if self._inflow.over else "consuming"

    async def stop(self) -> None:
        """Shielded: aiormq closes a channel whose call is cancelled, and what is in hand is still to be settled on it."""
        if self._stopping is None:
            self._inflow.stop()
            self._stopping = self._tasks.start(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        # With a single active consumer the next one would be active at once and overtake what is still in hand here. The end of
        # the channel gives back the rest and makes it active in one step.
        if not self._dead and not self._place.single and await self._cancel():
            self._handed_back = True
            await self._hand_back()

    async def _cancel(self) -> bool:
        try:
            async with asyncio.timeout(_TIMEOUT):
                for consumer in self._consumers:
                    await answered(self._channel.basic_cancel(consumer))
        except Exception as exc:
            log.warning("stop receiving from %s: %s", self.address, errors.translate(exc, "basic.cancel"))
            self._lose()  # aiormq closes the channel; whatever is written to it after that costs the connection
            return False
        return True

    async def _hand_back(self) -> None:
        """What was not given out."""
        back = [self._delivery(received) for received in self._buffer]
        self._buffer.clear()
        if back and not self._dead:
            await self.settle(Outcome.RELEASED, back)

    async def close(self) -> None:
        self._when_closed(self)
        await self.stop()
        for task in self._tasks:
            task.cancel()
        if self._dead:
            return
        self._closing = self._dead = True
        self._lose()
        self._inflow.end(closed(self.address))
        try:
            async with asyncio.timeout(_TIMEOUT):
                await answered(self._channel.close())  # gives back what is still unsettled
        except Exception as exc:
            log.warning("close the channel of %s: %s", self.address, errors.translate(exc, "channel.close"))
        self._leave()

    def _leave(self) -> None:
        self._dead = True
        if self._link.sinks.get(self._channel.number) == self._frame:
            del self._link.sinks[self._channel.number]

    def _lose(self) -> None:
        """What was given out is no longer ours."""
        for delivery in self._open.values():
            if delivery is not None:
                delivery.lost = True
        self._open.clear()

    def _cancelled(self, frame: Any) -> None:
        """The server ended the consumer: its queue was deleted, or its node went. What is held can still be settled."""
        self._inflow.end(NotFound(f"{self.address}: its queue {self._place.queue!r} was deleted, or its node is gone"))

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
        self._inflow.end(error)
        self._buffer.clear()
        self._losing = self._tasks.start(self._tell())

    async def _tell(self) -> None:
        try:
            if given_out := [delivery for delivery in self._open.values() if delivery is not None]:
                await self.source.losing(given_out, 0)
        finally:
            self._lose()


class Browser(OnlyLooks, RabbitMQSubscription):
    """AMQP can't look, so messages are taken, page by page of `prefetch`, and handed back in the end: that reorders the queue."""

    async def _more(self, seconds: float) -> None:
        if len(self._open) != len(self._consumers) * self.source.prefetch:
            await super()._more(seconds)
            return
        # All of this page is in hand, unsettled, so another consumer gets the next one. Shielded, since aiormq closes a channel
        # whose call is cancelled.
        await asyncio.shield(self._tasks.start(self.consume()))

    async def stop(self) -> None:
        self._inflow.stop()

    async def close(self) -> None:
        """Hand all back, and wait until the queue counts them again, unless someone else takes them."""
        self._inflow.stop()
        if not self._dead:
            await self._cancel()
            try:
                await self._give_back()
            except Exception as exc:
                log.warning("hand back what was looked at in %s: %s", self.address, errors.translate(exc, "basic.nack"))
        await super().close()

    async def _give_back(self) -> None:
        tags = list(self._open)
        self._nack(tags)
        deadline = self._clock.monotonic() + _SEEN_AGAIN
        while self._clock.monotonic() < deadline:
            found = await self._channel.queue_declare(self._place.queue, passive=True, timeout=_TIMEOUT)
            if (found.message_count or 0) >= len(tags):
                return


def acks(channel: int, tags: list[int], first_open: int | None) -> bytes:
    """One ack for all tags below the first that stays open, single ones beyond. `tags` ascend."""
    upto = len(tags)
    if first_open is not None:
        upto = next((n for n, tag in enumerate(tags) if tag > first_open), upto)
    prefix = ack_frame(channel, tags[upto - 1], True) if upto else b""
    return prefix + b"".join([ack_frame(channel, tag, False) for tag in tags[upto:]])


async def _never(message: Any) -> None:
    """The callback that aiormq wants: the tap takes every delivery before aiormq sees it."""
    raise AssertionError(f"a delivery went past the tap: {message.delivery!r}")
