"""Confirmed publishing: a batch goes out in few writes, and its confirms are counted as they come.

One confirm channel per exchange, because RabbitMQ closes the channel on a publish to a missing or forbidden exchange:
so it takes no message along that goes elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from unibus.adapter import Outgoing, Results
from unibus.channel import Address, Inbox
from unibus.clock import Clock, within
from unibus.errors import (
    ConnectionLost,
    MessageTooLarge,
    NotFound,
    Refused,
    Throttled,
    Timeout,
    TransportError,
)
from unibus_rabbitmq import errors, frames, wire
from unibus_rabbitmq.lane import UNSENT, WAITING, Batch, Lane
from unibus_rabbitmq.link import Link
from unibus_rabbitmq.topology import Names, Route, step

log = logging.getLogger("unibus.rabbitmq")

_CHUNK = 256 * 1024  # bytes written before looking whether the transport is full

T = TypeVar("T")


class Publisher:
    """All publishing over one link."""

    def __init__(self, link: Link, names: Names, clock: Clock, max_body: int) -> None:
        self._link = link
        self._names = names
        self._clock = clock
        self._max_body = max_body
        self._lanes: dict[str, Lane] = {}
        self._opening = asyncio.Lock()

    async def send(
        self, batch: Sequence[Outgoing], route: Callable[[Address], Route], steps: tuple[int, ...], timeout: float
    ) -> Results:
        """One result for each. Raises ConnectionLost if the link is gone and nothing of the batch was confirmed."""
        ways = [route(outgoing.to) for outgoing in batch]
        deadline = self._clock.monotonic() + timeout
        state = Batch(len(batch))
        timer = self._clock.call_later(timeout, state.end)
        try:
            with contextlib.suppress(TimeoutError):  # what has no result then says so itself
                if self._link.wire.blocked is not None:
                    await self._until(self._link.wire.unblocked.wait(), deadline)
                await self._write(state, batch, ways, steps, deadline)
                if state.left:
                    await state.future
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
        if error is UNSENT:
            return Throttled(f"{outgoing.to}: {UNSENT}{why}")
        return Timeout(f"{outgoing.to}: {WAITING}{why}") if error is WAITING else error

    async def _write(
        self, state: Batch, batch: Sequence[Outgoing], ways: Sequence[Route], steps: tuple[int, ...], deadline: float
    ) -> None:
        now = self._clock.time()
        frame_max, lanes = self._link.frame_max, self._lanes
        out: list[bytes] = []
        size = 0
        try:
            for index, (outgoing, way) in enumerate(zip(batch, ways, strict=True)):
                try:
                    exchange, key, hop = way.exchange, way.routing_key, None
                    if outgoing.not_before is not None and outgoing.not_before > now:
                        ms, last = self._step(outgoing, steps, now)
                        exchange, key, hop = self._names.hold(ms), way.hold_key, None if last else outgoing.not_before
                    lane = lanes.get(exchange)
                    if lane is None or lane.dead:
                        self._flush(out)
                        lane = await self._open(exchange, deadline)
                    amqp_id = lane.id_for(outgoing)
                    frames_ = [lane.head(key), *self._content(outgoing, lane.number, amqp_id, hop, now, frame_max)]
                except ConnectionLost:
                    raise
                except TransportError as error:
                    state.done(index, error)
                    continue
                except (TypeError, ValueError) as exc:
                    state.done(index, _refused(outgoing, exc))
                    continue
                # From here on the lane counts the message, so it must be written, whatever happens.
                lane.add(state, index, outgoing, amqp_id)
                out += frames_
                size += len(outgoing.message.body) + 300
                if size > _CHUNK:
                    self._flush(out)
                    size = 0
                    await self._until(self._link.drain(), deadline)
        finally:
            self._flush(out)

    def _flush(self, out: list[bytes]) -> None:
        if out:
            data = b"".join(out)
            out.clear()
            self._link.write(data)

    def _content(
        self, outgoing: Outgoing, number: int, amqp_id: str, hop: float | None, now: float, frame_max: int
    ) -> list[bytes]:
        body = outgoing.message.body
        if type(body) is not bytes:
            raise TypeError(f"its body is {type(body).__name__}, not bytes")
        if len(body) > self._max_body:
            raise MessageTooLarge(f"{outgoing.to}: {len(body)} bytes, RabbitMQ takes {self._max_body}")
        flags, properties = wire.encode(outgoing, amqp_id, hop, now)
        if len(properties) > frame_max - 22:
            raise MessageTooLarge(f"{outgoing.to}: {len(properties)} bytes of headers, RabbitMQ takes {frame_max}")
        return frames.content_frames(number, flags, properties, body, frame_max)

    def _step(self, outgoing: Outgoing, steps: tuple[int, ...], now: float) -> tuple[int, bool]:
        assert outgoing.not_before is not None  # noqa: S101  # for mypy: the caller looked
        if isinstance(outgoing.to, Inbox):
            raise Refused("a reply can't be delayed")
        if not steps:
            raise NotFound(f"{outgoing.to}: no hold queue is declared for a delay")
        return step(steps, outgoing.not_before - now)

    async def _open(self, exchange: str, deadline: float) -> Lane:
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
            lane = self._lanes[exchange] = Lane(exchange, channel, self._link)
            return lane

    async def _until(self, awaitable: Awaitable[T], deadline: float) -> T:
        return await within(self._clock, max(0.0, deadline - self._clock.monotonic()), awaitable)


def _refused(outgoing: Outgoing, exc: Exception) -> TransportError:
    error = Refused(f"{outgoing.to}: the message has no AMQP form: {exc}")
    error.__cause__ = exc
    return error
