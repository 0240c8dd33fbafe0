"""What drivers share: finding places, refusing what a broker can't do, one result for each message."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from unibus.adapter import Move, Outcome, Outgoing, Results, Start
from unibus.channel import Address, Group, Topic, stem
from unibus.delivery import Delivery
from unibus.errors import (
    ConfigError,
    ConnectionLost,
    LeaseLost,
    NotFound,
    TransportError,
    UnibusError,
    UnknownChannel,
    Unroutable,
    Unsupported,
)

P = TypeVar("P")
K = TypeVar("K", bound=Hashable)


# Places


def place_of(places: Mapping[Address, P], address: Address) -> P:
    """What the driver has made of an address. Raises UnknownChannel for one that was never declared."""
    place = places.get(address)
    if place is None:
        raise UnknownChannel(stem(address), tuple(known.name for known in places))
    return place


def topic_of(places: Mapping[Any, P], group: Group) -> P:
    """The place of a group's topic, while a topology is planned. Raises ConfigError where that comes later, or not at all."""
    place = places.get(group.topic)
    if place is None:
        raise ConfigError(f"{group}: declare {group.topic} before its groups")
    return place


def linked(link: P | None, broker: str) -> P:
    """The link. Raises ConnectionLost while there is none, and what it was lost by (its `lost`) when it is gone."""
    if link is None:
        raise ConnectionLost(f"not connected to {broker}")
    lost = getattr(link, "lost", None)
    if lost is not None:
        raise lost
    return link


def only_one(taken: dict[K, object], key: K, of: object, what: str) -> None:
    """Raises ConfigError when another address has this `key`, and would be the same as `of` on the broker: `what`."""
    other = taken.setdefault(key, of)
    if other != of:
        raise ConfigError(f"{other} and {of} would both be {what}; rename one of them")


def all_there(broker: str, missing: Iterable[str], hint: str = "") -> None:
    """Raises one NotFound for all that is missing, if anything is. `hint`: what else it may be."""
    if gone := ", ".join(dict.fromkeys(missing)):
        raise NotFound(f"missing on {broker}: {gone}; create them with `unibus declare`{hint}")


def no_history(broker: str, address: Address, start: Start) -> None:
    """Raises Unsupported unless the start is at what comes from now on."""
    if start != "new":
        raise Unsupported(f"{address}: start={start!r}, but {broker} keeps no history")


def quiet(level: int, *loggers: str) -> None:
    """For client libraries that log bodies or passwords: nothing below `level`, unless the application has set one."""
    for name in loggers:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(level)


# Results


def nobody(to: Address) -> Unroutable:
    """Of a message to a topic without groups, or to an inbox that is gone."""
    return Unroutable(f"{to} has no group" if isinstance(to, Topic) else f"the inbox {to.name!r} is gone")


def lease_lost(delivery: Delivery[Any], why: str) -> LeaseLost:
    return LeaseLost(f"{delivery.position}: settled before, or {why}")


def held(
    deliveries: Sequence[Delivery[Any]], is_held: Callable[[Delivery[Any]], bool], why: str
) -> tuple[list[TransportError | None], list[int]]:
    """The results so far, LeaseLost for what is not held or stands there twice; and the indices of the others."""
    results: list[TransportError | None] = [None] * len(deliveries)
    mine: dict[Delivery[Any], int] = {}
    for i, delivery in enumerate(deliveries):
        if is_held(delivery) and delivery not in mine:
            mine[delivery] = i
        else:
            results[i] = lease_lost(delivery, why)
    return results, list(mine.values())


def by(indices: Iterable[int], key: Callable[[int], K]) -> dict[K, list[int]]:
    """The indices of a batch by where they go, in the order in which each comes first."""
    found: dict[K, list[int]] = {}
    for i in indices:
        found.setdefault(key(i), []).append(i)
    return found


def as_result(error: UnibusError) -> TransportError:
    """An error as the result of one message: one of its own for each, since each is raised by itself."""
    result = type(error)(str(error)) if isinstance(error, TransportError) else TransportError(str(error))
    result.__cause__ = error
    return result


async def send_all(
    send: Callable[[Sequence[Outgoing], float], Any], batch: Sequence[Outgoing], timeout: float
) -> Results:
    """`Adapter.send`, for what a driver sends by itself: a lost link is the result of each."""
    try:
        results: Results = await send(batch, timeout)
    except ConnectionLost as error:
        return [error] * len(batch)
    return results


# Halves of a Subscription


class NoMove:
    """For brokers without transactions."""

    address: Any

    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        raise Unsupported(f"{self.address}: this broker has no atomic move; send, then accept")


class NoLease:
    """For brokers whose deliveries end with their link alone."""

    address: Any

    async def extend(self, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
        raise Unsupported(f"{self.address}: deliveries of this broker have no lease to extend")


class OnlyLooks:
    """For browsers: what was looked at is nobody's."""

    address: Any

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        raise only_looked_at(self.address)

    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        raise only_looked_at(self.address)

    async def extend(self, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
        raise only_looked_at(self.address)


def only_looked_at(address: Address) -> Unsupported:
    return Unsupported(f"{address}: the messages were only looked at")
