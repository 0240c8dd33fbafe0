"""Bringing over what is left in one broker to another one. Both buses are those of tools (`tooling.attached`), open.

A message is settled at the source once the target has confirmed it. So nothing is lost by an interruption, and at most
what was on its way is there twice, by the same id; run again, it goes on with what is left.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from math import inf
from typing import Any

from unibus.adapter import Backlog, Inspected, Outcome, Outgoing, Source, Subscription, Url
from unibus.bus import Bus
from unibus.capabilities import Capabilities
from unibus.channel import Group, Queue, Topic, dead_letter_queue, invalid_queue, stem
from unibus.deadletter import copy, retry_count
from unibus.delivery import Delivery
from unibus.errors import CodecError, ConfigError, MessageTooLarge, NotFound, Refused, UnibusError, Unsupported
from unibus.lease import Heartbeat
from unibus.message import BROKER_HEADERS, RETRY_COUNT, Message
from unibus.registry import broker_name
from unibus.report import Report
from unibus.session import Session
from unibus.tooling import inspect, topology_of
from unibus.waiting import side_by_side

PAGE = 250  # messages on their way at a time
HELD = 1000  # received and not settled at one place; where so many can't be carried, it goes no further there
# Seconds without a message that mean that there are no more.
SHORT = 1.0  # where the broker counts exactly, and counts none
QUIET = 5.0
RECEIVERS = 8
AT_ONCE = 16  # places: an empty one costs the time in which nothing comes

_STAYS = MessageTooLarge | Refused | CodecError | Unsupported  # of one message: the others go on

Address = Queue[Any] | Group


@dataclass(frozen=True, slots=True)
class Stayed:
    """A message that the target can't carry: it is where it was."""

    id: str
    error: UnibusError


@dataclass(slots=True)
class Place:
    """A queue or group, or the dead letters or invalid messages of one. `before` and `after`: None where it is missing.

    `twice`: how many of the `moved` could not be settled, so that they are still at the source, too. `full`: as many were taken as
    there were before, and it went no further.
    """

    address: Address
    before: Backlog | None
    after: Backlog | None = None
    moved: int = 0
    twice: int = 0
    full: bool = False
    stayed: list[Stayed] = field(default_factory=list)

    @property
    def name(self) -> str:
        return stem(self.address)

    @property
    def left(self) -> int:
        """How many are at the source afterwards, in the hands of others too. Where the broker estimates, so is this."""
        if self.after is None:
            return 0
        counted = self.after.ready + (self.after.in_flight or 0) + (self.after.delayed or 0)
        return max(len(self.stayed), counted)


def refuse_the_same(source: Bus, target: Bus) -> None:
    """Raises ConfigError where both may be one broker: it would only stir what is there.

    One broker by two names, nodes of one cluster for example, is not seen here: there `move` ends by the count.
    """
    one, other = (bus._load()[0].url for bus in (source, target))
    if broker_name(one.scheme) != broker_name(other.scheme):
        return
    servers = [{text for text in url.query.values() if "://" in text} for url in (one, other)]
    paths = {_path(one), _path(other)}
    if servers[0] != servers[1] or (len(paths) > 1 and "" not in paths):
        return
    for host, port in one.targets(0):
        for host2, port2 in other.targets(0):
            if _here(host) == _here(host2) and (port == port2 or 0 in {port, port2}):
                raise ConfigError(
                    f"--from {one} and --to {other} name the same broker; where they don't, write port and path of both"
                )


def _path(url: Url) -> str:
    """Without a host it may be a file, which has many names."""
    return url.path if url.hosts or not url.path else os.path.realpath(url.path)


def _here(host: str) -> str:
    """One name for all that this machine is called. Nothing is resolved: that may take long, and one address may be many brokers."""
    name = host.lower().rstrip(".")
    if name in {"localhost", socket.gethostname().lower()}:
        return "localhost"
    try:
        address = ip_address(name)
    except ValueError:
        return name
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return "localhost" if address.is_loopback or address.is_unspecified else str(address)


