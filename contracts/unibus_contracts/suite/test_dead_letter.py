"""Dead letters: exactly one for each message that is given up, with its story, and a way back."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

from unibus import Bus, DeadLetter, Delivery, Message, Queue, deadletter
from unibus_contracts.contract import contract
from unibus_contracts.kit import AT_ONCE, NEVER, Kit, Seen, bodies, eventually, leftover, letters, until

STORY = {
    "x-retry-count",
    "x-error-type",
    "x-original-error",
    "x-error-stack-digest",
    "x-first-failed-at",
    "x-last-failed-at",
    "x-moved-to-dlq-at",
    "x-dlq-reason",
    "x-original-destination",
    "x-original-subscription",
}


def failing(kit: Kit, queue: Queue[bytes], positions: Seen[str] | None = None) -> Bus:
    """A bus whose handler fails everything until it is redriven."""
    bus = kit.bus()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        if positions is not None:
            positions(delivery.position)
        if "x-redrive-count" not in delivery.message.headers:
            raise OSError("the disk is full, see https://user:secret@host/page\nsecond line")

    return bus


@contract("dlq.after_max_attempts", "A message that always fails is one dead letter, and gone from its queue.")
async def test_one(kit: Kit) -> None:
    queue = kit.queue()
    bus = failing(kit, queue)
    async with bus.running():
        await bus.send(queue, b"x")
        assert bodies(await letters(bus, queue)) == [b"x"]
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []
        assert len(await letters(reader, queue)) == 1


@contract("dlq.headers", "A dead letter has its own headers, id, key and body, and exactly the story of its failure.")
async def test_headers(kit: Kit) -> None:
    queue, positions = kit.queue(), Seen[str]()
    bus = failing(kit, queue, positions)
    before = time.time()
    async with bus.running():
        id = await bus.send(queue, bytes(range(256)), key="ké", headers={"tenant": "ü", "empty": ""})
        (letter,) = await letters(bus, queue)
    after = time.time()
    headers = dict(letter.message.headers)
    position = {"x-original-position"} if positions.all[-1] else set()
    assert set(headers) == STORY | position | {"tenant", "empty"}
    assert (headers["tenant"], headers["empty"]) == ("ü", "")
    assert (letter.message.id, letter.message.key, letter.message.body) == (id, "ké", bytes(range(256)))
    assert headers["x-retry-count"] == "3"
    assert headers["x-error-type"] == "OSError"
    assert headers["x-original-error"] == "the disk is full, see https://****@host/page second line"
    assert re.fullmatch("[0-9a-f]{16}", headers["x-error-stack-digest"])
    assert headers["x-dlq-reason"] == "retries_exhausted"
    assert headers["x-original-destination"] == headers["x-original-subscription"] == queue.name
    times = [
        datetime.fromisoformat(headers[f"x-{name}-at"]) for name in ("first-failed", "last-failed", "moved-to-dlq")
    ]
    assert [at.tzinfo for at in times] == [UTC] * 3
    assert before - 0.01 <= times[0].timestamp() <= times[1].timestamp() <= times[2].timestamp() <= after


@contract("dlq.headers_of_a_group", "The dead letter of a group tells the topic and the group.")
async def test_group_headers(kit: Kit) -> None:
    topic = kit.topic()
    bus = kit.bus()

    @bus.subscriber(topic, group="billing", retry=NEVER)
    async def handle(body: bytes) -> None:
        raise OSError("always")

    async with bus.running():
        await bus.publish(topic, b"x")
        (letter,) = await letters(bus, (topic, "billing"))
    headers = letter.message.headers
    assert headers["x-original-destination"] == topic.name
    assert headers["x-original-subscription"] == "billing"
    assert headers["x-retry-count"] == "1"


@contract("dlq.at_once", "DeadLetter is no attempt to be repeated: dead after one run, with the reason given.")
async def test_at_once(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[int]()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(delivery.attempt)
        raise DeadLetter("negative total")

    async with bus.running():
        await bus.send(queue, b"x")
        (letter,) = await letters(bus, queue)
        headers = letter.message.headers
    assert seen.all == [1]
    assert (headers["x-dlq-reason"], headers["x-original-error"]) == ("non_retryable", "negative total")
    assert headers["x-retry-count"] == "1"


@contract(
    "dlq.any_time_of_sending", "A message may name any time as that of its sending: it is retried and dies like others."
)
async def test_any_time(kit: Kit) -> None:
    queue = kit.queue()
    bus = failing(kit, queue)
    times = [-1.0, 0.5, 2.0**33, 2.0**64, 1e308]
    async with bus.running():
        for at in times:
            await bus.send(queue, Message(f"{at!r}".encode(), timestamp=at))
        found = await letters(bus, queue, len(times))
        assert sorted(bodies(found)) == sorted(f"{at!r}".encode() for at in times)
        assert bus.counts["retried"] == 2 * len(times)


@contract("dlq.browse_leaves_everything", "Browsing dead letters shows all and takes none away.", needs="browse")
async def test_browse(kit: Kit) -> None:
    queue = kit.queue()
    bus = failing(kit, queue)
    async with bus.running():
        assert await letters(bus, queue, 0) == []  # of an empty one: none, at once
        for n in range(7):
            await bus.send(queue, b"%d" % n)
        for _ in range(3):
            assert sorted(bodies(await letters(bus, queue, 7))) == [b"%d" % n for n in range(7)]
        assert await deadletter.redrive(bus, queue) == 7  # they are all free to be taken
        await until(lambda: bus.counts.get("handled") == 7, "7 handled")


@contract(
    "dlq.browse_shows_many",
    "A look at dead letters shows all of them, however many are taken at a time.",
    needs="browse",
)
async def test_browse_many(kit: Kit) -> None:
    queue = kit.queue()
    bus, many = kit.bus(), 2 * deadletter.PAGE + 10

    @bus.consumer(queue, prefetch=50)
    async def handle(body: bytes) -> None:
        raise DeadLetter("at once")

    async with bus.running():
        await bus.send_many(queue, [b"%d" % n for n in range(many)])
        assert sorted(bodies(await letters(bus, queue, many))) == sorted(b"%d" % n for n in range(many))


@contract("dlq.redrive_returns_original", "Redrive sends dead letters back as they were, their attempts at 1.")
async def test_redrive(kit: Kit) -> None:
    queue = kit.queue()
    bus = failing(kit, queue)
    message = Message(
        b"x", id="me", type="t", headers={"a": "b"}, key="k", correlation_id="c", timestamp=1_700_000_000.0
    )
    async with bus.running():
        await bus.send(queue, message)
        await letters(bus, queue)
    async with kit.bus(queue) as other:
        assert await deadletter.redrive(other, queue) == 1
        (back,) = await leftover(other, queue)
        assert await letters(other, queue, 0) == []
        assert await deadletter.redrive(other, queue) == 0
    assert dict(back.message.headers) == {"a": "b", "x-redrive-count": "1"}
    assert back.attempt == 1
    for name in ("body", "id", "type", "key", "correlation_id", "timestamp"):
        assert getattr(back.message, name) == getattr(message, name), name


@contract("dlq.redrive_some", "Redrive takes as many as it is told, and those that it is told; the others stay.")
async def test_redrive_some(kit: Kit) -> None:
    queue = kit.queue()
    bus = failing(kit, queue)
    async with bus.running():
        for n in range(6):
            await bus.send(queue, b"%d" % n)
        await letters(bus, queue, 6)
    async with kit.bus(queue) as other:
        assert await deadletter.redrive(other, queue, where=lambda letter: letter.body in (b"1", b"4")) == 2
        assert sorted(bodies(await leftover(other, queue))) == [b"1", b"4"]
        assert sorted(bodies(await letters(other, queue, 4))) == [b"0", b"2", b"3", b"5"]
        assert await deadletter.redrive(other, queue, limit=3) == 3
        assert len(await leftover(other, queue)) == 3
        assert len(await letters(other, queue, 1)) == 1


@contract("dlq.redrive_reaches_its_group_only", "A redrive of one group's dead letters reaches that group alone.")
async def test_redrive_group(kit: Kit) -> None:
    topic = kit.topic()
    bus, seen = kit.bus(), Seen[str]()

    @bus.subscriber(topic, group="good")
    async def good(body: bytes) -> None:
        seen("good")

    @bus.subscriber(topic, group="bad", retry=NEVER)
    async def bad(body: bytes, delivery: Delivery[bytes]) -> None:
        seen("bad")
        if "x-redrive-count" not in delivery.message.headers:
            raise OSError("first")

    async with bus.running():
        await bus.publish(topic, b"x")
        await letters(bus, (topic, "bad"))
        await seen.reach(2)
        assert await deadletter.redrive(bus, topic, group="bad") == 1
        await seen.reach(3)
        await until(lambda: bus.counts.get("handled") == 2, "both handled")
    assert sorted(seen.all) == ["bad", "bad", "good"]
    async with kit.bus((topic, "good")) as reader:
        assert await leftover(reader, (topic, "good")) == []


@contract("dlq.redriven_may_die_again", "A redriven message has all its attempts again, and its redrives are counted.")
async def test_again(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[int]()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(delivery.attempt)
        raise OSError("always")

    async with bus.running():
        await bus.send(queue, b"x")
        for _ in range(2):
            await letters(bus, queue)
            assert await deadletter.redrive(bus, queue) == 1
        (letter,) = await letters(bus, queue)
    assert seen.all == [1, 2, 3] * 3
    assert letter.message.headers["x-redrive-count"] == "2"
    assert letter.message.headers["x-retry-count"] == "3"
    assert set(letter.message.headers) - {"x-original-position"} == STORY | {"x-redrive-count"}


@contract("dlq.one_queue_each", "The dead letters of two queues don't meet.")
async def test_separate(kit: Kit) -> None:
    one, two = kit.queue(), kit.queue()
    bus = failing(kit, one)

    @bus.consumer(two, retry=NEVER)
    async def handle(body: bytes) -> None:
        raise OSError("always")

    async with bus.running():
        await bus.send(one, b"one")
        await bus.send(two, b"two")
        assert bodies(await letters(bus, one)) == [b"one"]
        assert bodies(await letters(bus, two)) == [b"two"]


@contract(
    "dlq.expired_are_kept", "A message that expires before its retry is a dead letter with that reason, not lost."
)
async def test_expired(kit: Kit) -> None:
    queue = kit.queue()
    bus = kit.bus()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        assert delivery.message.expires_at is not None
        await until(lambda: time.time() > (delivery.message.expires_at or 0), "its time is over")
        raise OSError("too slow")

    async with bus.running():
        await bus.send(queue, b"x", expires_in=1)
        (letter,) = await letters(bus, queue)
    assert letter.message.headers["x-dlq-reason"] == "expired"
    assert letter.body == b"x"


@contract(
    "dlq.missing_target_keeps_message",
    "Without a dead-letter channel a message is kept, the trouble told, and it ends.",
)
async def test_missing_target(kit: Kit) -> None:
    queue = kit.queue()
    missing = f"{queue.name}.dlq" in await kit.alone(
        queue
    )  # some adapters make it with its queue: nothing to lose then
    bus = kit.bus(declare="assume")

    @bus.consumer(queue, retry=NEVER)
    async def handle(body: bytes) -> None:
        raise OSError("always")

    async with bus.running():
        await bus.send(queue, b"x")
        if missing:
            health = await eventually(bus.health, lambda health: health.status != "ok", "the trouble is told")
            assert any("dlq" in reason for reason in health.reasons)
        async with kit.bus(queue) as repair:  # makes what is missing
            assert bodies(await letters(repair, queue)) == [b"x"]
        await eventually(bus.health, lambda health: health.status == "ok", "the trouble is over")
    async with kit.bus(queue) as reader:
        assert await leftover(reader, queue) == []
