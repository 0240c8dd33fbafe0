"""Running handlers: slots, timeouts, threads, batches, what a handler may raise, context, drain."""

import asyncio
import contextlib
import contextvars
import logging
import threading
from typing import Annotated, Any

import pytest
from tests.unit.core_lab import (
    DONE,
    EVENTS,
    ORDERED,
    ORDERS,
    SpySubscription,
    lab,
    later,
    make_bus,
    spy_of,
    turns,
    until,
)

from unibus import (
    BatchFailed,
    Bus,
    Closed,
    DeadLetter,
    Delivery,
    Discard,
    Header,
    LeaseLost,
    Message,
    Queue,
    Retry,
    RetryPolicy,
)
from unibus.adapter import Outcome
from unibus.clock import Deadline
from unibus.memory_subscription import MemorySubscription
from unibus.message import ERROR_TYPE, ORIGINAL_ERROR, RETRY_COUNT
from unibus.session import WIND_UP
from unibus.testing import Lab

ONCE = RetryPolicy(max_retries=0)
TWICE = RetryPolicy(max_retries=1, backoff=1)


class Custom(BaseException):
    """What no `except Exception` catches."""


# What a handler may raise


@pytest.mark.parametrize("kind", [ValueError, SystemExit, asyncio.CancelledError, Custom, GeneratorExit, StopIteration])
@pytest.mark.parametrize("plain", [False, True])
async def test_whatever_a_handler_raises_is_a_failed_attempt(kind: type[BaseException], plain: bool) -> None:
    bus = make_bus()
    runs: list[int] = []

    def fail(body: str, delivery: Delivery[str]) -> None:
        runs.append(delivery.attempt)
        raise kind("on purpose")

    async def fail_async(body: str, delivery: Delivery[str]) -> None:
        fail(body, delivery)

    bus.consumer(ORDERS, retry=TWICE, concurrency=1)(fail if plain else fail_async)
    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await it.idle()
        await it.advance(1)
        await it.idle()
        assert runs == [1, 2]
        [dead] = it.dead_letters(ORDERS)
        assert dead.headers[RETRY_COUNT] == "2"
        if kind is not StopIteration:  # a coroutine and a future turn that one into a RuntimeError
            assert dead.headers[ERROR_TYPE].endswith(kind.__qualname__)
        await bus.send(ORDERS, "y")
        await it.idle()
        assert runs == [1, 2, 1]  # the slot lives


def test_a_keyboard_interrupt_ends_the_loop_and_gives_the_message_back() -> None:
    bus = make_bus()
    waiting: list[int] = []

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        async with lab(bus) as it:
            began = it.clock.monotonic()
            try:
                await bus.send(ORDERS, "x")
                await asyncio.Event().wait()
            finally:
                broker, clock = it.broker, it.clock
                await bus.close()
                waiting.append(len(broker.waiting(ORDERS)))
                assert clock.monotonic() == began  # no drain that waits for a slot that has ended

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert waiting == [1]


async def test_the_words_for_fates() -> None:
    bus = make_bus()
    runs: list[str] = []

    @bus.consumer(ORDERS, retry=RetryPolicy(max_retries=3, backoff=5))
    async def handle(body: str, delivery: Delivery[str]) -> None:
        runs.append(f"{body}{delivery.attempt}")
        if body == "retry" and delivery.attempt == 1:
            raise Retry("bank is closed", delay=60)
        if body == "dead":
            raise DeadLetter("negative total")
        if body == "discard":
            raise Discard("nothing to pay")

    async with lab(bus) as it:
        for body in ("retry", "dead", "discard"):
            await bus.send(ORDERS, body)
        await later(it, 59)
        assert runs == ["retry1", "dead1", "discard1"]
        await later(it, 1)
        assert runs[3:] == ["retry2"]
        [dead] = it.dead_letters(ORDERS)
        assert (dead.body, dead.headers[ORIGINAL_ERROR]) == ("dead", "negative total")
        assert {k: bus.counts[k] for k in ("handled", "retried", "dead_lettered", "discarded")} == {
            "handled": 1,
            "retried": 1,
            "dead_lettered": 1,
            "discarded": 1,
        }


