"""RabbitMQ: unibus beside the raw clients, round by round, each on a queue of its own with the same arguments."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from statistics import quantiles
from time import monotonic

import aio_pika

from benchmarks import backlog
from benchmarks.cases import Case
from benchmarks.flows import EACH, FLOWS, TURN, Contestant, Plan, Unibus, measure, rotated
from benchmarks.load import Miscount
from benchmarks.rabbitmq_raw import AioPika, Aiormq
from benchmarks.rabbitmq_socket import Socket
from benchmarks.watch import Profiles, Watch
from unibus_rabbitmq.topology import DELIVERY_LIMIT

BASE = "aio-pika"
EVERY = 100  # deliveries that a hand-tuned consumer acks at once
_SETTLES_IN = 10.0  # seconds until the broker has counted the last acks


async def run(url: str, plan: Plan, profiles: Profiles) -> tuple[list[Case], str]:
    """The cases, and the broker's version."""
    async with await aio_pika.connect(url) as connection:
        assert connection.transport is not None
        version = str(connection.transport.connection.server_properties.get("version", "?"))
        broker = Broker(connection)
        if plan.backlog:
            return [await backlog.measure("RabbitMQ", url, broker, plan.backlog)], version
        found: list[Case] = []
        contestants: list[Contestant] = [Unibus(url)]
        if not profiles:
            contestants += [
                AioPika(BASE, url, every=EVERY),
                AioPika(BASE + EACH, url, every=1),
                Aiormq(url, every=EVERY),
            ]
            if not url.startswith("amqps"):
                contestants.append(Socket(url, every=EVERY))
        for flow in FLOWS[: 1 if profiles else plan.flows]:
            found += await measure("RabbitMQ", broker, contestants, flow, plan, profiles)
        found.append(await _requests(broker, url, plan, profiles))
    return found, version


async def _requests(broker: Broker, url: str, plan: Plan, profiles: Profiles) -> Case:
    case = Case("RabbitMQ: request and reply, one at a time", BASE)
    contestants = [Unibus(url)] if profiles else [Unibus(url), AioPika(BASE, url, every=1)]
    for number in range(plan.rounds):
        for contestant in rotated(contestants, number):
            watch = Watch(profiles.of(case.name, plan.requests))
            try:
                async with asyncio.timeout(TURN), broker.queue() as queue, contestant:
                    times = await contestant.requests(queue, plan.requests, watch)
            except TimeoutError as error:
                raise Miscount(f"{contestant.name} has not all replies after {TURN:.0f} s") from error
            cuts = quantiles(times, n=100)
            cpu = watch.figures(plan.requests)["CPU µs/message"]
            case.add(contestant.name, {"p50 ms": cuts[49] * 1e3, "p99 ms": cuts[98] * 1e3, "CPU µs/round trip": cpu})
    return case


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
