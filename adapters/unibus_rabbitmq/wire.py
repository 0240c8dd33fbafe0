"""The envelope as AMQP properties and headers, and back; and the bytes of both.

Native properties carry what AMQP has a field for, so that foreign producers and consumers interoperate: message_id, type,
content_type, correlation_id, reply_to, timestamp (whole seconds, as AMQP has them), priority, and expiration on replies.

- `message_id` is the logical id, unless a message with the same one is still unconfirmed on the channel: returned messages
  are told apart by it. Then it is the id with a suffix, and the logical id travels as `x-message-id`.
- `correlation_id` is the conversation's, except on a request (the request's message id, as every RPC client does it; the
  conversation's goes into `x-correlation-id`) and on a reply (the id of the request that it answers).
- A string that is too long for its property (255 bytes) goes into the header of the same meaning.

Written out rather than left to pamqp, for two reasons: pamqp changes foreign headers on the way (a double becomes a float, a
long name is cut), and it costs a multiple. See docs/decisions/0007-rabbitmq-reads-its-own-frames.md.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pamqp.commands import Basic
from pamqp.decode import embedded_value

from unibus import message as names
from unibus.adapter import Outgoing
from unibus.channel import Inbox
from unibus.envelope import read, read_time, time_text
from unibus.inboxes import inbox, inbox_shape
from unibus.message import BROKER_HEADERS, ENVELOPE_HEADERS, NO_HEADERS, Message
from unibus.retry import BROKER_LIMIT, EXPIRED

_LAST_SECOND = 1 << 63
_LONGEST_TTL = (1 << 32) - 1  # ms: for more the server closes the channel, with all that is on it
DEATH = "x-death"
DELIVERY_COUNT = "x-delivery-count"
# Never copied onward: the envelope's and the server's headers, and those that make the server send copies elsewhere.
_OURS = ENVELOPE_HEADERS | BROKER_HEADERS | {"CC", "BCC"}

# reply_to is untrusted. amq.rabbitmq.reply-to.* is not among these: a forged one makes the server close the connection.
_INBOX = re.compile(inbox_shape() + r"|amq\.gen-[A-Za-z0-9_-]{22}")

_u16 = struct.Struct(">H").unpack_from
_u32 = struct.Struct(">I").unpack_from
_u64 = struct.Struct(">Q").unpack_from
_tag = struct.Struct(">QB").unpack_from
_short, _long, _quad = (struct.Struct(form).pack for form in (">H", ">I", ">Q"))

# The properties in their order on the wire: flag, name, type.
_PROPERTIES = tuple((flag, name, Basic.Properties.amqp_type(name)) for name, flag in Basic.Properties.flags.items())
_layouts: dict[int, list[tuple[str, str]]] = {}  # flags -> names and kinds; few differ
_MOST_LAYOUTS = 1024  # of the 65,536 that somebody could make up


class Raw(bytes):
    """The value of a header as it came, type letter included: a copy of it is exact."""

    __slots__ = ()


class Received:
    """A delivery as it came: what `Delivery.native` is. `headers` holds the AMQP table with all its types.

    `properties` are those that are set, by their names in pamqp; `timestamp` a number.
    """

    __slots__ = ("_header", "_method", "_properties", "body", "redelivered", "tag")

    def __init__(self, method: bytes, header: bytes) -> None:
        """Of the payloads of basic.deliver and its content header."""
        self.tag, self.redelivered = _tag(method, 5 + method[4])
        self.body = b""
        self._method = method
        self._header = header
        self._properties: dict[str, Any] | None = None

    @property
    def exchange(self) -> str:
        return text(self._method, 14 + self._method[4])[0]

    @property
    def routing_key(self) -> str:
        return text(self._method, text(self._method, 14 + self._method[4])[1])[0]

    @property
    def properties(self) -> dict[str, Any]:
        if self._properties is None:
            self._properties = decode_properties(self._header)
        return self._properties

    @property
    def headers(self) -> Mapping[str, Any]:
        return self.properties.get("headers") or NO_HEADERS

    def raw_headers(self) -> dict[str, Raw]:
        """Those that are no text, exactly as they came."""
        found: dict[str, Raw] = {}
        decode_properties(self._header, found)
        return found

    def __repr__(self) -> str:
        return f"<Received {self.tag} {len(self.body)} bytes>"


def text(data: bytes, at: int) -> tuple[str, int]:
    """The short string at `at`, and where the next thing begins. Bytes that are no UTF-8 are kept as surrogates."""
    stop = at + 1 + data[at]
    return data[at + 1 : stop].decode(errors="surrogateescape"), stop


def body_size(header: bytes) -> int:
    size: int = _u64(header, 4)[0]
    return size


def encode_properties(properties: Mapping[str, Any]) -> bytes:
    """Flags and list. Raises ValueError for a string above 255 bytes or a number that is too large."""
    flags, parts = 0, list[bytes]()
    for flag, name, kind in _PROPERTIES:
        value = properties.get(name)
        if value is None or (not value and kind != "timestamp"):
            continue
        flags |= flag
        if kind == "shortstr":
            data = value.encode(errors="surrogateescape")
            parts += (bytes((len(data),)), data)
        elif kind == "table":
            table = encode_table(value)
            parts += (_long(len(table)), table)
        else:
            parts.append(bytes((value,)) if kind == "octet" else _quad(value))
    return _short(flags) + b"".join(parts)


def decode_properties(header: bytes, raw: dict[str, Raw] | None = None) -> dict[str, Any]:
    """Of a content header's payload. `raw` gets the headers that are no text."""
    found: dict[str, Any] = {}
    try:
        _read_properties(header, found, raw)
    except (IndexError, struct.error):  # cut off: what stands before counts, and the body is there all the same
        return found
    return found