async def look(source: Bus, names: Sequence[str] = ()) -> list[Place]:
    """All places of these channels (default: of all) and what waits there. Touches nothing.

    Raises UnknownChannel, and NotFound where nothing of a channel is there.
    """
    session, addresses = source._opened(), list[Address]()
    chosen = {session.channels.find(name) for name in names}
    for declared in topology_of(source).channels:
        address = declared.address
        channel = address.topic if isinstance(address, Group) else address
        if declared.role == "channel" and not isinstance(address, Topic) and (channel in chosen or not chosen):
            addresses += (address, dead_letter_queue(address), invalid_queue(address))
    if not addresses:
        raise ConfigError("no queues or groups are known: name them, give an --app, or declare them in unibus.toml")
    places: dict[Address, Place] = {}

    async def one(address: Address) -> None:
        places[address] = Place(address, await _backlog(source, address))

    await side_by_side(addresses, one)
    for n in range(0, len(addresses), 3):
        if names and places[addresses[n]].before is None:
            raise NotFound(f"{addresses[n]} does not exist at the source")
    return [places[address] for address in addresses]


async def held(bus: Bus) -> list[Inspected]:
    """Places that channels share, and that are not empty: nobody can say here whose messages these are."""
    return [one for one in await inspect(bus) if one.address is None and one.messages]


async def _backlog(bus: Bus, address: Address) -> Backlog | None:
    try:
        return await bus.adapter.backlog(address)
    except NotFound:
        return None


async def check(target: Bus, places: Sequence[Place]) -> None:
    """Raises one NotFound for all that the target lacks."""
    missing: list[str] = []

    async def one(place: Place) -> None:
        if place.before is not None and await _backlog(target, place.address) is None:
            missing.append(place.name)

    await side_by_side(places, one)
    if missing:
        raise NotFound(f"missing at the target: {', '.join(sorted(missing))}; make them with `unibus declare`")


async def move(
    source: Bus,
    target: Bus,
    places: Sequence[Place],
    *,
    wait: float = 0.0,
    moved: Callable[[int], object] = lambda _n: None,
) -> None:
    """Bring over what is at these places, and note in each what became of it.

    Bodies, headers, ids, keys and their order, priority, expiry and counts of attempts stay what they are; what is delayed
    is due when it would have been. Between brokers of one kind a place is over once as many were taken as it had at the start: nobody can
    tell two names of one broker from two brokers, and what was moved would come round again. `wait`: go on for so many seconds while something is delayed that can't be taken before it
    is due. `moved` is called with the number of those that are over. Raises ConnectionLost, Timeout, Throttled,
    PermissionDenied and NotFound of either broker: what was not confirmed is still at the source.
    """
    await check(target, places)
    alike = source.capabilities.adapter == target.capabilities.adapter
    shared = 0
    if alike and any(place.before is not None and place.before.delayed is None for place in places):
        shared = sum(one.messages or 0 for one in await held(source))  # whose they are shows only as they come

    async def one(place: Place) -> None:
        if place.before is not None:
            most = _most(place.before, shared) if alike else inf
            await _Mover(source, target, place, wait, moved, most).run()
            place.after = await _backlog(source, place.address)

    await side_by_side(places, one, AT_ONCE)


def _most(before: Backlog, shared: int) -> int:
    """How many there may be. Where the broker estimates they may be more than it says, or an estimate of none would move none."""
    counted = before.ready + (before.in_flight or 0) + (shared if before.delayed is None else before.delayed)
    return counted if before.exact else max(counted, HELD)


