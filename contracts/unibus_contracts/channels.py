"""Contracts where creating is forbidden: on channels that somebody else has made beforehand.

Their names follow from the prefix and the contract's id, so they are the same in every run. `NotingHarness`: a run that may
create notes what each contract needs, and `write` makes a unibus.toml of it, for `unibus declare`. `AssumingHarness`: a run
that uses what such a file lists; it makes nothing and deletes nothing but the messages that an earlier run has left.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import secrets
import time
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unibus import Bus, ConfigError, PermissionDenied, Queue, Topic, Unsupported
from unibus.adapter import Outcome, Source, Subscription, Topology
from unibus.channel import Group, Inbox
from unibus.tooling import topology_of

from .harness import NotTried, TestedBus, UrlHarness

FEATURES = ("ordered", "priorities", "delayed")  # of a channel, as far as unibus.toml tells them
QUIET = 1.0  # seconds without a message after which a place is empty, where the broker only estimates
LIMIT = 20.0  # seconds for what an earlier run has left to go
Noted = dict[
    str, Any
]  # of one contract: {"queues": {name: features}, "topics": {name: features and "groups"}, "delays": []}


def stem(id: str) -> str:
    """What stands in the names of a contract's channels."""
    return hashlib.sha256(id.encode()).hexdigest()[:6]


class NamedHarness(UrlHarness):
    """The names of a contract's channels are the same in each run."""

    def begin(self, id: str) -> None:
        """Another contract."""
        self._token, self._count = stem(id), itertools.count(1)


class NotingHarness(NamedHarness):
    """`noted`: what the contract that runs had on the broker, without the prefix, which is random as ever."""

    noted: Noted

    def begin(self, id: str) -> None:
        super().begin(id)
        self.noted = {"queues": {}, "topics": {}, "delays": []}

    def bus(self, **settings: Any) -> TestedBus:
        bus = super().bus(**settings)
        if "declare" not in settings:
            bus.opened = self._note
        return bus

    async def _note(self, _bus: Bus, topology: Topology) -> None:
        noted = self.noted
        for one in topology.channels:
            address = one.address
            if isinstance(address, Group):
                groups = noted["topics"][address.topic.name].setdefault("groups", [])
                groups += [address.name] if address.name not in groups else []
            elif one.role == "channel":
                told = {name: value for name in FEATURES if (value := getattr(address, name))}
                noted["topics" if isinstance(address, Topic) else "queues"].setdefault(address.name, {}).update(told)
        noted["delays"] = sorted({*noted["delays"], *topology.delays})


def write(path: Path, prefix: str, noted: Iterable[tuple[str, str, Noted]]) -> None:
    """A unibus.toml with all that these contracts (id, promise, what was noted) need. Raises OSError."""
    contracts = list(noted)
    delays = sorted({delay for _, _, one in contracts for delay in one["delays"]})
    lines = [
        "# The channels of unibus' contract suite. `unibus declare --config THIS_FILE --url URL` makes them, as a user who may;",
        "# `unibus contracts run URL --channels THIS_FILE --declare assume` uses them, and needs no right to create.",
        f"prefix = {_quoted(prefix)}",
        f"delays = {json.dumps(delays)}",
    ]
    for id, promise, one in contracts:
        if one["queues"] or one["topics"]:
            lines += ["", f"# {id}: {promise}"]
        for kind in ("queues", "topics"):
            for name, features in one[kind].items():
                lines.append(f"[{kind}.{_quoted(name)}]")
                lines += [f"{feature} = {json.dumps(features[feature])}" for feature in FEATURES if feature in features]
                groups = ", ".join(f"{_quoted(group)} = {{}}" for group in features.get("groups", ()))
                lines += [f"groups = {{ {groups} }}"] if groups else []
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _quoted(text: str) -> str:
    return json.dumps(text)  # TOML's strings are JSON's, for the letters that names are made of


@dataclass(frozen=True, slots=True)
class Listed:
    """What was made for the suite. `path`: the file that says so."""

    path: Path
    prefix: str
    queues: Mapping[str, Mapping[str, Any]]
    topics: Mapping[str, Mapping[str, Any]]
    delays: frozenset[float]

    def missing(self, topology: Topology) -> list[str]:
        """What of this topology it does not have."""
        found = []
        for one in topology.channels:
            address = one.address
            if isinstance(address, Group):
                known = address.name in self.topics.get(address.topic.name, {}).get("groups", ())
            else:
                known = one.role != "channel" or address.name in {**self.queues, **self.topics}
            if not known:
                found.append(str(address))
        return found + [f"the delay of {delay:g} s" for delay in topology.delays if delay not in self.delays]


