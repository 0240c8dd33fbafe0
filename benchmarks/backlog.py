"""Does memory stay flat over a long backlog? One process fills a queue with so many messages, then handles them all.

Resident memory is looked at as the messages go by: what grows with the backlog would show.
"""

from __future__ import annotations

import asyncio
import re
from functools import partial
from pathlib import Path
from time import perf_counter

from benchmarks.cases import Case
from benchmarks.flows import Flow, Stage
from benchmarks.load import BODY, Miscount, flood
from benchmarks.unibus import UNIBUS
from unibus import Bus, Queue

_TURN = 1800.0


async def measure(broker: str, url: str, stage: Stage, messages: int) -> Case:
    case = Case(f"{broker}: a backlog of {messages:,}, default settings")
    async with asyncio.timeout(_TURN), stage.queue(Flow(), declare=True) as name:
        orders = Queue(name, bytes)
        figures = {"MB at the start": _resident()}
        async with Bus(url, channels=[orders], service="bench", declare="assume", config=False, environ={}) as bus:
            begun = perf_counter()
            await flood(partial(bus.send, orders, BODY), messages)
            figures["sent/s"] = messages / (perf_counter() - begun)
        figures["MB when all are sent"] = _resident()
        await stage.expect(name, messages, "when all were sent")
        bus = Bus(url, service="bench", declare="assume", config=False, environ={})
        looks = {messages // 100, messages // 2, messages}
        handled = 0
        done = asyncio.Event()

        @bus.consumer(orders)
        async def handle(body: bytes) -> None:  # noqa: ARG001  # every handler takes a body
            nonlocal handled
            handled += 1
            if handled in looks:
                figures[f"MB after {handled / messages:.0%} handled"] = _resident()
            if handled == messages:
                done.set()

        begun = perf_counter()
        async with bus.running():
            await done.wait()
            figures["handled/s"] = messages / (perf_counter() - begun)
        await stage.expect(name, 0, "when all were handled")
        if handled != messages:
            raise Miscount(f"{broker}: {messages} sent, {handled} handled")
    case.add(UNIBUS, figures)
    return case


def _resident() -> float:
    """Of this process, in MB."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) / 1024 if found else float("nan")
