"""The SPI itself, for contracts on what the public interface hides."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from unibus import Bus, Delivery, Queue, Topic
from unibus.adapter import Declared, Source, Start, Subscription, Topology
from unibus.channel import Group

from .kit import Kit, eventually


@asynccontextmanager
async def subscribed(
    bus: Bus, queue: Queue[Any], prefetch: int = 20, *, early: bool = False
) -> AsyncIterator[Subscription]:
    """A subscription of the SPI itself, for what the public interface hides."""
    subscription = await bus.adapter.subscribe(Source(queue, prefetch=prefetch, early=early))
    try:
        yield subscription
    finally:
        await subscription.stop()
        await subscription.close()


async def receive(subscription: Subscription, count: int = 1) -> list[Delivery[Any]]:
    """The next `count` deliveries of a subscription, not settled."""
    taken: list[Delivery[Any]] = []

    async def more() -> int:
        taken.extend(await subscription.receive(count - len(taken), 1.0))
        return len(taken)

    await eventually(more, lambda found: found >= count, f"{count} deliveries")
    return taken


def starting_at(kit: Kit, topic: Topic[Any], group: Group, start: Start) -> Topology:
    """A topology whose group begins there."""
    prefix = kit.harness.prefix
    of_topic = Declared(topic, prefix + topic.name)
    return Topology("create", (of_topic, Declared(group, f"{prefix}{topic.name}.{group.name}", start=start)))
