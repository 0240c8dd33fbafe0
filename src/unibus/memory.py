"""The in-memory broker: the executable specification of the SPI, for tests and trials.

`memory://` is a broker of its own for each adapter; `memory://name` is shared by all buses of the process that run on
the same clock. A broker keeps its state while adapters close and connect again. Nothing here is thread-safe.
Messages are lost with the process.

`memory://?profile=NAME` is in disguise: it declares what the adapter of that broker declares, and refuses what that refuses.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from math import inf
from typing import Any

from unibus.adapter import Backlog, Endpoint, Health, Inspected, Outgoing, Profile, Results, Source, Start, Topology
from unibus.capabilities import Capabilities, emulated, native, refused
from unibus.channel import Address, Group, Inbox, Queue, Topic
from unibus.clock import Clock, SystemClock
from unibus.errors import (
    ConfigError,
    ConnectionLost,
    MessageTooLarge,
    NotFound,
    Refused,
    TransportError,
    Unroutable,
    Unsupported,
)
from unibus.memory_broker import MemoryBroker
from unibus.memory_places import Key, Place
from unibus.memory_subscription import MemorySubscription
from unibus.registry import profile_of

log = logging.getLogger("unibus.memory")

LEASE = 30.0
_INBOX = re.compile(r"inbox\.[A-Za-z0-9._-]{1,200}")
_SETTINGS = ("lease", "max_body")

_shared: dict[tuple[str, Clock | None], MemoryBroker] = {}


def _broker(endpoint: Endpoint) -> MemoryBroker:
    url = endpoint.url
    name = url.path or (url.hosts[0][0] if url.hosts else "")
    # A user is not asked for: the settings may name one for the broker that it stands in for.
    if len(url.hosts) > 1 or (url.hosts and (url.path or url.hosts[0][1])):
        raise ConfigError(f"url {url}: use memory:// or memory://name, without port or path")
    profile = url.query.get("profile", "")
    if not name:
        return MemoryBroker(endpoint.clock, profile)
    key = name, None if isinstance(endpoint.clock, SystemClock) else endpoint.clock
    if key not in _shared:
        _shared[key] = MemoryBroker(endpoint.clock, profile)
    broker = _shared[key]
    if broker.profile != profile:
        raise ConfigError(
            f"url {url}: in this process it has {f'profile={broker.profile}' if broker.profile else 'no profile'}, and now "
            f"{f'profile={profile}' if profile else 'none'}; one broker has one: give the other another name"
        )
    return broker


def _own(endpoint: Endpoint) -> Capabilities:
    """What the memory broker can do. Raises ConfigError for what is wrong with its settings."""
    for name in endpoint.settings:
        if name == "profile":
            raise ConfigError(
                f"memory.profile: it decides whose settings count, so it stands in the URL: memory://?profile={endpoint.settings[name]}"
            )
        if name not in _SETTINGS:
            near = get_close_matches(name, _SETTINGS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {' and '.join(_SETTINGS)}"
            raise ConfigError(f"memory.{name}: the memory broker has no such setting; {hint}")
    max_body = _positive(endpoint, "max_body", None)
    return Capabilities(
        adapter="memory",
        order=native("a lane for each key; one message of a key is out at a time"),
        delay=native(),
        priority=native(limit=10),
        replay=refused("the memory broker keeps no history"),
        browse=native(),
        reply=native(),
        release=native(),
        lease=native(limit=_positive(endpoint, "lease", LEASE)),
        atomic_move=native(),
        delivery_count=native(),
        attempt=emulated("counted in a header; a crash forgets failures in place since the last copy"),
        settle_confirmed=native(),
        dedup=refused("the memory broker stores every message that is sent"),
        max_body=None if max_body is None else int(max_body),
    )


def _positive(endpoint: Endpoint, name: str, default: float | None) -> float | None:
    value = endpoint.settings.get(name, default)
    if value is None:
        return None
    try:
        number = float(str(value))
    except ValueError:
        number = 0.0
    if isinstance(value, bool) or not 0 < number < inf:
        raise ConfigError(f"memory.{name} = {value!r}: use a number above 0")
    return number


class MemoryAdapter:
    """A client of a MemoryBroker. Settings: `lease`, seconds (30), and `max_body`, bytes (no limit).

    With `profile=NAME` in the URL its settings are those of that broker.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._profile: Profile | None = None
        if name := endpoint.url.query.get("profile"):
            self._profile = profile_of(name, endpoint)
        self.broker = _broker(endpoint)
        known = _own(endpoint) if self._profile is None else self._profile.capabilities
        if self._profile is not None:  # reports must not take it for the server
            known = replace(known, version=f"{known.version} in memory" if known.version else "in memory")
        self._capabilities = known
        self.lease = known.lease.limit or LEASE if known.lease else None
        self._max_body = known.max_body
        self._prefix = endpoint.prefix
        self._keys: dict[Address, Key] = {}
        self._kept: dict[Address, Key] = {}  # topics with a history
        self._subscriptions: list[MemorySubscription] = []
        self._lost: str | None = "the memory adapter is not connected"

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def native(self) -> MemoryBroker:
        return self.broker

    async def connect(self) -> None:
        self.broker.connect(self)
        self._lost = None

    async def close(self) -> None:
        for subscription in list(self._subscriptions):
            await subscription.close()
        self.lose("the memory adapter is closed")

    def lose(self, why: str) -> None:
        """From now on everything raises ConnectionLost."""
        self._lost = why
        self.broker.disconnect(self)
        for subscription in list(self._subscriptions):
            subscription.end(why)

    def forget(self, subscription: MemorySubscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def _linked(self) -> None:
        if self._lost is not None:
            raise ConnectionLost(self._lost)

    async def declare(self, topology: Topology) -> None:
        self._linked()
        missing = []
        self._keys |= (planned := self._planned(topology))
        for address, key in planned.items():
            if topology.mode == "assume":
                continue
            if self.broker.has(key):
                self._same(address, key)
            elif topology.mode == "create" and (key[0] != "group" or self.broker.has(("topic", key[1]))):
                self.broker.make(key, address, topology.find(address).start)
                log.info("created %s", address)
            else:
                missing.append(str(address))
        if self._capabilities.replay:
            self._kept = {a: k for a, k in self._keys.items() if isinstance(a, Topic) and self.broker.has(k)}
            for key in self._kept.values():
                self.broker.keep(key)
        if missing:
            raise NotFound(f"missing on the memory broker: {', '.join(missing)}; create them with `unibus declare`")

    async def inspect(self, topology: Topology) -> Sequence[Inspected]:
        self._linked()
        risk = "keeps messages in this process alone: they end with it"
        found = [Inspected("broker", "memory", exists=True, risk=risk)]
        for address, key in self._planned(topology).items():
            found.append(Inspected(key[0], ".".join(key[1:]), self.broker.has(key), "none", address))
        return found

    def _planned(self, topology: Topology) -> dict[Address, Key]:
        """What each address is here. Raises what is wrong with it."""
        planned: dict[Address, Key] = {}
        if self._profile is not None:
            self._profile.plan(topology)
        for declared in topology.channels:
            address = declared.address
            if declared.options and self._profile is None:
                raise ConfigError(f"{address}: the memory broker has no setting {next(iter(declared.options))!r}")
            if declared.start != "new" and not self._capabilities.replay:
                raise self._no_history(address, declared.start)
            if isinstance(address, Group):
                topic = planned.get(address.topic) or self._keys.get(address.topic)
                if topic is None:
                    raise ConfigError(f"{address}: declare {address.topic} before its groups")
                key: Key = ("group", topic[1], declared.name)
            else:
                key = ("topic" if isinstance(address, Topic) else "queue", declared.name)
                other = "queue" if key[0] == "topic" else "topic"
                if topology.mode != "assume" and self.broker.has((other, declared.name)):
                    raise Refused(
                        f"{address}: {declared.name!r} is a {other} on the memory broker; one name is one kind"
                    )
            planned[address] = key
        return planned

    def _no_history(self, address: Address, start: Start) -> Unsupported:
        return Unsupported(f"{address}: start={start!r}; {self._capabilities.replay.how}")

    def _same(self, address: Address, key: Key) -> None:
        """Nothing is altered, so what is there has to be what was asked for."""
        place = self.broker.place(key)
        if place is None or isinstance(address, Inbox):
            return
        there = place.address.topic if isinstance(place.address, Group) else place.address
        asked = address.topic if isinstance(address, Group) else address
        for feature in ("ordered", "priorities"):
            if (old := getattr(there, feature)) != (new := getattr(asked, feature)):
                raise Refused(f"{address} has {feature}={old} on the memory broker, not {new}; it is never altered")

    def route(self, outgoing: Outgoing) -> tuple[Sequence[Place], TransportError | None]:
        """Where a message goes, or why it can't."""
        to = outgoing.to
        error = self.broker.refusal(to)
        if error is not None:
            return (), error
        if isinstance(to, Topic):
            groups = self.broker.groups(self._keys.get(to))
            if groups is None:
                return (), NotFound(f"{to} does not exist on the memory broker; declare it")
            return groups, None if groups else Unroutable(f"{to} has no group")
        place = self.broker.place(self._key(to))
        if place is not None:
            return (place,), None
        if isinstance(to, Inbox):
            gone = Unroutable(f"inbox {to.name!r} is gone: its process has ended")
            return (), gone if self._capabilities.inbox else None
        return (), NotFound(f"{to} does not exist on the memory broker; declare it")

    def _key(self, address: Address) -> Key | None:
        if isinstance(address, Inbox):
            return ("inbox", address.name)
        if isinstance(address, Group) and address.ephemeral:
            topic = self._keys.get(address.topic)
            return None if topic is None else ("group", topic[1], self._prefix + address.name)
        return self._keys.get(address)

    def refusal(self, outgoing: Outgoing) -> TransportError | None:
        """Of the message itself, wherever it goes."""
        if self._profile is not None:
            return self._profile.refusal(outgoing)
        if self._max_body is None or len(outgoing.message.body) <= self._max_body:
            return None
        size = len(outgoing.message.body)
        return MessageTooLarge(f"{outgoing.to}: a body of {size} bytes; memory.max_body is {self._max_body}")

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        await asyncio.sleep(0)  # a sender in a loop must not starve the consumers; others join the next batch meanwhile
        self._linked()
        broker = self.broker
        store, refusals = broker.store, broker._refusals
        now = broker.clock.monotonic()
        results: list[TransportError | None] = [None] * len(batch)
        reached: dict[Place, None] = {}
        last: Address | None = None
        places: Sequence[Place] = ()
        problem: TransportError | None = None
        for i, outgoing in enumerate(batch):
            if outgoing.to is not last or refusals:
                places, problem = self.route(outgoing)
                last = None if problem is not None else outgoing.to
                reached.update(dict.fromkeys(places))
            error = (self.refusal(outgoing) if self._max_body is not None else None) or problem
            results[i] = error
            if error is None or (isinstance(error, Unroutable) and isinstance(outgoing.to, Topic)):
                store(outgoing, places, now, self._kept.get(outgoing.to) if self._kept else None)
        for place in reached:
            if place.waiters:
                place.wake()
        return results

    async def subscribe(self, source: Source) -> MemorySubscription:
        self._linked()
        address: Address = source.address
        if source.start != "new" and not self._capabilities.replay:
            raise self._no_history(address, source.start)
        if isinstance(address, Inbox):
            name = self._prefix + address.name.removeprefix("inbox.")
            address = self.reply_to(f"inbox.{name}")
        key = self._key(address)
        private = isinstance(address, Inbox) or (isinstance(address, Group) and address.ephemeral)
        if private and key is not None and not self.broker.has(key):
            if isinstance(address, Group) and not self.broker.has(("topic", key[1])):
                raise NotFound(f"{address.topic} does not exist on the memory broker; declare it")
            self.broker.make(key, address)
        place = self.broker.place(key)
        if place is None:
            raise NotFound(f"{address} does not exist on the memory broker; declare it")
        place.private = private
        subscription = MemorySubscription(self, source, address, place)
        self._subscriptions.append(subscription)
        return subscription

    async def backlog(self, address: Queue[Any] | Group) -> Backlog:
        self._linked()
        place = self.broker.place(self._key(address))
        if place is None:
            raise NotFound(f"{address} does not exist on the memory broker; declare it")
        oldest = min((entry.since for entry in place), default=None)
        age = None if oldest is None else self.broker.clock.monotonic() - oldest
        return Backlog(len(place), self.broker.held_from(place), age, delayed=self.broker.delayed_for(place))

    async def check(self) -> Health:
        return Health(self._lost is None)

    def reply_to(self, text: str) -> Inbox:
        if not _INBOX.fullmatch(text):
            raise Refused("reply_to is no inbox of the memory broker: inbox.<name> with A-Z a-z 0-9 . _ -")
        return Inbox(text)
