"""Fan-out: a publish reaches every group declared before it, and what one group does is no other's business."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from unibus import Bus, Delivery, Topic
from unibus_contracts.contract import contract
from unibus_contracts.kit import LATER, NEVER, Kit, Seen, bodies, leftover, letters, until
from unibus_contracts.refusals import refused_at_start


def subscriber(bus: Bus, topic: Topic[bytes], group: str, seen: Seen[tuple[str, bytes]]) -> None:
    @bus.subscriber(topic, group=group)
    async def handle(body: bytes) -> None:
        seen((group, body))


@contract("fanout.groups_get_all", "Two groups of a topic each get everything that is published.")
async def test_two_groups(kit: Kit) -> None:
    topic, seen = kit.topic(), Seen[tuple[str, bytes]]()
    bus = kit.bus()
    subscriber(bus, topic, "one", seen)
    subscriber(bus, topic, "two", seen)
    async with bus.running():
        for n in range(50):
            await bus.publish(topic, b"%d" % n)
        await seen.reach(100)
        assert bus.counts.get("unrouted", 0) == 0
        assert bus.counts["sent"] == 50
    assert sorted(seen.all) == sorted((group, b"%d" % n) for group in ("one", "two") for n in range(50))


@contract(
    "fanout.offline_group_keeps_backlog", "A group that is not running gets all of the meantime, done by others or not."
)
async def test_offline(kit: Kit) -> None:
    topic, seen = kit.topic(), Seen[tuple[str, bytes]]()
    bus = kit.bus()
    subscriber(bus, topic, "g", seen)
    async with bus.running():
        await bus.publish(topic, b"online")
        await seen.reach(1)
    other, others = kit.bus(), Seen[tuple[str, bytes]]()
    subscriber(other, topic, "other", others)
    meantime = [b"%d" % n for n in range(10)]
    async with other.running():
        await other.publish_many(topic, meantime)
        await until(lambda: {*meantime} <= {body for _, body in others.all}, "the other group is through with them")
    again = kit.bus()
    subscriber(again, topic, "g", seen)
    async with again.running():
        await seen.reach(11)
    assert sorted(body for _, body in seen.all) == sorted([b"online", *meantime])


@contract("fanout.declared_group_misses_nothing", "A group begins when it is declared, not when it first runs.")
async def test_declared_before(kit: Kit) -> None:
    topic = kit.topic()
    async with kit.bus((topic, "g")):
        pass
    async with kit.bus(topic) as publisher:
        await publisher.publish(topic, b"early")
    async with kit.bus((topic, "g")) as reader:
        assert bodies(await leftover(reader, (topic, "g"))) == [b"early"]


@contract("fanout.groups_are_per_topic", "Two topics with a group of the same name each keep their own messages.")
async def test_per_topic(kit: Kit) -> None:
    one, two = kit.topic(), kit.topic()
    async with kit.bus((one, "g"), (two, "g")) as bus:
        await bus.publish(one, b"1")
        await bus.publish(two, b"2")
        assert bodies(await leftover(bus, (one, "g"))) == [b"1"]
        assert bodies(await leftover(bus, (two, "g"))) == [b"2"]


@contract("fanout.settle_is_per_group", "When one group fails a message, only that group sees it again.")
async def test_per_group(kit: Kit) -> None:
    topic = kit.topic()
    bus, seen = kit.bus(), Seen[tuple[str, int]]()

    @bus.subscriber(topic, group="good")
    async def good(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(("good", delivery.attempt))

    @bus.subscriber(topic, group="bad", retry=LATER)
    async def bad(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(("bad", delivery.attempt))
        if delivery.attempt == 1:
            raise OSError("first")

    async with bus.running():
        await bus.publish(topic, b"x")
        await seen.reach(3)
        await until(lambda: bus.counts.get("handled") == 2, "both handled")
    assert sorted(seen.all) == [("bad", 1), ("bad", 2), ("good", 1)]
    async with kit.bus((topic, "good"), (topic, "bad")) as reader:
        for group in ("good", "bad"):
            assert await leftover(reader, (topic, group)) == []


@contract("fanout.dead_letters_are_per_group", "Each group has dead letters of its own; the others are not concerned.")
async def test_dead_letters(kit: Kit) -> None:
    topic = kit.topic()
    bus, seen = kit.bus(), Seen[tuple[str, bytes]]()
    subscriber(bus, topic, "good", seen)

    @bus.subscriber(topic, group="bad", retry=NEVER)
    async def bad(body: bytes) -> None:
        raise OSError("always")

    async with bus.running():
        await bus.publish(topic, b"x")
        await until(lambda: bus.counts.get("dead_lettered") == 1, "dead")
        assert bodies(await letters(bus, (topic, "bad"))) == [b"x"]
        assert await letters(bus, (topic, "good"), 0) == []
        await seen.reach(1)
    assert seen.all == [("good", b"x")]


@contract("fanout.new_group_starts_now", "A new group gets what is published after its declaration, nothing older.")
async def test_new_group(kit: Kit) -> None:
    kit.creates()
    topic = kit.topic()
    async with kit.bus((topic, "old")) as bus:
        await bus.publish(topic, b"history")
    async with kit.bus((topic, "new")) as bus:
        await bus.publish(topic, b"present")
        assert bodies(await leftover(bus, (topic, "new"))) == [b"present"]


def starting(kit: Kit, topic: Topic[bytes], start: Any, seen: Seen[bytes]) -> Bus:
    bus = kit.bus()

    @bus.subscriber(topic, group="new", start=start, concurrency=1)
    async def handle(body: bytes) -> None:
        seen(body)

    return bus


@contract(
    "fanout.new_group_may_start_at_all",
    "A group that starts at all gets the history first.",
    needs="replay",
    assumes="Topics keep what was published for a minute at least, read or not.",
)
async def test_start_all(kit: Kit) -> None:
    kit.creates()
    topic, seen = kit.topic(), Seen[bytes]()
    async with kit.bus((topic, "old")) as bus:
        await bus.publish(topic, b"history")
    async with starting(kit, topic, "all", seen).running() as bus:
        await bus.publish(topic, b"present")
        await seen.reach(2)
    assert seen.all == [b"history", b"present"]


@contract(
    "fanout.new_group_may_start_at_a_time",
    "A group that starts at a time gets what came since.",
    needs="replay",
    assumes="Topics keep what was published for a minute at least, read or not. The clocks of this machine and of the broker agree to a tenth of a second.",
)
async def test_start_time(kit: Kit) -> None:
    kit.creates()
    topic, seen = kit.topic(), Seen[bytes]()
    async with kit.bus((topic, "old")) as bus:
        await bus.publish(topic, b"before")
        since = time.time() + 0.1  # brokers count in milliseconds
        await until(lambda: time.time() > since + 0.1, "a while later")
        await bus.publish(topic, b"since")
    async with starting(kit, topic, datetime.fromtimestamp(since, UTC), seen).running() as bus:
        await bus.publish(topic, b"present")
        await seen.reach(2)
    assert seen.all == [b"since", b"present"]


@contract(
    "fanout.start_is_for_new_groups",
    "A group that is there goes on where it was, whatever its start.",
    needs="replay",
    assumes="Topics keep what was published for a minute at least, read or not.",
)
async def test_start_known(kit: Kit) -> None:
    kit.creates()
    topic, seen = kit.topic(), Seen[bytes]()
    async with kit.bus((topic, "old")) as bus:
        await bus.publish(topic, b"history")
    async with kit.bus((topic, "new")):
        pass
    for n in range(2):
        bus = starting(kit, topic, "all", seen)
        async with bus.running():
            await bus.publish(topic, b"%d" % n)
            await seen.reach(n + 1)
            await until(lambda bus=bus: bus.counts.get("handled") == 1, "handled")  # type: ignore[misc]
    assert seen.all == [b"0", b"1"]


@contract(
    "fanout.new_group_may_start_at_a_position",
    "A group begins at a position, or is refused.",
    needs="replay",
    assumes="Topics keep what was published for a minute at least, read or not.",
)
async def test_start_position(kit: Kit) -> None:
    kit.creates()
    topic, seen, positions = kit.topic(), Seen[bytes](), Seen[str]()
    old = kit.bus()

    @old.subscriber(topic, group="old", concurrency=1)
    async def note(body: bytes, delivery: Delivery[bytes]) -> None:
        positions(delivery.position)

    async with old.running():
        for body in (b"0", b"1", b"2"):
            await old.publish(topic, body, key="k")
        await positions.reach(3)
    bus = starting(kit, topic, positions.all[1:2], seen)
    if not (await kit.capabilities()).start_positions:
        await refused_at_start(bus)
        return
    async with bus.running():
        await seen.reach(2)
    assert seen.all == [b"1", b"2"]
    elsewhere = kit.bus()

    @elsewhere.subscriber(topic, group="elsewhere", start=["no position"])
    async def never(body: bytes) -> None: ...

    await refused_at_start(elsewhere)


@contract("fanout.default_group_is_the_service", "Without a group's name, the processes of one service are one group.")
async def test_default_group(kit: Kit) -> None:
    topic, seen = kit.topic(), Seen[tuple[str, bytes]]()

    def member(service: str) -> Bus:
        bus = kit.bus(service=service)

        @bus.subscriber(topic)
        async def handle(body: bytes) -> None:
            seen((service, body))

        return bus

    buses = [member(service) for service in ("alpha", "alpha", "beta")]
    async with buses[0].running(), buses[1].running(), buses[2].running():
        await buses[0].publish_many(topic, [b"%d" % n for n in range(20)])
        await seen.reach(40)
        await until(lambda: sum(bus.counts.get("handled", 0) for bus in buses) == 40, "40 handled")
    assert sorted(seen.all) == sorted((name, b"%d" % n) for name in ("alpha", "beta") for n in range(20))


@contract("fanout.broadcast_reaches_each", "A broadcast subscriber gets everything in each process.")
async def test_broadcast(kit: Kit) -> None:
    topic, seen = kit.topic(), Seen[tuple[int, bytes]]()
    buses = [kit.bus() for _ in range(3)]

    def listen(n: int) -> None:
        @buses[n].subscriber(topic, broadcast=True)
        async def handle(body: bytes) -> None:
            seen((n, body))

    for n in range(3):
        listen(n)
    async with buses[0].running(), buses[1].running(), buses[2].running():
        await buses[0].publish_many(topic, [b"%d" % n for n in range(10)])
        await seen.reach(30)
    assert sorted(seen.all) == sorted((n, b"%d" % m) for n in range(3) for m in range(10))


@contract(
    "fanout.broadcast_leaves_nothing", "A broadcast subscriber that has left gets no backlog and leaves no group."
)
async def test_broadcast_leaves_nothing(kit: Kit) -> None:
    topic, seen = kit.topic(), Seen[bytes]()

    def listener() -> Bus:
        bus = kit.bus()

        @bus.subscriber(topic, broadcast=True)
        async def handle(body: bytes) -> None:
            seen(body)

        return bus

    async with listener().running():
        pass
    async with kit.bus(topic) as publisher:
        await publisher.publish(topic, b"missed")
        assert publisher.counts.get("unrouted") == 1, "the group of a process that has left is still there"
        async with listener().running():
            await publisher.publish(topic, b"live")
            await seen.reach(1)
    assert seen.all == [b"live"]
