"""The envelope as headers of text, and back: the same names, texts and rules on every broker.

An adapter adds what its broker has a field of its own for, and maps the pairs to its native form.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _quoted
from math import isfinite
from typing import Any

from unibus.message import (
    CAUSATION_ID,
    CONTENT_TYPE,
    CORRELATION_ID,
    ENVELOPE_HEADERS,
    EXPIRES_AT,
    ID,
    KEY,
    NO_HEADERS,
    NOT_BEFORE,
    REPLY_TO,
    TIMESTAMP,
    TYPE,
    Message,
)

JSON = "application/json"


def write(message: Message, headers: dict[str, str], timestamp: float | None = None, *, brief: bool = False) -> None:
    """Put what is set in the envelope into `headers`. Written out, since every message goes by here.

    `timestamp`: the message's, where no field of the broker's says the same. `brief`: without key and content type, which
    the adapter writes its own way, and without a correlation id that is the message's own id.
    """
    headers[ID] = message.id
    if message.type is not None:
        headers[TYPE] = message.type
    if not brief:
        if message.content_type is not None:
            headers[CONTENT_TYPE] = message.content_type
        if message.key is not None:
            headers[KEY] = message.key
    if message.correlation_id is not None and not (brief and message.correlation_id == message.id):
        headers[CORRELATION_ID] = message.correlation_id
    if message.causation_id is not None:
        headers[CAUSATION_ID] = message.causation_id
    if message.reply_to is not None:
        headers[REPLY_TO] = message.reply_to
    if timestamp is not None:
        headers[TIMESTAMP] = time_text(timestamp)
    if message.expires_at is not None:
        headers[EXPIRES_AT] = time_text(message.expires_at)


def is_bare(message: Message) -> bool:
    """Is there nothing of the envelope to write but id, key, content type and timestamp?"""
    return (
        message.type is None
        and message.correlation_id is None
        and message.causation_id is None
        and message.reply_to is None
        and message.expires_at is None
    )


def read(headers: dict[str, str], message: Message) -> float | None:
    """Move the envelope's headers into the fields of a received message; what is left of `headers` are the user's.

    A header of ours wins over what the broker's own field has said before. Returns when the message is due, seconds since
    the epoch, if it says so.
    """
    due = None
    take = headers.pop
    if (text := take(ID, None)) is not None:
        message.id = text or message.id
    if (text := take(CONTENT_TYPE, None)) is not None:
        message.content_type = text
    if not headers:
        return None
    message.headers = headers
    if not ENVELOPE_HEADERS.isdisjoint(headers):
        message.type = take(TYPE, message.type)
        message.key = take(KEY, message.key)
        message.correlation_id = take(CORRELATION_ID, message.correlation_id)
        message.causation_id = take(CAUSATION_ID, message.causation_id)
        message.reply_to = take(REPLY_TO, message.reply_to)
        if (text := take(EXPIRES_AT, None)) is not None:
            message.expires_at = read_time(text)
        if (text := take(TIMESTAMP, None)) is not None and (at := read_time(text)) is not None:
            message.timestamp = at
        if (text := take(NOT_BEFORE, None)) is not None:
            due = read_time(text)
        if not headers:
            message.headers = NO_HEADERS
    return due


def packed(headers: Mapping[str, str]) -> str:
    """Headers as a JSON object, in ASCII. Half of json's time, which looks at what a value is; here all are texts."""
    return "{" + ",".join([f"{_quoted(name)}:{_quoted(value)}" for name, value in headers.items()]) + "}"


def packed_bare(id: str, content_type: str | None) -> str:
    """What `packed` gives for a message that is bare and has no key, in a third of the time: nearly all are."""
    return f'{{"{ID}":{_quoted(id)}{_end(content_type)}'


@lru_cache(maxsize=100)  # one content type a channel, as a rule
def _end(content_type: str | None) -> str:
    return "}" if content_type is None else f',"{CONTENT_TYPE}":{_quoted(content_type)}}}'


def time_text(seconds: float) -> str:
    """Seconds since the epoch as a header has them: to the millisecond."""
    return f"{seconds:.3f}"


def read_time(value: Any) -> float | None:
    """The seconds of a header; None where there is none, or something else in a foreign header of that name."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if isfinite(seconds) else None
