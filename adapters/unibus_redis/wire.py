"""The envelope as the fields of a stream entry, and back.

`body` holds the bytes, `headers` a JSON object with the rest: the user's headers and, under the names that are the same on every
broker, what the envelope has beside the body. A timestamp is not written where the id of the entry says the same.

An entry without `body` is somebody else's: its body is the JSON of its fields. Fields beside these two are headers where they
are text; all else, and what is larger than headers may be, stays on `Entry` and is copied to retries and dead letters.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from unibus.adapter import Outgoing
from unibus.channel import Inbox
from unibus.envelope import JSON, is_bare, packed, packed_bare, read, write
from unibus.inboxes import inbox, inbox_shape
from unibus.message import (
    ENVELOPE_HEADERS,
    NO_HEADERS,
    Message,
)

BODY, HEADERS = b"body", b"headers"
_dump = json.JSONEncoder(separators=(",", ":")).encode
_load = json.JSONDecoder().raw_decode
SEPARATOR = ":"  # in the names of inboxes
_INBOX = re.compile(inbox_shape(SEPARATOR))
_MOST = 8 * 1024 * 1024  # bytes of a field that is looked into: what a sender of ours may write, with all of it escaped


class Entry:
    """An entry as it came: what `Delivery.native` is. `deliveries`: how often it was handed out, this time included."""

    __slots__ = ("deliveries", "fields", "id", "key", "until")

    def __init__(self, key: str, raw: list[Any], deliveries: int, until: float) -> None:
        self.key = key
        self.id: bytes = raw[0]
        self.fields: list[bytes] = raw[1]
        self.deliveries = deliveries
        self.until = until

    @property
    def position(self) -> str:
        return f"{self.key}@{self.id.decode()}"

    def foreign(self) -> tuple[list[bytes], dict[str, Any]]:
        """What the envelope can't hold: fields and headers."""
        pairs = list(zip(self.fields[::2], self.fields[1::2], strict=True))
        if BODY not in (name for name, _ in pairs):
            return [], {}
        odd = [part for pair in pairs if pair[0] not in (BODY, HEADERS) and not _text(*pair) for part in pair]
        return odd, {n: v for n, v in _headers(dict(pairs).get(HEADERS)).items() if type(v) is not str}

    def __repr__(self) -> str:
        return f"<Entry {self.position}>"


def reply_address(text: str) -> Inbox:
    """The inbox behind an untrusted reply_to. Raises Refused."""
    return inbox(_INBOX, text, "...unibus:reply:...")


def encode(outgoing: Outgoing, now: float) -> list[Any]:
    """Names and values in turn."""
    message, origin = outgoing.message, outgoing.origin
    stamped = origin is not None or outgoing.not_before or abs(now - (message.timestamp or now)) > 1
    if not stamped and message.headers is NO_HEADERS and message.key is None and is_bare(message):
        return [BODY, message.body, HEADERS, packed_bare(message.id, message.content_type)]
    headers: dict[str, Any] = {}
    more: list[bytes] = []
    pack: Callable[[dict[str, Any]], str] = packed
    if origin is not None and isinstance(origin.native, Entry):
        more, odd = origin.native.foreign()
        if odd:  # values that are no texts
            headers |= odd
            pack = _dump
    if message.headers is not NO_HEADERS:
        headers |= message.headers
    write(message, headers, message.timestamp if stamped else None)
    return [BODY, message.body, HEADERS, pack(headers), *more]


def delay(outgoing: Outgoing, now: float) -> int | str:
    """In ms, rounded up, or '' for none. Relative, since the server's clock decides."""
    if outgoing.not_before is None or outgoing.not_before <= now:
        return ""
    return math.ceil((outgoing.not_before - now) * 1000) + 1  # the server cuts its time to whole ms


def decode(entry: Entry) -> Message:
    fields = entry.fields
    text: dict[str, str] = {}
    if len(fields) == 4 and fields[0] == BODY and fields[2] == HEADERS and (headers := _headers(fields[3])):
        message = Message(fields[1])  # as we write it
    else:
        pairs, headers = dict(zip(fields[::2], fields[1::2], strict=True)), {}
        if (body := pairs.pop(BODY, None)) is not None:
            message = Message(body)
            if headers := _headers(pairs.get(HEADERS)):
                del pairs[HEADERS]
            text = dict(found for name, value in pairs.items() if (found := _text(name, value)))
        else:
            names = {n.decode(errors="surrogateescape"): v.decode(errors="surrogateescape") for n, v in pairs.items()}
            message = Message(_dump(names).encode(), content_type=JSON)
    for name, value in headers.items():
        if type(value) is str:
            text[name] = value
    read(text, message)
    message.id = message.id or entry.position
    if message.timestamp is None:
        message.timestamp = int(entry.id.partition(b"-")[0]) / 1000
    return message


def _headers(raw: bytes | None) -> dict[str, Any]:
    """The JSON object in `headers`; nothing where a foreign producer put something else there."""
    if raw is None or len(raw) > _MOST:
        return {}
    try:
        found = _load(raw.decode())[0] if raw[:1] == b"{" else json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(name: bytes, value: bytes) -> tuple[str, str] | None:
    """A foreign field as a header, if it can be one."""
    if len(name) + len(value) > _MOST:
        return None
    try:
        found = name.decode("ascii"), value.decode()
    except UnicodeDecodeError:
        return None
    return found if found[0] not in ENVELOPE_HEADERS else None
