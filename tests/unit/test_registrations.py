"""Decorators and `Handlers`: what they record, and what they refuse at once."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from unibus import Bus, CodecError, ConfigError, DeadLetter, Handlers, Queue, Topic, Unsupported
from unibus.testing import in_memory

ORDERS = Queue("orders", str)
SHIPPED = Topic("order.shipped", str)


def make_bus(**options: Any) -> Bus:
    return Bus("memory://", config=False, environ={}, service="test", **options)


async def test_handlers_of_another_module_send_through_the_bus_they_were_included_in() -> None:
    handlers = Handlers()

    @handlers.consumer(ORDERS)
    async def ship(order: str) -> None:
        await handlers.bus.publish(SHIPPED, order)

    with pytest.raises(ConfigError, match="include"):
        _ = handlers.bus
    bus = make_bus(channels=[SHIPPED])
    bus.include(handlers)
    assert handlers.bus is bus
    assert bus.bus is bus
    async with in_memory(bus) as lab:
        await bus.send(ORDERS, "a")
        await lab.idle()
        assert lab.sent(SHIPPED) == ["a"]


def test_handlers_belong_to_one_bus() -> None:
    handlers = Handlers()
    first = make_bus()
    first.include(handlers)
    with pytest.raises(ConfigError, match="another bus"):
        make_bus().include(handlers)


@pytest.mark.parametrize("kind", ["consumer", "subscriber", "responder"])
def test_a_decorator_without_its_channel_is_refused_at_once(kind: str) -> None:
    decorate = getattr(make_bus(), kind)

    async def handle(body: bytes) -> None: ...

    with pytest.raises(ConfigError, match=rf"@bus\.{kind}\(orders\)"):
        decorate(handle)


def test_a_retry_that_is_no_policy_is_refused_at_once() -> None:
    given: Any = 3
    with pytest.raises(ConfigError, match="RetryPolicy"):
        make_bus().consumer(ORDERS, retry=given)


def test_a_broadcast_has_no_group() -> None:
    with pytest.raises(ConfigError, match="broadcast"):
        make_bus().subscriber(SHIPPED, broadcast=True, group="g")


async def test_the_backlog_of_failed_messages_is_counted() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def refuse(order: str) -> None:
        raise DeadLetter("no")

    async with in_memory(bus) as lab:
        await bus.send(ORDERS, "a")
        await lab.idle()
        assert (await bus.backlog(ORDERS)).ready == 0
        assert (await bus.backlog(ORDERS, of="dead letters")).ready == 1
        assert (await bus.backlog(ORDERS, of="invalid")).ready == 0


@pytest.mark.parametrize("expires_in", [-1, float("inf"), float("nan")])
async def test_an_expiry_is_a_time_from_now_on(expires_in: float) -> None:
    async with make_bus(channels=[ORDERS]) as bus:
        with pytest.raises(CodecError, match="expires_in"):
            await bus.send(ORDERS, "a", expires_in=expires_in)


NO_ZONE = datetime(2026, 1, 1)  # noqa: DTZ001  # the point of it: it is another moment on every machine


@pytest.mark.parametrize("start", ["latest", "", -1, float("nan"), True, NO_ZONE, [], [1], "t/0@1"])
def test_a_start_that_says_nothing_is_refused_at_once(start: Any) -> None:
    with pytest.raises(ConfigError, match="start="):
        make_bus().subscriber(SHIPPED, group="g", start=start)


def test_a_broadcast_has_no_start() -> None:
    with pytest.raises(ConfigError, match="broadcast"):
        make_bus().subscriber(SHIPPED, broadcast=True, start="all")


def test_a_start_is_a_time_or_positions() -> None:
    handlers = Handlers()
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    for start in (moment, 5, ["t/0@1"]):
        handlers.subscriber(SHIPPED, group="g", start=start)(print)
    assert [r.start for r in handlers.registrations] == [moment.timestamp(), 5.0, ("t/0@1",)]


async def test_a_start_that_the_broker_can_not_do_is_refused_before_anything_is_made() -> None:
    for start, why in (("all", "keeps no history"), (["t/0@1"], "keeps no history")):
        bus = make_bus()

        @bus.subscriber(SHIPPED, group="g", start=start)
        async def handle(body: str) -> None: ...

        with pytest.raises(Unsupported, match=why):
            await bus.__aenter__()