class _Mover:
    """Of one place. `holding`: received, and neither settled nor given back; `kept`: those of them that stay. `most`: so many are
    received, and no more.
    """

    def __init__(
        self, source: Bus, target: Bus, place: Place, wait: float, moved: Callable[[int], object], most: float
    ) -> None:
        self._bus, self._place, self._moved = source, place, moved
        self._source: Session = source._opened()
        self._target: Session = target._opened()
        self._can: Capabilities = target.capabilities
        # Between brokers of one kind also what the envelope can't hold is carried.
        self._alike = source.capabilities.adapter == target.capabilities.adapter
        self._clock = self._source.kit.clock
        self._until = self._clock.monotonic() + wait
        self._channel = place.address.topic if isinstance(place.address, Group) else place.address
        self._report = Report(self._source.kit.counts, place.address, private=False)
        self._subscription: Subscription
        self._holding: dict[Delivery[Any], None] = {}
        self._kept: list[Delivery[Any]] = []
        self._most = most

    async def run(self) -> None:
        before, can = self._place.before, self._bus.capabilities
        if before is not None and before.exact and before.delayed == 0 and not before.ready:
            return  # and what others have in hand is theirs
        self._subscription = await self._subscribe()
        heartbeat = None
        if can.lease and can.lease.limit:
            heartbeat = Heartbeat(self._subscription, self._holding, can.lease.limit, self._clock, self._lost)
            heartbeat.start()
        workers = 1 if self._channel.ordered else min(can.receivers, RECEIVERS)
        try:
            await side_by_side(range(workers), self._work, workers)
            self._place.full = not self._most
        finally:
            if heartbeat is not None:
                heartbeat.stop()
            try:
                left = list(self._holding)
                await self._subscription.stop()
                await self._subscription.settle(Outcome.RELEASED, left)
            finally:
                await self._subscription.close()

    def _lost(self, deliveries: Sequence[Delivery[Any]]) -> None:
        """They come again: what was sent of them is sent twice."""
        for delivery in deliveries:
            delivery.lost = True
            self._report.lost(delivery, "it may be moved twice")

    async def _subscribe(self) -> Subscription:
        adapter, ordered = self._source.kit.link.adapter, self._channel.ordered
        try:
            return await adapter.subscribe(Source(self._place.address, HELD, ordered=ordered, early=True))
        except Unsupported:  # then what is delayed comes when it is due, or stays and is counted
            return await adapter.subscribe(Source(self._place.address, HELD, ordered=ordered))

    async def _work(self, _number: int) -> None:
        idle, quiet = 0.0, SHORT
        while len(self._kept) < HELD:
            limit = int(min(PAGE, HELD - len(self._kept), self._most))
            if not limit:  # or other workers wait for the rest
                return
            self._most -= limit
            batch = await self._subscription.receive(limit, quiet)
            self._most += limit - len(batch)
            if batch:
                idle = 0.0
                await self._carry(batch)
                continue
            idle += quiet
            now = await self._bus.adapter.backlog(self._place.address)
            if self._clock.monotonic() < self._until and (
                now.delayed or (now.delayed is None and await held(self._bus))
            ):
                continue
            if idle >= QUIET or (now.exact and not now.ready):
                return

    async def _carry(self, batch: Sequence[Delivery[Any]]) -> None:
        self._holding.update(dict.fromkeys(batch))
        now = self._clock.time()
        going, sends = list[Delivery[Any]](), list[Outgoing]()
        for delivery in batch:
            wait = delivery.message.delay
            if wait and (not self._can.delay or wait > (self._can.delay.limit or wait)):
                longest = f"delays over {self._can.delay.limit:g} s" if self._can.delay else "delays"
                self._stays(delivery, Unsupported(f"{self._can.adapter} has no {longest}; it is due in {wait:.0f} s"))
                continue
            going.append(delivery)
            due = now + wait if wait else None
            sends.append(Outgoing(self._place.address, carried(delivery), due, delivery if self._alike else None))
        results = await self._target.kit.publisher.send_all(sends)
        done, failed = list[Delivery[Any]](), list[UnibusError]()
        for delivery, error in zip(going, results, strict=True):
            if error is None:
                done.append(delivery)
            elif isinstance(error, _STAYS):
                self._stays(delivery, error)
            else:
                failed.append(error)
        await self._settle(done)
        if failed:
            raise failed[0]

    def _stays(self, delivery: Delivery[Any], error: UnibusError) -> None:
        self._kept.append(delivery)
        self._place.stayed.append(Stayed(delivery.message.id, error))

    async def _settle(self, done: Sequence[Delivery[Any]]) -> None:
        size = self._bus.capabilities.settle_batch
        for at in range(0, len(done), size):
            part = done[at : at + size]
            results = await self._subscription.settle(Outcome.ACCEPTED, part)
            self._place.twice += sum(error is not None for error in results)
            self._place.moved += len(part)
            self._moved(len(part))
            for delivery in part:
                del self._holding[delivery]


def carried(delivery: Delivery[Any]) -> Message:
    """A message as it goes to the other broker: the same, with the failures that only its broker knew of."""
    headers = {k: v for k, v in delivery.message.headers.items() if k not in BROKER_HEADERS}
    if delivery.failures:
        headers[RETRY_COUNT] = str(retry_count(headers) + delivery.failures)
    return copy(delivery.message, headers)
