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
from unibus.errors import ConnectionLost, LeaseLost, Throttled, Timeout, TransportError, UnibusError
from unibus.message import DLQ_REASON, MOVED_TO_DLQ_AT
from unibus.retry import BROKER_LIMIT
from unibus.waiting import Tasks, Waiter
from unibus_sqs import config, errors, wire
from unibus_sqs.capabilities import LONGEST_HOLD
from unibus_sqs.link import Link
from unibus_sqs.topology import Place

log = logging.getLogger("unibus.sqs")

BATCH = 10  # entries that a request takes
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
        self.private = place.private
        self.url = str(place.url)
        self._place = place
        self._link = link
        self._clock = clock
        self._lease = _LOOK if source.browse else settings.lease
        self._longest = 1 if source.browse else settings.wait
        self._closed = closed
        self._held: dict[Delivery[Any], float] = {}  # when they were received, monotonic seconds
        self._arrived: deque[Delivery[Any]] = deque()  # of a poll whose receive was cancelled, or not called yet
        self._seen: set[str] = set()  # of a browser
        self._end_seen = False
        self._polls: set[asyncio.Task[None]] = set()
        self._hops = Tasks(self._failed_to_hop)
        self._asked = 0  # messages that polls under way may bring
        self._calls = 0  # of receive
        self._busy = False  # the last poll was worth it, so one more may be
        self._failing: float | None = None  # since when polls fail, monotonic seconds
        self._trouble: TransportError | None = None  # to be told once
        self._over: UnibusError | None = None
        self._stopped = self._ended = False
        self._waiter = Waiter(clock)

    # -- receive

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        deadline = self._clock.monotonic() + timeout
        self._calls += 1
        try:
            while True:
                if self._over is not None:
                    raise self._over
                if self._arrived:
                    return [self._arrived.popleft() for _ in range(min(limit, len(self._arrived)))]
                if self._trouble is not None:
                    trouble, self._trouble = self._trouble, None
                    raise trouble
                left = deadline - self._clock.monotonic()
                if self._stopped or left <= 0 or self._end_seen:
                    return []
                self._poll_for(limit, left)
                await self._waiter.wait(left)
        finally:
            self._calls -= 1

    def _poll_for(self, limit: int, seconds: float) -> None:
        """One poll runs always, more of them as long as they bring something: an idle queue costs one request a wait."""
        if self._polls and not (self._busy and len(self._polls) < self._calls):
            return
        room = min(limit, BATCH)
        if not self.source.browse:
            room = min(room, self.source.prefetch - len(self._held) - self._asked)
        if room > 0:
            self._asked += room
            task = asyncio.get_running_loop().create_task(
                self._poll(room, max(1, min(self._longest, math.ceil(seconds))))
            )
            self._polls.add(task)
            task.add_done_callback(lambda done: self._polled(done, room))

    async def _poll(self, room: int, wait: int) -> None:
        answer = await self._link.call(
            self._link.sqs.receive_message,
            f"receive from {self.address}",
            QueueUrl=self.url,
            MaxNumberOfMessages=room,
            WaitTimeSeconds=wait,
            VisibilityTimeout=self._lease,
            MessageAttributeNames=["All"],
            MessageSystemAttributeNames=_SYSTEM,
        )
        found = answer.get("Messages") or []
        self._failing = None
        self._busy = 2 * len(found) >= room
        now = self._clock.monotonic()
        if self.source.browse:
            self._end_seen = all(native["MessageId"] in self._seen for native in found)
            self._seen.update(native["MessageId"] for native in found)
        for native in found:
            delivery, due = self._delivery(native, now)
            if due is not None and due > self._clock.time() and not self.source.browse:
                self._hops.start(self._hop(delivery, due))
            else:
                self._held[delivery] = now
                self._arrived.append(delivery)

    def _polled(self, task: asyncio.Task[None], room: int) -> None:
        self._polls.discard(task)
        self._asked -= room
        self._waiter.wake()
        if task.cancelled() or (exc := task.exception()) is None:
            return
        error = errors.translate(exc, f"receive from {self.address}")
        self._busy = False
        if not isinstance(error, ConnectionLost | Throttled | Timeout):
            self._over = error
            return
        # What is held stays ours for the time of its lease, whatever becomes of one request; after that all is lost.
        now = self._clock.monotonic()
        self._failing = self._failing or now
        if isinstance(error, ConnectionLost) and now - self._failing < self._lease * 2 / 3:
            error = Timeout(str(error))
            error.__cause__ = exc
        self._trouble = error

    def _delivery(self, native: dict[str, Any], now: float) -> tuple[Delivery[Any], float | None]:
        message, due = wire.decode(native)
        system = native.get("Attributes") or {}
        delivery: Delivery[Any] = Delivery(
            message,
            self.source,
            native["ReceiptHandle"],
            deliveries=int(system.get("ApproximateReceiveCount", 1)),
            lease_until=now + self._lease,
            native=native,
            position=native["MessageId"],
        )
        if self._place.dead is not None and "DeadLetterQueueSourceArn" in system and DLQ_REASON not in message.headers:
            self._explain(delivery)
        return delivery, due

    def _explain(self, delivery: Delivery[Any]) -> None:
        """Give what SQS itself moved here, by the redrive policy, the headers that the core would have given it."""
        origin = self._place.dead.address if self._place.dead is not None else self.address
        delivery.message.headers = {
            **delivery.message.headers,
            DLQ_REASON: BROKER_LIMIT,
            **deadletter.origin(origin),
            MOVED_TO_DLQ_AT: deadletter.stamp(self._clock.time()),
        }

    async def _hop(self, delivery: Delivery[Any], due: float) -> None:
        """A message that is not due yet waits on, as long as SQS can: again with the rest of its delay, or invisible."""
        rest = max(1, math.ceil(due - self._clock.time()))
        if self._place.fifo:  # SQS delays no single message here, and a copy would lose its place
            await self._change([delivery], [min(rest, int(LONGEST_HOLD) - 60)])
            return
        native: Any = delivery.native
        copy: dict[str, Any] = {"MessageBody": native["Body"], "DelaySeconds": min(rest, LONGEST_DELAY)}
        if attributes := native.get("MessageAttributes"):
            copy["MessageAttributes"] = attributes
        await self._link.call(
            self._link.sqs.send_message, f"delay a message of {self.address}", QueueUrl=self.url, **copy
        )
        await self._delete([delivery])

    def _failed_to_hop(self, exc: BaseException) -> None:
        log.warning("a delayed message of %s comes again when its lease ends: %s", self.address, exc)

    # -- settle

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        if self.source.browse:
            raise only_looked_at(self.address)
        if outcome is Outcome.ACCEPTED:
            results = await self._ours(deliveries, lambda mine, _: self._delete(mine))
        else:
            until = [math.ceil(delay) for delay in delays] or [0] * len(deliveries)
            results = await self._ours(deliveries, lambda mine, at: self._change(mine, [until[i] for i in at]))
        for delivery, error in zip(deliveries, results, strict=True):
            if error is None or not error.retryable:
                self._held.pop(delivery, None)
        self._waiter.wake()  # there is room
        return results

    async def extend(self, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
        now = self._clock.monotonic()

        def length(delivery: Delivery[Any]) -> int:
            return min(math.ceil(seconds), int(LONGEST_HOLD - (now - self._held[delivery])) - 1)

        lengths = {d: length(d) for d in deliveries if d in self._held}
        for delivery, left in lengths.items():
            if left < 1:  # 12 hours in hand: SQS gives it to the next one
                del self._held[delivery]
        results = await self._ours(deliveries, lambda mine, _: self._change(mine, [lengths[d] for d in mine]))
        for delivery, error in zip(deliveries, results, strict=True):
            if error is None:
                delivery.lease_until = now + lengths[delivery]
            elif isinstance(error, LeaseLost):
                self._held.pop(delivery, None)
        return results

    async def _ours(
        self,
        deliveries: Sequence[Delivery[Any]],
        act: Callable[[list[Delivery[Any]], list[int]], Awaitable[list[TransportError | None]]],
    ) -> list[TransportError | None]:
        """`act` on those that are held, each once; LeaseLost for the others."""
        results, mine = held(deliveries, self._held.__contains__, "it is not held by this consumer")
        if mine:
            for i, result in zip(mine, await act([deliveries[i] for i in mine], mine), strict=True):
                results[i] = result
        return results

    async def _delete(self, deliveries: Sequence[Delivery[Any]]) -> list[TransportError | None]:
        entries = [{"ReceiptHandle": delivery.token} for delivery in deliveries]
        return await self._batches(self._link.sqs.delete_message_batch, entries)

    async def _change(self, deliveries: Sequence[Delivery[Any]], seconds: Sequence[int]) -> list[TransportError | None]:
        entries = [
            {"ReceiptHandle": delivery.token, "VisibilityTimeout": until}
            for delivery, until in zip(deliveries, seconds, strict=True)
        ]
        return await self._batches(self._link.sqs.change_message_visibility_batch, entries)

    async def _batches(self, operation: Any, entries: Sequence[dict[str, Any]]) -> list[TransportError | None]:
        """By tens, side by side; one result for each."""
        doing = f"settle messages of {self.address}"

        async def request(at: int) -> list[TransportError | None]:
            part = [{"Id": str(i), **entry} for i, entry in enumerate(entries[at : at + BATCH])]
            results: list[TransportError | None] = [None] * len(part)
            try:
                answer = await self._link.call(operation, doing, QueueUrl=self.url, Entries=part)
            except TransportError as error:  # its outcome is unknown, but what is held is still ours
                return [Timeout(str(error)) if isinstance(error, ConnectionLost) else error] * len(part)
            for failed in answer.get("Failed") or ():
                results[int(failed["Id"])] = errors.of_entry(failed, doing)
            return results

        if len(entries) <= BATCH:
            return await request(0)
        parts = await asyncio.gather(*(request(at) for at in range(0, len(entries), BATCH)))
        return [result for part in parts for result in part]

    # -- the end

    async def check(self) -> Standing:
        return "gone" if self._over is not None or self._stopped else "consuming"

    async def stop(self) -> None:
        """A poll under way is waited for: one that is cut off may take messages along, unseen until their lease ends."""
        self._stopped = True
        self._waiter.wake()
        if self.private:
            for poll in self._polls:
                poll.cancel()
        if under_way := [*self._polls, *self._hops]:
            await asyncio.wait(under_way)
        back = list(self._arrived)
        self._arrived.clear()
        await self._hand_back(back)

    async def _hand_back(self, deliveries: list[Delivery[Any]]) -> None:
        if not deliveries or self.private:
            return
        for error in await self._change(deliveries, [0] * len(deliveries)):
            if error is not None:
                log.debug("%s: a message goes back when its lease ends: %s", self.address, error)
        for delivery in deliveries:
            self._held.pop(delivery, None)

    async def close(self) -> None:
        if self._ended:
            return
        self._ended = True
        await self.stop()
        left = list(self._held)
        for delivery in left:
            delivery.lost = True
        await self._hand_back(left)
        self._over = ConnectionLost(f"the subscription of {self.address} is closed")
        self._waiter.wake()
        await self._closed(self)
