"""Receiving: entries come by XREADGROUP, are held in the server's list of pending entries, and kept from others by their lease."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from unibus.adapter import Move, Outcome, Outgoing, Results, Source, Standing
from unibus.channel import Group, Inbox, Queue
from unibus.delivery import Delivery
from unibus.driver import OnlyLooks, by, held, lease_lost
from unibus.errors import LeaseLost, NotFound, TransportError, Unsupported
from unibus.inflow import Inflow, closed
from unibus.waiting import happens
from unibus_redis import errors, scripts, wire
from unibus_redis.link import TIMEOUT, Link
from unibus_redis.topology import PRIVATE, Place
from unibus_redis.wire import Entry

if TYPE_CHECKING:
    from unibus_redis.adapter import RedisAdapter

log = logging.getLogger("unibus.redis")

INBOX_LIFE = 60.0  # an inbox without its process lives that long
_BEAT = 1.0  # how often to look for what others have put into the delayed set, and who has the work
_LONGEST_READ = 5.0  # an empty read is repeated
_DEAD_CONSUMER = 3600.0
_TIDY = 600.0
_LOST = "its lease is over and another consumer has it"


class RedisSubscription:
    """One consumer in a group, with a connection of its own for reads that wait."""

    def __init__(
        self, adapter: RedisAdapter, source: Source, place: Place, consumer: str, link: Link, reads: Link
    ) -> None:
        self.source = source
        self.address: Queue[Any] | Group | Inbox = source.address
        self._place = place
        self._consumer = consumer
        self._link = link
        self._reads = reads
        self._adapter = adapter
        self._clock = adapter.clock
        self._lanes = place.lanes
        self._shared = frozenset(place.topic)
        self._private = isinstance(source.address, Inbox) or (
            isinstance(source.address, Group) and source.address.ephemeral
        )
        self._in_place = place.ordered or self._private  # what is given back keeps its place in line
        self._ms = round(self._adapter.settings.lease * 1000)
        self._held: dict[Entry, Delivery[Any]] = {}
        self._arrived: deque[Entry] = deque()  # read for a receive that was cancelled, or given back in place
        self._claim_at = 0.0  # when to look for what others held for too long
        self._inflow = Inflow(adapter.clock)
        self._closed = False
        self._lead_until = 0.0 if place.ordered else inf  # with the work until then
        self._reading: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._due = inf
        self._nudged = asyncio.Event()  # wakes the keeper

    async def start(self) -> None:
        """Raises what the first round of housekeeping says; afterwards a message sent arrives."""
        if lost := self._adapter.orphans.get(self.source.address):
            await self._take_over(*lost)
            del self._adapter.orphans[self.source.address]
        await self._keep()
        self._keeper = asyncio.create_task(self._keep_on(), name=f"unibus keeps {self.address}")

    # -- receive ----------------------------------------------------------------------------------------------

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        return await self._inflow.receive(
            timeout, lambda: self._take(self._room(limit)), lambda left: self._fetch(self._room(limit), left)
        )

    def _room(self, limit: int) -> int:
        if self._clock.monotonic() >= self._lead_until:
            return 0
        return max(0, min(limit, self.source.prefetch - len(self._held)))

    async def _fetch(self, room: int, timeout: float) -> None:
        """Fill `_arrived`: from what others held for too long, then from what is new, waiting for it.

        In a task of its own, which goes on when the receive is cancelled: what it brings belongs to this consumer.
        """
        if not room:
            await self._inflow.wait(timeout)
            return
        if self._reading is None:
            claim = self._clock.monotonic() >= self._claim_at
            self._reading = asyncio.create_task(self._claim(room) if claim else self._read(room, timeout))
        reading = self._reading
        await asyncio.wait([reading], timeout=timeout + 1)
        if reading.done() and self._reading is reading:
            self._reading = None
            reading.result()

    async def _read(self, room: int, timeout: float) -> None:
        lanes = self._lanes
        if len(lanes) > 1:  # a blocking read has a limit for each stream, and no order among them
            found = await self._script(scripts.READ, lanes, (room,), "receive from")
            if found:
                self._admit([(lanes[n], entry, 1) for n, entry in zip(found[::2], found[1::2], strict=True)])
                return
        if self._inflow.stopped:
            return
        block = min(timeout, _LONGEST_READ)
        head = ("XREADGROUP", "GROUP", self._place.group, self._consumer, "COUNT", room if len(lanes) == 1 else 1)
        command = (*head, "BLOCK", max(1, round(block * 1000)), "STREAMS", *lanes, *(">" for _ in lanes))
        (reply,) = await self._reads.run(command, timeout=block + TIMEOUT)
        if isinstance(reply, Exception):
            raise errors.translate(reply, f"receive from {self.address}") from reply
        self._admit([(key.decode(), entry, 1) for key, part in reply or () for entry in part])

    async def _claim(self, room: int) -> None:
        lanes = self._lanes
        found, gone = await self._script(scripts.CLAIM, lanes, (self._ms, room), "take over messages of")
        if len(found) < 3 * room:
            self._claim_at = self._clock.monotonic() + self._adapter.settings.lease / 3
        if gone:
            text = "%s: %d messages were deleted or trimmed on the server while they were held; they are lost"
            log.error(text, self.address, gone)
        ours = {(entry.key, entry.id) for entry in (*self._held, *self._arrived)}
        triples = zip(found[::3], found[1::3], found[2::3], strict=True)
        self._admit([(lanes[n], raw, count) for n, raw, count in triples if (lanes[n], raw[0]) not in ours])

    def _admit(self, found: Sequence[tuple[str, list[Any], int]]) -> None:
        until = self._clock.monotonic() + self._adapter.settings.lease
        self._arrived.extend([Entry(key, raw, count, until) for key, raw, count in found])

    def _take(self, room: int) -> list[Delivery[Any]]:
        arrived, now = self._arrived, self._clock.monotonic()
        entries = [arrived.popleft() for _ in range(min(room, len(arrived)))]
        # What nobody asked for during a whole lease may be another's by now; it comes again.
        return [self._deliver(entry) for entry in entries if entry.until > now]

    def _deliver(self, entry: Entry) -> Delivery[Any]:
        delivery = deliver(entry, self.source, self._place)
        delivery.deliveries, delivery.lease_until = entry.deliveries, entry.until
        self._held[entry] = delivery
        return delivery

    async def _script(self, script: scripts.Script, keys: Sequence[str], arguments: Sequence[Any], doing: str) -> Any:
        """Of those that begin with the group and the consumer."""
        mine = (self._place.group, self._consumer, *arguments)
        return await self._link.script(script, keys, mine, f"{doing} {self.address}")

    # -- settle -----------------------------------------------------------------------------------------------

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        if outcome is Outcome.RELEASED:
            return await self._release(deliveries, delays)
        return await self._each(scripts.SETTLE, deliveries)

    async def extend(self, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
        """The server counts from now on; a lease has one length for all."""
        until = self._clock.monotonic() + min(seconds, self._adapter.settings.lease)
        results = await self._each(scripts.HOLD, deliveries, take_back=0)
        for delivery, error in zip(deliveries, results, strict=True):
            if error is None:
                delivery.lease_until = until
        return results

    async def _each(
        self, script: scripts.Script, deliveries: Sequence[Delivery[Any]], take_back: int | None = None
    ) -> list[TransportError | None]:
        """One call for each stream. What is not ours any more is LeaseLost."""
        near = self._clock.monotonic() + self._adapter.settings.lease / 2
        results, mine = held(deliveries, self._has, _LOST)
        for key, indices in by(mine, lambda i: str(deliveries[i].token.key)).items():
            # Looking at the owner takes as long as the rest, so it is left out where nobody can have claimed it yet.
            risky = self._place.ordered or any((deliveries[i].lease_until or 0) < near for i in indices)
            option = take_back if take_back is not None else int(key not in self._shared)
            arguments = (option, int(risky))
            ids = [deliveries[i].token.id for i in indices]
            if script is scripts.SETTLE and option and not risky and self._link.version >= (8, 2):
                answer = await self._link.call("XACKDEL", key, self._place.group, "IDS", len(ids), *ids)
                lost = [n for n, done in enumerate(answer) if done < 0]
            else:
                lost = await self._script(script, [key], [*arguments, *ids], "settle messages of")
            for n in lost:
                results[indices[n]] = lease_lost(deliveries[indices[n]], _LOST)
            for i in indices:
                if take_back != 0 or results[i] is not None:
                    self._held.pop(deliveries[i].token, None)
        self._inflow.wake()
        return results

    async def _release(self, deliveries: Sequence[Delivery[Any]], delays: Sequence[float]) -> Results:
        if not self._in_place:
            now = self._clock.time()
            waits = delays or [0.0] * len(deliveries)
            return await self._move(
                [
                    Move(d, [Outgoing(self.address, d.message, now + wait if wait > 0 else None, d)])
                    for d, wait in zip(deliveries, waits, strict=True)
                ]
            )
        if any(delays):
            raise Unsupported(f"{self.address} is ordered, or of one process: what is given back comes again at once")
        results = await self._each(scripts.HOLD, deliveries, take_back=1)
        back = [d.token for d, error in zip(deliveries, results, strict=True) if error is None]
        if not self._inflow.stopped:
            for entry in sorted(back, key=_age, reverse=True):
                entry.until = self._clock.monotonic() + self._adapter.settings.lease
                self._arrived.appendleft(entry)
        return results

    def _has(self, delivery: Delivery[Any]) -> bool:
        return delivery.token in self._held

    async def move(self, moves: Sequence[Move], timeout: float) -> Sequence[TransportError | Unsupported | None]:
        slot, slot_of = self._adapter.links.slot(self._place.first), self._adapter.slot
        near = [i for i, move in enumerate(moves) if all(slot_of(out.to) == slot for out in move.sends)]
        if len(near) == len(moves):
            return await self._move(moves)
        far = Unsupported(f"{self.address}: what the messages are moved to is on another master of the cluster")
        done = dict(zip(near, await self._move([moves[i] for i in near]), strict=True))
        return [done.get(i, far) for i in range(len(moves))]

    async def _move(self, moves: Sequence[Move]) -> list[TransportError | None]:
        results, mine = held([move.delivery for move in moves], self._has, _LOST)
        for key, indices in by(mine, lambda i: str(moves[i].delivery.token.key)).items():
            keys, kinds, packed = self._adapter.pack([out for i in indices for out in moves[i].sends], key)
            arguments: list[Any] = [int(key not in self._shared), kinds]
            at = iter(packed)
            for i in indices:
                arguments += (moves[i].delivery.token.id, len(moves[i].sends))
                for _ in moves[i].sends:
                    arguments += next(at)
            bad = await self._script(scripts.PUT, keys, arguments, "move messages of")
            for n, why in zip(bad[::2], bad[1::2], strict=True):
                doing = f"move {moves[indices[n]].delivery.position} to {moves[indices[n]].sends[0].to}"
                results[indices[n]] = errors.refusal(why.decode(), doing)
            for i in indices:
                if results[i] is None or isinstance(results[i], LeaseLost):
                    self._held.pop(moves[i].delivery.token, None)
        if any(out.not_before for move in moves for out in move.sends):
            self.nudge()
        self._inflow.wake()
        return results

    # -- housekeeping -----------------------------------------------------------------------------------------

    def nudge(self) -> None:
        """There may be something new that waits for its time."""
        self._nudged.set()

    async def _keep_on(self) -> None:
        tidied = self._clock.monotonic()
        while True:
            await happens(self._nudged, min(self._due, _BEAT, self._adapter.settings.lease / 3))
            self._nudged.clear()
            try:
                await self._keep()
                if self._clock.monotonic() - tidied > _TIDY and not self._inflow.stopped:
                    tidied = self._clock.monotonic()
                    await self._tidy(_DEAD_CONSUMER)
            except Exception as exc:
                error = errors.translate(exc, f"keep {self.address}")
                if self._link.lost is not None or isinstance(error, NotFound):
                    self._inflow.end(self._link.lost or error)
                    return
                log.warning("housekeeping, again soon: %s", error)

    async def _keep(self) -> None:
        if self._place.ordered:
            await self._take_over()
        if isinstance(self.address, Inbox):
            if not await self._link.call("PEXPIRE", self._lanes[0], round(INBOX_LIFE * 1000)):
                raise NotFound(f"the inbox {self.address.name!r} is gone")
            return
        keys = (*self._place.delayed, *self._place.topic)
        arguments = (round(self._adapter.settings.retention * 1000), PRIVATE, 2 * self._ms + 60_000)
        hint = await self._link.script(scripts.KEEP, keys, arguments, f"keep {self.address}")
        self._due = inf if hint < 0 else hint / 1000

    async def _take_over(self, *over: str) -> None:
        """What the consumers of lost connections held. Of an ordered place one consumer has the work, and all that others hold."""
        asked, leading = self._clock.monotonic(), self._lead_until > 0
        ordered = self._place.ordered
        arguments = (self._ms, int(ordered), *over)
        got = await self._script(scripts.TAKE, (self._place.owner, *self._lanes), arguments, "take the lead of")
        if not ordered:
            return
        self._lead_until = asked + self._adapter.settings.lease if got else 0.0
        if got == 2:
            # Before anything new comes what others held; what those others settle is refused from here on.
            self._claim_at = 0.0
        self._inflow.wake()
        if got != 1 and leading:  # another has taken it, or could have
            log.warning("%s: the lead was lost for a time; what was held is another's now", self.address)
            had, self._held = list(self._held.values()), {}
            self._arrived.clear()
            await self.source.losing(had, 0)
            for delivery in had:
                delivery.lost = True

    async def _tidy(self, idle: float) -> None:
        """`idle` 0: take away this consumer, not those that were not seen for so long."""
        await self._script(scripts.TIDY, (self._place.owner, *self._lanes), (round(idle * 1000),), "tidy up")

    # -- the end ----------------------------------------------------------------------------------------------

    async def check(self) -> Standing:
        if self._inflow.over:
            return "gone"
        return "consuming" if self._lead_until > self._clock.monotonic() else "standby"

    async def stop(self) -> None:
        if self._inflow.stopped:
            return
        self._inflow.stop()
        if (reading := self._reading) is not None:
            # An answer that is on its way belongs to this consumer: wait for it, and give back what it brings. The read may
            # not have begun to wait yet, so it is told again; where that is not permitted, it ends by itself.
            while not reading.done():
                await self._link.run(("CLIENT", "UNBLOCK", self._reads.number), timeout=TIMEOUT)
                await asyncio.wait([reading], timeout=0.05)
            if (error := reading.exception()) is not None:
                log.debug("the last read of %s: %s", self.address, error)
        back = [self._deliver(entry) for entry in self._arrived]
        self._arrived.clear()
        if back:
            await self.settle(Outcome.RELEASED, back)

    async def close(self) -> None:
        self._adapter.subscriptions.discard(self)
        if self._closed:
            return
        self._closed = True
        try:
            await self.stop()
            if self._held and not self._private:
                await self.settle(Outcome.RELEASED, list(self._held.values()))
            await self._leave()
        except TransportError as error:
            log.debug("%s: the subscription did not close in order: %s", self.address, error)
            if not self._private:
                self._adapter.orphans.setdefault(self.source.address, []).append(self._consumer)
        finally:  # also where closing is cancelled: nobody comes back to do the rest
            over = closed(self.address)
            self._inflow.end(over)
            self._reads.lose(over)
            tasks = [task for task in (self._keeper, self._reading) if task is not None]
            for task in tasks:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks)
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


class Browser(OnlyLooks):
    """Looks at what waits, stream by stream, and takes nothing."""

    def __init__(self, adapter: RedisAdapter, source: Source, place: Place, link: Link) -> None:
        self.source = source
        self.address = source.address
        self._place = place
        self._link = link
        self._adapter = adapter
        self._lanes = place.lanes
        self._after: list[Any] = ["0-0"] * len(place.lanes)
        self._page: list[Entry] = []
        self._inflow = Inflow(adapter.clock)

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        return await self._inflow.receive(timeout, self._take, lambda left: self._look(limit, left))

    def _take(self) -> list[Delivery[Any]]:
        page, self._page = self._page, []
        return [deliver(entry, self.source, self._place) for entry in page]

    async def _look(self, limit: int, timeout: float) -> None:
        """The next page, or nothing for a moment."""
        ms = round(self._adapter.settings.lease * 1000)
        for n, lane in enumerate(self._lanes):
            at: Any = True
            while at:
                arguments = (self._place.group, ms, self._after[n], limit)
                at, found = await self._link.script(scripts.LOOK, [lane], arguments, f"look at {self.address}")
                self._after[n] = at or self._after[n]
                if found:
                    self._page = [Entry(lane, raw, 0, 0.0) for raw in found]
                    return
        await self._inflow.wait(min(timeout, _BEAT / 4))

    async def check(self) -> Standing:
        return "gone" if self._inflow.over else "consuming"

    async def stop(self) -> None:
        self._inflow.stop()

    async def close(self) -> None:
        self._inflow.stop()


def deliver(entry: Entry, source: Source, place: Place) -> Delivery[Any]:
    message = wire.decode(entry)
    if len(place.streams) > 1 or len(place.topic) > 1:
        lanes = place.topic if entry.key in place.topic else place.streams
        message.priority = lanes.index(entry.key) or None
    return Delivery(message, source, entry, 0, None, None, entry, None)


def _age(entry: Entry) -> tuple[int, int]:
    ms, _, n = entry.id.partition(b"-")
    return int(ms), int(n)
