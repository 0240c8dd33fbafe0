"""Faults: a link that breaks, or a broker that is restarted, loses nothing, counts nothing, and is got over without help."""

from __future__ import annotations

import asyncio
import itertools
import operator
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial

from unibus import ConnectionLost, Delivery, Queue, RetryPolicy, Timeout
from unibus_contracts.contract import contract
from unibus_contracts.kit import LIMIT, SOON, Kit, Seen, eventually, leftover, letters, until

CUTS = 3
SENDERS = 5
WORK = 0.01  # seconds that a handler has a message, so that some are held when a fault strikes
BURST = 20  # messages that are on their way in as many turns of the loop when a fault strikes
AHEAD = 200  # messages that may wait: what is struck is work, not a heap
LASTS = 0.2  # seconds that a cut lasts


async def _late(kit: Kit) -> float:
    """Seconds until all is there: what was handed out, and never arrived, comes at the end of its lease, and may go that way twice."""
    return SOON + 2 * ((await kit.capabilities()).lease.limit or 0.0)


@contract(
    "fault.cut_loses_nothing",
    "Of what is sent and handled while the links are cut, again and again, nothing is lost, and work goes on by itself.",
    limit=2 * LIMIT,
)
async def test_cut(kit: Kit) -> None:
    queue = kit.queue()
    await _work_through(kit, queue, partial(_cut, kit), CUTS)
    async with kit.bus(queue) as reader:
        assert await letters(reader, queue, 0) == []


@contract(
    "fault.cut_keeps_order",
    "Of one key what was sent first is handled first, also when the links are cut.",
    needs="order",
    limit=2 * LIMIT,
)
async def test_cut_order(kit: Kit) -> None:
    # One cut: what is handed out as often as a message that kills its consumers loses its place, as is said of such.
    handled = await _work_through(kit, kit.queue(ordered=True), partial(_cut, kit, 0.0), 1)
    first: dict[bytes, list[int]] = {}
    for body in dict.fromkeys(handled):
        key, n = body.split()
        first.setdefault(key, []).append(int(n))
    assert len(first) == SENDERS + BURST
    for key, numbers in first.items():
        assert numbers == sorted(numbers), f"of key {key!r} they were first handled in the order {numbers}"


@contract(
    "fault.restart_loses_nothing",
    "Of what is sent and handled while the broker is restarted nothing is lost, and work goes on by itself.",
    limit=3 * LIMIT,
)
async def test_restart(kit: Kit) -> None:
    queue = kit.queue()
    await _work_through(kit, queue, kit.harness.restart_broker, 1)
    async with kit.bus(queue) as reader:
        assert await letters(reader, queue, 0) == []


@contract(
    "fault.restart_keeps_what_waits",
    "What waits in a queue, for its next attempt or as a dead letter is there after the broker was restarted.",
    limit=3 * LIMIT,
)
async def test_restart_keeps(kit: Kit) -> None:
    queue, idle = kit.queue(), kit.queue()
    bus, seen = kit.bus(idle), Seen[tuple[bytes, int]]()

    @bus.consumer(queue, retry=RetryPolicy(max_retries=1, backoff=3, multiplier=1))
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen((body, delivery.attempt))
        if body == b"dead":
            raise ValueError(body)
        if delivery.attempt == 1:
            raise OSError("once")

    async with bus.running():
        await bus.send(queue, b"dead")
        await seen.reach(2)
        await letters(bus, queue)
        for n in range(10):
            await bus.send(idle, b"%d" % n)
        await bus.send(queue, b"later")
        await seen.reach(3)
        await kit.harness.restart_broker()
        await until(lambda: (b"later", 2) in seen.all, "the next attempt", await _late(kit))
        (letter,) = await letters(bus, queue)
        assert letter.body == b"dead"
    async with kit.bus(idle) as reader:
        assert {delivery.body for delivery in await leftover(reader, idle)} == {b"%d" % n for n in range(10)}


async def _cut(kit: Kit, seconds: float = LASTS) -> None:
    async with kit.harness.cut_link():
        await asyncio.sleep(seconds)


