"""The link: cut and mended, given up for good, broken by adapters in ways that no adapter should."""

import asyncio
import logging

import pytest
from tests.unit.core_lab import ASKS, DONE, EVENTS, ORDERS, lab, later, make_bus, spy_of, spying, tidy, turns

from unibus import (
    AuthenticationFailed,
    ConnectionLost,
    Delivery,
    NotFound,
    PermissionDenied,
    Refused,
    RetryPolicy,
    Timeout,
    TransportError,
    Unsupported,
)
from unibus.adapter import Health
from unibus.channel import dead_letter_queue
from unibus.deadletter import browse


async def test_a_cut_is_mended_and_nothing_is_lost() -> None:
    bus = make_bus()
    handled: list[str] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS, concurrency=2)
    async def handle(body: str) -> None:
        await go.wait()
        handled.append(body)

    async with lab(bus) as it:
        await bus.send_many(ORDERS, [str(n) for n in range(10)])
        await turns()
        it.broker.cut(down=True)
        await later(it, 5)
        assert (await bus.health()).status == "down"
        go.set()  # these two are too late: they come again
        it.broker.down = False
        await later(it, 12)
        await it.idle()
        assert sorted(set(handled)) == [str(n) for n in range(10)]
        assert 12 <= len(handled) <= 14  # two ran, two more were in hand
        assert (await bus.health()).status == "ok"
        assert bus.counts["reconnected"] == 1
        assert not it.dead_letters(ORDERS)


async def test_a_link_that_breaks_under_a_retry_brings_the_message_again_at_once() -> None:
    bus = make_bus()
    handled: list[str] = []

    @bus.consumer(ORDERS, prefetch=1, retry=RetryPolicy(max_retries=3, backoff=1))
    async def handle(body: str) -> None:
        handled.append(body)
        if len(handled) == 1:  # with no room to receive, the copy for the retry is the first to meet it
            it.broker.refuse(ORDERS, ConnectionLost("the link was cut"), times=1)
            raise OSError("later")

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await later(it, 2)
        assert handled == ["x", "x"]
        await it.idle()
        assert (bus.counts["reconnected"], bus.counts["lease_lost"]) == (1, 1)
        assert (await bus.backlog(ORDERS)).ready == 0


async def test_a_lost_link_is_noticed_while_all_hands_are_full() -> None:
    bus = make_bus()
    held: list[Delivery[str]] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS, prefetch=1)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        held.append(delivery)
        await go.wait()

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await turns()
        it.broker.cut()
        sending = asyncio.ensure_future(bus.send(ORDERS, "y"))  # the only one that meets it
        await later(it, 1)
        await sending
        assert held[0].lost
        assert len(it.broker.subscriptions) == 1
        go.set()
        await it.idle()
        assert [each.body for each in held] == ["x", "x", "y"]


async def test_the_waits_between_tries_grow_up_to_two_seconds() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        spy = spy_of(bus)
        it.broker.cut(down=True)
        began, tries = it.clock.monotonic(), []
        assert (await bus.health()).status == "down"
        send = asyncio.ensure_future(bus.send(ORDERS, "x", timeout=500))
        for _ in range(100):
            before = spy.calls["connect"]
            await later(it, 1)
            tries.append(spy.calls["connect"] - before)
        assert sum(tries) >= 100 / 2.5
        assert sum(tries[50:]) <= 50 / 1.5 + 1
        assert tries[0] >= 2
        it.broker.down = False
        await later(it, 3)
        assert send.done()
        await send
        assert it.clock.monotonic() - began > 100


async def test_messages_flow_again_within_seconds_however_long_the_broker_was_away() -> None:
    """Senders and handlers alike: nobody's wait may have grown with the time that it took."""
    bus = make_bus()
    handled: list[str] = []

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        handled.append(body)

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await later(it, 1)
        it.broker.cut(down=True)
        first = asyncio.ensure_future(bus.send(ORDERS, "y", timeout=5))
        await later(it, 600)
        with pytest.raises((Timeout, ConnectionLost)):
            await first
        it.broker.down = False
        sending = asyncio.ensure_future(bus.send(ORDERS, "z"))
        await later(it, 3)
        await sending
        assert handled == ["x", "z"]


async def test_a_link_that_is_cut_after_a_long_outage_is_not_made_to_wait_for_that() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        it.broker.cut(down=True)
        asked = asyncio.ensure_future(bus.send(ORDERS, "x", timeout=500))
        await later(it, 60)
        it.broker.down = False
        await later(it, 3)
        await asked
        it.broker.cut()
        asked = asyncio.ensure_future(bus.send(ORDERS, "y"))
        await later(it, 0.5)
        assert asked.done()
        assert bus.counts["reconnected"] == 2
        await asked


