"""A bus as tools use it, the command line above all: connected, and nothing happens that was not asked for.

No lifespan is entered, no handler runs, nothing is declared. The names are those of the application and unibus.toml; any
other name stands for itself, by the naming rules.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any, Literal

from unibus.adapter import Inspected, Outcome, Source, Topology
from unibus.bus import Bus
from unibus.channel import Group, Queue, Topic
from unibus.config import Settings
from unibus.deadletter import MOST_HELD, PAGE, look, readable
from unibus.delivery import Delivery
from unibus.errors import ConfigError, UnknownChannel
from unibus.idempotency import Store

Kind = Literal["queue", "topic"]


def attached(bus: Bus, name: str | None = None, *, kind: Kind | None = None, group: str | None = None) -> Bus:
    """A copy of `bus`, closed, for tools. It knows channel `name` and `group` of it even where nobody declares them.

    Of a copy, for more than one name, it knows what that one knows, too.

    `kind`: what `name` is, where nobody declares it. Raises ConfigError.
    """
    tool = copy.copy(bus)
    tool._lifespan, tool._stack, tool._tool = None, AsyncExitStack(), bus._tool or ()
    tool.registrations, tool.channels = list(bus.registrations), list(bus.channels)
    if name is None:
        return tool
    _, channels = tool._load()
    try:
        channel = channels.find(name)
    except UnknownChannel:
        channel = Topic(name) if kind == "topic" or group is not None else Queue(name)
        tool.channels.append(channel)
    if group is not None:
        if not isinstance(channel, Topic):
            raise ConfigError(f"{channel} has no groups; drop the group {group!r}")
        tool._tool = (*tool._tool, Group(channel, group))
    return tool


def settings_of(bus: Bus) -> Settings:
    """The settings of a bus that is not open. Raises ConfigError."""
    return bus._load()[0]


def topology_of(bus: Bus) -> Topology:
    """What an open bus needs on the broker."""
    return bus._opened().topology


def address_of(bus: Bus, name: str, group: str | None) -> Queue[Any] | Group:
    """Where the messages of an open bus' channel wait. Without `group`: the service's, or the only one.

    Raises ConfigError where that is not clear.
    """
    session = bus._opened()
    channel = session.channels.find(name)
    if not isinstance(channel, Topic) or group is not None:
        return session.address(channel, group)
    groups = [
        d.address for d in session.topology.channels if isinstance(d.address, Group) and d.address.topic == channel
    ]
    ours = Group(channel, session.settings.service)
    if ours in groups:
        return ours
    if len(groups) == 1:
        return groups[0]
    known = ", ".join(g.name for g in groups) or "none"
    raise ConfigError(f"{channel}: which of its groups? Name one; known here: {known}")


async def inspect(bus: Bus) -> Sequence[Inspected]:
    """All objects that an open bus needs on the broker, and whether they are there. Changes nothing."""
    link = bus._opened().kit.link
    return await link.ask(lambda: link.adapter.inspect(topology_of(bus)))


async def declare(bus: Bus) -> None:
    """Make what is missing, on the broker and in the stores of handlers, whatever the setting `declare` says."""
    await bus.adapter.declare(replace(topology_of(bus), mode="create"))
    await bus._opened().create_stores()


def stores_of(bus: Bus) -> list[tuple[str, Store]]:
    """Of an open bus: each handler that is effectively once, in words, and its store."""
    found = [(s, s.registration.idempotency) for s in bus._opened()._stations]
    return [(f"{s.registration} of {s.address}", store) for s, store in found if store is not None]


async def peek(bus: Bus, address: Queue[Any] | Group, limit: int) -> AsyncGenerator[Delivery[Any], None]:
    """Look at up to `limit` messages without taking them, as far as the broker can (`capabilities.browse`)."""
    channel = address.topic if isinstance(address, Group) else address
    left = limit
    async with aclosing(look(bus._opened(), address, bus._opened().codec(channel), min(limit, PAGE))) as deliveries:
        async for delivery in deliveries:
            yield delivery
            left -= 1
            if not left:
                return


async def receive(
    bus: Bus, address: Queue[Any] | Group, limit: int, wait: float, *, ack: bool
) -> AsyncGenerator[list[Delivery[Any]], None]:
    """Receive up to `limit` messages as any consumer would, until none comes for `wait` seconds; some at a time.

    With `ack` those are settled once the next are asked for; else all go back in the end. Nothing is moved elsewhere: neither
    what has expired nor what can't be decoded. Raises what the broker says to an ack.
    """
    channel = address.topic if isinstance(address, Group) else address
    codec, left = bus._opened().codec(channel), limit
    source = Source(address, min(limit, PAGE if ack else MOST_HELD), ordered=channel.ordered)
    subscription = await bus.adapter.subscribe(source)
    kept: list[Delivery[Any]] = []
    try:
        while left > 0 and (batch := await subscription.receive(min(left, PAGE), wait)):
            kept += batch
            left -= len(batch)
            for delivery in batch:
                delivery.body = readable(codec, delivery.message)
            yield list(batch)
            if ack:
                kept.clear()
                for error in await subscription.settle(Outcome.ACCEPTED, batch):
                    if error is not None:
                        raise error
    finally:
        try:
            await subscription.stop()
            if kept:
                await subscription.settle(Outcome.RELEASED, kept, delays=[0.0] * len(kept))
        finally:
            await subscription.close()
