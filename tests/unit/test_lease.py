"""Leases: kept for what waits and what runs; a lost one is told and is no disaster."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from tests.unit.core_lab import DONE, ORDERED, ORDERS, SpySubscription, lab, later, make_bus, spy_of, turns, until

from unibus import Bus, ConfigError, Delivery, LeaseLost, Message, RetryPolicy, TransportError
from unibus.adapter import Outcome, Results
from unibus.testing import Lab


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


LATE = pytest.mark.parametrize("fate", ["ack", "fail"])


async def taken_away(bus: Bus, *deliveries: Delivery[str]) -> None:
    """The broker gives these to somebody else, and nobody tells us."""
    subscription = bus._opened().intakes[0]._subscription
    assert subscription is not None
    await subscription.settle(Outcome.RELEASED, deliveries)


@LATE
async def test_a_lost_lease_is_said_once_with_its_id_and_the_handler_goes_on(
    fate: str, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus()
    held: list[Delivery[str]] = []
    go, ended = asyncio.Event(), asyncio.Event()

    @bus.consumer(ORDERS, concurrency=2)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        held.append(delivery)
        if len(held) == 1:
            await go.wait()
            ended.set()
            if fate == "fail":
                raise ValueError("too late to matter")

    async with lab(bus) as it:
        id = await bus.send(ORDERS, "x")
        await until(lambda: held)
        await taken_away(bus, held[0])
        await until(lambda: len(held) == 2, "it comes again")
        await later(it, 21)  # two beats of a lease of 30 s
        assert held[0].lost
        await later(it, 20)
        assert not ended.is_set()
        go.set()
        await it.idle()
        assert ended.is_set()
        assert (bus.counts["lease_lost"], bus.counts["handled"], bus.counts.get("retried", 0)) == (1, 1, 0)
        await bus.send(ORDERS, "y")  # the consumer is as it was
        await it.idle()
        assert bus.counts["handled"] == 2
        assert (await bus.health()).status == "ok"
    said = [r.getMessage() for r in caplog.records if id in r.getMessage() and r.levelno == logging.WARNING]
    assert len(said) == 1
    assert "no longer ours" in said[0]


async def test_a_lost_lease_cancels_the_handler_where_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()
    held: list[Delivery[str]] = []
    cancelled: list[str] = []

    @bus.consumer(ORDERS, concurrency=2, on_lease_lost="cancel")
    async def handle(body: str, delivery: Delivery[str]) -> None:
        held.append(delivery)
        if len(held) == 1:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(body)
                raise

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await until(lambda: held)
        await taken_away(bus, held[0])
        await later(it, 21)
        assert cancelled == ["x"]
        for n in range(4):  # its slot is free again
            await bus.send(ORDERS, f"{n}")
        await it.idle()
        assert (bus.counts["handled"], bus.counts["lease_lost"], bus.counts.get("retried", 0)) == (5, 1, 0)
        assert it.broker.in_flight() == 0
        assert bus._opened().consumers[0].running() == 0
    assert [r for r in caplog.records if "its handler is cancelled" in r.getMessage()]


async def test_a_lost_link_cancels_too_and_not_what_was_settled_by_hand() -> None:
    bus = make_bus()
    begun: list[str] = []
    ended: list[str] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS, on_lease_lost="cancel")
    async def handle(body: str, delivery: Delivery[str]) -> None:
        begun.append(body)
        if body == "settled":
            await delivery.ack()
        try:
            await go.wait()
        except asyncio.CancelledError:
            ended.append(f"{body} cancelled")
            raise
        ended.append(body)

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["settled", "open"])
        await until(lambda: len(begun) == 2 and bus.counts.get("handled"))
        it.broker.cut()
        await later(it, 1)
        assert ended == ["open cancelled"]
        go.set()
        await it.idle()
        assert ended == ["open cancelled", "settled", "open"]
        assert bus.counts["handled"] == 2


async def test_a_batch_is_cancelled_when_all_of_it_is_lost() -> None:
    bus = make_bus()
    held: list[Delivery[str]] = []
    runs: list[list[str]] = []
    cancelled: list[list[str]] = []

    async def keep(batch: list[Delivery[str]]) -> None:
        held.extend(batch)
        runs.append([d.body for d in batch])
        if len(runs) == 1:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(runs[0])
                raise

    @bus.consumer(ORDERS, concurrency=1, batch=2, prefetch=2, on_lease_lost="cancel")
    async def handle(bodies: list[str], batch: list[Delivery[str]]) -> None:
        await keep(batch)

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["1", "2"])
        await until(lambda: held)
        await taken_away(bus, held[0])
        await later(it, 21)
        assert held[0].lost
        assert not cancelled
        await taken_away(bus, held[1])
        await later(it, 21)
        assert cancelled == [["1", "2"]]
        await it.idle()
        assert sorted(body for run in runs[1:] for body in run) == ["1", "2"]
        assert bus.counts["handled"] == 2


async def test_what_waits_is_not_begun_once_its_lease_is_gone() -> None:
    bus = make_bus()
    runs: list[str] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS, concurrency=1, prefetch=3)
    async def handle(body: str) -> None:
        runs.append(body)
        await go.wait()

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["1", "2", "3"])
        await until(lambda: runs)
        intake = bus._opened().intakes[0]
        second = next(d for d in intake.holding if d.message.body == b"2")
        async with bus.receiver(ORDERS, prefetch=1) as other:
            await taken_away(bus, second)
            taken = await other.receive(timeout=1)
            assert taken is not None
            await later(it, 21)
            assert len(intake.holding) == 2
            await taken.ack()
        go.set()
        await it.idle()
        assert runs == ["1", "3"]
        assert bus.counts["lease_lost"] == 1


async def test_an_extend_that_never_returns_is_tried_again_at_the_next_beat(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus()
    runs: list[Delivery[str]] = []
    whole, first = SpySubscription.extend, iter([True])

    async def hang_once(self: SpySubscription, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
        if next(first, False):
            await asyncio.Event().wait()
        return await whole(self, deliveries, seconds)

    monkeypatch.setattr(SpySubscription, "extend", hang_once)

    @bus.consumer(ORDERS, concurrency=1, prefetch=1, on_lease_lost="cancel")
    async def handle(body: str, delivery: Delivery[str]) -> None:
        runs.append(delivery)
        await asyncio.Event().wait()

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await later(it, 300)
        assert len(runs) == 1
        assert not runs[0].lost
        assert (runs[0].lease_until or 0) > it.clock.monotonic()
        assert spy_of(bus).extended
    assert [r for r in caplog.records if "no answer within 10 s" in r.getMessage()]


async def test_an_adapter_that_cancels_its_own_extend_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus()

    async def cancel_itself(_self: SpySubscription, _deliveries: Sequence[Delivery[Any]], _seconds: float) -> Results:
        raise asyncio.CancelledError

    monkeypatch.setattr(SpySubscription, "extend", cancel_itself)

    @bus.consumer(ORDERS, concurrency=1, prefetch=1)
    async def handle(body: str) -> None:
        await asyncio.Event().wait()

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await later(it, 25)
    assert [r for r in caplog.records if "1 leases could not be extended" in r.getMessage()]


def blocked(it: Lab, seconds: float) -> None:
    """The loop does not turn for so long: no timer fires."""
    it.clock._elapsed += seconds


async def test_what_waited_beyond_its_lease_is_given_back_not_begun(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()
    begun: list[tuple[str, bool]] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS, concurrency=1, prefetch=3)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        begun.append((body, (delivery.lease_until or 0) > it.clock.monotonic()))
        if len(begun) == 1:
            await go.wait()

    async with lab(bus) as it:
        ids = await bus.send_many(ORDERS, ["1", "2", "3"])
        await until(lambda: begun)
        _, second, third = bus._opened().intakes[0].holding
        await taken_away(bus, second)
        blocked(it, 100)
        go.set()
        await it.idle()
        assert sorted(begun) == [("1", True), ("2", True), ("3", True)]
        assert begun[0] == ("1", True)
        assert bus.counts["lease_lost"] == 1  # the third was still ours when it went back
        assert (it.broker.in_flight(), bus._opened().intakes[0].holding) == (0, {})
        assert (await bus.health()).status == "ok"
    said = [r.__dict__ for r in caplog.records if "has ended while it waited" in r.getMessage()]
    assert [(r["message_id"], r["channel"], r["verdict"]) for r in said] == [(id, "orders", "lost") for id in ids[1:]]
    assert third.settled


async def test_in_order_what_is_given_back_beyond_its_lease_keeps_its_place() -> None:
    bus = make_bus()
    begun: list[str] = []
    go = asyncio.Event()

    @bus.consumer(ORDERED, concurrency=1, prefetch=4)
    async def handle(body: str) -> None:
        begun.append(body)
        if len(begun) == 1:
            await go.wait()

    async with lab(bus) as it:
        await bus.send(ORDERED, "first", key="other")
        await until(lambda: begun)
        intake = bus._opened().intakes[0]
        for body in ("1", "2", "3"):
            await bus.send(ORDERED, body, key="k")
        await until(lambda: len(intake.holding) == 2)
        later_one: Delivery[Any] = Delivery(
            Message(b"9", key="k"), intake.source, None
        )  # what other brokers hand out behind it
        intake._admit([later_one])
        blocked(it, 100)
        go.set()
        await it.idle()
        assert begun == ["first", "1", "2", "3"]
        assert (Outcome.RELEASED, ["1", "9"]) in spy_of(bus).settled


async def test_a_batch_and_a_receiver_by_hand_begin_nothing_beyond_its_lease() -> None:
    bus = make_bus()
    begun: list[bool] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS, concurrency=1, prefetch=4, batch=2)
    async def handle(bodies: list[str], batch: list[Delivery[str]]) -> None:
        begun.extend((delivery.lease_until or 0) > it.clock.monotonic() for delivery in batch)
        await go.wait()

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["1", "2", "3", "4"])
        await bus.send_many(DONE, ["1", "2"])
        await until(lambda: begun)
        async with bus.receiver(DONE, prefetch=2) as receiver:
            await turns()
            blocked(it, 100)
            go.set()
            assert [d.body for d in [await receiver.receive(timeout=1), await receiver.receive(timeout=1)] if d] == [
                "1",
                "2",
            ]
            assert all((d.lease_until or 0) > it.clock.monotonic() for d in it.bus._opened().intakes[1].running)
        await it.idle()
        assert begun == [True] * 4


async def test_what_was_settled_first_needs_no_lease() -> None:
    bus = make_bus()
    runs: list[str] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS, concurrency=1, prefetch=3, guarantee="at-most-once")
    async def handle(body: str) -> None:
        runs.append(body)
        await go.wait()

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["1", "2", "3"])
        await until(lambda: runs)
        blocked(it, 100)
        go.set()
        await it.idle()
        assert runs == ["1", "2", "3"]


def test_a_thread_can_not_be_cancelled() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS, on_lease_lost="cancel")
    def handle(body: str) -> None: ...

    with pytest.raises(ConfigError, match='on_lease_lost="cancel", but a plain function'):
        asyncio.run(bus.run())
