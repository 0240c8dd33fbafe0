"""What saboteurs are made of: a wrapper around the memory adapter that does everything right, to be overridden.

The URL is `sabotaged://NAME?saboteur=...`, found by an entry point like the adapter of any third party. It can name a host, so
that the contracts on what can't be reached have something to fail on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from unibus.adapter import Endpoint, Move, Outcome, Outgoing, Results, Source, Topology, Url
from unibus.capabilities import Capabilities
from unibus.delivery import Delivery
from unibus.errors import ConnectionLost
from unibus.memory import MemoryAdapter
from unibus.memory_subscription import MemorySubscription

SCHEME = "sabotaged"
HOST = "in.memory"  # with a dot, like one that may be out of reach
PASSWORD = "ca-na-ry"  # noqa: S105  # to be told by those that tell it
HEALTHY = "nobody"


class Subscription:
    """A subscription that hands everything on. `inner`: that of the memory adapter."""

    def __init__(self, adapter: Adapter, inner: MemorySubscription) -> None:
        self.adapter = adapter
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        return [self.adapter.receiving(delivery) for delivery in await self.inner.receive(limit, timeout)]

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        return await self.inner.settle(outcome, deliveries, delays=delays)

    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        changed = [Move(m.delivery, [out for send in m.sends for out in self.adapter.sending(send)]) for m in moves]
        return await self.inner.move(changed, timeout)


class Deaf(Subscription):
    """One that receives nothing."""

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        await asyncio.sleep(timeout)
        return []


class Adapter:
    """An adapter that hands everything on. Two hooks see each message: on its way out, moves included, and on its way in."""

    subscription: ClassVar[type[Subscription]] = Subscription
    claims: ClassVar[dict[str, Any]] = {}  # over what the memory adapter says of itself

    def __init__(self, endpoint: Endpoint) -> None:
        url = endpoint.url
        self.url = url
        self.reachable = all(port is None for _, port in url.hosts)
        settings = {name: value for name, value in endpoint.settings.items() if name != "saboteur"}
        memory = Url("memory", tuple((host, None) for host, _ in url.hosts))
        self.inner = MemoryAdapter(replace(endpoint, url=memory, settings=settings))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.inner.capabilities, adapter=SCHEME, **self.claims)

    async def connect(self) -> None:
        if not self.reachable:
            raise ConnectionLost(f"nobody listens at {self.url}")
        await self.inner.connect()

    async def declare(self, topology: Topology) -> None:
        await self.inner.declare(topology)

    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        """What is stored for it; nothing: it is lost, and confirmed."""
        return (outgoing,)

    def receiving(self, delivery: Delivery[Any]) -> Delivery[Any]:
        return delivery

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        parts = [list(self.sending(outgoing)) for outgoing in batch]
        results = iter(await self.inner.send([out for part in parts for out in part], timeout))
        return [next((e for e in [next(results) for _ in part] if e is not None), None) for part in parts]

    async def subscribe(self, source: Source) -> Subscription:
        return self.subscription(self, await self.inner.subscribe(source))


@dataclass(frozen=True, slots=True)
class Saboteur:
    """One broken adapter. `bug`: one sentence; `kills`: the contracts that are meant to catch it."""

    name: str
    bug: str
    kills: tuple[str, ...]
    adapter: type[Adapter]


@dataclass(frozen=True, slots=True)
class Hardship:
    """One adapter that is right, and hard to live with. `what`: one sentence; `keeps`: the contracts that are kept all the same."""

    name: str
    what: str
    keeps: tuple[str, ...]
    adapter: type[Adapter]


SABOTEURS: dict[str, Saboteur] = {}
HARDSHIPS: dict[str, Hardship] = {}
C = TypeVar("C", bound=type[Adapter] | type[Subscription])


def saboteur(bug: str, *kills: str) -> Callable[[C], C]:
    """Enlist a broken adapter, or one whose subscriptions are. Its name is that of the class: `LosesTheKey`, `loses-the-key`."""
    _checked(bug, kills, "the contracts that are meant to catch it")

    def enlist(broken: C) -> C:
        name, adapter = _enlisted(broken)
        SABOTEURS[name] = Saboteur(name, bug, kills, adapter)
        return broken

    return enlist


def hardship(what: str, *keeps: str) -> Callable[[C], C]:
    """Enlist an adapter, or one whose subscriptions are, that does what the SPI allows and the core has to bear."""
    _checked(what, keeps, "the contracts that are kept all the same")

    def enlist(hard: C) -> C:
        name, adapter = _enlisted(hard)
        HARDSHIPS[name] = Hardship(name, what, keeps, adapter)
        return hard

    return enlist


def _checked(sentence: str, contracts: Sequence[str], which: str) -> None:
    if not sentence.endswith(".") or not contracts:
        raise ValueError(f"{sentence!r}: one sentence, and {which}")


def _enlisted(given: type[Adapter | Subscription]) -> tuple[str, type[Adapter]]:
    name = "".join(f"-{c.lower()}" if c.isupper() else c for c in given.__name__).strip("-")
    if name in SABOTEURS or name in HARDSHIPS:
        raise ValueError(f"two are called {name}")
    return name, given if issubclass(given, Adapter) else type(given.__name__, (Adapter,), {"subscription": given})


def changed(outgoing: Outgoing, **fields: Any) -> Outgoing:
    """The same with other fields of its message."""
    return replace(outgoing, message=replace(outgoing.message, **fields))
