"""The watchdog: who falls silent without an error is subscribed anew; who has nothing to do, or stands by, is left alone."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tests.unit.core_lab import ORDERS, SpySubscription, lab, later, make_bus, spy_of, turns

from unibus import Bus, Delivery, RetryPolicy
from unibus.adapter import Standing
from unibus.capabilities import refused
from unibus.clock import VirtualClock
from unibus.errors import Timeout
from unibus.watchdog import Calls

Receive = Callable[[SpySubscription, int, float], Any]


def consuming(handled: list[str], **options: Any) -> Bus:
    bus = make_bus()

    @bus.consumer(ORDERS, **options)
    async def handle(body: str) -> None:
        handled.append(body)

    return bus


def breaking(monkeypatch: pytest.MonkeyPatch, *broken: Receive | None) -> list[SpySubscription]:
    """The first subscriptions receive like this, one each; None, and all later ones, as they should. Those that were made."""
    made: list[SpySubscription] = []
    whole = SpySubscription.receive

    async def receive(self: SpySubscription, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        if self not in made:
            made.append(self)
        n = made.index(self)
        how = broken[n] if n < len(broken) else None
        found: Sequence[Delivery[Any]] = await (how or whole)(self, limit, timeout)
        return found

    monkeypatch.setattr(SpySubscription, "receive", receive)
    return made


async def hang(_subscription: SpySubscription, _limit: int, _timeout: float) -> None:
    await asyncio.Event().wait()


async def cancel_itself(_subscription: SpySubscription, _limit: int, _timeout: float) -> None:
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.cancel)  # as client libraries do when a channel ends
    await future


async def test_a_receive_that_never_returns_is_noticed_and_mended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handled: list[str] = []
    made = breaking(monkeypatch, hang)
    bus = consuming(handled)
    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await later(it, 29)
        assert handled == []
        await later(it, 2)
        await it.idle()
        assert handled == ["x"]
        assert len(made) == 2
        assert made[0].over is not None  # it was closed
        assert bus.counts["resubscribed"] == 1
        assert bus.counts.get("reconnected", 0) == 0
        assert (await bus.health()).status == "ok"
        await later(it, 100)
        assert bus.counts["resubscribed"] == 1
    assert [r for r in caplog.records if "has not returned for 30 s" in r.getMessage()]


async def test_one_that_hangs_again_may_be_the_links_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[str] = []
    breaking(monkeypatch, hang, hang)
    bus = consuming(handled)
    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await later(it, 70)
        assert handled == ["x"]
        assert (bus.counts["resubscribed"], bus.counts["reconnected"]) == (2, 1)
        assert (await bus.health()).status == "ok"


async def test_one_of_several_receives_that_hangs_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[str] = []
    first = iter([True])

    async def hang_once(subscription: SpySubscription, limit: int, timeout: float) -> Any:
        if next(first, False):
            await asyncio.Event().wait()
        return await super(SpySubscription, subscription).receive(limit, timeout)

    made = breaking(monkeypatch, hang_once)
    bus = consuming(handled, prefetch=40)
    async with lab(bus, receivers=4, receive_batch=10) as it:
        await later(it, 31)
        assert (len(made), bus.counts["resubscribed"]) == (2, 1)
        await bus.send_many(ORDERS, [f"{n}" for n in range(40)])
        await it.idle()
        assert len(handled) == 40


async def test_a_subscription_that_is_gone_and_does_not_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[str] = []
    made = breaking(monkeypatch, hang)

    async def check(self: SpySubscription) -> Standing:
        return "gone" if made and self is made[0] else "consuming"

    monkeypatch.setattr(SpySubscription, "check", check)
    bus = consuming(handled)
    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await turns()
        health = await bus.health()
        assert (health.status, health.reasons) == ("degraded", ("queue 'orders': its subscription is gone",))
        await later(it, 11)  # two looks
        await it.idle()
        assert handled == ["x"]
        assert bus.counts["resubscribed"] == 1
        assert (await bus.health()).status == "ok"


@pytest.mark.parametrize("word", ["standby", "consuming"])
async def test_who_stands_by_or_finds_nothing_is_left_alone(monkeypatch: pytest.MonkeyPatch, word: Standing) -> None:
    async def check(_self: SpySubscription) -> Standing:
        return word

    monkeypatch.setattr(SpySubscription, "check", check)
    made = breaking(monkeypatch)
    bus = consuming([])
    async with lab(bus) as it:
        await later(it, 600)
        assert len(made) == 1
        assert bus.counts.get("resubscribed", 0) == 0
        assert (await bus.health()).status == "ok"


async def test_a_full_hand_is_no_silence() -> None:
    bus = make_bus()
    go = asyncio.Event()
    runs: list[str] = []

    @bus.consumer(ORDERS, concurrency=1, prefetch=1)
    async def handle(body: str) -> None:
        runs.append(body)
        await go.wait()

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["1", "2"])
        await later(it, 600)
        assert (runs, bus.counts.get("resubscribed", 0)) == (["1"], 0)
        go.set()
        await it.idle()
        assert runs == ["1", "2"]


async def test_a_loop_that_was_blocked_has_had_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks are counted: one after a long time is one look."""
    made = breaking(monkeypatch)
    bus = consuming([])
    async with lab(bus) as it:
        await later(it, 1)
        it.clock._elapsed += 300  # all at once, as it is for a loop that did not turn
        it.clock.move(0)
        await turns()
        await later(it, 20)
        assert (len(made), bus.counts.get("resubscribed", 0)) == (1, 0)


