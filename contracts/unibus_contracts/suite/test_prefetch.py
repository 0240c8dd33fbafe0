"""Prefetch and concurrency: bounds that hold, buffers included, and a flow that resumes."""

from __future__ import annotations

import asyncio

from unibus.adapter import Outcome
from unibus_contracts.contract import contract
from unibus_contracts.kit import Kit, Seen, bodies, leftover, take, until
from unibus_contracts.spi import receive, subscribed


@contract(
    "prefetch.never_exceeded", "A consumer holds its prefetch at most: the rest is there for others.", needs="share"
)
async def test_bound(kit: Kit) -> None:
    queue, gate, seen = kit.queue(), asyncio.Event(), Seen[bytes]()
    busy = kit.bus()

    @busy.consumer(queue, concurrency=2, prefetch=5)
    async def handle(body: bytes) -> None:
        seen(body)
        await gate.wait()

    async with busy.running():
        await busy.send_many(queue, [b"%d" % n for n in range(20)])
        await seen.reach(2)
        async with kit.bus(queue) as other, other.receiver(queue, prefetch=100) as receiver:
            free = await take(receiver, 15)  # so the busy one can hold 5 of the 20 at most
            for delivery in free:
                await delivery.ack()
        gate.set()
        await seen.reach(5)
    assert len(seen) == 5
    assert sorted([*seen.all, *bodies(free)]) == sorted(b"%d" % n for n in range(20))


@contract("prefetch.of_a_receiver", "A receiver by hand holds its prefetch at most, and each ack makes room for one.")
async def test_receiver(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus, bus.receiver(queue, prefetch=3) as receiver:
        await bus.send_many(queue, [b"%d" % n for n in range(6)])
        held = await take(receiver, 3)
        assert await receiver.receive(timeout=0.3) is None
        await held[0].ack()
        held = [*held[1:], *await take(receiver)]
        assert await receiver.receive(timeout=0.3) is None
        for delivery in held:
            await delivery.ack()
        last = await take(receiver, 2)
        assert len({d.body for d in (*held, *last)}) == 5
        for delivery in last:
            await delivery.ack()


@contract("prefetch.of_the_spi", "A subscription of the SPI never has more out than its prefetch.")
async def test_spi(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        await bus.send_many(queue, [b"%d" % n for n in range(10)])
        async with subscribed(bus, queue, prefetch=4) as subscription:
            held = await receive(subscription, 4)
            assert list(await subscription.receive(10, 0.3)) == []
            await subscription.settle(Outcome.ACCEPTED, held[:3])
            held = [held[3], *await receive(subscription, 3)]
            assert list(await subscription.receive(10, 0.3)) == []
            await subscription.settle(Outcome.ACCEPTED, held)
        assert len(await leftover(bus, queue)) == 3


@contract("prefetch.resumes", "A consumer that was full goes on as soon as there is room.")
async def test_resumes(kit: Kit) -> None:
    queue, gate, seen = kit.queue(), asyncio.Event(), Seen[bytes]()
    bus = kit.bus()

    @bus.consumer(queue, concurrency=3, prefetch=3)
    async def handle(body: bytes) -> None:
        seen(body)
        await gate.wait()

    async with bus.running():
        await bus.send_many(queue, [b"%d" % n for n in range(50)])
        await seen.reach(3)
        gate.set()
        await seen.reach(50)
    assert sorted(seen.all) == sorted(b"%d" % n for n in range(50))


@contract(
    "prefetch.concurrency_is_bound_and_reached", "As many handlers run at once as allowed: never more, and not fewer."
)
async def test_concurrency(kit: Kit) -> None:
    queue, gate = kit.queue(), asyncio.Event()
    bus, running, most, done = kit.bus(), 0, 0, Seen[bytes]()

    @bus.consumer(queue, concurrency=4, prefetch=20)
    async def handle(body: bytes) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await gate.wait()
        running -= 1
        done(body)

    async with bus.running():
        await bus.send_many(queue, [b"%d" % n for n in range(40)])
        await until(lambda: running == 4, "4 handlers at once")
        gate.set()
        await done.reach(40)
    assert most == 4
