"""Services that end by a signal, or are killed by a message: processes of their own, for test_shutdown and test_poison.

`python -m tests.integration.lives drains|dies PREFIX [SECONDS]`; the URL comes on standard input, since everybody can read
arguments. What happens is told on standard output, a line of JSON each.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

from unibus import Bus, Delivery, Queue
from unibus_contracts.kit import until

QUEUE: Queue[str] = Queue("work", str)
PREFETCH = 10
DRAIN = 2.0
POISON = "poison"
LONG = 120.0


def bus_at(url: str, prefix: str, **settings: object) -> Bus:
    return Bus(url, service="lives", prefix=prefix, config=False, environ={}, channels=[QUEUE], **settings)  # type: ignore[arg-type]


def tell(**what: object) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")  # at once, in one piece


async def drains(url: str, prefix: str, seconds: float) -> None:
    """Two handlers begin: the first ends in the drain, the second never. What else is held has not begun."""
    bus = bus_at(url, prefix, shutdown_timeout=seconds)
    begun: list[str] = []
    stopping = asyncio.Event()

    @bus.consumer(QUEUE, concurrency=2, prefetch=PREFETCH)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        begun.append(body)
        tell(begun=body, attempt=delivery.attempt)
        await (stopping.wait() if begun[0] == body else asyncio.Event().wait())
        tell(done=body)

    async def watch() -> None:
        await until(lambda: len(begun) == 2, "two handlers have begun", LONG)
        (intake,) = bus._opened().intakes
        await until(lambda: len(intake.holding) == PREFETCH, "the prefetch is held", LONG)
        tell(holding=PREFETCH)
        await until(lambda: intake._stopping, "the drain", LONG)
        tell(stopping=True)
        stopping.set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watch())
        await bus.run()


def dies(url: str, prefix: str) -> None:
    """One life after the other, until SIGTERM to all of them: forked, since a fresh interpreter would take longer."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the living one drains, and that is the end
    while True:
        if (child := os.fork()) == 0:
            asyncio.run(live(url, prefix))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        tell(ended=os.waitstatus_to_exitcode(status))
        if status == 0:
            return


async def live(url: str, prefix: str) -> None:
    bus = bus_at(url, prefix)

    @bus.consumer(QUEUE)
    async def handle(body: str) -> None:
        if body == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        tell(handled=body)

    await bus.run()


if __name__ == "__main__":
    what, where, under = sys.argv[1], sys.stdin.readline().strip(), sys.argv[2]
    if what == "drains":
        asyncio.run(drains(where, under, float(sys.argv[3])))
    else:
        dies(where, under)
