"""What stands on the broker for a topology: exchanges, queues, bindings. A pure plan, and the code that carries it out.

Arguments are constants: they never depend on a policy, since a changed one would be PRECONDITION_FAILED for ever.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelNotFoundEntity

from unibus.adapter import Declared, Topology
from unibus.channel import Address, Group, Queue, Topic, dead_letter_queue
from unibus.errors import ConfigError, NotFound
from unibus_rabbitmq import config, errors
from unibus_rabbitmq.capabilities import number
from unibus_rabbitmq.link import Link

log = logging.getLogger("unibus.rabbitmq")

DELIVERY_LIMIT = 100  # a backstop far above what the crash guard allows: neighbours of a poison message get counted too
LADDER = tuple(1000 << n for n in range(13))  # 1 s to 4096 s, in ms
_AT_ONCE = 8  # channels that declare side by side


@dataclass(frozen=True, slots=True)
class Route:
    """How to publish to an address: at once, and by way of a hold queue (the key at the return exchange)."""

    exchange: str
    routing_key: str
    hold_key: str


@dataclass(frozen=True, slots=True)
class Place:
    """How to receive from an address."""

    queue: str
    counted: bool = True  # a quorum queue: it counts deliveries


@dataclass(frozen=True, slots=True)
class Exchange:
    name: str
    type: str
    arguments: Mapping[str, Any] | None = None
    ours: bool = True  # False: named in the settings, taken as it is


@dataclass(frozen=True, slots=True)
class QueueSpec:
    name: str
    arguments: Mapping[str, Any]
    strict: bool = True  # False: taken as it is where it exists


@dataclass(frozen=True, slots=True)
class Binding:
    source: str
    destination: str
    key: str
    arguments: Mapping[str, Any] | None = None
    to_exchange: bool = False


class Names:
    """The objects that all buses with one prefix share."""

    def __init__(self, prefix: str) -> None:
        self.returns = f"{prefix}unibus.return"
        self.lost = f"{prefix}unibus.lost"
        self.holds = f"{prefix}unibus.hold."

    def hold(self, ms: int) -> str:
        return f"{self.holds}{ms}"


@dataclass(slots=True)
class Plan:
    routes: dict[Address, Route] = field(default_factory=dict)
    places: dict[Address, Place] = field(default_factory=dict)
    logical: dict[str, Address] = field(default_factory=dict)  # by name of its queue
    exchanges: dict[str, Exchange] = field(default_factory=dict)
    queues: dict[str, QueueSpec] = field(default_factory=dict)
    bindings: list[Binding] = field(default_factory=list)
    steps: tuple[int, ...] = ()  # delays that have a hold queue, ms, ascending


def plan(topology: Topology, prefix: str, version: str) -> Plan:
    """All objects of a topology. Raises ConfigError."""
    made = Plan()
    names = Names(prefix)
    topics: dict[Topic[Any], config.TopicOptions] = {}
    for declared in topology.channels:
        config.check_name(declared.name, declared.address)
        if isinstance(declared.address, Topic):
            topics[declared.address] = _plan_topic(made, names, declared)
        elif isinstance(declared.address, Group):
            _plan_group(made, names, declared, topology, topics)
        elif declared.role == "channel":
            _plan_queue(made, names, declared, topology)
        else:
            _plan_sink(made, declared, version)
    if made.places:
        _plan_holds(made, names, topology, version)
    _check_return_keys(made, names)
    return made


def _plan_topic(made: Plan, names: Names, declared: Declared) -> config.TopicOptions:
    options = config.topic_options(declared)
    exchange = config.check_exchange(options.exchange or declared.name, declared.address)
    key = declared.name if options.routing_key is None else options.routing_key
    ours = options.exchange is None
    made.exchanges.setdefault(exchange, Exchange(exchange, options.exchange_type, ours=ours))
    made.routes[declared.address] = Route(exchange, key, key)
    if declared.address.delayed:  # type: ignore[union-attr]  # a Topic: checked by the caller
        made.bindings.append(Binding(names.returns, exchange, key, to_exchange=True))
    return options.model_copy(update={"exchange": exchange, "routing_key": key})


def _plan_queue(made: Plan, names: Names, declared: Declared, topology: Topology) -> None:
    queue = declared.address
    assert isinstance(queue, Queue)  # noqa: S101  # for mypy: the caller looked
    options = config.queue_options(declared)
    key = declared.name if options.routing_key is None else options.routing_key
    _add_queue(made, names, declared, topology, options.queue_type, queue)
    if options.exchange is None:
        if options.routing_key is not None or options.arguments:
            raise ConfigError(f"queues.{queue.name}.rabbitmq: routing_key and arguments need an exchange; name one")
        made.routes[queue] = Route("", declared.name, declared.name)
    else:
        exchange = config.check_exchange(options.exchange, queue)
        made.exchanges.setdefault(exchange, Exchange(exchange, options.exchange_type, ours=False))
        made.bindings.append(Binding(exchange, declared.name, key, options.arguments or None))
        made.routes[queue] = Route(exchange, key, declared.name)


def _plan_group(
    made: Plan, names: Names, declared: Declared, topology: Topology, topics: Mapping[Topic[Any], config.TopicOptions]
) -> None:
    group = declared.address
    assert isinstance(group, Group)  # noqa: S101  # for mypy: the caller looked
    options = config.group_options(declared)
    topic = topics.get(group.topic)
    if topic is None or topic.exchange is None:
        raise ConfigError(f"{group}: its topic is not declared before it")
    _add_queue(made, names, declared, topology, options.queue_type, group.topic)
    key = group_key(topic, options.routing_key)
    made.bindings.append(Binding(topic.exchange, declared.name, key, options.arguments or None))
    made.routes[group] = Route("", declared.name, declared.name)


def group_key(topic: config.TopicOptions, given: str | None) -> str:
    """The binding key with which a group gets all that is published to its topic."""
    if given is not None:
        return given
    return "#" if topic.exchange_type == "topic" else topic.routing_key or ""


def _add_queue(
    made: Plan,
    names: Names,
    declared: Declared,
    topology: Topology,
    given: str | None,
    features: Queue[Any] | Topic[Any],
) -> None:
    """A queue that is consumed and retried: with dead letters of its own, and a way back from the hold queues."""
    address = declared.address
    assert isinstance(address, Queue | Group)  # noqa: S101  # for mypy: the callers looked
    if features.priorities and given == "quorum":
        raise ConfigError(f"{address}: quorum queues have no priorities; drop queue_type = quorum, or priorities")
    kind = "classic" if features.priorities else given or "quorum"
    letters = dead_letter_queue(address)
    sink = next((d.name for d in topology.channels if d.address == letters), None)
    arguments: dict[str, Any] = {"x-queue-type": kind}
    if sink is not None:
        arguments |= {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": sink}
    if kind == "quorum":
        arguments["x-delivery-limit"] = DELIVERY_LIMIT
        if sink is not None:  # at-least-once needs reject-publish; without a length limit nothing is ever rejected
            arguments |= {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
    if features.priorities:
        arguments["x-max-priority"] = features.priorities - 1
    if features.ordered:
        arguments["x-single-active-consumer"] = True
    made.queues[declared.name] = QueueSpec(declared.name, arguments)
    made.places[address] = Place(declared.name, counted=kind == "quorum")
    made.logical[declared.name] = address
    made.bindings.append(Binding(names.returns, declared.name, declared.name))


def _plan_sink(made: Plan, declared: Declared, version: str) -> None:
    """Dead letters and invalid messages: kept until someone takes them. Only constants of the server's version."""
    arguments: dict[str, Any] = {"x-queue-type": "quorum"}
    if number(version) >= (4, 0):
        arguments["x-delivery-limit"] = -1  # looking at a dead letter must not count towards its end
    made.queues[declared.name] = QueueSpec(declared.name, arguments, strict=False)
    made.places[declared.address] = Place(declared.name)
    made.routes[declared.address] = Route("", declared.name, declared.name)


