"""The envelope as a body and message attributes, and back; and names as SQS and SNS take them.

SQS carries ten attributes at most, so all headers, ours and the user's, travel as one JSON object in the attribute
`unibus`. SQS bodies are text of the characters that XML has, and not empty: other bodies are base64, and the attribute
`unibus-encoding` says so. A message without `unibus` is a foreign one: its text and number attributes are its headers.
"""

from __future__ import annotations

import json
import logging
import re
from base64 import b64decode, b64encode
from collections.abc import Collection, Mapping
from contextlib import suppress
from hashlib import sha256
from typing import Any

from unibus.adapter import Outgoing
from unibus.channel import Inbox, Topic
from unibus.envelope import packed, read, time_text, write
from unibus.errors import MessageTooLarge
from unibus.inboxes import inbox, plain
from unibus.message import CRASH_COUNT, NOT_BEFORE, REDRIVE_COUNT, RETRY_COUNT, Message
from unibus_sqs.capabilities import LIMIT, RESERVE, TOPIC_LIMIT

log = logging.getLogger("unibus.sqs")

HEADERS = "unibus"
ENCODING = "unibus-encoding"
BASE64, EMPTY = "base64", "empty"
MOST_ATTRIBUTES = 10

Attributes = dict[str, dict[str, Any]]

_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_GROUP = re.compile(r"[A-Za-z0-9!-/:-@\[-`{-~]{1,128}")
_LONGEST = 75  # of 80, which `.fifo` counts for
_INBOX = re.compile(r"[A-Za-z0-9_-]{0,44}unibus__reply_[0-9a-f]{16}")


# Names


def physical(name: str) -> str:
    """A name in the alphabet of SQS and SNS, which has no dot: `a.b` is `a_-b`. Two names never meet.

    A `_` before one of `.` `_` `-` is doubled, so it can be read back; a name that is too long ends in its hash.
    """
    encoded = re.sub(r"_(?=[._-])", "__", name).replace(".", "_-")
    if len(encoded) > _LONGEST:
        encoded = f"{encoded[: _LONGEST - 17]}-{sha256(name.encode()).hexdigest()[:16]}"
    return encoded


def private_stem(prefix: str) -> str:
    """What the names of all private queues under this prefix begin with. No `physical` name holds `s__` or the like."""
    return plain(prefix, dots=False)[:44] + "unibus__"


def reply_address(text: str) -> Inbox:
    """The inbox behind an untrusted reply_to. Raises Refused."""
    return inbox(_INBOX, text, "...unibus__reply_...")


def group_id(text: str) -> str:
    """A message group: the key, or its hash where SQS doesn't take it."""
    return text if _GROUP.fullmatch(text) else sha256(text.encode(errors="surrogatepass")).hexdigest()


def dedup_id(message: Message) -> str:
    """The same for one message sent twice, another for each of its retries, redrives and dead letters."""
    lives = [message.headers.get(name, "0") for name in (RETRY_COUNT, CRASH_COUNT, REDRIVE_COUNT)]
    return group_id(message.id if lives == ["0", "0", "0"] else f"{message.id}:{':'.join(lives)}")


# Messages


def encode(outgoing: Outgoing, not_before: float | None, promoted: Collection[str] = ()) -> tuple[str, Attributes, int]:
    """Body, attributes, and their size as the limits count it. `not_before`: where the receiver has to look after it."""
    message = outgoing.message
    headers = dict(message.headers)
    write(message, headers, message.timestamp)
    if not_before is not None:
        headers[NOT_BEFORE] = time_text(not_before)
    attributes = {HEADERS: _text(packed(headers))}
    body, encoding = _body(message.body)
    if encoding is not None:
        attributes[ENCODING] = _text(encoding)
    for name in promoted:
        value = headers.get(name)
        if value and not _ILLEGAL.search(value):
            attributes[name] = _text(value)
    if outgoing.origin is not None and isinstance(outgoing.origin.native, Mapping):
        for name, attribute in (outgoing.origin.native.get("MessageAttributes") or {}).items():
            if "BinaryValue" not in attribute:
                continue
            if len(attributes) == MOST_ATTRIBUTES:  # a foreign message may have ten of them, and one place is ours
                log.warning(
                    "the copy of message %s leaves out its binary attribute %r: SQS takes ten", message.id, name
                )
                continue
            attributes[name] = {"DataType": attribute["DataType"], "BinaryValue": attribute["BinaryValue"]}
    return body, attributes, len(message.body if encoding is None else body) + size(attributes)


