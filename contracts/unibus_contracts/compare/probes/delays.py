"""How exact a delay is."""

from __future__ import annotations

from collections.abc import Mapping
from time import time

from ..lab import Lab, milliseconds, until
from ..model import Declared, Found, Probe, Row

CHAPTER = "delays"

PRECISION = Row(
    id="delays.late",
    chapter=CHAPTER,
    title="a delayed message is late by",
    how="Messages are sent with each delay, all of which the bus names in its settings, while a consumer runs; from when each was due to when its handler "
    "began. The value compared is the largest of all. A negative one would be a broken promise.",
    feature="delay",
    touches=("delayed",),
    unit="ms",
    better="less",
    axes=("seconds of delay", "milliseconds late"),
)
LONGEST = Row(
    id="delays.longest",
    chapter=CHAPTER,
    title="delays, and the longest of them",
    how="Declared by the adapter, not measured.",
    feature="delay",
    unit="s",
    touches=("delayed", "retry"),
)


async def precision(lab: Lab) -> Mapping[str, Found]:
    delays, repeats = lab.sizes.delays, lab.sizes.repeats
    queue = lab.queue("delayed", delayed=True)
    due: dict[bytes, tuple[float, float]] = {}
    late: dict[float, list[float]] = {delay: [] for delay in delays}
    bus = lab.bus(delays=list(delays))

    @bus.consumer(queue, concurrency=20)
    async def handle(body: bytes) -> None:
        at, delay = due[body]
        late[delay].append(time() - at)

    total = len(delays) * repeats
    async with lab.bus(queue, delays=list(delays)) as sender, bus.running():
        for number in range(repeats):
            for delay in delays:
                body = b"%g %d" % (delay, number)
                due[body] = time() + delay, delay
                await sender.send(queue, body, delay=delay)
        await until(
            lambda: sum(map(len, late.values())) >= total,
            lambda: f"{sum(map(len, late.values()))} of {total} arrived",
            max(delays) * 2 + 20,
        )
    worst = {delay: max(times) for delay, times in late.items()}
    early = sum(value < 0 for times in late.values() for value in times)
    note = ", ".join(f"{delay:g} s: {milliseconds(value)}" for delay, value in worst.items())
    value = max(worst.values()) * 1000
    return {
        PRECISION.id: Found(
            text=f"{milliseconds(value / 1000)} at most" + (f"; {early} too early" if early else ""),
            value=value,
            note=note,
            points={"most": [(delay, value * 1000) for delay, value in worst.items()]},
        )
    }


PROBES = (
    Probe(name="delays", rows=(PRECISION,), measure=precision, needs="delay", waits=True, limit=120.0),
    Declared(row=LONGEST),
)
