"""Which keys a topology needs. A pure plan; the adapter makes them.

The stream of a channel has the channel's name. All else that belongs to it has that name as its hash tag, so that it shares the
slot: `{orders}.dlq`, `{orders}:delayed`, `{orders}:p1` (priority 1), `{order.charged}.billing` (what a group alone gets again).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unibus.adapter import Declared, Topology
from unibus.channel import DEAD_LETTER, INVALID, Address, Group, Inbox, Queue, Topic, stem
from unibus.config_tables import DriverTable, check_options
from unibus.driver import only_one, topic_of
from unibus.errors import ConfigError, Unsupported
from unibus_redis import config

PRIVATE = "unibus.private."  # consumer groups that end with their process


@dataclass(frozen=True, slots=True)
class Place:
    """An address on the server. `group` is "" for a topic: it is sent to, and only its groups receive."""

    address: Address
    tag: str
    group: str
    streams: tuple[str, ...]  # to send to, by priority
    topic: tuple[
        str, ...
    ] = ()  # of a topic or its group: shared streams, which are trimmed; from the others what is settled is deleted
    start: str = "0"  # of a group on the shared streams
    ordered: bool = False

    @property
    def first(self) -> str:
        """A key of it; all have one slot."""
        return self.streams[0] if self.streams else self.topic[0]

    @property
    def kind(self) -> str:
        return "q" if self.group else "t"

    @property
    def lanes(self) -> tuple[str, ...]:
        """The streams to receive from, the first first: the highest priority, and of one what was tried before."""
        own = self.streams if self.group else ()
        shared = self.topic if self.group else ()
        levels = range(max(len(own), len(shared)) - 1, -1, -1)
        return tuple(lane[n] for n in levels for lane in (own, shared) if n < len(lane))

    @property
    def delayed(self) -> tuple[str, str]:
        if not self.tag:  # replies are never delayed, so these stand for nothing
            return self.streams[0], self.streams[0]
        return f"{{{self.tag}}}:delayed", f"{{{self.tag}}}:delayed:messages"

    @property
    def owner(self) -> str:
        return f"{{{self.tag}}}:owner:{self.group}"

    def made(self) -> list[tuple[str, str, str]]:
        """(stream, group, start) of all that has to be there."""
        if not self.group:
            return [(stream, "", "") for stream in self.streams]
        return [(s, self.group, "0") for s in self.streams] + [(s, self.group, self.start) for s in self.topic]


def inbox(name: str) -> Place:
    return Place(Inbox(name), "", "unibus", (name,))


def private(group: Group, topic: Place, name: str) -> Place:
    """Of an ephemeral group: it has no stream of its own, since what it gives back it alone gets."""
    return Place(group, topic.tag, PRIVATE + name, (), topic.streams, "$", ordered=group.topic.ordered)


def plan(topology: Topology, now: float, retention: float) -> dict[Address, Place]:
    """Raises ConfigError, Unsupported."""
    places: dict[Address, Place] = {}
    tags: dict[str, str] = {}  # by the stem of their names: of the queues and groups that dead letters belong to
    for declared in topology.channels:
        address, name = declared.address, declared.name
        _check(name, address)
        if declared.role != "channel":
            suffix = DEAD_LETTER if declared.role == "dead letter" else INVALID
            tag = tags.get(address.name.removesuffix(suffix), name.removesuffix(suffix))
            places[address] = Place(address, tag, "unibus", (_within(tag, name),))
            continue
        if isinstance(address, Group):
            place = _group(declared, address, places, _start(declared, now, retention))
        elif isinstance(address, Topic):
            check_options(DriverTable, declared, "redis")
            place = Place(address, name, "", _levels(address, name, name))
        else:
            options = check_options(config.QueueOptions, declared, "redis")
            place = Place(address, name, options.group, _levels(address, name, name), ordered=address.ordered)
        places[address] = place
        tags[stem(address)] = place.tag
    _check_keys(places)
    return places


def _group(declared: Declared, group: Group, places: dict[Address, Place], start: str) -> Place:
    check_options(DriverTable, declared, "redis")
    topic = topic_of(places, group)
    own = _within(topic.tag, declared.name)
    streams = _levels(group.topic, own, own)
    return Place(group, topic.tag, declared.name, streams, topic.streams, start, ordered=group.topic.ordered)


def _start(declared: Declared, now: float, retention: float) -> str:
    start = declared.start
    if start == "new":
        return "$"
    if not retention or isinstance(start, tuple) or (start != "all" and start < now - retention):
        raise Unsupported(
            f"{declared.address}: start={start!r}, but topics keep what was read for {retention:g} s; raise redis.retention"
        )
    return "0" if start == "all" else f"{max(0, int(start * 1000) - 1)}-18446744073709551615"


def _levels(channel: Queue[Any] | Topic[Any], first: str, stem: str) -> tuple[str, ...]:
    if channel.ordered and channel.priorities:
        raise Unsupported(
            f"{channel} is ordered and has priorities: on Redis each priority is a stream of its own, which breaks the order of "
            "a key; drop one of the two"
        )
    higher = stem if stem.startswith("{") else f"{{{stem}}}"
    return (first, *(f"{higher}:p{n}" for n in range(1, channel.priorities)))


def _within(tag: str, name: str) -> str:
    """A name beside the channel of this tag: the same name, where it begins with the tag."""
    return f"{{{tag}}}{name[len(tag) :] if name.startswith(tag) and name != tag else '/' + name}"


def _check(name: str, address: Address) -> None:
    if "{" in name or "}" in name or not name.isprintable():
        raise ConfigError(
            f"{address}: {name!r} has a character that a Redis key of unibus can't have; set another name"
        )


def _check_keys(places: dict[Address, Place]) -> None:
    seen: dict[str, object] = {}
    for address, place in places.items():
        helpers = () if isinstance(address, Group) or place.tag != place.streams[0] else place.delayed
        for key in (*place.streams, *helpers):
            only_one(seen, key, address, f"the key {key!r} on Redis")
