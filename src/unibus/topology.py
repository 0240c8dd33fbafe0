"""From handlers, channels and settings to the topology: finite, known at start, checked against the broker's abilities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from unibus.adapter import Declared, Topology
from unibus.capabilities import Capabilities, Support, emulated
from unibus.channel import (
    DEAD_LETTER,
    INVALID,
    Group,
    Queue,
    Topic,
    dead_letter_queue,
    invalid_queue,
)
from unibus.errors import ConfigError, UnknownChannel, Unsupported
from unibus.registrations import Registration
from unibus.settlement import Place, check_policy

if TYPE_CHECKING:  # importing unibus must not import its configuration
    from unibus.config import ConsumerSettings, Settings


@dataclass(frozen=True, slots=True)
class Station:
    """One handler at its address, with all that was said about it."""

    registration: Registration
    address: Queue[Any] | Group
    settings: ConsumerSettings

    @property
    def channel(self) -> Queue[Any] | Topic[Any]:
        return self.address.topic if isinstance(self.address, Group) else self.address


class Channels:
    """The channels a bus knows, by name: from its handlers, `Bus(channels=...)` and unibus.toml."""

    def __init__(self, channels: Iterable[Queue[Any] | Topic[Any]]) -> None:
        self._by_name: dict[str, Queue[Any] | Topic[Any]] = {}
        for channel in channels:
            self.add(channel)

    def add(self, channel: Queue[Any] | Topic[Any]) -> None:
        """Raises ConfigError where one name stands for two different channels."""
        known = self._by_name.setdefault(channel.name, channel)
        if type(known) is not type(channel):
            raise ConfigError(f"{channel.name!r} is declared as a queue and as a topic; give one of them another name")
        for feature in ("body", "ordered", "priorities", "delayed", "codec", "reply"):
            mine, theirs = getattr(known, feature, None), getattr(channel, feature, None)
            if mine is not theirs and mine != theirs:
                raise ConfigError(
                    f"{channel} is declared twice, with different {feature}; declare it once and import it"
                )

    def find(self, channel: Queue[Any] | Topic[Any] | str) -> Queue[Any] | Topic[Any]:
        """The channel itself; raises UnknownChannel."""
        name = channel if isinstance(channel, str) else channel.name
        known = self._by_name.get(name)
        if known is None:
            if isinstance(channel, str):
                raise UnknownChannel(name, tuple(self._by_name))
            error = UnknownChannel(name, ())
            error.args = (
                f"{channel} is not known to this bus: it has no handler for it; name it in Bus(channels=[...])",
            )
            raise error
        if not isinstance(channel, str) and type(known) is not type(channel):
            raise ConfigError(f"{name!r} is a {type(known).__name__.lower()}, not a {type(channel).__name__.lower()}")
        return known

    def __iter__(self) -> Iterator[Queue[Any] | Topic[Any]]:
        return iter(self._by_name.values())


def stations(
    registrations: Sequence[Registration], channels: Channels, settings: Settings, instance: str
) -> list[Station]:
    """Where each handler stands. Raises ConfigError for two handlers at one address."""
    found: list[Station] = []
    taken: dict[object, Registration] = {}
    for number, registration in enumerate(registrations):
        channel = channels.find(registration.channel)
        address: Queue[Any] | Group
        if registration.kind == "subscriber":
            if not isinstance(channel, Topic):
                raise ConfigError(f"{registration}: {channel} is no topic; use @bus.consumer for a queue")
            if registration.broadcast:
                address = Group(channel, f"{settings.service}.{instance}.{number}", ephemeral=True)
            else:
                if registration.group is None and settings.source("service") == "built-in" and settings.app is None:
                    raise ConfigError(
                        f"{registration} of {channel} has no group, and the service has no name to stand for it; "
                        f"use group=..., Bus(service=...), UNIBUS_SERVICE or `service` in unibus.toml"
                    )
                address = Group(channel, registration.group or settings.service)
        elif isinstance(channel, Queue):
            address = channel
        else:
            raise ConfigError(f"{registration}: {channel} is no queue; use @bus.subscriber for a topic")
        if address in taken:
            hint = (
                "give one of them another group"
                if isinstance(address, Group)
                else "a queue has one handler in a process"
            )
            raise ConfigError(f"{address} has two handlers, {taken[address]} and {registration}: {hint}")
        taken[address] = registration
        found.append(Station(registration, address, settings.consumer(address, registration.options)))
    return found


def build(channels: Channels, stations: Sequence[Station], settings: Settings, more: Sequence[Group] = ()) -> Topology:
    """Everything the bus will ever need on the broker. `more`: groups that neither a handler nor unibus.toml names."""
    groups = dict.fromkeys(
        [s.address for s in stations if isinstance(s.address, Group) and not s.address.ephemeral]
        + settings.declared_groups()
        + list(more)
    )
    declared: list[Declared] = []
    for channel in channels:
        declared.append(Declared(channel, settings.physical(channel), options=settings.options(channel)))
        if isinstance(channel, Queue):
            declared += _failures(channel, settings)
    starts = {station.address: station.registration.start for station in stations}
    for group in groups:
        start, options = starts.get(group, "new"), settings.options(group)
        declared.append(Declared(group, settings.physical(group), options=options, start=start))
        declared += _failures(group, settings)
    _check_names(declared)
    waits = set(settings.delays)
    for station in stations:
        if not station.channel.ordered and station.settings.guarantee == "at-least-once":
            waits.update(station.settings.retry.waits())
    return Topology(settings.declare, tuple(declared), tuple(sorted(waits)))


def _failures(address: Queue[Any] | Group, settings: Settings) -> list[Declared]:
    return [
        Declared(dead_letter_queue(address), settings.derived(address, DEAD_LETTER), "dead letter"),
        Declared(invalid_queue(address), settings.derived(address, INVALID), "invalid"),
    ]


def _check_names(declared: Sequence[Declared]) -> None:
    """No two addresses may meet: `a.b` the queue and group `b` of topic `a` would."""
    seen: dict[str, Declared] = {}
    for one in declared:
        if isinstance(one.address, Topic):
            continue  # topics stand apart from what is received from, on every broker
        other = seen.setdefault(one.name, one)
        if other is not one:
            raise ConfigError(
                f"{other.address} and {one.address} would both be {one.name!r} on the broker; rename one of them"
            )


@dataclass(frozen=True, slots=True)
class Need:
    """What a channel or a handler asks of the broker. `problem`: why it is refused at start, None where it is not."""

    address: Queue[Any] | Topic[Any] | Group
    feature: str  # its name in Capabilities
    what: str
    support: Support
    problem: ConfigError | Unsupported | None = None


def needs(
    channels: Iterable[Queue[Any] | Topic[Any]], stations: Sequence[Station], known: Capabilities
) -> Iterator[Need]:
    """All that can be refused at start, and how a broker with these capabilities has it."""
    for channel in channels:
        if channel.ordered:
            yield _need(known, channel, "order", f"{channel} is ordered by key")
        if channel.priorities:
            yield _need(
                known, channel, "priority", f"{channel} has {channel.priorities} priorities", channel.priorities
            )
        if channel.delayed:
            yield _need(known, channel, "delay", f"{channel} takes delayed messages")
        if isinstance(channel, Queue) and channel.reply is not None:
            yield _need(known, channel, "reply", f"{channel} has replies")
    for station in stations:
        what, start = f"{station.registration} of {station.address}", station.registration.start
        if station.settings.retry.max_retries:
            yield _retries(known, station, what)
        if start != "new":
            need = _need(known, station.address, "replay", f"{what} has start={start!r}")
            if isinstance(start, tuple) and known.replay and not known.start_positions:
                problem = Unsupported(f'{what} starts at positions: {known.adapter} takes "all" or a time')
                need = replace(need, problem=problem)
            yield need


def _need(
    known: Capabilities, address: Queue[Any] | Topic[Any] | Group, feature: str, what: str, level: float = 0
) -> Need:
    support: Support = getattr(known, feature)
    problem = None
    if not support:
        problem = Unsupported(f"{what}: {known.adapter} can't do that ({support.how})")
    elif support.limit is not None and level > support.limit:
        problem = Unsupported(f"{what}: {known.adapter} goes up to {support.limit:g}")
    return Need(address, feature, what, support, problem)


def _retries(known: Capabilities, station: Station, where: str) -> Need:
    policy = station.settings.retry
    private = isinstance(station.address, Group) and station.address.ephemeral
    place = Place(ordered=station.channel.ordered, private=private)
    waits = policy.waits()
    longest = waits[-1] * (1 + policy.jitter) if waits else 0.0
    support = known.delay
    if place.ordered or place.private or longest < max(known.park_below, 1e-9):
        why = "its key waits with it" if place.ordered else "nothing else waits for it"
        support = emulated(f"held by its consumer, and {why}", known.park_limit)
    what = f"{where} retries after up to {longest:g} s" if longest else f"{where} retries at once"
    try:
        check_policy(policy, place, known, where)
    except (ConfigError, Unsupported) as error:
        return Need(station.address, "delay", what, support, error)
    return Need(station.address, "delay", what, support)


def check(channels: Iterable[Queue[Any] | Topic[Any]], stations: Sequence[Station], capabilities: Capabilities) -> None:
    """Refuse at start what the broker can't do. Raises the first ConfigError, or one Unsupported that lists all of it."""
    problems = [need.problem for need in needs(channels, stations, capabilities) if need.problem is not None]
    for problem in problems:
        if isinstance(problem, ConfigError):
            raise problem
    if problems:
        raise Unsupported("; ".join(str(problem) for problem in problems))
