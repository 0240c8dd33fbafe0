"""What the contracts can't know: rows of other programs, a file that is locked or none at all, processes that die."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from unibus import Bus, ConfigError, Delivery, Message, NotFound, Queue, Throttled, Unroutable
from unibus.adapter import Outgoing, Source
from unibus.channel import Inbox
from unibus_contracts.kit import eventually

ORDERS: Queue[bytes] = Queue("orders")
NOWHERE = "unibus.reply.gone.0123456789abcdef"

# A consumer that takes everything, says so, and waits for its end.
TAKER = """
import asyncio, sys
from unibus import Bus, Queue

async def main():
    async with Bus(sys.argv[1], channels=[Queue("orders")], config=False, environ={}) as bus:
        async with bus.receiver(Queue("orders"), prefetch=5) as receiver:
            held = [await receiver.receive(timeout=30) for _ in range(5)]
            print(len(held), flush=True)
            await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "broker.db"


def make(file: Path, query: str = "") -> Bus:
    return Bus(f"sqlite:///{file}{query}", channels=[ORDERS], config=False, environ={})


@pytest.fixture
def by_hand(file: Path) -> Iterator[sqlite3.Connection]:
    """Another program, without unibus."""
    with closing(sqlite3.connect(file, isolation_level=None, timeout=0)) as connection:
        yield connection


async def one(bus: Bus) -> Delivery[bytes]:
    async with bus.receiver(ORDERS) as receiver:
        delivery = await receiver.receive(timeout=10)
        assert delivery is not None
        await delivery.ack()
        return delivery


@pytest.mark.parametrize("headers", [None, "no JSON", "[1]", '{"tenant": 7}'])
async def test_a_row_of_another_program_needs_nothing_but_place_and_body(
    file: Path, by_hand: sqlite3.Connection, headers: str | None
) -> None:
    async with make(file) as bus:
        by_hand.execute("INSERT INTO message (place, body, headers) VALUES ('orders', 'grüße', ?)", (headers,))
        delivery = await one(bus)
    assert delivery.body == "grüße".encode()
    assert delivery.message.id == "orders@1"
    assert not delivery.message.headers


async def test_another_program_can_read_what_was_sent(file: Path, by_hand: sqlite3.Connection) -> None:
    async with make(file) as bus:
        id = await bus.send(ORDERS, b"\x00\xff", key="c42", headers={"tenant": "a"})
        (row,) = by_hand.execute("SELECT body, key, headers FROM message WHERE place = 'orders'")
    assert row[:2] == (b"\x00\xff", "c42")
    headers = json.loads(row[2])
    assert (headers["x-message-id"], headers["tenant"]) == (id, "a")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite://", "sqlite:///file.db"),
        ("sqlite://host/file.db", "sqlite:///file.db"),
        ("sqlite:///no/such/folder/file.db", "is the folder there"),
        ("sqlite:///file.db?leese=3", "sqlite.leese"),
        ("sqlite:///file.db?lease=0", "sqlite.lease"),
    ],
)
async def test_a_wrong_url_is_an_error_at_start(
    url: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        async with Bus(url, config=False, environ={}):
            pass


async def test_a_file_that_is_no_database_is_an_error_at_start(file: Path) -> None:
    diary = b"Dear diary, " * 100
    await asyncio.to_thread(file.write_bytes, diary)
    with pytest.raises(ConfigError, match="something else than a database"):
        async with make(file):
            pass
    assert await asyncio.to_thread(file.read_bytes) == diary


async def test_a_locked_file_is_a_result_that_may_pass(file: Path, by_hand: sqlite3.Connection) -> None:
    async with make(file, "?busy_timeout=0") as bus:
        by_hand.execute("BEGIN IMMEDIATE")
        (error,) = await bus.adapter.send([Outgoing(ORDERS, Message(b"x", id="1"))], 10)
        assert isinstance(error, Throttled)
        by_hand.execute("ROLLBACK")
        assert list(await bus.adapter.send([Outgoing(ORDERS, Message(b"x", id="1"))], 10)) == [None]
        assert (await one(bus)).message.id == "1"


@pytest.mark.parametrize("stop", [False, True])
async def test_a_receive_that_is_cancelled_loses_nothing(file: Path, by_hand: sqlite3.Connection, stop: bool) -> None:
    async with make(file) as bus:
        await bus.send(ORDERS, b"x")
        subscription = await bus.adapter.subscribe(Source(ORDERS))
        by_hand.execute("BEGIN IMMEDIATE")  # it finds the row, and waits with taking it
        receiving = asyncio.create_task(subscription.receive(1, 10))
        await asyncio.sleep(0)
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        by_hand.execute("ROLLBACK")
        if stop:
            await subscription.stop()
            (row,) = by_hand.execute("SELECT holder, deliveries FROM message")
            assert row == (None, 0)
        else:
            assert [d.message.body for d in await subscription.receive(1, 10)] == [b"x"]
        await subscription.close()


async def test_what_a_killed_process_had_comes_again(file: Path) -> None:
    async with make(file, "?lease=1") as bus:
        await bus.send_many(ORDERS, [b"%d" % n for n in range(5)])
        url = f"sqlite:///{file}?lease=1"
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", TAKER, url, stdout=asyncio.subprocess.PIPE)
        assert child.stdout is not None
        try:
            assert await child.stdout.readline() == b"5\n"
        finally:
            child.kill()
            await child.communicate()
        again = [await one(bus) for _ in range(5)]
        assert sorted(d.body for d in again) == [b"%d" % n for n in range(5)]
        assert {d.deliveries for d in again} == {2}
        assert (await bus.adapter.backlog(ORDERS)).ready == 0


async def test_an_inbox_whose_process_was_killed_ends(file: Path, by_hand: sqlite3.Connection) -> None:
    reply = Outgoing(Inbox(NOWHERE), Message(b"x", id="1"))
    async with make(file) as bus:
        by_hand.execute("INSERT INTO place VALUES (?, 'inbox', NULL, ?)", (NOWHERE, time.time() + 60))
        assert list(await bus.adapter.send([reply], 10)) == [None]
        by_hand.execute("UPDATE place SET ends = ? WHERE name = ?", (time.time() - 1, NOWHERE))
        (error,) = await bus.adapter.send([reply], 10)
        assert isinstance(error, Unroutable)
        subscription = await bus.adapter.subscribe(Source(Inbox("inbox")))  # whoever comes next tidies up
        assert by_hand.execute("SELECT count(*) FROM message").fetchone() == (0,)
        await subscription.close()


async def test_an_inbox_lives_while_its_process_is_too_busy_to_receive(
    file: Path, by_hand: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unibus_sqlite.subscription.LIFE", 0.03)
    async with make(file) as bus:
        subscription = await bus.adapter.subscribe(Source(Inbox("inbox")))
        ends = "SELECT ends FROM place WHERE kind = 'inbox'"

        async def look() -> tuple[float]:
            row: tuple[float] = by_hand.execute(ends).fetchone()
            return row

        first = await look()
        await eventually(look, lambda row: row != first, "another end")
        await subscription.close()


async def test_a_queue_that_is_deleted_ends_its_consumers(file: Path, by_hand: sqlite3.Connection) -> None:
    async with make(file) as bus:
        subscription = await bus.adapter.subscribe(Source(ORDERS))
        by_hand.execute("DELETE FROM place WHERE name = 'orders'")
        assert await subscription.check() == "gone"
        with pytest.raises(NotFound):
            await subscription.receive(1, 10)
        await subscription.close()