@pytest.mark.parametrize("receivers", [1, 4])
async def test_an_adapter_that_cancels_its_own_receive_is_not_the_end(
    monkeypatch: pytest.MonkeyPatch, receivers: int
) -> None:
    handled: list[str] = []
    made = breaking(monkeypatch, cancel_itself)
    bus = consuming(handled, prefetch=40)
    async with lab(bus, receivers=receivers, receive_batch=10) as it:
        await bus.send(ORDERS, "x")
        await later(it, 1)
        await it.idle()
        assert (handled, len(made)) == (["x"], 2)
        assert made[0].over is not None
        assert (await bus.health()).status == "ok"


@pytest.mark.parametrize("error", [OSError("a bug"), Timeout("no answer")])
async def test_a_check_that_fails_says_nothing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def check(_self: SpySubscription) -> Standing:
        raise error

    monkeypatch.setattr(SpySubscription, "check", check)
    bus = consuming([])
    async with lab(bus) as it:
        await later(it, 100)
        assert (await bus.health()).status == "ok"
        assert bus.counts.get("resubscribed", 0) == 0


async def test_a_silent_subscription_that_does_not_close_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handled: list[str] = []
    made = breaking(monkeypatch, hang)
    whole, first = SpySubscription.close, iter([True])

    async def close(self: SpySubscription) -> None:
        if made and self is made[0] and next(first, False):  # when its adapter is closed it is not in the way
            await asyncio.Event().wait()
        await whole(self)

    monkeypatch.setattr(SpySubscription, "close", close)
    bus = consuming(handled)
    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await later(it, 62)
        await it.idle()
        assert handled == ["x"]
    assert [r for r in caplog.records if "left behind" in r.getMessage()]


@pytest.mark.parametrize(("method", "seconds"), [("stop", 25), ("close", 28)])
async def test_a_driver_that_does_not_stop_does_not_keep_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str, seconds: int
) -> None:
    whole, first = getattr(SpySubscription, method), iter([True])

    async def hang_once(self: SpySubscription) -> None:
        if next(first, False):
            await asyncio.Event().wait()
        await whole(self)

    monkeypatch.setattr(SpySubscription, method, hang_once)
    async with lab(consuming([])):
        await turns()
    assert [r for r in caplog.records if f"did not {method} within {seconds} s" in r.getMessage()]


async def test_a_bus_closes_while_its_receive_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, hang)
    bus = consuming([])
    async with lab(bus):
        await turns()


# A settling that never returns


def hanging(monkeypatch: pytest.MonkeyPatch, method: str, *, release: asyncio.Event | None = None) -> None:
    """The first call of `method` returns never, or once released."""
    whole, first = getattr(SpySubscription, method), iter([True])

    async def hang_once(self: SpySubscription, *args: Any, **more: Any) -> Any:
        if next(first, False):
            await (release or asyncio.Event()).wait()
        return await whole(self, *args, **more)

    monkeypatch.setattr(SpySubscription, method, hang_once)


async def test_a_settle_that_never_returns_is_told_and_its_link_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[str] = []
    hanging(monkeypatch, "settle")
    bus = consuming(handled, prefetch=5)
    async with lab(bus) as it:
        sent = [f"{n}" for n in range(50)]
        await bus.send_many(ORDERS, sent)
        await later(it, 4)
        assert (await bus.health()).status == "ok"
        await later(it, 7)
        health = await bus.health()
        assert (health.status, health.reasons) == (
            "degraded",
            ("queue 'orders': its messages are not settled: the adapter has not answered for 10 s",),
        )
        assert len(handled) <= 5
        await later(it, 85)
        await it.idle()
        assert sorted(set(handled)) == sorted(sent)
        assert bus.counts["reconnected"] == 1
        assert (it.broker.in_flight(), bus._opened().intakes[0].holding) == (0, {})
        assert (await bus.health()).status == "ok"


