"""Request and reply: whose reply is whose, errors, deadlines, forged addresses, an inbox that is lost."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from tests.unit.core_lab import (
    ASKS,
    DONE,
    EVENTS,
    ORDERS,
    Spy,
    SpySubscription,
    lab,
    later,
    make_bus,
    spy_of,
    turns,
    until,
)

from unibus import Closed, ConnectionLost, DeadLetter, Delivery, Message, Queue, RemoteError, RetryPolicy, Timeout
from unibus.adapter import Source, Subscription
from unibus.channel import Inbox
from unibus.memory_subscription import MemorySubscription
from unibus.testing import Lab

NUMBERS = Queue[int]("numbers", int, reply=int)


async def test_a_hundred_requests_from_one_handler_answered_in_reverse() -> None:
    bus = make_bus()
    waiting: list[tuple[str, asyncio.Future[None]]] = []
    answers: list[str] = []

    @bus.responder(ASKS, concurrency=100)
    async def answer(body: str) -> str:
        future = asyncio.get_running_loop().create_future()
        waiting.append((body, future))
        await future
        return f"re {body}"

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        answers.extend(await asyncio.gather(*(bus.request(ASKS, str(n)) for n in range(100))))

    async with lab(bus) as it:
        await bus.send(ORDERS, "go")
        await until(lambda: len(waiting) == 100)
        for _, future in reversed(waiting):
            future.set_result(None)
            await turns(3)
        await it.idle()
        assert answers == [f"re {n}" for n in range(100)]
        assert bus.counts["replied"] == 100


async def test_the_reply_is_of_the_conversation_and_caused_by_the_request() -> None:
    bus = make_bus()
    seen: list[Message] = []

    @bus.responder(ASKS)
    async def answer(body: str, message: Message) -> str:
        seen.append(message)
        await bus.send(DONE, "x")
        return "y"

    async with lab(bus) as it:
        assert await bus.request(ASKS, Message("x", correlation_id="c", id="r"), timeout=7) == "y"
        assert (seen[0].correlation_id, seen[0].expires_at) == ("c", it.clock.time() + 7)
        assert it.broker.waiting(DONE)[0].correlation_id == "c"
        assert it.broker.waiting(DONE)[0].causation_id == "r"


@pytest.mark.parametrize("kind", [ValueError, SystemExit, asyncio.CancelledError])
async def test_what_the_responder_raises_is_answered_at_once(kind: type[BaseException]) -> None:
    bus = make_bus()
    runs: list[str] = []

    @bus.responder(ASKS)
    async def answer(body: str) -> str:
        runs.append(body)
        raise kind("out of\nstock, ask amqp://me:secret@host")

    async with lab(bus) as it:
        with pytest.raises(RemoteError) as caught:
            await bus.request(ASKS, "x")
        assert (caught.value.type, caught.value.message) == (kind.__name__, "out of stock, ask amqp://****@host")
        await later(it, 100)
        assert runs == ["x"]
        assert not it.dead_letters(ASKS)


async def test_a_responder_that_takes_too_long_is_an_error_too() -> None:
    bus = make_bus()
    runs: list[str] = []

    @bus.responder(ASKS, timeout=3)
    async def answer(body: str) -> str:
        runs.append(body)
        await asyncio.Event().wait()
        return "never"

    async with lab(bus) as it:
        call = asyncio.ensure_future(bus.request(ASKS, "x", timeout=20))
        await later(it, 3)
        with pytest.raises(RemoteError, match="HandlerTimeout"):
            await call
        await later(it, 30)
        assert runs == ["x"]
        assert not it.dead_letters(ASKS)


async def test_a_dead_letter_of_a_responder_is_answered_and_kept() -> None:
    bus = make_bus()

    @bus.responder(ASKS)
    async def answer(body: str) -> str:
        raise DeadLetter("look at this")

    async with lab(bus) as it:
        with pytest.raises(RemoteError, match="look at this"):
            await bus.request(ASKS, "x")
        await it.idle()
        assert len(it.dead_letters(ASKS)) == 1


async def test_an_answer_of_the_wrong_type_is_an_error() -> None:
    bus = make_bus()

    @bus.responder(ASKS)
    async def answer(body: str):  # type: ignore[no-untyped-def]  # noqa: ANN202  # nothing that gives it away at start
        return 5

    async with lab(bus):
        with pytest.raises(RemoteError, match="CodecError"):
            await bus.request(ASKS, "x")


async def test_a_plain_responder() -> None:
    bus = make_bus()

    @bus.responder(ASKS)
    def answer(body: str) -> str:
        return body.upper()

    async with lab(bus):
        assert await bus.request(ASKS, "x") == "X"


async def test_with_a_policy_of_its_own_the_request_is_tried_again() -> None:
    bus = make_bus()
    runs: list[int] = []

    @bus.responder(ASKS, retry=RetryPolicy(max_retries=5, backoff=2, multiplier=1))
    async def answer(body: str, delivery: Delivery[str]) -> str:
        runs.append(delivery.attempt)
        if delivery.attempt < 3:
            raise ValueError("not yet")
        return "at last"

    async with lab(bus) as it:
        call = asyncio.ensure_future(bus.request(ASKS, "x", timeout=10))
        await later(it, 4)
        assert await call == "at last"
        assert runs == [1, 2, 3]


async def test_a_retry_that_would_come_too_late_is_an_answer() -> None:
    bus = make_bus()

    @bus.responder(ASKS, retry=RetryPolicy(max_retries=5, backoff=4, multiplier=1))
    async def answer(body: str) -> str:
        raise ValueError("never")

    async with lab(bus) as it:
        call = asyncio.ensure_future(bus.request(ASKS, "x", timeout=10))
        await later(it, 8)
        with pytest.raises(RemoteError, match="never"):
            await call
        assert not it.dead_letters(ASKS)


async def test_no_reply_in_time_and_the_late_one_is_counted() -> None:
    bus = make_bus()
    go = asyncio.Event()

    @bus.responder(ASKS)
    async def answer(body: str, delivery: Delivery[str]) -> str:
        await go.wait()
        delivery.message.expires_at = None  # a responder that does not look at the time
        return "late"

    async with lab(bus) as it:
        call = asyncio.ensure_future(bus.request(ASKS, "x", timeout=5))
        await later(it, 5)
        with pytest.raises(Timeout, match=r"queue 'asks' within 5 s"):
            await call
        go.set()
        await it.idle()
        await until(lambda: bus.counts.get("late_replies"))
        assert bus.counts["late_replies"] == 1


async def test_an_expired_request_is_dropped_and_counted() -> None:
    bus = make_bus()
    runs: list[str] = []
    go = asyncio.Event()

    @bus.responder(ASKS, concurrency=1, prefetch=1)
    async def answer(body: str) -> str:
        runs.append(body)
        await go.wait()
        return body

    async with lab(bus) as it:
        first = asyncio.ensure_future(bus.request(ASKS, "1", timeout=60))
        await turns()
        second = asyncio.ensure_future(bus.request(ASKS, "2", timeout=5))
        await later(it, 6)
        assert isinstance((await asyncio.gather(second, return_exceptions=True))[0], Timeout)
        go.set()
        assert await first == "1"
        await it.idle()
        assert runs == ["1"]
        assert bus.counts["expired"] == 1
        assert not it.dead_letters(ASKS)


@pytest.mark.parametrize("address", ["orders", "inbox.", "inbox.a b", "../../orders", "inbox.x\u2028y", "x" * 3000, ""])
async def test_a_forged_return_address_is_refused_and_the_request_done(address: str) -> None:
    bus = make_bus()

    @bus.responder(ASKS)
    async def answer(body: str) -> str:
        return "for nobody"

    async with lab(bus) as it:
        await bus.send(ASKS, Message("x", reply_to=address))
        await it.idle()
        assert bus.counts["replies_failed"] == 1
        assert bus.counts["handled"] == 1
        assert it.broker.waiting(ORDERS) == []
        assert not it.dead_letters(ASKS)


async def test_an_adapter_that_breaks_on_a_return_address_does_not_bring_the_request_back() -> None:
    bus = make_bus()

    @bus.responder(ASKS)
    async def answer(body: str) -> str:
        return "for nobody"

    async with lab(bus) as it:

        def broken(text: str) -> Inbox:
            raise IndexError(text)

        spy_of(bus).reply_to = broken  # type: ignore[method-assign]  # a broken adapter
        await bus.send(ASKS, Message("x", reply_to="inbox.me"))
        await it.idle()
        assert (bus.counts["replies_failed"], bus.counts["handled"]) == (1, 1)


async def test_a_requester_that_is_gone_costs_nothing() -> None:
    bus = make_bus()

    @bus.responder(ASKS)
    async def answer(body: str) -> str:
        return "for nobody"

    async with lab(bus) as it:
        await bus.send_many(ASKS, [Message("x", reply_to="inbox.gone"), Message("y")])
        await it.idle()
        assert (bus.counts["replies_failed"], bus.counts["handled"]) == (2, 2)


async def test_an_undecodable_request_is_answered_and_kept() -> None:
    bus = make_bus()
    bus.channels.append(NUMBERS)

    @bus.responder(NUMBERS)
    async def answer(body: int) -> int:
        return body

    async with lab(bus) as it:
        with pytest.raises(RemoteError, match="CodecError"):
            await bus.request(NUMBERS, Message(b"{"))
        await it.idle()
        assert [m.body for m in it.invalid(NUMBERS)] == [b"{"]


async def test_losing_the_inbox_is_known_at_once_and_the_next_request_works() -> None:
    bus = make_bus()
    go = asyncio.Event()

    @bus.responder(ASKS)
    async def answer(body: str) -> str:
        await go.wait()
        return "y"

    async with lab(bus) as it:
        call = asyncio.ensure_future(bus.request(ASKS, "x"))
        await turns(50)
        it.broker.cut()
        await turns(50)
        with pytest.raises(ConnectionLost, match="inbox is gone"):
            await call
        go.set()
        again = asyncio.ensure_future(bus.request(ASKS, "x"))
        await later(it, 5)
        assert await again == "y"


async def test_an_inbox_that_opens_slowly_does_not_make_the_request_live_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it would be worked on when the requester has given up."""
    bus = make_bus()
    seen: list[float | None] = []

    @bus.responder(ASKS)
    async def answer(body: str, message: Message) -> str:
        seen.append(message.expires_at)
        return body

    async with lab(bus) as it:
        adapter, opening = spy_of(bus), asyncio.Event()
        subscribe = adapter.subscribe

        async def slowly(source: Source) -> Subscription:
            opening.set()
            await it.clock.sleep(3)
            return await subscribe(source)

        monkeypatch.setattr(adapter, "subscribe", slowly)
        ends = it.clock.time() + 5
        call = asyncio.ensure_future(bus.request(ASKS, "x", timeout=5))
        await opening.wait()
        await later(it, 3)
        assert await call == "x"
        assert seen == [ends]


