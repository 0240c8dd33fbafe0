"""Settle: one word for each fate, and a message that has none comes back."""

from __future__ import annotations

import asyncio
import time

from unibus import Delivery, Discard, Message, TransportError
from unibus.adapter import Move, Outcome, Outgoing
from unibus_contracts.contract import contract
from unibus_contracts.kit import AT_ONCE, Kit, Seen, bodies, leftover, letters, take, until
from unibus_contracts.spi import receive, subscribed


@contract("settle.ack_consumes", "An acked message never comes back, also not on a new connection.")
async def test_ack(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus, bus.receiver(queue) as receiver:
        await bus.send(queue, b"x")
        (delivery,) = await take(receiver)
        await delivery.ack()
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []


@contract("settle.unsettled_returns", "What is held when its consumer closes comes back, and that is no attempt.")
async def test_unsettled(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus, bus.receiver(queue) as receiver:
        id = await bus.send(queue, b"x", headers={"a": "b"})
        await take(receiver)
    async with kit.bus(queue) as other, other.receiver(queue) as receiver:
        (delivery,) = await take(receiver)
        assert (delivery.message.id, delivery.attempt, dict(delivery.message.headers)) == (id, 1, {"a": "b"})
        await delivery.ack()
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []


@contract("settle.out_of_order_is_safe", "Acking the last of three held messages gives up none of the others.")
async def test_out_of_order(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus, bus.receiver(queue) as receiver:
        await bus.send_many(queue, [b"1", b"2", b"3"])
        held = {d.body: d for d in await take(receiver, 3)}
        await held[b"3"].ack()
    async with kit.bus(queue) as reader, reader.receiver(queue) as receiver:
        assert sorted(bodies(await take(receiver, 2))) == [b"1", b"2"]
    async with kit.bus(queue) as reader:
        assert sorted(bodies(await leftover(reader, queue))) == [b"1", b"2"]


@contract("settle.individually", "Of five held messages the acked ones are gone and the others come back.")
async def test_individually(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        await bus.send_many(queue, [b"%d" % n for n in range(5)])
        async with subscribed(bus, queue) as subscription:
            held = await receive(subscription, 5)
            odd = [d for d in held if int(d.message.body) % 2]
            assert list(await subscription.settle(Outcome.ACCEPTED, odd)) == [None] * 2
        async with bus.receiver(queue) as receiver:
            back = await take(receiver, 3)
            assert sorted(bodies(back)) == [b"0", b"2", b"4"]
            for delivery in back:
                await delivery.ack()
        assert await leftover(bus, queue) == []


@contract("settle.twice_is_harmless", "Acking twice is no harm: not to the link, and not to other messages.")
async def test_twice(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        await bus.send_many(queue, [b"1", b"2", b"3"])
        async with subscribed(bus, queue) as subscription:
            held = await receive(subscription, 3)
            assert list(await subscription.settle(Outcome.ACCEPTED, held[:1])) == [None]
            (second,) = await subscription.settle(Outcome.ACCEPTED, held[:1])
            assert second is None or isinstance(second, TransportError)
            assert not getattr(second, "retryable", False)
            assert list(await subscription.settle(Outcome.ACCEPTED, held[1:2])) == [None]  # the link works
        async with bus.receiver(queue) as receiver:
            (third,) = await take(receiver)
            assert third.body == held[2].message.body
            await third.ack()
            await asyncio.gather(third.ack(), return_exceptions=True)  # raising or not is the core's choice
        assert await leftover(bus, queue) == []


@contract("settle.release_is_uncounted", "A released message comes back at once, as the same attempt.", needs="release")
async def test_release(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus, bus.receiver(queue) as receiver:
        await bus.send(queue, b"x", headers={"a": "b"})
        for _ in range(3):
            (delivery,) = await take(receiver)
            assert (delivery.attempt, dict(delivery.message.headers)) == (1, {"a": "b"})
            await delivery.release()
        (delivery,) = await take(receiver)
        await delivery.ack()
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []


@contract("settle.discard_is_final", "A discarded message is gone: counted, no retry and no dead letter.")
async def test_discard(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen(body)
        raise Discard("nothing to do")

    async with bus.running():
        await bus.send(queue, b"x")
        await until(lambda: bus.counts.get("discarded") == 1, "discarded")
        assert await letters(bus, queue, 0) == []
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []
    assert seen.all == [b"x"]


@contract("settle.by_hand", "By hand, each fate does what its exception does in a handler.")
async def test_by_hand(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        async with bus.receiver(queue) as receiver:
            await bus.send(queue, b"retry")
            (delivery,) = await take(receiver)
            await delivery.retry("again", delay=0)
            (delivery,) = await take(receiver)
            assert delivery.attempt == 2
            await delivery.ack()
            await bus.send(queue, b"discard")
            (delivery,) = await take(receiver)
            await delivery.discard("no use")
            await bus.send(queue, b"dead")
            (delivery,) = await take(receiver)
            await delivery.dead_letter("hopeless")
            (letter,) = await letters(bus, queue)
            assert letter.body == b"dead"
        assert await leftover(bus, queue) == []


@contract("settle.context_manager", "A delivery as a context is acked at its end, and an error goes to the policy.")
async def test_context(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        async with bus.receiver(queue) as receiver:
            await bus.send(queue, b"good")
            (delivery,) = await take(receiver)
            async with delivery:
                pass
            await bus.send(queue, b"bad")
            (delivery,) = await take(receiver)
            async with delivery:
                raise Discard("in the block")
        assert await leftover(bus, queue) == []


@contract("settle.iteration", "Iterating over a receiver yields every message; each one acked is gone.")
async def test_iteration(kit: Kit) -> None:
    queue = kit.queue()
    found: list[bytes] = []
    async with kit.bus(queue) as bus:
        await bus.send_many(queue, [b"%d" % n for n in range(10)])
        async with bus.receiver(queue) as receiver:
            async for delivery in receiver:
                async with delivery:
                    found.append(delivery.body)
                if len(found) == 10:
                    break
        assert await leftover(bus, queue) == []
    assert sorted(found) == [b"%d" % n for n in range(10)]


@contract(
    "settle.handler_decides_once", "A handler that settled its delivery has decided, whatever it raises afterwards."
)
async def test_decides_once(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[int]()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(delivery.attempt)
        await delivery.ack()
        raise OSError("after the ack")

    async with bus.running():
        await bus.send(queue, b"x")
        await seen.reach(1)
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []
        assert await letters(reader, queue, 0) == []
    assert seen.all == [1]


@contract(
    "settle.timeout_is_a_failure", "A handler that runs past its timeout is cancelled, and has failed an attempt."
)
async def test_timeout(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[str]()

    @bus.consumer(queue, retry=AT_ONCE, timeout=0.2)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        if delivery.attempt == 1:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                seen("cancelled")
                raise
        seen(f"attempt {delivery.attempt}")

    async with bus.running():
        await bus.send(queue, b"x")
        assert await seen.reach(2) == ["cancelled", "attempt 2"]
        await until(lambda: bus.counts.get("handled") == 1, "handled")
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []


@contract("settle.cancelled_handler_never_acks", "A handler whose task was cancelled from inside has not succeeded.")
async def test_cancelled(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: bytes) -> None:
        seen(body)
        if len(seen) == 1:
            raise asyncio.CancelledError

    async with bus.running():
        await bus.send(queue, b"x")
        await seen.reach(2)
        await until(lambda: bus.counts.get("handled") == 1, "handled")
    assert seen.all == [b"x", b"x"]


@contract(
    "settle.at_most_once", "With at-most-once, a message is settled before its handler runs: a failure is the end."
)
async def test_at_most_once(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(shutdown_timeout=0.2), Seen[bytes]()

    @bus.consumer(queue, guarantee="at-most-once", retry=AT_ONCE)
    async def handle(body: bytes) -> None:
        seen(body)
        if body == b"fails":
            raise OSError("too late to try again")
        await asyncio.Event().wait()  # cut off by the shutdown: that must not bring it back either

    async with bus.running():
        await bus.send(queue, b"fails")
        await seen.reach(1)
        await bus.send(queue, b"hangs")
        await seen.reach(2)
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []
    assert seen.all == [b"fails", b"hangs"]


@contract("settle.from_another_task", "A delivery can be settled from another task than the one that received it.")
async def test_other_task(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        async with bus.receiver(queue) as receiver:
            await bus.send_many(queue, [b"1", b"2", b"3"])
            await asyncio.gather(*(asyncio.create_task(delivery.ack()) for delivery in await take(receiver, 3)))
        assert await leftover(bus, queue) == []


@contract(
    "settle.is_confirmed", "When settle returns, the broker has it: the backlog is empty.", needs="settle_confirmed"
)
async def test_confirmed(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        await bus.send_many(queue, [b"x"] * 5)
        async with subscribed(bus, queue) as subscription:
            await subscription.settle(Outcome.ACCEPTED, await receive(subscription, 5))
            backlog = await bus.backlog(queue)
            assert (backlog.ready, backlog.in_flight or 0) == (0, 0)


@contract("settle.move_is_one_step", "A move sends its messages and settles the delivery.", needs="atomic_move")
async def test_move(kit: Kit) -> None:
    queue, target = kit.queue(), kit.queue(label="target")
    async with kit.bus(queue, target) as bus:
        await bus.send(queue, b"x")
        async with subscribed(bus, queue) as subscription:
            (delivery,) = await receive(subscription)
            sends = [Outgoing(target, Message(b"copy %d" % n, id=f"copy {n}")) for n in range(2)]
            assert list(await subscription.move([Move(delivery, sends)], 10)) == [None]
            (again,) = await subscription.move([Move(delivery, sends)], 10)
            assert again is not None, "a delivery that is settled can't be moved again"
        assert await leftover(bus, queue) == []
        assert sorted(bodies(await leftover(bus, target))) == [b"copy 0", b"copy 1"]


@contract(
    "settle.extend_prolongs", "Extending a delivery moves the end of its lease, and it can be settled.", needs="lease"
)
async def test_extend(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        await bus.send(queue, b"x")
        async with subscribed(bus, queue) as subscription:
            (delivery,) = await receive(subscription)
            first = delivery.lease_until
            assert first is not None
            assert first > time.monotonic()
            # Not for longer than a lease is: some brokers count every lease alike, from its last extension.
            length = (await kit.capabilities()).lease.limit or first - time.monotonic() + 60
            await until(lambda: time.monotonic() + length > first + 0.2, "a part of the lease is over")
            asked = time.monotonic()
            assert list(await subscription.extend([delivery], length)) == [None]
            assert delivery.lease_until is not None
            assert asked + length - 0.1 <= delivery.lease_until, "the lease ends before the time that was asked for"
            assert delivery.lease_until > first
            assert list(await subscription.settle(Outcome.ACCEPTED, [delivery])) == [None]
            (after,) = await subscription.extend([delivery], 10)
            assert after is not None, "what is settled can't be extended"
        assert await leftover(bus, queue) == []
