"""The envelope as a Kafka record, and back: key, value and timestamp native, the rest as headers of UTF-8 text.

`x-message-id` is on every record of ours; `x-content-type` unless it is JSON. The native timestamp is the message's, unless
that is older: retention counts from it, so a retry or a dead letter would be deleted for the age of its original.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from unibus.adapter import Outgoing
from unibus.channel import Inbox
from unibus.envelope import JSON, is_bare, read, time_text, write
from unibus.errors import ConfigError, MessageTooLarge
from unibus.inboxes import PLAIN, check_inbox, plain
from unibus.message import CONTENT_TYPE, ID, NO_HEADERS, NOT_BEFORE, RESERVED_HEADERS, TIMESTAMP, Message

_FRESH = 60.0  # seconds
_RECORD_OVERHEAD = 100  # bytes of a record beside key, value and headers, and of its batch
_INBOX = re.compile(rf"([{PLAIN}]{{0,60}}unibus\.reply\.[{PLAIN}]{{1,60}}):([0-9]{{1,6}}):([{PLAIN}]{{1,100}})")
_POSITION = re.compile(rf"([{PLAIN}]{{1,249}})/([0-9]{{1,9}})@([0-9]{{1,18}})")
_NAME = re.compile(rf"[{PLAIN}]{{1,249}}")

Written = tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]], int]  # key, value, headers, milliseconds


class Record(NamedTuple):
    """What `Delivery.native` is, by the names of aiokafka's ConsumerRecord. `timestamp`: milliseconds, -1 for none."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, Any]]  # bytes, or None

    @property
    def position(self) -> str:
        return f"{self.topic}/{self.partition}@{self.offset}"


record_of = partial(tuple.__new__, Record)  # of its fields in a tuple: its own constructor takes half as long again


def physical(name: str, of: object) -> str:
    """A topic or group as Kafka takes it."""
    if not _NAME.fullmatch(name) or name in {".", ".."}:
        raise ConfigError(f"{of}: {name!r} is no topic name for Kafka: 1 to 249 of A-Z a-z 0-9 . _ -; set another name")
    return name


def inbox_topic(prefix: str, service: str) -> str:
    return f"{prefix}unibus.reply.{plain(service)[:60]}"


def inbox_token(name: str) -> str:
    """What tells the replies to one process from the others': the end of its inbox' name is unique."""
    return plain(name)[-100:]


def reply_address(text: str) -> tuple[str, int, str]:
    """(topic, partition, token) of an untrusted reply_to. Raises Refused."""
    found = check_inbox(_INBOX, text, "<prefix>unibus.reply.<service>:<partition>:<token>")
    return found[1], int(found[2]), found[3]


def encode(outgoing: Outgoing, now: float, *, later: bool) -> Written:
    """`later`: it goes to a topic where it waits, so its time there begins now."""
    message, origin, at = outgoing.message, outgoing.origin, outgoing.message.timestamp
    headers: list[tuple[str, bytes | None]] = [(ID, message.id.encode())]
    if (content_type := message.content_type) is not None and content_type != JSON:
        headers.append((CONTENT_TYPE, content_type.encode()))
    bare = is_bare(message)
    if (  # the usual case, without what the others need
        bare
        and message.headers is NO_HEADERS
        and message.key is None
        and at is not None
        and 0 <= now - at < _FRESH
        and not later
        and outgoing.not_before is None
        and origin is None
        and type(outgoing.to) is not Inbox
    ):
        return None, message.body, headers, round(at * 1000)
    more: dict[str, str] = {}
    if not bare:
        write(message, more, brief=True)
        del more[ID]
    if outgoing.not_before is not None:
        more[NOT_BEFORE] = time_text(outgoing.not_before)
    at = now
    if message.timestamp is not None:
        if not later and 0 <= now - message.timestamp < _FRESH:
            at = message.timestamp
        else:
            more[TIMESTAMP] = time_text(message.timestamp)
    if message.headers is not NO_HEADERS:
        more |= message.headers
    if more:
        headers += [(name, text.encode()) for name, text in more.items()]
    key = None if message.key is None else message.key.encode("utf-8", "surrogateescape")
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


def too_large(outgoing: Outgoing, record: Written, most: int) -> MessageTooLarge | None:
    """Is a record refused, where a request has `most` bytes?"""
    key, value, headers, _ = record
    size = len(key or b"") + len(value or b"") + _RECORD_OVERHEAD
    if size + 64 * 1024 > most:
        size += sum(len(name) + len(v or b"") + 6 for name, v in headers)
    return MessageTooLarge(f"{outgoing.to}: {size} bytes; kafka.max_request_size is less") if size > most else None


def _text(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def decode(record: Any) -> tuple[Message, float | None]:
    """The envelope of a `Record`, and when it is due, where it says so."""
    _, _, _, timestamp, raw_key, value, headers = record
    if value is None:
        value = b""
    key = raw_key.decode("utf-8", "surrogateescape") if raw_key else None
    at = timestamp / 1000 if timestamp >= 0 else None
    many = len(headers)
    if 0 < many <= 2 and headers[0][0] == ID and (many == 1 or headers[1][0] == CONTENT_TYPE):  # as nearly all of ours
        try:
            id, content_type = headers[0][1].decode(), JSON if many == 1 else headers[1][1].decode()
        except (UnicodeDecodeError, AttributeError):  # not one of ours after all
            id = content_type = ""
        if id and content_type:
            return Message(value, id, None, content_type, NO_HEADERS, key, None, None, None, at), None
    texts = {name: text for name, raw in headers if (text := _text(raw)) is not None}  # the others stay on the record
    message = Message(value, "", None, None, NO_HEADERS, key, None, None, None, at)
    due = read(texts, message)
    if not message.id:
        message.id = record.position
    elif message.content_type is None:
        message.content_type = JSON
    return message, due


def parsed_position(text: str) -> tuple[str, int, int] | None:
    found = _POSITION.fullmatch(text)
    return (found[1], int(found[2]), int(found[3])) if found else None
