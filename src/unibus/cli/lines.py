"""Messages as JSON lines: what `peek`, `receive` and `dlq` write, `send` and `publish` read.

    {"id": "…", "key": "c42", "headers": {"tenant": "a"}, "content_type": "application/json", "body": {"total": 12}}

A body stands in one of three fields: `body` has JSON, `text` the text of what is none, `base64` all other bytes. `policy`
holds the headers of the policies (`x-retry-count`, …); with `attempt`, `deliveries` and `position` it is only written.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from unibus.channel import Queue, Topic
from unibus.codec import BYTES, JSON, TEXT, codec_for
from unibus.delivery import Delivery
from unibus.errors import CodecError
from unibus.message import POLICY_HEADERS, RESERVED_HEADERS, Message

BODIES = ("body", "text", "base64")
_FIELDS = tuple(field.name for field in fields(Message) if field.name not in {"body", "headers"})
_NUMBERS = frozenset(("timestamp", "expires_at", "delay"))
_ONLY_WRITTEN = frozenset(("policy", "attempt", "deliveries", "position"))


def line(delivery: Delivery[Any]) -> dict[str, Any]:
    """A delivery as it is printed; what is not set is left out."""
    message = delivery.message
    found: dict[str, Any] = {
        name: value for name in _FIELDS if (value := getattr(message, name)) is not None and value != ""
    }
    if own := {name: value for name, value in message.headers.items() if name not in RESERVED_HEADERS}:
        found["headers"] = own
    if policy := {name: value for name, value in message.headers.items() if name in POLICY_HEADERS}:
        found["policy"] = policy
    if delivery.deliveries is not None:
        found["deliveries"] = delivery.deliveries
    if delivery.position:
        found["position"] = delivery.position
    name, value = body_of(message)
    return {**found, name: value}


def body_of(message: Message) -> tuple[str, Any]:
    """Field and value of a body of bytes."""
    data: bytes = message.body
    media = (message.content_type or "").partition(";")[0].strip().lower()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "base64", base64.b64encode(data).decode()
    # A foreign producer rarely says what it sends: an object or a list is taken as what it looks like.
    if media == JSON or media.endswith("+json") or (media in {"", BYTES} and text[:1] in {"{", "["}):
        try:
            return "body", json.loads(text, parse_constant=_no_json)
        except ValueError:
            pass  # it only says so: shown as what it is
    if "\0" in text:
        return "base64", base64.b64encode(data).decode()
    return "text", text


def _no_json(name: str) -> Any:
    raise ValueError(name)


def read(text: str, channel: Queue[Any] | Topic[Any], *, bare: bool = False) -> Message:
    """The message that one line stands for; `bare`: the line is the body alone. Raises CodecError."""
    try:
        given = json.loads(text, parse_constant=_no_json)
    except ValueError as error:
        where = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise CodecError(f"is not JSON{where}") from None
    if bare:
        return message_of({"body": given}, channel)
    if not isinstance(given, dict) or sum(name in given for name in BODIES) != 1:
        raise CodecError(
            f'is not a message: an object with {", ".join(BODIES[:-1])} or {BODIES[-1]}, as in {{"key": "c42", "body": …}}; '
            "where the lines are bodies, say --bodies"
        )
    return message_of(given, channel)


def message_of(given: Mapping[str, Any], channel: Queue[Any] | Topic[Any]) -> Message:
    """The message of the fields of a line. The body is checked by the channel's type. Raises CodecError."""
    message = Message(None)
    for name, value in given.items():
        if name in BODIES or name in _ONLY_WRITTEN:
            continue
        if name == "headers":
            if not isinstance(value, dict):
                raise CodecError("headers: expected an object")
            message.headers = value
        elif name not in _FIELDS:
            raise CodecError(
                f"{name!r} is no field of a message; there are {', '.join((*_FIELDS, 'headers', *BODIES))}"
            )
        else:
            setattr(message, name, _checked(name, value))
    data, kind = _bytes(given, channel)
    message.content_type = message.content_type or kind
    message.body = codec_for(channel).decode(data, message.content_type)
    return message


def _bytes(given: Mapping[str, Any], channel: Queue[Any] | Topic[Any]) -> tuple[bytes, str]:
    """The body, and its content type unless the line says it."""
    if "base64" in given:
        try:
            return base64.b64decode(given["base64"], validate=True), codec_for(channel).content_type
        except (binascii.Error, TypeError, ValueError):
            raise CodecError("base64: is not base64") from None
    if "text" in given or channel.body is str:
        text = given.get("text", given.get("body"))
        if not isinstance(text, str):
            raise CodecError(f"{channel} takes text: expected a string")
        return text.encode(), TEXT
    return json.dumps(given["body"], ensure_ascii=False, separators=(",", ":")).encode(), JSON


def _checked(name: str, value: Any) -> Any:
    """A field of the envelope. Texts are checked by the bus."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if name in _NUMBERS and not number:
        raise CodecError(f"{name}: expected a number, seconds")
    if name == "priority" and (not number or not isinstance(value, int)):
        raise CodecError("priority: expected a whole number")
    return value