async def test_a_discard_counts_whatever_its_reason() -> None:
    """Also where the user's word is one of ours: `expired` is what the core calls a request that nobody waits for."""
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        if body == "raised":
            raise Discard("expired")
        await delivery.discard("expired")

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["raised", "settled"])
        await it.idle()
        assert bus.counts_of(ORDERS)["discarded"] == 2


# Timeouts


async def test_a_timeout_is_a_failed_attempt_and_says_whose() -> None:
    bus = make_bus()
    runs: list[int] = []

    @bus.consumer(ORDERS, timeout=10, retry=TWICE)
    async def slow(body: str, delivery: Delivery[str]) -> None:
        runs.append(delivery.attempt)
        await asyncio.Event().wait()

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await later(it, 9.5)
        assert bus.counts.get("retried", 0) == 0
        await later(it, 1.5)
        assert runs == [1, 2]
        await later(it, 10)
        [dead] = it.dead_letters(ORDERS)
        assert dead.headers[ERROR_TYPE] == "unibus.consumer.HandlerTimeout"
        assert "slow" in dead.headers[ORIGINAL_ERROR]
        assert "10 s" in dead.headers[ORIGINAL_ERROR]


async def test_each_run_has_its_own_deadline() -> None:
    bus = make_bus()
    cut: list[tuple[str, float]] = []

    @bus.consumer(ORDERS, timeout=10, retry=ONCE)
    async def slow(body: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cut.append((body, it.clock.monotonic() - began))

    async with lab(bus) as it:
        began = it.clock.monotonic()
        for n in range(3):
            await bus.send(ORDERS, str(n))
            await later(it, 2)
        await later(it, 20)
        assert cut == [("0", 10), ("1", 12), ("2", 14)]


async def test_a_handler_that_ends_well_in_spite_of_its_timeout_has_succeeded() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS, timeout=1, concurrency=1)
    async def stubborn(body: str) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    async with lab(bus) as it:
        for _ in range(2):  # and its slot is as good as new
            await bus.send(ORDERS, "x")
            await later(it, 1)
        assert bus.counts["handled"] == 2


async def test_a_timeout_of_the_handlers_own_is_its_own() -> None:
    bus = make_bus()
    seen: list[str] = []

    @bus.consumer(ORDERS, timeout=60)
    async def handle(body: str) -> None:
        try:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        except TimeoutError:
            seen.append("inner")

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await it.idle()
        assert seen == ["inner"]
        assert bus.counts["handled"] == 1


async def test_timeout_zero_is_none() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS, timeout=0)
    async def slow(body: str) -> None:
        await go.wait()

    go = asyncio.Event()
    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await later(it, 2000)
        go.set()
        await it.idle()
        assert bus.counts["handled"] == 1


# Threads


async def test_a_plain_function_runs_in_a_thread_with_its_correlation() -> None:
    bus = make_bus()
    var: contextvars.ContextVar[str] = contextvars.ContextVar("var", default="unset")
    seen: list[tuple[bool, str]] = []
    main = threading.current_thread()

    @bus.consumer(ORDERS)
    def handle(body: str, delivery: Delivery[str]) -> None:
        with bus.blocking() as sender:
            sender.send(DONE, body + "!")
        seen.append((threading.current_thread() is main, var.get()))
        var.set("dirty")

    var.set("outside")
    async with lab(bus) as it:
        id = await bus.send(ORDERS, "x", headers={"h": "1"})
        await it.idle()
        await bus.send(ORDERS, "y")
        await it.idle()
        assert seen == [(False, "outside"), (False, "outside")]
        first = it.broker.waiting(DONE)[0]
        assert (first.correlation_id, first.causation_id) == (id, id)


async def test_plain_functions_run_side_by_side_up_to_the_concurrency() -> None:
    bus = make_bus()
    barrier = threading.Barrier(3, timeout=60)
    most: list[int] = []
    running = 0
    lock = threading.Lock()

    @bus.consumer(ORDERS, concurrency=3)
    def handle(body: str) -> None:
        nonlocal running
        with lock:
            running += 1
            most.append(running)
        barrier.wait()
        with lock:
            running -= 1

    async with lab(bus) as it:
        await bus.send_many(ORDERS, [str(n) for n in range(9)])
        await it.idle()
        assert len(most) == 9
        assert max(most) == 3


