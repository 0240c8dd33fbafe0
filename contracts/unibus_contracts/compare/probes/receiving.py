"""What receiving is like: what an ack covers, who shares the work, what a stop gives back, history, priority, expiry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from time import perf_counter, time

from unibus import Bus, Queue
from unibus.tooling import peek

from ..lab import Lab, rest, short, take, until
from ..model import Found, Probe, Row

CHAPTER = "receiving"
QUIET = 2.0

UNIT = Row(
    id="receiving.unit",
    chapter=CHAPTER,
    title="what an ack covers",
    how="Of three messages of one key, taken together, only the second is acked; the receiver is closed, and another one sees what comes "
    "again. On a broker that counts positions, the adapter does this. With `settle_confirmed` it holds from the moment in which the ack "
    "returns, without from a moment later.",
    feature="settle_confirmed",
    touches=("queue", "topic"),
)
STOP = Row(
    id="receiving.stop",
    chapter=CHAPTER,
    title="unsettled at a graceful stop",
    how="Three messages are taken and not settled, the receiver is closed, and another one takes them. The time is from the close to the "
    "last of them; `deliveries` is what the broker counts, where it does.",
    feature="release",
    unit="s",
    better="less",
)
SHARE = Row(
    id="receiving.share",
    chapter=CHAPTER,
    title="competing consumers that get work",
    how="So many consumers, each with a connection of its own, on one queue in default settings, with 20 messages for each of "
    "them; how many of them were handed any.",
    feature="share",
    touches=("queue",),
    unit="consumers",
    better="more",
)
REPLAY = Row(
    id="receiving.replay",
    chapter=CHAPTER,
    title="a new group gets the history",
    how="Three messages are published to a topic with one group; then a second group is made that starts with all that is kept.",
    feature="replay",
    touches=("topic",),
)
PRIORITY = Row(
    id="receiving.priority",
    chapter=CHAPTER,
    title="priority",
    how="A backlog of three priorities, four messages each, taken one by one.",
    feature="priority",
    touches=("priorities",),
)
EXPIRY = Row(
    id="receiving.expiry",
    chapter=CHAPTER,
    title="a message whose time is over",
    how="A message that expires after 0.2 s, and one that does not, wait until the time is over; then a consumer starts. It tells whether "
    "the consumer dropped the first, or the broker had done so before.",
)
BROWSE = Row(
    id="receiving.browse",
    chapter=CHAPTER,
    title="looking without taking",
    how="Three messages of one key are looked at, as `unibus peek` does it, and then taken: were all of them seen, are all still "
    "there, and what do their order and `deliveries` say of the look.",
    feature="browse",
)
COUNT = Row(
    id="receiving.count",
    chapter=CHAPTER,
    title="how often it was delivered is known",
    how="One message is taken three times, and given back twice by closing the receiver; what `deliveries` says each time. It is what shows a message that "
    "kills its consumer each time, beside the crash guard of unibus, which no probe waits for.",
    feature="delivery_count",
    touches=("retry",),
)


async def unit(lab: Lab) -> Mapping[str, Found]:
    queue = lab.queue("unit")
    async with lab.bus(queue) as bus:
        await bus.send_many(queue, [b"1", b"2", b"3"], key=lambda _: "k")
        async with bus.receiver(queue) as receiver:
            taken = await take(receiver, 3)
            second = next(delivery for delivery in taken if delivery.body == b"2")
            await second.ack()
    async with lab.bus(queue) as bus, bus.receiver(queue) as receiver:
        again = {d.body for d in await take(receiver, 1)} | {d.body for d in await rest(receiver, QUIET)}
    if again == {b"1", b"3"}:
        return {UNIT.id: Found(text="one message")}
    names = ", ".join(sorted(body.decode() for body in again))
    return {UNIT.id: Found(text=f"not just one message: {names} came again")}


async def stop(lab: Lab) -> Mapping[str, Found]:
    queue = lab.queue("stop")
    async with lab.bus(queue) as bus:
        await bus.send_many(queue, [b"1", b"2", b"3"])
        async with bus.receiver(queue) as receiver:
            await take(receiver, 3)
        begun = perf_counter()
        async with bus.receiver(queue) as receiver:
            again = await take(receiver, 3, timeout=60)
            took = perf_counter() - begun
            for delivery in again:
                await delivery.ack()
    counts = {d.deliveries for d in again}
    deliveries = "not told" if None in counts else " or ".join(str(c) for c in sorted(c for c in counts if c))
    attempts = " or ".join(str(n) for n in sorted({d.attempt for d in again}))
    text = f"all come again after {short(took)} s"
    return {STOP.id: Found(text=text, value=took, note=f"deliveries: {deliveries}; attempt: {attempts}")}


async def share(lab: Lab) -> Mapping[str, Found]:
    queue, members = lab.queue("share"), lab.sizes.members
    handled = [0] * members

    def member(number: int) -> Bus:
        bus = lab.bus()

        @bus.consumer(queue, concurrency=1, prefetch=2)
        async def handle(body: bytes) -> None:
            handled[number] += 1
            await asyncio.sleep(0.002)  # others are to have a chance

        return bus

    async with lab.bus(queue) as sender, AsyncExitStack() as stack:
        buses = [member(number) for number in range(members)]
        await asyncio.gather(*(stack.enter_async_context(bus.running()) for bus in buses))
        count = 20 * members
        await sender.send_many(queue, [b"x"] * count, key=_keys(count))
        await until(lambda: sum(handled) >= count, lambda: f"{sum(handled)} of {count} handled", 40)
    busy = sum(bool(n) for n in handled)
    note = f"messages each: {', '.join(map(str, sorted(handled, reverse=True)))}"
    return {SHARE.id: Found(text=f"{busy} of {members}", value=float(busy), note=note)}


def _keys(count: int) -> Callable[[bytes], str]:
    numbers = iter(range(count))
    return lambda _: f"k{next(numbers)}"


async def replay(lab: Lab) -> Mapping[str, Found]:
    topic, seen = lab.topic("replay"), []
    first, second = lab.bus(), lab.bus()

    @first.subscriber(topic, group="first")
    async def never(body: bytes) -> None: ...

    @second.subscriber(topic, group="second", start="all")
    async def handle(body: bytes) -> None:
        seen.append(body)

    async with first:
        await first.publish_many(topic, [b"1", b"2", b"3"])
        async with second.running():
            await until(lambda: len(seen) >= 3, lambda: f"{len(seen)} of 3 came", 20)
    return {REPLAY.id: Found(text="all of it")}


async def priority(lab: Lab) -> Mapping[str, Found]:
    queue: Queue[bytes] = lab.queue("priority", priorities=3)
    async with lab.bus(queue) as bus:
        for level in (0, 1, 2):
            for _ in range(4):
                await bus.send(queue, b"%d" % level, priority=level)
        levels = []
        async with bus.receiver(queue, prefetch=1) as receiver:
            for _ in range(12):
                [delivery] = await take(receiver, 1)
                levels.append(int(delivery.body))
                await delivery.ack()
    wrong = sum(level != expected for level, expected in zip(levels, sorted(levels, reverse=True), strict=True))
    text = "higher first" if not wrong else f"{wrong} of 12 out of turn"
    return {PRIORITY.id: Found(text=text, value=float(wrong))}


async def expiry(lab: Lab) -> Mapping[str, Found]:
    queue, seen = lab.queue("expiry"), []
    bus = lab.bus()

    @bus.consumer(queue, concurrency=1)
    async def handle(body: bytes) -> None:
        seen.append(body)

    async with lab.bus(queue) as sender:
        await sender.send(queue, b"short", expires_in=0.2)
        over = time() + 0.21
        await sender.send(queue, b"long")
        await until(lambda: time() > over, lambda: "its time was not over", 5)
    async with bus.running():
        await until(lambda: b"long" in seen, lambda: "the message without an expiry did not come", 20)
        dropped = bus.counts.get("expired", 0)
    if b"short" in seen:
        return {EXPIRY.id: Found(text="handled all the same", value=1.0)}
    return {EXPIRY.id: Found(text="dropped by the consumer" if dropped else "dropped by the broker", value=0.0)}


async def look(lab: Lab) -> Mapping[str, Found]:
    queue, bodies = lab.queue("look"), [b"1", b"2", b"3"]
    async with lab.bus(queue) as bus:
        await bus.send_many(queue, bodies, key=lambda _: "k")
        seen = [delivery.body async for delivery in peek(bus, queue, 10)]
        async with bus.receiver(queue) as receiver:
            taken = await take(receiver, 3, timeout=40)
            for delivery in taken:
                await delivery.ack()
    counts = ", ".join("not told" if d.deliveries is None else str(d.deliveries) for d in taken)
    order = "in order" if [d.body for d in taken] == bodies else "in another order"
    text = "sees all, takes none" if sorted(seen) == bodies else f"sees {len(seen)} of 3, takes none"
    return {BROWSE.id: Found(text=text, note=f"taken afterwards: {order}; deliveries: {counts}")}


async def count(lab: Lab) -> Mapping[str, Found]:
    queue, counts = lab.queue("count"), []
    async with lab.bus(queue) as bus:
        await bus.send(queue, b"x")
        for turn in range(3):
            async with bus.receiver(queue) as receiver:
                [delivery] = await take(receiver, 1, timeout=40)
                counts.append(delivery.deliveries)
                if turn == 2:
                    await delivery.ack()
    text = "not told" if None in counts else ", ".join(map(str, counts))
    return {COUNT.id: Found(text=text)}


PROBES = (
    Probe(name="ack unit", rows=(UNIT,), measure=unit, waits=True),
    Probe(name="stop", rows=(STOP,), measure=stop, waits=True, limit=90.0),
    Probe(name="share", rows=(SHARE,), measure=share, limit=90.0),
    Probe(name="replay", rows=(REPLAY,), measure=replay, needs="replay"),
    Probe(name="priority", rows=(PRIORITY,), measure=priority, needs="priority"),
    Probe(name="expiry", rows=(EXPIRY,), measure=expiry, waits=True),
    Probe(name="look", rows=(BROWSE,), measure=look, needs="browse", waits=True),
    Probe(name="count", rows=(COUNT,), measure=count, waits=True, limit=140.0),
)
