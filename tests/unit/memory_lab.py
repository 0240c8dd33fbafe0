"""What the tests of the in-memory broker share: some channels, and an adapter on a virtual clock."""

from collections.abc import Sequence
from typing import Any

from unibus.adapter import Declared, Endpoint, Outgoing, Source, Topology, Url
from unibus.channel import Address, Group, Queue, Topic
from unibus.clock import VirtualClock
from unibus.delivery import Delivery
from unibus.memory import MemoryAdapter
from unibus.memory_subscription import MemorySubscription
from unibus.message import Message

ORDERS = Queue[bytes]("orders")
ORDERED = Queue[bytes]("ordered", ordered=True)
URGENT = Queue[bytes]("urgent", priorities=3)
DONE = Queue[bytes]("done")
EVENTS = Topic[bytes]("events")
LONELY = Topic[bytes]("lonely")
A, B = Group(EVENTS, "a"), Group(EVENTS, "b")
ALL = (ORDERS, ORDERED, URGENT, DONE, EVENTS, LONELY, A, B)


def declared(*addresses: Any, mode: Any = "create") -> Topology:
    return Topology(mode, tuple(Declared(a, a.name) for a in addresses))


class Lab:
    """One adapter on a virtual clock, and words that tests are short in."""

    def __init__(self, **settings: object) -> None:
        self.clock = VirtualClock()
        self.adapter = MemoryAdapter(Endpoint(Url("memory"), "test", "1", self.clock, settings=settings))
        self.broker = self.adapter.broker

    async def start(self) -> "Lab":
        await self.adapter.connect()
        await self.adapter.declare(declared(*ALL))
        return self

    async def send(self, to: Address, *bodies: str, wait: float | None = None, **fields: Any) -> Sequence[Any]:
        due = None if wait is None else self.clock.time() + wait
        return await self.adapter.send([Outgoing(to, Message(b.encode(), id=b, **fields), due) for b in bodies], 5)

    async def subscribe(self, address: Any, **options: Any) -> MemorySubscription:
        return await self.adapter.subscribe(Source(address, **options))


def ids(deliveries: Sequence[Delivery[Any]]) -> str:
    return " ".join(d.message.id for d in deliveries)


async def got(subscription: MemorySubscription, limit: int = 100) -> str:
    return ids(await subscription.receive(limit, 0))
