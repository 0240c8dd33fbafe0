"""Order by key: the messages of one key are handled one after the other, in the order of sending, by whoever it is."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress

from unibus import Bus, DeadLetter, Delivery, Message, Queue
from unibus.adapter import Outgoing
from unibus_contracts.contract import contract
from unibus_contracts.kit import LATER, SOON, Kit, Seen, bodies, leftover, letters, until


class Lanes:
    """What each key has seen, and whether two messages of one key were ever handled at once."""

    def __init__(self) -> None:
        self.by_key: dict[str, list[int]] = {}
        self.overlaps: list[str] = []
        self.count = 0
        self._inside: set[str] = set()

    async def handle(self, key: str, n: int) -> None:
        if key in self._inside:
            self.overlaps.append(key)
        self._inside.add(key)
        self.by_key.setdefault(key, []).append(n)
        for _ in range(3):  # give others the chance to overtake
            await asyncio.sleep(0)
        self._inside.discard(key)
        self.count += 1


class KeyInTurn:
    """Sixteen keys, one after the other: a body alone does not tell its key."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, _body: bytes) -> str:
        self._next += 1
        return f"key {(self._next - 1) % 16}"


def consuming(kit: Kit, queue: Queue[bytes], lanes: Lanes) -> Bus:
    bus = kit.bus()

    @bus.consumer(queue, concurrency=10)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        await lanes.handle(delivery.message.key or "", int(body))

    return bus


@contract("order.one_key", "Two hundred messages of one key are handled in sequence, one at a time.", needs="order")
async def test_one_key(kit: Kit) -> None:
    queue, lanes = kit.queue(ordered=True), Lanes()
    bus = consuming(kit, queue, lanes)
    async with bus.running():
        for n in range(200):
            await bus.send(queue, b"%d" % n, key="k")
        await until(lambda: lanes.count == 200, "200 handled")
    assert lanes.by_key == {"k": list(range(200))}
    assert lanes.overlaps == []


