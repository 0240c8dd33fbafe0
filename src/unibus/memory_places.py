"""Where the in-memory broker keeps messages: one class for each way to order them, chosen when a place is made."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from unibus.channel import Address, Group, Inbox

if TYPE_CHECKING:
    from unibus.memory_subscription import MemorySubscription

ID, HEADERS, KEY, PRIORITY = 1, 4, 5, 11  # positions in Entry.fields

SOON = 1e-9  # sums of floats: what is due within a nanosecond is due

Key = tuple[str, ...]  # kind and physical name


class Entry:
    """One stored copy. `fields` are those of Message: a tuple is cheap, can be shared by groups and never changes."""

    __slots__ = ("deliveries", "fields", "seq", "since")

    def __init__(self, fields: tuple[Any, ...], seq: int, since: float) -> None:
        self.fields = fields
        self.seq = seq
        self.since = since
        self.deliveries = 0


class Place:
    """Where messages wait for competing consumers: a queue, group or inbox. First in, first out, sorted by `seq`."""

    done: Callable[[Entry], None] | None = None  # called when an entry is accepted, where that matters

    def __init__(self, key: Key, address: Address) -> None:
        self.key = key
        self.address = address
        self.private = False  # ends with its last consumer
        self.gone = False
        self.consumers: list[MemorySubscription] = []
        self.waiters: list[asyncio.Future[None]] = []
        self._waiting: deque[Entry] = deque()
        self.put: Callable[[Entry], None] = self._waiting.append

    def take(self, limit: int) -> list[Entry]:
        waiting = self._waiting
        if len(waiting) <= limit:
            taken = list(waiting)
            waiting.clear()
            return taken
        return [waiting.popleft() for _ in range(limit)]

    def give_back(self, entry: Entry) -> None:
        """To where it was. Only entries that were given back before it can stand in front."""
        _insert(self._waiting, entry)

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._waiting)

    def deliverable(self) -> int:
        return len(self._waiting)

    def wake(self) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)
        self.waiters.clear()


class PriorityPlace(Place):
    """One deque a level, the highest first."""

    def __init__(self, key: Key, address: Address, levels: int) -> None:
        super().__init__(key, address)
        self._levels: list[deque[Entry]] = [deque() for _ in range(levels)]
        self._top = levels - 1
        self.put = self._put

    def _level(self, entry: Entry) -> deque[Entry]:
        return self._levels[min(entry.fields[PRIORITY] or 0, self._top)]

    def _put(self, entry: Entry) -> None:
        self._level(entry).append(entry)

    def take(self, limit: int) -> list[Entry]:
        taken: list[Entry] = []
        for level in reversed(self._levels):
            while level and len(taken) < limit:
                taken.append(level.popleft())
        return taken

    def give_back(self, entry: Entry) -> None:
        _insert(self._level(entry), entry)

    def __len__(self) -> int:
        return sum(map(len, self._levels))

    def __iter__(self) -> Iterator[Entry]:
        return itertools.chain.from_iterable(reversed(self._levels))

    def deliverable(self) -> int:
        return len(self)


class OrderedPlace(Place):
    """A lane for each key, its first message the only one that may be out. A message without a key is its own lane.

    An entry leaves its lane when it is accepted; a lane is in the heap while its first entry is free.
    """

    def __init__(self, key: Key, address: Address, levels: int) -> None:
        super().__init__(key, address)
        self._top = levels - 1
        self._lanes: dict[object, deque[Entry]] = {}
        self._free: list[tuple[int, int, deque[Entry]]] = []
        self._count = 0  # waiting, also behind one that is out
        self.put = self._put
        self.done = self._done

    def _open(self, lane: deque[Entry]) -> None:
        priority = min(lane[0].fields[PRIORITY] or 0, self._top) if self._top > 0 else 0
        heapq.heappush(self._free, (-priority, lane[0].seq, lane))

    @staticmethod
    def _lane_key(entry: Entry) -> object:
        key = entry.fields[KEY]
        return entry if key is None else key

    def _put(self, entry: Entry) -> None:
        self._count += 1
        key = self._lane_key(entry)
        lane = self._lanes.get(key)
        if lane is None:
            self._lanes[key] = lane = deque((entry,))
            self._open(lane)
        else:
            lane.append(entry)

    def take(self, limit: int) -> list[Entry]:
        taken: list[Entry] = []
        while self._free and len(taken) < limit:
            taken.append(heapq.heappop(self._free)[2][0])
        self._count -= len(taken)
        return taken

    def give_back(self, entry: Entry) -> None:
        self._count += 1
        self._open(self._lanes[self._lane_key(entry)])

    def _done(self, entry: Entry) -> None:
        key = self._lane_key(entry)
        lane = self._lanes[key]
        lane.popleft()
        if lane:
            self._open(lane)
        else:
            del self._lanes[key]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        free = {id(lane) for _, _, lane in self._free}
        for lane in self._lanes.values():
            yield from itertools.islice(lane, 0 if id(lane) in free else 1, None)

    def deliverable(self) -> int:
        return len(self._free)


def position(place: Place, entry: Entry) -> str:
    """Where a profile with positions says that an entry is. Of a group: in its topic."""
    return f"{place.key[1]}/{entry.fields[ID]}"


def _insert(waiting: deque[Entry], entry: Entry) -> None:
    before = []
    while waiting and waiting[0].seq < entry.seq:
        before.append(waiting.popleft())
    waiting.appendleft(entry)
    waiting.extendleft(reversed(before))


def make_place(key: Key, address: Address) -> Place:
    """The cheapest place that does what the channel asks for."""
    channel = address.topic if isinstance(address, Group) else address
    if isinstance(channel, Inbox):
        return Place(key, address)
    if channel.ordered:
        return OrderedPlace(key, address, channel.priorities)
    return PriorityPlace(key, address, channel.priorities) if channel.priorities else Place(key, address)
