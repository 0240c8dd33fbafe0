"""Receiving: one consumer of the client library, read by a task of its own so that it never stops polling."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import CommitFailedError, KafkaError, OffsetOutOfRangeError, RebalanceInProgressError

from unibus.adapter import Outcome, Outgoing, Results, Source, Standing
from unibus.channel import Address, Group
from unibus.clock import Clock, Timer
from unibus.delivery import Delivery
from unibus.driver import NoLease, NoMove, held
from unibus.errors import ConnectionLost, NotFound, Timeout, TransportError, UnibusError
from unibus.inflow import Inflow, closed
from unibus.waiting import Tasks, happens
from unibus_kafka import config, errors, offsets, wire
from unibus_kafka.capabilities import HOLD_BELOW
from unibus_kafka.engine import Consumer
from unibus_kafka.link import EARLIEST, LATEST, Link
from unibus_kafka.offsets import Partition
from unibus_kafka.topology import Place

log = logging.getLogger("unibus.kafka")

_LOOK = 1.0  # seconds between looks whether there is anything on the topics beside the main one
_HELD = 1000  # records of one partition that wait for their time, before it is paused
_CLOSE = 5.0  # seconds
_CAREFUL = 60.0  # seconds after which what killed the owner before us would have done it again


@dataclass(frozen=True, slots=True)
class Kit:
    """What a subscription needs of its adapter."""

    link: Link
    clock: Clock
    settings: config.Settings
    send: Callable[[Sequence[Outgoing]], Awaitable[Results]]
    closed: Callable[[KafkaSubscription], None]


class KafkaSubscription(NoMove, NoLease):
    """`group`: as a member of it; None: by itself, from where it is told, and nothing is committed.

    `token`: of an inbox, the key of its replies.
    """

    def __init__(
        self, source: Source, place: Place, consumer: Consumer, kit: Kit, group: str | None, token: str = ""
    ) -> None:
        self.source = source
        self.address: Address = source.address
        self._place = place
        self._consumer = consumer
        self._kit = kit
        self._group = group
        self._token = token.encode()
        self._parts: dict[TopicPartition, Partition] = {}
        self._buffer: deque[Delivery[Any]] = deque()  # read, to be handed out next
        self._handed: set[Delivery[Any]] = set()
        self._held: list[
            tuple[float, int, float, Delivery[Any], bool]
        ] = []  # heap: at, tie-break, due, whose, blocking
        self._count = itertools.count()
        self._inflow = Inflow(kit.clock)
        self._room = asyncio.Event()
        self._unsaid = False  # what is handed out next has to be committed first
        self._joined = asyncio.Event()
        self._hint = asyncio.Event()
        self._closing = asyncio.Event()
        self._fenced = False  # the group has gone on without us
        self._closed = False
        self._committing = asyncio.Lock()
        self._commit_timer: Timer | None = None
        self._held_timer: Timer | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._tasks = Tasks(lambda exc: log.error("%s: %r", self.address, exc))

    # Beginning

    def begin(self) -> None:
        work = [self._pump()] if len(self._place.topics) == 1 else [self._pump(), self._look_aside()]
        self._readers = [asyncio.get_running_loop().create_task(one) for one in work]

    async def assign(self, starts: dict[TopicPartition, tuple[int, str]]) -> None:
        """By ourselves: begin here."""
        await self._take_over(starts, assign=True)

    async def joined(self, timeout: float) -> None:
        """Until partitions are assigned, or it is clear that somebody else has them for the time being."""
        await happens(self._joined, timeout)
        if self._inflow.error is not None:
            raise self._inflow.error

    async def _take_over(self, starts: dict[TopicPartition, tuple[int, str]], *, assign: bool = False) -> None:
        for tp, (offset, metadata) in starts.items():
            part = self._parts[tp] = Partition(tp, offset, metadata, self._place.topics.get(tp.topic, 0.0))
            if part.orphan:
                part.careful = self._kit.clock.monotonic() + _CAREFUL
        aside = [tp for tp in starts if tp.topic != self._place.topic]
        await self._consumer.begin({tp: offset for tp, (offset, _) in starts.items()}, aside, assign=assign)
        self._joined.set()
        self._hint.set()

    # Rebalances: called by the engine, whose heart goes on beating meanwhile.

    async def assigned(self, tps: Iterable[TopicPartition]) -> None:
        try:
            committed = await self._kit.link.committed(str(self._group))
            missing = [tp for tp in tps if tp not in committed]
            begin = await self._kit.link.offsets(missing, EARLIEST) if missing else {}
            self._fenced = False
            await self._take_over({tp: committed.get(tp) or (begin[tp], "") for tp in tps})
            if isinstance(self.address, Group) and any(tp.topic == self._place.topic for tp in missing):
                text = "%s: no offset is committed for %d partitions (they are new, or it has expired); read from the beginning"
                log.warning(text, self.address, len(missing))
        except Exception as exc:
            self._end(errors.translate(exc, f"take over the partitions of {self._group!r}"))

    async def revoked(self, *, lost: bool, member: str = "") -> None:
        self._fenced |= lost
        if member:
            self._tasks.start(self._leave(member))
        grace = 0.0 if self._fenced or self._closing.is_set() else self._kit.settings.rebalance_grace
        await self._give_up(list(self._parts.values()), grace)

    async def _leave(self, member: str) -> None:
        """After an outage: nobody gets a partition while the group waits for who we were before it."""
        while self._fenced and not self._closing.is_set():
            try:
                await self._kit.link.leave(str(self._group), member)
            except (ConnectionLost, Timeout) as error:  # the outage goes on
                log.debug("%s: %s", self.address, error)
            except TransportError as error:  # the group has gone on by itself
                log.debug("%s: %s", self.address, error)
                return
            else:
                return

    async def _give_up(self, parts: list[Partition], grace: float) -> None:
        """What waits goes, what runs may end, what has ended is committed; then the partitions are no longer ours."""
        until = self._kit.clock.monotonic() + grace
        for part in parts:
            part.leaving = True
        self._forget(parts)
        try:
            if out := [one for part in parts for one in part.open.values() if one in self._handed]:
                losing = asyncio.ensure_future(self.source.losing(out, grace))
                closing = asyncio.ensure_future(self._closing.wait())
                await asyncio.wait((losing, closing), return_when=asyncio.FIRST_COMPLETED)
                closing.cancel()
                losing.cancel()
            for part in parts:
                part.end(self._handed)
            # What ends from here on is too late for the commit, and must not pass for settled.
            self._handed = {delivery for delivery in self._handed if delivery.token not in parts}
            # The group waits for us as long as for handlers: a commit without an answer is tried again.
            while await self._commit() is False and self._kit.clock.monotonic() < until and not self._closing.is_set():
                await self._kit.clock.sleep(self._kit.settings.commit_interval)
        finally:
            self._tell_unsaid(parts)
            self._forget(parts)  # handed back meanwhile
            self._handed = {delivery for delivery in self._handed if delivery.token not in parts}
            for part in parts:
                part.lose()
                if self._parts.get(part.tp) is part:
                    del self._parts[part.tp]

    def _forget(self, parts: Sequence[Partition]) -> None:
        """What is not handed out."""
        self._buffer = deque(delivery for delivery in self._buffer if delivery.token not in parts)
        self._held = [entry for entry in self._held if entry[3].token not in parts]
        heapq.heapify(self._held)

    def _tell_unsaid(self, parts: Iterable[Partition]) -> None:
        """What is handled again, by whoever gets these partitions: no commit says that it was handled."""
        positions = [position for part in parts for position in part.unsaid()] if self._group is not None else []
        if positions:
            text = (
                "%s: %d messages were handled, and not committed before their partitions went; they are handled again"
            )
            log.warning(text, self.address, len(positions), extra={"address": self.address, "positions": positions})

    # Reading

    async def _pump(self) -> None:
        consumer = self._consumer
        try:
            while True:
                if len(self._buffer) >= self.source.prefetch:
                    self._room.clear()
                    await self._room.wait()
                try:
                    found = await consumer.getmany()
                except OffsetOutOfRangeError as exc:
                    await self._begin_anew(list(exc.args[0]))
                    continue
                for tp, records in found.items():
                    if records and (part := self._parts.get(tp)) is not None:
                        self._arrived(part, records)
                if self._joined.is_set() and consumer.forgets(self._place.topics) and await self._is_deleted():
                    raise NotFound(f"{self.address}: its topic {self._place.topic!r} was deleted")
                if self._group is None:
                    await self._look_for_new()
        except Exception as exc:
            self._end(errors.translate(exc, f"receive from {self._place.topic!r}"))

    async def _is_deleted(self) -> bool:
        """The consumer also forgets a topic without a leader, or one its broker hasn't heard of: another one has to agree."""
        try:
            return bool(await self._kit.link.missing([self._place.topic], fresh=True))
        except TransportError as error:  # nobody answers: that is no sign of it, and would end what goes on by itself
            log.debug("%s: no look at its topic: %s", self.address, error)
            return False

    async def _look_aside(self) -> None:
        """Read lanes and rungs only while there is something on them.

        The library has one fetch at a time under way to a broker. It would wait, half a second, for partitions that are
        empty, while the main one, whose records we have taken, can't be fetched.
        """
        while True:
            await happens(self._hint, _LOOK)
            self._hint.clear()
            try:
                aside = {
                    tp: part for tp, part in self._parts.items() if tp.topic != self._place.topic and not part.held
                }
                for tp, end in (await self._kit.link.offsets(aside, LATEST) if aside else {}).items():
                    if self._parts.get(tp) is (part := aside[tp]) and not (part.held or part.full):
                        self._pause(part, on=part.next >= end)
            except TransportError as error:  # the main topic's consumer meets it, too
                log.debug("%s: no look at its retries: %s", self.address, error)

    def sent(self, topic: str) -> None:
        """We have sent something to this topic ourselves: no need to wait for the next look."""
        if topic in self._place.topics:
            self._hint.set()

    async def _begin_anew(self, tps: list[TopicPartition]) -> None:
        """What was to be read next is gone: retention was faster, or the topic was made anew."""
        begin = await self._kit.link.offsets(tps, EARLIEST)
        log.warning("%s: the records to be read next are gone; read on from the earliest that is there", self.address)
        lost = [part for tp in tps if (part := self._parts.get(tp)) is not None]
        await self._give_up(lost, 0.0)
        await self._take_over({tp: (offset, "") for tp, offset in begin.items()})

    async def _look_for_new(self) -> None:
        """Without a group nobody tells us that a topic has more partitions now."""
        if isinstance(self.address, Group) and not self.source.browse:
            known = self._kit.link.partitions
            new = [tp for topic in self._place.topics for tp in known(topic) if tp not in self._parts]
            if new:
                old = self._parts.copy()
                await self.assign(dict.fromkeys(new, (0, "")) | {tp: (part.next, "") for tp, part in old.items()})
                self._parts |= old

    def _arrived(self, part: Partition, records: Sequence[Any]) -> None:
        ready, later = part.read(records, self.source, self._kit.clock.time(), self._token)
        if self.source.early:
            ready += [delivery for _, delivery in later]
            later = []
        self._buffer.extend(ready)
        for due, delivery in later:
            on_rung = part.seconds and self._place.rungs
            record: Any = delivery.native
            self._hold(min(due, record.timestamp / 1000 + part.seconds) if on_rung else due, due, delivery)
        if part.held and (part.seconds or part.held > _HELD):
            self._pause(part, on=True)
        if later:
            self._set_timer()
        self._inflow.wake()

    def _pause(self, part: Partition, *, on: bool) -> None:
        self._consumer.pause(part.tp, on=on)

    # Records that wait for their time

    def _hold(self, at: float, due: float, delivery: Delivery[Any], *, blocking: bool = True) -> None:
        delivery.token.held += blocking
        heapq.heappush(self._held, (at, next(self._count), due, delivery, blocking))

    def _set_timer(self) -> None:
        if self._held_timer is not None:
            self._held_timer.cancel()
            self._held_timer = None
        if self._held and not self._inflow.stopped:
            clock = self._kit.clock
            self._held_timer = clock.call_later(max(0.0, self._held[0][0] - clock.time()) + 0.001, self._fall_due)

    def _fall_due(self) -> None:
        now = self._kit.clock.time()
        while self._held and self._held[0][0] <= now:
            _, _, due, delivery, blocking = heapq.heappop(self._held)
            part: Partition = delivery.token
            part.held -= blocking
            if due <= now:
                self._buffer.append(delivery)
            elif due - now < HOLD_BELOW or not self._place.rungs:
                self._hold(due, due, delivery, blocking=False)  # what is behind it on the rung goes on
            else:
                self._tasks.start(self._hop(delivery, due))
            if not part.held and not part.full:
                self._pause(part, on=False)
        self._set_timer()
        self._inflow.wake()

    async def _hop(self, delivery: Delivery[Any], due: float) -> None:
        if await self._inflow.hop(self._kit.send, self.address, delivery, due):
            delivery.token.finish(delivery)
            self._commit_soon()

    # Receive and settle

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        taken = await self._inflow.receive(timeout, lambda: self._take(limit))
        if taken and self._unsaid and self._group is not None:
            return await self._say(taken)
        return taken

    def _take(self, limit: int) -> list[Delivery[Any]]:
        buffer, now = self._buffer, self._kit.clock.monotonic()
        room = self.source.prefetch - len(self._handed)
        taken = [buffer.popleft() for _ in range(min(limit, room, len(buffer)))]
        if self.source.browse:  # nobody settles what is only looked at
            for delivery in taken:
                delivery.token.finish(delivery)
        else:
            self._handed.update(taken)
        if self.source.early:
            self._tell_waits(taken)
        if len(buffer) < self.source.prefetch:
            self._room.set()
        for delivery in taken:
            if delivery.token.wary or delivery.message.headers:
                self._unsaid |= delivery.token.begin(delivery, now)
        return taken

    async def _say(self, taken: Sequence[Delivery[Any]]) -> Sequence[Delivery[Any]]:
        """What these begin is committed before they do. What can't be goes back."""
        said = False
        try:
            said = bool(await self._commit())
        finally:  # also when we are cancelled
            self._unsaid = not said
            if not said:
                await self.settle(Outcome.RELEASED, taken)
        if not said:
            await self._kit.clock.sleep(self._kit.settings.commit_interval)
        # The core has not heard of them: of a partition that is being given up it would wait for none, and run them all.
        return [delivery for delivery in taken if said and not (delivery.token.leaving or delivery.lost)]

    def _tell_waits(self, taken: Sequence[Delivery[Any]]) -> None:
        now = self._kit.clock.time()
        for delivery in taken:
            _, due = wire.decode(delivery.native)
            delivery.message.delay = due - now if due is not None and due > now else None

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        if self._closed:
            raise closed(self.address)
        results: list[TransportError | None] = [None] * len(deliveries)
        mine: Sequence[int] = range(len(deliveries))
        if not self._handed.issuperset(deliveries):
            results, mine = held(deliveries, self._handed.__contains__, "its partition is no longer ours")
        self._handed.difference_update(deliveries)
        if outcome is Outcome.ACCEPTED:
            for i in mine:
                deliveries[i].token.finish(deliveries[i])
        else:
            self._give_back([deliveries[i] for i in mine], [delays[i] for i in mine] if delays else [])
        self._inflow.wake()
        self._commit_soon()
        return results

    def _give_back(self, deliveries: Sequence[Delivery[Any]], delays: Sequence[float]) -> None:
        now, back = self._kit.clock.time(), list[Delivery[Any]]()
        for i, old in enumerate(deliveries):
            delivery = old.token.again(old)
            if delays and delays[i] > 0:
                self._hold(now + delays[i], now, delivery)
            else:
                back.append(delivery)
        if not self._inflow.stopped:
            self._buffer.extendleft(sorted(back, key=offsets.offset_of, reverse=True))
        self._set_timer()

    # Commits

    def _commit_soon(self) -> None:
        if self._group is not None and self._commit_timer is None:
            self._commit_timer = self._kit.clock.call_later(self._kit.settings.commit_interval, self._commit_now)

    def _commit_now(self) -> None:
        self._commit_timer = None
        self._tasks.start(self._commit())

    async def _commit(self) -> bool | None:
        """All that has changed. What fails is part of the next one; what is never committed is handled again.

        None: there is no next one, since the group has gone on without us.
        """
        if self._group is None or self._fenced:
            return None
        async with self._committing:
            points = {
                part: point for part in self._parts.values() if part.owned and (point := part.point()) != part.committed
            }
            if not points:
                return True
            try:
                async with asyncio.timeout(_CLOSE):
                    await self._consumer.commit({part.tp: point for part, point in points.items()})
            except CommitFailedError as exc:
                self._fenced = not isinstance(exc.__cause__, RebalanceInProgressError)
                log.warning(
                    "%s: not committed, the group has other members by now; it may be handled again", self.address
                )
                return None
            except (KafkaError, TimeoutError) as exc:
                log.warning("%s: not committed yet: %s", self.address, errors.translate(exc, "commit"))
                self._commit_soon()
            else:
                for part, point in points.items():
                    part.committed = point
                    full = len(point[1]) > offsets.FULL
                    if full or part.full:
                        self._pause(part, on=full or part.held > 0)
                    part.full = full
                return True
            return False

    # The end

    async def check(self) -> Standing:
        if self._inflow.over:
            return "gone"
        return "consuming" if any(tp.topic == self._place.topic for tp in self._parts) else "standby"

    def _end(self, error: UnibusError) -> None:
        self._inflow.end(error)
        self._joined.set()

    async def stop(self) -> None:
        """What was not handed out is simply not finished: whoever gets the partition begins with it."""
        self._inflow.stop()
        for reader in self._readers:
            reader.cancel()
            await asyncio.wait([reader])
        self._readers.clear()
        self._buffer.clear()
        self._held.clear()
        self._set_timer()
        await self._commit()

    async def close(self) -> None:
        if self._closed:
            return
        self._kit.closed(self)
        await self.stop()
        self._closing.set()
        if self._commit_timer is not None:
            self._commit_timer.cancel()
        for task in self._tasks:
            await asyncio.wait([task], timeout=_CLOSE)
            task.cancel()
        for part in self._parts.values():
            part.end(self._handed)
        await self._commit()
        self._closed = True
        self._tell_unsaid(self._parts.values())
        for part in self._parts.values():
            part.lose()
        self._end(closed(self.address))
        await self._consumer.close()
