"""Confirmed publishing: a batch goes out in one write, and its confirms are counted as they come.

One confirm channel per exchange, because RabbitMQ closes the channel on a publish to a missing or forbidden exchange:
so it takes no message along that goes elsewhere. And one for each way on which a message was refused, opened anew as long as
that goes on: the server looks up a quorum queue's leader once for a channel, and where that was a node that had just died,
it refuses whatever comes on this channel, long after another one leads (seen on 3.10).
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Sequence
from typing import Any

import pamqp.frame
from aiormq.abc import AbstractChannel
from pamqp.commands import Basic

from unibus.adapter import Outgoing, Results
from unibus.channel import Address, Inbox, Topic
from unibus.clock import Clock
from unibus.driver import nobody
from unibus.errors import (
    ConnectionLost,
    MessageTooLarge,
    NotFound,
    Refused,
    Throttled,
    Timeout,
    TransportError,
    UnibusError,
)
from unibus_rabbitmq import errors, wire
from unibus_rabbitmq.link import ACK, CHANNEL_CLOSE, HEADER, METHOD, NACK, RETURN, Link, content_frames
from unibus_rabbitmq.topology import Names, Route, step

_tag = struct.Struct(">QB").unpack_from

_Way = tuple[str, str | None]  # exchange, and the routing key where a lane is for that alone

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

    def done(self, index: int, error: TransportError | None) -> None:
        self.results[index] = error
        self.left -= 1
        if not self.left and not self.future.done():
            self.future.set_result(None)


class Publisher:
    """All publishing over one link."""

    def __init__(self, link: Link, names: Names, clock: Clock, max_body: int) -> None:
        self._link = link
        self._names = names
        self._clock = clock
        self._max_body = max_body
        self._lanes: dict[_Way, _Lane] = {}
        self._refused: set[_Way] = set()  # have a lane of their own
        self._opening = asyncio.Lock()

    async def send(
        self, batch: Sequence[Outgoing], route: Callable[[Address], Route], steps: tuple[int, ...], timeout: float
    ) -> Results:
        """One result for each. Raises ConnectionLost if the link is gone and nothing of the batch was confirmed."""
        state, now = _Batch(len(batch)), self._clock.time()
        ways = [self._way(state, i, outgoing, route(outgoing.to), steps, now) for i, outgoing in enumerate(batch)]
        try:
            async with asyncio.timeout(timeout):
                await self._link.unblocked.wait()
                for lane in dict.fromkeys(self._lane(way[0], way[1]) for way in ways if way is not None):
                    await self._open(lane)
                self._write(state, batch, ways, now)
                await self._link.drain()
                if state.left:
                    await state.future
        except TimeoutError:  # what has no result then says so itself
            return [self._undecided(outgoing, error) for outgoing, error in zip(batch, state.results, strict=True)]
        lost = self._link.lost
        if lost is not None and all(error is lost for error in state.results):
            raise lost
        return state.results

    def _way(
        self, state: _Batch, index: int, outgoing: Outgoing, route: Route, steps: tuple[int, ...], now: float
    ) -> tuple[str, str, float | None] | None:
        """Exchange, routing key, and when it is due if it still needs another hop then."""
        if outgoing.not_before is None or outgoing.not_before <= now:
            return route.exchange, route.routing_key, None
        if isinstance(outgoing.to, Inbox):
            state.done(index, Refused("a reply can't be delayed"))
            return None
        if not steps:
            state.done(index, NotFound(f"{outgoing.to}: no hold queue is declared for a delay"))
            return None
        ms, last = step(steps, outgoing.not_before - now)
        return f"{self._names.hold}{ms}", route.hold_key, None if last else outgoing.not_before

    def _write(self, state: _Batch, batch: Sequence[Outgoing], ways: Sequence[Any], now: float) -> None:
        """Without a pause: the server numbers what comes on a channel, and the lane has to count the same way."""
        out: list[bytes] = []
        for index, (outgoing, way) in enumerate(zip(batch, ways, strict=True)):
            if way is None:
                continue
            exchange, key, hop = way
            lane = self._lanes.get((exchange, key)) or self._lanes[exchange, None]
            if lane.dead:  # since a moment ago; undecided is what it would be a moment later
                state.done(index, self._link.lost or ConnectionLost("the publishing channel was closed"))
                continue
            amqp_id = lane.id_for(outgoing.message.id)
            try:
                properties = wire.encode(outgoing, amqp_id, hop, now)
                frames = (lane.head(key), *self._content(outgoing, lane.number, properties))
            except TransportError as error:
                state.done(index, error)
            except (TypeError, ValueError, struct.error) as exc:
                state.done(index, Refused(f"{outgoing.to}: the message has no AMQP form: {exc}"))
            else:
                out += frames
                lane.add(state, index, outgoing, amqp_id, key)
        if out:
            self._link.write(b"".join(out))

    def _content(self, outgoing: Outgoing, number: int, properties: bytes) -> list[bytes]:
        body, frame_max = outgoing.message.body, self._link.frame_max
        if type(body) is not bytes:
            raise TypeError(f"its body is {type(body).__name__}, not bytes")
        if len(body) > self._max_body:
            raise MessageTooLarge(f"{outgoing.to}: {len(body)} bytes, RabbitMQ takes {self._max_body}")
        if len(properties) > frame_max - 20:
            raise MessageTooLarge(f"{outgoing.to}: {len(properties)} bytes of headers, RabbitMQ takes {frame_max}")
        return content_frames(number, properties, body, frame_max)

    def _lane(self, exchange: str, key: str) -> _Way:
        return (exchange, key) if (exchange, key) in self._refused else (exchange, None)

    async def _open(self, way: _Way) -> None:
        """See to it that there is a lane."""
        if way in self._lanes and not self._lanes[way].used_up:
            return
        async with self._opening:
            old = self._lanes.get(way)
            if old is not None and not old.used_up:
                return
            try:
                channel = await self._link.channel()
                await channel.confirm_delivery()
                self._lanes[way] = _Lane(way, channel, self._link, self._refused)
                if old is not None and not old.dead:
                    await old.channel.close()
            except TimeoutError:
                raise
            except Exception as exc:
                raise errors.translate(exc, "open a channel for publishing") from exc

    def _undecided(self, outgoing: Outgoing, error: TransportError | None) -> TransportError | None:
        why = f"; RabbitMQ blocks publishing: {self._link.blocked}" if self._link.blocked is not None else ""
        if error is _UNSENT or error is _WAITING:
            return type(error)(f"{outgoing.to}: {error}{why}")
        return error


class _Lane:
    """A confirm channel: what is published on it, and what the server says to it."""

    def __init__(self, way: _Way, channel: AbstractChannel, link: Link, refused: set[_Way]) -> None:
        self.channel = channel
        self.number = channel.number
        self.dead = False
        self._exchange, self._key = way
        self._link = link
        self._refused = refused  # the ways on which something was, for whoever publishes next
        self._stale = False  # something was refused on this lane
        self._next = 1  # the server counts the publishes of a channel from 1
        # tag -> place of the result, AMQP message id, message, routing key
        self._pending: dict[int, tuple[_Batch, int, str, Outgoing, str]] = {}
        self._flying: dict[str, int] = {}  # AMQP message id -> tag
        self._returned: dict[int, str] = {}  # tag -> the server's words; its ack follows
        self._return_text = ""  # of the return whose content is coming
        self._heads: dict[str, bytes] = {}  # routing key -> basic.publish frame
        link.sinks[channel.number] = self._frame
        channel.closing.add_done_callback(self._closed)

    def id_for(self, message_id: str) -> str:
        """An AMQP message id that no other unconfirmed message of this channel has."""
        amqp_id = message_id
        if len(amqp_id) > 63 or amqp_id in self._flying or not amqp_id:
            amqp_id = f"{amqp_id[:60]}~{self._next}"
            while amqp_id in self._flying:  # only where the logical ids look like this themselves
                amqp_id += "~"
        return amqp_id

    @property
    def used_up(self) -> bool:
        """Another one has to take its place. A lane of one way alone goes once nothing is out on it, so that order is kept."""
        return self.dead or (self._stale and self._key is not None and not self._pending)

    def add(self, batch: _Batch, index: int, outgoing: Outgoing, amqp_id: str, key: str) -> None:
        """Count it: the caller writes it before anything else can be written to this channel."""
        batch.results[index] = _WAITING
        self._pending[self._next] = (batch, index, amqp_id, outgoing, key)
        self._flying[amqp_id] = self._next
        self._next += 1

    def head(self, routing_key: str) -> bytes:
        head = self._heads.get(routing_key)
        if head is None:
            if len(self._heads) > 1000:  # reply addresses come and go
                self._heads.clear()
            publish = Basic.Publish(exchange=self._exchange, routing_key=routing_key, mandatory=True)
            head = self._heads[routing_key] = pamqp.frame.marshal(publish, self.number)
        return head

    def _frame(self, kind: int, payload: bytes) -> bool:
        if kind == METHOD:
            method = payload[:4]
            if method in (ACK, NACK):
                tag, multiple = _tag(payload, 4)
                self._confirm(tag, multiple, refused=method == NACK)
                return True
            if method == RETURN:
                self._return_text = wire.text(payload, 6)[0]
                return True
            if method == CHANNEL_CLOSE:
                self._leave()  # aiormq answers; after the answer the server takes a frame of this channel for a fault
            return False
        if kind == HEADER:  # all content on this channel is of returns
            tag_of = self._flying.get(wire.decode_properties(payload).get("message_id", ""))
            if tag_of is not None:
                self._returned[tag_of] = self._return_text
        return True

    def _confirm(self, tag: int, multiple: int, *, refused: bool) -> None:
        pending = self._pending
        tags = [tag]
        if multiple:
            tags.clear()
            for each in pending:  # ascending: in the order of publishing
                if each > tag:
                    break
                tags.append(each)
        for each in tags:
            if (entry := pending.pop(each, None)) is None:
                continue
            batch, index, amqp_id, outgoing, key = entry
            del self._flying[amqp_id]
            error: TransportError | None = None
            if refused:
                self._stale = True
                self._refused.add((self._exchange, key))
                error = Throttled(f"RabbitMQ refused a message to {outgoing.to}: a queue is full or has no leader")
            elif self._returned and (words := self._returned.pop(each, None)) is not None:
                error = _unrouted(outgoing, words)
            batch.done(index, error)

    def _leave(self) -> None:
        self.dead = True
        self._link.sinks.pop(self.number, None)

    def _closed(self, closing: asyncio.Future[Any]) -> None:
        """The channel is gone; what is unconfirmed is undecided, unless the server said what was wrong."""
        if not self.dead:
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
        for batch, index, _, outgoing, _ in self._pending.values():
            mine: UnibusError = error
            if most is not None and len(outgoing.message.body) > most:
                mine = MessageTooLarge(f"{outgoing.to}: {len(outgoing.message.body)} bytes, RabbitMQ takes {most}")
            elif most is not None:
                mine = ConnectionLost("the channel was closed for another message; this one is undecided")
            batch.done(index, mine if isinstance(mine, TransportError) else Refused(f"{outgoing.to}: {mine}"))
        self._pending.clear()
        self._flying.clear()


def _unrouted(outgoing: Outgoing, words: str) -> TransportError:
    if isinstance(outgoing.to, Topic | Inbox):
        return nobody(outgoing.to)
    return NotFound(f"{outgoing.to}: there is no queue for it; declare it first ({words})")
