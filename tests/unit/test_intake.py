"""Receiving: how much is held, order by key, parking, retries as copies, expiry, invalid messages, the crash guard."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from tests.unit.core_lab import (
    EVENTS,
    LATER,
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
    ConnectionLost,
    DeadLetter,
    Delivery,
    Message,
    Queue,
    Refused,
    RetryPolicy,
    Throttled,
    Timeout,
    Topic,
    TransportError,
)
from unibus.channel import Group, dead_letter_queue
from unibus.deadletter import stamp
from unibus.message import (
    CRASH_COUNT,
    DLQ_REASON,
    ERROR_STACK_DIGEST,
    ERROR_TYPE,
    FIRST_FAILED_AT,
    LAST_FAILED_AT,
    MOVED_TO_DLQ_AT,
    ORIGINAL_DESTINATION,
    ORIGINAL_ERROR,
    ORIGINAL_SUBSCRIPTION,
    RETRY_COUNT,
)

DICE = random.Random(7)  # noqa: S311  # the order of tasks is no secret
URGENT = Queue[str]("urgent", str, priorities=3)


@pytest.mark.parametrize("receivers", [1, 4])
async def test_no_more_is_held_than_the_prefetch(receivers: int) -> None:
    bus = make_bus()
    most = 0
    handled = 0

    @bus.consumer(ORDERS, concurrency=3, prefetch=7)
    async def handle(body: str) -> None:
        nonlocal most, handled
        most = max(most, it.broker.in_flight())
        handled += 1
        await turns(DICE.randrange(5))

    async with lab(bus, receivers=receivers, receive_batch=2) as it:
        await bus.send_many(ORDERS, ["x"] * 200)
        await until(lambda: handled == 200)
        assert 3 <= most <= 7


async def test_a_key_keeps_its_order_and_keys_run_side_by_side() -> None:
    bus = make_bus()
    seen: dict[str, list[int]] = {}
    running: list[str] = []
    together: set[int] = set()

    @bus.consumer(ORDERED, concurrency=8)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        key = delivery.message.key or ""
        assert key not in running
        running.append(key)
        together.add(len(running))
        await turns(DICE.randrange(4))
        seen.setdefault(key, []).append(int(body))
        running.remove(key)

    async with lab(bus) as it:
        bodies = [str(n) for n in range(100)]
        await bus.send_many(ORDERED, bodies, key=lambda body: str(int(body) % 5))
        await it.idle()
        assert {key: sorted(ns) for key, ns in seen.items()} == seen
        assert sum(map(len, seen.values())) == 100
        assert max(together) > 1


async def test_while_the_head_of_a_key_is_parked_the_others_go_on() -> None:
    bus = make_bus()
    seen: list[str] = []

    @bus.consumer(ORDERED, retry=RetryPolicy(max_retries=2, backoff=10, multiplier=1))
    async def handle(body: str, delivery: Delivery[str]) -> None:
        seen.append(f"{body}{delivery.attempt}")
        if body == "a0" and delivery.attempt < 3:
            raise ValueError

    async with lab(bus) as it:
        await bus.send_many(ORDERED, ["a0", "a1", "b0", "b1"], key=lambda body: body[0])
        await turns(50)
        assert seen == ["a01", "b01", "b11"]
        await later(it, 10)
        assert seen[3:] == ["a02"]
        await later(it, 10)
        assert seen[4:] == ["a03", "a11"]
        assert it.broker.in_flight() == 0


async def test_a_dead_head_lets_its_key_go_on_once_it_is_safe() -> None:
    bus = make_bus()
    seen: list[str] = []

    @bus.consumer(ORDERED)
    async def handle(body: str) -> None:
        if body == "0":
            raise DeadLetter("no")
        seen.append(body)

    async with lab(bus) as it:
        it.broker.refuse(dead_letter_queue(ORDERED), Refused("not now"))
        await bus.send_many(ORDERED, ["0", "1"], key=lambda _: "k")
        await later(it, 3)
        assert seen == []
        it.broker.refuse(dead_letter_queue(ORDERED), None)
        await later(it, 11)
        assert seen == ["1"]
        assert [m.body for m in it.dead_letters(ORDERED)] == ["0"]


async def test_a_lost_neighbour_does_not_shorten_what_is_parked() -> None:
    bus = make_bus()
    runs: list[tuple[str, float]] = []

    @bus.consumer(ORDERED, retry=RetryPolicy(max_retries=1, backoff=20))
    async def handle(body: str) -> None:
        runs.append((body, it.clock.monotonic() - began))
        raise ValueError

    async with lab(bus) as it:
        began = it.clock.monotonic()
        await bus.send(ORDERED, "parked", key="a")
        await turns()
        [intake] = bus._opened().intakes
        await intake._losing([], 0)
        assert runs == [("parked", 0)]
        await later(it, 19)
        assert len(runs) == 1
        await later(it, 1)
        assert runs[1:] == [("parked", 20)]


async def test_what_is_lost_while_it_waits_is_not_run() -> None:
    bus = make_bus()
    runs: list[str] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS, concurrency=1, prefetch=4)
    async def handle(body: str) -> None:
        runs.append(body)
        await go.wait()

    async with lab(bus):
        await bus.send_many(ORDERS, ["0", "1", "2", "3"])
        await turns()
        [intake] = bus._opened().intakes
        [first, second, third, fourth] = intake.holding
        await intake._losing([second, fourth], 0)
        assert list(intake.lanes.ready) == [third]
        assert list(intake.holding) == [first, third]
        assert (first.lost, second.lost, third.lost, fourth.lost) == (False, True, False, True)
        go.set()
        await until(lambda: len(runs) == 2)
        assert runs == ["0", "2"]


@pytest.mark.parametrize("queue", [ORDERS, ORDERED])
async def test_nothing_that_waits_is_begun_once_its_link_is_lost(queue: Queue[str]) -> None:
    bus = make_bus()
    begun: list[tuple[str, int]] = []  # with the number of the link

    @bus.consumer(queue, concurrency=1, prefetch=10)
    async def handle(body: str) -> None:
        begun.append((body, spy_of(bus).calls["connect"]))
        if len(begun) == 1:
            link = bus._opened().kit.link
            link.lost(link.epoch, ConnectionLost("the cable"))

    async with lab(bus) as it:
        await bus.send_many(queue, ["1", "2", "3"], key=lambda _: "k")
        await later(it, 10)
        await it.idle()
        assert [body for body, link in begun if link == 1] == ["1"]
        assert sorted(body for body, link in begun if link == 2) == ["1", "2", "3"]
        assert spy_of(bus).calls["connect"] == 2  # a settlement by the old link says nothing of the new one


async def test_what_arrives_as_its_link_is_lost_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another subscription has found the link lost. What waited is dropped; in order, what comes after it would overtake it."""
    bus = make_bus()
    begun: list[str] = []
    whole = SpySubscription.receive

    async def receive(self: SpySubscription, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        deliveries = await whole(self, limit, timeout)
        if deliveries and self.spy.calls["connect"] == 1:
            link = bus._opened().kit.link
            link.lost(link.epoch, ConnectionLost("the cable"))
        return deliveries

    monkeypatch.setattr(SpySubscription, "receive", receive)

    @bus.consumer(ORDERED)
    async def handle(body: str) -> None:
        begun.append(body)

    async with lab(bus) as it:
        await bus.send(ORDERED, "x", key="k")
        await later(it, 10)
        await it.idle()
        assert spy_of(bus).calls["connect"] == 2
        assert begun == ["x"], "it came again by the new link"


async def test_losing_waits_for_what_runs() -> None:
    bus = make_bus()
    go = asyncio.Event()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        await go.wait()

    async with lab(bus) as it:
        await bus.send(ORDERS, "x")
        await turns()
        [intake] = bus._opened().intakes
        losing = asyncio.ensure_future(intake._losing(list(intake.holding), 10))
        await turns()
        assert not losing.done()
        go.set()
        await losing
        assert bus.counts["handled"] == 1
        assert it.broker.in_flight() == 0


# Retries


async def test_a_retry_is_a_copy_with_the_story_of_its_failure() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS, retry=RetryPolicy(max_retries=1, backoff=5))
    async def handle(body: str) -> None:
        raise ValueError("no\nway amqp://user:secret@host")

    async with lab(bus) as it:
        t0 = it.clock.time()
        copies: list[Message] = []
        it.broker.on_send = lambda out: copies.append(out.message)
        id = await bus.send(ORDERS, "x", key="k", headers={"h": "v"})
        await later(it, 5)
        _, retried, dead = copies
        assert (retried.id, retried.key, retried.body, retried.timestamp) == (id, "k", b"x", t0)
        story = dict(retried.headers)
        digest = story.pop(ERROR_STACK_DIGEST)
        assert story == {
            "h": "v",
            RETRY_COUNT: "1",
            ERROR_TYPE: "ValueError",
            ORIGINAL_ERROR: "no way amqp://****@host",
            FIRST_FAILED_AT: stamp(t0),
            LAST_FAILED_AT: stamp(t0),
        }
        assert dict(dead.headers) == {
            **story,
            ERROR_STACK_DIGEST: digest,
            RETRY_COUNT: "2",
            LAST_FAILED_AT: stamp(t0 + 5),
            MOVED_TO_DLQ_AT: stamp(t0 + 5),
            DLQ_REASON: "retries_exhausted",
            ORIGINAL_DESTINATION: "orders",
            ORIGINAL_SUBSCRIPTION: "orders",
        }