async def test_a_bus_that_only_looks_is_connected_again() -> None:
    """Nothing sends and nothing receives: the question itself has to notice that the link is broken."""
    bus = make_bus()
    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        it.broker.cut()
        assert (await bus.backlog(ORDERS)).ready == 1
        assert bus.counts["reconnected"] == 1
        await later(it, 60)  # else the second try would be made to wait
        it.broker.cut()
        assert [letter async for letter in browse(bus, ORDERS)] == []
        assert bus.counts["reconnected"] == 2


async def test_a_question_waits_ten_seconds_for_a_link_and_no_longer() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        it.broker.cut(down=True)
        asked = asyncio.ensure_future(bus.backlog(ORDERS))
        await later(it, 9)
        assert not asked.done()
        await later(it, 2)
        with pytest.raises(ConnectionLost, match="no link to the broker: the memory broker"):
            await asked
        it.broker.down = False
        await later(it, 13)
        assert (await bus.backlog(ORDERS)).ready == 0


async def test_a_health_check_that_finds_the_link_broken_has_it_mended() -> None:
    """A process that is never ready is never asked to do what would notice it."""
    bus = make_bus()
    async with lab(bus) as it:
        it.broker.cut()
        assert (await bus.health()).status == "down"
        await turns()
        assert (await bus.health()).status == "ok"


