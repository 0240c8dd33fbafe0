"""One partition in our hands: what of it is finished, and how that is written into the metadata of a commit.

The committed offset is the first unfinished one. What is finished beyond it stands in the commit's metadata, so that a
restart runs nothing again that had finished:

    u2: base64( varint ((highest - offset + 1) << 1 | open), then for each unfinished one up to `highest`: varint (distance
    to the one before << 1 | noted), and if noted: varint failures in place, varint starts; then the CRC of all that and of
    the offset ) NUL

The NUL is for clients that read metadata as C strings. What can't be read is ignored: the records are handled again.

`open` stands there from the first record that is handed out until the partition is given up in order. Whoever finds it
follows one that died, and commits for a while what it hands out before it does so: these are the starts, from which the
crash guard of the core sees a record that kills whoever handles it. Elsewhere nothing is counted, and costs nothing.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from typing import Any
from zlib import crc32

from unibus.adapter import Source
from unibus.deadletter import retry_count
from unibus.delivery import Delivery
from unibus.message import CRASH_COUNT
from unibus_kafka import wire
from unibus_kafka.wire import Record

LIMIT = 4096  # characters: offset.metadata.max.bytes of a broker, by default
FULL = LIMIT * 3 // 4  # beyond this the partition is paused until more of it is finished
_MARK = "u2:"
_BYTES = (LIMIT - len(_MARK) - 1) // 4 * 3 - 4  # without the CRC


def encode(offset: int, highest: int, unfinished: Iterable[tuple[int, int, int]], *, open: bool = False) -> str:
    """The metadata of a commit of `offset`. `unfinished`: (offset, failures, starts), ascending, up to `highest`.

    What doesn't fit is left out from the end: it counts as unfinished.
    """
    entries, last = bytearray(), offset
    for number, failures, starts in unfinished:
        noted = bool(failures or starts)
        entry = _varint((number - last) << 1 | noted) + (_varint(failures) + _varint(starts) if noted else b"")
        if len(entries) + len(entry) + 9 > _BYTES:
            highest = last
            break
        entries += entry
        last = number
    data = _varint((highest - offset + 1) << 1 | open) + bytes(entries)
    return _MARK + base64.b64encode(data + _checksum(offset, data)).decode() + "\0"


def decode(offset: int, text: str) -> tuple[int, dict[int, tuple[int, int]], bool] | None:
    """(highest, unfinished offset -> failures and starts, open); None where it isn't ours, or damaged."""
    if not text.startswith(_MARK) or len(text) > LIMIT:
        return None
    try:
        raw = base64.b64decode(text[len(_MARK) :].rstrip("\0"), validate=True)
    except (binascii.Error, ValueError):
        return None
    data = raw[:-4]
    if len(raw) < 5 or raw[-4:] != _checksum(offset, data):
        return None
    numbers, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(value)
            value = shift = 0
    if not numbers:
        return None
    found: dict[int, tuple[int, int]] = {}
    number, rest = offset, iter(numbers[1:])
    for step in rest:
        number += step >> 1
        found[number] = (next(rest, 0), next(rest, 0)) if step & 1 else (0, 0)
    highest = offset + (numbers[0] >> 1) - 1
    if found and number > highest:  # nobody has written that: they go up to the highest
        return None
    return highest, found, bool(numbers[0] & 1)


