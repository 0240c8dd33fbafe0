"""Leases: kept for what waits and what runs; a lost one is told and is no disaster."""

import asyncio

from tests.unit.core_lab import ORDERED, ORDERS, lab, later, make_bus, spy_of, turns

from unibus import Delivery, LeaseLost, RetryPolicy, TransportError


async def test_prefetched_and_running_ones_are_kept_for_as_long_as_it_takes() -> None:
    bus = make_bus()
    runs: list[str] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS, concurrency=1, prefetch=3)
    async def handle(body: str) -> None:
        runs.append(body)
        await go.wait()

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["1", "2", "3"])
        await later(it, 200)  # the lease is 30 s
        assert runs == ["1"]
        assert it.broker.in_flight() == 3
        assert set(map(tuple, spy_of(bus).extended)) == {("1", "2", "3")}  # in one call
        go.set()
        await it.idle()
        assert runs == ["1", "2", "3"]
        assert bus.counts["handled"] == 3
        assert bus.counts.get("lease_lost", 0) == 0


async def test_parked_ones_are_kept() -> None:
    bus = make_bus()
    runs: list[int | None] = []

    @bus.consumer(ORDERED, retry=RetryPolicy(max_retries=1, backoff=200))
    async def handle(body: str, delivery: Delivery[str]) -> None:
        runs.append(delivery.deliveries)
        if delivery.attempt == 1:
            raise ValueError

    async with lab(bus) as it:
        await bus.send(ORDERED, "x", key="k")
        await later(it, 200)
        assert runs == [1, 1]


async def test_nothing_is_extended_while_nothing_is_held() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None: ...

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await later(it, 200)
        assert spy_of(bus).extended == []


async def test_a_lost_lease_is_told_to_who_settles_late_and_the_message_comes_again() -> None:
    bus = make_bus()
    told: list[BaseException] = []
    runs: list[int | None] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS, concurrency=2)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        runs.append(delivery.deliveries)
        if delivery.deliveries == 1:
            await go.wait()
            try:
                await delivery.ack()
            except LeaseLost as error:
                told.append(error)

    async with lab(bus) as it:
        spy = spy_of(bus)
        spy.always["extend"] = TransportError("the broker does not answer")
        await bus.send(ORDERS, "x")
        await later(it, 31)
        assert runs == [1, 2]
        del spy.always["extend"]
        go.set()
        await it.idle()
        assert len(told) == 1
        assert bus.counts["handled"] == 1
        assert it.broker.in_flight() == 0
        assert (await bus.health()).status == "ok"


async def test_a_handler_that_ends_after_its_lease_changes_nothing() -> None:
    bus = make_bus()
    runs: list[int | None] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS, concurrency=2)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        runs.append(delivery.deliveries)
        if delivery.deliveries == 1:
            await go.wait()
            raise ValueError("too late to matter")

    async with lab(bus) as it:
        spy_of(bus).always["extend"] = TransportError("the broker does not answer")
        await bus.send(ORDERS, "x")
        await later(it, 31)
        go.set()
        await it.idle()
        await later(it, 20)
        assert runs == [1, 2]
        assert bus.counts.get("retried", 0) == 0
        assert it.broker.waiting(ORDERS) == []


async def test_the_heartbeat_ends_with_the_bus() -> None:
    bus = make_bus()
    go = asyncio.Event()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        await go.wait()

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await turns()
        spy, clock = spy_of(bus), it.clock
        go.set()
    before = spy.calls["extend"]
    clock.move(100)
    await turns()
    assert spy.calls["extend"] == before
