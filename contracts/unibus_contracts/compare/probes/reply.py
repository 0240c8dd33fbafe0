"""Requests and their replies."""

from __future__ import annotations

from collections.abc import Mapping

from unibus import Queue

from ..lab import Lab, milliseconds, percentile, timed
from ..model import Declared, Found, Probe, Row

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
LATE = Row(
    id="requests.late",
    chapter=CHAPTER,
    title="a reply to a process that has gone",
    how="Declared by the adapter, not measured. Native: it is an error for who replies, and is kept nowhere.",
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


PROBES = (Probe(name="requests", rows=(ROUND_TRIP,), measure=measure, needs="reply"), Declared(row=LATE))