async def test_a_cancelled_request_is_forgotten() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        spy = spy_of(bus)
        spy.gate.clear()
        flying = asyncio.ensure_future(bus.send(ASKS, "flying"))
        await turns()
        call = asyncio.ensure_future(bus.request(ASKS, "x"))
        await turns()
        call.cancel()
        await asyncio.wait([call])
        spy.gate.set()
        await flying
        assert [m.body for m in it.broker.waiting(ASKS)] == [b"flying"]
        assert not bus._opened()._requester._waiting


async def test_requests_under_way_are_told_when_the_bus_is_closed() -> None:
    bus = make_bus()
    async with lab(bus):
        call = asyncio.ensure_future(bus.request(ASKS, "x"))
        await turns(50)
    with pytest.raises(Closed, match="closed"):
        await call


async def test_one_inbox_for_the_whole_process() -> None:
    bus = make_bus()

    @bus.responder(ASKS)
    async def answer(body: str) -> str:
        return body

    async with lab(bus):
        spy = spy_of(bus)
        before = spy.calls["subscribe"]
        assert await asyncio.gather(*(bus.request(ASKS, str(n)) for n in range(10))) == [str(n) for n in range(10)]
        assert spy.calls["subscribe"] == before + 1


async def test_an_inbox_that_breaks_is_opened_again(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()

    @bus.responder(ASKS)
    async def answer(body: str) -> str:
        return body

    @bus.subscriber(EVENTS)
    async def handle(body: str) -> None: ...

    async with lab(bus) as it:
        spy_of(bus).faults["subscribe"].append(ZeroDivisionError("a bug"))
        first = asyncio.ensure_future(bus.request(ASKS, "1"))
        await later(it, 1)
        assert isinstance((await asyncio.gather(first, return_exceptions=True))[0], ConnectionLost)
        assert await bus.request(ASKS, "2") == "2"
    assert any(r.exc_info and r.levelno == logging.WARNING for r in caplog.records)


async def asked(it: Lab) -> object:
    """What becomes of a request that has 30 s."""
    request = asyncio.ensure_future(it.bus.request(ASKS, "x", timeout=30))
    await later(it, 31)
    return (await asyncio.gather(request, return_exceptions=True))[0]


@pytest.mark.parametrize("methods", [["receive"], ["settle"], ["receive", "close"]])
async def test_an_inbox_that_falls_silent_is_noticed_and_opened_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, methods: list[str]
) -> None:
    bus = make_bus()

    def hang_once(name: str) -> None:
        whole, first = getattr(SpySubscription, name), iter([True])

        async def hang(self: SpySubscription, *args: Any, **more: Any) -> Any:
            if isinstance(self.address, Inbox) and next(first, False):
                await asyncio.Event().wait()
            return await whole(self, *args, **more)

        monkeypatch.setattr(SpySubscription, name, hang)

    for name in methods:
        hang_once(name)

    @bus.responder(ASKS)
    async def answer(body: str) -> str:
        return body

    async with lab(bus) as it:
        assert (await asked(it) == "x") is (methods == ["settle"])  # the reply came, and could not be settled
        await later(it, 1)
        await later(it, 36 if "close" in methods else 6)
        assert bus.counts["resubscribed"] == 1
        assert (await bus.health()).status == "ok"
        assert await asked(it) == "x"
    assert [r for r in caplog.records if "the inbox failed: nothing is received from it" in r.getMessage()]


