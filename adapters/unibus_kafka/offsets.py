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
from collections.abc import Iterable, Mapping
from typing import Any
from zlib import crc32

from unibus.deadletter import retry_count
from unibus.delivery import Delivery
from unibus.tracker import Tracker

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
    if not text.startswith(_MARK):
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
    found: dict[int, tuple[int, int]] = {}
    number, rest = offset, iter(numbers[1:])
    for step in rest:
        number += step >> 1
        found[number] = (next(rest, 0), next(rest, 0)) if step & 1 else (0, 0)
    return offset + (numbers[0] >> 1) - 1, found, bool(numbers[0] & 1)


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
        "careful", "committed", "failures", "full", "held", "highest", "name", "open", "opened", "orphan", "out", "owned",
        "seconds", "start", "starts", "tp", "tracker",
    )  # fmt: skip

    def __init__(self, tp: Any, start: int, metadata: str = "", seconds: float = 0.0) -> None:
        self.tp = tp
        self.name = f"{tp.topic}/{tp.partition}"
        self.start = start
        self.seconds = seconds
        self.owned = True
        self.full = False  # there is no room in the metadata for more
        self.held = 0  # records that wait for their time
        self.tracker = Tracker()
        self.out: dict[int, Delivery[Any]] = {}  # handed out, by offset
        self.committed = (start, metadata)
        # What was finished, or had failed, before this partition was ours.
        found = decode(start, metadata)
        self.highest, notes, self.orphan = found if found is not None else (start - 1, {}, False)
        self.careful = 0.0  # until then (monotonic), starts are counted
        self.open = list(notes)
        self.failures = {number: failures for number, (failures, _) in notes.items() if failures}
        self.starts = {number: starts for number, (_, starts) in notes.items() if starts}
        self.opened = False  # something was handed out

    @property
    def next(self) -> int:
        """Where reading goes on."""
        last = self.tracker.last
        return self.start if last is None else last + 1

    def take(self, offset: int) -> bool:
        """A record was read. False if it was finished before."""
        self.tracker.add(offset)
        if offset <= self.highest and offset not in self.open:
            self.tracker.finish(offset)
            return False
        return True

    def finish(self, offset: int) -> None:
        self.tracker.finish(offset)
        if self.failures:
            self.failures.pop(offset, None)
        if self.starts:
            self.starts.pop(offset, None)

    def started(self, offset: int) -> int:
        """One more start, to be committed before the record is handed out; how many that makes."""
        count = self.starts[offset] = self.starts.get(offset, 0) + 1
        return count

    def not_started(self, offset: int) -> None:
        """It came back in order: that start does not count."""
        if (count := self.starts.pop(offset, 0)) > 1:
            self.starts[offset] = count - 1

    def remember(self, offset: int, delivery: Delivery[Any]) -> None:
        """Keep what failed in place: the header has only what was counted before it was sent."""
        if delivery.failures and (failures := delivery.failures - retry_count(native_headers(delivery))) > 0:
            self.failures[offset] = failures

    def point(self) -> tuple[int, str]:
        """What to commit: offset and metadata."""
        for offset, delivery in self.out.items():
            self.remember(offset, delivery)
        tracker = self.tracker
        last = self.next - 1
        later = [number for number in self.open if number > last]  # unfinished, and not read again yet
        first = tracker.first
        if first is None:
            first = last + 1
            if first <= self.highest:  # of what was finished before
                first = later[0] if later else self.highest + 1
        finished = max(tracker.highest or -1, self.highest)
        highest = max(finished, first - 1, *self.failures, *self.starts)
        if highest < first and not self.opened:
            return first, ""
        failures, starts = self.failures.get, self.starts.get
        unfinished = ((n, failures(n, 0), starts(n, 0)) for n in (*tracker, *later) if n <= highest)
        return first, encode(first, highest, unfinished, open=self.opened)

    def end(self) -> None:
        """It is given up in order: what is still out is not the doing of its handler."""
        self.opened = False
        for offset in self.out:
            self.not_started(offset)

    def lose(self) -> None:
        self.owned = False
        for delivery in self.out.values():
            delivery.lost = True
        self.out.clear()


def native_headers(delivery: Delivery[Any]) -> Mapping[str, str]:
    """Of the record as it was read: the core rewrites those of the message when it fails in place."""
    record: Any = delivery.native
    return {name: value.decode(errors="replace") for name, value in record.headers if value is not None}
