"""Carrying out a plan: make what is missing, or say what is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelNotFoundEntity

from unibus.adapter import Inspected
from unibus.driver import missing as not_there
from unibus.waiting import side_by_side
from unibus_rabbitmq import errors
from unibus_rabbitmq.link import Link
from unibus_rabbitmq.topology import Binding, Exchange, Plan, QueueSpec

log = logging.getLogger("unibus.rabbitmq")


async def create(link: Link, made: Plan, timeout: float) -> None:
    """Make what is missing, log each; an object that is there and different is a ConfigError."""
    await _each(link, made.exchanges.values(), _make_exchange, timeout)
    await _each(link, made.queues.values(), _make_queue, timeout)
    await _each(link, made.bindings, _bind, timeout)


async def verify(link: Link, made: Plan, timeout: float) -> None:
    """One NotFound that lists all exchanges and queues that are missing. AMQP has no way to look at bindings."""
    missing: list[str] = []

    async def look(channels: _Channels, item: Exchange | QueueSpec) -> None:
        if await _look(channels, item) is None:
            missing.append(f"{'exchange' if isinstance(item, Exchange) else 'queue'} {item.name!r}")

    await _each(link, [*made.exchanges.values(), *made.queues.values()], look, timeout)
    if missing:
        raise not_there("RabbitMQ", sorted(missing))


async def inspect(link: Link, made: Plan, timeout: float) -> list[Inspected]:
    """Exchanges, queues and bindings; of the last nobody can say whether they are there."""
    there: dict[str, int | None] = {}

    async def look(channels: _Channels, item: Exchange | QueueSpec) -> None:
        there[f"{type(item)} {item.name}"] = await _look(channels, item)

    items: list[Exchange | QueueSpec] = [*made.exchanges.values(), *made.queues.values()]
    await _each(link, items, look, timeout)
    found = []
    for item in items:
        count, owner = there[f"{type(item)} {item.name}"], made.owners.get(item.name)
        kind, risk = ("exchange", "") if isinstance(item, Exchange) else ("queue", _risk(item))
        shared = owner is None and isinstance(item, QueueSpec)
        rights = f"configure {item.name}" if not isinstance(item, Exchange) or item.ours else ""
        found.append(Inspected(kind, item.name, count is not None, rights, owner, count if shared else None, risk))
    for binding in made.bindings:
        name = f"{binding.source} -> {binding.destination}" + (f" ({binding.key})" if binding.key else "")
        rights = f"write {binding.destination}, read {binding.source}"
        found.append(Inspected("binding", name, None, rights, made.owners.get(binding.destination)))
    return found


def _risk(item: QueueSpec) -> str:
    if item.arguments.get("x-queue-type") == "classic" and "x-max-length" not in item.arguments:
        return "a classic queue is on one node only: its messages are lost with that disk"
    return ""


class _Channels:
    """Throw-away channels: one that a refused declaration has closed is replaced."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free: list[AbstractChannel] = []

    async def __call__(self, act: Callable[[AbstractChannel], Awaitable[Any]]) -> Any:
        channel = self._free.pop() if self._free else await self._link.channel()
        try:
            return await act(channel)
        finally:
            if not channel.is_closed:
                self._free.append(channel)

    async def close(self) -> None:
        for channel in self._free:
            await channel.close()


async def _each(link: Link, items: Any, act: Callable[[_Channels, Any], Awaitable[None]], timeout: float) -> None:
    """`act` on all items, some side by side; the first failure ends it."""
    channels = _Channels(link)
    try:
        async with asyncio.timeout(timeout):
            await side_by_side(items, lambda item: act(channels, item))
            await channels.close()
    except Exception as exc:
        raise errors.translate(exc, "declare") from exc


async def _look(channels: _Channels, item: Exchange | QueueSpec) -> int | None:
    """How many messages wait there, 0 in an exchange; None where it is missing."""

    async def look(channel: AbstractChannel) -> int:
        if isinstance(item, Exchange):
            await channel.exchange_declare(item.name, exchange_type=item.type, passive=True)
            return 0
        return (await channel.queue_declare(item.name, passive=True)).message_count or 0

    try:
        return int(await channels(look))
    except ChannelNotFoundEntity:
        return None
    except Exception as exc:
        raise errors.translate(exc, f"look at {item.name!r}") from exc


async def _make_exchange(channels: _Channels, item: Exchange) -> None:
    there = await _look(channels, item) is not None
    if there and not item.ours:
        return
    arguments = dict(item.arguments or {})
    try:
        await channels(
            lambda c: c.exchange_declare(item.name, exchange_type=item.type, durable=True, arguments=arguments)
        )
    except Exception as exc:
        raise errors.mismatch(exc, f"declare exchange {item.name!r}") from exc
    if not there:
        log.info("declared exchange %s (%s)", item.name, item.type)


async def _make_queue(channels: _Channels, item: QueueSpec) -> None:
    there = await _look(channels, item) is not None
    if there and not item.strict:
        return
    try:
        await channels(lambda c: c.queue_declare(item.name, durable=True, arguments=dict(item.arguments)))
    except Exception as exc:
        raise errors.mismatch(exc, f"declare queue {item.name!r}") from exc
    if not there:
        log.info("declared queue %s (%s)", item.name, item.arguments["x-queue-type"])


async def _bind(channels: _Channels, item: Binding) -> None:
    arguments = dict(item.arguments) if item.arguments else None

    async def bind(channel: AbstractChannel) -> None:
        if item.to_exchange:
            await channel.exchange_bind(item.destination, item.source, item.key, arguments=arguments)
        else:
            await channel.queue_bind(item.destination, item.source, item.key, arguments=arguments)

    try:
        await channels(bind)
    except Exception as exc:
        raise errors.translate(exc, f"bind {item.destination!r} to {item.source!r}") from exc
