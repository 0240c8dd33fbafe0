"""One connection to RabbitMQ: aio-pika's, with a short cut for the frames that travel once per message.

aio-pika keeps the handshake, heartbeats, channels and topology. The frames of the channels that have a sink are taken out of
the byte stream before aiormq sees them (it would start a task for each delivery), and publishes and acks are written as ready
frames. Hooked in by aiormq's TransportFactory, the supported way to bring an own transport.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import struct
from collections.abc import Callable
from typing import Any

import aio_pika
from aiormq.abc import AbstractChannel
from aiormq.connection import TransportFactory
from aiormq.exceptions import AMQPConnectionError
from yarl import URL

from unibus.errors import ConnectionLost
from unibus.waiting import answered
from unibus_rabbitmq import wire

log = logging.getLogger("unibus.rabbitmq")

METHOD, HEADER, BODY, _HEARTBEAT = 1, 2, 3, 8
_BLOCKED, _UNBLOCKED, _CLOSE = b"\x00\x0a\x00\x3c", b"\x00\x0a\x00\x3d", b"\x00\x0a\x00\x32"
CHANNEL_CLOSE = b"\x00\x14\x00\x28"
RETURN, DELIVER = b"\x00\x3c\x00\x32", b"\x00\x3c\x00\x3c"
ACK, NACK = b"\x00\x3c\x00\x50", b"\x00\x3c\x00\x78"

_BEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"
_BEAT_EVERY = 1.0
_CLOSE_TIMEOUT = 5.0
_OVERHEAD = 8  # bytes of a frame beside its payload: type, channel, size; and the end
_head = struct.Struct(">BHI")
_settle = struct.Struct(">BHIIQBB").pack
_content = struct.Struct(">BHIIQ").pack

Sink = Callable[[int, bytes], bool]  # type and payload of a frame. False: not mine, aiormq shall have it


def ack_frame(channel: int, tag: int, multiple: bool) -> bytes:
    return _settle(METHOD, channel, 13, 0x003C0050, tag, multiple, 0xCE)


def nack_frame(channel: int, tag: int) -> bytes:
    """basic.nack of one delivery, back to its queue."""
    return _settle(METHOD, channel, 13, 0x003C0078, tag, 2, 0xCE)


def content_frames(channel: int, properties: bytes, body: bytes, frame_max: int) -> list[bytes]:
    """The header frame and the body frames, in pieces."""
    frames = [_content(HEADER, channel, 12 + len(properties), 60 << 16, len(body)), properties, b"\xce"]
    room = frame_max - _OVERHEAD
    for start in range(0, len(body), room):
        part = body[start : start + room]  # of bytes that fit, no copy
        frames += (_head.pack(BODY, channel, len(part)), part, b"\xce")
    return frames


class Malformed(ConnectionError):
    """No AMQP. Raised into the event loop, which ends the connection with it, as with any other loss."""


class _Tap(asyncio.StreamReader):
    """Cuts the stream into frames; gives those of a sink to it, at once, and the rest to aiormq."""

    def __init__(self, sinks: dict[int, Sink]) -> None:
        super().__init__()
        self._sinks = sinks
        self._rest = b""
        self._beat = 0.0
        self._now = asyncio.get_running_loop().time

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]  # the protocol gives bytes, and only it calls this
        if self._rest:
            data = self._rest + data
        sinks, head = self._sinks, _head.unpack_from
        at, end = 0, len(data)
        passed = []
        taken = False
        while end - at >= _OVERHEAD:
            kind, number, size = head(data, at)
            stop = at + size + _OVERHEAD
            if kind > _HEARTBEAT:  # no frame: the server speaks another version of the protocol and says so
                stop = end
            elif stop > end:
                break
            sink = sinks.get(number)
            try:
                mine = sink is not None and sink(kind, data[at + 7 : stop - 1])
            except (IndexError, AttributeError, struct.error) as exc:  # cut off, or no method before its content
                raise Malformed("RabbitMQ has sent a frame that can't be read") from exc
            if mine:
                taken = True
            else:
                passed.append(data[at:stop])
            at = stop
        self._rest = data[at:]
        if taken and (now := self._now()) - self._beat > _BEAT_EVERY:
            # A busy server sends no heartbeats, and aiormq would take a link for stuck of which it sees nothing else.
            self._beat = now
            passed.append(_BEAT)
        if passed:
            super().feed_data(b"".join(passed))


class Link(TransportFactory):
    """A connection and its transport. `lost` says why it is no longer open, `blocked` why the server takes no message."""

    def __init__(self, url: URL, context: ssl.SSLContext | None) -> None:
        self.connection = aio_pika.Connection(url, ssl_context=context)
        self.connection.kwargs["transport_factory"] = self
        self.sinks: dict[int, Sink] = {0: self._control}
        self.lost: ConnectionLost | None = None
        self.blocked: str | None = None
        self.unblocked = asyncio.Event()
        self.unblocked.set()
        self.frame_max = 131072
        self.version = ""
        self._context = context
        self.said = (0, "")  # connection.close: reply code and text
        self._writer: Any = None  # asyncio.StreamWriter, once there is a transport
        self._amqp: Any

    async def open(self, timeout: float) -> None:
        """Connect to one host. Raises what aiormq raises; `said` is what the server gave as its reason, if it did."""
        try:
            async with asyncio.timeout(timeout):
                await self.connection.connect()
        except BaseException:
            await self.close()
            raise
        assert self.connection.transport is not None  # noqa: S101  # for mypy: it is connected
        self._amqp = self.connection.transport.connection
        self.frame_max = self._amqp.connection_tune.frame_max or self.frame_max
        self.version = str(self._amqp.server_properties.get("version", ""))
        self._amqp.closing.add_done_callback(self._closed)

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """For aiormq."""
        loop = asyncio.get_running_loop()
        reader = _Tap(self.sinks)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        host, port = url.host or "localhost", url.port or 5672
        try:
            transport, _ = await loop.create_connection(lambda: protocol, host, port, ssl=self._context)
        except OSError as exc:
            raise AMQPConnectionError(*exc.args) from exc
        self._writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        return reader, self._writer

    def _control(self, kind: int, payload: bytes) -> bool:
        """Channel 0: only listened to."""
        method = payload[:4] if kind == METHOD else b""
        if method == _BLOCKED:
            self.blocked = wire.text(payload, 4)[0]
            self.unblocked.clear()
        elif method == _UNBLOCKED:
            self.blocked = None
            self.unblocked.set()
        elif method == _CLOSE:
            self.said = int.from_bytes(payload[4:6]), wire.text(payload, 6)[0]
        return False

    def _closed(self, closing: asyncio.Future[Any]) -> None:
        cause = None if closing.cancelled() else closing.exception()
        code, text = self.said
        what = (
            f"RabbitMQ closed the connection: {code} {text}" if code else f"the connection to RabbitMQ is gone: {cause}"
        )
        self.lost = ConnectionLost(what)
        self.lost.__cause__ = cause
        self.sinks.clear()
        self.unblocked.set()  # nobody waits for a link that is gone

    async def channel(self) -> AbstractChannel:
        """A new channel without confirms. Raises ConnectionLost."""
        if self.lost is not None:
            raise self.lost
        channel: AbstractChannel = await self._amqp.channel(publisher_confirms=False)
        return channel

    def write(self, data: bytes) -> None:
        """Whole frames only: aiormq writes to the same transport, a whole frame at a time."""
        if self.lost is not None:
            raise self.lost
        try:
            self._writer.write(data)
        except RuntimeError as exc:  # its end is on its way
            raise ConnectionLost(f"the connection to RabbitMQ is being closed: {exc}") from exc

    async def drain(self) -> None:
        """Wait while the transport is full."""
        try:
            await self._writer.drain()
        except OSError as exc:
            raise self.lost or ConnectionLost(f"the connection to RabbitMQ is gone: {exc}") from exc

    async def close(self) -> None:
        """Idempotent, bounded, and never raises: whatever aiormq thinks of it, the connection is gone afterwards."""
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                # It waits for tasks of its own, which it may just have cancelled since the server said nothing any more.
                await answered(self.connection.close())
        except TimeoutError:
            log.warning("RabbitMQ did not answer the end of the connection within %g s; cut", _CLOSE_TIMEOUT)
        except Exception as exc:
            log.debug("the connection to RabbitMQ did not end in order: %s", exc)
        if self._writer is not None:
            self._writer.transport.abort()