def read(path: Path) -> Listed:
    """Raises ConfigError."""
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
        queues, topics = told.get("queues", {}), told.get("topics", {})
        return Listed(path, told["prefix"], queues, topics, frozenset(map(float, told["delays"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{path} lists no channels of the contract suite: {why}; a run that may create writes it"
        ) from None


class AssumingHarness(NamedHarness):
    """Under `declare = "assume"`, on what was made before."""

    def __init__(
        self, url: str, listed: Listed, *, more: Mapping[str, Any] | None = None, restart: str | None = None
    ) -> None:
        super().__init__(url, more={**(more or {}), "declare": "assume"}, restart=restart)
        self.listed = listed
        self.prefix = listed.prefix
        self._denied: dict[str, str | None] = {}  # what a process makes for itself -> why this user may not

    def bus(self, **settings: Any) -> TestedBus:
        bus = super().bus(**settings)
        if "declare" not in settings:  # else the contract is about what is missing
            bus.opened = self._check
        return bus

    async def _check(self, bus: Bus, topology: Topology) -> None:
        if missing := self.listed.missing(topology):
            raise NotTried(f"{self.listed.path} has not {', '.join(missing)}")
        if any(getattr(one.address, "reply", None) is not None for one in topology.channels):
            await self._may_make("inboxes", bus, Inbox(f"{bus.settings.service}.reply.{secrets.token_hex(4)}"))
        for one in bus.registrations:
            if one.broadcast and isinstance(one.channel, Topic):
                name = f"{bus.settings.service}.{secrets.token_hex(4)}.0"
                await self._may_make("groups of a process", bus, Group(one.channel, name, ephemeral=True))

    async def _may_make(self, kind: str, bus: Bus, address: Inbox | Group) -> None:
        """A user without the right to create can't have what goes with its process. Asked once. Raises NotTried."""
        if kind not in self._denied:
            self._denied[kind] = None
            try:
                subscription = await bus.adapter.subscribe(Source(address))
                await subscription.stop()
                await subscription.close()
            except PermissionDenied as error:
                self._denied[kind] = str(error)
        if (why := self._denied[kind]) is not None:
            raise NotTried(f"this user may not make {kind}: {why}")

    async def empty(self) -> None:
        """Take away what earlier runs have left in the channels of this contract. Raises NotTried where it does not go."""
        part = f"-{self._token}"
        queues: list[Queue[Any] | Topic[Any]] = [
            Queue(name, bytes, **features) for name, features in self.listed.queues.items() if part in name
        ]
        topics: list[tuple[Topic[Any], Iterable[str]]] = [
            (Topic(name, bytes, **{k: v for k, v in told.items() if k in FEATURES}), told.get("groups", ()))
            for name, told in self.listed.topics.items()
            if part in name
        ]
        if not queues and not topics:
            return
        bus = super().bus(channels=[*queues, *(topic for topic, _ in topics)])
        for topic, groups in topics:
            for group in groups:
                bus.subscriber(topic, group=group)(_never)
        async with bus, asyncio.TaskGroup() as tasks:
            for one in topology_of(bus).channels:
                if not isinstance(one.address, Topic):
                    tasks.create_task(_empty(bus, one.address))

    async def cleanup(self) -> None:
        """Nothing was made."""


async def _never(body: Any) -> None:
    raise AssertionError("this bus is not for running")


async def _empty(bus: Bus, place: Queue[Any] | Group) -> None:
    deadline = time.monotonic() + LIMIT
    subscription = None
    try:
        while True:
            left = await bus.adapter.backlog(place)
            if left.exact and not (left.ready or left.in_flight or left.delayed):
                return
            subscription = subscription or await _subscribed(bus, place)
            found = await subscription.receive(100, QUIET)
            await subscription.settle(Outcome.ACCEPTED, found)
            if not found and not left.exact:
                return
            if time.monotonic() > deadline:
                raise NotTried(f"what an earlier run has left in {place} does not go: {left}")
    finally:
        if subscription is not None:
            await subscription.stop()
            await subscription.close()


async def _subscribed(bus: Bus, place: Queue[Any] | Group) -> Subscription:
    try:
        return await bus.adapter.subscribe(Source(place, prefetch=100, early=True))
    except Unsupported:  # then what is delayed comes when it is due
        return await bus.adapter.subscribe(Source(place, prefetch=100))
