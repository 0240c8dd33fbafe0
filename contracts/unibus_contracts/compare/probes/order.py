"""Order: by key with competing consumers, and while a message of the key is being retried."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

from unibus import Bus, Delivery, Queue, Retry, RetryPolicy

from ..lab import Lab, until
from ..model import Found, Probe, Row

CHAPTER = "order"
KEYS, EACH = 8, 30

COMPETING = Row(
    id="order.competing",
    chapter=CHAPTER,
    title="order by key, with competing consumers",
    how="Two consumers of 8 slots each empty a queue that is declared `ordered`, with 30 messages of each of 8 keys. Counted: handlers that "
    "began before an earlier message of their key, or while one of it ran. Beside it the same on a queue that is not ordered.",
    feature="order",
    touches=("ordered",),
    unit="out of order",
    better="less",
)
RETRYING = Row(
    id="order.retrying",
    chapter=CHAPTER,
    title="order while a message is retried",
    how="On an ordered queue wait three messages of key a and behind them three of key b. The first one fails once, with a retry after three seconds. "
    "Told: whether those of a kept their order, and whether those of b waited for the retry.",
    feature="order",
    touches=("ordered", "retry"),
)


class _Log:
    def __init__(self) -> None:
        self.count = self.wrong = 0
        self._last: dict[str, int] = {}
        self._inside: dict[str, int] = {}

    async def handle(self, key: str, number: int) -> None:
        self.wrong += number < self._last.get(key, -1) or bool(self._inside.get(key))
        self._last[key] = max(number, self._last.get(key, -1))
        self._inside[key] = self._inside.get(key, 0) + 1
        await asyncio.sleep(0.001 * (number % 3))  # so that later ones can overtake
        self._inside[key] -= 1
        self.count += 1


async def _inversions(lab: Lab, queue: Queue[bytes]) -> int:
    seen, total = _Log(), KEYS * EACH

    def member() -> Bus:
        bus = lab.bus()

        @bus.consumer(queue, concurrency=8)
        async def handle(body: bytes, delivery: Delivery[Any]) -> None:
            await seen.handle(delivery.message.key or "", int(body))

        return bus

    async with lab.bus(queue) as sender, AsyncExitStack() as stack:
        numbers = iter(range(total))
        await sender.send_many(
            queue, [b"%d" % (n // KEYS) for n in range(total)], key=lambda _: f"k{next(numbers) % KEYS}"
        )
        await asyncio.gather(*(stack.enter_async_context(bus.running()) for bus in (member(), member())))
        await until(lambda: seen.count >= total, lambda: f"{seen.count} of {total} handled", 40)
    return seen.wrong


async def competing(lab: Lab) -> Mapping[str, Found]:
    total = KEYS * EACH
    wrong = await _inversions(lab, lab.queue("ordered", ordered=True))
    loose = await _inversions(lab, lab.queue("loose"))
    text = f"{wrong} of {total} out of order"
    return {
        COMPETING.id: Found(text=text, value=float(wrong), note=f"on a queue that is not ordered: {loose} of {total}")
    }


async def retrying(lab: Lab) -> Mapping[str, Found]:
    queue, seen = lab.queue("retrying", ordered=True), []
    bus = lab.bus()

    @bus.consumer(queue, concurrency=8, retry=RetryPolicy(max_retries=1, backoff=lab.sizes.backoff))
    async def handle(body: bytes, delivery: Delivery[Any]) -> None:
        if body == b"a0" and delivery.attempt == 1:
            seen.append("fails")
            raise Retry("once")
        seen.append(body.decode())

    async with lab.bus(queue) as sender:
        for body in (b"a0", b"a1", b"a2", b"b0", b"b1", b"b2"):
            await sender.send(queue, body, key=body[:1].decode())
    async with bus.running():
        await until(lambda: len(seen) >= 7, lambda: f"{len(seen)} of 7 runs", 30)
    kept = [name for name in seen if name.startswith("a")] == ["a0", "a1", "a2"]
    waited = seen.index("b2") > seen.index("a0")
    others = "other keys waited too" if waited else "other keys went on"
    return {RETRYING.id: Found(text=f"{'kept' if kept else 'not kept'}; {others}", note=f"handled: {' '.join(seen)}")}


PROBES = (
    Probe(name="competing", rows=(COMPETING,), measure=competing, needs="order", limit=120.0),
    Probe(name="order under retry", rows=(RETRYING,), measure=retrying, needs="order", waits=True),
)
