"""Receiving: entries come by XREADGROUP, are held in the server's list of pending entries, and kept from others by their lease."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from redis import exceptions as native

from unibus.adapter import Move, Outcome, Outgoing, Results, Source, Standing
from unibus.channel import Group, Inbox, Queue
from unibus.clock import Clock
from unibus.delivery import Delivery
from unibus.errors import LeaseLost, NotFound, TransportError, UnibusError, Unsupported
from unibus_redis import errors, scripts, wire
from unibus_redis.link import Link
from unibus_redis.topology import PRIVATE, Place
from unibus_redis.wire import Entry

log = logging.getLogger("unibus.redis")

TIMEOUT = 10.0  # of each call
INBOX_LIFE = 60.0  # an inbox without its process lives that long
_BEAT = 1.0  # how often to look for what others have put into the delayed set, and who has the work
_LONGEST_READ = 5.0  # an empty read is repeated
_DEAD_CONSUMER = 3600.0
_TIDY = 600.0


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a subscription needs of its adapter."""

    clock: Clock
    lease: float
    retention: float
    pack: Callable[[Sequence[Outgoing]], tuple[list[Any], str, list[list[Any]]]]  # keys, their kinds, arguments of each
    closed: Callable[[RedisSubscription], None]


class RedisSubscription:
    """One consumer in a group, with a connection of its own for reads that wait."""

    def __init__(self, source: Source, place: Place, consumer: str, link: Link, reads: Link, hooks: Hooks) -> None:
        self.source = source
        self.address: Queue[Any] | Group | Inbox = source.address
        self._place = place
        self._consumer = consumer
        self._link = link
        self._reads = reads
        self._hooks = hooks
        self._clock = hooks.clock
        self._lanes = place.lanes
        self._shared = frozenset(place.topic)
        self._private = isinstance(source.address, Group) and source.address.ephemeral
        self._in_place = place.ordered or self._private  # what is given back keeps its place in line
        self._ms = round(hooks.lease * 1000)
        self._held: dict[Entry, Delivery[Any]] = {}
        self._arrived: deque[Entry] = deque()  # read for a receive that was cancelled, or given back in place
        self._cursors: list[Any] = []  # of a look for what others held for too long; empty: none is under way
        self._claim_at = 0.0
        self._claim_idle = self._ms
        self._over: UnibusError | None = None
        self._stopped = False
        self._owner = not place.ordered
        self._reading: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._due = inf
        self._woken = asyncio.Event()  # of receivers
        self._nudged = asyncio.Event()  # of the keeper

    async def start(self) -> None:
        """Raises what the first round of housekeeping says; afterwards a message sent arrives."""
        await self._keep()
        self._keeper = asyncio.create_task(self._keep_on(), name=f"unibus keeps {self.address}")

    # -- receive ----------------------------------------------------------------------------------------------

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        deadline = self._clock.monotonic() + timeout
        while True:
            if self._over is not None:
                raise self._over
            if self._stopped:
                return []
            self._woken.clear()
            room = min(limit, self.source.prefetch - len(self._held))
            left = deadline - self._clock.monotonic()
            if room > 0 and self._owner:
                if not self._arrived:
                    await self._fetch(room - len(self._arrived), max(0.0, left))
                if found := [self._deliver(self._arrived.popleft()) for _ in range(min(room, len(self._arrived)))]:
                    return found
            elif left > 0:
                await self._wait(self._woken.wait(), left)
            if deadline <= self._clock.monotonic():
                return []

    async def _wait(self, awaitable: Awaitable[Any], seconds: float) -> None:
        """Until it is done, or so long; what is a task goes on."""
        task = asyncio.ensure_future(awaitable)
        try:
            await asyncio.wait([task], timeout=seconds)
        finally:
            if task is not self._reading:
                task.cancel()

    async def _fetch(self, room: int, timeout: float) -> None:
        """Fill `_arrived`: from what others held for too long, then from what is new, waiting for it."""
        if self._reading is None:
            if self._cursors or self._clock.monotonic() >= self._claim_at:
                self._reading = asyncio.create_task(self._claim(room))
            else:
                self._reading = asyncio.create_task(self._read(room, timeout))
        reading = self._reading
        await self._wait(reading, timeout + 1)
        if reading.done():
            self._reading = None
            reading.result()

    async def _read(self, room: int, timeout: float) -> None:
        lanes = self._lanes
        if len(lanes) > 1:  # a blocking read has a limit for each stream, and no order among them
            arguments = (self._place.group, self._consumer, room)
            found = await self._script(scripts.READ, lanes, arguments, "receive from")
            self._admit([(lanes[n], entry, 1) for n, entry in zip(found[::2], found[1::2], strict=True)])
            if found:
                return
        block = max(1, round(min(timeout, _LONGEST_READ) * 1000))
        count = room if len(lanes) == 1 else 1
        command = (
            "XREADGROUP",
            "GROUP",
            self._place.group,
            self._consumer,
            "COUNT",
            count,
            "BLOCK",
            block,
            "STREAMS",
            *lanes,
        )
        (reply,) = await self._reads.run((*command, *(">" for _ in lanes)))
        if isinstance(reply, Exception):
            if isinstance(reply, native.ResponseError) and str(reply).startswith("UNBLOCKED") and self._stopped:
                return
            raise errors.translate(reply, f"receive from {self.address}") from reply
        entries = [(key.decode(), entry, 1) for key, part in reply or () for entry in part]
        self._admit(entries)

    async def _claim(self, room: int) -> None:
        lanes = self._lanes
        cursors = self._cursors or ["0-0"] * len(lanes)
        arguments = (self._place.group, self._consumer, self._claim_idle, room, *cursors)
        cursors, found, gone = await self._script(scripts.CLAIM, lanes, arguments, "take over what was held in")
        self._cursors = cursors if any(cursors) else []
        if not self._cursors:
            self._claim_at = self._clock.monotonic() + self._hooks.lease / 3
            self._claim_idle = self._ms
        if gone:
            log.error(
                "%s: %d messages were deleted or trimmed while they were held, so they are lost", self.address, gone
            )
        mine = {(entry.key, entry.id) for entry in self._held}
        entries = [
            (lanes[n], entry, count) for n, entry, count in zip(found[::3], found[1::3], found[2::3], strict=True)
        ]
        self._admit([one for one in entries if (one[0], one[1][0]) not in mine])

    def _admit(self, found: Sequence[tuple[str, list[Any], int]]) -> None:
        until = self._clock.monotonic() + self._hooks.lease
        self._arrived.extend(Entry(key, raw, count, until) for key, raw, count in found)

    def _deliver(self, entry: Entry) -> Delivery[Any]:
        delivery = deliver(entry, self.source, self._place)
        delivery.deliveries, delivery.lease_until = entry.deliveries, entry.until
        self._held[entry] = delivery
        return delivery

    async def _script(self, script: scripts.Script, keys: Sequence[str], arguments: Sequence[Any], doing: str) -> Any:
        return await self._link.script(script, keys, arguments, f"{doing} {self.address}")

    # -- settle -----------------------------------------------------------------------------------------------

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        if outcome is Outcome.RELEASED:
            return await self._release(deliveries, delays)
        return await self._each(scripts.SETTLE, deliveries)

    async def extend(self, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
        """The server counts from now on; a lease has one length for all."""
        until = self._clock.monotonic() + min(seconds, self._hooks.lease)
        results = await self._each(scripts.HOLD, deliveries, take_back=0)
        for delivery, error in zip(deliveries, results, strict=True):
            if error is None:
                delivery.lease_until = until
        return results

    async def _each(
        self, script: scripts.Script, deliveries: Sequence[Delivery[Any]], take_back: int | None = None
    ) -> list[TransportError | None]:
        """One call for each stream. What is not ours any more is LeaseLost."""
        results: list[TransportError | None] = [None] * len(deliveries)
        by_key: dict[str, list[int]] = {}
        near = self._clock.monotonic() + self._hooks.lease / 2
        for i, delivery in enumerate(deliveries):
            entry: Entry = delivery.token
            if entry not in self._held:
                results[i] = _lost(delivery)
            else:
                by_key.setdefault(entry.key, []).append(i)
        for key, indices in by_key.items():
            # Looking at the owner takes as long as the rest, so it is left out where nobody can have claimed it yet.
            risky = self._place.ordered or any((deliveries[i].lease_until or 0) < near for i in indices)
            option = take_back if take_back is not None else int(key not in self._shared)
            arguments = (self._place.group, self._consumer, option, int(risky))
            ids = [deliveries[i].token.id for i in indices]
            for n in await self._script(script, [key], [*arguments, *ids], "settle messages of"):
                results[indices[n]] = _lost(deliveries[indices[n]])
            for i in indices:
                if take_back != 0 or results[i] is not None:
                    self._held.pop(deliveries[i].token, None)
        self._woken.set()
        return results

    async def _release(self, deliveries: Sequence[Delivery[Any]], delays: Sequence[float]) -> Results:
        if not self._in_place:
            now = self._clock.time()
            waits = delays or [0.0] * len(deliveries)
            return await self.move(
                [
                    Move(d, [Outgoing(self.address, d.message, now + wait if wait > 0 else None, d)])
                    for d, wait in zip(deliveries, waits, strict=True)
                ],
                TIMEOUT,
            )
        if any(delays):
            raise Unsupported(f"{self.address} is ordered, or of one process: what is given back comes again at once")
        results = await self._each(scripts.HOLD, deliveries, take_back=1)
        back = [d.token for d, error in zip(deliveries, results, strict=True) if error is None]
        if not self._stopped:
            for entry in sorted(back, key=_age, reverse=True):
                self._arrived.appendleft(entry)
        return results

    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        results: list[TransportError | None] = [None] * len(moves)
        by_key: dict[str, list[int]] = {}
        for i, move in enumerate(moves):
            if move.delivery.token in self._held:
                by_key.setdefault(move.delivery.token.key, []).append(i)
            else:
                results[i] = _lost(move.delivery)
        for key, indices in by_key.items():
            keys, kinds, packed = self._hooks.pack([out for i in indices for out in moves[i].sends])
            arguments: list[Any] = [self._place.group, self._consumer, "0" if key in self._shared else "1", kinds]
            at = iter(packed)
            for i in indices:
                arguments += (moves[i].delivery.token.id, len(moves[i].sends))
                for _ in moves[i].sends:
                    to, *rest = next(at)
                    arguments += (to + 1, *rest)  # the first key is the source
            async with asyncio.timeout(timeout):
                bad = await self._script(scripts.MOVE, [key, *keys], arguments, "move messages of")
            for n, why in zip(bad[::2], bad[1::2], strict=True):
                doing = f"move {moves[indices[n]].delivery.position} to {moves[indices[n]].sends[0].to}"
                results[indices[n]] = errors.refusal(why.decode(), doing)
            for i in indices:
                if results[i] is None or isinstance(results[i], LeaseLost):
                    self._held.pop(moves[i].delivery.token, None)
        if any(out.not_before for move in moves for out in move.sends):
            self.nudge()
        self._woken.set()
        return results

    # -- housekeeping -----------------------------------------------------------------------------------------

    def nudge(self) -> None:
        """There may be something new that waits for its time."""
        self._nudged.set()

    async def _keep_on(self) -> None:
        tidied = self._clock.monotonic()
        while True:
            await self._wait(self._nudged.wait(), min(self._due, _BEAT, self._hooks.lease / 3))
            self._nudged.clear()
            try:
                async with asyncio.timeout(TIMEOUT):
                    await self._keep()
                    if self._clock.monotonic() - tidied > _TIDY and not self._stopped:
                        tidied = self._clock.monotonic()
                        await self._tidy(_DEAD_CONSUMER)
            except Exception as exc:
                error = errors.translate(exc, f"keep {self.address}")
                if self._link.lost is not None or isinstance(error, NotFound):
                    self._end(self._link.lost or error)
                    return
                log.warning("housekeeping, again soon: %s", error)

    async def _keep(self) -> None:
        if self._place.ordered:
            await self._own(self._ms)
        if isinstance(self.address, Inbox):
            if not await self._link.call("PEXPIRE", self._lanes[0], round(INBOX_LIFE * 1000)):
                raise NotFound(f"the inbox {self.address.name!r} is gone")
            return
        arguments = (round(self._hooks.retention * 1000), PRIVATE, 2 * self._ms + 60_000)
        hint = await self._script(scripts.KEEP, [*self._place.delayed, *self._place.topic], arguments, "keep")
        self._due = inf if hint < 0 else hint / 1000

    async def _own(self, ms: int) -> None:
        """Take the work of an ordered place, or keep it; one consumer has it."""
        got = await self._script(scripts.OWN, [self._place.owner], (self._consumer, ms), "take the lead of")
        if got == 2 and not self._owner:
            # All that others hold is ours now, before anything new: the settling of those others is refused from here on.
            self._cursors, self._claim_idle, self._claim_at = [], 0, 0.0
            self._owner = True
            self._woken.set()
        elif got == 0 and self._owner:
            self._owner = False
            held, self._held = list(self._held.values()), {}
            self._arrived.clear()
            if ms:
                log.warning("%s: another consumer has taken the lead", self.address)
                await self.source.losing(held, 0)
                for delivery in held:
                    delivery.lost = True

    async def _tidy(self, idle: float) -> None:
        arguments = (self._place.group, round(idle * 1000), self._consumer if not idle else "")
        await self._script(scripts.TIDY, self._lanes, arguments, "tidy up")

    # -- the end ----------------------------------------------------------------------------------------------

    async def check(self) -> Standing:
        if self._over is not None or self._stopped:
            return "gone"
        return "consuming" if self._owner else "standby"

    def _end(self, error: UnibusError) -> None:
        if self._over is None:
            self._over = error
        self._woken.set()

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._woken.set()
        reading, self._reading = self._reading, None
        if reading is not None:
            # An answer that is on its way belongs to this consumer: wait for it, and give back what it brings.
            (reply,) = await self._link.run(("CLIENT", "UNBLOCK", self._reads.number, "ERROR"))
            if isinstance(reply, Exception):
                log.info("a read of %s could not be cut short: %s", self.address, reply)
            await asyncio.wait([reading], timeout=_LONGEST_READ + TIMEOUT)
            if reading.done() and (error := reading.exception()) is not None:
                log.debug("the last read of %s: %s", self.address, error)
        back = [self._deliver(entry) for entry in self._arrived]
        self._arrived.clear()
        if back:
            await self.settle(Outcome.RELEASED, back)

    async def close(self) -> None:
        self._hooks.closed(self)
        try:
            async with asyncio.timeout(2 * TIMEOUT):
                await self.stop()
                if self._held and not self._private:
                    await self.settle(Outcome.RELEASED, list(self._held.values()))
                await self._leave()
        except (TransportError, TimeoutError) as error:
            log.debug("%s: the subscription did not close in order: %s", self.address, error)
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        self._end(errors.closed(self.address))
        await self._reads.close()

    async def _leave(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        if isinstance(self.address, Inbox):
            await self._link.call("DEL", self._lanes[0])
        elif self._private:
            for stream in self._lanes:
                await self._link.call("XGROUP", "DESTROY", stream, self._place.group)
        else:
            await self._tidy(0)
            if self._place.ordered and self._owner:
                await self._own(0)


class Browser:
    """Looks at what waits, stream by stream, and takes nothing."""

    def __init__(self, source: Source, place: Place, link: Link, hooks: Hooks) -> None:
        self.source = source
        self.address = source.address
        self._place = place
        self._link = link
        self._hooks = hooks
        self._lanes = place.lanes
        self._after: list[Any] = ["0-0"] * len(place.lanes)
        self._stopped = False

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        clock = self._hooks.clock
        deadline = clock.monotonic() + timeout
        ms = round(self._hooks.lease * 1000)
        while not self._stopped:
            for n, lane in enumerate(self._lanes):
                while True:
                    arguments = (self._place.group, ms, self._after[n], limit)
                    at, found = await self._link.script(scripts.LOOK, [lane], arguments, f"look at {self.address}")
                    self._after[n] = at or self._after[n]
                    if found or not at:
                        break
                if found:
                    return [deliver(Entry(lane, raw, 0, 0.0), self.source, self._place) for raw in found]
            left = deadline - clock.monotonic()
            if left <= 0:
                break
            await clock.sleep(min(left, _BEAT / 4))
        return []

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        raise Unsupported(f"{self.address}: the messages were only looked at")

    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        raise Unsupported(f"{self.address}: the messages were only looked at")

    async def extend(self, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
        raise Unsupported(f"{self.address}: the messages were only looked at")

    async def check(self) -> Standing:
        return "gone" if self._stopped else "consuming"

    async def stop(self) -> None:
        self._stopped = True

    async def close(self) -> None:
        self._stopped = True


def deliver(entry: Entry, source: Source, place: Place) -> Delivery[Any]:
    message = wire.decode(entry)
    if len(place.streams) > 1 or len(place.topic) > 1:
        lanes = place.topic if entry.key in place.topic else place.streams
        message.priority = lanes.index(entry.key) or None
    return Delivery(message, source, entry, native=entry, position=entry.position)


def _age(entry: Entry) -> tuple[int, int]:
    ms, _, n = entry.id.partition(b"-")
    return int(ms), int(n)


def _lost(delivery: Delivery[Any]) -> LeaseLost:
    return LeaseLost(f"{delivery.position}: settled before, or its lease is over and another consumer has it")
