"""AMQP field tables: message headers with all the types that RabbitMQ and its clients use."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

_u32 = struct.Struct(">I").unpack_from
_long = struct.Struct(">I").pack

# Type letter -> format of its value.
_NUMBERS = {
    ord(letter): struct.Struct(f)
    for letter, f in {
        "b": ">b",
        "B": ">B",
        "s": ">h",
        "u": ">H",
        "I": ">i",
        "i": ">I",
        "l": ">q",
        "L": ">q",
        "f": ">f",
        "d": ">d",
    }.items()
}


class Raw(bytes):
    """A value as it came, type letter included: a copy of it is exact."""

    __slots__ = ()


def short(text: str) -> bytes:
    """A short string: at most 255 bytes. Raises ValueError. Foreign bytes that are no UTF-8 go back as they came."""
    data = text.encode(errors="surrogateescape")
    return bytes((len(data),)) + data


_names: dict[str, bytes] = {}


def name(text: str) -> bytes:
    """A short string that comes again and again: a header's name, a type, a content type."""
    known = _names.get(text)
    if known is None:
        if len(_names) > 2000:  # names made up at run time must not fill the memory
            _names.clear()
        known = _names[text] = short(text)
    return known


def encode(headers: Mapping[str, str | Raw]) -> bytes:
    """A table, without its length."""
    parts: list[bytes] = []
    for key, value in headers.items():
        if type(value) is str:
            data = value.encode(errors="surrogateescape")
            parts += (name(key), b"S", _long(len(data)), data)
        else:
            parts += (name(key), value)  # type: ignore[arg-type]  # Raw
    return b"".join(parts)


def decode(data: bytes, at: int, stop: int) -> dict[str, Any]:
    """A table from `at` (after its length) to `stop`. Long strings become str, or bytes where they are no UTF-8."""
    table: dict[str, Any] = {}
    while at < stop:
        end = at + 1 + data[at]
        key = data[at + 1 : end].decode(errors="surrogateescape")
        if data[end] == 83:  # S, by far the most
            start = end + 5
            at = start + _u32(data, end + 1)[0]
            table[key] = _string(data[start:at])
        else:
            table[key], at = _value(data, end)
    return table


def raw(data: bytes, at: int, stop: int) -> dict[str, Raw]:
    """The values that are no text."""
    table: dict[str, Raw] = {}
    while at < stop:
        end = at + 1 + data[at]
        value, after = _value(data, end)
        if type(value) is not str:
            table[data[at + 1 : end].decode(errors="surrogateescape")] = Raw(data[end:after])
        at = after
    return table


def _string(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _value(data: bytes, at: int) -> tuple[Any, int]:
    """The value whose type letter is at `at`, and where the next thing begins. Raises ValueError."""
    kind = data[at]
    at += 1
    number = _NUMBERS.get(kind)
    if number is not None:
        return number.unpack_from(data, at)[0], at + number.size
    if kind in _SIZED:
        start = at + 4
        stop = start + _u32(data, at)[0]
        return _SIZED[kind](data, start, stop), stop
    match chr(kind):
        case "t":
            return bool(data[at]), at + 1
        case "T":
            return _time(int.from_bytes(data[at : at + 8])), at + 8
        case "D":
            return Decimal(int.from_bytes(data[at + 1 : at + 5], signed=True)).scaleb(-data[at]), at + 5
        case "V" | "\0":
            return None, at
    raise ValueError(f"a header of the unknown AMQP type {chr(kind)!r}")


def _array(data: bytes, at: int, stop: int) -> list[Any]:
    items = []
    while at < stop:
        item, at = _value(data, at)
        items.append(item)
    return items


def _time(seconds: int) -> datetime | int:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError):
        return seconds  # some producers write milliseconds


# Type letters of values that begin with their length.
_SIZED: dict[int, Callable[[bytes, int, int], Any]] = {
    ord("S"): lambda data, at, stop: _string(data[at:stop]),
    ord("x"): lambda data, at, stop: data[at:stop],
    ord("F"): decode,
    ord("A"): _array,
}