def _text(value: str) -> dict[str, Any]:
    return {"DataType": "String", "StringValue": value}


def _body(body: bytes) -> tuple[str, str | None]:
    if not body:
        return "-", EMPTY
    with suppress(UnicodeDecodeError):
        if not _ILLEGAL.search(text := body.decode()):
            return text, None
    return b64encode(body).decode(), BASE64


def size(attributes: Attributes) -> int:
    total = 0
    for name, attribute in attributes.items():
        value = attribute.get("StringValue")
        total += len(name) + len(attribute["DataType"])
        total += len(attribute["BinaryValue"]) if value is None else len(value.encode())
    return total


def too_large(outgoing: Outgoing, size: int) -> MessageTooLarge | None:
    """Is a message of this size refused where it goes?"""
    to, limit, reserved = outgoing.to, LIMIT, RESERVE if outgoing.origin is None else 0
    if is_topic := isinstance(to, Topic):  # a retry of a group's message goes to its queue, which carries more
        limit, reserved = TOPIC_LIMIT, 0
    if size <= limit - reserved:
        return None
    return MessageTooLarge(
        f"{to}: the message has {size} bytes with its headers, as {'SNS' if is_topic else 'SQS'} counts them; "
        f"{limit} is its limit, of which {reserved} are kept for the headers of a retry"
    )


def decode(native: dict[str, Any]) -> tuple[Message, float | None]:
    """The envelope of a received message, and when it is due, if it is still to wait.

    An envelope of SNS, where raw delivery is off, is taken off: `native` is then what raw delivery would have brought.
    """
    text: str = native["Body"]
    attributes: Attributes = native.get("MessageAttributes") or {}
    if not attributes and text.startswith("{") and '"TopicArn"' in text:
        text, attributes = _unwrapped(text)
        native |= {"Body": text, "MessageAttributes": attributes}
    fields = {name: a["StringValue"] for name, a in attributes.items() if "StringValue" in a}
    encoding = fields.pop(ENCODING, None)
    system = native.get("Attributes") or {}
    message = Message(_bytes(text, encoding), native["MessageId"])
    if (found := _unpacked(fields.get(HEADERS, ""))) is None:
        message.key = system.get("MessageGroupId")
    else:
        del fields[HEADERS]
        fields |= found
    if "SentTimestamp" in system:
        message.timestamp = int(system["SentTimestamp"]) / 1000
    return message, read(fields, message)


def _unpacked(text: str) -> dict[str, str] | None:
    """Our headers; None if the attribute only has our name."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and all(type(value) is str for value in found.values()) else None


def _bytes(text: str, encoding: str | None) -> bytes:
    if encoding == EMPTY:
        return b""
    if encoding == BASE64:
        try:
            return b64decode(text, validate=True)
        except ValueError:
            pass  # a foreign attribute of our name
    return text.encode(errors="surrogatepass")


def _unwrapped(text: str) -> tuple[str, Attributes]:
    """Message and attributes of a notification of SNS; anything else as it is."""
    attributes: Attributes = {}
    try:
        found = json.loads(text)
        if found["Type"] != "Notification" or type(found["Message"]) is not str:
            return text, {}
        for name, attribute in (found.get("MessageAttributes") or {}).items():
            kind, value = str(attribute["Type"]), str(attribute["Value"])
            if kind.startswith("Binary"):
                attributes[name] = {"DataType": kind, "BinaryValue": b64decode(value)}
            else:
                attributes[name] = {"DataType": kind, "StringValue": value}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return text, {}  # it only looked like one
    return found["Message"], attributes