async def test_a_thread_beyond_its_timeout_is_said_once_and_keeps_its_slot(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()
    go, began = threading.Event(), threading.Event()
    runs: list[str] = []

    @bus.consumer(ORDERS, concurrency=1, timeout=5)
    def handle(body: str) -> None:
        runs.append(body)
        began.set()
        go.wait(60)

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["1", "2"])
        await until(began.is_set)
        for _ in range(5):
            await later(it, 5)
        assert runs == ["1"]
        assert bus.counts["overdue"] == 1
        assert len([r for r in caplog.records if "can't be stopped" in r.message]) == 1
        go.set()
        await it.idle()
        assert runs == ["1", "2"]
        assert bus.counts["handled"] == 2  # it has ended after all


async def test_a_plain_function_that_returns_an_awaitable_fails() -> None:
    bus = make_bus()

    async def inner() -> None: ...

    @bus.consumer(ORDERS, retry=ONCE)
    def handle(body: str):  # type: ignore[no-untyped-def]  # noqa: ANN202  # nothing that gives it away at start
        return inner()

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await it.idle()
        assert "make it async def" in it.dead_letters(ORDERS)[0].headers[ORIGINAL_ERROR]


async def test_a_thread_that_never_ends_does_not_keep_the_bus_open() -> None:
    bus = make_bus()
    go, began = threading.Event(), threading.Event()

    @bus.consumer(ORDERS)
    def handle(body: str) -> None:
        began.set()
        go.wait(60)

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await until(began.is_set)
        broker = it.broker
    assert [m.body for m in broker.waiting(ORDERS)] == [b"x"]  # it goes back
    go.set()


async def test_a_handler_that_never_waits_lets_others_take_their_turn() -> None:
    bus = make_bus()
    handled = 0

    @bus.consumer(ORDERS, concurrency=1, prefetch=1000)
    async def handle(body: str) -> None:
        nonlocal handled
        handled += 1

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["x"] * 1000)
        seen = set()
        while handled < 1000:
            await asyncio.sleep(0)
            seen.add(handled)
        await it.idle()
        assert len(seen) > 10  # not all of them in one turn of the loop
        assert len(spy_of(bus).settled) > 5  # what is handled is settled meanwhile


# Batches


async def test_a_batch_is_a_list_settled_one_by_one() -> None:
    bus = make_bus()
    seen: list[list[str]] = []

    @bus.consumer(ORDERS, batch=4, concurrency=1, prefetch=10, retry=TWICE)
    async def handle(bodies: list[str], deliveries: list[Delivery[str]]) -> None:
        seen.append(bodies)
        failed = {i: ValueError(b) for i, b in enumerate(bodies) if b == "bad" and deliveries[i].attempt == 1}
        if failed:
            raise BatchFailed(failed)

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["1", "bad", "3", "4", "5"])
        await it.idle()
        assert seen == [["1", "bad", "3", "4"], ["5"]]
        assert (bus.counts["handled"], bus.counts["retried"]) == (4, 1)
        await later(it, 1)
        assert seen[2:] == [["bad"]]
        assert bus.counts["handled"] == 5


async def test_what_can_not_be_decoded_is_not_in_the_batch() -> None:
    bus = make_bus()
    numbers = Queue[int]("numbers", int)
    seen: list[list[int]] = []

    @bus.consumer(numbers, batch=10, concurrency=1)
    async def handle(bodies: list[int]) -> None:
        seen.append(bodies)

    async with lab(bus) as it:
        bodies: list[Any] = [1, Message(b"{"), 3]
        await bus.send_many(numbers, bodies)
        await it.idle()
        assert seen == [[1, 3]]
        assert [m.body for m in it.invalid(numbers)] == [b"{"]
        assert not it.dead_letters(numbers)


@pytest.mark.parametrize("error", [ValueError("all"), BatchFailed({7: ValueError("stray")})])
async def test_an_error_without_a_place_in_the_batch_fails_all_of_it(error: Exception) -> None:
    bus = make_bus()

    @bus.consumer(ORDERS, batch=3, concurrency=1, retry=ONCE)
    async def handle(bodies: list[str]) -> None:
        raise error

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["1", "2", "3"])
        await it.idle()
        assert [m.body for m in it.dead_letters(ORDERS)] == ["1", "2", "3"]


