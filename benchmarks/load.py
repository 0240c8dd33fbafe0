"""What every contestant sends, and how."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

from benchmarks.watch import Watch


def body(size: int) -> bytes:
    """JSON of exactly so many bytes."""
    start, line, end = b'{"order":"4711","lines":[', b'{"sku":"a","n":1},', b'{"end":0}]}'
    return (start + line * ((size - len(start) - len(end)) // len(line)) + end).ljust(size, b" ")


BODY = body(256)
IN_FLIGHT = 500
STEP = 10  # handlings from one note of a worker to the next
TENANT = (("tenant", "acme"),)  # one header of the user's own, where a case has it


class Miscount(AssertionError):
    """Messages are missing or came twice: then no figure of this run means anything."""


async def flood(send: Callable[[], Awaitable[object]], messages: int, in_flight: int = IN_FLIGHT) -> None:
    """`in_flight` callers, each awaiting its own message before it sends the next one."""

    async def work(share: int) -> None:
        for _ in range(share):
            await send()

    each, more = divmod(messages, in_flight)
    async with asyncio.TaskGroup() as tasks:
        for i in range(min(in_flight, messages)):
            tasks.create_task(work(each + (i < more)))


class Handled:
    """The trivial handler, and when all have come. With the first one `watch` begins anew: joining a group is no throughput."""

    def __init__(self, messages: int, watch: Watch) -> None:
        self.count = 0
        self.all = asyncio.Event()
        self._messages = messages
        self._watch = watch

    def handle(
        self, body: bytes, message_id: str | None, content_type: str | None, timestamp: Any, headers: Mapping[str, Any]
    ) -> None:
        if not self.count:
            self._watch.restart()
        self.count += 1

    def settled(self) -> None:
        """After the ack is on its way, where the contestant sends it itself: that may wait for room in a queue."""
        self._messages -= 1
        if not self._messages:
            self.all.set()


@asynccontextmanager
async def busy(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """These run meanwhile, and are cancelled at the end; should one fail, so does all."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(each) for each in work]
        yield
        for task in running:
            task.cancel()


async def round_trips(ask: Callable[[], Any], count: int, watch: Watch) -> list[float]:
    """One after the other; the first few warm up."""
    for _ in range(20):
        await ask()
    times = []
    watch.start()
    for _ in range(count):
        begun = perf_counter()
        await ask()
        times.append(perf_counter() - begun)
    watch.stop()
    return times
