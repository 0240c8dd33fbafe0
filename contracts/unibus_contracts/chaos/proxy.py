"""A TCP proxy that misbehaves on demand. Each fault counts what it did to bytes or links: that it bit is seen, not assumed.

All of a run's bytes pass here, in the process that also follows its history. So where nothing is wrong a chunk goes from one
socket to the other at once; only what meets a fault waits in a queue, with a task that takes from it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Self

_PIECE = 4096  # bytes that a narrow line takes at a time, so that one is not narrow for long after it was healed
_AT_ONCE = struct.pack("ii", 1, 0)
_END = b""  # in a queue: the peer has said that it sends no more


@dataclass(frozen=True)
class Request:
    """Of HTTP. Names of headers are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """Of HTTP. `torn`: half of it is sent, then the connection is reset."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    torn: bool = False

    def written(self) -> bytes:
        told = {**self.headers, "Content-Length": str(len(self.body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
        return f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n{head}\r\n".encode() + self.body


class Proxy:
    """Listens on 127.0.0.1:`port` (0: any) and passes on to `target`, until told otherwise.

    - `silent`: bytes are taken and not passed on, in both directions; no connection is closed. `withheld` counts them.
    - `mute`: only what the server says is withheld: requests arrive, answers don't.
    - `delay`: seconds that every chunk waits; `late` counts chunks. `rate`: bytes a second at most, each way of each link.
    - `tear()`: of the next chunk that a client sends, only the first half is passed on, then the link is reset; `torn` counts.
    - `cut()`: resets all links.
    - `judge`: what is HTTP is asked of it, request by request; an `Answer` is given in place of the server's, None passes on.
    """

    def __init__(self, target: tuple[str, int], port: int = 0) -> None:
        self.target, self._port = target, port
        self.judge: Callable[[Request], Awaitable[Answer | None]] | None = None
        self.links: set[Link] = set()
        self.accepted = 0
        self.withheld = 0
        self.late = 0
        self.torn = 0
        self.delay = 0.0
        self.rate = 0.0
        self.tearing = False
        self.flowing, self.answering = asyncio.Event(), asyncio.Event()
        self.flowing.set()
        self.answering.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        assert self._server is not None, "it listens inside of `async with` only"
        return int(self._server.sockets[0].getsockname()[1])

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Link(self).client, "127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.heal()
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def spawn(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        """Of a link; waited for at the end."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @property
    def silent(self) -> bool:
        return not self.flowing.is_set()

    @silent.setter
    def silent(self, silent: bool) -> None:
        if silent:
            self.flowing.clear()
        else:
            self.flowing.set()

    @property
    def mute(self) -> bool:
        return not self.answering.is_set()

    @mute.setter
    def mute(self, mute: bool) -> None:
        if mute:
            self.answering.clear()
        else:
            self.answering.set()

    def calm(self) -> bool:
        """No fault is set."""
        well = self.flowing.is_set() and self.answering.is_set()
        return well and self.judge is None and not (self.delay or self.rate or self.tearing)

    def heal(self) -> None:
        """All faults end. Connections that were silent go on: what was withheld is passed on now."""
        self.delay = self.rate = 0.0
        self.tearing = False
        self.silent = self.mute = False
        self.judge = None

    def cut(self) -> int:
        """How many links were reset that had been used within the last second: those had work in flight."""
        now, links = time.monotonic(), list(self.links)
        for link in links:
            link.reset()
        return sum(now - link.used < 1.0 for link in links)

    def tear(self) -> None:
        self.tearing = True


