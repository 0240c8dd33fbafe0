"""The AMQP 0-9-1 frames that travel once per message: publish, deliver, return, ack.

pamqp and aiormq do all the rest. Their generic codec costs a multiple of the work of these few fixed layouts, and it is
most of what a message costs.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from unibus_rabbitmq import tables
from unibus_rabbitmq.tables import name, short

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
END = b"\xce"
BEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"
OVERHEAD = 8  # bytes of a frame beside its payload

BLOCKED, UNBLOCKED, CLOSE = b"\x00\x0a\x00\x3c", b"\x00\x0a\x00\x3d", b"\x00\x0a\x00\x32"
CHANNEL_CLOSE = b"\x00\x14\x00\x28"
RETURN, DELIVER = b"\x00\x3c\x00\x32", b"\x00\x3c\x00\x3c"
ACK, NACK = b"\x00\x3c\x00\x50", b"\x00\x3c\x00\x78"

frame_head = struct.Struct(">BHI").unpack_from  # type, channel, size of the payload
_frame = struct.Struct(">BHI").pack
_settle = struct.Struct(">BHIIQBB").pack
_content = struct.Struct(">BHIIQH").pack
_tag = struct.Struct(">QB").unpack_from
_u16 = struct.Struct(">H").unpack_from
_u32 = struct.Struct(">I").unpack_from
_u64 = struct.Struct(">Q").unpack_from
_long = struct.Struct(">I").pack
_quad = struct.Struct(">Q").pack

# Bits of the property flags, in the order of the properties on the wire.
_CONTENT_TYPE, _ENCODING, _HEADERS, _DELIVERY_MODE = 1 << 15, 1 << 14, 1 << 13, 1 << 12
_PRIORITY, _CORRELATION_ID, _REPLY_TO, _EXPIRATION = 1 << 11, 1 << 10, 1 << 9, 1 << 8
_MESSAGE_ID, _TIMESTAMP, _TYPE, _USER_ID, _APP_ID, _CLUSTER_ID = 1 << 7, 1 << 6, 1 << 5, 1 << 4, 1 << 3, 1 << 2
_PERSISTENT = b"\x02"


class Properties:
    """What AMQP knows of a message. `headers` as they are: any AMQP type; unibus' own are strings."""

    __slots__ = (
        "app_id",
        "content_encoding",
        "content_type",
        "correlation_id",
        "delivery_mode",
        "expiration",
        "headers",
        "message_id",
        "priority",
        "reply_to",
        "timestamp",
        "type",
        "user_id",
    )

    def __init__(self) -> None:
        self.content_type: str | None = None
        self.content_encoding: str | None = None
        self.headers: Mapping[str, Any] | None = None
        self.delivery_mode: int | None = None
        self.priority: int | None = None
        self.correlation_id: str | None = None
        self.reply_to: str | None = None
        self.expiration: str | None = None
        self.message_id: str | None = None
        self.timestamp: int | None = None
        self.type: str | None = None
        self.user_id: str | None = None
        self.app_id: str | None = None


def publish_frame(channel: int, exchange: str, routing_key: str) -> bytes:
    """basic.publish, mandatory. The same bytes for every message of one channel to one address."""
    payload = b"\x00\x3c\x00\x28\x00\x00" + short(exchange) + short(routing_key) + b"\x01"
    return _frame(METHOD, channel, len(payload)) + payload + END


def encode_properties(properties: Properties) -> tuple[int, bytes]:
    """Flags and bytes of the property list; always persistent. Raises ValueError for a string that is too long."""
    p = properties
    flags = _DELIVERY_MODE
    parts: list[bytes] = []
    if p.content_type:
        flags |= _CONTENT_TYPE
        parts.append(name(p.content_type))
    if p.content_encoding:
        flags |= _ENCODING
        parts.append(name(p.content_encoding))
    if p.headers:
        flags |= _HEADERS
        table = tables.encode(p.headers)
        parts += (_long(len(table)), table)
    parts.append(_PERSISTENT)
    if p.priority:
        flags |= _PRIORITY
        parts.append(bytes((p.priority,)))
    if p.correlation_id:
        flags |= _CORRELATION_ID
        parts.append(short(p.correlation_id))
    if p.reply_to:
        flags |= _REPLY_TO
        parts.append(name(p.reply_to))
    if p.expiration:
        flags |= _EXPIRATION
        parts.append(short(p.expiration))
    if p.message_id:
        flags |= _MESSAGE_ID
        parts.append(short(p.message_id))
    if p.timestamp is not None:
        flags |= _TIMESTAMP
        parts.append(_quad(p.timestamp))
    if p.type:
        flags |= _TYPE
        parts.append(name(p.type))
    if p.app_id:
        flags |= _APP_ID
        parts.append(name(p.app_id))
    return flags, b"".join(parts)


