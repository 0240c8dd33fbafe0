"""The envelope as a Kafka record, and back: key, value and timestamp native, the rest as headers of UTF-8 text.

`x-message-id` is on every record of ours; `x-content-type` unless it is JSON. The native timestamp is the message's, unless
that is older: retention counts from it, so a retry or a dead letter would be deleted for the age of its original.
"""

from __future__ import annotations

import re
from typing import Any

from unibus.adapter import Outgoing
from unibus.channel import Inbox
from unibus.errors import ConfigError, Refused
from unibus.message import (
    CAUSATION_ID,
    CONTENT_TYPE,
    CORRELATION_ID,
    ENVELOPE_HEADERS,
    EXPIRES_AT,
    ID,
    NO_HEADERS,
    NOT_BEFORE,
    REPLY_TO,
    RESERVED_HEADERS,
    TIMESTAMP,
    TYPE,
    Message,
)

JSON = "application/json"
_FRESH = 60.0  # seconds
_INBOX = re.compile(r"([A-Za-z0-9._-]{0,60}unibus\.reply\.[A-Za-z0-9._-]{1,60}):(\d{1,6}):([A-Za-z0-9._-]{1,100})")
_POSITION = re.compile(r"([A-Za-z0-9._-]{1,249})/(\d{1,9})@(\d{1,18})")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,249}")

Record = tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]], int]  # key, value, headers, milliseconds


def physical(name: str, of: object) -> str:
    """A topic or group as Kafka takes it."""
    if not _NAME.fullmatch(name) or name in {".", ".."}:
        raise ConfigError(f"{of}: {name!r} is no topic name for Kafka: 1 to 249 of A-Z a-z 0-9 . _ -; set another name")
    return name


def inbox_topic(prefix: str, service: str) -> str:
    return f"{prefix}unibus.reply.{re.sub(r'[^A-Za-z0-9._-]', '-', service)[:60]}"


def inbox_token(name: str) -> str:
    """What tells the replies to one process from the others': the end of its inbox' name is unique."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[-100:]


def reply_address(text: str) -> tuple[str, int, str]:
    """(topic, partition, token) of an untrusted reply_to. Raises Refused."""
    found = _INBOX.fullmatch(text)
    if not found:
        raise Refused(
            "the reply address is no inbox of unibus on Kafka: <prefix>unibus.reply.<service>:<partition>:<token>"
        )
    return found[1], int(found[2]), found[3]


def encode(outgoing: Outgoing, now: float, *, later: bool) -> Record:
    """`later`: it goes to a topic where it waits, so its time there begins now."""
    message, origin = outgoing.message, outgoing.origin
    headers: list[tuple[str, bytes | None]] = [(ID, message.id.encode())]
    add = headers.append
    if (content_type := message.content_type) is not None and content_type != JSON:
        add((CONTENT_TYPE, content_type.encode()))
    if message.type is not None:
        add((TYPE, message.type.encode()))
    if message.correlation_id is not None and message.correlation_id != message.id:
        add((CORRELATION_ID, message.correlation_id.encode()))
    if message.causation_id is not None:
        add((CAUSATION_ID, message.causation_id.encode()))
    if message.reply_to is not None:
        add((REPLY_TO, message.reply_to.encode()))
    if message.expires_at is not None:
        add((EXPIRES_AT, b"%.3f" % message.expires_at))
    if outgoing.not_before is not None:
        add((NOT_BEFORE, b"%.3f" % outgoing.not_before))
    at = now
    if message.timestamp is not None:
        if not later and 0 <= now - message.timestamp < _FRESH:
            at = message.timestamp
        else:
            add((TIMESTAMP, b"%.3f" % message.timestamp))
    for name, text in message.headers.items():
        add((name, text.encode()))
    key = None if message.key is None else message.key.encode(errors="surrogateescape")
    value: bytes | None = message.body
    native: Any = None if origin is None else origin.native
    if type(outgoing.to) is Inbox:
        key = reply_address(outgoing.to.name)[2].encode()
    elif native is not None:
        # What a foreign record has beyond the envelope: no value, no text, a name twice.
        if not value and native.value is None:
            value = None
        if key is None:
            key = native.key
        names = [name for name, _ in native.headers]
        odd = {n for n, v in native.headers if _text(v) is None or names.count(n) > 1} - RESERVED_HEADERS
        if odd:
            headers = [(n, v) for n, v in headers if n not in odd] + [(n, v) for n, v in native.headers if n in odd]
    return key, value, headers, round(at * 1000)


def _text(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _time(value: str | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:  # a foreign header of the same name
        return None


def decode(record: Any) -> Message:
    """The envelope of a record. Written out, since every message comes by here."""
    value, key, at = record.value, record.key, record.timestamp
    headers: dict[str, str] = {}
    ours: dict[str, str] = {}
    for name, raw in record.headers:
        try:
            (ours if name in ENVELOPE_HEADERS else headers)[name] = raw.decode()
        except (UnicodeDecodeError, AttributeError):  # bytes that are no text, or no value: they stay on the record
            continue
    get = ours.get
    id, content_type = get(ID), get(CONTENT_TYPE)
    message = Message(
        b"" if value is None else value,
        id or position(record),
        None,
        JSON if content_type is None and id else content_type,
        headers or NO_HEADERS,
        key.decode(errors="surrogateescape") if key else None,
    )
    message.timestamp = at / 1000 if at >= 0 else None
    if len(ours) > (ID in ours) + (content_type is not None):
        message.type, message.reply_to = get(TYPE), get(REPLY_TO)
        message.correlation_id, message.causation_id = get(CORRELATION_ID), get(CAUSATION_ID)
        message.expires_at = _time(get(EXPIRES_AT))
        if TIMESTAMP in ours:
            message.timestamp = _time(ours[TIMESTAMP])
    return message


def not_before(record: Any) -> float | None:
    """When a record is due that was delayed."""
    for name, value in record.headers:
        if name == NOT_BEFORE:
            return _time(_text(value))
    return None


def parsed_position(text: str) -> tuple[str, int, int] | None:
    found = _POSITION.fullmatch(text)
    return (found[1], int(found[2]), int(found[3])) if found else None


def position(record: Any) -> str:
    return f"{record.topic}/{record.partition}@{record.offset}"
