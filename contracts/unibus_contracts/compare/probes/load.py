"""Latency against load: of a confirmed send, and from the send to the handler."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping
from time import perf_counter

from unibus import Bus, Queue

from ..lab import Lab, milliseconds, percentile, until
from ..model import Found, Points, Probe, Row

CHAPTER = "latency"
SHARES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
PADDED = 256  # bytes of a body
TOO_MUCH = 0.5  # seconds, p50: it does not keep up
_AXES = ("messages a second", "milliseconds")
_HOW = (
    "Messages of 256 bytes are due at a constant rate, one rate after the other, with one producer and one consumer (20 at "
    "a time) in the same process. Counted from when a message was due, not from when its turn came, so a stall is seen by all that "
    "wait for it. p99.9 only where there were 1,000 messages. It ends with a rate whose p50 is above half a "
    "second. The value compared is p50 at the lightest load."
)

CONFIRM = Row(
    id="latency.confirm",
    chapter=CHAPTER,
    title="confirmed send",
    how="Until `send` returns, which is when the broker has confirmed. " + _HOW,
    unit="ms",
    better="less",
    axes=_AXES,
    logarithmic=True,
)
ARRIVE = Row(
    id="latency.arrive",
    chapter=CHAPTER,
    title="end to end",
    how="Until the handler begins. " + _HOW,
    unit="ms",
    better="less",
    axes=_AXES,
    logarithmic=True,
)


async def measure(lab: Lab) -> Mapping[str, Found]:
    queue = lab.queue("load")
    confirmed: dict[int, list[float]] = {}
    arrived: dict[int, list[float]] = {}
    async with lab.bus(queue) as sender:
        bus = lab.bus()

        @bus.consumer(queue, concurrency=20)
        async def handle(body: bytes) -> None:
            rate, due = struct.unpack_from("!id", body)
            arrived[rate].append(perf_counter() - due)

        async with bus.running():
            arrived[0] = []
            for _ in range(20):  # connections, code and caches warm up
                await sender.send(queue, _body(0, perf_counter()))
            for rate in lab.sizes.loads:
                arrived[rate] = []
                confirmed[rate] = await _offer(sender, queue, rate, lab.sizes.load_seconds)
                await _all(arrived[rate], len(confirmed[rate]))
                if percentile(arrived[rate], 0.5) > TOO_MUCH:
                    break  # more would only tell how long its backlog is
    return {CONFIRM.id: _found(confirmed), ARRIVE.id: _found({r: v for r, v in arrived.items() if r})}


def _body(rate: int, due: float) -> bytes:
    return struct.pack("!id", rate, due).ljust(PADDED, b"x")


async def _offer(sender: Bus, queue: Queue[bytes], rate: int, seconds: float) -> list[float]:
    """`rate` messages a second, whether or not those before have been confirmed; how long each took."""
    taken: list[float] = []

    async def one(due: float) -> None:
        await sender.send(queue, _body(rate, due))
        taken.append(perf_counter() - due)

    begun = perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for n in range(max(1, int(rate * seconds))):
            due = begun + n / rate
            if (wait := due - perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.create_task(one(due))
    return taken


async def _all(arrived: list[float], count: int) -> None:
    await until(lambda: len(arrived) >= count, lambda: f"{len(arrived)} of {count} arrived", 60)


def _found(samples: Mapping[int, list[float]]) -> Found:
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in SHARES}
    told = []
    for rate, times in samples.items():
        said = []
        for name, share in SHARES.items():
            if share > 0.99 and len(times) < 1000:
                continue
            value = percentile(times, share)
            points[name].append((rate, value * 1000))
            said.append(f"{name} {milliseconds(value)}")
        told.append(f"{rate}/s: {', '.join(said)}")
    lightest = points["p50"][0][1]
    curves: Points = {name: curve for name, curve in points.items() if curve}
    return Found(text=f"{told[0]}", value=lightest, note="; ".join(told[1:]), points=curves)


PROBES = (Probe(name="load", rows=(CONFIRM, ARRIVE), measure=measure, limit=240.0),)
