"""Correlation and causation: every message sent from a handler belongs to the conversation of the one it handles.

A message at the edge starts a conversation whose id is its own: `correlation_id` stays None on the wire and is read as
the message's id. A message sent from a handler carries the conversation's id, and the id of its cause.
"""

from __future__ import annotations

from contextvars import ContextVar

from unibus.channel import Address
from unibus.message import Message

# The message whose handler runs in this context.
handling: ContextVar[Message | None] = ContextVar("unibus.handling", default=None)
# Where it came from: the same for all that one consumer handles, so that it is set once.
place: ContextVar[Address | None] = ContextVar("unibus.place", default=None)


def correlate(message: Message, cause: Message | None) -> None:
    """Fill in what the sender left open."""
    if cause is not None:
        if message.correlation_id is None:
            message.correlation_id = cause.correlation_id or cause.id
        if message.causation_id is None:
            message.causation_id = cause.id
