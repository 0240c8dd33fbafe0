"""The contiguous prefix: up to where is everything done?

RabbitMQ acknowledges "all up to this tag" with one frame, Kafka commits one offset for all before it. Deliveries finish
in any order, so both need to know how far the finished ones reach without a hole.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice


class Tracker:
    """Numbers that arrive in ascending order, with or without gaps, and are finished in any order.

    A gap is no hole: offsets of Kafka have gaps (transactions, compaction), and what was never seen can't be finished.
    Memory is that of the unfinished numbers, however far the finished ones run ahead; every operation takes constant
    time, `unfinished` that of its result. Not thread-safe: it belongs to the event loop.
    """

    __slots__ = ("_highest", "_last", "_open")

    def __init__(self) -> None:
        # Unfinished number -> the number seen before it. Not a dict: finding the first entry of a dict whose head was
        # deleted again and again takes quadratic time.
        self._open: OrderedDict[int, int | None] = OrderedDict()
        self._last: int | None = None
        self._highest: int | None = None

    def add(self, number: int) -> None:
        """`number` was received. Raises ValueError if it is not above all numbers before."""
        if self._last is not None and number <= self._last:
            raise ValueError(f"number {number} after {self._last}: numbers are tracked in ascending order")
        self._open[number] = self._last
        self._last = number

    def finish(self, number: int) -> bool:
        """`number` is done. False, and nothing changes, if it was already, or was never seen."""
        if number not in self._open:
            return False
        del self._open[number]
        if self._highest is None or number > self._highest:
            self._highest = number
        return True

    @property
    def prefix(self) -> int | None:
        """The highest number seen such that it and all seen before it are finished; None if there is none."""
        for before in self._open.values():
            return before
        return self._last

    @property
    def first(self) -> int | None:
        """The lowest unfinished number; None if there is none."""
        for number in self._open:
            return number
        return None

    @property
    def last(self) -> int | None:
        """The highest number seen; None before the first."""
        return self._last

    @property
    def highest(self) -> int | None:
        """The highest finished number; None before the first."""
        return self._highest

    def unfinished(self, limit: int | None = None) -> list[int]:
        """The unfinished numbers, ascending, the lowest `limit` of them (None: all)."""
        return list(self._open) if limit is None else list(islice(self._open, limit))

    def __contains__(self, number: int) -> bool:
        """Seen, and not finished."""
        return number in self._open

    def __iter__(self) -> Iterator[int]:
        return iter(self._open)

    def __len__(self) -> int:
        """How many are unfinished."""
        return len(self._open)

    def __repr__(self) -> str:
        return f"<Tracker up to {self.prefix}, {len(self)} unfinished>"
