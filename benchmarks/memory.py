"""The core path alone: send -> handler -> ack on the memory adapter, 500 sends in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from benchmarks.cases import OURS, Case
from benchmarks.flows import rotated
from benchmarks.load import BODY, Miscount, flood
from benchmarks.watch import Profiles, Watch
from unibus import Bus, Queue

Loop = Callable[[], asyncio.AbstractEventLoop]
ORDERS = Queue("orders", bytes)
DEFAULTS = "memory: send, handle, ack; default settings"
PREFETCH = "memory: send, handle, ack; prefetch=1000"


def run(rounds: int, messages: int, profiles: Profiles) -> list[Case]:
    found = []
    loops = {OURS: None, **({} if profiles else _uvloop())}
    for name, prefetch in ((DEFAULTS, None), (PREFETCH, 1000)):
        case = Case(name)
        for loop in loops.values():
            _run(_once(max(1000, messages // 10), prefetch, Watch()), loop)  # the first one pays for imports and caches
        for number in range(rounds):
            for contestant in rotated(list(loops), number):
                watch = Watch(profiles.of(name, messages))
                _run(_once(messages, prefetch, watch), loops[contestant])
                case.add(contestant, watch.figures(messages))
        case.samples = {contestant: case.samples[contestant] for contestant in loops}
        found.append(case)
    return found


def _run(work: Coroutine[Any, Any, None], loop: Loop | None) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(work)


def _uvloop() -> dict[str, Loop]:
    """The same on its event loop, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return {}
    return {f"{OURS}, uvloop": uvloop.new_event_loop}


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
