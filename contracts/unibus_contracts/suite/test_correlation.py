"""Correlation: every message belongs to a conversation, and knows what caused it."""

from __future__ import annotations

import asyncio

from unibus import DeadLetter, Delivery, Message, deadletter
from unibus_contracts.contract import contract
from unibus_contracts.kit import LATER, Kit, Seen, leftover, letters, until


def conversation(message: Message) -> str:
    """A message without a correlation id begins a conversation: its own id is the id of that."""
    return message.correlation_id or message.id


@contract("corr.preserved_or_begun", "A given correlation id arrives; without one, the message begins its own.")
async def test_preserved(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        await bus.send(queue, Message(b"given", correlation_id="mine", causation_id="cause"))
        first, second = [await bus.send(queue, b"begun") for _ in range(2)]
        given, one, two = [d.message for d in await leftover(bus, queue)]
    assert (given.correlation_id, given.causation_id) == ("mine", "cause")
    assert [conversation(one), conversation(two)] == [first, second]
    assert one.causation_id is None


@contract(
    "corr.handlers_messages_inherit", "All that a handler sends carries its conversation and its message as cause."
)
async def test_inherit(kit: Kit) -> None:
    queue, out, topic = kit.queue(), kit.queue(label="out"), kit.topic()
    bus, reader, seen = kit.bus(out, topic), kit.bus(out, (topic, "g")), Seen[Message]()

    @bus.consumer(queue)
    async def handle(body: bytes, message: Message) -> None:
        await bus.send(out, b"sent")
        await bus.send_many(out, [b"one of many"])
        await bus.publish(topic, b"published")
        await asyncio.create_task(bus.send(out, b"from a task"))
        await bus.send(out, Message(b"explicit", correlation_id="own", causation_id="other"))
        seen(message)

    async with reader, bus.running():
        first = await bus.send(queue, b"begins")
        await seen.reach(1)
        await bus.send(queue, Message(b"goes on", correlation_id="c-1"))
        await seen.reach(2)
        sent = [d.message for d in await leftover(reader, out)]
        sent += [d.message for d in await leftover(reader, (topic, "g"))]
    begins, goes_on = seen.all
    inherited = [m for m in sent if m.body != b"explicit"]
    assert len(inherited) == 8
    assert {(m.correlation_id, m.causation_id) for m in inherited} == {(first, begins.id), ("c-1", goes_on.id)}
    assert [m.causation_id for m in inherited].count(begins.id) == 4
    assert {(m.correlation_id, m.causation_id) for m in sent if m.body == b"explicit"} == {("own", "other")}


@contract("corr.threads_inherit", "A handler that runs in a thread passes on its conversation too.")
async def test_threads(kit: Kit) -> None:
    queue, out = kit.queue(), kit.queue(label="out")
    bus, seen = kit.bus(out), Seen[str]()

    @bus.consumer(queue)
    def handle(body: bytes) -> None:
        with bus.blocking() as sender:
            seen(sender.send(out, b"from a thread"))

    async with bus.running():
        parent = await bus.send(queue, b"x")
        await seen.reach(1)
        (child,) = await leftover(bus, out)
    assert (child.message.correlation_id, child.message.causation_id) == (parent, parent)


@contract("corr.survives_retry_dead_letter_redrive", "Id, conversation and cause stay over retries, death and redrive.")
async def test_survives(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[tuple[str, str | None, str | None, str | None]]()

    @bus.consumer(queue, retry=LATER)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        m = delivery.message
        seen((m.id, m.correlation_id, m.causation_id, m.reply_to))
        if "x-redrive-count" in m.headers:
            return
        if delivery.attempt == 1:
            raise OSError("again")
        raise DeadLetter("enough")

    async with bus.running():
        await bus.send(queue, Message(b"x", id="me", correlation_id="talk", causation_id="cause"))
        await letters(bus, queue)
        assert await deadletter.redrive(bus, queue) == 1
        await seen.reach(3)
    assert seen.all == [("me", "talk", "cause", None)] * 3


@contract("corr.no_leak_between_handlers", "Fifty handlers at once each pass on their own conversation.")
async def test_no_leak(kit: Kit) -> None:
    queue, out = kit.queue(), kit.queue(label="out")
    bus, gate, seen = kit.bus(out), asyncio.Event(), Seen[bytes]()

    @bus.consumer(queue, concurrency=50)
    async def handle(body: bytes) -> None:
        seen(body)
        await gate.wait()  # all are inside before the first one sends
        await bus.send(out, body)

    async with bus.running():
        ids = {b"%d" % n: await bus.send(queue, b"%d" % n) for n in range(50)}
        await seen.reach(50)
        gate.set()
        await until(lambda: bus.counts.get("handled") == 50, "50 handled")
        outside = await bus.send(out, b"outside")
        found = {d.body: d.message for d in await leftover(bus, out)}
    assert len(found) == 51
    for body, id in ids.items():
        assert (found[body].correlation_id, found[body].causation_id) == (id, id)
    assert conversation(found[b"outside"]) == outside