async def test_a_plain_function_takes_batches_too() -> None:
    bus = make_bus()
    seen: list[list[str]] = []

    @bus.consumer(ORDERS, batch=3, concurrency=1)
    def handle(bodies: list[str]) -> None:
        seen.append(bodies)

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["1", "2", "3"])
        await it.idle()
        assert seen == [["1", "2", "3"]]
        assert bus.counts["handled"] == 3


# Context


@pytest.mark.parametrize("batch", [0, 1])
async def test_a_context_variable_does_not_reach_the_next_message(batch: int) -> None:
    bus = make_bus()
    var: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="none")
    seen: list[str] = []

    async def handle(body: Any) -> None:
        seen.append(var.get())
        var.set("mine")
        if len(seen) == 2:
            raise Discard

    bus.consumer(ORDERS, concurrency=1, batch=batch)(handle)
    async with lab(bus) as it:
        for _ in range(4):
            await bus.send(ORDERS, "x")
        await it.idle()
        assert seen == ["none"] * 4


async def test_a_message_sent_by_a_task_of_the_handler_belongs_to_the_conversation() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        await asyncio.create_task(publish())

    async def publish() -> None:
        await bus.send(DONE, "x")

    async with lab(bus) as it:
        id = await bus.send(ORDERS, Message("x", correlation_id="conversation"))
        await it.idle()
        [message] = it.broker.waiting(DONE)
        assert (message.correlation_id, message.causation_id) == ("conversation", id)
        await bus.send(DONE, "edge")
        assert it.broker.waiting(DONE)[1].correlation_id is None


# Settled by hand


async def test_the_first_verdict_counts(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        await delivery.ack()
        await delivery.dead_letter("too late")
        raise ValueError("after the ack")

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await it.idle()
        assert not it.dead_letters(ORDERS)
        assert bus.counts.get("retried", 0) == 0
        assert (await bus.backlog(ORDERS)).in_flight == 0
    [record] = [r for r in caplog.records if "after the ack" in r.message]
    assert record.levelno == logging.ERROR


@pytest.mark.parametrize("queue", [ORDERS, ORDERED])
@pytest.mark.parametrize("delay", [0, 5])
async def test_a_retry_by_hand_is_a_retry_whatever_the_handler_does_then(queue: Queue[str], delay: float) -> None:
    bus = make_bus()
    runs: list[tuple[int, float]] = []
    at_once: list[int] = []

    @bus.consumer(queue)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        at_once.append(1)
        assert len(at_once) == 1
        runs.append((delivery.attempt, it.clock.monotonic() - began))
        if len(runs) < 3:
            await delivery.retry("not yet", delay=delay)
        await turns(3)
        at_once.pop()

    async with lab(bus) as it:
        began = it.clock.monotonic()
        await bus.send(queue, "x", key="k")
        await later(it, 20)
        assert runs == [(1, 0), (2, delay), (3, 2 * delay)]
        assert bus.counts["handled"] == 1
        assert not it.dead_letters(queue)
        assert (await bus.backlog(queue)).in_flight == 0


async def test_a_release_by_hand_does_not_count() -> None:
    bus = make_bus()
    runs: list[int] = []

    @bus.consumer(ORDERS, concurrency=1)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        runs.append(delivery.attempt)
        if len(runs) < 8:
            await delivery.release()

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await it.idle()
        assert runs == [1] * 8


async def test_each_word_by_hand() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        await getattr(delivery, body)()

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["ack", "dead_letter", "discard"])
        await it.idle()
        assert [m.body for m in it.dead_letters(ORDERS)] == ["dead_letter"]
        assert (bus.counts["handled"], bus.counts["discarded"]) == (1, 1)


