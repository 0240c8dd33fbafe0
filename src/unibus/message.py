"""The envelope, its ids, and the header names that unibus keeps for itself."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from unibus.errors import CodecError

# Names on the wire, the same on every broker; an adapter writes one only where the broker has no field of its own.
ID = "x-message-id"
KEY = "x-key"
CORRELATION_ID = "x-correlation-id"
CAUSATION_ID = "x-causation-id"
REPLY_TO = "x-reply-to"
TYPE = "x-type"
CONTENT_TYPE = "x-content-type"
TIMESTAMP = "x-timestamp"
EXPIRES_AT = "x-expires-at"
NOT_BEFORE = "x-not-before"

# Book-keeping of the policies: these travel in `Message.headers` and only the core writes them.
RETRY_COUNT = "x-retry-count"
CRASH_COUNT = "x-crash-count"
ORIGINAL_ERROR = "x-original-error"
ERROR_TYPE = "x-error-type"
ERROR_STACK_DIGEST = "x-error-stack-digest"
FIRST_FAILED_AT = "x-first-failed-at"
LAST_FAILED_AT = "x-last-failed-at"
MOVED_TO_DLQ_AT = "x-moved-to-dlq-at"
DLQ_REASON = "x-dlq-reason"
ORIGINAL_DESTINATION = "x-original-destination"
ORIGINAL_SUBSCRIPTION = "x-original-subscription"
ORIGINAL_POSITION = "x-original-position"
REDRIVE_COUNT = "x-redrive-count"
REPLY_STATUS = "x-reply-status"
REPLY_ERROR = "x-reply-error"

ENVELOPE_HEADERS = frozenset(
    (ID, KEY, CORRELATION_ID, CAUSATION_ID, REPLY_TO, TYPE, CONTENT_TYPE, TIMESTAMP, EXPIRES_AT, NOT_BEFORE)
)
POLICY_HEADERS = frozenset(
    (
        RETRY_COUNT,
        CRASH_COUNT,
        ORIGINAL_ERROR,
        ERROR_TYPE,
        ERROR_STACK_DIGEST,
        FIRST_FAILED_AT,
        LAST_FAILED_AT,
        MOVED_TO_DLQ_AT,
        DLQ_REASON,
        ORIGINAL_DESTINATION,
        ORIGINAL_SUBSCRIPTION,
        ORIGINAL_POSITION,
        REDRIVE_COUNT,
        REPLY_STATUS,
        REPLY_ERROR,
    )
)
# Names that a broker writes itself; a sender that sets one would be overwritten or misread.
BROKER_HEADERS = frozenset(
    (
        "x-death",
        "x-first-death-exchange",
        "x-first-death-queue",
        "x-first-death-reason",
        "x-last-death-exchange",
        "x-last-death-queue",
        "x-last-death-reason",
        "x-delivery-count",
        "x-acquired-count",
    )
)
RESERVED_HEADERS = ENVELOPE_HEADERS | POLICY_HEADERS | BROKER_HEADERS

NO_HEADERS: Mapping[str, str] = MappingProxyType({})  # shared, so it must not be writable


@dataclass(slots=True)
class Message:
    """The envelope around one body.

    `body` is bytes on the wire; `Bus.send` and `publish` also take a Message whose body is an object of the
    channel's type, and encode it. Times are seconds since the epoch; `delay` is seconds. `headers` are the user's own
    (str -> str) and, on a received message, the policies' (`POLICY_HEADERS`).
    """

    body: Any
    id: str = ""
    type: str | None = None
    content_type: str | None = None
    headers: Mapping[str, str] = field(default_factory=lambda: NO_HEADERS)
    key: str | None = None
    correlation_id: str | None = None
    causation_id: str | None = None
    reply_to: str | None = None
    timestamp: float | None = None
    expires_at: float | None = None
    priority: int | None = None
    delay: float | None = None

    def __repr__(self) -> str:  # a body may hold secrets, and logs hold reprs
        size = f"{len(self.body)} bytes" if isinstance(self.body, bytes) else type(self.body).__name__
        return f"<Message {self.id or '(no id yet)'} {size}>"


def _ids() -> Iterator[str]:
    return map(f"{secrets.token_hex(8)}-{{:x}}".format, itertools.count(1))


_next_id = _ids().__next__


def new_id() -> str:
    """A message id: a random prefix of this process and a counter. Unique, and a tenth of the cost of a uuid4."""
    return _next_id()


def _renew_ids() -> None:
    global _next_id  # noqa: PLW0603  # a forked process must not count on with its parent's prefix
    _next_id = _ids().__next__


os.register_at_fork(after_in_child=_renew_ids)


def check_headers(headers: Mapping[Any, Any]) -> None:
    """Refuse what no broker would carry unchanged. Raises CodecError that names the header, never its value."""
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            kind = type(name if not isinstance(name, str) else value).__name__
            raise CodecError(f"header {name!r}: names and values are str, not {kind}; convert it first")
        if name in RESERVED_HEADERS:
            raise CodecError(f"header {name!r} is reserved for unibus and the brokers; use another name")
        if not name.isascii() or not name.isprintable() or not 0 < len(name) <= 128 or " " in name:
            raise CodecError(f"header {name!r}: a name is 1 to 128 printable ASCII characters without spaces")
        if not value.isprintable() and any(c in value for c in "\r\n\0"):
            raise CodecError(f"header {name!r}: the value holds a line break or NUL; encode it, for example as JSON")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise CodecError(f"header {name!r}: the value holds a lone surrogate and has no UTF-8 form") from None
