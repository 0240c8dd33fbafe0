"""A TCP proxy that misbehaves on demand. Each fault counts what it did to bytes or links: that it bit is seen, not assumed."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Self

_CHUNK = 65536
_AT_ONCE = struct.pack("ii", 1, 0)


@dataclass(eq=False)
class Link:
    """A client's connection and ours to the server."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    used: float = field(default_factory=time.monotonic)  # when bytes last passed

    def reset(self) -> None:
        """RST to both: what is in the buffers is lost."""
        for writer in (self.client, self.server):
            sock = writer.get_extra_info("socket")
            if not writer.is_closing():
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)  # without it a close is a FIN
            writer.transport.abort()


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
        self._tearing = False
        self._flowing, self._answering = asyncio.Event(), asyncio.Event()
        self._flowing.set()
        self._answering.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        assert self._server is not None, "it listens inside of `async with` only"
        return int(self._server.sockets[0].getsockname()[1])

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.heal()
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def silent(self) -> bool:
        return not self._flowing.is_set()

    @silent.setter
    def silent(self, silent: bool) -> None:
        if silent:
            self._flowing.clear()
        else:
            self._flowing.set()

    @property
    def mute(self) -> bool:
        return not self._answering.is_set()

    @mute.setter
    def mute(self, mute: bool) -> None:
        if mute:
            self._answering.clear()
        else:
            self._answering.set()

    def heal(self) -> None:
        """All faults end. Connections that were silent go on: what was withheld is passed on now."""
        self.delay = self.rate = 0.0
        self._tearing = False
        self.silent = self.mute = False
        self.judge = None

    def cut(self) -> int:
        """How many links were reset that had been used within the last second: those had work in flight."""
        now, links = time.monotonic(), list(self.links)
        for link in links:
            link.reset()
        return sum(now - link.used < 1.0 for link in links)

    def tear(self) -> None:
        self._tearing = True

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, requests: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            answers, server = await asyncio.open_connection(*self.target)
        except OSError:  # the server is down, and so are we for this client
            client.transport.abort()
            return
        link = Link(client, server)
        self.links.add(link)
        try:
            await asyncio.gather(
                self._pump(link, requests, server, from_client=True),
                self._pump(link, answers, client, from_client=False),
            )
        finally:
            self.links.discard(link)
            link.reset()

    async def _pump(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, from_client: bool
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                if from_client and self.judge is not None and data.startswith(b"POST "):
                    data, judged = await self._judged(link, data, reader)
                    if judged:
                        continue
                if not await self._misbehave(link, data, from_client):
                    break
                link.used = time.monotonic()
                writer.write(data)
                await writer.drain()
        with suppress(OSError, RuntimeError):  # RuntimeError: the transport is closed already
            if writer.can_write_eof():
                writer.write_eof()

    async def _judged(self, link: Link, data: bytes, reader: asyncio.StreamReader) -> tuple[bytes, bool]:
        """The whole request, and whether it got its answer here. A client sends one when it has the answer to the last."""
        while b"\r\n\r\n" not in data and (more := await reader.read(_CHUNK)):
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        missing = int(headers.get("content-length", 0)) - len(body)
        if missing > 0:
            body += (rest := await reader.readexactly(missing))
            data += rest
        method, path, _ = first.split(" ", 2)
        answer = None if self.judge is None else await self.judge(Request(method, path, headers, body))
        if answer is None:
            return data, False
        link.used = time.monotonic()
        written = answer.written()
        link.client.write(written[: len(written) // 2] if answer.torn else written)
        await link.client.drain()
        if answer.torn:
            link.reset()
        return data, True

    async def _misbehave(self, link: Link, data: bytes, from_client: bool) -> bool:
        """What the faults of now do to this chunk; False: it ends here."""
        if self._tearing and from_client and len(data) > 1:
            self._tearing = False
            self.torn += 1
            link.server.write(data[: len(data) // 2])
            with suppress(OSError):
                await link.server.drain()
            link.reset()
            return False
        if self.mute and not from_client:
            self.withheld += len(data)
            await self._answering.wait()
        if self.silent:
            self.withheld += len(data)
            await self._flowing.wait()
        if self.delay:
            self.late += 1
            await asyncio.sleep(self.delay)
        if self.rate:
            self.late += 1
            await asyncio.sleep(len(data) / self.rate)
        return True