class Link:
    """A client's connection and ours to the server."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.used = time.monotonic()  # when bytes last passed
        self.client, self.server = Side(self, from_client=True), Side(self, from_client=False)
        self.client.other, self.server.other = self.server, self.client

    def opened(self) -> None:
        """A client is here; the server is asked for."""
        self.proxy.accepted += 1
        self.proxy.links.add(self)
        self.client.hold()
        self.proxy.spawn(asyncio.get_running_loop().create_task(self._connect()))

    async def _connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: self.server, *self.proxy.target)
        except OSError:  # the server is down, and so are we for this client
            self.reset()
        else:
            if self not in self.proxy.links:  # reset meanwhile
                self.reset()
            self.client.go_on()

    def reset(self) -> None:
        """RST to both: what is in the buffers is lost."""
        self.proxy.links.discard(self)
        for side in (self.client, self.server):
            side.reset()


class Side(asyncio.Protocol):
    """One of the two connections of a link: what it gets goes to the `other`."""

    other: Side

    def __init__(self, link: Link, *, from_client: bool) -> None:
        self._link, self._proxy, self._from_client = link, link.proxy, from_client
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[bytes] = deque()  # what meets a fault
        self._more = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        self._holds = 0  # reasons not to read
        self._ended = False  # it sends no more

    # What the event loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._holds:
            transport.pause_reading()
        if self._from_client:
            self._link.opened()

    def data_received(self, data: bytes) -> None:
        if self._pump is None and self._proxy.calm():
            self._pass(data)
        else:
            self._wait(data)

    def eof_received(self) -> bool:
        if self._pump is None and self._proxy.calm():
            self._end()
        else:
            self._wait(_END)
        return True  # the other direction may go on

    def connection_lost(self, error: Exception | None) -> None:
        """Broken here, it can't go on there: what was said before still arrives, unless this was a reset."""
        self._more.set()
        self._link.proxy.links.discard(self._link)
        if error is not None:
            self._link.reset()
        elif self.other._transport is not None:
            self.other._transport.close()

    def pause_writing(self) -> None:
        self.other.hold()

    def resume_writing(self) -> None:
        self.other.go_on()

    # What is done

    def hold(self) -> None:
        self._holds += 1
        if self._holds == 1 and self._transport is not None:
            self._transport.pause_reading()

    def go_on(self) -> None:
        self._holds -= 1
        if self._holds == 0 and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def reset(self) -> None:
        transport = self._transport
        if transport is not None:
            if not transport.is_closing():
                sock = transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)  # without it a close is a FIN
            transport.abort()

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _pass(self, data: bytes) -> None:
        self._link.used = time.monotonic()
        self.other.write(data)

    def _end(self) -> None:
        self._ended = True
        transport = self.other._transport
        if transport is None or transport.is_closing():
            return
        if self.other._ended:  # both have said all
            transport.close()
            if self._transport is not None:
                self._transport.close()
        elif transport.can_write_eof():
            transport.write_eof()

    def _wait(self, data: bytes) -> None:
        self._waiting.append(data)
        self._more.set()
        if self._pump is None:
            self._pump = self._proxy.spawn(asyncio.get_running_loop().create_task(self._serve()))

    async def _serve(self) -> None:
        """Until nothing waits any more. Nothing is read meanwhile, so that what waits is little."""
        self.hold()
        try:
            while self._waiting:
                data = self._waiting.popleft()
                if data == _END:
                    await self._proxy.flowing.wait()
                    self._end()
                elif not await self._judged(data):
                    for piece in self._pieces(data):
                        if not await self._misbehave(piece):
                            return
                        self._pass(piece)
        except OSError:  # the server is gone while a judge asks it
            self._link.reset()
        finally:
            self._pump = None
            self.go_on()

    def _pieces(self, data: bytes) -> list[bytes]:
        if not self._proxy.rate:
            return [data]
        return [data[at : at + _PIECE] for at in range(0, len(data), _PIECE)]

    async def _misbehave(self, data: bytes) -> bool:
        """What the faults of now do to this chunk; False: it ends here."""
        proxy = self._proxy
        if proxy.tearing and self._from_client and len(data) > 1:
            proxy.tearing = False
            proxy.torn += 1
            self.other.write(data[: len(data) // 2])
            self._link.reset()
            return False
        if proxy.mute and not self._from_client:
            proxy.withheld += len(data)
            await proxy.answering.wait()
        if proxy.silent:
            proxy.withheld += len(data)
            await proxy.flowing.wait()
        if proxy.delay:
            proxy.late += 1
            await asyncio.sleep(proxy.delay)
        if proxy.rate:
            proxy.late += 1
            await asyncio.sleep(len(data) / proxy.rate)
        return True

    async def _judged(self, data: bytes) -> bool:
        """Whether it got its answer here; if not, and it was a request, all of it goes on. A client sends one when it has the
        answer to the last.
        """
        judge = self._proxy.judge
        if not self._from_client or judge is None or not data.startswith(b"POST "):
            return False
        while b"\r\n\r\n" not in data and (more := await self._next()):
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        while len(body) < int(headers.get("content-length", 0)) and (more := await self._next()):
            body += more
            data += more
        method, path, _ = first.split(" ", 2)
        answer = await judge(Request(method, path, headers, body))
        if answer is None:
            if await self._misbehave(data):
                self._pass(data)
            return True
        self._link.used = time.monotonic()
        written = answer.written()
        self.write(written[: len(written) // 2] if answer.torn else written)
        if answer.torn:
            self._link.reset()
        return True

    async def _next(self) -> bytes:
        """The next chunk of what this side says; empty: there is no more."""
        while not self._waiting and self._transport is not None and not self._transport.is_closing():
            self._more.clear()
            self.go_on()
            try:
                await self._more.wait()
            finally:
                self.hold()
        return self._waiting.popleft() if self._waiting and self._waiting[0] != _END else b""
