"""Clusters of three: what a client does when the node it is connected to is killed, and when that node is back.

A producer and a consumer are at work throughout. What was confirmed has to be handled, whatever was killed meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any, Self
from urllib.parse import urlsplit

import pytest
from redis import Redis, RedisError

from unibus import Bus, Queue, TransportError
from unibus.message import new_id
from unibus_contracts import supply

SOON = 120.0  # bounds a failure: the machine may be busy with other tests

pytestmark = pytest.mark.timeout(900)


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, f"not within {SOON:g} s: {what}"
        await asyncio.sleep(0.02)  # between two looks


async def eventually(question: Callable[[], Awaitable[object]], what: str) -> None:
    deadline = time.monotonic() + SOON
    while not await question():
        assert time.monotonic() < deadline, f"not within {SOON:g} s: {what}"
        await asyncio.sleep(0.1)  # between two looks


async def elsewhere(action: Callable[[], Any]) -> Any:
    """In a thread: the work must go on meanwhile."""
    return await asyncio.to_thread(action)


def port_of(node: supply.Broker) -> int:
    return urlsplit(node.url).port or 0


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[supply.Cluster]:
    """Of the kind that the test asks for. Its nodes are killed, so it is nobody else's."""
    made = supply.cluster(request.param, instance="tests")
    yield made
    made.stop()


class Work:
    """Sends one message after the other, and handles them, until it ends; then all that was confirmed has been handled."""

    def __init__(self, url: str, **options: Any) -> None:
        self.queue = Queue(f"int-{new_id()}", int)
        self.bus = Bus(
            url,
            service="svc",
            config=False,
            environ={},
            channels=[self.queue],
            send_timeout=SOON,
            settings=options,
        )
        self.bus.consumer(self.queue)(self.handle)
        self.confirmed: set[int] = set()
        self.handled: dict[int, float] = {}
        self.sent = 0
        self._over = False

    async def handle(self, number: int) -> None:
        self.handled.setdefault(number, time.monotonic())

    async def _produce(self) -> None:
        while not self._over:
            self.sent += 1
            with suppress(TransportError):  # undecided: it may be there or not
                await self.bus.send(self.queue, self.sent)
                self.confirmed.add(self.sent)
            await asyncio.sleep(0.005)  # the machine is shared

    async def __aenter__(self) -> Self:
        self._running = self.bus.running()
        await self._running.__aenter__()
        self._producer = asyncio.create_task(self._produce())
        await self.flows()
        return self

    async def __aexit__(self, *exc: object) -> None:
        try:
            if exc[0] is None:
                self._over = True
                await self._producer
                await until(lambda: self.confirmed <= self.handled.keys(), "all that was confirmed is handled")
        finally:
            self._producer.cancel()
            await asyncio.wait([self._producer])
            await self._running.__aexit__(None, None, None)

    async def flows(self) -> float:
        """Seconds until a message that is sent from now on has been confirmed and handled."""
        begun, known = time.monotonic(), self.sent
        await until(lambda: any(n > known for n in self.confirmed & self.handled.keys()), "messages flow again")
        return time.monotonic() - begun


def has_member(node: supply.Broker, queue: str) -> bool:
    """Whether a part of the quorum queue is on this node: the node keeps a register of them."""
    return any(queue.encode() in file.read_bytes() for file in node.home.glob("mnesia/*/quorum/*/names.dets"))


@pytest.mark.parametrize("cluster", ["rabbitmq"], indirect=True)
async def test_rabbitmq_goes_on_at_another_node_and_comes_back(
    cluster: supply.Cluster, record_property: Callable[[str, object], None]
) -> None:
    first, second, third = cluster.nodes
    url = cluster.url.replace(f",127.0.0.1:{port_of(third)}", "")  # so that only one is left of them

    async with Work(url) as work:

        def connected_to() -> int | None:
            port: int | None = work.bus.native.url.port  # type: ignore[attr-defined]  # aio-pika's connection
            return port

        await until(
            lambda: all(has_member(node, work.queue.name) for node in cluster.nodes), "the quorum queue is on all nodes"
        )
        victim, other = (first, second) if connected_to() == port_of(first) else (second, first)
        await elsewhere(victim.kill)
        record_property("rabbitmq: seconds after a kill", await work.flows())
        assert connected_to() == port_of(other)
        async with Work(url):
            pass  # a queue that is declared while a node is down works as well

        await elsewhere(victim.restart)
        await elsewhere(other.kill)
        record_property("rabbitmq: seconds after the second kill", await work.flows())
        assert connected_to() == port_of(victim), "the node that was lost is used again"