async def test_a_late_ack_by_hand_is_told() -> None:
    bus = make_bus()
    told: list[BaseException] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS, concurrency=1)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        if delivery.deliveries != 1:
            return
        await go.wait()
        try:
            await delivery.ack()
        except LeaseLost as error:
            told.append(error)

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await turns()
        it.broker.cut()
        await later(it, 1)
        go.set()
        await it.idle()
        assert len(told) == 1
        assert bus.counts["handled"] == 1  # the second delivery
        assert (await bus.health()).status == "ok"


async def test_headers_are_read_only_and_edits_of_a_copy_do_not_travel() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS, retry=ONCE)
    async def handle(body: str, message: Message) -> None:
        headers: Any = message.headers
        with pytest.raises(TypeError):
            headers["h"] = "changed"
        raise ValueError("now look at the dead letter")

    async with lab(bus) as it:
        await bus.send(ORDERS, "x", headers={"h": "v"})
        await it.idle()
        assert it.dead_letters(ORDERS)[0].headers["h"] == "v"


async def test_a_missing_header_makes_the_message_invalid() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str, tenant: Annotated[int, Header("tenant")]) -> None:
        raise AssertionError("it must not run")

    async with lab(bus) as it:
        await bus.send(ORDERS, "1")
        await bus.send(ORDERS, "2", headers={"tenant": "no number"})
        await it.idle()
        assert [m.body for m in it.invalid(ORDERS)] == ["1", "2"]
        assert [m.headers[RETRY_COUNT] for m in it.invalid(ORDERS)] == ["0", "0"]


# Drain


async def test_a_drain_lets_what_runs_finish_and_gives_the_rest_back() -> None:
    bus = make_bus()
    go = asyncio.Event()
    done: list[str] = []

    @bus.consumer(ORDERS, concurrency=2, prefetch=10)
    async def handle(body: str) -> None:
        await go.wait()
        done.append(body)

    async with lab(bus) as it:
        await bus.send_many(ORDERS, [str(n) for n in range(6)])
        await turns()
        spy, broker = spy_of(bus), it.broker
        closing = asyncio.ensure_future(bus.close())
        await turns()
        assert [o for o, _ in spy.settled] == [Outcome.RELEASED]
        go.set()
        await closing
    assert done == ["0", "1"]
    assert [m.body.decode() for m in broker.waiting(ORDERS)] == ["2", "3", "4", "5"]


async def test_nothing_begins_while_the_driver_takes_its_time_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """On SQS a long poll has to end first; the handler that runs may end before it."""
    bus, begun = make_bus(), list[str]()
    finish, stopping, stopped = asyncio.Event(), asyncio.Event(), asyncio.Event()
    honest = MemorySubscription.stop

    async def stop(self: MemorySubscription) -> None:
        stopping.set()
        await stopped.wait()
        await honest(self)

    monkeypatch.setattr(MemorySubscription, "stop", stop)

    @bus.consumer(ORDERS, concurrency=1)
    async def handle(body: str) -> None:
        begun.append(body)
        await finish.wait()

    async with lab(bus) as it:
        broker = it.broker
        for body in ("first", "second"):
            await bus.send(ORDERS, body)
        await until(lambda: begun, "the first begins")
        closing = asyncio.create_task(bus.close())
        await stopping.wait()
        finish.set()
        await turns()
        stopped.set()
        await closing
    assert begun == ["first"]
    assert [m.body.decode() for m in broker.waiting(ORDERS)] == ["second"]


@pytest.mark.parametrize("hangs", ["settle", "move", "send", "stop", "unsubscribe", "close"])
async def test_a_broker_that_does_not_answer_does_not_keep_the_process(hangs: str) -> None:
    """All is over 3 s after the handlers' time: before Kubernetes kills, which makes crashes of all that is held."""
    bus = make_bus(shutdown_timeout=5)

    @bus.consumer(ORDERS, concurrency=2, retry=RetryPolicy(max_retries=0))
    async def handle(body: str) -> None:
        if body == "bad":
            raise ValueError
        await asyncio.Event().wait()

    async with lab(bus) as it:
        await bus.send(ORDERS, "long")
        await turns()
        spy = spy_of(bus)
        spy.hanging.add(hangs)
        sending = asyncio.ensure_future(bus.send(ORDERS, "bad"))
        await turns()
        closing = asyncio.ensure_future(bus.close())
        await later(it, 4.9)
        assert not closing.done(), "the handler has its time"
        await later(it, 5 + WIND_UP + 4 * Deadline.LEAST - 4.9)
        assert closing.done()
        await closing
        if hangs == "send":
            with pytest.raises(Closed):
                await sending
        else:
            await sending
        spy.hanging.clear()
        await spy.close()


