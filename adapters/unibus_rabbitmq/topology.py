"""What stands on the broker for a topology: exchanges, queues, bindings. Pure; `declaring` carries it out.

Arguments are constants: they never depend on a policy, since a changed one would be PRECONDITION_FAILED for ever.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from unibus.adapter import Declared, Topology
from unibus.channel import DEAD_LETTER, Address, Group, Queue, Topic, dead_letter_queue
from unibus.config_tables import check_options
from unibus.driver import no_history, topic_of
from unibus.errors import ConfigError
from unibus_rabbitmq import config
from unibus_rabbitmq.capabilities import number

DELIVERY_LIMIT = 100  # a backstop far above what the crash guard allows: neighbours of a poison message get counted too
LADDER = tuple(1000 << n for n in range(13))  # 1 s to 4096 s, in ms


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
    copies: bool = False  # giving a message back counts as a delivery, and order does not matter: see `_release`
    single: bool = False  # has a single active consumer
    letters: bool = False  # dead letters come here, the server's own too


@dataclass(frozen=True, slots=True)
class Object:
    """An exchange or a queue."""

    kind: str  # "exchange" or "queue"
    name: str
    type: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = True  # False: taken as it is where it exists


@dataclass(frozen=True, slots=True)
class Binding:
    source: str
    destination: str
    key: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    to_exchange: bool = False


class Names:
    """The objects that all buses with one prefix share. `hold` is the beginning of the names of hold queues, in ms."""

    def __init__(self, prefix: str) -> None:
        self.returns, self.lost, self.void, self.hold = (
            f"{prefix}unibus.{end}" for end in ("return", "lost", "void", "hold.")
        )


@dataclass(slots=True)
class Plan:
    routes: dict[Address, Route] = field(default_factory=dict)
    places: dict[Address, Place] = field(default_factory=dict)
    exchanges: dict[str, Object] = field(default_factory=dict)
    queues: dict[str, Object] = field(default_factory=dict)
    bindings: list[Binding] = field(default_factory=list)
    topics: dict[Topic[Any], tuple[str, str, str]] = field(default_factory=dict)  # exchange, its type, routing key
    owners: dict[str, Address] = field(default_factory=dict)  # by name of a queue or exchange that isn't shared
    steps: tuple[int, ...] = ()  # delays that have a hold queue, ms, ascending


def plan(topology: Topology, prefix: str, version: str) -> Plan:
    """All objects of a topology. Raises ConfigError."""
    return _Planner(topology, Names(prefix), version).plan()


class _Planner:
    def __init__(self, topology: Topology, names: Names, version: str) -> None:
        self.made = Plan()
        self.topology = topology
        self.names = names
        # From 4.0 on a quorum queue has a limit of 20 unless told otherwise. What only waits must not run into it.
        self.version = number(version)
        self.unlimited = {"x-queue-type": "quorum"} | ({"x-delivery-limit": -1} if self.version >= (4, 0) else {})

    def plan(self) -> Plan:
        for declared in self.topology.channels:
            config.check_name(declared.name, declared.address)
            no_history("RabbitMQ", declared.address, declared.start)
            address = declared.address
            if isinstance(address, Topic):
                self._topic(declared, address)
            elif isinstance(address, Group):
                self._group(declared, address)
            elif declared.role == "channel":
                self._queue(declared, address)
            else:
                self._sink(declared.address, declared.name, letters=declared.role == "dead letter")
        if self.made.places or self.made.bindings:
            self._holds()
        self._check_return_keys()
        return self.made

    def _topic(self, declared: Declared, topic: Topic[Any]) -> None:
        options = check_options(config.TopicOptions, declared, "rabbitmq")
        exchange = config.check_exchange(options.exchange or declared.name, topic)
        key = declared.name if options.routing_key is None else options.routing_key
        made, names = self.made, self.names
        self._exchange(exchange, options.exchange_type, strict=options.exchange is None)
        made.routes[topic] = Route(exchange, key, key)
        made.topics[topic] = (exchange, options.exchange_type, key)
        made.owners[exchange] = topic
        if topic.delayed:
            made.bindings.append(Binding(names.returns, exchange, key, to_exchange=True))
            # A topic may have no group when a message falls due. Without any route the server would keep the message at
            # the head of the hold queue and, after a few of them, release no other; so there is always one, to nowhere.
            self._make(names.void, {"x-queue-type": "classic", "x-max-length": 0})
            made.bindings.append(Binding(names.returns, names.void, key))

    def _group(self, declared: Declared, group: Group) -> None:
        options = check_options(config.GroupOptions, declared, "rabbitmq")
        exchange, kind, key = topic_of(self.made.topics, group)
        self._work(declared, group, options.queue_type, group.topic)
        key = group_key(kind, key) if options.routing_key is None else options.routing_key
        self.made.bindings.append(Binding(exchange, declared.name, key, options.arguments))
        self.made.routes[group] = Route("", declared.name, declared.name)

    def _queue(self, declared: Declared, queue: Queue[Any]) -> None:
        options = check_options(config.QueueOptions, declared, "rabbitmq")
        key = declared.name if options.routing_key is None else options.routing_key
        self._work(declared, queue, options.queue_type, queue)
        if options.exchange is None:
            if options.routing_key is not None or options.arguments:
                raise ConfigError(f"queues.{queue.name}.rabbitmq: routing_key and arguments need an exchange; name one")
            self.made.routes[queue] = Route("", declared.name, declared.name)
            return
        exchange = config.check_exchange(options.exchange, queue)
        self._exchange(exchange, options.exchange_type, strict=False)
        self.made.bindings.append(Binding(exchange, declared.name, key, options.arguments))
        self.made.routes[queue] = Route(exchange, key, declared.name)

    def _work(
        self, declared: Declared, address: Queue[Any] | Group, given: str | None, features: Queue[Any] | Topic[Any]
    ) -> None:
        """A queue that is consumed and retried: with dead letters of its own, and a way back from the hold queues."""
        if features.priorities and given == "quorum":
            raise ConfigError(f"{address}: quorum queues have no priorities; drop queue_type = quorum, or priorities")
        kind = "classic" if features.priorities else given or "quorum"
        letters = dead_letter_queue(address)
        sink = next((d.name for d in self.topology.channels if d.address == letters), None)
        if (
            sink is None
        ):  # over the delivery limit a queue without dead letters drops messages, so there are always some
            sink = declared.name + DEAD_LETTER
            self._sink(letters, sink, letters=True)
        arguments: dict[str, Any] = {"x-queue-type": kind, "x-dead-letter-exchange": ""}
        arguments["x-dead-letter-routing-key"] = sink
        if kind == "quorum":
            arguments |= {"x-delivery-limit": DELIVERY_LIMIT} | _safely_to("")
        if features.priorities:
            arguments["x-max-priority"] = features.priorities - 1
        if features.ordered:
            arguments["x-single-active-consumer"] = True
        made = self.made
        self._make(declared.name, arguments)
        copies = not features.ordered and not (kind == "quorum" and self.version >= (4, 3))
        made.places[address] = Place(declared.name, counted=kind == "quorum", copies=copies, single=features.ordered)
        made.owners[declared.name] = address
        made.bindings.append(Binding(self.names.returns, declared.name, declared.name))

    def _sink(self, address: Address, name: str, *, letters: bool) -> None:
        """Dead letters and invalid messages: kept until someone takes them."""
        made = self.made
        self._make(name, self.unlimited, strict=False)
        made.owners[name] = address
        made.places[address] = Place(name, letters=letters)
        made.routes[address] = Route("", name, name)

    def _holds(self) -> None:
        made, names = self.made, self.names
        self._exchange(names.lost, "fanout")
        self._exchange(names.returns, "direct", {"alternate-exchange": names.lost})
        self._make(names.lost, self.unlimited, strict=False)
        made.bindings.append(Binding(names.lost, names.lost, ""))
        made.steps = tuple(sorted({max(1, ceil(delay * 1000)) for delay in self.topology.delays} | set(LADDER)))
        for ms in made.steps:
            name = f"{names.hold}{ms}"
            self._exchange(name, "fanout")  # keeps the routing key, the way home
            self._make(name, {"x-queue-type": "quorum", "x-message-ttl": ms} | _safely_to(names.returns))
            made.bindings.append(Binding(name, name, ""))

    def _exchange(
        self, name: str, kind: str, arguments: Mapping[str, Any] | None = None, *, strict: bool = True
    ) -> None:
        self.made.exchanges[name] = Object("exchange", name, kind, arguments or {}, strict)

    def _make(self, name: str, arguments: Mapping[str, Any], *, strict: bool = True) -> None:
        self.made.queues[name] = Object("queue", name, arguments["x-queue-type"], arguments, strict)

    def _check_return_keys(self) -> None:
        """One key at the return exchange is one destination, or a retry would reach another channel too."""
        seen: dict[str, tuple[bool, str]] = {}
        for binding in self.made.bindings:
            if binding.source != self.names.returns or binding.destination == self.names.void:
                continue
            place = (binding.to_exchange, binding.destination)
            if seen.setdefault(binding.key, place) != place:
                raise ConfigError(
                    f"rabbitmq: {seen[binding.key][1]!r} and {binding.destination!r} would both get what is delayed for "
                    f"{binding.key!r}; give the delayed topic another name or routing_key"
                )


def _safely_to(exchange: str) -> dict[str, Any]:
    """Dead-letter at least once. That needs reject-publish; without a length limit nothing is ever rejected."""
    return {
        "x-dead-letter-exchange": exchange,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


def group_key(exchange_type: str, routing_key: str) -> str:
    """The binding key with which a group gets all that is published to its topic."""
    return "#" if exchange_type == "topic" else routing_key


def step(steps: tuple[int, ...], wait: float) -> tuple[int, bool]:
    """The hold queue for a wait of so many seconds: its ms, and whether the message is due when it leaves.

    Rounded up by less than a second; where that is not possible, the longest hop that is not too long.
    """
    ms = ceil(wait * 1000)
    at = bisect_left(steps, ms)
    if at < len(steps) and (at == 0 or steps[at] - ms < 1000):
        return steps[at], True
    return steps[at - 1], False
