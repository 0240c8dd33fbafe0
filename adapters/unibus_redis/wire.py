"""The envelope as the fields of a stream entry, and back.

`body` holds the bytes, `headers` a JSON object with the rest: the user's headers and, under the names that are the same on every
broker, what the envelope has beside the body. A timestamp is not written where the id of the entry says the same.

An entry without `body` is somebody else's: its body is the JSON of its fields. Fields beside these two are headers where they
are text; all else stays on `Entry` and is copied to retries and dead letters.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from unibus.adapter import Outgoing
from unibus.channel import Inbox
from unibus.errors import Refused
from unibus.message import (
    CAUSATION_ID,
    CONTENT_TYPE,
    CORRELATION_ID,
    ENVELOPE_HEADERS,
    EXPIRES_AT,
    ID,
    KEY,
    NO_HEADERS,
    REPLY_TO,
    TIMESTAMP,
    TYPE,
    Message,
)

BODY, HEADERS = b"body", b"headers"
_dump = json.JSONEncoder(separators=(",", ":")).encode
_load = json.JSONDecoder().decode
# reply_to is untrusted: this is the shape of the names that `inbox_name` makes, and of nothing else that is declared.
_INBOX = re.compile(r"[A-Za-z0-9._-]{0,60}unibus:reply:[A-Za-z0-9._-]{0,120}:[0-9a-f]{16}")


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


def inbox_name(prefix: str, service: str, token: str) -> str:
    return f"{prefix}unibus:reply:{re.sub(r'[^A-Za-z0-9._-]', '-', service)[:100]}:{token}"


def reply_address(text: str) -> Inbox:
    """The inbox behind an untrusted reply_to. Raises Refused."""
    if not _INBOX.fullmatch(text):
        raise Refused("the reply address is no inbox that unibus has made (...unibus:reply:...)")
    return Inbox(text)


def encode(outgoing: Outgoing, now: float) -> list[Any]:
    """Names and values in turn."""
    message, origin = outgoing.message, outgoing.origin
    headers: dict[str, Any] = {ID: message.id}
    more: list[bytes] = []
    if origin is not None and isinstance(origin.native, Entry):
        more, odd = origin.native.foreign()
        headers |= odd
    if message.headers is not NO_HEADERS:
        headers |= message.headers
    for name, value in (
        (KEY, message.key),
        (TYPE, message.type),
        (CONTENT_TYPE, message.content_type),
        (CORRELATION_ID, message.correlation_id),
        (CAUSATION_ID, message.causation_id),
        (REPLY_TO, message.reply_to),
    ):
        if value is not None:
            headers[name] = value
    if message.timestamp is not None and (
        origin is not None or outgoing.not_before or abs(now - message.timestamp) > 1
    ):
        headers[TIMESTAMP] = f"{message.timestamp:.3f}"
    if message.expires_at is not None:
        headers[EXPIRES_AT] = f"{message.expires_at:.3f}"
    return [BODY, message.body, HEADERS, _dump(headers), *more]


def delay(outgoing: Outgoing, now: float) -> int | str:
    """In ms, rounded up, or '' for none. Relative, since the server's clock decides."""
    if outgoing.not_before is None or outgoing.not_before <= now:
        return ""
    return math.ceil((outgoing.not_before - now) * 1000) + 1  # the server cuts its time to whole ms


def decode(entry: Entry) -> Message:
    fields = entry.fields
    text: dict[str, str] = {}
    if len(fields) == 4 and fields[0] == BODY and fields[2] == HEADERS:  # what we write
        body, headers = fields[1], _headers(fields[3])
    elif BODY in fields[::2]:
        pairs = dict(zip(fields[::2], fields[1::2], strict=True))
        body, headers = pairs.pop(BODY), _headers(pairs.get(HEADERS))
        if headers:
            del pairs[HEADERS]
        text = dict(found for name, value in pairs.items() if (found := _text(name, value)))
    else:
        names = [part.decode(errors="surrogateescape") for part in fields]
        body, headers = (
            _dump(dict(zip(names[::2], names[1::2], strict=True))).encode(),
            {CONTENT_TYPE: "application/json"},
        )
    take = headers.pop
    message = Message(body, _str(take(ID, None)) or entry.position)
    if headers:
        message.content_type = _str(take(CONTENT_TYPE, None))
        message.key = _str(take(KEY, None))
        message.type = _str(take(TYPE, None))
        message.correlation_id = _str(take(CORRELATION_ID, None))
        message.causation_id = _str(take(CAUSATION_ID, None))
        message.reply_to = _str(take(REPLY_TO, None))
        message.timestamp = _number(take(TIMESTAMP, None))
        message.expires_at = _number(take(EXPIRES_AT, None))
        if headers:
            text |= {
                name: value for name, value in headers.items() if type(value) is str and name not in ENVELOPE_HEADERS
            }
    if text:
        message.headers = text
    if message.timestamp is None:
        message.timestamp = int(entry.id.partition(b"-")[0]) / 1000
    return message


def _headers(raw: bytes | None) -> dict[str, Any]:
    """The JSON object in `headers`; nothing where a foreign producer put something else there."""
    if raw is None:
        return {}
    try:
        found = _load(raw.decode())
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(name: bytes, value: bytes) -> tuple[str, str] | None:
    """A foreign field as a header, if it can be one."""
    try:
        found = name.decode("ascii"), value.decode()
    except UnicodeDecodeError:
        return None
    return found if found[0] not in ENVELOPE_HEADERS else None


def _str(value: object) -> str | None:
    return value if type(value) is str else None


def _number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]  # a foreign header of the same name may hold anything
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