async def test_a_broker_that_does_not_settle_first_does_not_keep_the_process(caplog: pytest.LogCaptureFixture) -> None:
    bus, ran = make_bus(shutdown_timeout=5), list[str]()

    @bus.consumer(ORDERS, guarantee="at-most-once")
    async def handle(body: str) -> None:
        ran.append(body)

    async with lab(bus) as it:
        await turns()
        spy = spy_of(bus)
        spy.hanging.add("settle")
        await bus.send(ORDERS, "x")
        await turns()
        closing = asyncio.ensure_future(bus.close())
        await later(it, 5 + WIND_UP + 4 * Deadline.LEAST)
        assert closing.done()
        await closing
        spy.hanging.clear()
        await spy.close()
    assert ran == []
    assert "1 deliveries not settled by the end of the drain; they come again or, at most once, never" in caplog.text


async def test_the_end_of_a_drain_cuts_what_still_runs_and_gives_it_back() -> None:
    bus = make_bus(shutdown_timeout=3)

    cut: list[float] = []

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cut.append(it.clock.monotonic() - began)

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await turns()
        broker, began = it.broker, it.clock.monotonic()
    assert cut == [3]
    assert [m.body for m in broker.waiting(ORDERS)] == [b"x"]


async def test_what_the_driver_takes_to_stop_is_part_of_the_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    bus = make_bus(shutdown_timeout=25)
    begun, ended = asyncio.Event(), list[float]()
    whole = SpySubscription.stop

    async def stop(self: SpySubscription) -> None:
        await self.spy.broker.clock.sleep(20)
        await whole(self)

    monkeypatch.setattr(SpySubscription, "stop", stop)

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(clock.monotonic())

    async with lab(bus) as it:
        clock = it.clock
        await bus.send(ORDERS, "x")
        await begun.wait()
        before = clock.monotonic()
    assert ended == [before + 25]


async def test_a_handler_that_settles_during_the_drain_is_heard() -> None:
    bus = make_bus()
    go = asyncio.Event()

    @bus.consumer(ORDERS, retry=RetryPolicy(max_retries=3, backoff=60))
    async def handle(body: str) -> None:
        await go.wait()
        if body == "bad":
            raise ValueError
        await bus.send(DONE, body)

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["good", "bad"])
        await turns()
        broker = it.broker
        closing = asyncio.ensure_future(bus.close())
        await turns()
        go.set()
        await closing
    assert [m.body for m in broker.waiting(DONE)] == [b"good"]
    assert (broker.waiting(ORDERS), broker.delayed()) == ([], 1)  # its retry waits on the broker


async def test_two_closes_at_once_both_wait_for_the_drain() -> None:
    bus = make_bus()
    go = asyncio.Event()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        await go.wait()

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await turns()
        broker = it.broker
        closes = [asyncio.ensure_future(bus.close()) for _ in range(2)]
        await turns(50)
        assert not any(c.done() for c in closes)
        go.set()
        await asyncio.gather(*closes)
    assert broker.waiting(ORDERS) == []  # acked, not given back


async def test_a_cancelled_drain_leaves_no_task_behind() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        await asyncio.Event().wait()

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await turns()
        broker = it.broker
        closing = asyncio.ensure_future(bus.close())
        await turns()
        closing.cancel()
        await asyncio.wait([closing])
    assert [m.body for m in broker.waiting(ORDERS)] == [b"x"]


async def test_a_handler_that_will_not_be_cancelled_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus(shutdown_timeout=1)
    go = asyncio.Event()

    @bus.consumer(ORDERS)
    async def stubborn(body: str) -> None:
        while not go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go.wait()

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await turns()
        broker = it.broker
        await asyncio.wait_for(run_out(bus, it), 5)
        assert [m.body for m in broker.waiting(ORDERS)] == [b"x"]
        go.set()
        await turns()
    assert any("left behind" in r.message for r in caplog.records)


