"""Throughput: sends by batch, sends and receipts by the size of a body."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from time import perf_counter

from unibus import Queue

from ..lab import Lab, short
from ..model import Found, Probe, Row

CHAPTER = "throughput"
BODY = 256
BATCH = 100
MOST = 20_000  # messages of one stretch: what is sent is also consumed

BATCHES = Row(
    id="throughput.batch",
    chapter=CHAPTER,
    title="sends, by batch",
    how="`send_many` with so many bodies of 256 bytes, one call after the other, each until all are confirmed. A batch of 1 is a "
    "round trip a message. The value compared is that of the largest batch.",
    unit="messages/s",
    better="more",
    axes=("messages a call", "messages a second"),
    logarithmic=True,
)
SEND = Row(
    id="throughput.send_size",
    chapter=CHAPTER,
    title="sends, by size of body",
    how="`send_many` of 100, or of as many as make a megabyte, one call after the other, each until all are confirmed. The value "
    "compared is that of the smallest body.",
    unit="messages/s",
    better="more",
    axes=("bytes of a body", "messages a second"),
    logarithmic=True,
)
CONSUME = Row(
    id="throughput.consume_size",
    chapter=CHAPTER,
    title="receipts, by size of body",
    how="One consumer with 100 slots and an empty handler empties a queue that was filled before, from its start until the last handler "
    "has begun. With few messages the start weighs. The value compared is that of the smallest body.",
    unit="messages/s",
    better="more",
    axes=("bytes of a body", "messages a second"),
    logarithmic=True,
)


async def by_batch(lab: Lab) -> Mapping[str, Found]:
    queue, points = lab.queue("batch"), []
    async with lab.bus(queue) as bus:
        await bus.send_many(queue, [b"warm"] * 10)
        for batch in lab.sizes.batches:
            bodies, sent, begun = [b"x" * BODY] * batch, 0, perf_counter()
            while sent < MOST and (sent == 0 or perf_counter() - begun < lab.sizes.flow_seconds):
                await bus.send_many(queue, bodies)
                sent += batch
            points.append((batch, sent / (perf_counter() - begun)))
    text = ", ".join(f"{short(rate)}/s by {batch:,}" for batch, rate in (points[0], points[-1]))
    return {BATCHES.id: Found(text=text, value=points[-1][1], points={"sent": points})}


async def by_size(lab: Lab) -> Mapping[str, Found]:
    sending, receiving = [], []
    for size in lab.sizes.bodies:
        if (limit := lab.known.max_body) is not None and size > limit:
            continue
        queue = lab.queue("size")
        async with lab.bus(queue) as bus:
            bodies = [b"x" * size] * max(1, min(BATCH, 1_000_000 // size))
            await bus.send(queue, bodies[0])
            sent, begun = 0, perf_counter()
            while sent < MOST and (sent == 0 or perf_counter() - begun < lab.sizes.flow_seconds):
                await bus.send_many(queue, bodies)
                sent += len(bodies)
            sending.append((size, sent / (perf_counter() - begun)))
        receiving.append((size, await _consume(lab, queue, sent + 1)))
    note = ", ".join(f"{short(rate)}/s of {size:,} bytes" for size, rate in sending[1:])
    also = ", ".join(f"{short(rate)}/s of {size:,} bytes" for size, rate in receiving[1:])
    first = sending[0][0]
    return {
        SEND.id: Found(
            text=f"{short(sending[0][1])}/s of {first} bytes", value=sending[0][1], note=note, points={"sent": sending}
        ),
        CONSUME.id: Found(
            text=f"{short(receiving[0][1])}/s of {first} bytes",
            value=receiving[0][1],
            note=also,
            points={"received": receiving},
        ),
    }


async def _consume(lab: Lab, queue: Queue[bytes], count: int) -> float:
    bus, all_here, left = lab.bus(), asyncio.Event(), count

    @bus.consumer(queue, concurrency=100)
    async def handle(body: bytes) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            all_here.set()

    async with bus:
        begun = perf_counter()
        async with bus.running():
            await asyncio.wait_for(all_here.wait(), 40)
            took = perf_counter() - begun
    return count / took


PROBES = (
    Probe(name="batch", rows=(BATCHES,), measure=by_batch),
    Probe(name="size", rows=(SEND, CONSUME), measure=by_size, limit=180.0),
)
