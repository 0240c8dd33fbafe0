"""The queues of the SQS adapter on ElasticMQ, an emulator beside ministack that keeps AWS' limits: ten attributes, legal
characters, receipt handles that end. It has no SNS, and 256 KiB is the most that it takes.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError
from tests.integration.sqs_kit import SOON, Bench, at, eventually, out, send, subscribe, take

import unibus_sqs.adapter
import unibus_sqs.subscription
from unibus import Delivery, LeaseLost, NotFound, Queue, RetryPolicy, deadletter
from unibus.adapter import Declared, Outcome, Outgoing, Topology
from unibus.channel import dead_letter_queue
from unibus_contracts import supply
from unibus_sqs import topology


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    broker = supply.start("elasticmq", instance=f"strict{os.getpid()}")
    yield broker.url
    broker.stop()


@pytest.fixture
async def lab(server: str) -> AsyncIterator[Bench]:
    async with at(server) as bench:
        yield bench


async def test_it_is_strict(lab: Bench) -> None:
    url = (await lab.sqs.create_queue(QueueName="strict"))["QueueUrl"]
    eleven = {f"h{n}": {"DataType": "String", "StringValue": "x"} for n in range(11)}
    for refused in ({"MessageBody": "x", "MessageAttributes": eleven}, {"MessageBody": "\x01"}, {"MessageBody": ""}):
        with pytest.raises(ClientError, match="InvalidAttributeValue"):
            await lab.sqs.send_message(QueueUrl=url, **refused)


async def test_any_body_and_a_hundred_headers_arrive(lab: Bench) -> None:
    adapter = await lab.adapter(queue := lab.queue())
    bodies = [b"", b"\x00", b"\xff" * 1000, bytes(range(256)), "\ufffe\U0001f600\r\n\t".encode(), b'{"a": 1}']
    headers = {f"h{n}": "\u0001 \u00fc \uffff" for n in range(100)}
    sent = [out(queue, body, headers=headers, type="t", key="k") for body in bodies]
    await send(adapter, *sent)
    found = {d.message.id: d.message for d in await take(await subscribe(adapter, queue), len(bodies))}
    for outgoing in sent:
        message = found[outgoing.message.id]
        assert (message.body, dict(message.headers)) == (outgoing.message.body, headers)
        assert (message.type, message.key) == ("t", "k")


@pytest.mark.parametrize("kind", ["String", "Binary"])
async def test_a_foreign_message_of_ten_attributes_can_be_copied(lab: Bench, kind: str) -> None:
    adapter = await lab.adapter(queue := lab.queue())
    value: dict[str, Any] = {"StringValue": "x"} if kind == "String" else {"BinaryValue": b"\xff"}
    attributes = {f"a{n}": {"DataType": kind, **value} for n in range(10)}
    await lab.sqs.send_message(QueueUrl=await lab.url_of("q"), MessageBody="x", MessageAttributes=attributes)
    subscription = await subscribe(adapter, queue)
    [first] = await take(subscription)
    await send(adapter, Outgoing(queue.address, first.message, None, first))
    await subscription.settle(Outcome.ACCEPTED, [first])
    [again] = await take(subscription)
    assert again.message.id == first.message.id
    assert dict(again.message.headers) == (dict.fromkeys(attributes, "x") if kind == "String" else {})


async def test_a_receipt_handle_that_was_given_anew_is_a_lost_lease(lab: Bench) -> None:
    adapter = await lab.adapter(queue := lab.queue(), lease=3)
    first, second = await subscribe(adapter, queue), await subscribe(adapter, queue)
    await send(adapter, out(queue))
    [late] = await take(first)
    [delivery] = await take(second)  # after 3 s
    for results in (await first.extend([late], 30), await first.settle(Outcome.ACCEPTED, [late])):
        assert [type(error) for error in results] == [LeaseLost]
    assert list(await second.settle(Outcome.ACCEPTED, [delivery])) == [None]


async def test_what_it_gives_up_itself_is_a_dead_letter_with_headers(
    lab: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "MAX_RECEIVES", 2)
    queue = lab.queue()
    assert isinstance(queue.address, Queue)
    letters = Declared(dead_letter_queue(queue.address), queue.name + ".dlq", "dead letter")
    adapter = await lab.adapter(queue, letters)
    await send(adapter, out(queue, b"x", id="me"))
    subscription = await subscribe(adapter, letters)

    async def moved() -> list[Delivery[Any]]:
        await lab.raw_receive("q", VisibilityTimeout=0)
        return list(await subscription.receive(1, 1))

    [delivery] = await eventually(moved)
    assert (delivery.message.id, delivery.message.body) == ("me", b"x")


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_long_delay_goes_in_hops(lab: Bench, ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unibus_sqs.adapter, "LONGEST_DELAY", 1)
    monkeypatch.setattr(unibus_sqs.subscription, "LONGEST_DELAY", 1)
    adapter = await lab.adapter(queue := lab.queue(ordered=ordered, delayed=True))
    due = adapter._clock.time() + 2.5
    await send(adapter, out(queue, b"\xfflater", due, id="me", headers={"a": "b"}))
    [delivery] = await take(await subscribe(adapter, queue))
    assert due <= adapter._clock.time()
    assert (delivery.message.body, delivery.message.id, dict(delivery.message.headers)) == (
        b"\xfflater",
        "me",
        {"a": "b"},
    )


async def test_a_fifo_queue_keeps_the_order_of_a_key_and_drops_what_was_sent_twice(lab: Bench) -> None:
    adapter = await lab.adapter(queue := lab.queue(ordered=True))
    keys = ["k" * 200, "sch\u00fcssel", "a b"]
    await send(adapter, *(out(queue, b"%d" % n, key=keys[n % 3], id=f"{n}") for n in range(9)))
    await send(adapter, out(queue, b"again", key=keys[0], id="0"))
    subscription = await subscribe(adapter, queue, prefetch=100)
    found: dict[str | None, list[bytes]] = {}
    for _ in range(9):
        [delivery] = await take(subscription)
        found.setdefault(delivery.message.key, []).append(delivery.message.body)
        await subscription.settle(Outcome.ACCEPTED, [delivery])
    assert found == {key: [b"%d" % n for n in range(at, 9, 3)] for at, key in enumerate(keys)}
    assert await subscription.receive(1, 1) == []


async def test_a_queue_that_is_missing_is_said_so(lab: Bench) -> None:
    adapter = await lab.adapter()
    queue = lab.queue("nowhere")
    with pytest.raises(NotFound, match="nowhere"):
        await adapter.declare(Topology("verify", (queue,)))
    await adapter.declare(Topology("assume", (queue,)))
    [error] = await adapter.send([out(queue)], SOON)
    assert isinstance(error, NotFound)


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_service_with_retries_dead_letters_and_requests(lab: Bench, ordered: bool) -> None:
    queue = Queue("q", bytes, ordered=ordered)
    asked = Queue("asked", bytes, reply=bytes)
    bus = lab.bus()
    attempts: list[int] = []

    @bus.consumer(queue, retry=RetryPolicy(max_retries=2, backoff=1, multiplier=1))
    async def fail(body: bytes, delivery: Delivery[bytes]) -> None:
        attempts.append(delivery.attempt)
        raise ValueError("always")

    @bus.responder(asked)
    async def answer(body: bytes) -> bytes:
        return body + b"!"

    async def dead() -> bool:
        return bus.counts.get("dead_lettered") == 1

    async with bus.running():
        await bus.send(queue, b"x", key="k")
        assert await bus.request(asked, b"there", timeout=SOON) == b"there!"
        await eventually(dead)
        [letter] = [letter async for letter in deadletter.browse(bus, queue)]
    assert attempts == [1, 2, 3]
    assert (letter.message.headers["x-dlq-reason"], letter.message.key) == ("retries_exhausted", "k")
    left = await lab.sqs.list_queues(QueueNamePrefix=lab.prefix.replace(".", "-") + "unibus__")
    assert not left.get("QueueUrls")
