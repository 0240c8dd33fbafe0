"""What addresses are on Kafka: topics, the topics of their delays, and consumer groups. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from unibus.adapter import Declared, Start, Topology
from unibus.channel import Address, Group, Queue, Topic, dead_letter_queue
from unibus.driver import only_one, topic_of
from unibus_kafka import config, wire

RUNGS = (10.0, 60.0, 600.0, 3600.0)  # seconds


@dataclass(frozen=True, slots=True)
class Place:
    """An address. `topics`: all that is read for it, with the seconds that a record waits there."""

    address: Queue[Any] | Topic[Any] | Group
    name: str  # of the topic that is sent to; of a group, its id
    topic: str  # where its messages are in the first place
    topics: dict[str, float] = field(default_factory=dict)
    rungs: tuple[tuple[float, str], ...] = ()  # of its own, ascending
    lane: str | None = None  # a group's own topic, for what only this group shall get
    letters: bool = False  # dead letters or invalid messages: no consumer has any of them in hand

    def route(self, wait: float) -> tuple[str, bool]:
        """The topic for a message that is due in `wait` seconds: the longest rung that is not too long; is it a rung?"""
        fitting = [topic for seconds, topic in self.rungs if seconds <= wait]
        return (fitting[-1], True) if fitting else (self.lane or self.name, False)


@dataclass(slots=True)
class Plan:
    """All that a topology needs."""

    places: dict[Address, Place] = field(default_factory=dict)
    topics: dict[str, config.TopicOptions] = field(default_factory=dict)  # in the order in which to make them
    groups: dict[str, tuple[Place, Start, str]] = field(default_factory=dict)  # id -> its place, start, a witness


def _rungs(name: str) -> tuple[tuple[float, str], ...]:
    return tuple((seconds, f"{name}.retry.{round(seconds * 1000)}") for seconds in RUNGS)


def plan(topology: Topology, given: config.Settings) -> Plan:
    made = Plan()
    for declared in topology.channels:
        _add(made, topology, declared, config.options(declared, given))
    seen: dict[str, object] = {}
    for name in made.topics:
        only_one(seen, name.replace(".", "_"), f"topic {name!r}", "one on Kafka, which takes . and _ for the same")
    return made


def _add(made: Plan, topology: Topology, declared: Declared, options: config.TopicOptions) -> None:
    address, name = declared.address, wire.physical(declared.name, declared.address)
    channel = address.topic if isinstance(address, Group) else address
    rungs = () if declared.role != "channel" else _rungs(name)
    if isinstance(address, Group):
        above = topic_of(made.places, address)
        rungs = rungs if not channel.ordered or channel.delayed else ()
        lane = f"{name}.retry.0"
        topics = {above.topic: 0.0, lane: 0.0} | {topic: s for s, topic in (*above.rungs, *rungs)}
        place = Place(address, name, above.topic, topics, rungs, lane)
        letters = next((d.name for d in topology.channels if d.address == dead_letter_queue(address)), "")
        made.groups[name] = (place, declared.start, letters)
        made.topics |= dict.fromkeys((lane, *(topic for _, topic in rungs)), options)
    else:
        if isinstance(address, Topic) or channel.ordered:
            rungs = rungs if channel.delayed else ()
        topics = {name: 0.0} | {topic: s for s, topic in rungs}
        place = Place(address, name, name, topics, rungs, letters=declared.role != "channel")
        made.topics |= dict.fromkeys(place.topics, options)
    made.places[address] = place
    for topic in place.topics:
        wire.physical(topic, address)