def _plan_holds(made: Plan, names: Names, topology: Topology, version: str) -> None:
    made.exchanges[names.lost] = Exchange(names.lost, "fanout")
    made.exchanges[names.returns] = Exchange(names.returns, "direct", {"alternate-exchange": names.lost})
    kept: dict[str, Any] = {"x-queue-type": "quorum"}
    if number(version) >= (4, 0):
        kept["x-delivery-limit"] = -1
    made.queues[names.lost] = QueueSpec(names.lost, kept, strict=False)
    made.bindings.append(Binding(names.lost, names.lost, ""))
    made.steps = tuple(sorted({max(1, ceil(delay * 1000)) for delay in topology.delays} | set(LADDER)))
    for ms in made.steps:
        name = names.hold(ms)
        made.exchanges[name] = Exchange(name, "fanout")  # keeps the routing key, the way home
        made.queues[name] = QueueSpec(
            name,
            {
                "x-queue-type": "quorum",
                "x-message-ttl": ms,
                "x-dead-letter-exchange": names.returns,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",
            },
        )
        made.bindings.append(Binding(name, name, ""))


def _check_return_keys(made: Plan, names: Names) -> None:
    """One key at the return exchange is one destination, or a retry would reach another channel too."""
    seen: dict[str, str] = {}
    for binding in made.bindings:
        if binding.source == names.returns and seen.setdefault(binding.key, binding.destination) != binding.destination:
            raise ConfigError(
                f"rabbitmq: {seen[binding.key]!r} and {binding.destination!r} would both get what is delayed for "
                f"{binding.key!r}; give the delayed topic another routing_key"
            )


