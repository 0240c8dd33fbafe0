"""The broker's own limit, nearly: frames encoded once, on a blocking socket, and nothing done with what comes back.

No client can do this, since its messages differ. It says how much of the time is RabbitMQ's: a contestant that comes near
to it waits for the broker, and no work on the contestant makes it faster.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import pamqp.frame
from pamqp.commands import Basic, Channel, Confirm, Connection
from pamqp.header import ContentHeader, ProtocolHeader

from benchmarks.flows import Flow, Raw
from benchmarks.rabbitmq_raw import CONTENT_TYPE, PREFETCH
from benchmarks.watch import Watch

_HEAD = struct.Struct(">BHI")
_TAG = struct.Struct(">QB")
_ACK, _DELIVER = b"\x00\x3c\x00\x50", b"\x00\x3c\x00\x3c"
_FRAME = 100_000  # below what both sides agree on
_TIMEOUT = 60.0


class Socket(Raw):
    """Plain TCP only."""

    name = "pre-encoded frames"

    def __init__(self, url: str, *, every: int) -> None:
        self._url = urlsplit(url)
        self._every = every

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._open)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._close)

    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        await asyncio.to_thread(self._send, queue, messages, flow, watch)

    async def consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int:
        return await asyncio.to_thread(self._consume, queue, messages, flow, watch)

    def _open(self) -> None:
        url = self._url
        self._socket = socket.create_connection((url.hostname or "localhost", url.port or 5672), _TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self._socket.sendall(ProtocolHeader().marshal())
        self._answer()
        secret = f"\0{unquote(url.username or 'guest')}\0{unquote(url.password or 'guest')}"
        self._ask(Connection.StartOk(client_properties={}, mechanism="PLAIN", response=secret, locale="en_US"), 0)
        self._put(Connection.TuneOk(2047, 131072, 0), 0)
        self._ask(Connection.Open(unquote(url.path[1:]) or "/"), 0)
        self._ask(Channel.Open(), 1)

    def _close(self) -> None:
        self._ask(Connection.Close(200, "", 0, 0), 0)
        self._socket.close()

    def _put(self, frame: Any, channel: int) -> None:
        self._socket.sendall(pamqp.frame.marshal(frame, channel))

    def _ask(self, frame: Any, channel: int) -> None:
        self._put(frame, channel)
        self._answer()

    def _answer(self) -> None:
        for _ in self._frames():
            return

    def _frames(self) -> Iterator[bytes]:
        """The payloads of what came with one read; at least one."""
        found = False
        while not found:
            data = self._socket.recv(1 << 18)
            if not data:
                raise ConnectionError("RabbitMQ closed the connection")
            data = self._rest + data
            at, end, payloads = 0, len(data), []
            while end - at >= _HEAD.size:
                stop = at + _HEAD.size + _HEAD.unpack_from(data, at)[2] + 1
                if stop > end:
                    break
                payloads.append(data[at + _HEAD.size : stop - 1])
                at = stop
            self._rest = data[at:]
            found = bool(payloads)
            yield from payloads

    def _send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        properties = Basic.Properties(
            content_type=CONTENT_TYPE,
            headers=dict(flow.headers) or None,
            delivery_mode=2,
            message_id="0123456789abcdef-0000",
            timestamp=datetime.now(UTC).replace(microsecond=0),
        )
        message = b"".join(
            (
                pamqp.frame.marshal(Basic.Publish(routing_key=queue, mandatory=True), 1),
                pamqp.frame.marshal(ContentHeader(properties=properties, body_size=len(flow.body)), 1),
                *(
                    _HEAD.pack(3, 1, len(part)) + part + b"\xce"
                    for part in (flow.body[at : at + _FRAME] for at in range(0, len(flow.body), _FRAME))
                ),
            )
        )
        self._ask(Confirm.Select(), 1)
        sent = confirmed = 0
        watch.start()
        while confirmed < messages:
            more = min(flow.in_flight - (sent - confirmed), messages - sent)
            if more:
                self._socket.sendall(message * more)
                sent += more
            singles = 0
            for payload in self._frames():
                if payload[:4] != _ACK:
                    raise ConnectionError("RabbitMQ refused a publish")
                tag, multiple = _TAG.unpack_from(payload, 4)
                if multiple:  # of those below, some may have been confirmed one by one
                    confirmed, singles = max(tag, confirmed), 0
                else:
                    singles += 1
            confirmed = min(sent, confirmed + singles)
        watch.stop()

    def _consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int:
        prefetch = flow.prefetch or PREFETCH
        self._ask(Basic.Qos(prefetch_count=prefetch), 1)
        every = min(self._every, max(1, prefetch // 2))
        count = acked = 0
        watch.start()
        self._put(Basic.Consume(queue=queue), 1)
        while count < messages:
            for payload in self._frames():
                if payload[:4] == _DELIVER:
                    if not count:
                        watch.restart()
                    count += 1
            if count - acked >= every or count == messages:
                self._put(Basic.Ack(count, multiple=True), 1)
                acked = count
        watch.stop()
        return count
