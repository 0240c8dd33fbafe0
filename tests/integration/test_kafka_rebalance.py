"""What Kafka's rebalances do to messages that are being taken, handled or committed in that moment; nothing is broken here.

Where a moment has to be met, commits are held at the client library's door until it has come.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from aiokafka.errors import KafkaError

from unibus import Bus, Delivery, Queue
from unibus.adapter import Outcome, Source
from unibus.errors import LeaseLost
from unibus_contracts import supply

SOON = 30.0
QUEUE: Queue[bytes] = Queue("q")


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, f"not within {SOON:g} s: {what}"
        await asyncio.sleep(0.01)


def more_than(seen: Counter[bytes], number: int) -> bool:
    return seen.total() > number


Make = Callable[..., Bus]


@pytest.fixture(params=["kafka", "kafka+confluent"])
def make(request: pytest.FixtureRequest) -> Make:
    server, prefix = supply.running(["kafka"])[0].url.partition("://")[2], f"it-{secrets.token_hex(4)}."

    def made(more: str = "commit_interval=100") -> Bus:
        # So many heartbeats that a rebalance is heard of at once; and no commit but those that a test waits for.
        url = f"{request.param}://{server}?heartbeat=0.1&{more}"
        return Bus(url, service="svc", prefix=prefix, channels=[QUEUE], config=False, environ={})

    return made


class Door:
    """Commits of one subscription wait here while it is shut; `fails`: so many of them fail."""

    def __init__(self, subscription: Any) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.knocks = 0
        self.fails = 0
        self._commit = subscription._consumer.commit
        subscription._consumer.commit = self._pass

    async def _pass(self, points: Any) -> None:
        self.knocks += 1
        await self.open.wait()
        if self.fails:
            self.fails -= 1
            raise KafkaError("no answer")
        await self._commit(points)


class Losing:
    """A core that is told of what it loses, and says itself when it has let go."""

    def __init__(self) -> None:
        self.told: list[Delivery[Any]] = []
        self.begun, self.over = asyncio.Event(), asyncio.Event()

    async def __call__(self, deliveries: Sequence[Delivery[Any]], grace: float) -> None:
        self.told += deliveries
        self.begun.set()
        await self.over.wait()


async def take(made: Any, count: int) -> list[Delivery[Any]]:
    found: list[Delivery[Any]] = []
    async with asyncio.timeout(SOON):
        while len(found) < count:
            found += await made.receive(count - len(found), 1.0)
    return found


@asynccontextmanager
async def member(bus: Bus, losing: Losing | None = None) -> AsyncIterator[Any]:
    given = Source(QUEUE) if losing is None else Source(QUEUE, losing=losing)
    made = await bus.adapter.subscribe(given)
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def rebalance(bus: Bus) -> AsyncIterator[asyncio.Task[Any]]:
    """One more member wants to join, and does once the others let it."""
    joining: asyncio.Task[Any] = asyncio.create_task(bus.adapter.subscribe(Source(QUEUE)))
    try:
        yield joining
    finally:
        await (await joining).close()


async def all_of(*members: Any) -> list[bytes]:
    """What there is still to do, for whoever has the partition."""
    found: list[bytes] = []
    deadline = time.monotonic() + SOON
    while b"last" not in found:
        assert time.monotonic() < deadline, found
        for made in members:
            got = await made.receive(10, 0.1)
            found += [delivery.message.body for delivery in got]
            await made.settle(Outcome.ACCEPTED, got)
    return found


async def test_what_is_taken_while_its_partition_goes_is_not_handed_out(make: Make) -> None:
    """The first of a partition are committed before they are handed out, and the core has not heard of them until then."""
    losing = Losing()
    async with make() as one, make() as two, member(one, losing) as first:
        door = Door(first)
        door.open.clear()
        await one.send_many(QUEUE, [b"0", b"1", b"2"])
        receiving = asyncio.create_task(first.receive(10, SOON))
        await until(lambda: door.knocks, "they are about to be handed out")
        async with rebalance(two) as joining:
            await asyncio.wait_for(losing.begun.wait(), SOON)
            door.open.set()
            assert await receiving == []
            losing.over.set()
            await one.send(QUEUE, b"last")
            found = await all_of(first, await joining)
            assert Counter(found) == Counter({b"0": 1, b"1": 1, b"2": 1, b"last": 1})


async def test_what_ends_too_late_for_the_last_commit_is_not_called_settled(make: Make) -> None:
    losing = Losing()
    async with make() as one, make() as two, member(one, losing) as first:
        await one.send_many(QUEUE, [b"0", b"1"])
        in_time, late = await take(first, 2)
        door = Door(first)
        await first.settle(Outcome.ACCEPTED, [in_time])
        door.open.clear()
        async with rebalance(two) as joining:
            await asyncio.wait_for(losing.begun.wait(), SOON)
            losing.over.set()  # as after the grace
            await until(lambda: door.knocks, "the last commit")
            (error,) = await first.settle(Outcome.ACCEPTED, [late])
            assert isinstance(error, LeaseLost)
            door.open.set()
            await one.send(QUEUE, b"last")
            assert await all_of(first, await joining) == [b"1", b"last"]


async def test_a_last_commit_without_an_answer_is_tried_again(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    async with make("commit_interval=0.1") as one, make() as two, member(one) as first:
        await one.send_many(QUEUE, [b"0", b"1"])
        held = await take(first, 2)
        door = Door(first)
        door.fails = 3
        await first.settle(Outcome.ACCEPTED, held)
        async with rebalance(two) as joining:
            await one.send(QUEUE, b"last")
            assert await all_of(await joining, first) == [b"last"]
    assert caplog.text.count("not committed yet") == 3
    assert "are handled again" not in caplog.text


async def test_what_could_not_be_committed_is_told(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    losing = Losing()
    losing.over.set()
    more = "rebalance_grace=0&commit_interval=100"
    async with make(more) as one, make() as two, member(one, losing) as first:
        await one.send_many(QUEUE, [b"0", b"1", b"2"])
        held = await take(first, 3)
        door = Door(first)
        door.fails = 1
        await first.settle(Outcome.ACCEPTED, [held[0], held[2]])
        async with rebalance(two) as joining:
            await one.send(QUEUE, b"last")
            assert await all_of(first, await joining) == [b"0", b"1", b"2", b"last"]
    (record,) = [record for record in caplog.records if "are handled again" in record.message]
    assert record.levelno == logging.WARNING
    assert "2 messages were handled, and not committed" in record.message
    assert record.__dict__["positions"] == [held[0].position, held[2].position]


@pytest.mark.timeout(180)
async def test_members_that_come_and_go_repeat_nothing(make: Make) -> None:
    """Messages are handled all the time, and some fail once, so that lanes and their first commits take part."""
    more = "partitions=3"
    seen: Counter[bytes] = Counter()
    failed: set[bytes] = set()
    done = asyncio.Event()

    def working() -> Bus:
        bus = make(more)

        @bus.consumer(QUEUE)
        async def handle(body: bytes) -> None:
            await asyncio.sleep(0)
            if body.endswith(b"7") and body not in failed:
                failed.add(body)
                raise ValueError(body)
            seen[body] += 1

        return bus

    sent = 0
    async with working().running(), make(more) as sender:

        async def send() -> None:
            nonlocal sent
            while not done.is_set():
                await sender.send_many(QUEUE, [b"%d" % n for n in range(sent, sent + 5)])
                sent += 5

        sending = asyncio.create_task(send())
        for turn in range(1, 7):
            async with working().running():
                await until(partial(more_than, seen, 300 * turn), "work goes on")
        done.set()
        await sending
        await until(lambda: len(seen) == sent, "all are handled")
    assert {body: times for body, times in seen.items() if times > 1} == {}
