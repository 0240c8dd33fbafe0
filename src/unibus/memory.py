"""The in-memory broker: the executable specification of the SPI, for tests and trials.

`memory://` is a broker of its own for each adapter; `memory://name` is shared by all buses of the process that run on
the same clock. A broker keeps its state while adapters close and connect again. Nothing here is thread-safe.
Messages are lost with the process.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from math import inf
from typing import Any

from unibus.adapter import Backlog, Endpoint, Health, Move, Outcome, Outgoing, Results, Source, Standing, Topology
from unibus.capabilities import Capabilities, emulated, native, refused
from unibus.channel import Address, Group, Inbox, Queue, Topic
from unibus.clock import Clock, SystemClock, Timer
from unibus.delivery import Delivery
from unibus.errors import (
    ConfigError,
    ConnectionLost,
    LeaseLost,
    MessageTooLarge,
    NotFound,
    Refused,
    TransportError,
    Unroutable,
    Unsupported,
)
from unibus.message import NO_HEADERS, Message

log = logging.getLogger("unibus.memory")

LEASE = 30.0
_INBOX = re.compile(r"inbox\.[A-Za-z0-9._-]{1,200}")
_SETTINGS = ("lease", "max_body")
_HEADERS, _KEY, _PRIORITY = 4, 5, 11  # positions in _Entry.fields
_SOON = 1e-9  # sums of floats: what is due within a nanosecond is due

_Key = tuple[str, ...]  # kind and physical name


class _Entry:
    """One stored copy. `fields` are those of Message: a tuple is cheap, can be shared by groups and never changes."""

    __slots__ = ("deliveries", "fields", "seq", "since")

    def __init__(self, fields: tuple[Any, ...], seq: int, since: float) -> None:
        self.fields = fields
        self.seq = seq
        self.since = since
        self.deliveries = 0


class _Place:
    """Where messages wait for competing consumers: a queue, group or inbox. First in, first out, sorted by `seq`."""

    done: Callable[[_Entry], None] | None = None  # called when an entry is accepted, where that matters

    def __init__(self, key: _Key, address: Address) -> None:
        self.key = key
        self.address = address
        self.private = False  # ends with its last consumer
        self.gone = False
        self.consumers: list[MemorySubscription] = []
        self.waiters: list[asyncio.Future[None]] = []
        self._waiting: deque[_Entry] = deque()
        self.put: Callable[[_Entry], None] = self._waiting.append

    def take(self, limit: int) -> list[_Entry]:
        waiting = self._waiting
        if len(waiting) <= limit:
            taken = list(waiting)
            waiting.clear()
            return taken
        return [waiting.popleft() for _ in range(limit)]

    def give_back(self, entry: _Entry) -> None:
        """To where it was. Only entries that were given back before it can stand in front."""
        _insert(self._waiting, entry)

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[_Entry]:
        return iter(self._waiting)

    def deliverable(self) -> int:
        return len(self._waiting)

    def wake(self) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)
        self.waiters.clear()


class _PriorityPlace(_Place):
    """One deque a level, the highest first."""

    def __init__(self, key: _Key, address: Address, levels: int) -> None:
        super().__init__(key, address)
        self._levels: list[deque[_Entry]] = [deque() for _ in range(levels)]
        self.put = self._put

    def _level(self, entry: _Entry) -> deque[_Entry]:
        return self._levels[min(max(entry.fields[_PRIORITY] or 0, 0), len(self._levels) - 1)]

    def _put(self, entry: _Entry) -> None:
        self._level(entry).append(entry)

    def take(self, limit: int) -> list[_Entry]:
        taken: list[_Entry] = []
        for level in reversed(self._levels):
            while level and len(taken) < limit:
                taken.append(level.popleft())
        return taken

    def give_back(self, entry: _Entry) -> None:
        _insert(self._level(entry), entry)

    def __len__(self) -> int:
        return sum(map(len, self._levels))

    def __iter__(self) -> Iterator[_Entry]:
        return itertools.chain.from_iterable(reversed(self._levels))

    def deliverable(self) -> int:
        return len(self)


class _OrderedPlace(_Place):
    """A lane for each key, its first message the only one that may be out. A message without a key is its own lane.

    An entry leaves its lane when it is accepted; a lane is in the heap while its first entry is free.
    """

    def __init__(self, key: _Key, address: Address, levels: int) -> None:
        super().__init__(key, address)
        self._top = levels - 1
        self._lanes: dict[object, deque[_Entry]] = {}
        self._free: list[tuple[int, int, deque[_Entry]]] = []
        self._count = 0  # waiting, also behind one that is out
        self.put = self._put
        self.done = self._done

    def _open(self, lane: deque[_Entry]) -> None:
        priority = min(lane[0].fields[_PRIORITY] or 0, self._top) if self._top > 0 else 0
        heapq.heappush(self._free, (-priority, lane[0].seq, lane))

    @staticmethod
    def _lane_key(entry: _Entry) -> object:
        key = entry.fields[_KEY]
        return entry if key is None else key

    def _put(self, entry: _Entry) -> None:
        self._count += 1
        key = self._lane_key(entry)
        lane = self._lanes.get(key)
        if lane is None:
            self._lanes[key] = lane = deque((entry,))
            self._open(lane)
        else:
            lane.append(entry)

    def take(self, limit: int) -> list[_Entry]:
        taken: list[_Entry] = []
        while self._free and len(taken) < limit:
            taken.append(heapq.heappop(self._free)[2][0])
        self._count -= len(taken)
        return taken

    def give_back(self, entry: _Entry) -> None:
        self._count += 1
        self._open(self._lanes[self._lane_key(entry)])

    def _done(self, entry: _Entry) -> None:
        key = self._lane_key(entry)
        lane = self._lanes[key]
        lane.popleft()
        if lane:
            self._open(lane)
        else:
            del self._lanes[key]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[_Entry]:
        free = {id(lane) for _, _, lane in self._free}
        for lane in self._lanes.values():
            yield from itertools.islice(lane, 0 if id(lane) in free else 1, None)

    def deliverable(self) -> int:
        return len(self._free)


def _insert(waiting: deque[_Entry], entry: _Entry) -> None:
    before = []
    while waiting and waiting[0].seq < entry.seq:
        before.append(waiting.popleft())
    waiting.appendleft(entry)
    waiting.extendleft(reversed(before))


class MemoryBroker:
    """The state of one broker, and what a test may ask of it or do to it.

    `on_send` is called with each Outgoing that the broker took, also one to a topic without groups. While `down` is True
    no adapter can connect. `subscriptions` are the open ones, for `kill`.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.on_send: Callable[[Outgoing], object] | None = None
        self.down = False
        self._places: dict[_Key, _Place] = {}
        self._topics: dict[_Key, list[_Place]] = {}
        self._adapters: set[MemoryAdapter] = set()
        self._holders: list[MemorySubscription] = []
        self._refusals: dict[Address, tuple[TransportError, float]] = {}
        self._next = itertools.count(1).__next__
        # (due, tie-break, put again or give back, place, entry)
        self._delayed: list[tuple[float, int, bool, _Place, _Entry]] = []
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

    def make(self, key: _Key, address: Address) -> None:
        """Make a queue, topic, group or inbox that is not there."""
        if key[0] == "topic":
            self._topics[key] = []
            return
        channel = address.topic if isinstance(address, Group) else address
        ordered, levels = (False, 0) if isinstance(channel, Inbox) else (channel.ordered, channel.priorities)
        if ordered:
            place: _Place = _OrderedPlace(key, address, levels)
        else:
            place = _PriorityPlace(key, address, levels) if levels else _Place(key, address)
        self._places[key] = place
        if key[0] == "group":
            self._topics["topic", key[1]].append(place)

    def has(self, key: _Key) -> bool:
        return key in self._places or key in self._topics

    def place(self, key: _Key | None) -> _Place | None:
        return None if key is None else self._places.get(key)

    def groups(self, key: _Key | None) -> list[_Place] | None:
        return None if key is None else self._topics.get(key)

    def store(self, outgoing: Outgoing, places: Iterable[_Place], now: float) -> None:
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
        if outgoing.not_before is not None:
            # Epoch floats resolve a quarter of a microsecond; without the rounding a wait of 5 s ends after 5.0000002.
            wait = round(outgoing.not_before - self.clock.time(), 6)
            if wait > 0:
                for place in places:
                    self.delay(now + wait, place, _Entry(fields, 0, now), again=False)
                places = ()
        for place in places:
            place.put(_Entry(fields, self._next(), now))
        if self.on_send is not None:
            self.on_send(outgoing)

    def delay(self, due: float, place: _Place, entry: _Entry, *, again: bool) -> None:
        heapq.heappush(self._delayed, (due, self._next(), again, place, entry))
        self._arm(due)

    def attach(self, subscription: MemorySubscription, place: _Place) -> None:
        self._holders.append(subscription)
        if not subscription.source.browse:
            place.consumers.append(subscription)

    def detach(self, subscription: MemorySubscription, place: _Place) -> None:
        if not subscription.held and subscription in self._holders:
            self._holders.remove(subscription)
        if subscription in place.consumers:
            place.consumers.remove(subscription)
            if place.private and not place.consumers:
                self._drop(place)

    def held_from(self, place: _Place) -> int:
        return sum(len(s.held) for s in self._holders if s.place is place)

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

    def _drop(self, place: _Place) -> None:
        place.gone = True
        self._places.pop(place.key, None)
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
        while delayed and delayed[0][0] <= now + _SOON:
            _, _, again, place, entry = heapq.heappop(delayed)
            if place.gone:
                continue
            if again:
                place.give_back(entry)
            else:
                entry.seq, entry.since = self._next(), now
                place.put(entry)
            place.wake()
        if self._lease_due <= now + _SOON:
            self._lease_due = min((s.expire(now + _SOON) for s in list(self._holders)), default=inf)
        self._arm(min(self._lease_due, delayed[0][0] if delayed else inf))