@pytest.mark.parametrize("cluster", ["kafka"], indirect=True)
async def test_kafka_goes_on_with_another_leader_and_comes_back(
    cluster: supply.Cluster, record_property: Callable[[str, object], None]
) -> None:
    async with Work(cluster.url) as work:

        async def partition() -> tuple[int, list[int], int]:
            """Its leader as the cluster sees it now (-1: none), the nodes that it is on, and how many have all there is."""
            client = work.bus.native.client  # type: ignore[attr-defined]  # aiokafka's producer
            await client.force_metadata_update()
            found = client.cluster._partitions.get(work.queue.name, {}).get(0)
            return (-1, [], 0) if found is None else (found.leader, found.replicas, len(found.isr))

        async def whole() -> bool:
            return (await partition())[2] == 3

        async def led_by(nodes: set[int]) -> bool:
            return (await partition())[0] in nodes

        await eventually(whole, "all of three replicas are in sync")
        first = (await partition())[1][0]  # that leads it whenever it can
        await eventually(lambda: led_by({first}), "it is led by the one that should")

        await elsewhere(cluster.nodes[first - 1].kill)
        record_property("kafka: seconds after the leader was killed", await work.flows())
        await eventually(lambda: led_by({1, 2, 3} - {first}), "another one leads")
        second = (await partition())[0]
        async with Work(cluster.url, replication=3):
            pass  # a topic that is made while a node is down works as well

        await elsewhere(cluster.nodes[first - 1].restart)
        await eventually(whole, "all of three replicas are in sync")
        await elsewhere(cluster.nodes[second - 1].kill)
        record_property("kafka: seconds after the second leader was killed", await work.flows())
        await eventually(lambda: led_by({first}), "the node that was lost is used again")


def follows(node: supply.Broker) -> bool:
    with Redis.from_url(node.url) as client:
        try:
            found = client.info("replication")
        except RedisError:  # a Sentinel that makes it a replica cuts all connections
            return False
    return (found["role"], found.get("master_link_status")) == ("slave", "up")


@pytest.mark.parametrize("cluster", ["redis"], indirect=True)
async def test_redis_goes_on_with_another_primary_and_comes_back(
    cluster: supply.Cluster, record_property: Callable[[str, object], None]
) -> None:
    # Without it a confirmed message may be in the primary's memory alone, and Redis itself loses it with the primary.
    async with Work(cluster.url, wait_replicas=1) as work:

        def primary() -> supply.Broker | None:
            """That which the client is connected to."""
            links = work.bus.adapter.links.all  # type: ignore[attr-defined]  # of the Redis adapter
            return next((node for node in cluster.nodes for link in links if link.port == port_of(node)), None)

        first = primary()
        assert first is not None
        await elsewhere(first.kill)
        record_property("redis: seconds after the primary was killed", await work.flows())
        await until(lambda: primary() not in (None, first), "it is connected to another primary")

        await elsewhere(first.restart)

        await eventually(lambda: elsewhere(lambda: follows(first)), "it is a replica now, and has all that there is")
        third, second = sorted(
            (node for node in cluster.nodes if node is not first), key=lambda node: node is primary()
        )
        await elsewhere(third.kill)
        await elsewhere(second.kill)  # now only the first is left to be chosen
        begun = time.monotonic()
        await until(lambda: primary() is first, "the node that was lost is used again")
        record_property("redis: seconds until the second failover", time.monotonic() - begun)
        await elsewhere(third.restart)  # one alone confirms nothing
        record_property("redis: seconds after its only replica was back", await work.flows())
