"""Shutdown: what runs is finished, what was not begun is given back at once, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
import time
from contextlib import AsyncExitStack

import pytest

from unibus import Bus, Closed, Delivery, LeaseLost
from unibus_contracts.contract import contract
from unibus_contracts.kit import FACTOR, SOON, Kit, Seen, bodies, leftover, letters, take, until


@contract("shutdown.in_flight_completes", "A handler that runs at shutdown is finished and acked; no other one begins.")
async def test_in_flight(kit: Kit) -> None:
    await shut_down_with_one_running(kit, others_wait=True)


@contract(
    "shutdown.rest_is_free_at_once",
    "What a closing consumer had not begun is with others while its last handler runs.",
    needs="share",
)
async def test_rest(kit: Kit) -> None:
    await shut_down_with_one_running(kit, others_wait=False)


async def shut_down_with_one_running(kit: Kit, *, others_wait: bool) -> None:
    """Five messages, one of them begun. The rest is taken by another consumer: before the handler ends, or afterwards."""
    queue, gate = kit.queue(), asyncio.Event()
    bus, seen = kit.bus(), Seen[str]()

    @bus.consumer(queue, concurrency=1, prefetch=5)
    async def handle(body: bytes) -> None:
        seen(f"begun {body.decode()}")
        await gate.wait()
        seen(f"done {body.decode()}")

    stack = AsyncExitStack()
    await stack.enter_async_context(bus.running())
    await bus.send_many(queue, [b"%d" % n for n in range(5)])
    await seen.reach(1)
    stopping = asyncio.create_task(stack.aclose())
    async with kit.bus(queue) as other, other.receiver(queue, prefetch=10) as receiver:
        # Given back while the handler still runs; or, where others have to wait, when it has ended.
        early = await receiver.receive(timeout=2) if others_wait else None
        rest = [early] if early is not None else [] if others_wait else await take(receiver, 4)
        assert len(seen) == 1
        gate.set()
        await stopping
        rest += await take(receiver, 4 - len(rest))
        for delivery in rest:
            assert delivery.attempt == 1
            await delivery.ack()
    assert len(seen) == 2
    assert seen.all[1] == seen.all[0].replace("begun", "done")
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []


@contract("shutdown.deadline_then_return", "A handler that does not end in time is cancelled, its message given back.")
async def test_deadline(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(shutdown_timeout=0.5), Seen[str]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen("begun")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen("cancelled")
            raise

    async with bus.running():
        await bus.send(queue, b"x")
        await seen.reach(1)
        begun = time.monotonic()
    assert 0.45 < time.monotonic() - begun < SOON
    assert seen.all == ["begun", "cancelled"]
    async with kit.bus(queue) as other, other.receiver(queue) as receiver:
        (delivery,) = await take(receiver)
        assert (delivery.body, delivery.attempt) == (b"x", 1), "being cut off is no failed attempt"
        await delivery.ack()
        assert await letters(other, queue, 0) == []


@contract("shutdown.prefetched_returned_at_once", "What a closing receiver has buffered is with others in no time.")
async def test_prefetched(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus, kit.bus(queue) as other:
        await bus.send_many(queue, [b"%d" % n for n in range(10)])
        async with bus.receiver(queue, prefetch=10) as receiver:
            await take(receiver)  # the others are buffered by now, or on their way
        begun = time.monotonic()
        async with other.receiver(queue, prefetch=10) as receiver:
            for delivery in await take(receiver, 10):
                await delivery.ack()
        assert time.monotonic() - begun < 5 * FACTOR, "far below any lease"
        assert await leftover(other, queue) == []


@contract(
    "shutdown.restarts_kill_no_message", "Six opens and closes of a consumer with a full prefetch dead-letter nothing."
)
async def test_restarts(kit: Kit) -> None:
    queue = kit.queue()
    sent = [b"%d" % n for n in range(20)]
    async with kit.bus(queue) as sender:
        await sender.send_many(queue, sent)
    seen = Seen[int]()

    def consumer() -> Bus:
        bus = kit.bus(shutdown_timeout=0.1)

        @bus.consumer(queue, concurrency=1, prefetch=20)
        async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
            seen(delivery.attempt)
            await asyncio.Event().wait()

        return bus

    for opened in range(1, 7):
        async with consumer().running():
            await seen.reach(opened)
    assert seen.all == [1] * 6
    async with kit.bus(queue) as reader:
        found: list[Delivery[bytes]] = []
        async with reader.receiver(queue, prefetch=20) as receiver:
            # One by one: a broker that counts may have made them suspects, and those come alone.
            while len(found) < 20:
                found += await take(receiver)
                await found[-1].ack()
        assert {delivery.attempt for delivery in found} == {1}
        assert sorted(bodies(found)) == sorted(sent)
        assert await letters(reader, queue, 0) == []
        assert await leftover(reader, queue) == []


@contract("shutdown.reopened_receivers", "Six receivers that take everything and give it back dead-letter nothing.")
async def test_reopened(kit: Kit) -> None:
    queue = kit.queue()
    sent = [b"%d" % n for n in range(10)]
    async with kit.bus(queue) as bus:
        await bus.send_many(queue, sent)
        for _ in range(6):
            async with bus.receiver(queue, prefetch=10) as receiver:
                (delivery,) = await take(receiver)  # the others are buffered
                assert delivery.attempt == 1
        found: list[Delivery[bytes]] = []
        async with bus.receiver(queue, prefetch=10) as receiver:
            while len(found) < 10:
                found += await take(receiver)
                await found[-1].ack()
        assert sorted(bodies(found)) == sorted(sent)
        assert await letters(bus, queue, 0) == []
        assert await leftover(bus, queue) == []


@contract("shutdown.held_by_hand", "What a receiver that ends still held goes back, uncounted, however often.")
async def test_held_by_hand(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        await bus.send(queue, b"x")
        for _ in range(8):
            async with bus.receiver(queue) as receiver:
                (delivery,) = await take(receiver)
                assert delivery.attempt == 1
            with pytest.raises(LeaseLost):
                await delivery.ack()
        assert bodies(await leftover(bus, queue)) == [b"x"]
        assert await letters(bus, queue, 0) == []


@contract("shutdown.sends_are_decided", "A send that is under way at close arrives, or raises Closed; never neither.")
async def test_sends(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        tasks = [asyncio.create_task(bus.send(queue, b"%d" % n)) for n in range(50)]
        await asyncio.sleep(0)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    sent = {b"%d" % n for n, result in enumerate(results) if isinstance(result, str)}
    assert all(isinstance(result, str | Closed) for result in results)
    async with kit.bus(queue) as reader:
        found = bodies(await leftover(reader, queue))
    assert sent <= set(found), "a send returned, and its message is not there"
    assert len(found) == len(set(found))


@contract("shutdown.leaves_nothing_behind", "After close, no task and no thread of the bus is left.")
async def test_no_leaks(kit: Kit) -> None:
    queue, topic = kit.queue(), kit.topic()
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue)
    def in_thread(body: bytes) -> None:
        seen(body)

    @bus.subscriber(topic, group="g")
    async def handle(body: bytes) -> None:
        seen(body)

    async with bus.running():
        await bus.send(queue, b"x")
        await bus.publish(topic, b"y")
        await seen.reach(2)
    await until(lambda: asyncio.all_tasks() <= tasks, "no task is left", timeout=2 * FACTOR)

    def ours() -> set[threading.Thread]:
        # The event loop's own pool of threads is not the bus's to end.
        return {thread for thread in set(threading.enumerate()) - threads if not thread.name.startswith("asyncio_")}

    await until(lambda: not ours(), "no thread is left", timeout=2 * FACTOR)


@contract("shutdown.restartable", "A bus that was closed can be opened and run again.")
async def test_restart(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen(body)

    for n in range(3):
        async with bus.running():
            await bus.send(queue, b"%d" % n)
            await seen.reach(n + 1)
        with pytest.raises(Closed):
            await bus.send(queue, b"between")
    assert seen.all == [b"0", b"1", b"2"]


@contract("shutdown.concurrent_closes", "Ten closes at once all return, and so does one more.")
async def test_concurrent(kit: Kit) -> None:
    queue, gate = kit.queue(), asyncio.Event()
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen(body)
        await gate.wait()
        seen(body)

    async with bus.running():
        await bus.send(queue, b"x")
        await seen.reach(1)
        closes = [asyncio.create_task(bus.close()) for _ in range(10)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*closes)
        await bus.close()
    assert seen.all == [b"x", b"x"], "closed before its handler had ended"
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []


@contract("shutdown.error_inside_closes", "An error inside the block closes the bus in order, and comes out of it.")
async def test_error(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen(body)

    async def work() -> None:
        async with bus.running():
            await bus.send(queue, b"x")
            await seen.reach(1)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await work()
    with pytest.raises(Closed):
        await bus.send(queue, b"after")
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []


@contract("shutdown.receiver_ends", "An iteration over a receiver ends when its bus is closed; it does not hang.")
async def test_receiver_ends(kit: Kit) -> None:
    queue = kit.queue()
    opened = asyncio.Event()
    stack = AsyncExitStack()
    bus = await stack.enter_async_context(kit.bus(queue))

    async def iterate() -> None:
        async with bus.receiver(queue) as receiver:
            opened.set()
            async for delivery in receiver:
                await delivery.ack()

    task = asyncio.create_task(iterate())
    await opened.wait()
    begun = time.monotonic()
    await stack.aclose()
    done, _ = await asyncio.wait([task], timeout=SOON)
    assert done, "still iterating after the bus was closed"
    assert time.monotonic() - begun < SOON, "with nothing to do, closing took too long"
    assert task.exception() is None or isinstance(task.exception(), Closed)


@contract(
    "shutdown.sigterm", "On SIGTERM a process finishes the running handler, gives back the rest, and exits with 0."
)
async def test_sigterm(kit: Kit) -> None:
    name = kit.harness.channel("q")
    async with kit.bus(kit.named_queue(name)):
        pass
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "unibus_contracts.child", kit.harness.prefix, name),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(kit.where().encode() + b"\n")  # not as an argument: everybody can read those
        await child.stdin.drain()
        async with asyncio.timeout(2 * SOON):  # an interpreter starts, and on a busy machine takes long
            begun = json.loads(await child.stdout.readline())
        child.send_signal(signal.SIGTERM)
        child.stdin.write(b"sent\n")
        await child.stdin.drain()
        async with asyncio.timeout(2 * SOON):
            story = json.loads(await child.stdout.readline())
        async with asyncio.timeout(SOON):
            status = await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
        child._transport.close()  # type: ignore[attr-defined] # pipes of a child have no public close
    assert begun == {"begun": story["done"][0]}
    assert len(story["done"]) == 1, "a handler began after the signal"
    assert sorted([*story["done"], *story["left"]]) == ["0", "1", "2", "3", "4"]
    assert story["attempts"] == [1] * 4
    assert status == 0