def _read_properties(header: bytes, found: dict[str, Any], raw: dict[str, Raw] | None) -> None:
    """Into `found`. Raises IndexError or struct.error where the header ends too early."""
    flags = _u16(header, 12)[0]
    layout = _layouts.get(flags)
    if layout is None:
        layout = [(name, kind) for flag, name, kind in _PROPERTIES if flags & flag]
        if len(_layouts) < _MOST_LAYOUTS:
            _layouts[flags] = layout
    at = 14
    for name, kind in layout:
        if kind == "shortstr":
            found[name], at = text(header, at)
        elif kind == "table":
            start = at + 4
            at = start + _u32(header, at)[0]
            found[name] = decode_table(header, start, min(at, len(header)), raw)
        elif kind == "octet":
            found[name] = header[at]
            at += 1
        else:
            found[name] = _u64(header, at)[0]
            at += 8


def encode_table(headers: Mapping[str, str | Raw]) -> bytes:
    """A table, without its length."""
    parts: list[bytes] = []
    for name, value in headers.items():
        key = name.encode(errors="surrogateescape")
        if type(value) is str:
            data = value.encode(errors="surrogateescape")
            parts += (bytes((len(key),)), key, b"S", _long(len(data)), data)
        else:
            parts += (bytes((len(key),)), key, value)  # type: ignore[arg-type]  # Raw
    return b"".join(parts)


def decode_table(data: bytes, at: int, stop: int, raw: dict[str, Raw] | None = None) -> dict[str, Any]:
    """A table from `at` (after its length) to `stop`. Text becomes str, or bytes where it is no UTF-8.

    What can't be read hides what stands behind it, and goes along with it as bytes: a foreign header is no poison. Nor is one
    that is nested deeper than Python can go.
    """
    table: dict[str, Any] = {}
    while at < stop:
        name, start = text(data, at)
        if start >= stop:  # a name without a value
            break
        if data[start] == 83:  # S, by far the most
            at = start + 5 + _u32(data, start + 1)[0]
            try:
                table[name] = data[start + 5 : at].decode()
                continue
            except UnicodeDecodeError:
                table[name] = data[start + 5 : at]
        else:
            try:
                used, table[name] = embedded_value(data[start:stop])
                at = start + used
            except (ValueError, ArithmeticError, LookupError, OSError, RecursionError, struct.error):
                table[name], at = data[start:stop], stop
        if raw is not None:
            raw[name] = Raw(data[start:at])
    return table


def reply_address(address: str) -> Inbox:
    """The inbox behind an untrusted reply_to. Raises Refused."""
    return inbox(_INBOX, address, "...unibus.reply...., or a name made by the server (amq.gen-...)")


