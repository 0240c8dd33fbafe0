"""One connection to RabbitMQ: aio-pika's, with a short cut for the frames that travel once per message.

aio-pika keeps the handshake, heartbeats, channels and topology. Deliveries, confirms and returns of the channels that
have a sink are taken out of the byte stream before aiormq sees them (it would start a task for each), and publishes and
acks are written as ready frames. Hooked in by aiormq's TransportFactory, the supported way to bring an own transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from typing import Any, Protocol

import aio_pika
from aiormq.abc import AbstractChannel
from aiormq.connection import TransportFactory
from aiormq.exceptions import AMQPConnectionError
from yarl import URL

from unibus.errors import ConnectionLost
from unibus_rabbitmq import frames

log = logging.getLogger("unibus.rabbitmq")

_BEAT_EVERY = 1.0


class Sink(Protocol):
    """Takes the frames of one channel. False: not mine, aiormq shall have it."""

    def frame(self, kind: int, payload: bytes) -> bool: ...


class _Tap(asyncio.StreamReader):
    """Cuts the stream into frames; gives those of a sink to it, at once, and the rest to aiormq."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self._wire = wire
        self._rest = b""
        self._beat = 0.0
        self._loop_time = asyncio.get_running_loop().time

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]  # the protocol gives bytes, and only it calls this
        if self._rest:
            data = self._rest + data
        sinks, head = self._wire.sinks, frames.frame_head
        at, end = 0, len(data)
        passed = []
        taken = False
        while end - at >= frames.OVERHEAD:
            kind, number, size = head(data, at)
            stop = at + size + frames.OVERHEAD
            if kind > frames.HEARTBEAT:  # no frame: the server speaks another version of the protocol and says so
                stop = end
            elif stop > end:
                break
            sink = sinks.get(number)
            if sink is not None and sink.frame(kind, data[at + 7 : stop - 1]):
                taken = True
            else:
                passed.append(data[at:stop])
            at = stop
        self._rest = data[at:]
        if taken and (now := self._loop_time()) - self._beat > _BEAT_EVERY:
            # A busy server sends no heartbeats, and aiormq would take a link for stuck of which it sees nothing else.
            self._beat = now
            passed.append(frames.BEAT)
        if passed:
            super().feed_data(b"".join(passed))


class Wire(TransportFactory):
    """The transport of one connection, and what the server says on channel 0."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self.sinks: dict[int, Sink] = {0: self}
        self.writer: asyncio.StreamWriter
        self.closed_by: tuple[int, str] | None = None  # connection.close: reply code and text
        self.blocked: str | None = None
        self.unblocked = asyncio.Event()
        self.unblocked.set()
        self._context = context

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        reader = _Tap(self)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        host, port = url.host or "localhost", url.port or 5672
        try:
            transport, _ = await loop.create_connection(lambda: protocol, host, port, ssl=self._context)
        except OSError as exc:
            raise AMQPConnectionError(*exc.args) from exc
        self.writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        return reader, self.writer

    def frame(self, kind: int, payload: bytes) -> bool:
        """Channel 0: only listened to."""
        if kind == frames.METHOD:
            method = payload[:4]
            if method == frames.BLOCKED:
                self.blocked = frames.read_shorts(payload, 4, 1)[0]
                self.unblocked.clear()
            elif method == frames.UNBLOCKED:
                self.blocked = None
                self.unblocked.set()
            elif method == frames.CLOSE:
                self.closed_by = frames.read_reason(payload)
        return False


class _Connection(aio_pika.Connection):
    """aio-pika's plain connection over a `Wire`."""

    def __init__(self, url: URL, wire: Wire, context: ssl.SSLContext | None) -> None:
        super().__init__(url, ssl_context=context)
        self.kwargs["transport_factory"] = wire


class Link:
    """An open connection. `lost` says why it is no longer open."""

    def __init__(self, connection: aio_pika.Connection, wire: Wire) -> None:
        assert connection.transport is not None  # noqa: S101  # for mypy: it is connected
        self.connection = connection
        self.wire = wire
        self.lost: ConnectionLost | None = None
        self._amqp = connection.transport.connection
        self._when_lost: list[Callable[[ConnectionLost], None]] = []
        self.frame_max: int = self._amqp.connection_tune.frame_max or 131072
        self.version = str(self._amqp.server_properties.get("version", ""))
        self._amqp.closing.add_done_callback(self._closed)

    @classmethod
    async def open(cls, url: URL, context: ssl.SSLContext | None, timeout: float) -> Link:
        """Connect to one host. Raises what aiormq raises, or ServerClosed where the server said why."""
        wire = Wire(context)
        connection = _Connection(url, wire, context)
        try:
            async with asyncio.timeout(timeout):
                await connection.connect()
        except BaseException as exc:
            await connection.close()
            if wire.closed_by is not None and isinstance(exc, Exception):
                raise ServerClosed(*wire.closed_by) from exc
            raise
        return cls(connection, wire)

    @property
    def up(self) -> bool:
        return self.lost is None

    def when_lost(self, callback: Callable[[ConnectionLost], None]) -> None:
        self._when_lost.append(callback)

    def forget(self, callback: Callable[[ConnectionLost], None]) -> None:
        with contextlib.suppress(ValueError):
            self._when_lost.remove(callback)

    def _closed(self, closing: asyncio.Future[Any]) -> None:
        cause = None if closing.cancelled() else closing.exception()
        if self.wire.closed_by is not None:
            code, text = self.wire.closed_by
            error = ConnectionLost(f"RabbitMQ closed the connection: {code} {text}")
        else:
            error = ConnectionLost(f"the connection to RabbitMQ is gone: {cause or 'closed'}")
        error.__cause__ = cause
        self.lost = error
        self.wire.sinks.clear()
        self.wire.unblocked.set()  # nobody waits for a link that is gone
        for callback in self._when_lost:
            callback(error)
        self._when_lost.clear()

    async def channel(self) -> AbstractChannel:
        """A new channel without confirms. Raises ConnectionLost."""
        if self.lost is not None:
            raise self.lost
        return await self._amqp.channel(publisher_confirms=False)

    def write(self, data: bytes) -> None:
        """Whole frames only: aiormq writes to the same transport, a whole frame at a time."""
        if self.lost is not None:
            raise self.lost
        self.wire.writer.write(data)

    async def drain(self) -> None:
        """Wait while the transport is full."""
        try:
            await self.wire.writer.drain()
        except OSError as exc:
            raise self.lost or ConnectionLost(f"the connection to RabbitMQ is gone: {exc}") from exc

    async def close(self, timeout: float) -> None:
        """Idempotent, and bounded."""
        try:
            async with asyncio.timeout(timeout):
                await self.connection.close()
        except TimeoutError:
            log.warning("RabbitMQ did not answer the end of the connection within %g s; cut", timeout)
            self.wire.writer.transport.abort()


class ServerClosed(AMQPConnectionError):
    """The server ended the connection during the handshake, and said why."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code} {text}")
        self.code = code
        self.text = text