async def test_a_health_check_leaves_a_client_alone_that_comes_back_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new connection would throw away what it holds, such as what is not committed yet."""
    bus = make_bus()
    async with lab(bus) as it:

        async def check() -> Health:
            return Health(up=False, mends=True)

        monkeypatch.setattr(bus.adapter, "check", check)
        before = spy_of(bus).calls["connect"]
        assert (await bus.health()).status == "down"
        await later(it, 30)
        assert spy_of(bus).calls["connect"] == before


async def test_a_link_that_breaks_as_soon_as_it_is_up_is_not_tried_without_end() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None: ...

    async with lab(bus) as it:
        spy = spy_of(bus)
        spy.always["subscribe"] = ConnectionLost("the channel was closed")
        it.broker.cut()
        before = spy.calls["connect"]
        await turns(2000)
        await later(it, 10)
        assert spy.calls["connect"] - before < 12
        del spy.always["subscribe"]
        await later(it, 25)
        await bus.send(ORDERS, "x")
        await it.idle()
        assert bus.counts["handled"] == 1


@pytest.mark.parametrize("kind", [AuthenticationFailed, PermissionDenied])
async def test_what_trying_again_can_not_help_is_given_up(kind: type[TransportError]) -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None: ...

    async with lab(bus) as it:
        spy_of(bus).always["connect"] = kind("who are you?")
        waiting = asyncio.ensure_future(bus.send(ORDERS, "x"))
        it.broker.cut()
        await later(it, 1)
        with pytest.raises(kind):
            await bus.send(ORDERS, "y")
        with pytest.raises(kind):
            await bus.request(ASKS, "z")
        await asyncio.wait([waiting])
        health = await bus.health()
        assert (health.status, health.reasons) == ("down", ("who are you?",))
        assert spy_of(bus).calls["connect"] == 2


async def test_a_subscription_that_is_not_permitted_any_more_ends_the_link() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None: ...

    async with lab(bus) as it:
        spy_of(bus).always["subscribe"] = PermissionDenied("not any more")
        it.broker.cut()
        await later(it, 1)
        assert bus._opened().kit.link.failed.is_set()
        assert (await bus.health()).reasons == ("not any more",)


@pytest.mark.parametrize(
    "error",
    [PermissionDenied("no"), NotFound("no such queue"), Unsupported("not here"), Refused("no"), KeyError("bug")],
)
async def test_a_subscription_that_is_refused_at_the_start_is_an_error_there(error: Exception) -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None: ...

    with spying([]):
        async with tidy(), bus:
            spy_of(bus).always["subscribe"] = error
            with pytest.raises(type(error)):
                async with bus.running():
                    raise AssertionError("it can't run")
            with pytest.raises(type(error)):
                async with bus.receiver(DONE):
                    raise AssertionError("it can't receive")
            assert not bus._opened().intakes


@pytest.mark.parametrize("method", ["connect", "declare", "subscribe", "receive", "settle", "move"])
async def test_an_adapter_that_breaks_in_an_unexpected_way_is_not_the_end(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus()

    @bus.consumer(ORDERS, retry=RetryPolicy(max_retries=0))
    async def handle(body: str) -> None:
        if body == "bad":
            raise ValueError

    async with lab(bus) as it:
        spy_of(bus).faults[method] += [ZeroDivisionError("a bug"), OSError("another")]
        if method in ("connect", "declare", "subscribe", "receive"):
            it.broker.cut()
        await later(it, 40)
        await bus.send_many(ORDERS, ["bad", "good"])
        await later(it, 100)
        await it.idle()
        assert bus.counts["handled"] >= 1
        assert {m.body for m in it.dead_letters(ORDERS)} == {"bad"}
        assert it.broker.in_flight() == 0
        assert not spy_of(bus).faults[method]
        assert (await bus.health()).status == "ok"
    assert any(r.exc_info for r in caplog.records if r.levelno >= logging.WARNING)


@pytest.mark.parametrize(
    "method", ["close", "connect", "declare", "subscribe", "receive", "send", "settle", "move", "unsubscribe"]
)
async def test_a_client_that_cancels_its_own_calls_ends_nothing(method: str) -> None:
    """As aiormq, when a server hangs: the reconnect was cancelled by it, and never tried again."""
    bus = make_bus()

    @bus.consumer(ORDERS, retry=RetryPolicy(max_retries=0))
    async def handle(body: str) -> None:
        if body == "bad":
            raise ValueError

    async with lab(bus) as it:
        spy_of(bus).faults[method].append(asyncio.CancelledError())
        it.broker.cut()
        await later(it, 40)
        sending = asyncio.ensure_future(bus.send_many(ORDERS, ["bad", "good"]))
        await later(it, 100)
        await sending
        await it.idle()
        assert not spy_of(bus).faults[method]
        assert bus.counts["handled"] >= 1
        assert {m.body for m in it.dead_letters(ORDERS)} == {"bad"}
        assert it.broker.in_flight() == 0
        assert (await bus.health()).status == "ok"


@pytest.mark.parametrize("method", ["stop", "unsubscribe"])
async def test_an_adapter_that_breaks_at_the_end_does_not_keep_the_bus_open(method: str) -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None: ...

    async with lab(bus):
        spy_of(bus).faults[method].append(ZeroDivisionError("a bug"))


async def test_a_heartbeat_that_breaks_is_tried_again() -> None:
    bus = make_bus()
    go = asyncio.Event()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        await go.wait()

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await turns()
        await later(it, 1)
        spy_of(bus).faults["extend"].append(ZeroDivisionError("a bug"))
        spy_of(bus).faults["extend"].append(TransportError("not now"))
        await later(it, 25)
        assert spy_of(bus).calls["extend"] >= 1
        go.set()
        await it.idle()


async def test_a_queue_deleted_under_its_consumer_is_made_again() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None: ...

    async with lab(bus) as it:
        it.broker.delete(ORDERS)
        await turns()
        assert (await bus.health()).status == "degraded"
        await later(it, 2)
        await bus.send(ORDERS, "x")
        await it.idle()
        assert bus.counts["handled"] == 1
        assert bus.counts.get("reconnected", 0) == 0  # one queue's trouble is not the link's
        assert (await bus.health()).status == "ok"


async def test_a_dead_letter_channel_that_was_deleted_is_made_again() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS, retry=RetryPolicy(max_retries=0))
    async def handle(body: str) -> None:
        raise ValueError

    async with lab(bus) as it:
        it.broker.delete(dead_letter_queue(ORDERS))
        await bus.send(ORDERS, "x")
        await later(it, 5)
        assert [m.body for m in it.dead_letters(ORDERS)] == ["x"]


async def test_a_bus_closed_while_it_reconnects_closes() -> None:
    bus = make_bus()

    @bus.subscriber(EVENTS, broadcast=True)
    @bus.consumer(ORDERS)
    async def handle(body: str) -> None: ...

    async with lab(bus) as it:
        it.broker.cut(down=True)
        await later(it, 1)


async def test_many_cuts_lose_nothing() -> None:
    bus = make_bus()
    handled: set[str] = set()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        handled.add(body)
        await bus.send(DONE, body)

    async with lab(bus) as it:
        sends = []
        for n in range(20):
            sends += [asyncio.ensure_future(bus.send(ORDERS, f"{n}.{i}")) for i in range(5)]
            await turns(n)
            it.broker.cut()
            await later(it, 1)
        await later(it, 60)
        await asyncio.gather(*sends)
        await it.idle()
        assert len(handled) == 100
        assert {m.body.decode() for m in it.broker.waiting(DONE)} == handled
