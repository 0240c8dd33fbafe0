"""Receiving: long polls, as many at once as the queue gives work for; each message has its own lease."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from unibus import deadletter
from unibus.adapter import Outcome, Results, Source, Standing
from unibus.clock import Clock
from unibus.delivery import Delivery
from unibus.driver import NoMove, held, only_looked_at
from unibus.errors import ConnectionLost, LeaseLost, Timeout, TransportError, UnibusError
from unibus.inflow import Inflow, closed
from unibus.retry import BROKER_LIMIT
from unibus.waiting import Tasks
from unibus_sqs import config, wire
from unibus_sqs.capabilities import LONGEST_HOLD
from unibus_sqs.link import BATCH, Link
from unibus_sqs.topology import Place

log = logging.getLogger("unibus.sqs")

LONGEST_DELAY = 900  # of DelaySeconds
_LOOK = 300  # visibility timeout while browsing
_SYSTEM = ["ApproximateReceiveCount", "SentTimestamp", "MessageGroupId", "DeadLetterQueueSourceArn"]

Closed = Callable[["SqsSubscription"], Awaitable[None]]


class SqsSubscription(NoMove):
    """A consumer of one queue. `closed` is told at the end."""

    def __init__(
        self, source: Source, place: Place, link: Link, clock: Clock, settings: config.Settings, closed: Closed
    ) -> None:
        self.source = source
        self.address = place.address
        self.place = place
        self._link = link
        self._clock = clock
        self._lease = _LOOK if source.browse else settings.lease
        self._longest = 1 if source.browse else settings.wait
        self._closed = closed
        self._held: dict[Delivery[Any], float] = {}  # when they were received, monotonic seconds
        self._arrived: deque[Delivery[Any]] = deque()  # not yet given out; more than a moment only after a cancellation
        self._seen: set[str] = set()  # of a browser
        self._polls = Tasks(lambda exc: log.debug("receive from %s: %s", self.address, exc))  # who waits is told
        self._hops = Tasks(self._failed_to_hop)
        self._asked = 0  # messages that polls under way may bring
        self._busy = False  # the last poll was worth it, so more may run
        self._failing: float | None = None  # since when polls fail, monotonic seconds
        self._inflow = Inflow(clock)

    # -- receive

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        if self.source.browse:
            timeout = min(timeout, self._longest)  # one poll that brings nothing is the end of it
        return await self._inflow.receive(timeout, lambda: self._take(limit), lambda left: self._more(limit, left))

    def _take(self, limit: int) -> list[Delivery[Any]]:
        return [self._arrived.popleft() for _ in range(min(limit, len(self._arrived)))]

    async def _more(self, limit: int, seconds: float) -> None:
        """One poll runs always, one for each call as long as they bring much: an idle queue costs one request a wait."""
        room = min(limit, BATCH)
        if not self.source.browse:
            room = min(room, self.source.prefetch - len(self._held) - self._asked)
        if room <= 0 or (self._asked and not self._busy):
            await self._inflow.wait(seconds)
            return
        self._asked += room
        poll = self._polls.start(self._poll(room, seconds))
        await asyncio.wait([poll])  # a receive that is cancelled leaves it alone: it may have messages
        self._inflow.wake()
        if not poll.cancelled():
            poll.result()

    async def _poll(self, room: int, seconds: float) -> None:
        try:
            answer = await self._link.call(
                self._link.receive_message,
                f"receive from {self.address}",
                QueueUrl=self.place.target,
                MaxNumberOfMessages=room,
                WaitTimeSeconds=max(1, min(self._longest, math.ceil(seconds))),
                VisibilityTimeout=self._lease,
                MessageAttributeNames=["All"],
                MessageSystemAttributeNames=_SYSTEM,
            )
        except UnibusError as error:
            self._busy = False
            now = self._clock.monotonic()
            self._failing = self._failing or now
            # What is held stays ours for the time of its lease, whatever becomes of one request; after that all is lost.
            if isinstance(error, ConnectionLost) and now - self._failing < self._lease * 2 / 3:
                raise Timeout(str(error)) from error
            raise
        finally:
            self._asked -= room
        found = answer.get("Messages") or []
        self._failing = None
        self._busy = 2 * len(found) >= room
        for native in found:
            if self.source.browse:
                if native["MessageId"] in self._seen:
                    continue
                self._seen.add(native["MessageId"])
            self._admit(native)

    def _admit(self, native: dict[str, Any]) -> None:
        message, due = wire.decode(native)
        system = native.get("Attributes") or {}
        now = self._clock.monotonic()
        delivery: Delivery[Any] = Delivery(
            message,
            self.source,
            native["ReceiptHandle"],
            deliveries=int(system.get("ApproximateReceiveCount", 1)),
            lease_until=now + self._lease,
            native=native,
            position=native["MessageId"],
        )
        self._held[delivery] = now
        origin = self.place.dead
        if origin is not None and "DeadLetterQueueSourceArn" in system:  # moved by the redrive policy
            deadletter.explain(message, BROKER_LIMIT, self._clock.time(), origin.address)
        left = 0.0 if due is None else due - self._clock.time()
        if left > 0 and self.source.early:  # what SQS itself still hides is out of reach
            message.delay = left
        if due is not None and left > 0 and not (self.source.browse or self.source.early):
            self._hops.start(self._hop(delivery, due))
        else:
            self._arrived.append(delivery)

    async def _hop(self, delivery: Delivery[Any], due: float) -> None:
        """A message that is not due yet waits on, as long as SQS can: again with the rest of its delay, or invisible."""
        rest = max(1, math.ceil(due - self._clock.time()))
        native: Any = delivery.native
        try:
            if self.place.fifo:  # SQS delays no single message here, and a copy would lose its place
                await self._ours([delivery], [min(rest, int(LONGEST_HOLD) - 60)])
                return
            copy: dict[str, Any] = {"MessageBody": native["Body"], "DelaySeconds": min(rest, LONGEST_DELAY)}
            if attributes := native.get("MessageAttributes"):
                copy["MessageAttributes"] = attributes
            doing = f"delay a message of {self.address}"
            await self._link.call(self._link.sqs.send_message, doing, QueueUrl=self.place.target, **copy)
            await self._ours([delivery], None)
        finally:
            del self._held[delivery]

    def _failed_to_hop(self, exc: BaseException) -> None:
        log.warning("a delayed message of %s comes again when its lease ends: %s", self.address, exc)

    # -- settle

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        if self.source.browse:
            raise only_looked_at(self.address)
        until = None
        if outcome is Outcome.RELEASED:
            until = [math.ceil(delay) for delay in delays] or [0] * len(deliveries)
        results = await self._ours(deliveries, until)
        for delivery, error in zip(deliveries, results, strict=True):
            if error is None or not error.retryable:
                self._held.pop(delivery, None)
        self._inflow.wake()  # there is room
        return results

    async def extend(self, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
        now = self._clock.monotonic()
        latest = [self._held.get(delivery, now) + LONGEST_HOLD - 1 for delivery in deliveries]
        lengths = [min(math.ceil(seconds), int(end - now)) for end in latest]
        for delivery, length in zip(deliveries, lengths, strict=True):
            if length < 1:  # 12 hours in hand: SQS gives it to the next one
                self._held.pop(delivery, None)
        results = await self._ours(deliveries, lengths)
        for delivery, length, error in zip(deliveries, lengths, results, strict=True):
            if error is None:
                delivery.lease_until = now + length
            elif isinstance(error, LeaseLost):
                self._held.pop(delivery, None)
        return results

    async def _ours(self, deliveries: Sequence[Delivery[Any]], until: Sequence[int] | None) -> Results:
        """Hide those that are held for so many seconds, or delete them (None). By tens, side by side."""
        results, mine = held(deliveries, self._held.__contains__, "it is not held by this consumer")
        link, doing = self._link, f"settle messages of {self.address}"
        if until is None:
            operation = link.delete_message_batch
            entries = [{"ReceiptHandle": deliveries[i].token} for i in mine]
        else:
            operation = link.change_message_visibility_batch
            entries = [{"ReceiptHandle": deliveries[i].token, "VisibilityTimeout": until[i]} for i in mine]

        async def request(at: int) -> None:
            part = entries[at : at + BATCH]
            errors = await self._link.batch(operation, doing, "Entries", part, QueueUrl=self.place.target)
            for i, error in zip(mine[at:], errors, strict=False):
                results[i] = _still_ours(error)

        await asyncio.gather(*(request(at) for at in range(0, len(entries), BATCH)))
        return results

    # -- the end

    async def check(self) -> Standing:
        return "gone" if self._inflow.over else "consuming"

    async def stop(self) -> None:
        """A poll under way is waited for: one that is cut off may take messages along, unseen until their lease ends."""
        self._inflow.stop()
        if self.place.private:
            for poll in self._polls:
                poll.cancel()
        if under_way := [*self._polls, *self._hops]:
            await asyncio.wait(under_way)
        await self._hand_back(self._arrived)
        self._arrived.clear()

    async def _hand_back(self, left: Sequence[Delivery[Any]]) -> None:
        deliveries = [] if self.place.private else list(left)
        for error in await self._ours(deliveries, [0] * len(deliveries)):
            if error is not None:
                log.debug("%s: a message goes back when its lease ends: %s", self.address, error)
        for delivery in deliveries:
            self._held.pop(delivery, None)

    async def close(self) -> None:
        if self._inflow.error is not None:
            return
        self._inflow.end(closed(self.address))
        await self.stop()
        for delivery in self._held:
            delivery.lost = True
        await self._hand_back(list(self._held))
        await self._closed(self)


def _still_ours(error: TransportError | None) -> TransportError | None:
    """Of a request without an answer the outcome is unknown, but what is held is not lost by it."""
    return Timeout(str(error)) if isinstance(error, ConnectionLost) else error