def step(steps: tuple[int, ...], wait: float) -> tuple[int, bool]:
    """The hold queue for a wait of so many seconds: its ms, and whether the message is due when it leaves.

    Rounded up by less than a second; where that is not possible, the longest hop that is not too long.
    """
    ms = ceil(wait * 1000)
    at = bisect_left(steps, ms)
    if at < len(steps) and (at == 0 or steps[at] - ms < 1000):
        return steps[at], True
    return steps[at - 1], False


async def create(link: Link, made: Plan, timeout: float) -> None:
    """Make what is missing, log each; an object that is there and different is a ConfigError."""
    await _each(link, made.exchanges.values(), _make_exchange, timeout)
    await _each(link, made.queues.values(), _make_queue, timeout)
    await _each(link, made.bindings, _bind, timeout)


async def verify(link: Link, made: Plan, timeout: float) -> None:
    """One NotFound that lists all exchanges and queues that are missing. AMQP has no way to look at bindings."""
    missing: list[str] = []

    async def look(channels: _Channels, item: Exchange | QueueSpec) -> None:
        if not await _exists(channels, item):
            missing.append(f"{'exchange' if isinstance(item, Exchange) else 'queue'} {item.name!r}")

    await _each(link, [*made.exchanges.values(), *made.queues.values()], look, timeout)
    if missing:
        raise NotFound(
            f"missing on RabbitMQ: {', '.join(sorted(missing))}; run `unibus declare`, or set declare = create"
        )


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
    waiting = iter(list(items))

    async def work() -> None:
        for item in waiting:
            await act(channels, item)

    try:
        async with asyncio.timeout(timeout):
            results = await asyncio.gather(*(work() for _ in range(_AT_ONCE)), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            await channels.close()
    except Exception as exc:
        raise errors.translate(exc, "declare") from exc


async def _exists(channels: _Channels, item: Exchange | QueueSpec) -> bool:
    async def look(channel: AbstractChannel) -> None:
        if isinstance(item, Exchange):
            await channel.exchange_declare(item.name, exchange_type=item.type, passive=True)
        else:
            await channel.queue_declare(item.name, passive=True)

    try:
        await channels(look)
    except ChannelNotFoundEntity:
        return False
    except Exception as exc:
        raise errors.translate(exc, f"look at {item.name!r}") from exc
    return True


async def _make_exchange(channels: _Channels, item: Exchange) -> None:
    there = await _exists(channels, item)
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
    there = await _exists(channels, item)
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
