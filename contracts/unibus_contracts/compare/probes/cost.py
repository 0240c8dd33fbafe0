"""What a consumer costs that has nothing to do."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from time import perf_counter, process_time
from typing import Any

from unibus.adapter import Source, Subscription
from unibus.delivery import Delivery

from ..lab import Lab, short
from ..model import Found, Probe, Row

CHAPTER = "cost"

CPU = Row(
    id="cost.cpu",
    chapter=CHAPTER,
    title="CPU of an idle consumer",
    how="A consumer of 10 slots on an empty queue, after it has received one message: CPU time of its whole process for each second that passes. The broker's own "
    "is not counted.",
    touches=("queue",),
    unit="ms/s",
    better="less",
)
ASKS = Row(
    id="cost.asks",
    chapter=CHAPTER,
    title="requests for messages of an idle consumer",
    how="How often the core asks the adapter for messages in that time. Where the broker is polled, each is a request to it at least (on a service that bills "
    "requests: billed); where the broker pushes, it is a look into this process.",
    touches=("queue",),
    unit="a minute",
    better="less",
)


class _Counted:
    """A subscription whose receives are counted."""

    def __init__(self, inner: Subscription, asks: list[float]) -> None:
        self._inner = inner
        self._asks = asks

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        self._asks.append(perf_counter())
        return await self._inner.receive(limit, timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


async def measure(lab: Lab) -> Mapping[str, Found]:
    queue, seen = lab.queue("idle"), asyncio.Event()
    asks: list[float] = []
    bus = lab.bus()

    @bus.consumer(queue, concurrency=10)
    async def handle(body: bytes) -> None:
        seen.set()

    async with bus:
        adapter = bus.adapter
        subscribe = adapter.subscribe

        async def counted(source: Source) -> Any:
            return _Counted(await subscribe(source), asks)

        object.__setattr__(adapter, "subscribe", counted)
        async with bus.running():
            await bus.send(queue, b"x")
            await asyncio.wait_for(seen.wait(), 20)
            await asyncio.sleep(lab.sizes.idle_seconds / 4)  # until what the message has set off is done
            asks.clear()
            begun, cpu = perf_counter(), process_time()
            await asyncio.sleep(lab.sizes.idle_seconds)
            passed, spent = perf_counter() - begun, process_time() - cpu
            count = len(asks)
    each = spent / passed * 1000
    rate = count / passed * 60
    return {
        CPU.id: Found(text=f"{short(each)} ms a second", value=each),
        ASKS.id: Found(text=f"{count} in {short(passed)} s" + ("" if count else ": one wait was longer"), value=rate),
    }


PROBES = (Probe(name="idle", rows=(CPU, ASKS), measure=measure, limit=90.0),)
