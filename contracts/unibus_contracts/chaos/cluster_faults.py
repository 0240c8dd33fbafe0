"""Faults of three nodes that are one: who leads is killed, hangs, is restarted or asked to step down; the majority is gone.

They strike the node that leads the first queue of the work, so that what is struck is in use, and have bitten when another node
has taken over. Each begins when all nodes are one again: two faults at once are one that no cluster of three has to survive.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from unibus_contracts import supply
from unibus_contracts.chaos import service
from unibus_contracts.chaos.nodes import ELECTED, eventually, kafka_admin, leader, whole
from unibus_contracts.chaos.stage import Fault, NoBite, Stage
from unibus_contracts.supply.clusters import MASTER

_WHOLE = 180.0  # seconds until a node that came back has all there is, on a busy machine


@asynccontextmanager
async def _struck(
    stage: Stage,
) -> AsyncIterator[tuple[supply.Cluster, supply.Broker, Callable[[str], Awaitable[None]]]]:
    """The cluster when it is whole, the node that leads, and what waits for another one to take over and says so."""
    cluster = stage.cluster
    assert cluster is not None, "this fault needs a cluster"
    name = f"{stage.consumers[0].prefix}{service.work.name}"
    await eventually(lambda: whole(cluster, name), _WHOLE, "the cluster is whole")
    victim = await eventually(lambda: leader(cluster, name), ELECTED, f"{name} has a leader")

    async def taken_over(what: str) -> None:
        began = time.monotonic()

        async def other() -> supply.Broker | None:
            found = await leader(cluster, name)
            return None if found is victim else found

        heir = await eventually(other, ELECTED, f"another node leads {name}")
        seconds = time.monotonic() - began
        stage.proof = f"{victim.name}, which led, {what}; {heir.name} took over after {seconds:.1f} s"

    yield cluster, victim, taken_over


@asynccontextmanager
async def leader_killed(stage: Stage) -> AsyncIterator[None]:
    """SIGKILL to the node that leads; it comes back when another one has taken over."""
    async with _struck(stage) as (_, victim, taken_over):
        await asyncio.to_thread(victim.kill)
        try:
            await taken_over("was killed")
            yield
        finally:
            await asyncio.to_thread(victim.restart)


@asynccontextmanager
async def leader_hangs(stage: Stage) -> AsyncIterator[None]:
    """SIGSTOP to the node that leads, until another one has taken over: then it wakes, and thinks that it still does."""
    async with _struck(stage) as (_, victim, taken_over):
        await asyncio.to_thread(victim.pause)
        try:
            await taken_over("was stopped")
            yield
        finally:
            await asyncio.to_thread(victim.unpause)


@asynccontextmanager
async def leader_restarted(stage: Stage) -> AsyncIterator[None]:
    """The node that leads is restarted in an orderly way, as at an upgrade."""
    async with _struck(stage) as (_, victim, taken_over):
        restarting = asyncio.create_task(asyncio.to_thread(victim.restart))
        try:
            await taken_over("was restarted")
            yield
        finally:
            await restarting


@asynccontextmanager
async def majority_killed(stage: Stage) -> AsyncIterator[None]:
    """SIGKILL to two of three, the one that leads among them: nothing can be confirmed until they are back."""
    async with _struck(stage) as (cluster, victim, _):
        other = next(node for node in cluster.nodes if node is not victim)
        before = [victim.pid, other.pid]
        try:
            for node in (victim, other):
                await asyncio.to_thread(node.kill)
            yield
        finally:
            await asyncio.gather(*(asyncio.to_thread(node.restart) for node in (victim, other)))
        if set(before) & {None, victim.pid, other.pid}:
            raise NoBite(f"the processes are {victim.pid}, {other.pid}, before they were {before}")
        stage.proof = f"{victim.name}, which led, and {other.name} were killed and started again"


# Kafka


@asynccontextmanager
async def kafka_leader_moved(stage: Stage) -> AsyncIterator[None]:
    """The first partition is taken from the node that leads it, and later given back; all nodes are well."""
    async with _struck(stage) as (cluster, victim, taken_over):
        name = f"{stage.consumers[0].prefix}{service.work.name}"
        everyone = list(range(1, len(cluster.nodes) + 1))
        await _reassign(cluster, name, [n for n in everyone if cluster.nodes[n - 1] is not victim])
        try:
            await taken_over("lost the partition")
            yield
        finally:
            await _reassign(cluster, name, everyone)


async def _reassign(cluster: supply.Cluster, name: str, replicas: list[int]) -> None:
    from aiokafka.protocol.admin import AlterPartitionReassignmentsRequest

    async with kafka_admin(cluster) as admin:
        request = AlterPartitionReassignmentsRequest(10_000, [(name, [(0, replicas, {})], {})], {})
        answer = await admin._send_request(request, await _controller(admin))
    errors = [code for *_, partitions, _ in answer.responses for _, code, *_ in partitions]
    if answer.error_code or any(errors):
        raise NoBite(f"the partition was not moved: {answer.error_code} {errors}")


async def _controller(admin: Any) -> int:
    return int((await admin.describe_cluster())["controller_id"])


@asynccontextmanager
async def kafka_replicas_missing(stage: Stage) -> AsyncIterator[None]:
    """The topic asks for three replicas and one node is away: Kafka refuses sends (NOT_ENOUGH_REPLICAS) until it is back."""
    async with _struck(stage) as (cluster, first, _):
        name = f"{stage.consumers[0].prefix}{service.work.name}"
        victim = next(node for node in cluster.nodes if node is not first)
        await _set(cluster, name, {"min.insync.replicas": str(len(cluster.nodes))})
        try:
            await asyncio.to_thread(victim.kill)

            async def out_of_sync() -> bool:
                async with kafka_admin(cluster) as admin:
                    (topic,) = await admin.describe_topics([name])
                return all(len(each["isr"]) < len(each["replicas"]) for each in topic["partitions"])

            await eventually(out_of_sync, ELECTED, f"{name} has fewer replicas in sync")
            before = await _written(cluster, name)
            yield
            after = await _written(cluster, name)
        finally:
            await asyncio.to_thread(victim.restart)
            await eventually(lambda: whole(cluster, name), _WHOLE, "all replicas are in sync")
            await _set(cluster, name, {})
        if before != after:
            raise NoBite(f"{after - before} messages were written to {name} with a replica missing")
        stage.proof = (
            f"{victim.name} was killed, and {name} took nothing while it asked for a replica more than there were"
        )


async def _set(cluster: supply.Cluster, name: str, configs: dict[str, str]) -> None:
    """In place of all that is set on this topic. Unibus sets nothing on those of the work."""
    from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

    async with kafka_admin(cluster) as admin:
        (answer,) = await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, configs)])
    if any(code for code, *_ in answer.resources):
        raise NoBite(f"the topic {name} was not changed: {answer.resources}")


async def _written(cluster: supply.Cluster, name: str) -> int:
    """Messages that its partitions have ever got."""
    from aiokafka import AIOKafkaConsumer, TopicPartition

    parts = urlsplit(cluster.url)
    async with AIOKafkaConsumer(
        bootstrap_servers=parts.netloc.rpartition("@")[2],
        security_protocol="SASL_PLAINTEXT",
        sasl_mechanism="PLAIN",
        sasl_plain_username=unquote(parts.username or ""),
        sasl_plain_password=unquote(parts.password or ""),
        enable_auto_commit=False,
    ) as consumer:
        partitions = await consumer._client._wait_on_metadata(name)
        ends: dict[Any, int] = await consumer.end_offsets([TopicPartition(name, n) for n in partitions])
    return sum(ends.values())


# Redis


@asynccontextmanager
async def redis_failover(stage: Stage) -> AsyncIterator[None]:
    """The Sentinels are asked for another primary; nothing is broken."""
    from redis.asyncio import Redis

    async with _struck(stage) as (cluster, _, taken_over):
        async with Redis.from_url(cluster.sentinels[0].url) as client:
            await client.execute_command("SENTINEL", "FAILOVER", MASTER)  # type: ignore[no-untyped-call]
        await taken_over("was asked to step down")
        yield


FAULTS: Mapping[str, Mapping[str, Fault]] = {
    "kafka": {
        "leader-killed": leader_killed,
        "leader-hangs": leader_hangs,
        "leader-restarted": leader_restarted,
        "majority-killed": majority_killed,
        "kafka-leader-moved": kafka_leader_moved,
        "kafka-replicas-missing": kafka_replicas_missing,
    },
    "rabbitmq": {
        "leader-killed": leader_killed,
        "leader-restarted": leader_restarted,
        "majority-killed": majority_killed,
    },
    "redis": {
        "leader-killed": leader_killed,
        "leader-hangs": leader_hangs,
        "redis-failover": redis_failover,
    },
}

NOT_ON: Mapping[str, Mapping[str, str]] = {
    "kafka": {},
    "rabbitmq": {
        "leader-hangs": "a node that was stopped until another one led is not taken back before it is restarted (3.10.8); tests/clusters does that"
    },
    "redis": {
        "leader-restarted": "a primary that is restarted in order is back before a Sentinel misses it; redis-failover is how to upgrade one",
        "majority-killed": "what one replica has confirmed and its primary are gone together: Redis itself loses that (wait_replicas = 2 would "
        "keep it, and take nothing while one is away)",
    },
}
