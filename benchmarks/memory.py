"""The core path alone: send -> handler -> ack on the memory adapter, 500 sends in flight."""

from __future__ import annotations

import asyncio
from functools import partial

from benchmarks.cases import Case
from benchmarks.load import BODY, Miscount, flood
from benchmarks.watch import Profiles, Watch
from unibus import Bus, Queue

NAME = "unibus"
ORDERS = Queue("orders", bytes)
DEFAULTS = "memory: send, handle, ack; default settings"
PREFETCH = "memory: send, handle, ack; prefetch=1000"


def run(rounds: int, messages: int, profiles: Profiles) -> list[Case]:
    found = []
    for name, prefetch in ((DEFAULTS, None), (PREFETCH, 1000)):
        case = Case(name)
        asyncio.run(_once(max(1000, messages // 10), prefetch, Watch()))  # the first one pays for imports and caches
        for _ in range(rounds):
            watch = Watch(profiles.of(name, messages))
            asyncio.run(_once(messages, prefetch, watch))
            case.add(NAME, watch.figures(messages))
        found.append(case)
    return found


async def _once(messages: int, prefetch: int | None, watch: Watch) -> None:
    bus = Bus("memory://", service="bench", config=False, environ={})
    handled = 0
    done = asyncio.Event()

    @bus.consumer(ORDERS, prefetch=prefetch)
    async def handle(body: bytes) -> None:  # noqa: ARG001  # every handler takes a body
        nonlocal handled
        handled += 1
        if handled == messages:
            done.set()

    async with bus:
        async with bus.running():
            watch.start()
            await flood(partial(bus.send, ORDERS, BODY), messages)
            await done.wait()
            watch.stop()
        left = (await bus.backlog(ORDERS)).ready
        if handled != messages or left:
            raise Miscount(f"memory: {messages} sent, {handled} handled, {left} left")
