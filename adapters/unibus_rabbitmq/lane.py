"""One confirm channel: what is published on it, and what the server says to it."""

from __future__ import annotations

import asyncio
from typing import Any

from aiormq.abc import AbstractChannel

from unibus.adapter import Outgoing
from unibus.channel import Inbox, Topic
from unibus.errors import (
    ConnectionLost,
    MessageTooLarge,
    NotFound,
    Refused,
    Throttled,
    Timeout,
    TransportError,
    UnibusError,
    Unroutable,
)
from unibus_rabbitmq import errors, frames
from unibus_rabbitmq.link import Link

_SEPARATOR = "~"

# Of a message that has no result yet.
UNSENT = Throttled("not sent: RabbitMQ did not take it in time")
WAITING = Timeout("RabbitMQ has not confirmed the message in time; it may or may not have it")


class Batch:
    """The results of one call of `send`, as they come."""

    __slots__ = ("future", "left", "results")

    def __init__(self, size: int) -> None:
        self.results: list[TransportError | None] = [UNSENT] * size
        self.left = size
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self) -> None:
        if not self.future.done():
            self.future.set_result(None)

    def done(self, index: int, error: TransportError | None) -> None:
        self.results[index] = error
        self.left -= 1
        if not self.left:
            self.end()


_Pending = tuple[Batch, int, str, Outgoing]  # where the result goes, and the AMQP message id


class Lane:
    """A confirm channel for one exchange."""

    def __init__(self, exchange: str, channel: AbstractChannel, link: Link) -> None:
        self.number = channel.number
        self.dead = False
        self._exchange = exchange
        self._link = link
        self._next = 1  # the server counts the publishes of a channel from 1
        self._pending: dict[int, _Pending] = {}
        self._flying: dict[str, int] = {}  # AMQP message id -> tag
        self._returned: dict[int, str] = {}  # tag -> the server's words; its ack follows
        self._return_text: str | None = None  # a return whose content is still coming
        self._return_left = 0
        self._heads: dict[str, bytes] = {}  # routing key -> basic.publish frame
        link.wire.sinks[channel.number] = self
        channel.closing.add_done_callback(self._closed)

    def id_for(self, outgoing: Outgoing) -> str:
        """An AMQP message id that no other unconfirmed message of this channel has."""
        amqp_id = outgoing.message.id
        if len(amqp_id) > 63 or amqp_id in self._flying or not amqp_id:
            amqp_id = f"{amqp_id[:60]}{_SEPARATOR}{self._next}"
            while amqp_id in self._flying:  # only where the logical ids look like this themselves
                amqp_id += _SEPARATOR
        return amqp_id

    def add(self, batch: Batch, index: int, outgoing: Outgoing, amqp_id: str) -> None:
        """Count it: the caller writes it before anything else can be written to this channel."""
        tag = self._next
        self._next = tag + 1
        batch.results[index] = WAITING
        self._pending[tag] = (batch, index, amqp_id, outgoing)
        self._flying[amqp_id] = tag

    def head(self, routing_key: str) -> bytes:
        head = self._heads.get(routing_key)
        if head is None:
            if len(self._heads) > 1000:  # reply addresses come and go
                self._heads.clear()
            head = self._heads[routing_key] = frames.publish_frame(self.number, self._exchange, routing_key)
        return head

    def frame(self, kind: int, payload: bytes) -> bool:
        if kind == frames.METHOD:
            method = payload[:4]
            if method == frames.ACK or method == frames.NACK:  # noqa: PLR1714  # twice as fast as a set
                tag, multiple = frames.read_confirm(payload)
                self._confirm(tag, multiple, refused=method == frames.NACK)
                return True
            if method == frames.RETURN:
                self._return_text = frames.read_reason(payload)[1]
                return True
            if method == frames.CHANNEL_CLOSE:
                self._leave()  # aiormq answers; after the answer the server takes a frame of this channel for a fault
            return False
        if self._return_text is None:
            return False
        if kind == frames.HEADER:
            self._return_left = frames.body_size(payload)
            tag_of = self._flying.get(frames.decode_properties(payload).message_id or "")
            if tag_of is not None:
                self._returned[tag_of] = self._return_text
        else:
            self._return_left -= len(payload)
        if self._return_left <= 0:
            self._return_text = None
        return True

    def _confirm(self, tag: int, multiple: int, *, refused: bool) -> None:
        pending = self._pending
        if not multiple:
            entry = pending.pop(tag, None)
            if entry is not None:
                self._settle(tag, entry, refused=refused)
            return
        tags = []
        for each in pending:  # ascending: in the order of publishing
            if each > tag:
                break
            tags.append(each)
        for each in tags:
            self._settle(each, pending.pop(each), refused=refused)

    def _settle(self, tag: int, entry: _Pending, *, refused: bool) -> None:
        batch, index, amqp_id, outgoing = entry
        del self._flying[amqp_id]
        error: TransportError | None = None
        if refused:
            error = Throttled(f"RabbitMQ refused a message to {outgoing.to}: a queue is full or has no leader")
        elif self._returned:
            words = self._returned.pop(tag, None)
            if words is not None:
                error = self._unrouted(outgoing, words)
        batch.done(index, error)

    def _unrouted(self, outgoing: Outgoing, words: str) -> TransportError:
        if isinstance(outgoing.to, Topic):
            return Unroutable(f"{outgoing.to}: no group would get the message ({words})")
        what = "the inbox is gone" if isinstance(outgoing.to, Inbox) else "there is no queue for it; declare it first"
        return NotFound(f"{outgoing.to}: {what} ({words})")

    def _leave(self) -> None:
        self.dead = True
        if self._link.wire.sinks.get(self.number) is self:
            del self._link.wire.sinks[self.number]

    def _closed(self, closing: asyncio.Future[Any]) -> None:
        """The channel is gone; what is unconfirmed is undecided, unless the server said what was wrong."""
        self._leave()
        cause = None if closing.cancelled() else closing.exception()
        error: UnibusError
        if self._link.lost is not None:
            error = self._link.lost
        elif cause is None:
            error = ConnectionLost("the publishing channel was closed")
        else:
            error = errors.translate(cause, f"publish to exchange {self._exchange or '(default)'!r}")
        most = errors.largest(cause)
        for batch, index, _, outgoing in self._pending.values():
            mine: UnibusError = error
            if most is not None and len(outgoing.message.body) > most:
                mine = MessageTooLarge(f"{outgoing.to}: {len(outgoing.message.body)} bytes, RabbitMQ takes {most}")
            elif most is not None:
                mine = ConnectionLost("the channel was closed for another message; this one is undecided")
            batch.done(index, mine if isinstance(mine, TransportError) else Refused(f"{outgoing.to}: {mine}"))
        self._pending.clear()
        self._flying.clear()
