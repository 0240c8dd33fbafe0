"""The envelope as a row of the table, and back.

`key`, `priority` and the time of sending have columns; what else the envelope has is in `headers`, a JSON object, with the
user's headers. A row that somebody else has inserted needs nothing but `place` and `body`.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from unibus.adapter import Outgoing
from unibus.envelope import read, write
from unibus.inboxes import inbox_shape
from unibus.message import Message

INBOX = re.compile(inbox_shape())
COLUMNS = "id, place, body, headers, key, priority, sent, deliveries"  # of a Row


class Row(NamedTuple):
    """A message as it is in the file: what `Delivery.native` is."""

    id: int
    place: str
    body: bytes | str
    headers: str | None
    key: str | None
    priority: int
    sent: float | None
    deliveries: int

    @property
    def position(self) -> str:
        return f"{self.place}@{self.id}"


def encode(outgoing: Outgoing, now: float) -> tuple[object, ...]:
    """body, headers, key, priority, sent, visible."""
    message = outgoing.message
    headers = dict(message.headers)
    write(message, headers, brief=True)
    if message.content_type is not None:
        headers["x-content-type"] = message.content_type
    text = json.dumps(headers, separators=(",", ":"), ensure_ascii=False)
    sent = now if message.timestamp is None else message.timestamp
    return message.body, text, message.key, message.priority or 0, sent, outgoing.not_before or now


def decode(row: Row) -> Message:
    body = row.body.encode() if isinstance(row.body, str) else row.body
    message = Message(body, id=row.position, key=row.key, priority=row.priority or None, timestamp=row.sent)
    read(_headers(row.headers), message)
    return message


def _headers(text: str | None) -> dict[str, str]:
    """Nothing where a foreign producer put something else there."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}