async def test_a_retry_reaches_only_the_group_that_failed() -> None:
    bus = make_bus()
    seen: list[str] = []

    @bus.subscriber(EVENTS, group="a", retry=RetryPolicy(max_retries=1, backoff=1))
    async def first(body: str) -> None:
        seen.append("a")
        raise ValueError

    @bus.subscriber(EVENTS, group="b")
    async def second(body: str) -> None:
        seen.append("b")

    async with lab(bus) as it:
        await bus.publish(EVENTS, "x")
        await later(it, 30)
        assert sorted(seen) == ["a", "a", "b"]
        assert len(it.dead_letters(EVENTS, group="a")) == 1
        assert bus.counts_of(EVENTS, group="b")["handled"] == 1


async def test_waiting_blocks_nobody() -> None:
    bus = make_bus()
    seen: list[str] = []

    @bus.consumer(ORDERS, concurrency=1, prefetch=1, retry=RetryPolicy(max_retries=1, backoff=60))
    async def handle(body: str) -> None:
        seen.append(body)
        if body == "bad":
            raise ValueError

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["bad", "1", "2"])
        await it.idle()
        assert seen == ["bad", "1", "2"]


# Expiry


async def test_an_expired_message_is_not_handled() -> None:
    bus = make_bus()
    seen: list[str] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS, concurrency=1, prefetch=1)
    async def handle(body: str) -> None:
        seen.append(body)
        await go.wait()

    async with lab(bus) as it:
        await bus.send(ORDERS, "1")
        await bus.send(ORDERS, "2", expires_in=10)
        await later(it, 10)
        go.set()
        await it.idle()
        assert seen == ["1"]
        [dead] = it.dead_letters(ORDERS)
        assert (dead.headers[DLQ_REASON], dead.headers[RETRY_COUNT], dead.expires_at) == ("expired", "0", None)
        assert bus.counts["expired"] == 1


