"""Making on the broker what `topology` has planned, and looking whether it is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelNotFoundEntity

from unibus.adapter import Inspected
from unibus.driver import all_there
from unibus.waiting import side_by_side
from unibus_rabbitmq import errors
from unibus_rabbitmq.link import Link
from unibus_rabbitmq.topology import Binding, Object, Plan

Call = Callable[[Callable[[AbstractChannel], Awaitable[Any]]], Awaitable[Any]]  # do this on some channel
log = logging.getLogger("unibus.rabbitmq")


async def declare(link: Link, made: Plan, timeout: float) -> None:
    """Make what is missing, log each; an object that is there and different is a ConfigError."""
    await each(link, made.exchanges.values(), _make, timeout)
    await each(link, made.queues.values(), _make, timeout)
    await each(link, made.bindings, _bind, timeout)


async def verify(link: Link, made: Plan, timeout: float) -> None:
    """One NotFound that lists all exchanges and queues that are missing. AMQP has no way to look at bindings."""
    found = await inspect(link, made, timeout)
    all_there("RabbitMQ", sorted(f"{item.kind} {item.name!r}" for item in found if item.exists is False))


async def inspect(link: Link, made: Plan, timeout: float) -> list[Inspected]:
    """Exchanges, queues and bindings; of the last nobody can say whether they are there."""
    items = [*made.exchanges.values(), *made.queues.values()]
    counts: dict[int, int | None] = {}

    async def look(call: Call, item: Object) -> None:
        counts[id(item)] = await _look(call, item)

    await each(link, items, look, timeout)
    found = []
    for item in items:
        count, owner = counts[id(item)], made.owners.get(item.name)
        taken = item.kind == "exchange" and not item.strict and count is not None
        shared = owner is None and item.kind == "queue"
        rights = "" if taken else f"configure {item.name}"
        found.append(
            Inspected(item.kind, item.name, count is not None, rights, owner, count if shared else None, _risk(item))
        )
    for binding in made.bindings:
        name = f"{binding.source} -> {binding.destination}" + (f" ({binding.key})" if binding.key else "")
        rights = f"write {binding.destination}, read {binding.source}"
        found.append(Inspected("binding", name, None, rights, made.owners.get(binding.destination)))
    return found


def _risk(item: Object) -> str:
    if item.type == "classic" and "x-max-length" not in item.arguments:
        return "a classic queue is on one node only: its messages are lost with that disk"
    return ""


async def each(link: Link, items: Any, act: Callable[[Call, Any], Awaitable[None]], timeout: float) -> None:
    """`act` on all items, some side by side; the first failure ends it. A channel that a refusal has closed is replaced."""
    free: list[AbstractChannel] = []

    async def call(what: Callable[[AbstractChannel], Awaitable[Any]]) -> Any:
        channel = free.pop() if free else await link.channel()
        try:
            return await what(channel)
        finally:
            if not channel.is_closed:
                free.append(channel)

    try:
        async with asyncio.timeout(timeout):
            await side_by_side(items, lambda item: act(call, item))
            for channel in free:
                await channel.close()
    except Exception as exc:
        raise errors.translate(exc, "declare") from exc


def _declared(item: Object, *, passive: bool) -> Callable[[AbstractChannel], Awaitable[Any]]:
    arguments = None if passive else dict(item.arguments)
    if item.kind == "queue":
        return lambda c: c.queue_declare(item.name, passive=passive, durable=True, arguments=arguments)
    return lambda c: c.exchange_declare(
        item.name, exchange_type=item.type, passive=passive, durable=True, arguments=arguments
    )


async def _look(call: Call, item: Object) -> int | None:
    """How many messages wait there, 0 in an exchange; None where it is missing."""
    try:
        found = await call(_declared(item, passive=True))
    except ChannelNotFoundEntity:
        return None
    except Exception as exc:
        raise errors.translate(exc, f"look at {item.kind} {item.name!r}") from exc
    return getattr(found, "message_count", None) or 0


async def _make(call: Call, item: Object) -> None:
    there = await _look(call, item) is not None
    if there and not item.strict:
        return
    try:
        await call(_declared(item, passive=False))
    except Exception as exc:
        raise errors.mismatch(exc, f"declare {item.kind} {item.name!r}") from exc
    if not there:
        log.info("declared %s %s (%s)", item.kind, item.name, item.type)


async def _bind(call: Call, item: Binding) -> None:
    def bind(channel: AbstractChannel) -> Awaitable[Any]:
        act = channel.exchange_bind if item.to_exchange else channel.queue_bind
        return act(item.destination, item.source, item.key, arguments=dict(item.arguments))

    try:
        await call(bind)
    except Exception as exc:
        raise errors.translate(exc, f"bind {item.destination!r} to {item.source!r}") from exc
