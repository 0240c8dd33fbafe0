"""One contestant after the other, round by round, each on a queue of its own: send so many, then consume them."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any, Protocol, Self

from benchmarks.cases import Case
from benchmarks.load import BODY, IN_FLIGHT, TENANT, Handled, Miscount, flood, round_trips
from benchmarks.watch import Profiles, Watch
from unibus import Bus, Message, Queue

UNIBUS = "unibus"
EACH = ", ack each"
SETTLES_IN = 10.0  # seconds until a broker has counted the last acks
TURN = 180.0  # seconds that nobody needs, even on a busy machine


class NoBroker(Exception):
    """There is no such broker to be had; the text says why."""


class Contestant(Protocol):
    name: str

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...
    async def send(self, queue: str, messages: int, headers: Mapping[str, str] | None, watch: Watch) -> None: ...
    async def consume(self, queue: str, messages: int, prefetch: int, watch: Watch) -> int: ...


class Stage(Protocol):
    """A broker: queues that are made for one turn, and looked at from outside."""

    def queue(self) -> AbstractAsyncContextManager[str]: ...

    async def expect(self, queue: str, messages: int, when: str) -> None:
        """The broker's own count. It may lag behind a little. Raises Miscount."""
        ...


class Declared:
    """A stage on any broker: unibus makes the queues, and asks the broker for its counts. `delete`: by the raw client."""

    def __init__(self, url: str, delete: Callable[[str], Awaitable[object]]) -> None:
        self._url = url
        self._delete = delete
        self._prefix = f"bench-{secrets.token_hex(4)}"
        self._made = 0

    @asynccontextmanager
    async def queue(self) -> AsyncIterator[str]:
        self._made += 1
        name = f"{self._prefix}-{self._made}"
        try:
            async with Bus(self._url, channels=[Queue(name)], service="bench", config=False, environ={}) as self._bus:
                yield name
        finally:
            await self._delete(name)

    async def version(self) -> str:
        async with Bus(self._url, service="bench", declare="assume", config=False, environ={}) as bus:
            return bus.capabilities.version or "?"

    async def expect(self, queue: str, messages: int, when: str) -> None:
        deadline = monotonic() + SETTLES_IN
        while (left := await self._bus.backlog(queue)).ready + (left.in_flight or 0) != messages:
            if monotonic() > deadline:
                raise Miscount(f"the broker has {left.ready} messages and {left.in_flight} out, not {messages}, {when}")
            await asyncio.sleep(0.1)


@dataclass(frozen=True)
class Plan:
    rounds: int
    messages: int
    requests: int
    flows: int  # the first so many
    backlog: int = 0  # not 0: instead of all that, memory over a backlog of so many


@dataclass(frozen=True)
class Flow:
    """Send so many, then consume them. Sending has no prefetch: `sends` says whether it is measured here."""

    prefetch: int
    headers: Mapping[str, str] | None = None
    sends: bool = True

    @property
    def extra(self) -> str:
        return "" if self.headers is None else ", one header of the user's"


FLOWS = (Flow(200), Flow(20, sends=False), Flow(200, TENANT))


def find_broker(kind: str) -> tuple[str, str]:
    """URL, and where it is from. The URL has a password in it: not to be shown. Raises NoBroker."""
    variable = f"UNIBUS_TEST_{kind.upper()}_URL"
    try:
        from unibus_contracts import supply
    except ImportError as error:
        if url := os.environ.get(variable):
            return url, "environment"
        raise NoBroker(f"the broker supply can't be imported ({error}); set {variable}") from error
    try:
        broker = supply.start(kind)  # the one of the environment, where it names one
    except (supply.SupplyError, OSError) as error:
        raise NoBroker(str(error)) from error
    return broker.url, broker.source