@pytest.mark.parametrize("queue", [ORDERS, ORDERED])
async def test_no_retry_beyond_the_expiry(queue: Queue[str]) -> None:
    bus = make_bus()
    runs: list[float] = []

    @bus.consumer(queue, retry=RetryPolicy(max_retries=9, backoff=10, multiplier=1))
    async def handle(body: str) -> None:
        runs.append(it.clock.monotonic())
        raise ValueError("no")

    async with lab(bus) as it:
        await bus.send(queue, "x", key="k", expires_in=25)
        await later(it, 100)
        assert len(runs) == 3
        [dead] = it.dead_letters(queue)
        assert (dead.headers[DLQ_REASON], dead.headers[RETRY_COUNT]) == ("expired", "3")
        assert dead.headers[ORIGINAL_ERROR] == "no"


# Trouble with the dead-letter channel


async def test_without_a_dead_letter_channel_the_message_is_kept_and_intake_pauses() -> None:
    bus = make_bus()
    handled: list[str] = []

    @bus.consumer(ORDERS, concurrency=1, prefetch=1, retry=RetryPolicy(max_retries=0))
    async def handle(body: str) -> None:
        handled.append(body)
        if body == "bad":
            raise ValueError

    async with lab(bus) as it:
        it.broker.refuse(dead_letter_queue(ORDERS), Refused("disk full"))
        await bus.send_many(ORDERS, ["bad", "good"])
        await later(it, 100)
        assert handled == ["bad"]
        health = await bus.health()
        assert health.status == "degraded"
        assert "disk full" in health.reasons[0]
        assert it.broker.in_flight() == 1
        it.broker.refuse(dead_letter_queue(ORDERS), None)
        await later(it, 13)
        await it.idle()
        assert handled == ["bad", "good"]
        assert [m.body for m in it.dead_letters(ORDERS)] == ["bad"]
        assert (await bus.health()).status == "ok"


