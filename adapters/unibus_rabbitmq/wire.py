"""The envelope as AMQP properties and headers, and back.

Native properties carry what AMQP has a field for, so that foreign producers and consumers interoperate: message_id, type,
content_type, correlation_id, reply_to, timestamp (whole seconds, as AMQP has them), priority, and expiration on replies.

- `message_id` is the logical id, unless a message with the same one is still unconfirmed on the channel: returned messages
  are told apart by it. Then it is the id with a suffix, and the logical id travels as `x-message-id`.
- `correlation_id` is the conversation's, except on a request (the request's message id, as every RPC client does it; the
  conversation's goes into `x-correlation-id`) and on a reply (the id of the request that it answers).
- A string that is too long for its property (255 bytes) goes into the header of the same meaning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from unibus.adapter import Outgoing
from unibus.channel import Inbox
from unibus.deadletter import stamp
from unibus.envelope import read, read_time, time_text
from unibus.inboxes import inbox, inbox_shape
from unibus.message import (
    BROKER_HEADERS,
    CAUSATION_ID,
    CONTENT_TYPE,
    CORRELATION_ID,
    DLQ_REASON,
    ENVELOPE_HEADERS,
    EXPIRES_AT,
    ID,
    KEY,
    MOVED_TO_DLQ_AT,
    NO_HEADERS,
    NOT_BEFORE,
    ORIGINAL_DESTINATION,
    REPLY_TO,
    TYPE,
    Message,
)
from unibus.retry import BROKER_LIMIT, EXPIRED
from unibus_rabbitmq import frames
from unibus_rabbitmq.tables import Raw

DEATH = "x-death"
DELIVERY_COUNT = "x-delivery-count"
# Not the user's: the envelope's, and what the server writes. Never copied onward.
_OURS = ENVELOPE_HEADERS | BROKER_HEADERS
# The server sends copies to the addresses in these; a retry must reach one queue only.
_SENDER_SELECTED = frozenset(("CC", "BCC"))
_LONGEST = 255

# reply_to is untrusted. amq.rabbitmq.reply-to.* is not among these: a forged one makes the server close the connection.
_INBOX = re.compile(inbox_shape() + r"|amq\.gen-[A-Za-z0-9_-]{22}")


class Received:
    """A delivery as it came: what `Delivery.native` is. `headers` holds the AMQP table with all its types."""

    __slots__ = ("_header", "_method", "_names_at", "_properties", "body", "redelivered", "tag")

    def __init__(self, tag: int, redelivered: bool, method: bytes, names_at: int, header: bytes) -> None:
        self.tag = tag
        self.redelivered = redelivered
        self.body = b""
        self._method = method
        self._names_at = names_at
        self._header = header
        self._properties: frames.Properties | None = None

    @property
    def exchange(self) -> str:
        return frames.read_shorts(self._method, self._names_at, 2)[0]

    @property
    def routing_key(self) -> str:
        return frames.read_shorts(self._method, self._names_at, 2)[1]

    @property
    def properties(self) -> frames.Properties:
        if self._properties is None:
            self._properties = frames.decode_properties(self._header)
        return self._properties

    @property
    def headers(self) -> Mapping[str, Any]:
        return self.properties.headers or NO_HEADERS

    def raw_headers(self) -> Mapping[str, Raw]:
        """Those that are no text, exactly as they came."""
        return frames.raw_headers(self._header)

    def __repr__(self) -> str:
        return f"<Received {self.tag} {len(self.body)} bytes>"


def reply_address(text: str) -> Inbox:
    """The inbox behind an untrusted reply_to. Raises Refused."""
    return inbox(_INBOX, text, "...unibus.reply...., or a name made by the server (amq.gen-...)")


def encode(outgoing: Outgoing, message_id: str, not_before: float | None, now: float) -> tuple[int, bytes]:
    """Property flags and bytes. `not_before`: only where the message still needs another hop."""
    message = outgoing.message
    reply = type(outgoing.to) is Inbox
    p = frames.Properties()
    more: dict[str, Any] = {}
    p.message_id = message_id
    p.content_type = _fit(message.content_type, CONTENT_TYPE, more)
    p.type = _fit(message.type, TYPE, more)
    p.reply_to = _fit(message.reply_to, REPLY_TO, more)
    p.priority = message.priority
    if message.timestamp is not None:
        p.timestamp = int(message.timestamp)
    if reply or message.reply_to is not None:
        p.correlation_id = _fit(message.causation_id if reply else message.id, CAUSATION_ID if reply else ID, more)
        if message.correlation_id is not None:
            more[CORRELATION_ID] = message.correlation_id
    else:
        p.correlation_id = _fit(message.correlation_id, CORRELATION_ID, more)
    if not reply and message.causation_id is not None:
        more[CAUSATION_ID] = message.causation_id
    if message_id != message.id:
        more[ID] = message.id
    if message.key is not None:
        more[KEY] = message.key
    if message.expires_at is not None:
        more[EXPIRES_AT] = time_text(message.expires_at)
        if reply:
            p.expiration = str(max(0, round((message.expires_at - now) * 1000)))
    if not_before is not None:
        more[NOT_BEFORE] = time_text(not_before)
    if outgoing.origin is not None and isinstance(outgoing.origin.native, Received):
        _copy_native(outgoing.origin.native, p, more)
    p.headers = {**message.headers, **more} if more else message.headers
    return frames.encode_properties(p)


def _fit(text: str | None, header: str, more: dict[str, Any]) -> str | None:
    if text is None or len(text) <= 63 or len(text.encode(errors="surrogateescape")) <= _LONGEST:
        return text
    more[header] = text
    return None


def _copy_native(origin: Received, p: frames.Properties, more: dict[str, Any]) -> None:
    """What a foreign message has beyond the envelope."""
    p.content_encoding = origin.properties.content_encoding
    p.app_id = origin.properties.app_id
    foreign = origin.raw_headers()
    more.update({n: v for n, v in foreign.items() if n not in _OURS and n not in _SENDER_SELECTED})


def decode(received: Received, *, inbox: bool, fallback: str) -> Message:
    """The envelope of a delivery. `fallback`: its id if the producer gave none."""
    p = received.properties
    native = p.headers or NO_HEADERS
    correlation_id, causation_id, message_id = p.correlation_id, None, p.message_id
    if inbox:
        correlation_id, causation_id = None, correlation_id
    elif p.reply_to is not None or REPLY_TO in native:
        # A foreign requester matches on its correlation id, whatever message id it gave.
        message_id = correlation_id or message_id
        correlation_id = None
    message = Message(
        received.body,
        message_id or fallback,
        p.type,
        p.content_type,
        NO_HEADERS,
        None,
        correlation_id,
        causation_id,
        p.reply_to,
        None if p.timestamp is None else float(p.timestamp),
        None,
        p.priority,
    )
    if native:
        read({n: v for n, v in native.items() if type(v) is str and n not in BROKER_HEADERS}, message)
        if inbox and p.correlation_id is not None:
            message.causation_id = p.correlation_id  # what a reply is matched by
    return message


def not_before(headers: Mapping[str, Any]) -> float | None:
    """When the message is due, if it came back from a hold queue for another hop."""
    return read_time(headers.get(NOT_BEFORE))


def deliveries(received: Received, *, counted: bool) -> int:
    """How often it was handed out; a queue that does not count only knows "once" and "more than once"."""
    headers = received.properties.headers
    count = headers.get(DELIVERY_COUNT) if headers else None
    if type(count) is int:
        return count + 1
    return 2 if received.redelivered and not counted else 1


def broker_death(received: Received) -> dict[str, str]:
    """For a message in a dead-letter queue: the headers that are missing because the server itself put it there."""
    headers = received.properties.headers
    deaths = headers.get(DEATH) if headers else None
    if not headers or not isinstance(deaths, list) or DLQ_REASON in headers:
        return {}
    last = deaths[0] if deaths and isinstance(deaths[0], dict) else {}
    found = {
        DLQ_REASON: EXPIRED if last.get("reason") == "expired" else BROKER_LIMIT,
        ORIGINAL_DESTINATION: str(last.get("queue", "")),
    }
    if isinstance(moved := last.get("time"), datetime):
        found[MOVED_TO_DLQ_AT] = stamp(moved.timestamp())
    return found