@contract(
    "order.per_key_competing", "Over three competing consumers, each key keeps its order, one at a time.", needs="order"
)
async def test_competing(kit: Kit) -> None:
    queue, lanes = kit.queue(ordered=True), Lanes()
    async with kit.bus(queue) as sender, AsyncExitStack() as stack:
        # A backlog, so that all three have something to take at once.
        await sender.send_many(queue, [b"%d" % (n // 16) for n in range(320)], key=KeyInTurn())
        buses = [consuming(kit, queue, lanes) for _ in range(3)]
        await asyncio.gather(*(stack.enter_async_context(bus.running()) for bus in buses))
        await until(lambda: lanes.count == 320, "320 handled")
        await until(lambda: sum(bus.counts.get("handled", 0) for bus in buses) == 320, "320 settled")
    assert lanes.by_key == {f"key {key}": list(range(20)) for key in range(16)}
    assert lanes.overlaps == []
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []


@contract("order.keys_run_at_once", "A key that is busy holds up no other key.", needs="order")
async def test_keys_at_once(kit: Kit) -> None:
    queue, gate, seen = kit.queue(ordered=True), asyncio.Event(), Seen[tuple[str | None, bytes]]()
    bus = kit.bus()

    @bus.consumer(queue, concurrency=5)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen((delivery.message.key, body))
        if delivery.message.key == "busy":
            await gate.wait()

    async with bus.running():
        for n in range(3):
            await bus.send(queue, b"%d" % n, key="busy")
            await bus.send(queue, b"%d" % n, key="free")
            await bus.send(queue, b"%d" % n)  # without a key: nobody's order
        await until(lambda: sum(key != "busy" for key, _ in seen.all) == 6, "the free ones are handled")
        assert [body for key, body in seen.all if key == "busy"] == [b"0"]
        gate.set()
        await seen.reach(9)
    assert [body for key, body in seen.all if key == "busy"] == [b"0", b"1", b"2"]
    assert [body for key, body in seen.all if key == "free"] == [b"0", b"1", b"2"]


@contract(
    "order.kept_over_retries",
    "While a key's head waits for its retry, its others wait, and other keys go on.",
    needs="order",
)
async def test_retries(kit: Kit) -> None:
    queue, seen = kit.queue(ordered=True), Seen[tuple[str | None, bytes, int]]()
    bus = kit.bus()

    @bus.consumer(queue, concurrency=5, retry=LATER)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen((delivery.message.key, body, delivery.attempt))
        if body == b"fails" and delivery.attempt < 3:
            raise OSError("again")

    async with bus.running():
        await bus.send(queue, b"fails", key="a")
        await bus.send(queue, b"second", key="a")
        await bus.send(queue, b"other", key="b")
        await seen.reach(5)
    assert [entry[1:] for entry in seen.all if entry[0] == "a"] == [
        (b"fails", 1),
        (b"fails", 2),
        (b"fails", 3),
        (b"second", 1),
    ]
    assert ("b", b"other", 1) in seen.all[:3], "another key had to wait for the retry"


@contract(
    "order.dead_letter_frees_the_key", "When a key's head is dead, the next message of the key follows.", needs="order"
)
async def test_dead(kit: Kit) -> None:
    queue, seen = kit.queue(ordered=True), Seen[bytes]()
    bus = kit.bus()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen(body)
        if body == b"bad":
            raise DeadLetter("out of the way")

    async with bus.running():
        for body in (b"1", b"bad", b"2", b"3"):
            await bus.send(queue, body, key="k")
        assert await seen.reach(4) == [b"1", b"bad", b"2", b"3"]
        assert bodies(await letters(bus, queue)) == [b"bad"]


@contract(
    "order.sends_not_awaited",
    "A hundred sends of one key that are not awaited in between keep their order.",
    needs="order",
)
async def test_pipelined(kit: Kit) -> None:
    queue, lanes = kit.queue(ordered=True), Lanes()
    bus = consuming(kit, queue, lanes)
    async with bus.running():
        await asyncio.gather(*(bus.send(queue, b"%d" % n, key=f"k{n % 2}") for n in range(100)))
        await until(lambda: lanes.count == 100, "100 handled")
    assert lanes.by_key == {"k0": list(range(0, 100, 2)), "k1": list(range(1, 100, 2))}
    assert lanes.overlaps == []


@contract("order.of_send_many", "send_many keeps the order of the bodies within each key.", needs="order")
async def test_send_many(kit: Kit) -> None:
    queue, lanes = kit.queue(ordered=True), Lanes()
    bus = consuming(kit, queue, lanes)
    async with bus.running():
        await bus.send_many(queue, [b"%d" % n for n in range(300)], key=lambda body: f"k{int(body) % 3}")
        await until(lambda: lanes.count == 300, "300 handled")
    assert lanes.by_key == {f"k{k}": list(range(k, 300, 3)) for k in range(3)}


@contract("order.per_publisher", "Two publishers to one key each keep their own order.", needs="order")
async def test_per_publisher(kit: Kit) -> None:
    queue, lanes = kit.queue(ordered=True), Lanes()
    bus = consuming(kit, queue, lanes)
    async with bus.running(), kit.bus(queue) as other:

        async def publish(by: Bus, first: int) -> None:
            for n in range(first, 100, 2):
                await by.send(queue, b"%d" % n, key="k")

        await asyncio.gather(publish(bus, 0), publish(other, 1))
        await until(lambda: lanes.count == 100, "100 handled")
    found = lanes.by_key["k"]
    assert sorted(found) == list(range(100))
    assert [n for n in found if n % 2 == 0] == list(range(0, 100, 2))
    assert [n for n in found if n % 2] == list(range(1, 100, 2))


@contract(
    "order.kept_over_takeover", "When the consumer of a key leaves, another goes on where it stopped.", needs="order"
)
async def test_takeover(kit: Kit) -> None:
    queue, gate, seen = kit.queue(ordered=True), asyncio.Event(), Seen[tuple[str, bytes]]()
    leaver, heir, sender = kit.bus(), kit.bus(), kit.bus(queue)

    @leaver.consumer(queue)
    async def begin(body: bytes) -> None:
        seen(("leaver", body))
        await gate.wait()

    @heir.consumer(queue)
    async def go_on(body: bytes) -> None:
        seen(("heir", body))

    async with sender, AsyncExitStack() as stack:
        leaving = AsyncExitStack()
        await leaving.enter_async_context(leaver.running())
        for n in range(10):
            await sender.send(queue, b"%d" % n, key="k")
        await seen.reach(1)
        await stack.enter_async_context(heir.running())
        left = asyncio.create_task(leaving.aclose())  # drains: it waits for the handler that is running
        await sender.send(queue, b"other", key="other")
        # A broker may hand the queue over only when the leaver is gone, or other keys at once. This key must wait.
        with suppress(AssertionError):
            await until(lambda: ("heir", b"other") in seen.all, "handed over already", timeout=2)
        assert [entry for entry in seen.all if entry[1] != b"other"] == [("leaver", b"0")]
        gate.set()
        await left
        await seen.reach(11)
    assert [body for _, body in seen.all if body != b"other"] == [b"%d" % n for n in range(10)]
    assert {name for name, body in seen.all if body != b"0"} == {"heir"}, "a consumer that leaves begins nothing new"


@contract("order.of_a_group", "The group of an ordered topic keeps the order of each key.", needs="order")
async def test_group(kit: Kit) -> None:
    topic, lanes = kit.topic(ordered=True), Lanes()
    bus = kit.bus()

    @bus.subscriber(topic, group="g", concurrency=10)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        await lanes.handle(delivery.message.key or "", int(body))

    async with bus.running():
        for n in range(100):
            await bus.publish(topic, b"%d" % n, key=f"k{n % 5}")
        await until(lambda: lanes.count == 100, "100 handled")
    assert lanes.by_key == {f"k{k}": list(range(k, 100, 5)) for k in range(5)}
    assert lanes.overlaps == []


@contract(
    "order.of_one_call", "The messages of one key in one call of the SPI arrive in the order given.", needs="order"
)
async def test_one_call(kit: Kit) -> None:
    queue, lanes = kit.queue(ordered=True), Lanes()
    bus = consuming(kit, queue, lanes)
    async with bus.running():
        batch = [Outgoing(queue, Message(b"%d" % n, id=f"{queue.name}-{n}", key="k")) for n in range(50)]
        assert list(await bus.adapter.send(batch, SOON)) == [None] * 50
        await until(lambda: lanes.count == 50, "50 handled")
    assert lanes.by_key == {"k": list(range(50))}
