"""Faults: a link that breaks loses nothing, counts nothing, and is mended without help."""

from __future__ import annotations

import asyncio
import itertools

from unibus import ConnectionLost, Delivery, RetryPolicy, Timeout
from unibus_contracts.contract import contract
from unibus_contracts.kit import LIMIT, SOON, Kit, Seen, eventually, leftover, letters, until

CUTS = 3
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
    bus, seen, sent, over = kit.bus(), Seen[bytes](), Seen[bytes](), asyncio.Event()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen(body)

    async def send(name: int) -> None:
        for n in itertools.count():
            if over.is_set():
                return
            body = b"%d %d" % (name, n)
            await bus.send(queue, body)
            sent(body)
            await asyncio.sleep(0)

    async with bus.running():
        senders = [asyncio.create_task(send(name)) for name in range(5)]
        for _ in range(CUTS):
            await seen.reach(len(seen) + 20)
            async with kit.harness.cut_link():
                await asyncio.sleep(LASTS)
        await seen.reach(len(seen) + 20)
        over.set()
        await asyncio.gather(*senders)
        await until(lambda: set(sent.all) <= set(seen.all), "all that was confirmed is handled", await _late(kit))

        async def well() -> str:
            return (await bus.health()).status

        await eventually(well, lambda status: status == "ok", "it is well again")
    async with kit.bus(queue) as reader:
        assert await letters(reader, queue, 0) == []


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