async def test_a_drain_gives_back_what_the_dead_letter_channel_does_not_take() -> None:
    bus = make_bus()

    @bus.consumer(ORDERS, retry=RetryPolicy(max_retries=0))
    async def handle(body: str) -> None:
        raise ValueError

    async with lab(bus) as it:
        it.broker.refuse(dead_letter_queue(ORDERS), Refused("disk full"))
        await bus.send(ORDERS, "x")
        await later(it, 3)
        broker = it.broker
    assert [m.body for m in broker.waiting(ORDERS)] == [b"x"]


# Invalid messages


async def test_an_undecodable_message_goes_raw_to_its_channel_and_is_not_retried() -> None:
    bus = make_bus()
    numbers = Queue[int]("numbers", int)

    @bus.consumer(numbers)
    async def handle(body: int) -> None:
        raise AssertionError("it must not run")

    async with lab(bus) as it:
        id = await bus.send(numbers, Message(b"{secret", key="k"), headers={"h": "v"})
        await it.idle()
        [invalid] = it.invalid(numbers)
        assert (invalid.id, invalid.body, invalid.key, invalid.headers["h"]) == (id, b"{secret", "k", "v")
        assert (invalid.headers[DLQ_REASON], invalid.headers[RETRY_COUNT]) == ("undecodable", "0")
        assert "secret" not in invalid.headers[ORIGINAL_ERROR]
        assert bus.counts["invalid"] == 1


# Broadcast


async def test_each_process_gets_a_broadcast_and_none_a_backlog() -> None:
    seen: list[str] = []
    buses = [make_bus(url="memory://broadcast", service="s") for _ in range(2)]
    topic = Topic[str]("news", str)

    def subscribe(number: int) -> Any:
        async def handle(body: str) -> None:
            seen.append(f"{number}{body}")

        return handle

    for number, bus in enumerate(buses):
        bus.channels.append(topic)
        bus.subscriber(topic, broadcast=True)(subscribe(number))
    async with buses[0].running():
        await buses[0].publish(topic, "early")
        await until(lambda: seen == ["0early"])
        async with buses[1].running():
            await buses[1].publish(topic, "both")
            await until(lambda: len(seen) == 3)
            assert sorted(seen[1:]) == ["0both", "1both"]
        await buses[0].publish(topic, "late")
        await until(lambda: len(seen) == 4)
    async with buses[0]:
        await buses[0].publish(topic, "nobody")
        assert buses[0].counts["unrouted"] == 1
    async with buses[1].running():
        await turns(50)
    assert seen[3:] == ["0late"]


