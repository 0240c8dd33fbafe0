"""Three nodes that are one, asked with each broker's own client: who leads a queue, and whether all are well."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from unibus_contracts import supply
from unibus_contracts.chaos.stage import NoBite
from unibus_contracts.history import Expected
from unibus_contracts.supply.clusters import MASTER

ELECTED = 120.0  # seconds until another one leads, on a busy machine

T = TypeVar("T")


def kind_of(cluster: supply.Cluster) -> str:
    return cluster.name.partition("-")[0]


def url_of(cluster: supply.Cluster) -> str:
    """With what it takes that a confirmed message outlives the loss of a node, where that is not the default."""
    return f"{cluster.url}&wait_replicas=1" if kind_of(cluster) == "redis" else cluster.url


def promised(cluster: supply.Cluster, alone: Expected) -> Expected:
    """What it promises, by what one of its nodes does."""
    if kind_of(cluster) == "redis":
        # Sends are confirmed by a replica, settlements by the primary alone. One that isn't it any more goes on for a while: the
        # Sentinels wait for 8 s before they tell it, and ask every second.
        return replace(alone, settle_confirmed=False, settle_window=15.0)
    return alone


async def looked_at(cluster: supply.Cluster) -> supply.Broker:
    """The node at which the broker's own client sees all that there is."""
    if kind_of(cluster) != "redis":
        return cluster.nodes[0]
    return await eventually(lambda: leader(cluster, ""), ELECTED, "the Sentinels name a primary")


@asynccontextmanager
async def kafka_admin(cluster: supply.Cluster) -> AsyncIterator[Any]:
    from aiokafka.admin import AIOKafkaAdminClient

    parts = urlsplit(cluster.url)
    admin = AIOKafkaAdminClient(
        bootstrap_servers=parts.netloc.rpartition("@")[2],
        security_protocol="SASL_PLAINTEXT",
        sasl_mechanism="PLAIN",
        sasl_plain_username=unquote(parts.username or ""),
        sasl_plain_password=unquote(parts.password or ""),
        request_timeout_ms=10_000,
    )
    try:
        await admin.start()
        yield admin
    finally:
        await admin.close()


async def _kafka_leader(cluster: supply.Cluster, name: str) -> int | None:
    async with kafka_admin(cluster) as admin:
        (topic,) = await admin.describe_topics([name])
        leader = next((each["leader"] for each in topic["partitions"] if each["partition"] == 0), -1)
        return leader - 1 if leader > 0 else None  # nodes count from 1


async def _kafka_whole(cluster: supply.Cluster, name: str) -> bool:
    async with kafka_admin(cluster) as admin:
        topics = await admin.describe_topics()
    count = len(cluster.nodes)
    every = [each for topic in topics for each in topic["partitions"]]
    return all(each["leader"] > 0 and len(each["isr"]) == len(each["replicas"]) == count for each in every)


async def _redis_leader(cluster: supply.Cluster, name: str) -> int | None:
    from redis.asyncio import Redis

    ports = [urlsplit(node.url).port for node in cluster.nodes]
    async with Redis.from_url(cluster.sentinels[0].url, decode_responses=True) as client:
        _, port = await client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)  # type: ignore[no-untyped-call]
    leader = ports.index(int(port))
    async with Redis.from_url(cluster.nodes[leader].url, socket_timeout=5) as client:
        found: dict[str, Any] = await client.info("replication")
    return leader if found["role"] == "master" else None


async def _redis_whole(cluster: supply.Cluster, name: str) -> bool:
    from redis.asyncio import Redis

    for node in cluster.sentinels:
        async with Redis.from_url(node.url, decode_responses=True) as client:
            known = await client.execute_command("SENTINEL", "MASTER", MASTER)  # type: ignore[no-untyped-call]
        found = known if isinstance(known, dict) else dict(zip(known[::2], known[1::2], strict=True))
        if str(found["flags"]) not in ("master", "{'master'}") or int(found["num-slaves"]) != len(cluster.nodes) - 1:
            return False
    if (leader := await _redis_leader(cluster, name)) is None:
        return False
    async with Redis.from_url(cluster.nodes[leader].url, socket_timeout=5) as client:
        info: dict[str, Any] = await client.info("replication")
    replicas = [value for key, value in info.items() if key.startswith("slave") and isinstance(value, dict)]
    return [each["state"] for each in replicas] == ["online"] * (len(cluster.nodes) - 1)


async def _rabbitmq_asked(cluster: supply.Cluster, path: str) -> Any:
    """Of the first node that answers."""
    import aiohttp

    reasons = []
    for node in cluster.nodes:
        api = urlsplit(node.variables["UNIBUS_TEST_RABBITMQ_API"])
        account = f"{unquote(api.username or '')}:{unquote(api.password or '')}"
        headers = {"Authorization": f"Basic {b64encode(account.encode()).decode()}"}
        url = f"{api.scheme}://{api.hostname}:{api.port}{api.path}{path}"
        try:
            limit = aiohttp.ClientTimeout(5)
            async with aiohttp.ClientSession(headers=headers, timeout=limit) as http, http.get(url) as answer:
                answer.raise_for_status()
                return await answer.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            reasons.append(f"{node.name}: {type(error).__name__}")
    raise OSError(f"no node answers: {', '.join(reasons)}")


async def _rabbitmq_leader(cluster: supply.Cluster, name: str) -> int | None:
    queue = await _rabbitmq_asked(cluster, f"/queues/%2F/{name}")
    nodes = [f"{node.record.site.node}@localhost" for node in cluster.nodes if node.record is not None]
    leader = queue.get("leader")
    return nodes.index(leader) if leader in nodes and leader in queue.get("online", ()) else None


async def _rabbitmq_whole(cluster: supply.Cluster, name: str) -> bool:
    nodes = await _rabbitmq_asked(cluster, "/nodes")
    queue = await _rabbitmq_asked(cluster, f"/queues/%2F/{name}")
    return all(node["running"] for node in nodes) and len(queue.get("online", ())) == len(cluster.nodes)


_Asked = Callable[[supply.Cluster, str], Awaitable[Any]]
_LEADER: Mapping[str, _Asked] = {"kafka": _kafka_leader, "redis": _redis_leader, "rabbitmq": _rabbitmq_leader}
_HEALTHY: Mapping[str, _Asked] = {"kafka": _kafka_whole, "redis": _redis_whole, "rabbitmq": _rabbitmq_whole}


async def whole(cluster: supply.Cluster, name: str) -> bool:
    """Whether every node is there, and has all there is. Raises what the client raises."""
    return bool(await _HEALTHY[kind_of(cluster)](cluster, name))


async def leader(cluster: supply.Cluster, name: str) -> supply.Broker | None:
    """The node that leads this queue; None while there is none. Raises what the client raises."""
    at: int | None = await _LEADER[kind_of(cluster)](cluster, name)
    return None if at is None else cluster.nodes[at]


async def eventually(asked: Callable[[], Awaitable[T | None]], seconds: float, what: str) -> T:
    """What it answers once that is true. NoBite: it never was; a client that can't ask yet is asked again."""
    deadline, why = time.monotonic() + seconds, ""
    while True:
        try:
            if found := await asked():
                return found
            why = ""
        except Exception as error:  # of any client; if it stays, it is the reason why nothing is known
            why = f" ({type(error).__name__}: {error})"
        if time.monotonic() > deadline:
            raise NoBite(f"not within {seconds:.0f} s: {what}{why}")
        await asyncio.sleep(0.1)  # between two looks
