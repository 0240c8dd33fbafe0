"""Publish: a send that returned is on the broker, and one that raised says why."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import pytest

from unibus import Closed, CodecError, ConfigError, Message, NotFound, SendFailed, UnknownChannel
from unibus.adapter import Outgoing
from unibus_contracts.contract import contract
from unibus_contracts.kit import SOON, Kit, bodies, leftover, take


@contract("publish.returns_after_broker_accept", "A message whose send returned is there for another connection.")
async def test_accepted(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as sender:
        id = await sender.send(queue, b"kept")
    async with kit.bus(queue) as reader, reader.receiver(queue) as receiver:
        (delivery,) = await take(receiver)
        await delivery.ack()
    assert (delivery.body, delivery.message.id) == (b"kept", id)


@contract(
    "publish.missing_destination_raises", "A send to a queue that does not exist raises NotFound, and makes none."
)
async def test_missing_queue(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue, declare="assume") as bus:
        for _ in range(2):  # the second one shows that the first did not make the queue
            with pytest.raises(NotFound):
                await asyncio.wait_for(bus.send(queue, b"nobody"), SOON)
        with pytest.raises(SendFailed) as caught:
            await bus.send_many(queue, [b"1", b"2", b"3"])
        assert not caught.value.sent
        assert {index: type(error) for index, error in caught.value.failed.items()} == dict.fromkeys(range(3), NotFound)


@contract("publish.missing_topic_raises", "A publish to a topic that does not exist raises NotFound.")
async def test_missing_topic(kit: Kit) -> None:
    topic = kit.topic()
    async with kit.bus(topic, declare="assume") as bus:
        for _ in range(2):
            with pytest.raises(NotFound):
                await asyncio.wait_for(bus.publish(topic, b"nobody"), SOON)


@contract("publish.missing_destination_same_id", "Three messages of one id to a missing queue are three errors.")
async def test_missing_same_id(kit: Kit) -> None:
    queue, present = kit.queue(), kit.queue(label="present")
    async with kit.bus(present):
        pass
    async with kit.bus(queue, present, declare="assume") as bus:
        results = await asyncio.wait_for(
            bus.adapter.send([Outgoing(queue, Message(b"x", id="same")) for _ in range(3)], SOON), SOON
        )
        assert [type(error) for error in results] == [NotFound] * 3
        errors = await asyncio.gather(
            *(bus.send(queue, Message(b"x", id="same")) for _ in range(3)), return_exceptions=True
        )
        assert [type(error) for error in errors] == [NotFound] * 3
        await bus.send(present, b"after")  # the link has survived
        assert bodies(await leftover(bus, present)) == [b"after"]


@contract("publish.missing_among_present", "In one call, each message has the result of its own destination.")
async def test_missing_among_present(kit: Kit) -> None:
    present, missing = kit.queue(label="present"), kit.queue(label="missing")
    async with kit.bus(present):
        pass
    async with kit.bus(present, missing, declare="assume") as bus:
        batch = [Outgoing(to, Message(b"%d" % n, id=f"m{n}")) for n, to in enumerate((present, missing, present))]
        results = await bus.adapter.send(batch, SOON)
        assert [type(error) for error in results] == [type(None), NotFound, type(None)]
        assert bodies(await leftover(bus, present)) == [b"0", b"2"]


@contract("publish.closed_raises", "Before it is opened and after it is closed, a bus raises Closed and sends nothing.")
async def test_closed(kit: Kit) -> None:
    queue = kit.queue()
    bus = kit.bus(queue)
    with pytest.raises(Closed):
        await bus.send(queue, b"too early")
    async with bus:
        await bus.send(queue, b"in time")
    with pytest.raises(Closed):
        await bus.send(queue, b"too late")
    async with kit.bus(queue) as reader:
        assert bodies(await leftover(reader, queue)) == [b"in time"]


@contract(
    "publish.unknown_name_raises", "A name that no channel was declared with is UnknownChannel; a known one works."
)
async def test_unknown_name(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        with pytest.raises(UnknownChannel):
            await bus.send(queue.name + "x", b"nowhere")
        await bus.send(queue.name, b"by name")
        assert bodies(await leftover(bus, queue)) == [b"by name"]


@contract("publish.cancel_is_indeterminate", "A cancelled send arrives once or not at all, and the bus goes on.")
async def test_cancel(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        for steps in range(6):  # cancelled before, while and after it is on its way
            task = asyncio.create_task(bus.send(queue, b"cancelled %d" % steps))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert task.done()
        await bus.send(queue, b"after")
        found = bodies(await leftover(bus, queue))
        assert found.count(b"after") == 1
        assert len(found) == len(set(found)), f"a cancelled message arrived twice: {found}"


@contract("publish.ids_are_kept", "Every message has an id of its own, given or made, and arrives with it.")
async def test_ids(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        made = [await bus.send(queue, b"made") for _ in range(5)]
        assert await bus.send(queue, Message(b"given", id="my-id")) == "my-id"
        assert len(set(made)) == 5
        assert all(made)
        assert [d.message.id for d in await leftover(bus, queue)] == [*made, "my-id"]


@contract("publish.many_returns_ids", "send_many returns the ids in the order of the bodies, and all arrive once.")
async def test_many(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        assert list(await bus.send_many(queue, [])) == []
        sent = [b"%d" % n for n in range(250)]
        ids = await bus.send_many(queue, sent)
        arrived = await leftover(bus, queue)
    assert len(arrived) == 250
    found = {d.message.id: d.body for d in arrived}
    assert [found[id] for id in ids] == sent


@contract("publish.batches_are_split", "A call of any size arrives whole: one message, the adapter's batch, one more.")
async def test_split(kit: Kit) -> None:
    queue = kit.queue()
    largest = min((await kit.capabilities()).send_batch, 2000)
    async with kit.bus(queue) as bus:
        for size in (1, largest, largest + 1):
            ids = await bus.send_many(queue, [b"%d" % n for n in range(size)])
            assert sorted(d.message.id for d in await leftover(bus, queue)) == sorted(ids)


@contract("publish.refused_is_not_delivered", "A message that send refused is never delivered.")
async def test_refused(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        with pytest.raises(CodecError):
            await bus.send(queue, object())
        with pytest.raises(ValueError, match="header"):
            await bus.send(queue, b"x", headers={"line": "break\nin it"})
        assert await leftover(bus, queue) == []


@contract("publish.no_group_is_counted", "A publish to a topic without a group succeeds and is counted as unrouted.")
async def test_no_group(kit: Kit) -> None:
    topic = kit.topic()
    async with kit.bus(topic) as bus:
        assert await bus.publish(topic, b"1")
        assert await bus.publish(topic, b"2")
        assert bus.counts["unrouted"] == 2
        assert bus.counts["sent"] == 2


@contract("publish.many_publishers", "Fifty tasks that send at once on one bus lose and mix up nothing.")
async def test_many_publishers(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:

        async def publish(task: int) -> list[str]:
            return [await bus.send(queue, b"%d/%d" % (task, n), headers={"task": str(task)}) for n in range(20)]

        ids = await asyncio.gather(*(publish(task) for task in range(50)))
        arrived = await leftover(bus, queue)
    assert len(arrived) == 1000
    found = {d.message.id: d for d in arrived}
    for task, mine in enumerate(ids):
        for n, id in enumerate(mine):
            assert found[id].body == b"%d/%d" % (task, n)
            assert found[id].message.headers["task"] == str(task)


@contract(
    "publish.connect_failure_is_bounded", "Nothing is done before open; a broker that is not there is an error soon."
)
async def test_connect_failure(kit: Kit) -> None:
    url = kit.nowhere("secret-5f1d")
    if url is None:  # an adapter without a host has no connection to fail: opening must just work
        async with kit.bus():
            return
    bus = kit.bus(url=url)
    begun = time.monotonic()
    with pytest.raises(ConnectionError) as caught:
        async with bus:
            pass
    assert time.monotonic() - begun < 2 * SOON
    error: BaseException | None = caught.value
    while error is not None:  # causes too: they are printed with the traceback
        assert "secret-5f1d" not in f"{error} {error!r}"
        error = error.__cause__
    assert "secret-5f1d" not in repr(bus)


@contract("publish.wrong_verb_is_refused", "To publish to a queue or to send to a topic is an error, and does nothing.")
async def test_wrong_verb(kit: Kit) -> None:
    queue, topic = kit.queue(), kit.topic()
    async with kit.bus(queue, topic) as bus:
        with pytest.raises(ConfigError):
            await bus.publish(queue, b"x")  # type: ignore[arg-type] # that is the point
        with pytest.raises(ConfigError):
            await bus.send(topic, b"x")  # type: ignore[arg-type] # that is the point
        assert await leftover(bus, queue) == []
        assert bus.counts.get("unrouted", 0) == 0


@contract("publish.from_synchronous_code", "Code without an event loop sends as well, with a connection of its own.")
async def test_synchronous(kit: Kit) -> None:
    queue = kit.queue()

    def work() -> list[str]:
        with kit.bus(queue).blocking() as sender:
            return [sender.send(queue, b"0"), *sender.send_many(queue, [b"1", b"2"])]

    async with kit.bus(queue) as bus:
        ids = await asyncio.to_thread(work)
        assert [d.message.id for d in await leftover(bus, queue)] == ids
