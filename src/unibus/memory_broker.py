"""The state of the in-memory broker, apart from its clients, and the faults that a test may inject."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

from unibus.adapter import Outgoing, Start
from unibus.channel import Address, Group, Queue
from unibus.clock import Clock, Timer
from unibus.errors import ConfigError, ConnectionLost, TransportError
from unibus.memory_places import ID, SOON, Entry, Key, Place, make_place
from unibus.message import NO_HEADERS, Message

if TYPE_CHECKING:
    from unibus.memory import MemoryAdapter
    from unibus.memory_subscription import MemorySubscription


class _Kept(NamedTuple):
    """A message in the history of a topic."""

    at: float  # seconds since the epoch
    fields: tuple[Any, ...]
    not_before: float | None


class MemoryBroker:
    """The state of one broker, and what a test may ask of it or do to it.

    `on_send` is called with each Outgoing that the broker took, also one to a topic without groups. While `down` is True
    no adapter can connect. `subscriptions` are the open ones, for `kill`. `profile`: of the URL.
    """

    def __init__(self, clock: Clock, profile: str = "") -> None:
        self.clock = clock
        self.profile = profile  # the broker that it imitates
        self._history: dict[Key, list[_Kept]] = {}  # of topics, for the adapters that declare replay
        self.on_send: Callable[[Outgoing], object] | None = None
        self.down = False
        self._places: dict[Key, Place] = {}
        self._topics: dict[Key, list[Place]] = {}
        self._adapters: set[MemoryAdapter] = set()
        self._holders: list[MemorySubscription] = []
        self._refusals: dict[Address, tuple[TransportError, float]] = {}
        self._next = itertools.count(1).__next__
        # (due, tie-break, put again or give back, place, entry)
        self._delayed: list[tuple[float, int, bool, Place, Entry]] = []
        self._lease_due = inf
        self._timer: Timer | None = None
        self._timer_at = inf

    # For tests: what is there, and faults.

    @property
    def subscriptions(self) -> list[MemorySubscription]:
        return [s for s in self._holders if not s.over]

    def ready(self) -> int:
        """Messages that could be delivered now to an open subscription."""
        return sum(place.deliverable() for place in self._places.values() if place.consumers)

    def in_flight(self) -> int:
        """Deliveries that open subscriptions hold, parked ones included."""
        return sum(len(s.held) for s in self.subscriptions)

    def delayed(self) -> int:
        """Messages that wait for their time."""
        return len(self._delayed)

    def waiting(self, address: Queue[Any] | Group) -> list[Message]:
        """Copies of what waits at an address, oldest first."""
        return [Message(*e.fields) for p in self._places.values() if p.address == address for e in p]

    def cut(self, *, down: bool = False) -> None:
        """Break every link: all calls raise ConnectionLost until `connect`. What was held goes back, counted."""
        self.down = down
        for adapter in list(self._adapters):
            adapter.lose("the link to the memory broker was cut")

    def kill(self, subscription: MemorySubscription) -> None:
        """Its process has died without a word: what it holds comes back when the leases end."""
        subscription.end("the consumer was killed", give_back=False)

    def delete(self, address: Queue[Any] | Group) -> None:
        """Delete a queue or group under its consumers: they get NotFound."""
        for place in [p for p in self._places.values() if p.address == address]:
            self._drop(place)

    def refuse(self, address: Address, error: TransportError | None, *, times: float = inf) -> None:
        """Answer the next `times` messages to `address` with `error`; None ends it."""
        if error is None:
            self._refusals.pop(address, None)
        else:
            self._refusals[address] = (error, times)

    # For the adapter.

    def refusal(self, address: Address) -> TransportError | None:
        error, times = self._refusals.get(address, (None, 0.0))
        if error is None:
            return None
        if times <= 1:
            del self._refusals[address]
        else:
            self._refusals[address] = (error, times - 1)
        return error

    def make(self, key: Key, address: Address, start: Start = "new") -> None:
        """Make a queue, topic, group or inbox that is not there. Raises ConfigError for a start that is no position."""
        if key[0] == "topic":
            self._topics[key] = []
            return
        place = make_place(key, address)
        past = self._since(key[1], start, address) if start != "new" else ()
        self._places[key] = place
        if key[0] == "group":
            self._topics["topic", key[1]].append(place)
        for kept in past:
            self._put(kept.fields, kept.not_before, (place,), self.clock.monotonic())

    def _since(self, topic: str, start: Start, address: Address) -> list[_Kept]:
        history = self._history.get(("topic", topic), [])
        if isinstance(start, float):
            return [kept for kept in history if kept.at >= start]
        if start == "all":
            return history
        at = {f"{topic}/{kept.fields[ID]}": n for n, kept in enumerate(history)}
        for text in start:
            if text not in at:
                raise ConfigError(f"{address}: start={text!r} is no position of its topic")
        return history[min(at[text] for text in start) :]

    def keep(self, key: Key) -> None:
        """From now on what is sent to this topic is kept for groups to come."""
        self._history.setdefault(key, [])

    def has(self, key: Key) -> bool:
        return key in self._places or key in self._topics

    def place(self, key: Key | None) -> Place | None:
        return None if key is None else self._places.get(key)

    def groups(self, key: Key | None) -> list[Place] | None:
        return None if key is None else self._topics.get(key)

    def store(self, outgoing: Outgoing, places: Iterable[Place], now: float, topic: Key | None = None) -> None:
        """`topic`: the key of one that keeps its history."""
        m = outgoing.message
        headers = m.headers
        fields = (
            m.body,
            m.id,
            m.type,
            m.content_type,
            dict(headers) if headers else NO_HEADERS,
            m.key,
            m.correlation_id,
            m.causation_id,
            m.reply_to,
            m.timestamp,
            m.expires_at,
            m.priority,
        )  # not `delay`: it is an order to the sender, and does not travel
        if topic is not None:
            self._history[topic].append(_Kept(self.clock.time(), fields, outgoing.not_before))
        self._put(fields, outgoing.not_before, places, now)
        if self.on_send is not None:
            self.on_send(outgoing)

    def _put(self, fields: tuple[Any, ...], not_before: float | None, places: Iterable[Place], now: float) -> None:
        if not_before is not None:
            # Epoch floats resolve a quarter of a microsecond; without the rounding a wait of 5 s ends after 5.0000002.
            wait = round(not_before - self.clock.time(), 6)
            if wait > 0:
                # Not from `now`: what has passed since then is in `wait` already, and a delay is a floor.
                due = self.clock.monotonic() + wait
                for place in places:
                    self.delay(due, place, Entry(fields, 0, now), again=False)
                places = ()
        for place in places:
            place.put(Entry(fields, self._next(), now))

    def delay(self, due: float, place: Place, entry: Entry, *, again: bool) -> None:
        heapq.heappush(self._delayed, (due, self._next(), again, place, entry))
        self._arm(due)

    def take_early(self, place: Place, limit: int) -> list[tuple[float, bool, Entry]]:
        """Up to `limit` of what waits for its time there: when that is, monotonic seconds, and whether it was given back."""
        taken = heapq.nsmallest(limit, (waiting for waiting in self._delayed if waiting[3] is place))
        if taken:
            gone = {waiting[1] for waiting in taken}
            self._delayed = [waiting for waiting in self._delayed if waiting[1] not in gone]
            heapq.heapify(self._delayed)
        return [(due, again, entry) for due, _, again, _, entry in taken]

    def attach(self, subscription: MemorySubscription, place: Place) -> None:
        self._holders.append(subscription)
        if not subscription.source.browse:
            place.consumers.append(subscription)

    def detach(self, subscription: MemorySubscription, place: Place) -> None:
        """A subscription that still holds something, killed, stays known until its leases end."""
        if subscription in place.consumers:
            place.consumers.remove(subscription)
            if place.private and not place.consumers:
                self._drop(place)
        if not subscription.held and subscription in self._holders:
            self._holders.remove(subscription)

    def held_from(self, place: Place) -> int:
        return sum(len(s.held) for s in self._holders if s.place is place)

    def delayed_for(self, place: Place) -> int:
        return sum(waiting[3] is place for waiting in self._delayed)

    def leased(self, until: float) -> None:
        """A lease ends at `until`: have a look then."""
        if until < self._lease_due:
            self._lease_due = until
            self._arm(until)

    def connect(self, adapter: MemoryAdapter) -> None:
        if self.down:
            raise ConnectionLost("the memory broker is down")
        self._adapters.add(adapter)
        self._sweep()  # the timer may have been of an event loop that is closed

    def disconnect(self, adapter: MemoryAdapter) -> None:
        self._adapters.discard(adapter)

    def _drop(self, place: Place) -> None:
        if place.gone:
            return
        place.gone = True
        del self._places[place.key]
        if place.key[0] == "group":
            self._topics["topic", place.key[1]].remove(place)
        for holder in [s for s in self._holders if s.place is place]:
            holder.forget()
        place.wake()

    def _arm(self, at: float) -> None:
        """One timer for all leases and delays, at the earliest."""
        if at < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = at
            self._timer = self.clock.call_later(max(0.0, at - self.clock.monotonic()), self._sweep)

    def _sweep(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = None, inf
        now = self.clock.monotonic()
        delayed = self._delayed
        while delayed and delayed[0][0] <= now + SOON:
            _, _, again, place, entry = heapq.heappop(delayed)
            if place.gone:
                continue
            if again:
                place.give_back(entry)
            else:
                entry.seq, entry.since = self._next(), now
                place.put(entry)
            place.wake()
        if self._lease_due <= now + SOON:
            self._lease_due = min((s.expire(now + SOON) for s in list(self._holders)), default=inf)
        self._arm(min(self._lease_due, delayed[0][0] if delayed else inf))