class Unibus:
    """The bus as a service has it; `assume`, since the queues are the benchmark's."""

    name = UNIBUS

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def _bus(self, *channels: Queue[Any]) -> Bus:
        return Bus(self._url, channels=channels, service="bench", declare="assume", config=False, environ={})

    async def send(self, queue: str, messages: int, headers: Mapping[str, str] | None, watch: Watch) -> None:
        orders = Queue(queue, bytes)
        async with self._bus(orders) as bus:
            watch.start()
            await flood(partial(bus.send, orders, BODY, headers=headers), messages)
            watch.stop()

    async def consume(self, queue: str, messages: int, prefetch: int, watch: Watch) -> int:
        orders = Queue(queue, bytes)
        bus = self._bus()
        handled = Handled(messages)

        # aio-pika runs a task for each delivery that it holds: as many slots, then.
        @bus.consumer(orders, prefetch=prefetch, concurrency=prefetch)
        async def handle(body: bytes, message: Message) -> None:
            handled.handle(body, message.id, message.content_type, message.timestamp, message.headers)
            handled.settled()  # that is, to be settled: the end of `running` waits for it

        async with bus:
            watch.start()
            async with bus.running():
                await handled.all.wait()
                watch.stop()
        return handled.count

    async def requests(self, queue: str, count: int, watch: Watch) -> list[float]:
        asks = Queue(queue, bytes, reply=bytes)
        bus = self._bus()

        @bus.responder(asks)
        async def answer(body: bytes) -> bytes:
            return body

        async with bus.running():
            return await round_trips(partial(bus.request, asks, BODY), count, watch)


async def measure(
    broker: str, stage: Stage, contestants: Sequence[Contestant], flow: Flow, plan: Plan, profiles: Profiles
) -> list[Case]:
    """The second contestant is the base. One whose name ends in EACH sends like the one before it: that isn't shown."""
    base = contestants[1].name if len(contestants) > 1 else None
    sends = Case(f"{broker}: send, {IN_FLIGHT} in flight{flow.extra}", base)
    consumes = Case(f"{broker}: consume, prefetch {flow.prefetch}{flow.extra}", base)
    for contestant in contestants:
        await _turn(stage, contestant, flow, max(500, plan.messages // 10), Watch(), Watch())  # warms up
    for number in range(plan.rounds):
        for contestant in rotated(contestants, number):
            name = contestant.name
            send = Watch(profiles.of(sends.name, plan.messages))
            consume = Watch(profiles.of(consumes.name, plan.messages))
            await _turn(stage, contestant, flow, plan.messages, send, consume)
            consumes.add(name, consume.figures(plan.messages))
            if not name.endswith(EACH):  # sends like the other one
                sends.add(name, send.figures(plan.messages))
    order = [contestant.name for contestant in contestants]
    for case in (sends, consumes):  # the rounds began with another one each time
        case.samples = {name: case.samples[name] for name in order if name in case.samples}
    return [sends, consumes] if flow.sends else [consumes]


async def _turn(stage: Stage, contestant: Contestant, flow: Flow, messages: int, send: Watch, consume: Watch) -> None:
    """One contestant, one round: fill a new queue, see that all is there, empty it, see that nothing is left."""
    try:
        async with asyncio.timeout(TURN), stage.queue() as queue:
            async with contestant:
                await contestant.send(queue, messages, flow.headers, send)
                await stage.expect(queue, messages, f"sent by {contestant.name}")
                handled = await contestant.consume(queue, messages, flow.prefetch, consume)
            if handled != messages:
                raise Miscount(f"{contestant.name}: {messages} were in the queue, {handled} handled")
            # With its connection closed, what it has not acked is back in the queue.
            await stage.expect(queue, 0, f"after {contestant.name} had handled all")
    except TimeoutError as error:
        raise Miscount(f"{contestant.name} is not through with {messages} messages after {TURN:.0f} s") from error


def rotated(contestants: Sequence[Any], by: int) -> list[Any]:
    """Nobody always comes first, or always after the same one."""
    at = by % len(contestants)
    return [*contestants[at:], *contestants[:at]]
