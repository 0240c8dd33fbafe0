"""The loop of `receive` that all drivers share: what it gives, what ends it, and the hop of what is not due yet."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from unibus.adapter import Outgoing, Results, Source
from unibus.channel import Queue
from unibus.clock import VirtualClock
from unibus.delivery import Delivery
from unibus.errors import ConnectionLost, NotFound, Throttled, TransportError
from unibus.inflow import Inflow, closed
from unibus.message import Message

ORDERS = Queue[Any].derived("orders")


def delivery(body: bytes = b"") -> Delivery[Any]:
    return Delivery(Message(body, "id"), Source(ORDERS), None)


class Bowl:
    """What a driver has in hand."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.inflow = Inflow(self.clock)
        self.has: list[Delivery[Any]] = []

    def take(self) -> list[Delivery[Any]]:
        taken, self.has = self.has, []
        return taken

    async def receiving(self, seconds: float = 5) -> asyncio.Task[Sequence[Delivery[Any]]]:
        """A receive that waits by now."""
        task = asyncio.create_task(self.inflow.receive(seconds, self.take))
        for _ in range(5):  # turns of the loop; it needs two
            await asyncio.sleep(0)
        assert self.clock.next_due() is not None
        return task


async def test_what_is_there_is_given_at_once() -> None:
    bowl = Bowl()
    bowl.has = [first := delivery()]
    assert await bowl.inflow.receive(0, bowl.take) == [first]
    assert await bowl.inflow.receive(0, bowl.take) == []


async def test_what_comes_ends_the_wait_and_a_wake_for_nothing_does_not() -> None:
    bowl = Bowl()
    task = await bowl.receiving()
    bowl.inflow.wake()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    bowl.has = [late := delivery()]
    bowl.inflow.wake()
    assert await task == [late]
    assert bowl.clock.next_due() is None, "no timer is left behind"


async def test_nothing_comes_in_time() -> None:
    bowl = Bowl()
    task = await bowl.receiving(5)
    bowl.clock.move(5)
    assert await task == []


async def test_it_asks_for_more_and_says_how_long_that_may_take() -> None:
    bowl, asked = Bowl(), list[float]()

    async def more(seconds: float) -> None:
        asked.append(seconds)
        bowl.clock.move(2)
        if len(asked) == 2:
            bowl.has = [delivery()]

    assert len(await bowl.inflow.receive(5, bowl.take, more)) == 1
    assert asked == [5, 3]
    bowl.has, asked[:] = [], [0.0, 0.0]
    assert await bowl.inflow.receive(3, bowl.take, more) == []
    assert asked == [0, 0, 3, 1]


async def test_a_failure_to_get_more_is_the_callers() -> None:
    async def more(_seconds: float) -> None:
        raise Throttled("slow down")

    bowl = Bowl()
    with pytest.raises(Throttled):
        await bowl.inflow.receive(5, bowl.take, more)
    assert not bowl.inflow.over


async def test_once_stopped_nothing_is_given() -> None:
    bowl = Bowl()
    task = await bowl.receiving()
    bowl.has = [delivery()]
    bowl.inflow.stop()
    assert await task == []
    assert bowl.inflow.over
    assert bowl.has, "it is still there, to be handed back"


async def test_the_first_reason_of_the_end_is_told_to_all() -> None:
    bowl = Bowl()
    tasks = [await bowl.receiving(), await bowl.receiving()]
    bowl.has = [delivery()]
    bowl.inflow.end(NotFound("its queue is gone"))
    bowl.inflow.end(closed(ORDERS))
    for task in tasks:
        with pytest.raises(NotFound, match="its queue is gone"):
            await task
    with pytest.raises(NotFound):
        await bowl.inflow.receive(5, bowl.take)


async def test_who_always_finds_something_lets_others_work() -> None:
    bowl, ran = Bowl(), list[str]()
    asyncio.get_running_loop().call_soon(ran.append, "another")
    bowl.has = [delivery()]
    await bowl.inflow.receive(5, bowl.take)
    assert ran == ["another"]


def test_the_words_for_a_subscription_that_is_closed() -> None:
    assert isinstance(closed(ORDERS), ConnectionLost)
    assert str(closed(ORDERS)) == "the subscription of queue 'orders' is closed"


@pytest.mark.parametrize("refusal", [None, NotFound("no such queue")])
async def test_a_hop_is_a_copy_that_is_confirmed(
    refusal: TransportError | None, caplog: pytest.LogCaptureFixture
) -> None:
    bowl, sent, waits = Bowl(), list[Outgoing](), delivery(b"x")

    async def send(batch: Sequence[Outgoing]) -> Results:
        sent.extend(batch)
        return [refusal]

    assert await bowl.inflow.hop(send, ORDERS, waits, 99.0) is (refusal is None)
    [copy] = sent
    assert (copy.to, copy.message, copy.not_before, copy.origin) == (ORDERS, waits.message, 99.0, waits)
    assert bowl.inflow.error is refusal, "where it can't go on, it stays, and the core declares what is missing"
    assert ("no such queue" in caplog.text) is (refusal is not None)
