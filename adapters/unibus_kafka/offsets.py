"""One partition in our hands: what of it is finished, and how that is written into the metadata of a commit.

The committed offset is the first unfinished one. What is finished beyond it stands in the commit's metadata, so that a
restart runs nothing again that had finished:

    u1: base64( varint highest - offset, then for each unfinished one up to `highest`: varint (distance to the one before
    << 1 | failed), and if it failed in place: varint failures; then the CRC of all that and of the offset ) NUL

The NUL is for clients that read metadata as C strings. What can't be read is ignored: the records are handled again.
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
_MARK = "u1:"
_BYTES = (LIMIT - len(_MARK) - 1) // 4 * 3 - 4  # without the CRC


def encode(offset: int, highest: int, unfinished: Iterable[tuple[int, int]]) -> str:
    """The metadata of a commit of `offset`. `unfinished`: (offset, failures), ascending, up to `highest`.

    What doesn't fit is left out from the end: it counts as unfinished.
    """
    entries, last = bytearray(), offset
    for number, failures in unfinished:
        entry = _varint((number - last) << 1 | bool(failures)) + (_varint(failures) if failures else b"")
        if len(entries) + len(entry) + 9 > _BYTES:
            highest = last
            break
        entries += entry
        last = number
    data = _varint(highest - offset) + bytes(entries)
    return _MARK + base64.b64encode(data + _checksum(offset, data)).decode() + "\0"


def decode(offset: int, text: str) -> tuple[int, dict[int, int]] | None:
    """(highest, unfinished offset -> failures) of a commit's metadata; None where it isn't ours, or damaged."""
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
    found: dict[int, int] = {}
    number, rest = offset, iter(numbers[1:])
    for step in rest:
        number += step >> 1
        found[number] = next(rest, 0) if step & 1 else 0
    return offset + numbers[0], found


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
        "committed", "failures", "full", "held", "highest", "name", "open", "out", "owned", "seconds", "start", "tp", "tracker"
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
        self.highest, self.open = found if found is not None else (start - 1, {})
        self.failures = {number: count for number, count in self.open.items() if count}

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
        self.failures.pop(offset, None)

    def remember(self, offset: int, delivery: Delivery[Any]) -> None:
        """Keep what failed in place: the header has only what was counted before it was sent."""
        failures = delivery.failures - retry_count(native_headers(delivery))
        if failures > 0:
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
        highest = max(finished, *self.failures) if self.failures else finished
        if highest <= first and not self.failures:
            return first, ""
        unfinished = [*tracker, *later]
        return first, encode(first, highest, ((n, self.failures.get(n, 0)) for n in unfinished if n <= highest))

    def lose(self) -> None:
        self.owned = False
        for delivery in self.out.values():
            delivery.lost = True
        self.out.clear()


def native_headers(delivery: Delivery[Any]) -> Mapping[str, str]:
    """Of the record as it was read: the core rewrites those of the message when it fails in place."""
    record: Any = delivery.native
    return {name: value.decode(errors="replace") for name, value in record.headers if value is not None}
