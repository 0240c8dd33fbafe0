"""What stands on the broker for a topology: exchanges, queues, bindings. A pure plan; `declare` carries it out.

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
from unibus.driver import no_history
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
        self.void = f"{prefix}unibus.void"
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
        self.topics: dict[Topic[Any], config.TopicOptions] = {}
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
        options = config.topic_options(declared)
        exchange = config.check_exchange(options.exchange or declared.name, topic)
        key = declared.name if options.routing_key is None else options.routing_key
        made, names = self.made, self.names
        made.exchanges[exchange] = Exchange(exchange, options.exchange_type, ours=options.exchange is None)
        made.routes[topic] = Route(exchange, key, key)
        made.owners[exchange] = topic
        self.topics[topic] = options.model_copy(update={"exchange": exchange, "routing_key": key})
        if topic.delayed:
            made.bindings.append(Binding(names.returns, exchange, key, to_exchange=True))
            # A topic may have no group when a message falls due. Without any route the server would keep the message at
            # the head of the hold queue and, after a few of them, release no other; so there is always one, to nowhere.
            made.queues[names.void] = QueueSpec(names.void, {"x-queue-type": "classic", "x-max-length": 0})
            made.bindings.append(Binding(names.returns, names.void, key))

    def _group(self, declared: Declared, group: Group) -> None:
        options = config.group_options(declared)
        topic = self.topics.get(group.topic)
        if topic is None or topic.exchange is None:
            raise ConfigError(f"{group}: its topic is not declared before it")
        self._work(declared, group, options.queue_type, group.topic)
        key = group_key(topic, options.routing_key)
        self.made.bindings.append(Binding(topic.exchange, declared.name, key, options.arguments or None))
        self.made.routes[group] = Route("", declared.name, declared.name)

    def _queue(self, declared: Declared, queue: Queue[Any]) -> None:
        options = config.queue_options(declared)
        key = declared.name if options.routing_key is None else options.routing_key
        self._work(declared, queue, options.queue_type, queue)
        if options.exchange is None:
            if options.routing_key is not None or options.arguments:
                raise ConfigError(f"queues.{queue.name}.rabbitmq: routing_key and arguments need an exchange; name one")
            self.made.routes[queue] = Route("", declared.name, declared.name)
            return
        exchange = config.check_exchange(options.exchange, queue)
        self.made.exchanges[exchange] = Exchange(exchange, options.exchange_type, ours=False)
        self.made.bindings.append(Binding(exchange, declared.name, key, options.arguments or None))
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
        arguments: dict[str, Any] = {
            "x-queue-type": kind,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": sink,
        }
        if kind == "quorum":  # at-least-once needs reject-publish; without a length limit nothing is ever rejected
            arguments |= {
                "x-delivery-limit": DELIVERY_LIMIT,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",
            }
        if features.priorities:
            arguments["x-max-priority"] = features.priorities - 1
        if features.ordered:
            arguments["x-single-active-consumer"] = True
        made = self.made
        made.queues[declared.name] = QueueSpec(declared.name, arguments)
        copies = not features.ordered and not (kind == "quorum" and self.version >= (4, 3))
        made.places[address] = Place(declared.name, counted=kind == "quorum", copies=copies, single=features.ordered)
        made.logical[declared.name] = made.owners[declared.name] = address
        made.bindings.append(Binding(self.names.returns, declared.name, declared.name))

    def _sink(self, address: Address, name: str, *, letters: bool) -> None:
        """Dead letters and invalid messages: kept until someone takes them."""
        made = self.made
        made.queues[name] = QueueSpec(name, self.unlimited, strict=False)
        made.owners[name] = address
        made.places[address] = Place(name, letters=letters)
        made.routes[address] = Route("", name, name)

    def _holds(self) -> None:
        made, names = self.made, self.names
        made.exchanges[names.lost] = Exchange(names.lost, "fanout")
        made.exchanges[names.returns] = Exchange(names.returns, "direct", {"alternate-exchange": names.lost})
        made.queues[names.lost] = QueueSpec(names.lost, self.unlimited, strict=False)
        made.bindings.append(Binding(names.lost, names.lost, ""))
        made.steps = tuple(sorted({max(1, ceil(delay * 1000)) for delay in self.topology.delays} | set(LADDER)))
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


def group_key(topic: config.TopicOptions, given: str | None) -> str:
    """The binding key with which a group gets all that is published to its topic."""
    if given is not None:
        return given
    return "#" if topic.exchange_type == "topic" else topic.routing_key or ""


def step(steps: tuple[int, ...], wait: float) -> tuple[int, bool]:
    """The hold queue for a wait of so many seconds: its ms, and whether the message is due when it leaves.

    Rounded up by less than a second; where that is not possible, the longest hop that is not too long.
    """
    ms = ceil(wait * 1000)
    at = bisect_left(steps, ms)
    if at < len(steps) and (at == 0 or steps[at] - ms < 1000):
        return steps[at], True
    return steps[at - 1], False
