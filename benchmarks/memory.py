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
ALONE = "asyncio alone"


def run(rounds: int, messages: int, profiles: Profiles) -> list[Case]:
    found = []
    loops = {OURS: None, **({} if profiles else _uvloop())}
    for name, prefetch in ((DEFAULTS, None), (PREFETCH, 1000)):
        case = Case(name)
        turns: dict[str, tuple[Callable[..., Coroutine[Any, Any, None]], Loop | None]] = {}
        turns |= {who: (partial(_once, prefetch=prefetch), loop) for who, loop in loops.items()}
        if not profiles:
            turns[ALONE] = _alone, None
        for work, loop in turns.values():
            _run(work(max(1000, messages // 10), watch=Watch()), loop)  # the first one pays for imports and caches
        for number in range(rounds):
            for contestant in rotated(list(turns), number):
                watch = Watch(profiles.of(name, messages))
                work, loop = turns[contestant]
                _run(work(messages, watch=watch), loop)
                case.add(contestant, watch.figures(messages))
        case.samples = {contestant: case.samples[contestant] for contestant in turns}
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


async def _alone(messages: int, watch: Watch) -> None:
    """What nobody can do without who awaits each send and calls a coroutine for each message: no messages, no queue, no ack."""
    loop = asyncio.get_running_loop()
    waiting: list[asyncio.Future[None]] = []
    handled = 0

    async def handle(body: bytes) -> None:  # noqa: ARG001  # every handler takes a body
        nonlocal handled
        handled += 1

    async def turn() -> None:
        nonlocal waiting
        sent, waiting = waiting, []
        for each in sent:
            await handle(BODY)
            each.set_result(None)

    async def send() -> None:
        if not waiting:
            running.append(loop.create_task(turn()))
            del running[:-2]
        waiting.append(future := loop.create_future())
        await future

    running: list[asyncio.Task[None]] = []
    watch.start()
    await flood(send, messages)
    watch.stop()
    if handled != messages:
        raise Miscount(f"{ALONE}: {messages} sent, {handled} handled")


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