def _checksum(offset: int, data: bytes) -> bytes:
    return crc32(data, offset & 0xFFFFFFFF).to_bytes(4, "big")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class Partition:
    """One that is assigned to us, until `owned` is False. `seconds`: the rung it belongs to, 0 for none."""

    __slots__ = (
        "_highest", "_name", "_notes", "careful", "committed", "failures", "full", "held", "leaving", "next", "open", "opened",
        "orphan", "owned", "seconds", "starts", "tp", "wary",
    )  # fmt: skip

    def __init__(self, tp: Any, start: int, metadata: str = "", seconds: float = 0.0) -> None:
        self.tp = tp
        self.next = start  # where reading goes on
        self.seconds = seconds
        self.owned = True
        self.leaving = False  # it is being given up: nothing of it is handed out any more
        self.full = False  # there is no room in the metadata for more
        self.held = 0  # records that wait for their time
        self.open: dict[int, Delivery[Any]] = {}  # read and not finished, by offset, ascending
        self.opened = False  # something was handed out
        self.careful = 0.0  # until then, monotonic, starts are counted
        self.wary = True  # there is something to do when a record is handed out
        self.committed = (start, metadata)
        self._name = f"{tp.topic}/{tp.partition}"
        # What was finished, or had failed or been started, before this partition was ours.
        self._highest, self._notes, self.orphan = decode(start, metadata) or (start - 1, {}, False)
        self.failures = {offset: failures for offset, (failures, _) in self._notes.items() if failures}
        self.starts = {offset: starts for offset, (_, starts) in self._notes.items() if starts}

    def read(
        self, records: Sequence[Record], source: Source, now: float, token: bytes = b""
    ) -> tuple[list[Delivery[Any]], list[tuple[float, Delivery[Any]]]]:
        """What there is to do: now, and what is due later. `token`: the key of those that are ours, if not all are."""
        opened, known, decode = self.open, self._notes, wire.decode
        highest = self._highest if self.next <= self._highest else -1
        ready: list[Delivery[Any]] = []
        later: list[tuple[float, Delivery[Any]]] = []
        for record in records:
            offset = record[2]
            if (offset <= highest and offset not in known) or (token and record.key != token):
                continue
            message, due = decode(record)
            delivery = opened[offset] = Delivery(message, source, self, 0, None, None, record, None)
            if due is None or due <= now:
                ready.append(delivery)
            else:
                later.append((due, delivery))
        self.next = records[-1].offset + 1
        return ready, later

    def begin(self, delivery: Delivery[Any], now: float) -> bool:
        """It is handed out now (monotonic). Does a commit have to say so first?"""
        offset = offset_of(delivery)
        delivery.failures = self.failures.get(offset, 0)
        counted = self.careful > now or CRASH_COUNT in delivery.message.headers
        if counted:
            delivery.deliveries = self.starts[offset] = self.starts.get(offset, 0) + 1
        first, self.opened = not self.opened, True
        self.wary = self.careful > now or bool(self.failures)
        return first or counted

    def finish(self, delivery: Delivery[Any]) -> None:
        record: Any = delivery.native
        offset = record.offset
        self.open.pop(offset, None)
        if self.failures or self.starts:
            self.failures.pop(offset, None)
            self.starts.pop(offset, None)

    def again(self, delivery: Delivery[Any]) -> Delivery[Any]:
        """For what was given back: that start does not count, what failed in place does."""
        self._came_back(delivery)
        self._remember(delivery)
        self.wary = True
        message, _ = wire.decode(delivery.native)
        new: Delivery[Any] = Delivery(message, delivery.source, self, 0, None, None, delivery.native, None)
        self.open[offset_of(delivery)] = new
        return new

    def _remember(self, delivery: Delivery[Any]) -> None:
        """Keep what failed in place: the header has only what was counted before it was sent."""
        message, _ = wire.decode(delivery.native)  # the core rewrites the headers of what failed in place
        if (failures := delivery.failures - retry_count(message.headers)) > 0:
            self.failures[offset_of(delivery)] = failures

    def point(self) -> tuple[int, str]:
        """What to commit: offset and metadata."""
        for delivery in self.open.values():
            if delivery.failures:
                self._remember(delivery)
        unfinished = [*self.open, *(offset for offset in self._notes if offset >= self.next)]
        last = max(self.next - 1, self._highest)
        first = unfinished[0] if unfinished else last + 1
        while unfinished and unfinished[-1] == last and not (last in self.failures or last in self.starts):
            last = unfinished.pop() - 1  # what follows the last finished one need not be told
        if not (unfinished or self.opened):
            return first, ""
        entries = ((offset, self.failures.get(offset, 0), self.starts.get(offset, 0)) for offset in unfinished)
        return first, encode(first, last, entries, open=self.opened)

    def unsaid(self) -> list[str]:
        """Positions of what was finished here, for all that a confirmed commit tells not."""
        at, metadata = self.committed
        highest, left, _ = decode(at, metadata) or (at - 1, {}, False)
        return [
            f"{self._name}@{offset}"
            for offset in range(at, self.next)
            if (offset > highest or offset in left) and offset not in self.open
        ]

    def end(self, handed: Iterable[Delivery[Any]]) -> None:
        """It is given up in order: what is still out is not the doing of its handler."""
        self.opened = False
        for delivery in handed:
            if delivery.token is self:
                self._came_back(delivery)

    def _came_back(self, delivery: Delivery[Any]) -> None:
        offset = offset_of(delivery)
        if (count := self.starts.pop(offset, 0)) > 1:
            self.starts[offset] = count - 1

    def lose(self) -> None:
        self.owned = False
        for delivery in self.open.values():
            delivery.lost = True
        self.open.clear()


def offset_of(delivery: Delivery[Any]) -> int:
    record: Any = delivery.native
    return int(record.offset)