async def test_a_failing_broadcast_is_retried_in_place_then_counted_and_gone() -> None:
    bus = make_bus()
    runs: list[float] = []

    @bus.subscriber(EVENTS, broadcast=True, retry=RetryPolicy(max_retries=2, backoff=5, multiplier=2))
    async def handle(body: str) -> None:
        runs.append(it.clock.monotonic() - began)
        raise ValueError

    async with lab(bus) as it:
        began = it.clock.monotonic()
        await bus.publish(EVENTS, "x")
        await later(it, 100)
        assert runs == [0, 5, 15]
        assert bus.counts["discarded"] == 1
        assert bus.counts["sent"] == 1  # no copy anywhere
        assert it.broker.in_flight() == 0


# The crash guard


async def test_a_message_that_kills_its_consumers_ends_as_a_crash_loop_and_its_neighbours_live() -> None:
    bus = make_bus()
    handled: list[str] = []
    deaths = 0

    @bus.consumer(ORDERS, concurrency=4, retry=RetryPolicy(max_retries=2))
    async def handle(body: str) -> None:
        nonlocal deaths
        if body == "poison":
            deaths += 1
            for subscription in it.broker.subscriptions:
                it.broker.kill(subscription)
            return  # whatever it says now, nobody hears it
        handled.append(body)

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["0", "poison", *map(str, range(1, 10))])
        await later(it, 900)
        await it.advance(0)
        [dead] = it.dead_letters(ORDERS)
        assert (dead.body, dead.headers[DLQ_REASON]) == ("poison", "crash_loop")
        assert set(handled) == {str(n) for n in range(10)}
        assert dead.headers[CRASH_COUNT] == "3"
        # three deliveries without suspicion, then three alone
        assert deaths == 6
        assert it.broker.waiting(ORDERS) == []
        assert bus.counts["suspected"] >= 1
        await bus.send(ORDERS, "afterwards")
        await later(it, 10)
        assert handled[-1] == "afterwards"


@pytest.mark.parametrize(
    ("queue", "counts", "deliveries", "copies"),
    [(ORDERS, True, 3, 1), (ORDERS, True, 2, 0), (ORDERS, False, 3, 0), (ORDERED, True, 3, 0)],
)
async def test_what_is_given_back_often_goes_as_a_copy_where_the_broker_counts_that(
    queue: Queue[str], counts: bool, deliveries: int, copies: int
) -> None:
    bus = make_bus()
    async with lab(bus, release_counts=counts) as it:
        await bus.send(queue, "x", key="k", headers={"a": "b"})
        async with bus.receiver(queue) as receiver:
            delivery = await receiver.receive(timeout=1)
            assert delivery is not None
            delivery.deliveries = deliveries
            await delivery.release()
        assert spy_of(bus).calls["move"] == copies
        [message] = it.broker.waiting(queue)
        assert (message.id, message.key, dict(message.headers)) == (delivery.message.id, "k", {"a": "b"})


@pytest.mark.parametrize("error", [Throttled("slow down"), Timeout("no answer")])
async def test_a_receive_that_fails_in_passing_costs_nothing_of_what_is_held(error: TransportError) -> None:
    bus = make_bus()
    gate = asyncio.Event()
    done: list[str] = []

    @bus.consumer(ORDERS, concurrency=2)
    async def handle(body: str) -> None:
        await gate.wait()
        done.append(body)

    async with lab(bus) as it:
        await bus.send(ORDERS, "held")
        await until(lambda: it.broker.in_flight() == 1)
        spy = spy_of(bus)
        subscribed = spy.calls["subscribe"]
        spy.faults["receive"].extend([error, error])
        await later(it, 12)
        assert not spy.faults["receive"]
        assert (await bus.health()).status == "ok"
        gate.set()
        await bus.send(ORDERS, "next")
        await until(lambda: bus.counts.get("handled") == 2)
        assert (spy.calls["subscribe"], spy.calls["connect"]) == (subscribed, 1)
    assert done == ["held", "next"]


