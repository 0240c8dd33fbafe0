"""Delay, expiry and priority: features that a channel is declared with."""

from __future__ import annotations

import time

import pytest

from unibus import Bus, ConfigError, Delivery, Message, Queue, Unsupported
from unibus.adapter import Outcome, Subscription
from unibus_contracts.contract import contract
from unibus_contracts.kit import Kit, Seen, bodies, leftover, take, until
from unibus_contracts.spi import subscribed

SLACK = 4.0
WAIT = 4.0  # for what is taken before it is due


@contract(
    "delay.is_floor", "A delayed message arrives after its delay: never before, and not much later.", needs="delay"
)
async def test_floor(kit: Kit) -> None:
    queue, topic = kit.queue(delayed=True), kit.topic(delayed=True)
    bus, seen = kit.bus(), Seen[tuple[bytes, float]]()

    @bus.consumer(queue)
    async def on_queue(body: bytes) -> None:
        seen((body, time.monotonic()))

    @bus.subscriber(topic, group="g")
    async def on_topic(body: bytes) -> None:
        seen((body, time.monotonic()))

    async with bus.running():
        begun = time.monotonic()
        await bus.send(queue, b"queue", delay=3)
        await bus.publish(topic, b"topic", delay=3)
        await bus.send(queue, b"now")
        await seen.reach(3)
    at = {body: moment - begun for body, moment in seen.all}
    assert at[b"now"] < 3, "an undelayed message waited for a delayed one"
    assert 3 <= at[b"queue"] <= 3 + SLACK
    assert 3 <= at[b"topic"] <= 3 + SLACK


@contract("delay.short_not_behind_long", "A short delay is over before a long one that was sent first.", needs="delay")
async def test_short(kit: Kit) -> None:
    queue = kit.queue(delayed=True)
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen(body)

    async with bus.running():
        await bus.send(queue, b"long", delay=4)
        await bus.send(queue, b"short", delay=1)
        assert await seen.reach(2) == [b"short", b"long"]


@contract("delay.needs_no_consumer", "A delay runs while nobody consumes, and no sooner for that.", needs="delay")
async def test_offline(kit: Kit) -> None:
    queue = kit.queue(delayed=True)
    async with kit.bus(queue) as bus:
        begun = time.monotonic()
        await bus.send(queue, b"x", delay=1, headers={"a": "b"}, key="k")
    async with kit.bus(queue) as bus, bus.receiver(queue) as receiver:
        (delivery,) = await take(receiver)
        assert time.monotonic() - begun >= 1
        assert (delivery.body, delivery.attempt, delivery.message.key) == (b"x", 1, "k")
        assert dict(delivery.message.headers) == {"a": "b"}
        await delivery.ack()


@contract(
    "delay.undeclared_is_refused", "A delay on a channel that was not declared with it is refused, on any broker."
)
async def test_undeclared(kit: Kit) -> None:
    queue, topic = kit.queue(), kit.topic()
    async with kit.bus(queue, (topic, "g")) as bus:
        with pytest.raises(Unsupported):
            await bus.send(queue, b"x", delay=1)
        with pytest.raises(Unsupported):
            await bus.publish(topic, b"x", delay=1)
        assert await leftover(bus, queue) == []
        assert await leftover(bus, (topic, "g")) == []


async def taken_early(subscription: Subscription, count: int, begun: float) -> list[Delivery[bytes]]:
    """Up to `count` that were sent at `begun`, as far as the broker hands them out before they are due, and says so."""
    found: list[Delivery[bytes]] = []
    while len(found) < count and time.monotonic() - begun < WAIT - 1:
        more = await subscription.receive(count - len(found), 0.2)
        waited = time.monotonic() - begun
        for delivery in more:
            rest = delivery.message.delay or 0
            assert waited >= WAIT or WAIT - waited <= rest <= WAIT + 1, (
                f"{rest:g} s to go, after {waited:g} of {WAIT:g}"
            )
        found += more
    return found


@contract(
    "delay.early_goes_back_to_its_time",
    "What an early source has taken and given back comes when it is due, not before; or that source is refused.",
    needs="delay",
)
async def test_early_back(kit: Kit) -> None:
    queue = kit.queue(delayed=True)
    async with kit.bus(queue) as bus:
        begun = time.monotonic()
        for body in (b"released", b"held at the end"):
            await bus.send(queue, body, delay=WAIT)
        try:
            async with subscribed(bus, queue, early=True) as subscription:
                found = await taken_early(subscription, 2, begun)
                released = [delivery for delivery in found if delivery.message.body == b"released"]
                assert list(await subscription.settle(Outcome.RELEASED, released)) == [None] * len(released)
        except Unsupported:
            pass  # then nothing has happened to them
        async with bus.receiver(queue) as receiver:
            for _ in range(2):
                (delivery,) = await take(receiver)
                assert time.monotonic() - begun >= WAIT, f"{delivery.body!r} came before it was due"
                assert delivery.attempt == 1
                await delivery.ack()
        assert await leftover(bus, queue) == []


