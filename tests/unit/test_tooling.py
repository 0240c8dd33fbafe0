"""What tools stand on: a bus that does nothing by itself, running only some handlers, purging, and the rate of both."""

import asyncio
from typing import Any

import pytest
from tests.unit.core_lab import DONE, EVENTS, ORDERS, lab, later, make_bus, tidy, until

from unibus import Bus, ConfigError, NotFound, Queue, RetryPolicy, Topic, UnknownChannel, deadletter
from unibus.adapter import Inspected
from unibus.channel import Group
from unibus.testing import Lab
from unibus.tooling import address_of, attached, declare, inspect, peek, receive, topology_of

ONCE = RetryPolicy(max_retries=0)


def failing(**options: Any) -> Bus:
    bus = make_bus(**options)

    @bus.consumer(ORDERS, retry=ONCE)
    async def handle(body: str) -> None:
        raise ValueError(body)

    return bus


async def die(it: Lab, n: int) -> None:
    await it.bus.send_many(ORDERS, [str(i) for i in range(n)])
    await until(lambda: len(it.dead_letters(ORDERS)) == n)


async def test_purge_deletes_what_is_chosen_and_leaves_the_rest() -> None:
    bus = failing()
    async with lab(bus) as it:
        await die(it, 5)
        assert await deadletter.purge(bus, ORDERS, where=lambda d: d.body in {"1", "3"}) == 2
        assert [m.body for m in it.dead_letters(ORDERS)] == ["0", "2", "4"]
        assert await deadletter.purge(bus, ORDERS, limit=1) == 1
        assert [m.body for m in it.dead_letters(ORDERS)] == ["2", "4"]
        assert await deadletter.purge(bus, ORDERS) == 2
        assert await deadletter.purge(bus, ORDERS) == 0
        assert it.dead_letters(ORDERS) == []
        assert bus.counts["purged"] == 5
        assert bus.counts["dead_lettered"] == 5  # nothing of it ran again


async def test_the_rate_is_kept() -> None:
    bus = failing()
    async with lab(bus) as it:
        await die(it, 25)
        purging = asyncio.ensure_future(deadletter.purge(bus, ORDERS, rate=10))
        await later(it, 0.5)
        assert len(it.dead_letters(ORDERS)) == 0  # those that are not deleted are held
        assert bus.counts["purged"] == 10
        await later(it, 1)
        assert bus.counts["purged"] == 20
        await later(it, 1)
        assert await purging == 25


async def test_an_interrupted_redrive_gives_the_rest_back() -> None:
    bus = failing()
    async with lab(bus) as it:
        await die(it, 5)
        redriving = asyncio.ensure_future(deadletter.redrive(bus, ORDERS, rate=1))
        await until(lambda: bus.counts.get("redriven") == 1)
        redriving.cancel()
        await asyncio.wait([redriving])
        await until(lambda: bus.counts["dead_lettered"] == 6)  # the one that went back died again
        await until(lambda: len(it.dead_letters(ORDERS)) == 5)


@pytest.mark.parametrize("rate", [0, -1, float("inf"), float("nan")])
async def test_a_rate_that_is_none(rate: float) -> None:
    async with make_bus() as bus:
        with pytest.raises(ConfigError, match="rate="):
            await deadletter.redrive(bus, ORDERS, rate=rate)


async def test_running_only_some_handlers() -> None:
    bus = make_bus()
    ran: list[str] = []
    for queue in (ORDERS, DONE):

        @bus.consumer(queue)
        async def handle(body: str) -> None:
            ran.append(body)

    @bus.subscriber(EVENTS, group="a")
    async def never(body: str) -> None:
        raise AssertionError("not among those")

    @bus.subscriber(EVENTS, group="b")
    async def note(body: str) -> None:
        ran.append(f"{body} b")

    async with tidy(), bus.running(only=["done", "events.b"]):
        await bus.send(ORDERS, "order")
        await bus.publish(EVENTS, "event")
        await bus.send(DONE, "done")
        await until(lambda: sorted(ran) == ["done", "event b"])
        assert (await bus.backlog(ORDERS)).ready == 1
        assert (await bus.backlog(EVENTS, group="a")).ready == 1
    async with tidy(), bus, bus.running(only="orders"):
        await bus.send(ORDERS, "again")
        await until(lambda: ran[-1] == "again")
    with pytest.raises(UnknownChannel, match=r"only=order: no handler is at work there; did you mean 'orders'\?"):
        async with bus.running(only=["order"]):
            pass
    assert repr(bus) == "<Bus closed>"


async def test_attached_knows_what_nobody_declares() -> None:
    bus = make_bus(url="memory://tooling", declare="create")
    async with attached(bus, "plain") as tool:
        assert address_of(tool, "plain", None) == Queue("plain")
        with pytest.raises(NotFound):
            await tool.send("plain", b"x")
        with pytest.raises(UnknownChannel):
            await tool.send("other", b"x")
    async with attached(bus, "news", group="g") as tool:
        group = Group(Topic("news"), "g")
        assert address_of(tool, "news", None) == address_of(tool, "news", "g") == group
        assert group in [d.address for d in topology_of(tool).channels]
    with pytest.raises(ConfigError, match="has no groups"):
        attached(bus, "orders", group="g")
    assert [channel.name for channel in bus.channels] == ["orders", "ordered", "later", "asks", "done", "events"]


async def test_inspect_and_declare() -> None:
    bus = make_bus(channels=[ORDERS], declare="verify")
    async with attached(bus) as tool:
        found = [one for one in await inspect(tool) if one.rights]
        assert found[0] == Inspected("queue", "orders", False, "none", ORDERS)
        assert {one.exists for one in found} == {False}
        await declare(tool)
        assert {one.exists for one in await inspect(tool)} == {True}
        await tool.send(ORDERS, "x")


async def test_receive_acks_what_was_taken_once_more_is_asked_for() -> None:
    async with make_bus() as bus:
        await bus.send_many(ORDERS, ["1", "2", "3"])
        taken = receive(bus, ORDERS, 2, 0, ack=True)
        batch = await anext(taken)
        assert [d.body for d in batch] == ["1", "2"]
        await taken.aclose()  # not written, for example
        assert [d.body async for d in peek(bus, ORDERS, 10)] == ["1", "2", "3"]
        assert [d.body async for batch in receive(bus, ORDERS, 2, 0, ack=True) for d in batch] == ["1", "2"]
        assert [d.body async for d in peek(bus, ORDERS, 10)] == ["3"]
        assert [d.body async for batch in receive(bus, ORDERS, 5, 0, ack=False) for d in batch] == ["3"]
        assert (await bus.backlog(ORDERS)).ready == 1
