"""Confirmed publishing: a batch goes out in few writes, and its confirms are counted as they come.

One confirm channel per exchange, because RabbitMQ closes the channel on a publish to a missing or forbidden exchange:
so it takes no message along that goes elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from aiormq.abc import AbstractChannel

from unibus.adapter import Outgoing, Results
from unibus.channel import Address, Inbox, Topic
from unibus.clock import Clock, within
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
from unibus_rabbitmq import errors, frames, wire
from unibus_rabbitmq.link import Link
from unibus_rabbitmq.topology import Names, Route, step

log = logging.getLogger("unibus.rabbitmq")

_CHUNK = 256 * 1024  # bytes written before looking whether the transport is full
_SEPARATOR = "~"

T = TypeVar("T")


# Of a message that has no result yet.
_UNSENT = Throttled("not sent: RabbitMQ did not take it in time")
_WAITING = Timeout("RabbitMQ has not confirmed the message in time; it may or may not have it")


class _Batch:
    """The results of one call of `send`, as they come."""

    __slots__ = ("future", "left", "results")

    def __init__(self, size: int) -> None:
        self.results: list[TransportError | None] = [_UNSENT] * size
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


_Pending = tuple[_Batch, int, str, Outgoing]  # where the result goes, and the AMQP message id


class _Lane:
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

    def add(self, batch: _Batch, index: int, outgoing: Outgoing, amqp_id: str) -> None:
        """Count it: the caller writes it before anything else can be written to this channel."""
        tag = self._next
        self._next = tag + 1
        batch.results[index] = _WAITING
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
        told = False
        for batch, index, _, outgoing in self._pending.values():
            mine = error
            if isinstance(error, MessageTooLarge) and told:
                # One of them was too large, and the server does not say which: the others can go again.
                mine = ConnectionLost("the channel was closed for another message; this one is undecided")
            told = True
            batch.done(index, mine if isinstance(mine, TransportError) else Refused(f"{outgoing.to}: {mine}"))
        self._pending.clear()
        self._flying.clear()


class Publisher:
    """All publishing over one link."""

    def __init__(self, link: Link, names: Names, clock: Clock, max_body: int) -> None:
        self._link = link
        self._names = names
        self._clock = clock
        self._max_body = max_body
        self._lanes: dict[str, _Lane] = {}
        self._opening = asyncio.Lock()

    async def send(
        self, batch: Sequence[Outgoing], route: Callable[[Address], Route], steps: tuple[int, ...], timeout: float
    ) -> Results:
        """One result for each. Raises ConnectionLost if the link is gone and nothing of the batch was confirmed."""
        deadline = self._clock.monotonic() + timeout
        state = _Batch(len(batch))
        timer = self._clock.call_later(timeout, state.end)
        try:
            if self._link.wire.blocked is not None:
                await self._until(self._link.wire.unblocked.wait(), deadline)
            await self._write(state, batch, route, steps, deadline)
            if state.left:
                await state.future
        except TimeoutError:
            pass  # what is left says so itself
        finally:
            timer.cancel()
        if not state.left:
            lost = self._link.lost
            if lost is not None and all(error is lost for error in state.results):
                raise lost
            return state.results
        return [self._undecided(outgoing, error) for outgoing, error in zip(batch, state.results, strict=True)]

    def _undecided(self, outgoing: Outgoing, error: TransportError | None) -> TransportError | None:
        blocked = self._link.wire.blocked
        why = f"; RabbitMQ blocks publishing: {blocked}" if blocked is not None else ""
        if error is _UNSENT:
            return Throttled(f"{outgoing.to}: {_UNSENT}{why}")
        return Timeout(f"{outgoing.to}: {_WAITING}{why}") if error is _WAITING else error

    async def _write(
        self,
        state: _Batch,
        batch: Sequence[Outgoing],
        route: Callable[[Address], Route],
        steps: tuple[int, ...],
        deadline: float,
    ) -> None:
        now = self._clock.time()
        frame_max = self._link.frame_max
        out: list[bytes] = []
        size = 0
        lanes = self._lanes
        for index, outgoing in enumerate(batch):
            try:
                way = route(outgoing.to)
                exchange, key, hop = way.exchange, way.routing_key, None
                if outgoing.not_before is not None and outgoing.not_before > now:
                    ms, last = self._step(outgoing, steps, now)
                    exchange, key, hop = self._names.hold(ms), way.hold_key, None if last else outgoing.not_before
                body = outgoing.message.body
                if len(body) > self._max_body:
                    raise MessageTooLarge(f"{outgoing.to}: {len(body)} bytes, RabbitMQ takes {self._max_body}")
                lane = lanes.get(exchange)
                if lane is None or lane.dead:
                    if out:  # what is counted must be written before anything else is
                        self._link.write(b"".join(out))
                        out, size = [], 0
                    lane = await self._open(exchange, deadline)
                amqp_id = lane.id_for(outgoing)
                flags, properties = wire.encode(outgoing, amqp_id, hop, now)
                if len(properties) > frame_max - 22:
                    raise MessageTooLarge(
                        f"{outgoing.to}: {len(properties)} bytes of headers, RabbitMQ takes {frame_max}"
                    )
                head = lane.head(key)
            except TransportError as error:
                if isinstance(error, ConnectionLost):
                    raise
                state.done(index, error)
                continue
            except ValueError as exc:
                state.done(index, _refused(outgoing, exc))
                continue
            lane.add(state, index, outgoing, amqp_id)
            out.append(head)
            out += frames.content_frames(lane.number, flags, properties, body, frame_max)
            size += len(body) + 300
            if size > _CHUNK:
                self._link.write(b"".join(out))
                out, size = [], 0
                await self._until(self._link.drain(), deadline)
        if out:
            self._link.write(b"".join(out))

    def _step(self, outgoing: Outgoing, steps: tuple[int, ...], now: float) -> tuple[int, bool]:
        assert outgoing.not_before is not None  # noqa: S101  # for mypy: the caller looked
        if isinstance(outgoing.to, Inbox):
            raise Refused("a reply can't be delayed")
        if not steps:
            raise NotFound(f"{outgoing.to}: no hold queue is declared for a delay")
        return step(steps, outgoing.not_before - now)

    async def _open(self, exchange: str, deadline: float) -> _Lane:
        async with self._opening:
            lane = self._lanes.get(exchange)
            if lane is not None and not lane.dead:
                return lane
            try:
                channel = await self._until(self._link.channel(), deadline)
                await self._until(channel.confirm_delivery(), deadline)
            except TimeoutError:
                raise
            except Exception as exc:
                raise errors.translate(exc, "open a channel for publishing") from exc
            lane = self._lanes[exchange] = _Lane(exchange, channel, self._link)
            return lane

    async def _until(self, awaitable: Awaitable[T], deadline: float) -> T:
        return await within(self._clock, max(0.0, deadline - self._clock.monotonic()), awaitable)


def _refused(outgoing: Outgoing, exc: Exception) -> TransportError:
    error = Refused(f"{outgoing.to}: the message has no AMQP form: {exc}")
    error.__cause__ = exc
    return error
