"""Requests and their replies."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from unibus import Queue

from ..lab import Lab, milliseconds, percentile, timed, until
from ..model import Found, Probe, Row

CHAPTER = "requests"

ROUND_TRIP = Row(
    id="requests.round_trip",
    chapter=CHAPTER,
    title="request and reply",
    how="Requests of 256 bytes one after the other, answered at once by a responder in the same process; p50 of all that fit into the time of a "
    "throughput stretch, ten at least.",
    feature="reply",
    touches=("reply",),
    unit="ms",
    better="less",
)
GONE = Row(
    id="requests.late",
    chapter=CHAPTER,
    title="a reply to a process that has gone",
    how="A request is answered after the bus that asked was closed in order, long before its deadline. Told: whether who replies gets an error, which is counted, or "
    "the broker takes the reply, which nobody will read.",
    feature="inbox",
    touches=("reply",),
)


async def measure(lab: Lab) -> Mapping[str, Found]:
    queue: Queue[bytes] = Queue(lab.name("ask"), bytes, reply=bytes)
    bus = lab.bus()
    times: list[float] = []

    @bus.responder(queue)
    async def answer(body: bytes) -> bytes:
        return body

    async with bus.running():
        for _ in range(3):
            await bus.request(queue, b"warm")
        while len(times) < 10 or sum(times) < lab.sizes.flow_seconds:
            times.append((await timed(bus.request(queue, b"x" * 256)))[1])
    middle = percentile(times, 0.5)
    note = f"p99 {milliseconds(percentile(times, 0.99))}, of {len(times)}"
    return {ROUND_TRIP.id: Found(text=f"p50 {milliseconds(middle)}", value=middle * 1000, note=note)}


async def gone(lab: Lab) -> Mapping[str, Found]:
    queue: Queue[bytes] = Queue(lab.name("gone"), bytes, reply=bytes)
    asked, closed = asyncio.Event(), asyncio.Event()
    bus = lab.bus()

    @bus.responder(queue)
    async def answer(body: bytes) -> bytes:
        asked.set()
        await closed.wait()
        return body

    async with bus.running():
        async with lab.bus(queue) as requester, asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(requester.request(queue, b"x", timeout=60))
            await asyncio.wait_for(asked.wait(), 20)
            asking.cancel()
        closed.set()
        done = {"replied", "replies_failed"}
        await until(lambda: done & bus.counts.keys(), lambda: "the request was not answered", 20)
        taken = "replied" in bus.counts
    text = "accepted, and nobody reads it" if taken else "an error for who replies, counted"
    return {GONE.id: Found(text=text)}


PROBES = (
    Probe(name="requests", rows=(ROUND_TRIP,), measure=measure, needs="reply"),
    Probe(name="late reply", rows=(GONE,), measure=gone, needs="reply"),
)