async def test_a_receive_that_always_fails_is_tried_less_and_less_often_until_one_succeeds() -> None:
    """It was tried ten times a second for ever: a subscribe that succeeded made up for it."""
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        pass

    async with lab(bus) as it:
        spy = spy_of(bus)
        spy.faults["receive"].extend([RuntimeError("a bug")] * 1000)
        await later(it, 120)
        tried = 1000 - len(spy.faults["receive"])
        assert 5 < tried < 100
        spy.faults["receive"].clear()
        await bus.send(ORDERS, "x")
        await later(it, 10)
        assert bus.counts.get("handled") == 1
        assert bus._opened().intakes[0]._failures == 0


async def test_many_handouts_alone_are_no_crime() -> None:
    bus = make_bus()
    handled: list[str] = []

    @bus.consumer(ORDERS, concurrency=1, prefetch=20)
    async def handle(body: str) -> None:
        handled.append(body)

    async with lab(bus) as it:
        spy = spy_of(bus)
        for _ in range(6):  # opened and closed again and again with a full prefetch
            async with bus.receiver(LATER, prefetch=10):
                await turns()
        await bus.send_many(ORDERS, [str(n) for n in range(20)])
        await it.idle()
        assert len(handled) == 20
        assert not it.dead_letters(ORDERS)
        assert spy.calls["subscribe"] == 7


async def test_six_opens_and_closes_with_full_prefetch_dead_letter_nothing() -> None:
    bus = make_bus(url="memory://sixtimes")
    async with bus:
        await bus.send_many(ORDERS, [str(n) for n in range(20)])
        for _ in range(6):
            async with bus.receiver(ORDERS, prefetch=20) as receiver:
                assert await receiver.receive(5) is not None
        async with bus.receiver(ORDERS, prefetch=20) as receiver:
            deliveries = [await receiver.receive(5) for _ in range(20)]
            assert [d.deliveries for d in deliveries if d is not None] == [1] * 20
            for delivery in deliveries:
                assert delivery is not None
                await delivery.ack()
        assert (await bus.backlog(dead_letter_queue(ORDERS).name.removesuffix(".dlq"))).ready == 0


async def test_priorities_decide_what_comes_first() -> None:
    bus = make_bus()
    bus.channels.append(URGENT)
    async with lab(bus):
        for body, priority in (("low", 0), ("high", 2), ("middle", 1)):
            await bus.send(URGENT, body, priority=priority)
        async with bus.receiver(URGENT) as receiver:
            got = [(await receiver.receive(1)) for _ in range(3)]
            assert [d.body for d in got if d is not None] == ["high", "middle", "low"]


async def test_a_group_declared_later_gets_what_comes_later() -> None:
    bus = make_bus()

    @bus.subscriber(EVENTS)
    async def handle(body: str) -> None: ...

    async with lab(bus):
        assert [i.address for i in bus._opened().intakes] == [Group(EVENTS, "test")]


async def test_nothing_begins_once_the_end_has_begun() -> None:
    """The receive under way may take a while to be cancelled, and a handler that ends meanwhile has room for another message."""
    bus = make_bus()
    begun: list[str] = []
    go = asyncio.Event()

    @bus.consumer(ORDERS, concurrency=1, prefetch=5)
    async def handle(body: str) -> None:
        begun.append(body)
        await go.wait()

    async with lab(bus) as it:
        await bus.send_many(ORDERS, ["0", "1", "2"])
        await until(lambda: begun == ["0"])
        (intake,) = bus._opened().intakes
        stopping = asyncio.ensure_future(intake.stop(5.0))
        await asyncio.sleep(0)
        go.set()
        await stopping
        await turns()
        assert begun == ["0"]
        assert [message.body for message in it.broker.waiting(ORDERS)] == [b"1", b"2"]
