"""Faults that only Kafka knows: a group that never rests."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from unibus_contracts.chaos import service
from unibus_contracts.chaos.stage import Fault, NoBite, Stage, reaches

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer

_JOINED = 30.0  # seconds until a member has its partitions, on a busy machine


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
    try:
        await consumer.start()
        async with asyncio.timeout(_JOINED):
            await dealt.wait()
        return int(consumer._coordinator.generation)
    finally:
        await consumer.stop()


FAULTS: Mapping[str, Fault] = {
    "kafka-rebalances": rebalances,
}