@contract(
    "delay.early_accepted_is_gone",
    "What an early source has accepted is not delivered when it would have been due; or that source is refused.",
    needs="delay",
)
async def test_early_accepted(kit: Kit) -> None:
    queue = kit.queue(delayed=True)
    async with kit.bus(queue) as bus:
        begun, gone = time.monotonic(), list[bytes]()
        for body in (b"0", b"1", b"last"):
            await bus.send(queue, body, delay=WAIT)
        try:
            async with subscribed(bus, queue, early=True) as subscription:
                found = [d for d in await taken_early(subscription, 3, begun) if d.message.body != b"last"]
                assert list(await subscription.settle(Outcome.ACCEPTED, found)) == [None] * len(found)
                gone = [delivery.message.body for delivery in found]
        except Unsupported:
            pass
        seen = list[bytes]()
        async with bus.receiver(queue) as receiver:
            while b"last" not in seen or len(seen) + len(gone) < 3:
                (delivery,) = await take(receiver)
                seen.append(delivery.body)
                await delivery.ack()
        assert sorted([*seen, *gone]) == [b"0", b"1", b"last"]
        assert await leftover(bus, queue) == []


@contract("ttl.expired_is_not_handled", "A message that expired before it was handled is not handled, and is counted.")
async def test_expired(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue, concurrency=1)
    async def handle(body: bytes) -> None:
        seen(body)

    async with kit.bus(queue) as sender:
        await sender.send(queue, b"expired", expires_in=0.3)
        over = time.monotonic() + 0.31
        await sender.send(queue, b"fresh", expires_in=600)
        await sender.send(queue, b"eternal")
        await until(lambda: time.monotonic() > over, "its time is over")
    async with bus.running():
        await seen.reach(2)
        # Whoever drops it: the core, counted, or the broker, before it was handed out.
        await until(lambda: bus.counts.get("handled") == 2, "2 handled")
        assert bus.counts.get("expired", 0) <= 1
    assert seen.all == [b"fresh", b"eternal"]
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []


@contract("ttl.is_told", "The receiver of a message with an expiry is told when it ends.")
async def test_told(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        before = time.time()
        await bus.send(queue, b"x", expires_in=600)
        after = time.time()
        (delivery,) = await leftover(bus, queue)
    assert delivery.message.expires_at is not None
    assert before + 599 <= delivery.message.expires_at <= after + 601


@contract("priority.higher_first", "Of a backlog, messages of higher priority are delivered first.", needs="priority")
async def test_priority(kit: Kit) -> None:
    queue = kit.queue(priorities=3)
    async with kit.bus(queue) as bus:
        for n in range(4):
            await bus.send(queue, b"none %d" % n)
            await bus.send(queue, b"low %d" % n, priority=0)
            await bus.send(queue, b"mid %d" % n, priority=1)
            await bus.send(queue, b"top %d" % n, priority=2)
        found = [body.split()[0] for body in bodies(await taken_one_by_one(bus, queue, 16))]
    assert found[:4] == [b"top"] * 4
    assert found[4:8] == [b"mid"] * 4
    assert sorted(found[8:]) == [b"low"] * 4 + [b"none"] * 4


async def taken_one_by_one(bus: Bus, queue: Queue[bytes], count: int) -> list[Delivery[bytes]]:
    """With nothing prefetched, the order is the broker's."""
    found: list[Delivery[bytes]] = []
    async with bus.receiver(queue, prefetch=1) as receiver:
        for _ in range(count):
            found += await take(receiver)
            await found[-1].ack()
    return found


@contract("priority.undeclared_is_refused", "A priority on a channel that was not declared with it is refused.")
async def test_priority_undeclared(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        with pytest.raises(Unsupported):
            await bus.send(queue, b"x", priority=1)
        assert await leftover(bus, queue) == []


@contract("priority.levels_are_true", "The declared number of levels is had; one more is refused.", needs="priority")
async def test_levels(kit: Kit) -> None:
    limit = (await kit.capabilities()).priority.limit
    levels = int(limit) if limit else 10
    queue = kit.queue(priorities=levels)
    async with kit.bus(queue) as bus:
        for priority in range(levels):
            await bus.send(queue, b"%d" % priority, priority=priority)
        with pytest.raises((Unsupported, ValueError)):
            await bus.send(queue, b"x", priority=levels)
        found = bodies(await taken_one_by_one(bus, queue, levels))
    assert found == [b"%d" % n for n in reversed(range(levels))]
    if levels < 10:
        with pytest.raises((Unsupported, ConfigError)):
            async with kit.bus(kit.queue(priorities=levels + 1)):
                pass


@contract("dedup.id_sent_twice_arrives_once", "A message id that is sent twice arrives once.", needs="dedup")
async def test_dedup(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        for body in (b"first", b"second"):
            await bus.send(queue, Message(body, id="same"))
        await bus.send(queue, Message(b"first", id="other"))
        assert bodies(await leftover(bus, queue)) == [b"first", b"first"]
