"""A connection to Redis whose server stops answering, without a server: one of ours says what Redis would, as far as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hiredis import Reader

from unibus.errors import ConnectionLost
from unibus_redis import link as module
from unibus_redis.config import Login
from unibus_redis.link import Link

LOGIN = Login("svc", 60.0, None, None, None, 0)
LONG = 60.0  # bounds a failure


class Server:
    """Answers the login; then only while it is well."""

    def __init__(self) -> None:
        self.well = True
        self.heard: list[bytes] = []
        self.came = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = Reader()
        while data := await reader.read(1000):
            parser.feed(data)
            while command := parser.gets():
                self.heard.append(command[0])
                self.came.set()
                if self.well:
                    writer.write(b":7\r\n" if command[-1] == b"ID" else b"+OK\r\n")
        writer.close()


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing looks by itself: how busy the machine is must not matter."""
    monkeypatch.setattr(module, "_LOOK", 3600.0)


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Server, int]]:
    server = Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with listening:
        yield server, listening.sockets[0].getsockname()[1]


@asynccontextmanager
async def linked(port: int, *, waits: bool = False) -> AsyncIterator[Link]:
    link = await Link.open(LOGIN, "127.0.0.1", port, waits=waits)
    try:
        yield link
    finally:
        await link.close()


def look(link: Link, times: int = module._LOOKS + 1) -> None:
    for _ in range(times):
        link._look()


async def test_a_server_that_hangs_is_gone_for_all_that_wait() -> None:
    """Its connection stays open: without this, calls timed out one after the other, and nobody looked for another primary."""
    async with served() as (server, port), linked(port) as link:
        server.came.clear()
        server.well = False
        calls = [asyncio.create_task(link.run(("GET", "x"), timeout=LONG)) for _ in range(2)]
        await server.came.wait()
        look(link, module._LOOKS)
        assert link.lost is None
        look(link, 1)
        for call in calls:
            with pytest.raises(ConnectionLost, match="has answered nothing for"):
                await call
        with pytest.raises(ConnectionLost):
            await link.run(("GET", "x"))


async def test_who_asks_nothing_hears_nothing_and_that_is_no_silence() -> None:
    async with served() as (_, port), linked(port) as link:
        look(link, 20)
        assert await link.run(("GET", "x"), timeout=LONG) == [b"OK"]


async def test_any_answer_ends_a_silence() -> None:
    async with served() as (_, port), linked(port) as link:
        for _ in range(3):
            call = asyncio.create_task(link.run(("GET", "x"), timeout=LONG))
            await asyncio.sleep(0)  # it is asked
            look(link, module._LOOKS)
            assert await call == [b"OK"]


async def test_a_connection_that_waits_for_replicas_ends_with_the_one_that_is_answered_at_once() -> None:
    async with served() as (server, port), linked(port) as link, linked(port, waits=True) as sending:
        link.sending = sending
        server.well = False
        call = asyncio.create_task(sending.run(("WAIT", "1"), timeout=LONG))
        await asyncio.sleep(0)  # it waits
        look(link)
        with pytest.raises(ConnectionLost, match="has answered nothing"):
            await call


async def test_a_slow_wait_is_no_silence_while_the_server_answers() -> None:
    async with served() as (server, port), linked(port) as link, linked(port, waits=True) as sending:
        link.sending = sending
        server.came.clear()
        server.well = False
        call = asyncio.create_task(sending.run(("WAIT", "1"), timeout=LONG))
        await server.came.wait()
        server.well = True
        for _ in range(3 * module._LOOKS):
            look(link, 1)
            assert await link.run(("GET", "x"), timeout=LONG) == [b"OK"]  # after the answer to what the look has asked
        assert server.heard.count(b"PING") == 3 * module._LOOKS
        assert not call.done()
        call.cancel()
