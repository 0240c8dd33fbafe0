"""Consume: what was sent is received, once, where it was sent to, by whichever way of receiving."""

from __future__ import annotations

import asyncio
import time
from threading import get_ident

from unibus import BatchFailed, Delivery, Message
from unibus.adapter import Outgoing
from unibus_contracts.contract import contract
from unibus_contracts.kit import AT_ONCE, SOON, Kit, Seen, bodies, eventually, leftover, letters, take, until
from unibus_contracts.spi import receive, subscribed


@contract("consume.roundtrip", "A hundred different messages arrive, each once and with its own body.")
async def test_roundtrip(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen(body)

    sent = [b"body %d" % n for n in range(100)]
    async with bus.running():
        for body in sent:
            await bus.send(queue, body)
        await seen.reach(100)
        await until(lambda: bus.counts["handled"] == 100, "100 handled")
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []
    assert sorted(seen.all) == sorted(sent)


@contract("consume.empty_receive_times_out", "Receiving from an empty queue returns None when its time is over.")
async def test_empty(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus, bus.receiver(queue) as receiver:
        begun = time.monotonic()
        assert await receiver.receive(timeout=0.3) is None
        assert 0.29 < time.monotonic() - begun < SOON
        await bus.send(queue, b"later")
        assert bodies(await take(receiver)) == [b"later"]  # the receiver still works


@contract("consume.no_crosstalk", "Two queues with names alike each get their own messages only.")
async def test_no_crosstalk(kit: Kit) -> None:
    one = kit.queue()
    others = [kit.named_queue(one.name + suffix) for suffix in (".a", "-a", "_a", ".A", "a")]
    async with kit.bus(one, *others) as bus:
        for queue in (one, *others):
            await bus.send_many(queue, [queue.name.encode()] * 3)
        for queue in (one, *others):
            assert bodies(await leftover(bus, queue)) == [queue.name.encode()] * 3


@contract(
    "consume.ready_means_ready", "What is sent as soon as the bus is running arrives, also where nothing is kept."
)
async def test_ready(kit: Kit) -> None:
    queue, topic = kit.queue(), kit.topic()
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue)
    async def on_queue(body: bytes) -> None:
        seen(body)

    @bus.subscriber(topic, broadcast=True)
    async def on_topic(body: bytes) -> None:
        seen(body)

    for n in range(1, 6):
        async with bus.running():
            await bus.publish(topic, b"topic %d" % n)
            await bus.send(queue, b"queue %d" % n)
            await seen.reach(2 * n)
    assert sorted(seen.all) == sorted(b"%s %d" % (kind, n) for kind in (b"queue", b"topic") for n in range(1, 6))


@contract("consume.before_subscription", "A queue keeps what was sent before anyone listened, over connections.")
async def test_before_subscription(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as sender:
        await sender.send_many(queue, [b"%d" % n for n in range(10)])
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen(body)

    async with bus.running():
        assert sorted(await seen.reach(10)) == [b"%d" % n for n in range(10)]


@contract("consume.metadata", "A delivery tells its id, place, time and that it is the first attempt.")
async def test_metadata(kit: Kit) -> None:
    queue = kit.queue()
    before = time.time()
    async with kit.bus(queue) as bus, bus.receiver(queue) as receiver:
        id = await bus.send(queue, b"x")
        (delivery,) = await take(receiver)
        assert delivery.message.id == id
        assert delivery.source.address == queue
        assert delivery.attempt == 1
        assert not delivery.lost
        assert delivery.message.timestamp is not None
        assert int(before) <= delivery.message.timestamp <= time.time() + 1  # some brokers keep whole seconds
        assert delivery.message.body == b"x"
        assert dict(delivery.message.headers) == {}
        await delivery.ack()


@contract(
    "consume.delivery_count",
    "The broker's count is 1 on the first delivery, and is no attempt.",
    needs="delivery_count",
)
async def test_delivery_count(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        await bus.send(queue, b"x")
        async with subscribed(bus, queue) as subscription:
            (first,) = await receive(subscription)
            assert first.deliveries == 1
        async with subscribed(bus, queue) as subscription:
            (second,) = await receive(subscription)
            # Given back in order, which some brokers count and others don't; a crash is counted by all: a fault contract.
            assert second.deliveries in (1, 2)
            assert second.attempt == 1, "a native count is no attempt"


@contract("consume.connected_runs_no_handler", "A bus that is open but not running leaves the messages to others.")
async def test_open_is_not_running(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen(body)

    async with bus:
        await bus.send(queue, b"x")
        assert bodies(await leftover(bus, queue)) == [b"x"]
    assert seen.all == []


@contract("consume.plain_functions_run_in_threads", "A handler that blocks is run in a thread, and settles the same.")
async def test_plain_function(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[tuple[bytes, int]]()

    @bus.consumer(queue, retry=AT_ONCE)
    def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen((body, get_ident()))
        if delivery.attempt == 1:
            raise OSError("first")

    async with bus.running():
        await bus.send(queue, b"x")
        await seen.reach(2)
        await until(lambda: bus.counts["handled"] == 1, "handled")
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []
    assert [body for body, _ in seen.all] == [b"x", b"x"]
    assert get_ident() not in {thread for _, thread in seen.all}


@contract("consume.batch_handler", "A batch handler gets every message once, never more of them than it asked for.")
async def test_batch(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as sender:
        await sender.send_many(queue, [b"%d" % n for n in range(25)])
    bus, seen = kit.bus(), Seen[list[bytes]]()

    @bus.consumer(queue, batch=10)
    async def handle(batch: list[bytes]) -> None:
        seen(batch)

    async with bus.running():
        await until(lambda: sum(map(len, seen.all)) >= 25, "25 in batches")
        await until(lambda: bus.counts["handled"] == 25, "25 handled")
    assert max(map(len, seen.all)) <= 10
    assert sorted(body for batch in seen.all for body in batch) == sorted(b"%d" % n for n in range(25))
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []


@contract("consume.batch_fails_by_message", "BatchFailed fails the messages it names; the others are done.")
async def test_batch_failed(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as sender:
        await sender.send_many(queue, [b"%d" % n for n in range(10)])
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue, batch=10, retry=AT_ONCE)
    async def handle(batch: list[bytes]) -> None:
        for body in batch:
            seen(body)
        if failed := {i: ValueError("odd") for i, body in enumerate(batch) if int(body) % 2}:
            raise BatchFailed(failed)

    async with bus.running():
        await until(lambda: bus.counts.get("dead_lettered") == 5, "the odd ones are dead letters")
        await until(lambda: bus.counts["handled"] == 5, "the even ones are handled")
        found = bodies(await letters(bus, queue, 5))
    assert sorted(found) == [b"1", b"3", b"5", b"7", b"9"]
    assert all(seen.all.count(b"%d" % n) == (3 if n % 2 else 1) for n in range(10))


@contract("consume.receive_keeps_its_limit", "One receive of the SPI returns the number asked for at most.")
async def test_limit(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        await bus.send_many(queue, [b"%d" % n for n in range(25)])
        async with subscribed(bus, queue, prefetch=100) as subscription:
            found: list[Delivery[bytes]] = []

            async def more() -> int:
                got = await subscription.receive(10, 1.0)
                assert len(got) <= 10
                found.extend(got)
                return len(found)

            await eventually(more, lambda count: count >= 25, "25 received")
            begun = time.monotonic()
            assert list(await subscription.receive(10, 0.2)) == []
            assert 0.19 < time.monotonic() - begun < SOON
    assert len({d.message.id for d in found}) == 25


@contract("consume.receive_may_be_cancelled", "A cancelled receive of the SPI loses nothing that had arrived.")
async def test_cancelled_receive(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus, subscribed(bus, queue, prefetch=100) as subscription:
        for n in range(10):
            task = asyncio.create_task(subscription.receive(10, SOON))
            await asyncio.sleep(0)
            await bus.send(queue, b"%d" % n)
            task.cancel()
            await asyncio.wait([task])
            got = list(task.result()) if not task.cancelled() else await receive(subscription)
            assert bodies_raw(got) == [b"%d" % n]


def bodies_raw(deliveries: list[Delivery[bytes]]) -> list[bytes]:
    """Of the SPI's deliveries: nobody has decoded them."""
    return [delivery.message.body for delivery in deliveries]


@contract("consume.backlog_is_told", "The backlog counts what waits and what is held, exactly or told as an estimate.")
async def test_backlog(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        await bus.send_many(queue, [b"x"] * 5)
        backlog = await eventually(lambda: bus.backlog(queue), lambda b: b.ready == 5 or not b.exact, "5 ready")
        assert backlog.ready >= 0
        async with bus.receiver(queue, prefetch=2) as receiver:
            held = await take(receiver, 2)
            backlog = await eventually(lambda: bus.backlog(queue), lambda b: b.ready == 3 or not b.exact, "3 ready")
            assert backlog.in_flight in (2, None) or not backlog.exact
            for delivery in held:
                await delivery.ack()
        await leftover(bus, queue)
        await eventually(lambda: bus.backlog(queue), lambda b: b.ready == 0 or not b.exact, "nothing is left")


@contract("consume.foreign_ids_and_bodies", "A message sent through the SPI with nothing but a body is delivered.")
async def test_bare_message(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        assert list(await bus.adapter.send([Outgoing(queue, Message(b"bare", id="only-id"))], SOON)) == [None]
        (delivery,) = await leftover(bus, queue)
    assert (delivery.body, delivery.message.id, delivery.attempt) == (b"bare", "only-id", 1)
