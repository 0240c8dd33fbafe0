"""Every default of DESIGN section 4, as it comes out at the far end: in what the bus does, not in a table."""

import asyncio
import inspect
from typing import Any

import pytest
from tests.unit.core_lab import ASKS, EVENTS, ORDERS, lab, later, make_bus, spy_of, turns, until

from unibus import Message, Queue, RetryPolicy, Timeout, Topic
from unibus.channel import Group
from unibus.message import ERROR_TYPE


async def test_ten_handlers_at_once_and_twice_that_prefetched() -> None:
    bus = make_bus()
    running: set[str] = set()
    go = asyncio.Event()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        running.add(body)
        await go.wait()

    async with lab(bus) as it:
        await bus.send_many(ORDERS, [str(n) for n in range(50)])
        await until(lambda: len(running) == 10)
        await turns()
        assert len(running) == 10
        assert (it.broker.in_flight(), (await bus.backlog(ORDERS)).ready) == (20, 30)
        go.set()
        await it.idle()
        assert len(running) == 50


async def test_prefetch_follows_concurrency() -> None:
    bus = make_bus()
    go = asyncio.Event()

    @bus.consumer(ORDERS, concurrency=3)
    async def handle(body: str) -> None:
        await go.wait()

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["x"] * 20)
        await turns()
        assert it.broker.in_flight() == 6
        go.set()


async def test_a_handler_has_900_seconds() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS, retry=RetryPolicy(max_retries=0))
    async def handle(body: str) -> None:
        await asyncio.Event().wait()

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await later(it, 899)
        assert not it.dead_letters(ORDERS)
        await later(it, 1)
        [dead] = it.dead_letters(ORDERS)
        assert dead.headers[ERROR_TYPE].endswith("HandlerTimeout")


@pytest.mark.parametrize("verb", ["send", "request"])
async def test_a_send_and_a_request_have_30_seconds(verb: str) -> None:
    bus = make_bus()
    async with lab(bus) as it:
        if verb == "send":
            spy_of(bus).gate.clear()  # for a request the queue is enough: nobody answers
        call = asyncio.ensure_future(getattr(bus, verb)(ASKS, "x"))
        await turns()
        await later(it, 29.9)
        assert not call.done()
        await later(it, 0.1)
        with pytest.raises(Timeout):
            await call
        spy_of(bus).gate.set()


async def test_a_drain_has_25_seconds() -> None:
    bus = make_bus()
    cut: list[float] = []

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cut.append(it.clock.monotonic())
            raise

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await turns()
        began = it.clock.monotonic()
    assert cut == [began + 25]


def test_retry_policy() -> None:
    assert RetryPolicy() == RetryPolicy(max_retries=5, backoff=1, multiplier=4, max_backoff=300, jitter=0, immediate=0)
    assert RetryPolicy().waits() == (1, 4, 16, 64, 256)


async def test_a_failing_message_has_six_runs_and_ends_in_the_dead_letters_of_its_queue() -> None:
    bus = make_bus()
    runs: list[tuple[float, int]] = []

    @bus.subscriber(EVENTS, group="billing")
    @bus.consumer(ORDERS)
    async def fail(body: str) -> None:
        runs.append((it.clock.monotonic(), len(runs)))
        raise ValueError("no")

    async with lab(bus) as it:
        began = it.clock.monotonic()
        await bus.send(ORDERS, "x")
        await later(it, 1000)
        assert [at - began for at, _ in runs] == [0, 1, 5, 21, 85, 341]
        await bus.publish(EVENTS, "y")
        await later(it, 1000)
        places = {place.address.name: len(place) for place in it.broker._places.values() if len(place)}
        assert places == {"orders.dlq": 1, "events.billing.dlq": 1}


async def test_the_undecodable_goes_to_invalid() -> None:
    bus = make_bus()
    queue, topic = Queue[int]("numbers", int), Topic[int]("counted", int)

    @bus.subscriber(topic)
    @bus.consumer(queue)
    async def handle(body: int) -> None:
        raise AssertionError("it must not run")

    bus.channels += [queue, topic]
    async with lab(bus) as it:
        await bus.send(queue, Message(b"{"))
        await bus.publish(topic, Message(b"{"))
        await it.idle()
        places = {place.address.name: len(place) for place in it.broker._places.values() if len(place)}
        assert places == {"numbers.invalid": 1, "counted.test.invalid": 1}


async def test_the_group_is_the_service() -> None:
    bus = make_bus(service="billing")

    @bus.subscriber(EVENTS)
    async def handle(body: str) -> None: ...

    async with lab(bus):
        assert [intake.address for intake in bus._opened().intakes] == [Group(EVENTS, "billing")]


@pytest.mark.parametrize("channel", [Queue("q"), Topic("t")])
def test_a_channel_has_no_features_of_its_own_accord(channel: Any) -> None:
    assert (channel.ordered, channel.priorities, channel.delayed, channel.codec, channel.body) == (
        False,
        0,
        False,
        None,
        bytes,
    )


async def test_at_least_once_create_and_no_prefix() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None: ...

    async with lab(bus):
        settings = bus.settings
        assert settings.consumer(ORDERS, {}).guarantee == "at-least-once"
        assert (settings.declare, settings.prefix, settings.delays) == ("create", "", ())


async def test_a_receiver_holds_20() -> None:
    bus = make_bus()
    async with lab(bus) as it, bus.receiver(ORDERS) as receiver:
        await bus.send_many(ORDERS, ["x"] * 30)
        assert await receiver.receive() is not None
        await turns()
        assert it.broker.in_flight() == 20
    assert inspect.signature(bus.receiver).parameters["prefetch"].default == 20


async def test_unordered_messages_of_one_key_run_side_by_side() -> None:
    bus = make_bus()
    running: list[str] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        running.append(body)
        await go.wait()

    async with lab(bus):
        await bus.send_many(ORDERS, ["1", "2"], key=lambda _: "k")
        await until(lambda: len(running) == 2)
        go.set()
