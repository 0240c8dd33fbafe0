"""Faults that only Kafka knows: too few replicas, a coordinator that can't keep offsets, and groups that never rest."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from unibus_contracts.chaos import service
from unibus_contracts.chaos.stage import Fault, NoBite, Stage, bit, reaches

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer
    from aiokafka.admin import AIOKafkaAdminClient

_JOINED = 30.0  # seconds until a member has its partitions, on a busy machine
_LIMIT = "min.insync.replicas"
_OFFSETS = "__consumer_offsets"


def _login(stage: Stage) -> dict[str, Any]:
    parts = urlsplit(stage.broker.url)
    return {
        "bootstrap_servers": parts.netloc.rpartition("@")[2],
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "PLAIN",
        "sasl_plain_username": unquote(parts.username or ""),
        "sasl_plain_password": unquote(parts.password or ""),
    }


@asynccontextmanager
async def _admin(stage: Stage) -> AsyncIterator[AIOKafkaAdminClient]:
    from aiokafka.admin import AIOKafkaAdminClient

    admin = AIOKafkaAdminClient(**_login(stage))
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def _own_settings(admin: AIOKafkaAdminClient, topics: list[str]) -> dict[str, dict[str, str]]:
    """What was set on each topic itself."""
    from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

    found = {}
    for answer in await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in topics]):
        for code, text, _, name, entries in answer.resources:
            if code:
                raise RuntimeError(f"the settings of topic {name} can't be read: {text}")
            found[name] = {entry[0]: entry[1] for entry in entries if entry[3] == 1}  # 1: the topic's own
    return found


async def _set(admin: AIOKafkaAdminClient, settings: Mapping[str, Mapping[str, str]]) -> None:
    from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

    wanted = [ConfigResource(ConfigResourceType.TOPIC, name, dict(own)) for name, own in settings.items()]
    for answer in await admin.alter_configs(wanted):
        for code, text, _, name in answer.resources:
            if code:
                raise RuntimeError(f"the settings of topic {name} can't be changed: {text}")


def _refusals(stage: Stage) -> int:
    """The server's own record of what it refused for the lack of replicas."""
    return (stage.broker.home / "log/output.log").read_text(errors="replace").count("NotEnoughReplicasException")


def _too_few(offsets: bool, what: str) -> Fault:
    """One replica is there, and two are asked for: of the topics of the run, or of the one that keeps committed offsets."""

    @asynccontextmanager
    async def fault(stage: Stage) -> AsyncIterator[None]:
        if not stage.broker.native:
            raise NoBite("the server isn't a process of this machine, so its log is out of reach")
        async with _admin(stage) as admin:
            names = await admin.list_topics()
            topics = [name for name in names if name.startswith(stage.consumers[0].prefix)]
            before = await _own_settings(admin, [_OFFSETS] if offsets else topics)
            refused = _refusals(stage)
            await _set(admin, {name: {**own, _LIMIT: "2"} for name, own in before.items()})
            try:
                yield
                await reaches(lambda: _refusals(stage) > refused, stage.pause)
            finally:
                await _set(admin, before)
        bit(stage, _refusals(stage) - refused, what)

    return fault


replicas_missing = _too_few(False, "writes were refused: two replicas were asked for, and there was one")
offsets_refused = _too_few(True, "writes of committed offsets were refused: the coordinator was not available")


@asynccontextmanager
async def rebalances(stage: Stage) -> AsyncIterator[None]:
    """A member joins the group of the first queue and leaves it, again and again: each time all partitions are dealt anew."""
    generations: list[int] = []

    async def storm() -> None:
        while True:
            generations.append(await _visit(stage, f"{stage.consumers[0].prefix}{service.work.name}"))

    storming = asyncio.create_task(storm())
    try:
        yield
        await reaches(lambda: len(generations) > 1 or storming.done(), _JOINED)
    finally:
        storming.cancel()
        done, _ = await asyncio.wait([storming])
    if any(not task.cancelled() for task in done):
        await storming  # raises what ended it
    if len(generations) < 2 or generations[-1] <= generations[0]:
        raise NoBite(f"the group did not change: {generations}")
    stage.proof = f"the group went from generation {generations[0]} to {generations[-1]} by {len(generations)} visits"


async def _visit(stage: Stage, name: str) -> int:
    """A member of the group comes and goes; the generation that it was part of."""
    from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener

    dealt = asyncio.Event()

    class Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
        def on_partitions_revoked(self, revoked: object) -> None:
            """Nothing was read, so there is nothing to keep."""

        def on_partitions_assigned(self, assigned: object) -> None:
            dealt.set()

    consumer: AIOKafkaConsumer = AIOKafkaConsumer(
        **_login(stage),
        group_id=name,
        client_id=f"storm-{secrets.token_hex(3)}",
        enable_auto_commit=False,
        heartbeat_interval_ms=500,
    )
    consumer.subscribe([name], listener=Listener())
    await consumer.start()
    try:
        async with asyncio.timeout(_JOINED):
            await dealt.wait()
        return int(consumer._coordinator.generation)
    finally:
        await consumer.stop()


FAULTS: Mapping[str, Fault] = {
    "kafka-replicas-missing": replicas_missing,
    "kafka-offsets-refused": offsets_refused,
    "kafka-rebalances": rebalances,
}