async def test_an_inbox_that_stays_silent_is_told_and_may_be_the_links_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    bus = make_bus()
    whole, hangs = SpySubscription.receive, True

    async def receive(self: SpySubscription, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        if hangs and isinstance(self.address, Inbox):
            await asyncio.Event().wait()
        return await whole(self, limit, timeout)

    monkeypatch.setattr(SpySubscription, "receive", receive)

    @bus.responder(ASKS)
    async def answer(body: str) -> str:
        return body

    async with lab(bus) as it:
        await asked(it)
        assert bus.counts.get("reconnected", 0) == 0
        for _ in range(5):
            await later(it, 30)
            health = await bus.health()
            assert (health.status, health.reasons) == (
                "degraded",
                ("the inbox for replies: nothing is received from it: a receive has not returned for 30 s",),
            )
        assert bus.counts["reconnected"] > 0
        hangs = False
        await later(it, 40)
        assert (await bus.health()).status == "ok"
        assert await asked(it) == "x"


async def test_an_inbox_that_can_not_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    bus = make_bus()
    whole, refused = Spy.subscribe, True

    async def subscribe(self: Spy, source: Source) -> MemorySubscription:
        if refused and isinstance(source.address, Inbox):
            raise Timeout("no answer from the broker")
        return await whole(self, source)

    monkeypatch.setattr(Spy, "subscribe", subscribe)

    @bus.responder(ASKS)
    async def answer(body: str) -> str:
        return body

    async with lab(bus) as it:
        assert (await bus.health()).status == "ok"  # nobody has asked for an inbox
        assert isinstance(await asked(it), ConnectionLost)
        assert (await bus.health()).reasons == ("the inbox for replies: no answer from the broker",)
        refused = False
        await later(it, 3)
        assert await asked(it) == "x"
        assert (await bus.health()).status == "ok"