async def _work_through(kit: Kit, queue: Queue[bytes], fault: Callable[[], Awaitable[None]], times: int) -> list[bytes]:
    """Send and handle without a pause while the fault strikes again and again: all that was confirmed is handled, and the health is good.

    What was handled, in that order: `<sender> <number>`; of an ordered queue the sender is the key.
    """
    bus, seen, sent, over = kit.bus(), Seen[bytes](), Seen[bytes](), asyncio.Event()
    names = itertools.count()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        await asyncio.sleep(WORK)
        seen(body)

    async def send(name: int, n: int = 0) -> None:
        body = b"%d %d" % (name, n)
        key = str(name) if queue.ordered else None
        await bus.send(queue, body, key=key, timeout=2 * LIMIT)  # a server may take its time to start
        sent(body)

    async def send_on(name: int) -> None:
        for n in itertools.count():
            if over.is_set():
                return
            await send(name, n)
            await until(lambda: over.is_set() or len(sent) < len(seen) + AHEAD, "work keeps up", 2 * LIMIT)

    async def well() -> str:
        return (await bus.health()).status

    async with bus.running():
        senders = [asyncio.create_task(send_on(next(names))) for _ in range(SENDERS)]
        late = await _late(kit)
        for _ in range(times):
            enough = len(seen) + 20
            await until(lambda: len(seen) >= enough, "work goes on", late)  # noqa: B023  # awaited here
            for _ in range(BURST):
                senders.append(asyncio.create_task(send(next(names))))
                await asyncio.sleep(0)
            await fault()
        enough = len(seen) + 20
        await until(lambda: len(seen) >= enough, "work goes on", late)
        over.set()
        await asyncio.gather(*senders)
        await until(lambda: set(sent.all) <= set(seen.all), "all that was confirmed is handled", late)
        await eventually(well, lambda status: status == "ok", "it is well again")
    return seen.all


@contract(
    "fault.cut_counts_no_attempt",
    "A handler under which the links are cut costs its message no attempt.",
    limit=2 * LIMIT,
)
async def test_attempts(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen, gate = kit.bus(), Seen[tuple[bytes, int]](), asyncio.Event()

    @bus.consumer(queue, retry=RetryPolicy(max_retries=0))
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen((body, delivery.attempt))
        if len(seen) == 1:
            await gate.wait()

    async with bus.running():
        await bus.send(queue, b"x")
        await seen.reach(1)
        async with kit.harness.cut_link():
            gate.set()  # so its ack comes too late, or waits for a link
            await asyncio.sleep(LASTS)
        await bus.send(queue, b"y")
        await until(lambda: (b"y", 1) in seen.all, "the next one is handled", await _late(kit))
    assert {attempt for _, attempt in seen.all} == {1}
    async with kit.bus(queue) as reader:
        assert await letters(reader, queue, 0) == []
        assert {(d.body, d.attempt) for d in await leftover(reader, queue)} <= {(b"x", 1)}


@contract(
    "fault.cut_ends_requests",
    "A request under way when the links are cut ends with its reply or an error, and later ones have their replies.",
    needs="reply",
)
async def test_requests(kit: Kit) -> None:
    asks = kit.queue(reply=bytes)
    bus, seen, gate = kit.bus(), Seen[bytes](), asyncio.Event()

    @bus.responder(asks)
    async def answer(body: bytes) -> bytes:
        seen(body)
        if len(seen) == 1:
            await gate.wait()
        return body

    async def ask(body: bytes, timeout: float) -> bytes | None:
        try:
            return bytes(await bus.request(asks, body, timeout=timeout))
        except (ConnectionLost, Timeout):
            return None

    async with bus.running():
        first = asyncio.create_task(ask(b"first", SOON))
        await seen.reach(1)
        async with kit.harness.cut_link():
            await asyncio.sleep(LASTS)
        gate.set()
        assert await first in {b"first", None}
        assert await eventually(lambda: ask(b"next", SOON / 4), bool, "a request is answered again") == b"next"


@contract(
    "fault.cut_repeats_what_runs",
    "Of what a consumer has when the cut of its links is noticed, only what a handler has may be handled again.",
    limit=2 * LIMIT,
)
async def test_repeats(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen, gate = kit.bus(), Seen[bytes](), asyncio.Event()

    @bus.consumer(queue, concurrency=1, prefetch=2 * BURST)  # it goes on receiving: who does nothing notices nothing
    async def handle(body: bytes) -> None:
        seen(body)
        if len(seen) == 1:
            await gate.wait()

    async with bus.running():
        await bus.send_many(queue, bodies := [b"%d" % n for n in range(BURST)])
        await seen.reach(1)
        await _cut(kit)
        gate.set()
        late = await _late(kit)
        await until(lambda: set(seen.all) == set(bodies), "all are handled", late)

        async def left() -> int:
            found = await bus.backlog(queue)
            return (found.ready or 0) + (found.in_flight or 0)

        await eventually(left, operator.not_, "nothing is left", late)
    assert {body for body, times in Counter(seen.all).items() if times > 1} <= {seen.all[0]}


@contract(
    "fault.cut_heals_who_looks",
    "A bus that only looks at its queue is answered after the links were cut, and is well.",
)
async def test_looks(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        await bus.send(queue, b"x")
    async with kit.bus(queue) as bus:

        async def waiting() -> int | None:
            return (await bus.backlog(queue)).ready

        await eventually(waiting, partial(operator.eq, 1), "it is there")
        await _cut(kit)
        await eventually(waiting, partial(operator.eq, 1), "it is still there")
        assert (await bus.health()).status == "ok"
