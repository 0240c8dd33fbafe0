"""Invalid messages: what can't be decoded is set aside raw, at once, and blocks nobody."""

from __future__ import annotations

from typing import Any

from unibus import Bus, Message, Queue, Topic, deadletter
from unibus.adapter import Source
from unibus.channel import Group, invalid_queue
from unibus_contracts.contract import contract
from unibus_contracts.kit import AT_ONCE, Kit, Seen, bodies, eventually, leftover, letters, until
from unibus_contracts.spi import receive


async def set_aside(bus: Bus, address: Queue[Any] | Group, count: int) -> list[Any]:
    """The messages of an invalid-message channel, by the SPI: raw."""
    subscription = await bus.adapter.subscribe(Source(invalid_queue(address), prefetch=100))
    try:
        return [delivery.message for delivery in await receive(subscription, count)]
    finally:
        await subscription.stop()
        await subscription.close()


def as_json(body: bytes) -> Message:
    """Bytes that claim to be what the queue holds: only their content decides."""
    return Message(body, content_type="application/json")


@contract(
    "invalid.undecodable_no_retry", "What can't be decoded goes to the invalid channel at once: raw, with a reason."
)
async def test_undecodable(kit: Kit) -> None:
    queue = kit.queue(dict[str, int])
    raw: Queue[bytes] = Queue(queue.name, bytes)
    bus, seen = kit.bus(), Seen[dict[str, int]]()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: dict[str, int]) -> None:
        seen(body)

    bad = [b"\xff\xfe no JSON", b"", b'{"a": "no number"}', b"[1, 2]"]
    async with kit.bus(raw) as sender, bus.running():
        ids = [await sender.send(raw, as_json(body), key="k", headers={"tenant": "t"}) for body in bad]
        await until(lambda: bus.counts.get("invalid") == 4, "4 invalid")
        found = {m.id: m for m in await set_aside(bus, queue, 4)}
        assert await letters(bus, queue, 0) == []
        assert bus.counts.get("retried", 0) == 0
    assert seen.all == []
    for id, body in zip(ids, bad, strict=True):
        message = found[id]
        assert (message.body, message.key, message.headers["tenant"]) == (body, "k", "t")
        assert message.headers["x-dlq-reason"] == "undecodable"
        assert message.headers["x-original-destination"] == queue.name
        assert message.headers["x-retry-count"] == "0"


@contract("invalid.does_not_block", "A bad message between good ones keeps none of them from being handled.")
async def test_does_not_block(kit: Kit) -> None:
    queue = kit.queue(dict[str, int])
    raw: Queue[bytes] = Queue(queue.name, bytes)
    bus, seen = kit.bus(), Seen[dict[str, int]]()

    @bus.consumer(queue, concurrency=1, prefetch=1)
    async def handle(body: dict[str, int]) -> None:
        seen(body)

    async with kit.bus(raw) as sender:
        for body in (b'{"n": 1}', b"bad", b'{"n": 2}', b"bad", b'{"n": 3}'):
            await sender.send(raw, as_json(body))
        async with bus.running():
            assert await seen.reach(3) == [{"n": 1}, {"n": 2}, {"n": 3}]
            await until(lambda: bus.counts.get("invalid") == 2, "2 invalid")


@contract("invalid.per_group", "A group that can't decode a message sets its own copy aside; the others handle theirs.")
async def test_per_group(kit: Kit) -> None:
    topic = kit.topic()
    typed: Topic[dict[str, int]] = Topic(topic.name, dict[str, int])
    strict, lax, seen = kit.bus(), kit.bus(), Seen[bytes]()

    @strict.subscriber(typed, group="strict")
    async def never(body: dict[str, int]) -> None:
        seen(b"decoded")

    @lax.subscriber(topic, group="lax")
    async def handle(body: bytes) -> None:
        seen(body)

    async with strict.running(), lax.running():
        await lax.publish(topic, b"\xff")
        await seen.reach(1)
        (message,) = await set_aside(strict, Group(typed, "strict"), 1)
    assert message.body == b"\xff"
    assert message.headers["x-original-subscription"] == "strict"
    assert seen.all == [b"\xff"]


@contract("invalid.in_a_batch", "A bad message does not reach a batch handler, and the good ones of its batch do.")
async def test_in_a_batch(kit: Kit) -> None:
    queue = kit.queue(dict[str, int])
    raw: Queue[bytes] = Queue(queue.name, bytes)
    bus, seen = kit.bus(), Seen[dict[str, int]]()

    @bus.consumer(queue, batch=10)
    async def handle(batch: list[dict[str, int]]) -> None:
        for body in batch:
            seen(body)

    async with kit.bus(raw) as sender:
        await sender.send_many(raw, [as_json(b'{"n": %d}' % n if n != 3 else b"bad") for n in range(6)])
        async with bus.running():
            await seen.reach(5)
            (message,) = await set_aside(bus, queue, 1)
    assert message.body == b"bad"
    assert sorted(body["n"] for body in seen.all) == [0, 1, 2, 4, 5]


@contract(
    "invalid.missing_target_keeps_message", "Without an invalid channel the bad message is kept, and the trouble told."
)
async def test_missing_target(kit: Kit) -> None:
    queue = kit.queue(dict[str, int])
    missing = f"{queue.name}.invalid" in await kit.alone(queue)
    raw: Queue[bytes] = Queue(queue.name, bytes)
    bus = kit.bus(declare="assume")

    @bus.consumer(queue)
    async def never(body: dict[str, int]) -> None: ...

    async with bus.running(), kit.bus(raw, declare="assume") as sender:
        await sender.send(raw, as_json(b"bad"))
        if missing:
            health = await eventually(bus.health, lambda health: health.status != "ok", "the trouble is told")
            assert any("invalid" in reason for reason in health.reasons)
        async with kit.bus(queue) as repair:  # makes what is missing
            assert bodies(await letters(repair, queue, invalid=True)) == [b"bad"]
        await eventually(bus.health, lambda health: health.status == "ok", "the trouble is over")


@contract("invalid.redrive_after_repair", "Invalid messages can be looked at and sent back to their queue.")
async def test_redrive(kit: Kit) -> None:
    queue = kit.queue(dict[str, int])
    raw: Queue[bytes] = Queue(queue.name, bytes)
    bus = kit.bus()

    @bus.consumer(queue)
    async def never(body: dict[str, int]) -> None: ...

    async with bus.running(), kit.bus(raw) as sender:
        id = await sender.send(raw, as_json(b"bad"), headers={"a": "b"})
        (letter,) = await letters(bus, queue, invalid=True)
        assert (letter.body, letter.message.id) == (b"bad", id)
    async with kit.bus(raw) as repaired:
        assert await deadletter.redrive(repaired, raw, invalid=True) == 1
        (back,) = await leftover(repaired, raw)
    assert (back.body, back.message.id) == (b"bad", id)
    assert dict(back.message.headers) == {"a": "b", "x-redrive-count": "1"}
