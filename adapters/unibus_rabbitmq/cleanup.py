"""For the contract suite: delete the queues and exchanges of a run. Nothing else calls this.

AMQP can't list what is there, so they are deleted by name. To delete what is not there is no error.
"""

from __future__ import annotations

from collections.abc import Collection
from math import ceil

from aiormq.abc import AbstractChannel

from unibus.channel import DEAD_LETTER, INVALID
from unibus.driver import linked
from unibus_rabbitmq import topology
from unibus_rabbitmq.adapter import RabbitMQAdapter
from unibus_rabbitmq.declaring import Call, each

_TIMEOUT = 110.0


async def delete(adapter: RabbitMQAdapter, prefix: str, names: Collection[str], delays: Collection[float]) -> list[str]:
    """Those declared, their dead letters, and what all buses of the prefix share: the hold queues and the way back."""
    shared = topology.Names(prefix)
    steps = {max(1, ceil(delay * 1000)) for delay in delays} | set(topology.LADDER)
    doomed = {name for name in names if name.startswith(prefix)}
    doomed |= {name + end for name in doomed for end in (DEAD_LETTER, INVALID)}
    doomed |= {shared.returns, shared.lost, shared.void, *(f"{shared.hold}{ms}" for ms in steps)}
    deleted: list[str] = []

    async def drop(call: Call, name: str) -> None:
        async def both(channel: AbstractChannel) -> None:
            await channel.queue_delete(name)
            await channel.exchange_delete(name)

        await call(both)
        deleted.append(name)

    link = linked(adapter._consuming, "RabbitMQ")
    await each(link, sorted(doomed), drop, _TIMEOUT)
    return sorted(deleted)
