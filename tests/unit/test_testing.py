"""The lab for tests of a service: idle, advance, sent, dead_letters."""

import asyncio
import itertools

import pytest
from tests.unit.core_lab import DONE, EVENTS, LATER, ORDERS, make_bus, tidy

import unibus.testing
from unibus import Closed, Delivery, RetryPolicy, UnknownChannel
from unibus.clock import SystemClock
from unibus.testing import in_memory


async def test_a_service_in_virtual_time() -> None:
    bus = make_bus(url="amqp://never-reached")

    @bus.consumer(ORDERS, retry=RetryPolicy(max_retries=1, backoff=300))
    async def handle(body: str) -> None:
        if body == "bad":
            raise ValueError("no")
        await asyncio.sleep(0.01)  # of the real world: idle waits for it
        await bus.publish(EVENTS, body + "!")

    async with tidy(), in_memory(bus) as it:
        await bus.send(ORDERS, "x")
        await bus.send(ORDERS, "bad")
        await it.idle()
        assert it.sent(EVENTS) == ["x!"]
        assert it.sent("orders") == ["x", "bad"]  # and no retries
        assert not it.dead_letters(ORDERS)
        before = it.clock.time()
        await it.advance(300)
        assert it.clock.time() == before + 300
        assert [m.body for m in it.dead_letters(ORDERS)] == ["bad"]
        assert it.sent(DONE) == []
        with pytest.raises(UnknownChannel):
            it.sent("nosuch")
    assert isinstance(bus._clock, SystemClock)
    assert bus._environ == {}
    with pytest.raises(Closed):
        await bus.send(ORDERS, "x")


async def test_what_is_delayed_is_not_left_to_do() -> None:
    bus = make_bus()
    seen: list[str] = []

    @bus.consumer(LATER)
    async def handle(body: str) -> None:
        seen.append(body)

    async with tidy(), in_memory(bus) as it:
        await bus.send(LATER, "b", delay=20)
        await bus.send(LATER, "a", delay=10)
        await it.idle()
        assert seen == []
        await it.advance(9.9)
        assert seen == []
        await it.advance(0.1)
        assert seen == ["a"]
        await it.advance(100)
        assert seen == ["a", "b"]


async def test_a_handler_that_hangs_is_named() -> None:
    bus = make_bus()
    go = asyncio.Event()

    @bus.consumer(ORDERS)
    async def hanging(body: str) -> None:
        await go.wait()

    async with tidy(), in_memory(bus) as it:
        await bus.send(ORDERS, "x")
        with pytest.raises(AssertionError, match=r"hanging.*1 running"):
            await it.idle(timeout=0.05)
        go.set()
        await it.idle()


async def test_time_does_not_hurry_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the real clock is minutes later than the one before it."""
    bus = make_bus()
    loop = asyncio.get_running_loop()
    real, looks = loop.time, itertools.count()
    ran: list[tuple[str, int, float]] = []

    @bus.consumer(LATER, retry=RetryPolicy(max_retries=2, backoff=1, multiplier=1))
    async def handle(body: str, delivery: Delivery[str]) -> None:
        ran.append((body, delivery.attempt, round(it.clock.monotonic() - begun, 3)))
        raise OSError("always")

    async with tidy(), in_memory(bus) as it:
        begun = it.clock.monotonic()
        monkeypatch.setattr(loop, "time", lambda: real() + 100 * next(looks))
        for n in range(5):
            await bus.send(LATER, str(n), delay=1 + n / 10)
        await it.advance(3.4)
        monkeypatch.setattr(loop, "time", real)
    assert ran == [(str(n), attempt, attempt + n / 10) for attempt in (1, 2, 3) for n in range(5)]


async def test_labs_do_not_share_a_broker() -> None:
    for _ in range(2):
        bus = make_bus()
        async with in_memory(bus) as it:
            await bus.send(DONE, "x")
            assert len(it.broker.waiting(DONE)) == 1


def test_no_public_class_looks_like_a_test() -> None:
    assert not [name for name in vars(unibus.testing) if name.startswith("Test")]
