"""Leases: a message that is no longer ours is no disaster, to its consumer or to itself; and who holds many keeps them all."""

from __future__ import annotations

import asyncio
from typing import Any

from unibus import Bus, Delivery
from unibus.adapter import Outcome
from unibus_contracts.contract import contract
from unibus_contracts.kit import Kit, Seen, eventually, leftover, until


@contract(
    "lease.late_ack_is_harmless",
    "A handler that ends after its message was given to another run changes nothing: its ack is dropped, the consumer goes on.",
    needs="release",
)
async def test_late_ack(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen, ended = kit.bus(), Seen[Delivery[bytes]](), Seen[int]()
    gates = [asyncio.Event(), asyncio.Event()]

    @bus.consumer(queue, concurrency=2)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(delivery)
        n = len(seen)
        if n <= 2:
            await gates[n - 1].wait()
        ended(n)

    async with bus.running():
        await bus.send(queue, b"x")
        (first,) = await seen.reach(1)
        await take_away(bus, first)
        second = (await seen.reach(2))[1]
        assert (second.message.id, second.attempt) == (first.message.id, 1)
        gates[0].set()
        await until(lambda: bus.counts.get("lease_lost"), "the late ack is dropped, and told")
        assert len(ended) == 1
        assert not second.lost, "the late ack was not for the second run"
        gates[1].set()
        await ended.reach(2)
        await bus.send(queue, b"y")
        await ended.reach(3)
        assert bus.counts["lease_lost"] == 1, "the second run was no longer its message's owner either"
        assert bus.counts.get("reconnected", 0) + bus.counts.get("resubscribed", 0) == 0
        assert (await bus.health()).status == "ok"
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []


@contract(
    "lease.lost_is_told",
    "Extending tells whose lease is gone: with on_lease_lost=cancel that handler is cancelled, and no other one.",
    needs="lease",
)
async def test_lost(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen, cancelled = kit.bus(), Seen[Delivery[bytes]](), Seen[bytes]()
    gate = asyncio.Event()

    @bus.consumer(queue, concurrency=5, prefetch=5, on_lease_lost="cancel")
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(delivery)
        try:
            await gate.wait()
        except asyncio.CancelledError:
            cancelled(body)
            raise

    async with bus.running():
        await bus.send_many(queue, [b"1", b"2", b"3"])
        running = await seen.reach(3)
        lost = next(d for d in running if d.body == b"2")
        await take_away(bus, lost)
        await seen.reach(4)
        heartbeat = bus._opened().intakes[0]._heartbeat
        assert heartbeat is not None, "leases are declared, and nobody extends them"
        for delivery in running:
            delivery.lease_until = 0.0  # in two thirds of a lease it would be due by itself
        heartbeat._beat()
        assert await cancelled.reach(1) == [b"2"]
        assert (lost.lost, bus.counts["lease_lost"]) == (True, 1)
        gate.set()
        await until(lambda: bus.counts.get("handled") == 3, "the others are handled, and 2 by its second run")
        assert len(cancelled) == 1
        assert bus.counts["lease_lost"] == 1
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []


async def take_away(bus: Bus, delivery: Delivery[Any]) -> None:
    """What the broker does at the end of a lease: the message is somebody else's, and its holder does not know."""
    subscription = bus._opened().intakes[0]._subscription
    assert subscription is not None
    assert list(await subscription.settle(Outcome.RELEASED, [delivery])) == [None]


@contract(
    "health.gone_is_not_ok",
    "A subscription that is closed says that it is gone; a bus whose consumer has one is degraded, and has it made anew.",
)
async def test_gone(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen(body)

    async with bus.running():
        subscription = bus._opened().intakes[0]._subscription
        assert subscription is not None
        assert await subscription.check() in ("consuming", "standby")
        await subscription.close()  # behind the core's back, as a broker does it
        assert await subscription.check() == "gone"
        await until(lambda: bus._opened().intakes[0]._subscription not in (None, subscription), "another subscription")

        async def sent_and_seen() -> int:
            await bus.send(queue, b"x")
            return len(seen)

        # More than one: the last request of the old subscription may take one along, which comes when its lease has ended.
        await eventually(sent_and_seen, bool, "the other one receives")
        assert (await bus.health()).status == "ok"