def content_frames(channel: int, flags: int, properties: bytes, body: bytes, frame_max: int) -> list[bytes]:
    """The header frame and the body frames."""
    size = len(body)
    frames = [_content(HEADER, channel, 14 + len(properties), 60 << 16, size, flags), properties, END]
    if not size:
        return frames
    room = frame_max - OVERHEAD
    if size <= room:
        frames += (_frame(BODY, channel, size), body, END)
        return frames
    for start in range(0, size, room):
        part = body[start : start + room]
        frames += (_frame(BODY, channel, len(part)), part, END)
    return frames


def ack_frame(channel: int, tag: int, multiple: bool) -> bytes:
    return _settle(METHOD, channel, 13, 0x003C0050, tag, multiple, 0xCE)


def nack_frame(channel: int, tag: int) -> bytes:
    """basic.nack of one delivery, back to its queue."""
    return _settle(METHOD, channel, 13, 0x003C0078, tag, 2, 0xCE)


def read_confirm(payload: bytes) -> tuple[int, int]:
    """Delivery tag and flags (1: multiple) of a basic.ack or basic.nack."""
    tag, flags = _tag(payload, 4)
    return tag, flags


def read_deliver(payload: bytes) -> tuple[int, bool, int]:
    """Delivery tag, redelivered, and where exchange and routing key begin."""
    at = 5 + payload[4]
    tag, redelivered = _tag(payload, at)
    return tag, bool(redelivered), at + 9


def read_shorts(payload: bytes, at: int, count: int) -> list[str]:
    """`count` short strings from `at` on. Foreign bytes that are no UTF-8 are kept as surrogates."""
    found = []
    for _ in range(count):
        stop = at + 1 + payload[at]
        found.append(payload[at + 1 : stop].decode(errors="surrogateescape"))
        at = stop
    return found


def read_reason(payload: bytes) -> tuple[int, str]:
    """Reply code and text of a close or a return."""
    return _u16(payload, 4)[0], read_shorts(payload, 6, 1)[0]


def body_size(payload: bytes) -> int:
    """Of a content header."""
    size: int = _u64(payload, 4)[0]
    return size


def decode_properties(payload: bytes) -> Properties:
    """The property list of a content header frame's payload."""
    p = Properties()
    flags = _u16(payload, 12)[0]
    at = 14

    def text() -> str:
        nonlocal at
        start = at + 1
        at = start + payload[at]
        return payload[start:at].decode(errors="surrogateescape")

    if flags & _CONTENT_TYPE:
        p.content_type = text()
    if flags & _ENCODING:
        p.content_encoding = text()
    if flags & _HEADERS:
        start = at + 4
        at = start + _u32(payload, at)[0]
        p.headers = tables.decode(payload, start, at)
    if flags & _DELIVERY_MODE:
        p.delivery_mode = payload[at]
        at += 1
    if flags & _PRIORITY:
        p.priority = payload[at]
        at += 1
    if flags & _CORRELATION_ID:
        p.correlation_id = text()
    if flags & _REPLY_TO:
        p.reply_to = text()
    if flags & _EXPIRATION:
        p.expiration = text()
    if flags & _MESSAGE_ID:
        p.message_id = text()
    if flags & _TIMESTAMP:
        p.timestamp = _u64(payload, at)[0]
        at += 8
    if flags & _TYPE:
        p.type = text()
    if flags & _USER_ID:
        p.user_id = text()
    if flags & _APP_ID:
        p.app_id = text()
    return p


def raw_headers(payload: bytes) -> dict[str, tables.Raw]:
    """Of a content header: the headers that are no text, exactly as they came."""
    flags = _u16(payload, 12)[0]
    if not flags & _HEADERS:
        return {}
    at = 14
    for bit in (_CONTENT_TYPE, _ENCODING):
        if flags & bit:
            at += 1 + payload[at]
    return tables.raw(payload, at + 4, at + 4 + _u32(payload, at)[0])