async def test_a_move_that_never_returns_too(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging(monkeypatch, "move")
    bus = make_bus(send_timeout=20)

    @bus.consumer(ORDERS, retry=RetryPolicy(max_retries=0))
    async def handle(body: str) -> None:
        raise ValueError

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await later(it, 11)
        assert (await bus.health()).status == "degraded"
        await later(it, 90)
        assert bus.counts.get("reconnected", 0) == 0
        await later(it, 15)
        await it.idle()
        assert bus.counts["reconnected"] == 1
        assert [letter.body for letter in it.dead_letters(ORDERS)] == ["x"]
        assert (await bus.health()).status == "ok"


async def test_a_settle_that_takes_long_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[str] = []
    release = asyncio.Event()
    hanging(monkeypatch, "settle", release=release)
    bus = consuming(handled)
    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await later(it, 80)
        release.set()
        await later(it, 100)
        assert (handled, bus.counts.get("reconnected", 0)) == (["x"], 0)
        assert (await bus.health()).status == "ok"


async def test_a_bus_closes_while_a_settle_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging(monkeypatch, "settle")
    bus = consuming([])
    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await turns()
        clock = it.clock
        began = clock.monotonic()
    assert clock.monotonic() - began < 100


async def test_who_cancels_a_bounded_call_cancels_it() -> None:
    clock = VirtualClock()
    calls = Calls(clock)
    task = asyncio.ensure_future(calls.bounded(asyncio.Event().wait(), 5))
    await turns()
    clock.move(5)
    task.cancel()
    await turns()
    assert task.cancelled()
    assert clock.next_due() == 5
    clock.move(5)
    assert clock.next_due() is None


# What the health tells of those who can't keep up


async def test_handlers_that_take_for_ever_are_told_and_hold_no_more_than_the_prefetch() -> None:
    bus = make_bus()
    go = asyncio.Event()

    @bus.consumer(ORDERS, concurrency=2, prefetch=5, timeout=0)
    async def handle(body: str) -> None:
        await go.wait()

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["x"] * 100)
        await later(it, 30)
        assert (await bus.health()).status == "ok"  # busy is not ill
        await later(it, 31)
        health = await bus.health()
        assert health.status == "degraded"
        assert health.reasons == ("queue 'orders': 3 messages wait: each of 2 handlers has run for 61 s",)
        assert len(bus._opened().intakes[0].holding) == it.broker.in_flight() == 5
        go.set()
        await it.idle()
        assert (await bus.health()).status == "ok"
        assert bus.counts["handled"] == 100


async def test_a_broker_that_confirms_nothing_is_told_and_intake_pauses() -> None:
    bus = make_bus(send_timeout=1000)
    begun: list[str] = []

    @bus.consumer(ORDERS, concurrency=2, prefetch=4)
    async def handle(body: str) -> None:
        begun.append(body)
        await bus.send("done", body)

    async with lab(bus) as it:
        await bus.send_many(ORDERS, [f"{n}" for n in range(100)])
        gate = spy_of(bus).gate
        gate.clear()
        await later(it, 20)
        before = list(begun)
        await later(it, 30)
        assert begun == before  # nothing is begun any more
        assert len(bus._opened().intakes[0].holding) <= 4
        health = await bus.health()
        assert health.status == "degraded"
        assert "to queue 'done' wait: none was confirmed for" in health.reasons[0]
        gate.set()
        await it.idle()
        assert (await bus.health()).status == "ok"
        assert bus.counts["handled"] == 100


async def test_a_dead_letter_channel_that_is_slow_to_refuse_is_told_all_the_while() -> None:
    """Between two tries, and during one."""
    bus = make_bus(send_timeout=20)
    handled: list[str] = []

    @bus.consumer(ORDERS, concurrency=1, prefetch=3, retry=RetryPolicy(max_retries=0))
    async def handle(body: str) -> None:
        handled.append(body)
        raise ValueError

    async with lab(bus, atomic_move=refused("a copy, then an ack")) as it:
        await bus.send_many(ORDERS, ["x"] * 50)
        spy_of(bus).gate.clear()
        await later(it, 25)
        for _ in range(10):
            assert (await bus.health()).status == "degraded"
            assert len(bus._opened().intakes[0].holding) <= 3
            await later(it, 7)
        assert len(handled) <= 3
        spy_of(bus).gate.set()
        await later(it, 20)
        await it.idle()
        assert (await bus.health()).status == "ok"
        assert len({letter.id for letter in it.dead_letters(ORDERS)}) == 50  # a try without an answer may have arrived
