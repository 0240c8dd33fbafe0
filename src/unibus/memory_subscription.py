"""One consumer of the in-memory broker."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from unibus.adapter import Move, Outcome, Results, Source, Standing
from unibus.channel import Address, Topic
from unibus.delivery import Delivery
from unibus.errors import ConnectionLost, LeaseLost, NotFound, TransportError, Unroutable, Unsupported
from unibus.memory_places import HEADERS, SOON, Entry, Place, position
from unibus.message import Message

if TYPE_CHECKING:
    from unibus.memory import MemoryAdapter


class MemorySubscription:
    """One consumer of one place. `held`: what it has out, with the end of each lease."""

    def __init__(self, adapter: MemoryAdapter, source: Source, address: Address, place: Place) -> None:
        self.source = source
        self.place = place
        self.held: dict[Delivery[Any], float] = {}
        self.over: str | None = None
        self._stopped = False
        self._adapter = adapter
        self._broker = adapter.broker
        self._profiled = bool(adapter.broker.profile)
        self._address = address
        self._gone: list[Delivery[Any]] = []  # lost, and `losing` not told yet
        self._seen = 0  # of a browser
        self._page: deque[Entry] = deque()
        self._early: dict[Delivery[Any], tuple[float, bool]] = {}  # not due when taken: as of `take_early`
        self._broker.attach(self, place)

    @property
    def address(self) -> Address:
        return self._address

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        await asyncio.sleep(0)  # a consumer that always finds something must not starve the others
        clock = self._broker.clock
        deadline = clock.monotonic() + timeout
        while True:
            if self._gone:
                gone, self._gone = self._gone, []
                await self.source.losing(gone, 0.0)
            self._linked()
            if self._stopped:
                return ()
            if self.place.gone:
                raise NotFound(f"{self._address} was deleted")
            taken = self._look(limit) if self.source.browse else self._take(limit)
            if self.source.early and not taken:
                taken = self._take_early(limit)
            if taken:
                return taken
            remaining = deadline - clock.monotonic()
            if remaining <= SOON:
                return ()
            await self._wait(remaining)

    async def _wait(self, seconds: float) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self.place.waiters
        waiters.append(waiter)
        timer = self._broker.clock.call_later(seconds, lambda: None if waiter.done() else waiter.set_result(None))
        try:
            await waiter
        finally:
            timer.cancel()
            if waiter in waiters:
                waiters.remove(waiter)

    def _take(self, limit: int) -> list[Delivery[Any]]:
        held, source = self.held, self.source
        room = min(limit, source.prefetch - len(held))
        entries = self.place.take(room) if room > 0 else ()
        if not entries:
            return []
        lease = self._adapter.lease
        until = inf if lease is None else self._broker.clock.monotonic() + lease
        taken: list[Delivery[Any]] = []
        for entry in entries:
            entry.deliveries += 1
            delivery = _deliver(entry, source, until)
            held[delivery] = until
            taken.append(delivery)
        self._broker.leased(until)
        if self._profiled:
            self._disguise(taken)
        return taken

    def _disguise(self, deliveries: list[Delivery[Any]]) -> None:
        """Only what the broker of the profile tells too."""
        known = self._adapter.capabilities
        for delivery in deliveries:
            if not known.lease:
                delivery.lease_until = None
            if not known.delivery_count:
                delivery.deliveries = None
            if known.start_positions:
                delivery.position = position(self.place, delivery.token)

    def _take_early(self, limit: int) -> list[Delivery[Any]]:
        now, lease = self._broker.clock.monotonic(), self._adapter.lease
        until = inf if lease is None else now + lease
        taken = []
        for due, again, entry in self._broker.take_early(self.place, min(limit, self.source.prefetch - len(self.held))):
            entry.deliveries += 1
            delivery = _deliver(entry, self.source, until)
            delivery.message.delay = due - now
            self.held[delivery] = until
            self._early[delivery] = due, again
            taken.append(delivery)
        if taken:
            self._broker.leased(until)
            if self._profiled:
                self._disguise(taken)
        return taken

    def _look(self, limit: int) -> list[Delivery[Any]]:
        if not self._page:
            self._page.extend(sorted((e for e in self.place if e.seq > self._seen), key=lambda e: e.seq))
        page = [self._page.popleft() for _ in range(min(limit, len(self._page)))]
        if page:
            self._seen = page[-1].seq
        found = [_deliver(entry, self.source, None) for entry in page]
        if self._profiled:
            self._disguise(found)
        return found

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        self._linked()
        held, place = self.held, self.place
        results: list[TransportError | None] = [None] * len(deliveries)
        if outcome is Outcome.ACCEPTED:
            done = place.done
            for i, delivery in enumerate(deliveries):
                if held.pop(delivery, None) is None:
                    results[i] = self._lease_lost(delivery)
                elif done is not None and (delivery not in self._early or self._early[delivery][1]):
                    done(delivery.token)
            if self._early:
                for delivery in deliveries:
                    self._early.pop(delivery, None)
        else:
            now = self._broker.clock.monotonic()
            for i, delivery in enumerate(deliveries):
                if held.pop(delivery, None) is None:
                    results[i] = self._lease_lost(delivery)
                    continue
                entry = delivery.token
                self._uncount(entry)  # a release does not count
                if delivery in self._early:
                    self._wait_on(delivery)
                elif delays and delays[i] > 0:
                    self._broker.delay(now + delays[i], place, entry, again=True)
                else:
                    place.give_back(entry)
        self._freed()
        return results

    def _uncount(self, entry: Entry) -> None:
        if not self._adapter.capabilities.release_counts:
            entry.deliveries -= 1

    def _freed(self) -> None:
        """There may be room for a consumer at its prefetch, or the next message of a key."""
        if self.place.waiters and self.place.deliverable():
            self.place.wake()

    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        """A topic without groups takes a message as in `send`; here, where a result is all or nothing, without a word."""
        if not self._adapter.capabilities.atomic_move:
            raise Unsupported(f"{self._address}: this broker has no atomic move; send, then accept")
        await asyncio.sleep(0)  # as in send
        self._linked()
        results = [self._move(move) for move in moves]
        self._freed()
        return results

    def _move(self, move: Move) -> TransportError | None:
        if move.delivery not in self.held:
            return self._lease_lost(move.delivery)
        routes = []
        for outgoing in move.sends:
            places, error = self._adapter.route(outgoing)
            error = self._adapter.refusal(outgoing) or error
            if error is not None and not (isinstance(error, Unroutable) and isinstance(outgoing.to, Topic)):
                return error
            routes.append((outgoing, places))
        now = self._broker.clock.monotonic()
        for outgoing, places in routes:
            self._broker.store(outgoing, places, now)
            for place in places:
                place.wake()
        del self.held[move.delivery]
        _, in_lane = self._early.pop(move.delivery, (0.0, True))
        if self.place.done is not None and in_lane:
            self.place.done(move.delivery.token)
        return None

    async def extend(self, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
        if self._adapter.lease is None:
            raise Unsupported(f"{self._address}: deliveries of this broker have no lease to extend")
        self._linked()
        until = self._broker.clock.monotonic() + seconds
        results: list[TransportError | None] = []
        for delivery in deliveries:
            if delivery in self.held:
                self.held[delivery] = delivery.lease_until = until
                results.append(None)
            else:
                results.append(self._lease_lost(delivery))
        self._broker.leased(until)
        return results

    async def check(self) -> Standing:
        return "gone" if self.over or self.place.gone else "consuming"

    async def stop(self) -> None:
        self._stopped = True
        self.place.wake()

    async def close(self) -> None:
        if self.over is None:
            for delivery in self.held:
                self._uncount(delivery.token)  # an orderly end does not count
            self.end(f"the subscription of {self._address} is closed")

    # For the broker and the adapter.

    def end(self, why: str, *, give_back: bool = True) -> None:
        """Not to be used any more. What is held goes back now, or when its leases end."""
        if self.over is not None:
            return
        self.over = why
        if give_back or self._adapter.lease is None:
            self._return(list(self.held))
        self._adapter.forget(self)
        self._broker.detach(self, self.place)
        self.place.wake()

    def expire(self, now: float) -> float:
        """Give back what is over its lease; returns when the next one ends."""
        late = [delivery for delivery, until in self.held.items() if until <= now]
        if late:
            self._return(late)
            self.place.wake()
            if self.over is not None:
                self._broker.detach(self, self.place)
        return min(self.held.values(), default=inf)

    def forget(self) -> None:
        """The place is gone, and all that is held with it."""
        self._lose(list(self.held))

    def _return(self, deliveries: list[Delivery[Any]]) -> None:
        self._lose(deliveries)
        for delivery in [d for d in deliveries if d in self._early]:
            self._wait_on(delivery)
            deliveries.remove(delivery)
        for entry in sorted((d.token for d in deliveries), key=lambda e: e.seq, reverse=True):
            self.place.give_back(entry)

    def _wait_on(self, delivery: Delivery[Any]) -> None:
        due, again = self._early.pop(delivery)
        self._broker.delay(due, self.place, delivery.token, again=again)

    def _lose(self, deliveries: list[Delivery[Any]]) -> None:
        for delivery in deliveries:
            delivery.lost = True
            del self.held[delivery]
        self._gone += deliveries

    def _linked(self) -> None:
        if self.over is not None:
            raise ConnectionLost(self.over)

    def _lease_lost(self, delivery: Delivery[Any]) -> LeaseLost:
        return LeaseLost(f"message {delivery.message.id} of {self._address} is no longer held by this consumer")


def _deliver(entry: Entry, source: Source, until: float | None) -> Delivery[Any]:
    fields = entry.fields
    message = Message(*fields)
    if fields[HEADERS]:
        message.headers = dict(fields[HEADERS])
    delivery: Delivery[Any] = Delivery(message, source, entry)
    delivery.deliveries = entry.deliveries  # set here: as keywords they cost 0.3 µs
    delivery.lease_until = until
    return delivery