async def run_out(bus: Bus, it: Lab) -> None:
    """Close, with time passing."""
    closing = asyncio.ensure_future(bus.close())
    await later(it, 2)
    await closing


# At most once


async def test_at_most_once_settles_first_and_never_retries(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()
    waiting: list[int] = []

    @bus.consumer(ORDERS, guarantee="at-most-once", retry=TWICE)
    async def handle(body: str) -> None:
        waiting.append(it.broker.in_flight() + len(it.broker.waiting(ORDERS)))
        raise ValueError("lost for good")

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await later(it, 100)
        assert waiting == [0]
        assert not it.dead_letters(ORDERS)
        assert bus.counts["discarded"] == 1
    assert any("lost for good" in r.message and r.levelno == logging.ERROR for r in caplog.records)


async def test_at_most_once_does_not_run_what_could_not_be_settled() -> None:
    bus = make_bus()
    runs: list[int | None] = []

    @bus.consumer(ORDERS, guarantee="at-most-once")
    async def handle(body: str, delivery: Delivery[str]) -> None:
        runs.append(delivery.deliveries)

    async with lab(bus) as it:
        spy_of(bus).faults["settle"].append(KeyError("a broken adapter"))
        await bus.send(ORDERS, "x")
        await turns()
        assert runs == []
        await later(it, 31)
        assert runs == [2]


async def test_a_drain_runs_what_was_settled_first() -> None:
    bus = make_bus()
    done: list[str] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS, guarantee="at-most-once", concurrency=1, prefetch=5)
    async def handle(body: str) -> None:
        await go.wait()
        done.append(body)

    async with lab(bus) as it:
        await bus.send_many(ORDERS, [str(n) for n in range(8)])
        await turns()
        broker = it.broker
        closing = asyncio.ensure_future(bus.close())
        await turns()
        go.set()
        await closing
        left = [m.body.decode() for m in broker.waiting(ORDERS)]
    assert sorted(done + left) == [str(n) for n in range(8)]
    assert len(done) == 5


async def test_what_was_settled_first_and_never_ran_is_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus(shutdown_timeout=2)

    @bus.consumer(ORDERS, guarantee="at-most-once", concurrency=1, prefetch=4)
    async def handle(body: str) -> None:
        await asyncio.Event().wait()

    async with lab(bus):
        await bus.send_many(ORDERS, ["1", "2", "3", "4"])
        await turns()
        counts = bus._opened().kit.counts
    assert counts.totals()["discarded"] == 4
    assert len([r for r in caplog.records if "at most once" in r.message and r.levelno == logging.ERROR]) == 4


# Layers


async def test_layers_wrap_each_message_outermost_first() -> None:
    trace: list[str] = []

    def layer(name: str) -> Any:
        def wrap(inner: Any) -> Any:
            async def handling(delivery: Delivery[Any]) -> None:
                trace.append(f"{name}({delivery.body}")
                try:
                    await inner(delivery)
                finally:
                    trace.append(f"{name})")

            return handling

        return wrap

    bus = make_bus(layers=[layer("a"), layer("b")])

    @bus.consumer(ORDERS, concurrency=1)
    async def handle(body: str) -> None:
        trace.append("handler")

    @bus.subscriber(EVENTS)
    def plain(body: str) -> None:
        trace.append("plain")

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await it.idle()
        await bus.publish(EVENTS, "y")
        await it.idle()
    assert trace == ["a(x", "b(x", "handler", "b)", "a)", "a(y", "b(y", "plain", "b)", "a)"]


async def test_a_layer_can_decide_and_can_fail() -> None:
    def layer(inner: Any) -> Any:
        async def handling(delivery: Delivery[Any]) -> None:
            if delivery.body == "stop":
                raise DeadLetter("not for us")
            if delivery.body != "skip":
                await inner(delivery)

        return handling

    bus = make_bus(layers=[layer])
    seen: list[str] = []

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        seen.append(body)

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["stop", "skip", "go"])
        await it.idle()
        assert seen == ["go"]
        assert [m.body for m in it.dead_letters(ORDERS)] == ["stop"]
        assert bus.counts["handled"] == 2
