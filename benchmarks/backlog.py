"""Does memory stay flat over a long backlog? So many messages are sent, all of them wait on the broker, then all are handled.

Resident memory is looked at as the messages go by: what grows with the backlog would show. In a process of its own, since
one that has been bigger before would hide it.
"""

from __future__ import annotations

import asyncio
from functools import partial

from benchmarks import children
from benchmarks.cases import Case
from benchmarks.flows import Flow, Stage
from benchmarks.load import BODY, Miscount, flood
from benchmarks.unibus import UNIBUS
from benchmarks.watch import Watch, resident
from unibus import Bus, Queue

_LONGEST = 1800.0


async def measure(broker: str, url: str, stage: Stage, messages: int) -> Case:
    case = Case(f"{broker}: a backlog of {messages:,}, default settings")
    async with stage.queue(Flow(), declare=True) as queue:
        question = {"variable": "messages", "url": url, "queue": queue, "n": messages}
        case.add(UNIBUS, await children.ask("benchmarks.growth_point", question, _LONGEST))
        await stage.expect(queue, 0, "when all were handled")
    return case


async def once(url: str, queue: str, messages: int) -> dict[str, float]:
    orders = Queue(queue, bytes)
    bus = Bus(url, service="bench", declare="create", config=False, environ={})
    looks = {max(1, messages // 100), messages // 2, messages}
    handled = 0
    done = asyncio.Event()
    watch = Watch()
    figures = {}

    @bus.consumer(orders)
    async def handle(body: bytes) -> None:  # noqa: ARG001  # every handler takes a body
        nonlocal handled
        if not handled:
            watch.restart()
        handled += 1
        if handled in looks:
            figures[f"MB after {handled / messages:.0%} handled"] = resident()
        if handled == messages:
            done.set()

    async with bus:
        figures["MB at the start"] = resident()
        watch.start()
        await flood(partial(bus.send, orders, BODY), messages)
        watch.stop()
        figures |= {f"{figure}, send": value for figure, value in watch.figures(messages).items()}
        figures["MB when all are sent"] = resident()
        async with bus.running():
            await done.wait()
            watch.stop()
        figures |= {f"{figure}, handle": value for figure, value in watch.figures(messages).items()}
    if handled != messages:
        raise Miscount(f"{messages} sent, {handled} handled")
    figures["MB at the most"] = resident("VmHWM")
    return figures
