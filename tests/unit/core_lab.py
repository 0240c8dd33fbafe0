"""What the tests of the core share: channels, a bus that reads no file, and a memory adapter that counts and fails."""

import asyncio
import dataclasses
import gc
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import patch

from unibus import Bus, Queue, Topic
from unibus.adapter import Endpoint, Move, Outcome, Outgoing, Results, Source, Topology
from unibus.capabilities import Capabilities
from unibus.delivery import Delivery
from unibus.memory import MemoryAdapter
from unibus.memory_subscription import MemorySubscription
from unibus.testing import Lab, in_memory

ORDERS = Queue[str]("orders", str)
ORDERED = Queue[str]("ordered", str, ordered=True)
LATER = Queue[str]("later", str, delayed=True)
ASKS = Queue[str]("asks", str, reply=str)
DONE = Queue[str]("done", str)
EVENTS = Topic[str]("events", str)
ALL = (ORDERS, ORDERED, LATER, ASKS, DONE, EVENTS)

PATIENCE = 60.0  # real seconds until a test gives up waiting, on a machine that may be busy


def make_bus(**options: Any) -> Bus:
    """A bus that knows all channels above, and reads neither file nor environment."""
    given: dict[str, Any] = {"config": False, "environ": {}, "service": "test", "channels": ALL, **options}
    return Bus(given.pop("url", "memory://"), **given)


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Turn the loop until `condition` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"it never happened: {what or condition}"
        await asyncio.sleep(0)


async def turns(n: int = 20) -> None:
    """Let everything that can go on now go on."""
    for _ in range(n):
        await asyncio.sleep(0)


async def later(it: Lab, seconds: float) -> None:
    """Let virtual time pass, timer by timer. Cheaper than `advance`, which also waits for threads and files."""
    end = it.clock.monotonic() + seconds
    await turns()
    while (due := it.clock.next_due()) is not None and it.clock.monotonic() + due <= end:
        it.clock.move(due)
        await turns()
    it.clock.move(max(0.0, end - it.clock.monotonic()))
    await turns()


class Spy(MemoryAdapter):
    """A memory adapter that records its calls, fails on demand, and has the capabilities that a test asks for.

    `faults[name]`: what the next calls of a method raise. `hanging`: methods that don't return. `gate`: closed, it holds
    sends back.
    """

    changes: dict[str, Any]
    made: "list[Spy]"

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.made.append(self)
        self.batches: list[list[Outgoing]] = []
        self.settled: list[tuple[Outcome, list[str]]] = []
        self.extended: list[list[str]] = []
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.faults: defaultdict[str, deque[BaseException]] = defaultdict(deque)
        self.always: dict[str, BaseException] = {}
        self.hanging: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.flying = self.most_flying = 0
        self._capabilities: Capabilities = dataclasses.replace(self._capabilities, **self.changes)

    def call(self, name: str) -> None:
        self.calls[name] += 1
        if self.faults[name]:
            raise self.faults[name].popleft()
        if name in self.always:
            raise self.always[name]

    async def answer(self, name: str) -> None:
        if name in self.hanging:
            await asyncio.Event().wait()
        self.call(name)

    async def connect(self) -> None:
        self.call("connect")
        await super().connect()

    async def close(self) -> None:
        await super().close()
        await self.answer("close")

    async def declare(self, topology: Topology) -> None:
        self.call("declare")
        await super().declare(topology)

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        self.batches.append(list(batch))
        self.flying += 1
        self.most_flying = max(self.flying, self.most_flying)
        try:
            await self.gate.wait()
            await self.answer("send")
            return await super().send(batch, timeout)
        finally:
            self.flying -= 1

    async def subscribe(self, source: Source) -> MemorySubscription:
        self.call("subscribe")
        subscription = await super().subscribe(source)
        subscription.__class__ = SpySubscription  # the base makes its own; only methods differ
        return subscription

    def sent(self) -> list[list[str]]:
        """The bodies of each call of `send`."""
        return [[o.message.body.decode() for o in batch] for batch in self.batches]


class SpySubscription(MemorySubscription):
    """Made by a Spy."""

    @property
    def spy(self) -> Spy:
        assert isinstance(self._adapter, Spy)
        return self._adapter

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        self.spy.call("receive")
        return await super().receive(limit, timeout)

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        await self.spy.answer("settle")
        self.spy.settled.append((outcome, [d.message.body.decode() for d in deliveries]))
        return await super().settle(outcome, deliveries, delays=delays)

    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        await self.spy.answer("move")
        return await super().move(moves, timeout)

    async def extend(self, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
        self.spy.call("extend")
        self.spy.extended.append([d.message.body.decode() for d in deliveries])
        return await super().extend(deliveries, seconds)

    async def stop(self) -> None:
        await self.spy.answer("stop")
        await super().stop()

    async def close(self) -> None:
        await super().close()
        await self.spy.answer("unsubscribe")


def spying(made: list[Spy], **capabilities: Any) -> Any:
    """While it lasts, every bus gets a Spy, which joins `made`."""
    kind = type("Spy", (Spy,), {"changes": capabilities, "made": made})
    return patch("unibus.bus.adapter_factory", lambda _scheme: kind)


def spy_of(bus: Bus) -> Spy:
    assert isinstance(bus.adapter, Spy)
    return bus.adapter


@asynccontextmanager
async def tidy() -> AsyncIterator[None]:
    """No task is left behind, and no exception went unseen."""
    loop = asyncio.get_running_loop()
    faults: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: faults.append(context))
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before
    assert not left, left
    gc.collect(0)  # a task that failed unseen says so when it is collected
    assert not faults, faults


@asynccontextmanager
async def lab(bus: Bus, **capabilities: Any) -> AsyncIterator[Lab]:
    """`bus` at work on a Spy and a virtual clock; at the end all has to be tidy."""
    with spying([], **capabilities):
        async with tidy(), in_memory(bus) as running:
            yield running