def encode(outgoing: Outgoing, message_id: str, not_before: float | None, now: float) -> bytes:
    """The property list. `not_before`: only where the message still needs another hop. Raises ValueError, TypeError."""
    message = outgoing.message
    reply = type(outgoing.to) is Inbox
    more: dict[str, str | Raw] = {}
    p: dict[str, Any] = {"delivery_mode": 2, "message_id": message_id, "priority": message.priority}
    if (at := message.timestamp) is not None:
        if 0 <= at < _LAST_SECOND:
            p["timestamp"] = int(at)
        else:  # a foreign header may say anything
            more[names.TIMESTAMP] = time_text(at)
    _put(p, more, "content_type", names.CONTENT_TYPE, message.content_type)
    _put(p, more, "message_type", names.TYPE, message.type)
    _put(p, more, "reply_to", names.REPLY_TO, message.reply_to)
    if reply or message.reply_to is not None:
        match = (names.CAUSATION_ID, message.causation_id) if reply else (names.ID, message.id)
        _put(p, more, "correlation_id", *match)
        if message.correlation_id is not None:
            more[names.CORRELATION_ID] = message.correlation_id
    else:
        _put(p, more, "correlation_id", names.CORRELATION_ID, message.correlation_id)
    if not reply and message.causation_id is not None:
        more[names.CAUSATION_ID] = message.causation_id
    if message_id != message.id:
        more[names.ID] = message.id
    if message.key is not None:
        more[names.KEY] = message.key
    if message.expires_at is not None:
        more[names.EXPIRES_AT] = time_text(message.expires_at)
        if reply:
            p["expiration"] = str(round(min(max(0.0, message.expires_at - now) * 1000, _LONGEST_TTL)))
    if not_before is not None:
        more[names.NOT_BEFORE] = time_text(not_before)
    if outgoing.origin is not None and isinstance(outgoing.origin.native, Received):
        native = outgoing.origin.native
        p["content_encoding"] = native.properties.get("content_encoding")
        p["app_id"] = native.properties.get("app_id")
        more |= {name: value for name, value in native.raw_headers().items() if name not in _OURS}
    p["headers"] = {**message.headers, **more} if more else message.headers
    return encode_properties(p)


def _put(p: dict[str, Any], more: dict[str, str | Raw], name: str, header: str, value: str | None) -> None:
    if value is None or len(value) <= 63 or len(value.encode(errors="surrogateescape")) <= 255:
        p[name] = value
    else:
        more[header] = value


def decode(received: Received, *, inbox: bool, fallback: str) -> Message:
    """The envelope of a delivery. `fallback`: its id if the producer gave none."""
    get = received.properties.get
    native, timestamp, reply_to = get("headers"), get("timestamp"), get("reply_to")
    correlation_id, message_id = get("correlation_id"), get("message_id")
    causation_id: str | None = None
    if inbox:
        correlation_id, causation_id = None, correlation_id
    elif reply_to is not None or (native and names.REPLY_TO in native):
        # A foreign requester matches on its correlation id, whatever message id it gave.
        message_id = correlation_id or message_id
        correlation_id = None
    message = Message(
        received.body,
        message_id or fallback,
        get("message_type"),
        get("content_type"),
        NO_HEADERS,
        None,
        correlation_id,
        causation_id,
        reply_to,
        None if timestamp is None else float(timestamp),
        None,
        get("priority"),
    )
    if native:
        read({n: v for n, v in native.items() if type(v) is str and n not in BROKER_HEADERS}, message)
        if causation_id is not None:
            message.causation_id = causation_id  # what a reply is matched by
    return message


def not_before(headers: Mapping[str, Any]) -> float | None:
    """When the message is due, if it came back from a hold queue for another hop."""
    return read_time(headers.get(names.NOT_BEFORE))


def deliveries(received: Received, *, counted: bool) -> int:
    """How often it was handed out; a queue that does not count only knows "once" and "more than once"."""
    count = received.headers.get(DELIVERY_COUNT)
    if type(count) is int:
        return count + 1
    return 2 if received.redelivered and not counted else 1


def broker_death(received: Received) -> tuple[str, float | None, str]:
    """Of what the server dead-lettered: why (a value of `x-dlq-reason`), when (epoch seconds), and in which queue it was."""
    deaths = received.headers[DEATH]
    last = deaths[0] if deaths and isinstance(deaths[0], dict) else {}
    moved = last.get("time")
    return (
        EXPIRED if last.get("reason") == "expired" else BROKER_LIMIT,
        moved.timestamp() if isinstance(moved, datetime) else None,
        str(last.get("queue", "")),
    )