_shared: dict[tuple[str, Clock | None], MemoryBroker] = {}


def _broker(endpoint: Endpoint) -> MemoryBroker:
    url = endpoint.url
    name = url.path or (url.hosts[0][0] if url.hosts else "")
    if len(url.hosts) > 1 or (url.hosts and (url.path or url.hosts[0][1])) or url.username or url.password:
        raise ConfigError(f"url {url}: use memory:// or memory://name, without port, path or user")
    if not name:
        return MemoryBroker(endpoint.clock)
    key = name, None if isinstance(endpoint.clock, SystemClock) else endpoint.clock
    if key not in _shared:
        _shared[key] = MemoryBroker(endpoint.clock)
    return _shared[key]


def _positive(endpoint: Endpoint, name: str, default: float | None) -> float | None:
    value = endpoint.settings.get(name, default)
    if value is None:
        return None
    try:
        number = float(str(value))
    except ValueError:
        number = 0.0
    if isinstance(value, bool) or not 0 < number < inf:
        raise ConfigError(f"memory.{name} = {value!r}: use a number above 0")
    return number


class MemoryAdapter:
    """A client of a MemoryBroker. Settings: `lease`, seconds (30), and `max_body`, bytes (no limit)."""

    def __init__(self, endpoint: Endpoint) -> None:
        for name in endpoint.settings:
            if name not in _SETTINGS:
                near = get_close_matches(name, _SETTINGS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {' and '.join(_SETTINGS)}"
                raise ConfigError(f"memory.{name}: the memory broker has no such setting; {hint}")
        self.broker = _broker(endpoint)
        self.lease = _positive(endpoint, "lease", LEASE) or LEASE
        max_body = _positive(endpoint, "max_body", None)
        self._max_body = None if max_body is None else int(max_body)
        self._prefix = endpoint.prefix
        self._keys: dict[Address, _Key] = {}
        self._subscriptions: list[MemorySubscription] = []
        self._lost: str | None = "the memory adapter is not connected"
        self._capabilities = Capabilities(
            adapter="memory",
            order=native("a lane for each key; one message of a key is out at a time"),
            delay=native(),
            priority=native(limit=10),
            replay=refused("the memory broker keeps no history"),
            browse=native(),
            reply=native(),
            release=native(),
            lease=native(limit=self.lease),
            atomic_move=native(),
            delivery_count=native(),
            attempt=emulated("counted in a header; a crash forgets failures in place since the last copy"),
            settle_confirmed=native(),
            dedup=refused("the memory broker stores every message that is sent"),
            max_body=self._max_body,
        )

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def native(self) -> MemoryBroker:
        return self.broker

    async def connect(self) -> None:
        self.broker.connect(self)
        self._lost = None

    async def close(self) -> None:
        for subscription in list(self._subscriptions):
            await subscription.close()
        self.lose("the memory adapter is closed")

    def lose(self, why: str) -> None:
        """From now on everything raises ConnectionLost."""
        self._lost = why
        self.broker.disconnect(self)
        for subscription in list(self._subscriptions):
            subscription.end(why)

    def forget(self, subscription: MemorySubscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def _linked(self) -> None:
        if self._lost is not None:
            raise ConnectionLost(self._lost)

    async def declare(self, topology: Topology) -> None:
        self._linked()
        missing = []
        for declared in topology.channels:
            address = declared.address
            if declared.options:
                raise ConfigError(f"{address}: the memory broker has no setting {next(iter(declared.options))!r}")
            if declared.start != "new":
                raise Unsupported(f"{address}: start={declared.start!r}; the memory broker keeps no history")
            if isinstance(address, Group):
                topic = self._keys.get(address.topic)
                if topic is None:
                    raise ConfigError(f"{address}: declare {address.topic} before its groups")
                key: _Key = ("group", topic[1], declared.name)
            else:
                key = ("topic" if isinstance(address, Topic) else "queue", declared.name)
                other = "queue" if key[0] == "topic" else "topic"
                if topology.mode != "assume" and self.broker.has((other, declared.name)):
                    raise Refused(
                        f"{address}: {declared.name!r} is a {other} on the memory broker; one name is one kind"
                    )
            self._keys[address] = key
            if topology.mode == "assume":
                continue
            if self.broker.has(key):
                self._same(address, key)
            elif topology.mode == "create" and (key[0] != "group" or self.broker.has(("topic", key[1]))):
                self.broker.make(key, address)
                log.info("created %s", address)
            else:
                missing.append(str(address))
        if missing:
            raise NotFound(f"missing on the memory broker: {', '.join(missing)}; create them with `unibus declare`")

    def _same(self, address: Address, key: _Key) -> None:
        """Nothing is altered, so what is there has to be what was asked for."""
        place = self.broker.place(key)
        if place is None or isinstance(address, Inbox):
            return
        there = place.address.topic if isinstance(place.address, Group) else place.address
        asked = address.topic if isinstance(address, Group) else address
        for feature in ("ordered", "priorities"):
            if (old := getattr(there, feature)) != (new := getattr(asked, feature)):
                raise Refused(f"{address} has {feature}={old} on the memory broker, not {new}; it is never altered")

    def route(self, outgoing: Outgoing) -> tuple[Sequence[_Place], TransportError | None]:
        """Where a message goes, or why it can't."""
        to = outgoing.to
        error = self.broker.refusal(to)
        if error is not None:
            return (), error
        if isinstance(to, Topic):
            groups = self.broker.groups(self._keys.get(to))
            if groups is None:
                return (), NotFound(f"{to} does not exist on the memory broker; declare it")
            return groups, None if groups else Unroutable(f"{to} has no group")
        place = self.broker.place(self._key(to))
        if place is not None:
            return (place,), None
        if isinstance(to, Inbox):
            return (), Unroutable(f"inbox {to.name!r} is gone: its process has ended")
        return (), NotFound(f"{to} does not exist on the memory broker; declare it")

    def _key(self, address: Address) -> _Key | None:
        if isinstance(address, Inbox):
            return ("inbox", address.name)
        if isinstance(address, Group) and address.ephemeral:
            topic = self._keys.get(address.topic)
            return None if topic is None else ("group", topic[1], self._prefix + address.name)
        return self._keys.get(address)

    def too_large(self, outgoing: Outgoing) -> TransportError | None:
        if self._max_body is None or len(outgoing.message.body) <= self._max_body:
            return None
        size = len(outgoing.message.body)
        return MessageTooLarge(f"{outgoing.to}: a body of {size} bytes; memory.max_body is {self._max_body}")

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        await asyncio.sleep(0)  # a sender in a loop must not starve the consumers; others join the next batch meanwhile
        self._linked()
        broker = self.broker
        store, refusals = broker.store, broker._refusals
        now = broker.clock.monotonic()
        results: list[TransportError | None] = [None] * len(batch)
        reached: dict[_Place, None] = {}
        last: Address | None = None
        places: Sequence[_Place] = ()
        problem: TransportError | None = None
        for i, outgoing in enumerate(batch):
            if outgoing.to is not last or refusals:
                places, problem = self.route(outgoing)
                last = None if problem is not None else outgoing.to
                reached.update(dict.fromkeys(places))
            error = problem or (self.too_large(outgoing) if self._max_body is not None else None)
            results[i] = error
            if error is None or isinstance(error, Unroutable):
                store(outgoing, places, now)
        for place in reached:
            if place.waiters:
                place.wake()
        return results

    async def subscribe(self, source: Source) -> MemorySubscription:
        self._linked()
        address: Address = source.address
        if source.start != "new":
            raise Unsupported(f"{address}: start={source.start!r}; the memory broker keeps no history")
        if isinstance(address, Inbox):
            name = self._prefix + address.name.removeprefix("inbox.")
            address = self.reply_to(f"inbox.{name}")
        key = self._key(address)
        private = isinstance(address, Inbox) or (isinstance(address, Group) and address.ephemeral)
        if private and key is not None and not self.broker.has(key):
            if isinstance(address, Group) and not self.broker.has(("topic", key[1])):
                raise NotFound(f"{address.topic} does not exist on the memory broker; declare it")
            self.broker.make(key, address)
        place = self.broker.place(key)
        if place is None:
            raise NotFound(f"{address} does not exist on the memory broker; declare it")
        place.private = private
        subscription = MemorySubscription(self, source, address, place)
        self._subscriptions.append(subscription)
        return subscription

    async def backlog(self, address: Queue[Any] | Group) -> Backlog:
        self._linked()
        place = self.broker.place(self._key(address))
        if place is None:
            raise NotFound(f"{address} does not exist on the memory broker; declare it")
        oldest = min((entry.since for entry in place), default=None)
        age = None if oldest is None else self.broker.clock.monotonic() - oldest
        return Backlog(len(place), self.broker.held_from(place), age)

    async def check(self) -> Health:
        return Health(self._lost is None)

    def reply_to(self, text: str) -> Inbox:
        if not _INBOX.fullmatch(text):
            raise Refused("reply_to is no inbox of the memory broker: inbox.<name> with A-Z a-z 0-9 . _ -")
        return Inbox(text)


class MemorySubscription:
    """One consumer of one place. `held`: what it has out, with the end of each lease."""

    def __init__(self, adapter: MemoryAdapter, source: Source, address: Address, place: _Place) -> None:
        self.source = source
        self.place = place
        self.held: dict[Delivery[Any], float] = {}
        self.over: str | None = None
        self._stopped = False
        self._adapter = adapter
        self._broker = adapter.broker
        self._address = address
        self._gone: list[Delivery[Any]] = []  # lost, and `losing` not told yet
        self._seen = 0  # of a browser
        self._page: deque[_Entry] = deque()
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
            if taken:
                return taken
            remaining = deadline - clock.monotonic()
            if remaining <= _SOON:
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
        until = self._broker.clock.monotonic() + self._adapter.lease
        taken: list[Delivery[Any]] = []
        for entry in entries:
            entry.deliveries += 1
            delivery = _deliver(entry, source, until)
            held[delivery] = until
            taken.append(delivery)
        self._broker.leased(until)
        return taken

    def _look(self, limit: int) -> list[Delivery[Any]]:
        if not self._page:
            self._page.extend(sorted((e for e in self.place if e.seq > self._seen), key=lambda e: e.seq))
        page = [self._page.popleft() for _ in range(min(limit, len(self._page)))]
        if page:
            self._seen = page[-1].seq
        return [_deliver(entry, self.source, None) for entry in page]

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
                elif done is not None:
                    done(delivery.token)
        else:
            now = self._broker.clock.monotonic()
            for i, delivery in enumerate(deliveries):
                if held.pop(delivery, None) is None:
                    results[i] = self._lease_lost(delivery)
                    continue
                entry = delivery.token
                entry.deliveries -= 1  # a release does not count
                if delays and delays[i] > 0:
                    self._broker.delay(now + delays[i], place, entry, again=True)
                else:
                    place.give_back(entry)
        self._freed()
        return results

    def _freed(self) -> None:
        """There may be room for a consumer at its prefetch, or the next message of a key."""
        if self.place.waiters and self.place.deliverable():
            self.place.wake()

    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        """A topic without groups takes a message as in `send`; here, where a result is all or nothing, without a word."""
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
            error = self._adapter.too_large(outgoing) or error
            if error is not None and not (isinstance(error, Unroutable) and isinstance(outgoing.to, Topic)):
                return error
            routes.append((outgoing, places))
        now = self._broker.clock.monotonic()
        for outgoing, places in routes:
            self._broker.store(outgoing, places, now)
            for place in places:
                place.wake()
        del self.held[move.delivery]
        if self.place.done is not None:
            self.place.done(move.delivery.token)
        return None

    async def extend(self, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
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
                delivery.token.deliveries -= 1  # an orderly end does not count
            self.end(f"the subscription of {self._address} is closed")

    # For the broker and the adapter.

    def end(self, why: str, *, give_back: bool = True) -> None:
        """Not to be used any more. What is held goes back now, or when its leases end."""
        if self.over is not None:
            return
        self.over = why
        if give_back:
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
        for entry in sorted((d.token for d in deliveries), key=lambda e: e.seq, reverse=True):
            self.place.give_back(entry)

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


def _deliver(entry: _Entry, source: Source, until: float | None) -> Delivery[Any]:
    fields = entry.fields
    message = Message(*fields)
    if fields[_HEADERS]:
        message.headers = dict(fields[_HEADERS])
    return Delivery(message, source, entry, deliveries=entry.deliveries, lease_until=until)
