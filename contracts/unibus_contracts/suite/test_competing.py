"""Competing consumers: each message to one of them, and a busy one holds up nobody."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from unibus import Bus, Delivery, Queue
from unibus_contracts.contract import contract
from unibus_contracts.kit import SOON, Kit, Seen, leftover, take, until


def worker(kit: Kit, queue: Queue[bytes], name: str, seen: Seen[tuple[str, bytes]], gate: asyncio.Event | None) -> Bus:
    """A process of its own, as far as the broker can tell. With a gate, its handlers wait for it."""
    bus = kit.bus(service=name)

    @bus.consumer(queue, concurrency=1, prefetch=1)
    async def handle(body: bytes) -> None:
        seen((name, body))
        if gate is not None:
            await gate.wait()

    return bus


@contract("competing.each_once", "Three consumers of a queue together get every message, and none of them twice.")
async def test_each_once(kit: Kit) -> None:
    queue = kit.queue()
    seen = Seen[bytes]()
    async with AsyncExitStack() as stack:
        buses = [kit.bus() for _ in range(3)]
        for bus in buses:

            @bus.consumer(queue)
            async def handle(body: bytes) -> None:
                seen(body)

            await stack.enter_async_context(bus.running())
        await buses[0].send_many(queue, [b"%d" % n for n in range(300)])
        await seen.reach(300)
        await until(lambda: sum(bus.counts.get("handled", 0) for bus in buses) == 300, "300 handled")
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []
    assert sorted(seen.all) == sorted(b"%d" % n for n in range(300))


@contract("competing.work_is_shared", "While one consumer is busy, the other handles all the rest.", needs="share")
async def test_shared(kit: Kit) -> None:
    queue, seen, gate = kit.queue(), Seen[tuple[str, bytes]](), asyncio.Event()
    busy, free = worker(kit, queue, "busy", seen, gate), worker(kit, queue, "free", seen, None)
    async with busy.running():
        await busy.send(queue, b"long")
        await seen.reach(1)
        async with free.running():
            await busy.send_many(queue, [b"%d" % n for n in range(20)])
            # A prefetch of 1 is held by the long one, so nothing may wait behind it.
            await until(lambda: [name for name, _ in seen.all].count("free") == 20, "the other handles all 20")
        gate.set()
    assert seen.all[0] == ("busy", b"long")
    assert len(seen) == 21


@contract(
    "competing.late_joiner_gets_share",
    "A consumer that joins later gets a share of the backlog; nothing is lost.",
    needs="share",
)
async def test_late_joiner(kit: Kit) -> None:
    queue, seen, gate = kit.queue(), Seen[tuple[str, bytes]](), asyncio.Event()
    first, late = worker(kit, queue, "first", seen, gate), worker(kit, queue, "late", seen, None)
    async with first.running():
        await first.send_many(queue, [b"%d" % n for n in range(30)])
        await seen.reach(1)
        async with late.running():
            await until(lambda: "late" in {name for name, _ in seen.all}, "the late one gets some")
            gate.set()
            await seen.reach(30)
    assert sorted(body for _, body in seen.all) == sorted(b"%d" % n for n in range(30))


@contract("competing.group_members_share", "Members of one group share what is published: each message to one of them.")
async def test_group(kit: Kit) -> None:
    topic = kit.topic()
    seen = Seen[bytes]()
    async with AsyncExitStack() as stack:
        buses = [kit.bus() for _ in range(2)]
        for bus in buses:

            @bus.subscriber(topic, group="g")
            async def handle(body: bytes) -> None:
                seen(body)

            await stack.enter_async_context(bus.running())
        await buses[0].publish_many(topic, [b"%d" % n for n in range(100)])
        await seen.reach(100)
        await until(lambda: sum(bus.counts.get("handled", 0) for bus in buses) == 100, "100 handled")
    async with kit.bus((topic, "g")) as reader:
        assert await leftover(reader, (topic, "g")) == []
    assert sorted(seen.all) == sorted(b"%d" % n for n in range(100))


@contract(
    "competing.leaver_hands_over", "What a leaving consumer had not begun goes to the others, none lost or twice."
)
async def test_leaver(kit: Kit) -> None:
    queue = kit.queue()
    stayer, leaver = kit.bus(queue), kit.bus(queue)
    async with stayer:
        async with leaver, leaver.receiver(queue, prefetch=100) as receiver:
            await leaver.send_many(queue, [b"%d" % n for n in range(20)])
            (begun,) = await take(receiver)
            await begun.ack()
        async with stayer.receiver(queue, prefetch=100) as other:
            rest = await take(other, 19)
            for delivery in rest:
                assert delivery.attempt == 1, "being prefetched by one that left is no attempt"
                await delivery.ack()
        assert await leftover(stayer, queue) == []
    assert sorted([begun.body, *(delivery.body for delivery in rest)]) == sorted(b"%d" % n for n in range(20))


@contract(
    "competing.comers_repeat_nothing", "While consumers come and go, none of the messages under way is lost or twice."
)
async def test_come_and_go(kit: Kit) -> None:
    queue, seen, over = kit.queue(), Seen[tuple[bytes, int]](), asyncio.Event()

    def another() -> Bus:
        bus = kit.bus()

        @bus.consumer(queue, concurrency=3, prefetch=10)
        async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
            seen((body, delivery.attempt))
            await asyncio.sleep(0.02)  # so that some are always in hand

        return bus

    async def produce(bus: Bus) -> int:
        count = 0
        while not over.is_set():
            await bus.send_many(queue, [b"%d" % (count + n) for n in range(3)])
            count += 3
            await handled(count - 15)  # no heap
        return count

    async def handled(count: int) -> None:
        await until(lambda: len(seen) >= count, f"{count} are handled", 3 * SOON)  # a rebalance may take its time

    async with kit.bus(queue) as sender, another().running():
        producing = asyncio.create_task(produce(sender))
        try:
            for _ in range(2):
                await handled(len(seen) + 10)
                async with another().running():
                    await handled(len(seen) + 10)
        finally:
            over.set()
            sent = await producing
        await handled(sent)
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []
    assert sorted(seen.all) == sorted((b"%d" % n, 1) for n in range(sent))


@contract("competing.surplus_is_harmless", "Consumers beyond what there is to do are idle: no error, no message lost.")
async def test_surplus(kit: Kit) -> None:
    queue, seen = kit.queue(), Seen[tuple[str, bytes]]()
    async with AsyncExitStack() as stack:
        buses = [worker(kit, queue, f"worker-{n}", seen, None) for n in range(8)]
        for bus in buses:
            await stack.enter_async_context(bus.running())
        await buses[0].send_many(queue, [b"1", b"2", b"3"])
        await seen.reach(3)
        for bus in buses:
            assert (await bus.health()).status == "ok"
        await until(lambda: sum(bus.counts.get("handled", 0) for bus in buses) == 3, "3 handled")
    assert sorted(body for _, body in seen.all) == [b"1", b"2", b"3"]
