"""What "refused" must mean, feature by feature: an error before anything was done, and no message lost by it.

One function a feature. It runs instead of each contract that needs the feature, on adapters that declare it refused.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from unibus import Bus, ConfigError, Message, Queue, RetryPolicy, Unsupported, deadletter
from unibus.adapter import Move, Outcome, Outgoing, Source
from unibus.channel import Group

from .kit import Kit, bodies, eventually, handed_over, leftover, take
from .spi import receive, starting_at, subscribed


async def refused_at_start(bus: Bus) -> None:
    """The bus must not open, with handlers or without."""
    with pytest.raises((Unsupported, ConfigError)):
        async with bus.running():
            pass
    with pytest.raises((Unsupported, ConfigError)):
        async with bus:
            pass


async def _channel(
    kit: Kit, use: Callable[[Bus, Queue[bytes]], Awaitable[object]] | None = None, **feature: Any
) -> None:
    """Refused at start, alone and of a queue where messages wait; `use`: refused too, where it was not declared. They stay."""
    await refused_at_start(kit.bus(kit.queue(**feature)))
    if "reply" not in feature:  # which topics don't have
        await refused_at_start(kit.bus(kit.topic(**feature)))
    queue = kit.queue()
    async with kit.bus(queue) as sender:
        await sender.send_many(queue, [b"1", b"2"])
    wanted = Queue(queue.name, bytes, **feature)
    bus = kit.bus(wanted)

    @bus.consumer(wanted)
    async def never(body: bytes) -> None: ...

    await refused_at_start(bus)
    async with kit.bus(queue) as user:
        if use is not None:
            with pytest.raises(Unsupported):
                await use(user, queue)
        assert sorted(bodies(await leftover(user, queue))) == [b"1", b"2"], "the refusal has touched what waited"


async def order(kit: Kit) -> None:
    await _channel(kit, ordered=True)


async def delay(kit: Kit) -> None:
    await _channel(kit, lambda bus, queue: bus.send(queue, b"x", delay=1), delayed=True)
    queue = kit.queue()
    bus = kit.bus(queue)
    wait = (await kit.capabilities()).park_below + 10

    @bus.consumer(queue, retry=RetryPolicy(max_retries=1, backoff=wait))
    async def never(body: bytes) -> None: ...

    await refused_at_start(bus)


async def priority(kit: Kit) -> None:
    await _channel(kit, lambda bus, queue: bus.send(queue, b"x", priority=1), priorities=2)


async def reply(kit: Kit) -> None:
    await _channel(kit, lambda bus, queue: bus.request(queue, b"x", timeout=1), reply=bytes)


async def attempt(kit: Kit) -> None:
    """The number may be forgotten with the process that counted; it is never too high."""
    assert await handed_over(kit) in (1, 2)


async def replay(kit: Kit) -> None:
    """At start, and by the SPI as well: a group that silently began now would miss what it asked for."""
    kit.creates()
    topic = kit.topic()
    group = Group(topic, "g")
    async with kit.bus((topic, "g")) as bus:
        with pytest.raises(Unsupported):
            await bus.adapter.subscribe(Source(group, start="all"))
        with pytest.raises(Unsupported):
            await bus.adapter.declare(starting_at(kit, topic, group, "all"))
    for start in ("all", 1.0):
        bus = kit.bus()

        @bus.subscriber(topic, group="later", start=start)
        async def never(body: bytes) -> None: ...

        await refused_at_start(bus)


async def browse(kit: Kit) -> None:
    """By the SPI as well: the core asks the adapter for nothing that it refuses."""
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        with pytest.raises(Unsupported):
            async for _ in deadletter.browse(bus, queue):
                pass
        with pytest.raises(Unsupported):
            await bus.adapter.subscribe(Source(queue, browse=True))


async def release(kit: Kit) -> None:
    """The call raises, and the delivery is still ours to settle."""
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        await bus.send(queue, b"kept")
        async with bus.receiver(queue) as receiver:
            (delivery,) = await take(receiver)
            with pytest.raises(Unsupported):
                await delivery.release()
            await delivery.ack()
        assert await leftover(bus, queue) == []


async def lease(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        await bus.send(queue, b"kept")
        async with subscribed(bus, queue) as subscription:
            held = await receive(subscription)
            assert held[0].lease_until is None, "no lease is declared, but the delivery has an end"
            with pytest.raises(Unsupported):
                await subscription.extend(held, 30)
            assert list(await subscription.settle(Outcome.ACCEPTED, held)) == [None]
        assert await leftover(bus, queue) == []


async def atomic_move(kit: Kit) -> None:
    """The call raises; nothing was sent, nothing was settled."""
    queue, target = kit.queue(), kit.queue(label="target")
    async with kit.bus(queue, target) as bus:
        await bus.send(queue, b"kept")
        async with subscribed(bus, queue) as subscription:
            held = await receive(subscription)
            with pytest.raises(Unsupported):
                await subscription.move([Move(held[0], [Outgoing(target, Message(b"copy", id="copy"))])], 10)
        assert bodies(await leftover(bus, queue)) == [b"kept"]
        assert await leftover(bus, target) == []


async def delivery_count(kit: Kit) -> None:
    """No number is better than a made-up one."""
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        await bus.send(queue, b"x")
        async with subscribed(bus, queue) as subscription:
            (delivery,) = await receive(subscription)
            assert delivery.deliveries is None


async def settle_confirmed(kit: Kit) -> None:
    """The settle may return early, but it takes effect soon."""
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        await bus.send(queue, b"x")
        async with subscribed(bus, queue) as subscription:
            assert list(await subscription.settle(Outcome.ACCEPTED, await receive(subscription))) == [None]

            async def waiting() -> int:
                backlog = await bus.backlog(queue)
                return backlog.ready + (backlog.in_flight or 0)

            await eventually(waiting, lambda left: left == 0, "the settled message is off the broker")
        assert await leftover(bus, queue) == []


async def dedup(kit: Kit) -> None:
    """An id is no reason to drop a message where deduplication is not declared."""
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        for body in (b"first", b"second"):
            await bus.send(queue, Message(body, id="same"))
        assert sorted(bodies(await leftover(bus, queue))) == [b"first", b"second"]


async def share(kit: Kit) -> None:
    """What is in one consumer's share waits for it, busy or not, and goes to the others when it leaves: all, and once."""
    queue = kit.queue()
    async with kit.bus(queue) as busy, kit.bus(queue) as heir:
        await busy.send_many(queue, [b"%d" % n for n in range(5)])
        async with busy.receiver(queue, prefetch=1) as receiver:
            (held,) = await take(receiver)
            await held.ack()
        async with heir.receiver(queue) as receiver:
            rest = await take(receiver, 4)
            for delivery in rest:
                assert delivery.attempt == 1, "waiting for a consumer that was busy is no attempt"
                await delivery.ack()
        assert sorted([held.body, *bodies(rest)]) == [b"%d" % n for n in range(5)]
        assert await leftover(heir, queue) == []


async def inbox(kit: Kit) -> None:
    """A reply to a process that has gone may be taken, and is nobody's: not that of the next process of its service."""
    queue = kit.queue(str, reply=str)
    responder, gone, heir = kit.bus(service="responder"), kit.bus(queue), kit.bus(queue)
    addresses: list[str | None] = []

    @responder.responder(queue)
    async def answer(body: str, message: Message) -> str:
        addresses.append(message.reply_to)
        return body

    async with responder.running():
        async with gone:
            await gone.request(queue, "x")
        async with heir:
            await heir.request(queue, "y")
            late = Outgoing(responder.adapter.reply_to(addresses[0] or ""), Message(b"late", id="late"))
            await responder.adapter.send([late], 10)
            assert await heir.request(queue, "z") == "z"
            assert heir.counts.get("late_replies", 0) == 0


REFUSALS: dict[str, Callable[[Kit], Awaitable[None]]] = {
    function.__name__: function
    for function in (
        order,
        delay,
        priority,
        replay,
        browse,
        reply,
        release,
        lease,
        atomic_move,
        delivery_count,
        attempt,
        settle_confirmed,
        dedup,
        share,
        inbox,
    )
}
