"""One point of benchmarks.growth, in a process of its own: `python -m benchmarks.growth_point`, the question as JSON on stdin.

The cost is CPU time for each unit of work, which says more on a busy machine than wall time does; the memory is what the
process grew by at its most, from when it was connected.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from time import process_time
from typing import Any

from benchmarks import backlog
from benchmarks.load import BODY, IN_FLIGHT, body, flood
from benchmarks.watch import resident
from unibus import Bus, Delivery, Queue, Retry, RetryPolicy, Topic

_WAIT = 3.0  # seconds until a parked message is tried again: all of them have failed by then, mostly


class Point:
    """`n` is what varies, `messages` how many there are at least to vary it over."""

    def __init__(self, question: dict[str, Any]) -> None:
        self.url, self.queue, self.n = question["url"], question["queue"], question["n"]
        self.messages = max(question.get("messages", 0), 1)
        self.units = self.messages
        self._left = self.messages
        self._all = asyncio.Event()

    def bus(self) -> Bus:
        return Bus(self.url, service="bench", config=False, environ={})

    def expect(self, handlings: int) -> None:
        self._left = handlings

    def handled(self) -> None:
        self._left -= 1
        if not self._left:
            self._all.set()

    async def answer(
        self, bus: Bus, send: Callable[[], Awaitable[object]], in_flight: int = IN_FLIGHT
    ) -> dict[str, float]:
        """All are sent, then all are handled: on a broker, that is; in memory both at once would be the same."""
        async with bus:
            before, cpu = resident(), process_time()
            await flood(send, self.messages, in_flight)
            async with bus.running():
                await self._all.wait()
                cpu = process_time() - cpu
        return {"CPU µs": cpu / self.units * 1e6, "MB": max(0.0, resident("VmHWM") - before)}


async def messages(point: Point) -> dict[str, float]:
    found = await backlog.once(point.url, point.queue, point.n)
    cpu = found["CPU µs/message, send"] + found["CPU µs/message, handle"]
    return {**found, "CPU µs": cpu, "MB": max(0.0, found["MB at the most"] - found["MB at the start"])}


async def keys(point: Point) -> dict[str, float]:
    orders = Queue(point.queue, bytes, ordered=True)
    names = map("k%d".__mod__, itertools.cycle(range(point.n)))
    bus = _counting(point, orders, prefetch=200, concurrency=200)
    return await point.answer(bus, lambda: bus.send(orders, BODY, key=next(names)))


async def in_flight(point: Point) -> dict[str, float]:
    orders = Queue(point.queue, bytes)
    bus = _counting(point, orders)
    return await point.answer(bus, partial(bus.send, orders, BODY), point.n)


async def size(point: Point) -> dict[str, float]:
    """The unit is a byte."""
    orders = Queue(point.queue, bytes)
    bus = _counting(point, orders)
    point.units = point.messages * point.n
    return await point.answer(bus, partial(bus.send, orders, body(point.n)), 10)


async def groups(point: Point) -> dict[str, float]:
    """The unit is one handling."""
    events = Topic(point.queue, bytes)
    point.units = point.messages * point.n
    point.expect(point.units)
    bus = point.bus()

    async def handle(body: bytes) -> None:  # noqa: ARG001  # every handler takes a body
        point.handled()

    for number in range(point.n):
        bus.subscriber(events, group=f"g{number}")(handle)
    return await point.answer(bus, partial(bus.publish, events, BODY))


async def parked(point: Point) -> dict[str, float]:
    """The unit is a message that fails, waits, and is handled."""
    orders = Queue(point.queue, bytes)
    bus = point.bus()

    @bus.consumer(orders, retry=RetryPolicy(max_retries=1, backoff=_WAIT), prefetch=200, concurrency=200)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:  # noqa: ARG001  # every handler takes a body
        if delivery.attempt == 1:
            raise Retry("for the benchmark")
        point.handled()

    point.messages = point.units = point.n
    point.expect(point.n)
    return await point.answer(bus, partial(bus.send, orders, BODY))


def _counting(point: Point, orders: Queue[bytes], **settings: Any) -> Bus:
    bus = point.bus()

    @bus.consumer(orders, **settings)
    async def handle(body: bytes) -> None:  # noqa: ARG001  # every handler takes a body
        point.handled()

    return bus


VARIABLES: dict[str, Callable[[Point], Awaitable[dict[str, float]]]] = {
    "messages": messages,
    "keys": keys,
    "groups": groups,
    "messages in flight": in_flight,
    "messages waiting for a retry": parked,
    "bytes a body": size,
}


def main() -> None:
    logging.getLogger("unibus").setLevel(logging.ERROR)  # else it says each retry
    question = json.loads(sys.stdin.read())
    found = asyncio.run(_answer(question))
    sys.stdout.write(json.dumps(found) + "\n")


async def _answer(question: dict[str, Any]) -> dict[str, float]:
    return await VARIABLES[question["variable"]](Point(question))


if __name__ == "__main__":
    main()
