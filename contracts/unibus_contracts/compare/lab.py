"""What a probe works with: buses of one target, names of its own, and ways to wait."""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
from collections.abc import Awaitable, Callable, Iterable
from time import perf_counter
from typing import Any, TypeVar

from unibus import Bus, Delivery, Queue, Topic
from unibus.capabilities import Capabilities

from ..cleanup import Made, Removal, remove
from .model import Sizes
from .targets import Target

T = TypeVar("T")
POLL = 0.005


class Missing(Exception):
    """What had to arrive has not; the text counts."""


class Lab:
    """Every name on the broker begins with `prefix`. `made`: what will have to be deleted, by prefix; the contracts have their own."""

    def __init__(self, target: Target, sizes: Sizes, prefix: str | None = None) -> None:
        self.target = target
        self.sizes = sizes
        self.prefix = prefix or f"cmp-{secrets.token_hex(3)}."
        self.made = [Made(self.prefix)]
        self.left: list[str] = []  # what the contracts could not delete themselves, as they say it
        self.capabilities: Capabilities | None = None
        self._numbers = itertools.count(1)

    @property
    def known(self) -> Capabilities:
        assert self.capabilities is not None, "connect first"
        return self.capabilities

    async def connect(self) -> Capabilities:
        """What the connected adapter declares. Raises what the broker says to that."""
        async with self.bus() as bus:
            self.capabilities = bus.capabilities
        return self.capabilities

    def bus(self, *channels: Queue[Any] | Topic[Any], **settings: Any) -> Bus:
        """A bus, not open."""
        return self.target.bus(made=self.made[0], channels=channels, prefix=self.prefix, **settings)

    async def remove(self) -> Removal:
        """Delete what was made. Raises nothing that the broker says."""
        deleted, left = 0, [*self.left]
        for made in self.made:
            removal = await remove(self.target.bus(prefix=made.prefix), made)
            deleted += removal.deleted
            if removal.left is not None:
                left.append(f"what begins with {made.prefix!r}: {removal.left}")
        return Removal(deleted, "; ".join(left) or None)

    def name(self, label: str) -> str:
        return f"{label}-{next(self._numbers)}"

    def queue(self, label: str = "q", **features: Any) -> Queue[bytes]:
        return Queue(self.name(label), bytes, **features)

    def topic(self, label: str = "t", **features: Any) -> Topic[bytes]:
        return Topic(self.name(label), bytes, **features)


async def until(condition: Callable[[], object], what: Callable[[], str], timeout: float) -> None:
    """Return once the condition holds; raise Missing with what was waited for when it does not in time."""
    deadline = asyncio.get_running_loop().time() + timeout
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            raise Missing(f"{what()} within {timeout:g} s")
        await asyncio.sleep(POLL)


async def take(receiver: Any, count: int, timeout: float = 20.0) -> list[Delivery[Any]]:
    """The next `count` deliveries, not settled."""
    taken: list[Delivery[Any]] = []
    while len(taken) < count:
        delivery = await receiver.receive(timeout=timeout)
        if delivery is None:
            raise Missing(f"{len(taken)} of {count} messages arrived; then none for {timeout:g} s")
        taken.append(delivery)
    return taken


async def rest(receiver: Any, quiet: float) -> list[Delivery[Any]]:
    """All that comes until nothing has for `quiet` seconds. Each is acked."""
    taken: list[Delivery[Any]] = []
    while (delivery := await receiver.receive(timeout=quiet)) is not None:
        taken.append(delivery)
        await delivery.ack()
    return taken


async def timed(work: Awaitable[T]) -> tuple[T, float]:
    begun = perf_counter()
    return await work, perf_counter() - begun


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that `share` of all values do not exceed."""
    ordered = sorted(values)
    if not ordered:
        raise Missing("no sample was taken")
    return ordered[max(0, math.ceil(round(len(ordered) * share, 6)) - 1)]


def short(number: float) -> str:
    """Three digits that say something: 12,300, 0.0123."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}"


def milliseconds(seconds: float) -> str:
    return f"{short(seconds * 1000)} ms"
