"""RabbitMQ: unibus beside the raw clients, round by round, each on a queue of its own with the same arguments."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from statistics import quantiles
from time import monotonic
from typing import Any, Protocol, Self

import aio_pika

from benchmarks.cases import Case
from benchmarks.load import BODY, IN_FLIGHT, TENANT, Miscount, flood
from benchmarks.rabbitmq_raw import AioPika, Aiormq, Handled, round_trips
from benchmarks.rabbitmq_socket import Socket
from benchmarks.watch import Profiles, Watch
from unibus import Bus, Message, Queue
from unibus_rabbitmq.topology import DELIVERY_LIMIT

UNIBUS, BASE, EACH = "unibus", "aio-pika", "aio-pika, ack each"
EVERY = 100  # deliveries that a hand-tuned consumer acks at once
_TURN = 180.0  # seconds that nobody needs, even on a busy machine
_SETTLES_IN = 10.0  # seconds until the broker has counted the last acks


class NoBroker(Exception):
    """There is no RabbitMQ to be had; the text says why."""


class Contestant(Protocol):
    name: str

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...
    async def send(self, queue: str, messages: int, headers: Mapping[str, str] | None, watch: Watch) -> None: ...
    async def consume(self, queue: str, messages: int, prefetch: int, watch: Watch) -> int: ...


@dataclass(frozen=True)
class Plan:
    rounds: int
    messages: int
    requests: int
    flows: int  # the first so many of FLOWS


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


def find_broker() -> tuple[str, str]:
    """URL, and where it is from. The URL has a password in it: not to be shown. Raises NoBroker."""
    try:
        from unibus_contracts import supply
    except ImportError as error:
        if url := os.environ.get("UNIBUS_TEST_RABBITMQ_URL"):
            return url, "environment"
        raise NoBroker(f"the broker supply can't be imported ({error}); set UNIBUS_TEST_RABBITMQ_URL") from error
    try:
        broker = supply.start("rabbitmq")  # the one of the environment, where it names one
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


async def run(url: str, plan: Plan, profiles: Profiles) -> tuple[list[Case], str]:
    """The cases, and the broker's version."""
    async with await aio_pika.connect(url) as connection:
        assert connection.transport is not None
        version = str(connection.transport.connection.server_properties.get("version", "?"))
        broker = Broker(connection)
        found: list[Case] = []
        for flow in FLOWS[: 1 if profiles else plan.flows]:
            found += await _flow(broker, url, flow, plan, profiles)
        found.append(await _requests(broker, url, plan, profiles))
    return found, version


async def _flow(broker: Broker, url: str, flow: Flow, plan: Plan, profiles: Profiles) -> list[Case]:
    sends = Case(f"RabbitMQ: send, {IN_FLIGHT} in flight{flow.extra}", BASE)
    consumes = Case(f"RabbitMQ: consume, prefetch {flow.prefetch}{flow.extra}", BASE)
    contestants: list[Contestant] = [Unibus(url)]
    if not profiles:
        contestants += [AioPika(BASE, url, every=EVERY), AioPika(EACH, url, every=1), Aiormq(url, every=EVERY)]
        if not url.startswith("amqps"):
            contestants.append(Socket(url, every=EVERY))
    for contestant in contestants:
        await _turn(broker, contestant, flow, max(500, plan.messages // 10), Watch(), Watch())  # warms up
    for number in range(plan.rounds):
        for contestant in _rotated(contestants, number):
            name = contestant.name
            send = Watch(profiles.of(sends.name, plan.messages))
            consume = Watch(profiles.of(consumes.name, plan.messages))
            await _turn(broker, contestant, flow, plan.messages, send, consume)
            consumes.add(name, consume.figures(plan.messages))
            if name != EACH:  # sends like the other one
                sends.add(name, send.figures(plan.messages))
    order = [contestant.name for contestant in contestants]
    for case in (sends, consumes):  # the rounds began with another one each time
        case.samples = {name: case.samples[name] for name in order if name in case.samples}
    return [sends, consumes] if flow.sends else [consumes]


async def _turn(broker: Broker, contestant: Contestant, flow: Flow, messages: int, send: Watch, consume: Watch) -> None:
    """One contestant, one round: fill a new queue, see that all is there, empty it, see that nothing is left."""
    try:
        async with asyncio.timeout(_TURN), broker.queue() as queue:
            async with contestant:
                await contestant.send(queue, messages, flow.headers, send)
                await broker.expect(queue, messages, f"sent by {contestant.name}")
                handled = await contestant.consume(queue, messages, flow.prefetch, consume)
            if handled != messages:
                raise Miscount(f"{contestant.name}: {messages} were in the queue, {handled} handled")
            # With its connection closed, what it has not acked is back in the queue.
            await broker.expect(queue, 0, f"after {contestant.name} had handled all")
    except TimeoutError as error:
        raise Miscount(f"{contestant.name} is not through with {messages} messages after {_TURN:.0f} s") from error


async def _requests(broker: Broker, url: str, plan: Plan, profiles: Profiles) -> Case:
    case = Case("RabbitMQ: request and reply, one at a time", BASE)
    contestants = [Unibus(url)] if profiles else [Unibus(url), AioPika(BASE, url, every=1)]
    for number in range(plan.rounds):
        for contestant in _rotated(contestants, number):
            watch = Watch(profiles.of(case.name, plan.requests))
            try:
                async with asyncio.timeout(_TURN), broker.queue() as queue, contestant:
                    times = await contestant.requests(queue, plan.requests, watch)
            except TimeoutError as error:
                raise Miscount(f"{contestant.name} has not all replies after {_TURN:.0f} s") from error
            cuts = quantiles(times, n=100)
            cpu = watch.figures(plan.requests)["CPU µs/message"]
            case.add(contestant.name, {"p50 ms": cuts[49] * 1e3, "p99 ms": cuts[98] * 1e3, "CPU µs/round trip": cpu})
    return case


def _rotated(contestants: Sequence[Any], by: int) -> list[Any]:
    """Nobody always comes first, or always after the same one."""
    at = by % len(contestants)
    return [*contestants[at:], *contestants[:at]]


class Broker:
    """Queues that are made for one turn, and looked at from outside."""

    def __init__(self, connection: aio_pika.abc.AbstractConnection) -> None:
        self._connection = connection
        self._prefix = f"bench-{secrets.token_hex(4)}"
        self._made = 0

    def queue(self) -> AbstractAsyncContextManager[str]:
        return self._queue()

    @asynccontextmanager
    async def _queue(self) -> AsyncIterator[str]:
        """With the arguments that unibus gives to a queue of work, for all contestants."""
        self._made += 1
        name = f"{self._prefix}-{self._made}"
        channel = await self._connection.channel()
        await channel.declare_queue(
            name,
            durable=True,
            arguments={
                "x-queue-type": "quorum",
                "x-delivery-limit": DELIVERY_LIMIT,
                "x-dead-letter-exchange": "",
                "x-dead-letter-routing-key": f"{name}.dlq",
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",
            },
        )
        try:
            yield name
        finally:
            await channel.queue_delete(name)
            await channel.close()

    async def expect(self, queue: str, messages: int, when: str) -> None:
        """The broker's own count. It lags behind a little, so it gets a while."""
        deadline = monotonic() + _SETTLES_IN
        async with self._connection.channel() as channel:
            while True:
                found = (await channel.declare_queue(queue, passive=True)).declaration_result.message_count
                if found == messages:
                    return
                if monotonic() > deadline:
                    raise Miscount(f"RabbitMQ has {found} messages, not {messages}, {when}")
                await asyncio.sleep(0.05)
