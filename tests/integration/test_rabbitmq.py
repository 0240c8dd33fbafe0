"""The RabbitMQ adapter behind the SPI, on a real broker; what it does is checked with a client that knows nothing of unibus."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aio_pika
import pytest
import trustme
from tests.integration.rabbitmq_kit import (
    SOON,
    Bench,
    Proxy,
    bench,
    drink,
    errors_of,
    out,
    secret,
    source,
    take,
    until,
)

from unibus.adapter import Declared, Outcome, Outgoing, Source, Topology
from unibus.channel import Group, Inbox, Queue, Topic, dead_letter_queue
from unibus.delivery import Delivery
from unibus.errors import (
    AuthenticationFailed,
    ConfigError,
    ConnectionLost,
    LeaseLost,
    NotFound,
    Refused,
    Throttled,
    Timeout,
    UnknownChannel,
    Unroutable,
    Unsupported,
)
from unibus.message import Message
from unibus_rabbitmq import Received
from unibus_rabbitmq.topology import DELIVERY_LIMIT


def without_count(headers: Any) -> dict[str, Any]:
    """Headers without the one that quorum queues add on the way out."""
    return {name: value for name, value in headers.items() if name != "x-delivery-count"}


@pytest.fixture
async def lab() -> AsyncIterator[Bench]:
    async with bench() as made:
        yield made


# -- on the wire --------------------------------------------------------------------------------------------------


async def test_a_raw_consumer_sees_native_properties(lab: Bench) -> None:
    q = lab.queue()
    adapter = await lab.adapter(q)
    now = time.time()
    message = Message(
        b"\x00\xff body",
        id="m-1",
        type="Order",
        content_type="application/json",
        headers={"tenant": "açme", "x-retry-count": "2"},
        key="k1",
        correlation_id="talk",
        causation_id="cause",
        timestamp=now,
        expires_at=now + 60,
    )
    assert await adapter.send([Outgoing(q.address, message)], SOON) == [None]
    raw = await (await (await lab.raw()).get_queue(q.name)).get()
    assert raw is not None
    await raw.ack()
    assert (raw.body, raw.message_id, raw.type, raw.content_type) == (
        b"\x00\xff body",
        "m-1",
        "Order",
        "application/json",
    )
    assert raw.correlation_id == "talk"
    assert raw.timestamp is not None
    assert int(raw.timestamp.timestamp()) == int(now)
    assert raw.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert raw.expiration is None
    assert without_count(raw.headers) == {
        "tenant": "açme",
        "x-retry-count": "2",
        "x-key": "k1",
        "x-causation-id": "cause",
        "x-expires-at": f"{now + 60:.3f}",
    }


async def test_a_bare_message_has_no_header(lab: Bench) -> None:
    q = lab.queue()
    adapter = await lab.adapter(q)
    await adapter.send([out(q, b"")], SOON)
    raw = await (await (await lab.raw()).get_queue(q.name)).get()
    assert raw is not None
    await raw.ack()
    assert (raw.body, without_count(raw.headers)) == (b"", {})


async def test_all_of_the_envelope_comes_back(lab: Bench) -> None:
    q = lab.queue()
    adapter = await lab.adapter(q)
    sent = Message(
        b"x" * 300_000,  # several frames
        id="ü" * 200,  # longer than the property
        type="T" * 300,
        content_type="text/plain",
        headers={"h": "v" * 5000},
        key="",
        correlation_id="c" * 400,
        causation_id="why",
        reply_to=None,
        timestamp=1_700_000_000.0,
        expires_at=4_000_000_000.25,
        priority=None,
    )
    assert await adapter.send([Outgoing(q.address, sent)], SOON) == [None]
    (got,) = await drink(await adapter.subscribe(source(q)))
    assert got == sent


async def test_a_foreign_message_is_an_ordinary_message(lab: Bench) -> None:
    q = lab.queue()
    adapter = await lab.adapter(q, delays=(0.05,))
    raw = await lab.raw()
    table: Any = {"n": 7, "nested": {"a": [1, "two"]}, "plain": "text", "bytes": bytearray(b"\xff\x00")}
    foreign = aio_pika.Message(b"{}", headers=table, content_encoding="gzip", app_id="legacy", priority=3)
    await raw.default_exchange.publish(foreign, q.name)
    subscription = await adapter.subscribe(source(q))
    (delivery,) = await take(subscription)
    assert delivery.message.id
    assert delivery.message.headers == {"plain": "text"}
    assert isinstance(delivery.native, Received)
    assert delivery.native.headers["nested"] == {"a": [1, "two"]}
    # A retry copy keeps what the envelope can't hold.
    copy = Outgoing(
        q.address, replace(delivery.message, headers={"plain": "text", "x-retry-count": "1"}), None, delivery
    )
    copy.not_before = time.time() + 0.05
    assert await adapter.send([copy], SOON) == [None]
    await subscription.settle(Outcome.ACCEPTED, [delivery])
    (again,) = await take(subscription)
    assert again.message.id == delivery.message.id
    assert again.message.headers == {"plain": "text", "x-retry-count": "1"}
    assert isinstance(again.native, Received)
    kept = {k: again.native.headers[k] for k in ("n", "nested")}
    assert kept == {"n": 7, "nested": {"a": [1, "two"]}}
    assert bytes(again.native.headers["bytes"]) == b"\xff\x00"
    assert (again.native.properties["content_encoding"], again.native.properties["app_id"]) == ("gzip", "legacy")
    assert again.native.properties["priority"] == 3


async def test_a_raw_rpc_client_gets_its_answer(lab: Bench) -> None:
    """The client of every tutorial: a server-named queue, a correlation id, no message id."""
    q = lab.queue()
    adapter = await lab.adapter(q)
    raw = await lab.raw()
    inbox = await raw.declare_queue(exclusive=True)
    ask = aio_pika.Message(b"?", reply_to=inbox.name, correlation_id="call-1", message_id="other")
    await raw.default_exchange.publish(ask, q.name)
    (request,) = await drink(await adapter.subscribe(source(q)))
    assert request.reply_to == inbox.name
    reply = Message(b"!", id="r", causation_id=request.id, correlation_id="talk", expires_at=time.time() + 30)
    assert await adapter.send([Outgoing(adapter.reply_to(request.reply_to or ""), reply)], SOON) == [None]
    answer = await inbox.get(timeout=SOON)
    await answer.ack()
    assert (answer.body, answer.correlation_id) == (b"!", "call-1")
    assert answer.expiration is not None


async def test_request_and_reply(lab: Bench) -> None:
    q = lab.queue()
    adapter = await lab.adapter(q)
    inbox = await adapter.subscribe(Source(Inbox("svc.inbox")))
    assert isinstance(inbox.address, Inbox)
    request = Message(b"?", id="req", correlation_id="talk", reply_to=inbox.address.name)
    await adapter.send([Outgoing(q.address, request)], SOON)
    (got,) = await drink(await adapter.subscribe(source(q)))
    assert (got.id, got.correlation_id, got.reply_to) == ("req", "talk", inbox.address.name)
    reply = Message(b"!", id="rep", correlation_id="talk", causation_id="req")
    assert await adapter.send([Outgoing(adapter.reply_to(inbox.address.name), reply)], SOON) == [None]
    (answer,) = await drink(inbox)
    assert (answer.id, answer.correlation_id, answer.causation_id) == ("rep", "talk", "req")
    await inbox.stop()
    await inbox.close()
    results = await adapter.send([Outgoing(inbox.address, reply)], SOON)
    assert errors_of(results) == ["Unroutable"]
    assert (await adapter.check()).up


@pytest.mark.parametrize(
    "forged", ["amq.rabbitmq.reply-to.garbage", "orders", "", "amq.gen-short", "x" * 300, "unibus.reply.svc.zz"]
)
async def test_a_forged_reply_address_is_refused(lab: Bench, forged: str) -> None:
    adapter = await lab.adapter(lab.queue())
    with pytest.raises(Refused):
        adapter.reply_to(forged)


# -- sending ------------------------------------------------------------------------------------------------------


async def test_three_messages_with_one_id_to_a_missing_queue_are_three_errors(lab: Bench) -> None:
    missing = lab.queue("missing")
    q = lab.queue()
    adapter = await lab.adapter(q, missing)
    await (await lab.raw()).queue_delete(missing.name)
    batch = [out(missing, id="same") for _ in range(3)] + [out(q, id="same"), out(missing, id="other")]
    assert errors_of(await adapter.send(batch, SOON)) == ["NotFound"] * 3 + ["NoneType", "NotFound"]
    assert errors_of(await adapter.send(batch[:3], SOON)) == ["NotFound"] * 3


async def test_copies_in_flight_keep_their_logical_id(lab: Bench) -> None:
    q = lab.queue()
    adapter = await lab.adapter(q)
    batch = [out(q, b"%d" % n, id="same") for n in range(3)]
    assert await adapter.send(batch, SOON) == [None] * 3
    got = await drink(await adapter.subscribe(source(q)), 3)
    assert [(m.id, m.body, dict(m.headers)) for m in got] == [("same", b"%d" % n, {}) for n in range(3)]


async def test_a_topic_without_groups_is_unroutable(lab: Bench) -> None:
    t = lab.topic()
    adapter = await lab.adapter(t)
    (error,) = await adapter.send([out(t)], SOON)
    assert isinstance(error, Unroutable)


async def test_a_missing_exchange_takes_no_other_message_along(lab: Bench) -> None:
    gone, kept, q = lab.topic("gone"), lab.topic("kept"), lab.queue()
    g = lab.group(kept)
    adapter = await lab.adapter(gone, kept, g, q)
    await (await lab.raw()).exchange_delete(gone.name)
    batch = [out(q), out(gone), out(kept), out(gone), out(q)]
    assert errors_of(await adapter.send(batch, SOON)) == ["NoneType", "NotFound", "NoneType", "NotFound", "NoneType"]
    await adapter.declare(Topology(channels=(gone, kept, g, q)))
    assert errors_of(await adapter.send(batch, SOON)) == [
        "NoneType",
        "Unroutable",
        "NoneType",
        "Unroutable",
        "NoneType",
    ]


async def test_a_full_queue_is_throttled(lab: Bench) -> None:
    q = Declared(Queue("full"), lab.name("full"))
    raw = await lab.raw()
    await raw.declare_queue(q.name, durable=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    adapter = await lab.adapter(q, mode="assume")
    results = [*await adapter.send([out(q)], SOON), *await adapter.send([out(q)], SOON)]
    assert errors_of(results) == ["NoneType", "Throttled"]


async def test_what_was_refused_is_sent_again_on_a_new_channel(lab: Bench) -> None:
    """The leader that RabbitMQ has once looked up for a channel may be dead; and others must not lose theirs with it."""
    full, other = Declared(Queue("full"), lab.name("full")), lab.queue()
    raw = await lab.raw()
    queue = await raw.declare_queue(
        full.name, durable=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"}
    )
    await (await lab.adapter(other)).close()
    adapter = await lab.adapter(full, other, mode="assume")
    lanes = adapter._publisher._lanes  # type: ignore[union-attr]  # the channels in use

    used = []
    for _ in range(4):
        await adapter.send([out(full), out(other)], SOON)
        used.append({way: lane.number for way, lane in lanes.items()})
    shared, own = ("", None), ("", full.name)
    assert [set(each) for each in used] == [{shared}, {shared}, {shared, own}, {shared, own}]
    assert len({each[shared] for each in used}) == 1, "what goes elsewhere keeps its channel"
    assert used[2][own] != used[3][own], "as long as it is refused the next one is taken"

    await queue.purge()
    assert await adapter.send([out(full), out(other)], SOON) == [None, None]
    kept = lanes[own].number
    await queue.purge()
    assert await adapter.send([out(full)], SOON) == [None]
    assert lanes[own].number == kept, "and stays when it is taken"
    assert len(await drink(await adapter.subscribe(source(other)), 5)) == 5


async def test_what_is_too_large_is_not_sent(lab: Bench) -> None:
    q = lab.queue()
    adapter = await lab.adapter(q)
    assert adapter.capabilities.max_body is not None
    adapter._publisher._max_body = 1000  # type: ignore[union-attr] # 128 MB take long
    many = {f"h{n}": "v" * 100 for n in range(1300)}
    batch = [out(q, b"x" * 1001), out(q, headers={"h": "v" * 140_000}), out(q, headers=many), out(q, key="k" * 140_000)]
    results = await adapter.send(
        [*batch, out(q, b"fits", headers=dict(list(many.items())[:1000]), key="k" * 5000)], SOON
    )
    assert errors_of(results) == ["MessageTooLarge"] * 4 + ["NoneType"]
    (got,) = await drink(await adapter.subscribe(source(q)))
    assert (got.body, len(got.headers), got.key) == (b"fits", 1000, "k" * 5000)


async def test_a_message_without_a_wire_form_fails_alone(lab: Bench) -> None:
    """The confirms of the others must still meet their messages."""
    q, gone = lab.queue(), lab.topic()
    adapter = await lab.adapter(q, gone)
    long = out(q, headers={"n" * 256: "name"})
    batch = [out(q), out(q, body="text"), long, out(q, priority=300), out(gone), out(q)]  # type: ignore[arg-type] # wrong on purpose
    names = ["NoneType", "Refused", "Refused", "Refused", "Unroutable", "NoneType"]
    assert errors_of(await adapter.send(batch, SOON)) == names
    with pytest.raises(UnknownChannel):
        await adapter.send([out(q), Outgoing(Queue("never"), Message(b"", "1"))], SOON)
    assert errors_of(await adapter.send(batch, SOON)) == names
    assert len(await drink(await adapter.subscribe(source(q)), 4)) == 4


async def test_many_senders_at_once(lab: Bench) -> None:
    q = lab.queue()
    adapter = await lab.adapter(q)
    batches = [[out(q, f"{b}.{n}".encode()) for n in range(100)] for b in range(20)]
    results = await asyncio.gather(*(adapter.send(batch, SOON) for batch in batches))
    assert all(error is None for batch in results for error in batch)
    subscription = await adapter.subscribe(source(q, prefetch=500))
    got = [m.body.decode() for _ in range(4) for m in await drink(subscription, 500)]
    for b in range(20):
        assert [body for body in got if body.startswith(f"{b}.")] == [f"{b}.{n}" for n in range(100)]


# -- settling -----------------------------------------------------------------------------------------------------


async def test_settling_out_of_order_leaves_exactly_the_rest(lab: Bench) -> None:
    q = lab.queue()
    adapter = await lab.adapter(q)
    await adapter.send([out(q, b"%d" % n) for n in range(10)], SOON)
    subscription = await adapter.subscribe(source(q, prefetch=10))
    got = await take(subscription, 10)
    for indices in ([5], [9, 0, 1], [3], [2, 4]):
        assert not any(await subscription.settle(Outcome.ACCEPTED, [got[i] for i in indices]))
    twice = await subscription.settle(Outcome.ACCEPTED, [got[0], got[6], got[6]])
    assert errors_of(twice) == ["LeaseLost", "NoneType", "LeaseLost"]
    await subscription.close()
    late = await subscription.settle(Outcome.ACCEPTED, [got[7]])
    assert errors_of(late) == ["LeaseLost"]
    assert got[7].lost
    assert [m.body for m in await drink(await adapter.subscribe(source(q)), 2)] == [b"7", b"8"]
    assert (await adapter.check()).up


async def test_prefetch_bounds_what_is_held_and_stop_hands_it_back(lab: Bench) -> None:
    q = lab.queue()
    adapter = await lab.adapter(q)
    await adapter.send([out(q) for _ in range(50)], SOON)
    subscription = await adapter.subscribe(source(q, prefetch=20))
    got = await take(subscription, 5)
    assert (await adapter.backlog(source(q).address)).ready == 30  # type: ignore[arg-type] # a queue
    await subscription.stop()
    assert await subscription.receive(10, 0.01) == []
    assert not any(await subscription.settle(Outcome.ACCEPTED, got))
    await subscription.close()
    assert len(await drink(await adapter.subscribe(source(q, prefetch=100)), 45)) == 45


async def test_a_delay_on_release_is_refused(lab: Bench) -> None:
    q = lab.queue()
    adapter = await lab.adapter(q)
    await adapter.send([out(q)], SOON)
    subscription = await adapter.subscribe(source(q))
    got = await take(subscription)
    with pytest.raises(Unsupported):
        await subscription.settle(Outcome.RELEASED, got, delays=[1.0])
    assert await subscription.settle(Outcome.RELEASED, got, delays=[0.0]) == [None]
    assert [d.deliveries for d in await take(subscription)] == [2]


@pytest.mark.parametrize("kind", ["quorum", "classic"])
async def test_releases_make_no_suspect(lab: Bench, kind: str) -> None:
    q = lab.queue(options={"queue_type": kind})
    adapter = await lab.adapter(q)
    await adapter.send([out(q, id="innocent", headers={"h": "v"})], SOON)
    for _ in range(12):
        subscription = await adapter.subscribe(source(q))
        (delivery,) = await take(subscription)
        assert (delivery.deliveries or 0) <= 3
        assert (delivery.message.id, delivery.message.headers) == ("innocent", {"h": "v"})
        assert await subscription.settle(Outcome.RELEASED, [delivery]) == [None]
        await subscription.stop()
        await subscription.close()


async def test_what_the_broker_gives_up_is_a_dead_letter_with_headers(lab: Bench) -> None:
    q = lab.queue()
    letters = Declared(dead_letter_queue(q.address), lab.name("q.dlq"), "dead letter")  # type: ignore[arg-type] # a queue
    adapter = await lab.adapter(q, letters)
    await adapter.send([out(q, b"poison", id="p", headers={"x-retry-count": "1"})], SOON)
    raw = await lab.raw()
    queue = await raw.get_queue(q.name)
    for _ in range(DELIVERY_LIMIT + 1):
        message = await queue.get(timeout=SOON)
        await message.nack(requeue=True)
    (letter,) = await take(await adapter.subscribe(source(letters)))
    assert (letter.message.id, letter.message.body) == ("p", b"poison")
    headers = dict(letter.message.headers)
    assert headers.pop("x-moved-to-dlq-at").endswith("Z")
    assert headers == {
        "x-retry-count": "1",
        "x-dlq-reason": "broker_limit",
        "x-original-destination": "q",
        "x-original-subscription": "q",
    }
    # Sent onward, nothing of the broker's own story goes along.
    await adapter.send([Outgoing(q.address, letter.message, None, letter)], SOON)
    again = await queue.get(timeout=SOON)
    assert not [name for name in without_count(again.headers) if name.startswith(("x-death", "x-first-death"))]
    await again.ack()


# -- delays -------------------------------------------------------------------------------------------------------


async def test_delays_are_floors(lab: Bench) -> None:
    q = lab.queue(delayed=True)
    adapter = await lab.adapter(q, delays=(0.25, 1.0))
    subscription = await adapter.subscribe(source(q))
    begun = time.time()
    waits = {b"exact": 0.25, b"one": 1.0, b"hops": 3.5, b"past": -5.0}
    await adapter.send([out(q, body, begun + wait) for body, wait in waits.items()], SOON)
    seen: dict[bytes, float] = {}
    while len(seen) < len(waits):
        for delivery in await take(subscription, 1):
            seen[delivery.message.body] = time.time() - begun
            assert delivery.message.headers == {}
            await subscription.settle(Outcome.ACCEPTED, [delivery])
    for body, wait in waits.items():
        assert wait <= seen[body] < max(wait, 0) + 1.5, (body, seen[body])
    assert seen[b"exact"] < 0.9


async def test_a_delayed_publish_reaches_each_group_once(lab: Bench) -> None:
    t = lab.topic(delayed=True)
    a, b = lab.group(t, "a"), lab.group(t, "b")
    adapter = await lab.adapter(t, a, b, delays=(0.2,))
    private = Group(t.address, "x.1", ephemeral=True)  # type: ignore[arg-type] # a topic
    subscriptions = [await adapter.subscribe(Source(address)) for address in (a.address, b.address, private)]  # type: ignore[arg-type] # groups
    begun = time.time()
    assert await adapter.send([out(t, b"soon", begun + 0.2), out(t, b"hops", begun + 2.5)], SOON) == [None, None]
    for subscription in subscriptions:
        assert [m.body for m in await drink(subscription, 2)] == [b"soon", b"hops"]
        assert await subscription.receive(1, 0.3) == []
    assert time.time() - begun >= 2.5


async def test_delayed_messages_for_nobody_hold_up_no_other(lab: Bench) -> None:
    """Quorum queues stop dead-lettering after 32 messages without a route."""
    t, q = lab.topic(delayed=True), lab.queue(delayed=True)
    doomed = lab.queue("doomed", delayed=True)
    adapter = await lab.adapter(t, q, doomed, delays=(0.2,))
    due = time.time() + 0.2
    assert not any(await adapter.send([out(t, b"nobody", due) for _ in range(50)], SOON))
    assert not any(await adapter.send([out(doomed, b"lost", due) for _ in range(50)], SOON))
    raw = await lab.raw()
    await raw.queue_delete(doomed.name)
    assert await adapter.send([out(q, b"mine", time.time() + 0.2)], SOON) == [None]
    assert [m.body for m in await drink(await adapter.subscribe(source(q)))] == [b"mine"]
    lost = await raw.get_queue(lab.name("unibus.lost"))
    for _ in range(50):
        await (await lost.get(timeout=SOON)).ack()


async def test_the_broker_keeps_a_delayed_message_over_the_end_of_its_sender(lab: Bench) -> None:
    q = lab.queue()
    first = await lab.adapter(q, delays=(0.5,))
    await first.send([out(q, b"later", time.time() + 0.5)], SOON)
    await first.close()
    second = await lab.adapter(q, delays=(0.5,))
    assert [m.body for m in await drink(await second.subscribe(source(q)))] == [b"later"]


# -- topology -----------------------------------------------------------------------------------------------------


async def test_verify_lists_all_that_is_missing(lab: Bench) -> None:
    q, t = lab.queue(), lab.topic()
    g = lab.group(t)
    adapter = await lab.adapter()
    with pytest.raises(NotFound) as missing:
        await adapter.declare(Topology("verify", (q, t, g), (0.3,)))
    for name in (
        "q'",
        "q.dlq'",
        "t'",
        "t.g'",
        "unibus.hold.300'",
        "unibus.hold.1000'",
        "unibus.return'",
        "unibus.lost'",
    ):
        assert lab.prefix + name in str(missing.value)
    await adapter.declare(Topology("create", (q, t, g), (0.3,)))
    await adapter.declare(Topology("verify", (q, t, g), (0.3,)))
    await (await lab.raw()).queue_delete(f"{t.name}.g")
    with pytest.raises(NotFound, match=r"t\.g'"):
        await adapter.declare(Topology("verify", (q, t, g), (0.3,)))
    assert (await adapter.check()).up


async def test_created_objects_are_logged_once(lab: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "unibus.rabbitmq")
    q = lab.queue()
    adapter = await lab.adapter(q)
    assert f"declared queue {q.name} (quorum)" in caplog.messages
    caplog.clear()
    await adapter.declare(Topology(channels=(q,)))
    assert not caplog.messages


async def test_a_different_queue_is_a_config_error_and_stays(lab: Bench) -> None:
    q = lab.queue()
    raw = await lab.raw()
    await raw.declare_queue(q.name, durable=True)
    with pytest.raises(ConfigError, match="dead-letter") as wrong:
        await lab.adapter(q)
    assert q.name in str(wrong.value)
    await raw.default_exchange.publish(aio_pika.Message(b"still here"), q.name)


async def test_a_different_exchange_is_a_config_error(lab: Bench) -> None:
    t = lab.topic()
    await (await lab.raw()).declare_exchange(t.name, aio_pika.ExchangeType.DIRECT, durable=True)
    with pytest.raises(ConfigError, match="'direct'"):
        await lab.adapter(t)


@pytest.mark.parametrize("kind", ["direct", "fanout", "topic", "headers"])
async def test_a_queue_behind_an_existing_exchange(lab: Bench, kind: str) -> None:
    raw = await lab.raw()
    exchange = await raw.declare_exchange(lab.name("legacy"), kind, auto_delete=True)
    options: dict[str, object] = {"exchange": exchange.name, "exchange_type": kind, "routing_key": "a.b"}
    if kind == "headers":
        options["arguments"] = {"x-match": "all", "region": "eu"}
    q = lab.queue(options=options)
    adapter = await lab.adapter(q)
    subscription = await adapter.subscribe(source(q))
    assert await adapter.send([out(q, b"ours", headers={"region": "eu"})], SOON) == [None]
    await exchange.publish(aio_pika.Message(b"theirs", headers={"region": "eu"}), "a.b")
    got = await take(subscription, 2)
    assert [d.message.body for d in got] == [b"ours", b"theirs"]
    assert [(d.native.exchange, d.native.routing_key) for d in got] == [(exchange.name, "a.b")] * 2  # type: ignore[attr-defined] # Received
    if kind == "headers":
        assert errors_of(await adapter.send([out(q, b"elsewhere")], SOON)) == ["NotFound"]


async def test_a_topic_on_an_existing_exchange(lab: Bench) -> None:
    raw = await lab.raw()
    exchange = await raw.declare_exchange(lab.name("events"), "topic", durable=False)
    t = lab.topic(options={"exchange": exchange.name, "routing_key": "order.charged"})
    every, some = lab.group(t, "all"), lab.group(t, "some", {"routing_key": "order.*"})
    adapter = await lab.adapter(t, every, some)
    all_, some_ = await adapter.subscribe(source(every)), await adapter.subscribe(source(some))
    await adapter.send([out(t, b"1")], SOON)
    await exchange.publish(aio_pika.Message(b"2"), "invoice.paid")
    assert [m.body for m in await drink(all_, 2)] == [b"1", b"2"]
    assert [m.body for m in await drink(some_)] == [b"1"]
    assert await some_.receive(1, 0.2) == []


async def test_priorities_come_first(lab: Bench) -> None:
    q = lab.queue(priorities=5)
    adapter = await lab.adapter(q)
    await adapter.send([out(q, b"%d" % p, priority=p) for p in (0, 4, 2, 1, 3)], SOON)
    got = await drink(await adapter.subscribe(source(q)), 5)
    assert [m.body for m in got] == [b"4", b"3", b"2", b"1", b"0"]


async def test_an_ordered_queue_has_one_consumer_and_keeps_its_order(lab: Bench) -> None:
    q = lab.queue(ordered=True)
    adapter, other = await lab.adapter(q), await lab.adapter(q)
    await adapter.send([out(q, b"%d" % n) for n in range(20)], SOON)
    first = await adapter.subscribe(source(q, prefetch=10, ordered=True))
    second = await other.subscribe(source(q, prefetch=10, ordered=True))
    got = await take(first, 5)
    assert await second.receive(1, 0.2) == []
    await first.stop()
    assert await second.receive(1, 0.2) == []  # not before the first has settled what it holds
    assert not any(await first.settle(Outcome.ACCEPTED, got[:3]))
    assert not any(await first.settle(Outcome.RELEASED, got[3:]))
    await first.close()
    left = [*await drink(second, 10), *await drink(second, 7)]
    assert [m.body for m in left] == [b"%d" % n for n in range(3, 20)]


async def test_unknown_settings_and_options_are_named(lab: Bench) -> None:
    with pytest.raises(ConfigError, match=r"rabbitmq\.hartbeat"):
        await lab.adapter(endpoint=lab.endpoint(hartbeat=3))
    with pytest.raises(ConfigError, match=r"queues\.q\.rabbitmq\.queue_typ"):
        await lab.adapter(lab.queue(options={"queue_typ": "quorum"}))
    with pytest.raises(ConfigError, match="priorities"):
        await lab.adapter(lab.queue(options={"queue_type": "quorum"}, priorities=3))
    with pytest.raises(ConfigError, match=r"amq\."):
        await lab.adapter(Declared(Queue("q"), "amq.q"))


async def test_an_undeclared_address_is_unknown(lab: Bench) -> None:
    adapter = await lab.adapter(lab.queue())
    with pytest.raises(UnknownChannel):
        await adapter.send([Outgoing(Topic("never"), Message(b"", "1"))], SOON)
    with pytest.raises(UnknownChannel):
        await adapter.subscribe(Source(Queue("never")))


async def test_browsing_takes_nothing(lab: Bench) -> None:
    letters = Declared(Queue.derived("q.dlq"), lab.name("q.dlq"), "dead letter")
    adapter = await lab.adapter(lab.queue(), letters)
    await adapter.send([out(letters, b"%d" % n) for n in range(25)], SOON)
    for _ in range(2):
        browser = await adapter.subscribe(source(letters, prefetch=10, browse=True))
        assert sorted(int(d.message.body) for d in await take(browser, 25)) == list(range(25))
        assert await browser.receive(1, 0.1) == []
        await browser.stop()
        await browser.close()
        assert (await adapter.backlog(letters.address)).ready == 25  # type: ignore[arg-type] # a queue


# -- the link -----------------------------------------------------------------------------------------------------


async def test_a_wrong_password_is_said_so_and_shown_nowhere(lab: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = lab.endpoint().url
    with pytest.raises(AuthenticationFailed) as wrong:
        await lab.adapter(endpoint=lab.endpoint(secret(url, "hunter2-wrong")))
    texts = [str(wrong.value), repr(wrong.value), repr(wrong.value.__cause__)]
    assert "hunter2" not in " ".join([*texts, caplog.text])


async def test_the_password_and_bodies_are_in_no_log(lab: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """At DEBUG, where aio-pika and aiormq write down what they do."""
    caplog.set_level(logging.DEBUG)
    q = lab.queue()
    adapter = await lab.adapter(q)
    subscription = await adapter.subscribe(source(q))
    await adapter.send([out(q, b"body-of-the-message", headers={"h": "value-of-a-header"})], SOON)
    await drink(subscription)
    await adapter.close()
    password = lab.endpoint().url.password
    assert password is not None
    assert "Connecting to" in caplog.text  # the clients' loggers do speak
    for text in (password.value, "body-of-the-message", "value-of-a-header"):
        assert text not in caplog.text
        assert text not in repr(adapter.native) + repr(adapter._endpoint)


async def test_hosts_are_tried_in_turn_and_all_are_named(lab: Bench) -> None:
    url = lab.endpoint().url
    async with Proxy(lab.url) as closed:
        dead = closed.url().hosts[0]
    adapter = await lab.adapter(lab.queue(), endpoint=lab.endpoint(replace(url, hosts=(dead, *url.hosts))))
    assert (await adapter.check()).up
    with pytest.raises(ConnectionLost, match=rf"127\.0\.0\.1:{dead[1]}"):
        await lab.adapter(endpoint=lab.endpoint(replace(url, hosts=(dead,))))


async def test_a_silent_host_is_given_up(lab: Bench) -> None:
    async with Proxy(lab.url) as proxy:
        proxy.freeze()
        begun = time.monotonic()
        with pytest.raises(ConnectionLost, match=r"no answer within 0\.3 s"):
            await lab.adapter(endpoint=lab.endpoint(proxy.url(), connect_timeout=0.3))
        assert time.monotonic() - begun < 5


async def test_a_missing_vhost_is_a_config_error(lab: Bench) -> None:
    with pytest.raises(ConfigError, match="no vhost 'nowhere'"):
        await lab.adapter(endpoint=lab.endpoint(replace(lab.endpoint().url, path="nowhere")))


async def test_a_lost_link_is_told_everywhere_and_nothing_confirmed_is_lost(lab: Bench) -> None:
    q = lab.queue()
    other = await lab.adapter(q)
    async with Proxy(lab.url) as proxy:
        adapter = await lab.adapter(q, endpoint=lab.endpoint(proxy.url()))
        gone: list[tuple[list[Delivery[Any]], float]] = []

        async def losing(deliveries: Any, grace: float) -> None:
            gone.append((list(deliveries), grace))

        await other.send([out(q, b"held"), out(q, b"buffered")], SOON)
        subscription = await adapter.subscribe(source(q, prefetch=1, losing=losing))
        held = await take(subscription)
        proxy.freeze()
        sending = asyncio.ensure_future(adapter.send([out(q, b"undecided")], SOON))
        receiving = asyncio.ensure_future(subscription.receive(1, SOON))
        await asyncio.sleep(0)
        proxy.cut()
        with pytest.raises(ConnectionLost):
            await receiving
        with pytest.raises(ConnectionLost):
            await sending
        assert gone == [(held, 0)]
        assert held[0].lost
        assert errors_of(await subscription.settle(Outcome.ACCEPTED, held)) == ["LeaseLost"]
        assert await subscription.check() == "gone"
        assert not (await adapter.check()).up
        with pytest.raises(ConnectionLost):
            await adapter.send([out(q)], SOON)
        with pytest.raises(ConnectionLost):
            await adapter.subscribe(source(q))
        await subscription.stop()
        await subscription.close()
        proxy.thaw()
        # As the core's supervisor does it.
        await adapter.close()
        await adapter.connect()
        await adapter.declare(Topology(channels=(q,)))
        again = await adapter.subscribe(source(q))
        assert {m.body for m in await drink(again, 2)} == {b"held", b"buffered"}


async def test_a_server_that_hangs_while_the_link_is_closed_hinders_nobody(lab: Bench) -> None:
    """The client library cancels its own calls when it gives such a server up; that must not look like our own end."""
    q = lab.queue()
    async with Proxy(lab.url) as proxy:
        adapter = await lab.adapter(q, endpoint=lab.endpoint(proxy.url(), heartbeat=1))
        subscription = await adapter.subscribe(source(q))
        proxy.hang()
        closing = asyncio.ensure_future(adapter.close())  # it asks the server to stop sending
        await asyncio.wait([closing], timeout=3 * SOON)
        assert closing.done()
        assert not closing.cancelled()
        assert closing.exception() is None
        assert await subscription.check() == "gone"
        proxy.thaw()
        await adapter.connect()
        assert not any(await adapter.send([out(q)], SOON))


async def test_a_busy_link_outlives_its_heartbeat(lab: Bench) -> None:
    """A server that sends all the time sends no heartbeats, and aiormq does not see what the tap takes."""
    q = lab.queue(options={"queue_type": "classic"})
    adapter = await lab.adapter(q, endpoint=lab.endpoint(heartbeat=1))
    subscription = await adapter.subscribe(source(q, prefetch=500))
    end = time.monotonic() + 8  # aiormq gives up after 3 * (1 + 1) seconds without a frame
    count = 0
    while time.monotonic() < end:
        assert not any(await adapter.send([out(q) for _ in range(50)], SOON))
        count += len(await drink(subscription, 50))
    assert (await adapter.check()).up
    assert count > 50


async def test_a_deleted_queue_ends_its_consumer_with_not_found(lab: Bench) -> None:
    q = lab.queue()
    adapter = await lab.adapter(q)
    await adapter.send([out(q, b"held")], SOON)
    subscription = await adapter.subscribe(source(q))
    held = await take(subscription)
    receiving = asyncio.ensure_future(subscription.receive(1, SOON))
    await (await lab.raw()).queue_delete(q.name)
    with pytest.raises(NotFound, match="deleted"):
        await receiving
    assert await subscription.check() == "gone"
    assert await subscription.settle(Outcome.ACCEPTED, held) == [None]  # harmless
    await subscription.stop()
    await subscription.close()
    assert (await adapter.check()).up
    with pytest.raises(NotFound):
        await adapter.subscribe(source(q))
    with pytest.raises(NotFound):
        await adapter.backlog(q.address)  # type: ignore[arg-type] # a queue
    await adapter.declare(Topology(channels=(q,)))
    await adapter.subscribe(source(q))


async def test_a_cancelled_stop_leaves_what_is_in_hand(lab: Bench) -> None:
    """The client library closes a channel whose call is cancelled; a settle after that would cost the connection."""
    q = lab.queue()
    async with Proxy(lab.url) as proxy:
        adapter = await lab.adapter(q, endpoint=lab.endpoint(proxy.url()))
        await adapter.send([out(q)], SOON)
        subscription = await adapter.subscribe(source(q))
        held = await take(subscription)
        proxy.freeze()
        stopping = asyncio.ensure_future(subscription.stop())
        await until(lambda: list(subscription._tasks), "basic.cancel is under way")
        stopping.cancel()
        await asyncio.wait([stopping])
        assert stopping.cancelled()
        proxy.thaw()
        assert await subscription.settle(Outcome.ACCEPTED, held) == [None]
        await subscription.close()
        assert (await adapter.check()).up
        assert (await adapter.backlog(q.address)).ready == 0  # type: ignore[arg-type] # a queue


async def test_a_cancelled_receive_loses_nothing(lab: Bench) -> None:
    q = lab.queue()
    adapter = await lab.adapter(q)
    subscription = await adapter.subscribe(source(q))
    for n in range(20):
        receiving = asyncio.ensure_future(subscription.receive(1, SOON))
        await adapter.send([out(q, b"%d" % n)], SOON)
        receiving.cancel()
        await asyncio.wait([receiving])
        if receiving.cancelled():
            assert [m.body for m in await drink(subscription)] == [b"%d" % n]
        else:
            assert not any(await subscription.settle(Outcome.ACCEPTED, receiving.result()))


async def test_a_blocked_broker_throttles_and_is_seen(lab: Bench) -> None:
    q = lab.queue()
    async with Proxy(lab.url) as proxy:
        adapter = await lab.adapter(q, endpoint=lab.endpoint(proxy.url()))
        await adapter.send([out(q)], SOON)
        reason = b"\x0dlow on memory"
        size = (4 + len(reason)).to_bytes(4, "big")
        proxy.say(b"\x01\x00\x00" + size + b"\x00\x0a\x00\x3c" + reason + b"\xce")
        await until(lambda: adapter._publishing is not None and adapter._publishing.blocked, "blocked")
        health = await adapter.check()
        assert health.up
        assert "low on memory" in (health.blocked or "")
        (error,) = await adapter.send([out(q)], 0.2)
        assert isinstance(error, Throttled)
        assert "low on memory" in str(error)
        waiting = asyncio.ensure_future(adapter.send([out(q)], SOON))
        await asyncio.sleep(0)
        proxy.say(b"\x01\x00\x00\x00\x00\x00\x04\x00\x0a\x00\x3d\xce")
        assert await waiting == [None]
        assert (await adapter.check()).blocked is None


async def test_an_unanswered_send_is_a_timeout_and_late_confirms_do_no_harm(lab: Bench) -> None:
    q = lab.queue()
    async with Proxy(lab.url) as proxy:
        adapter = await lab.adapter(q, endpoint=lab.endpoint(proxy.url()))
        await adapter.send([out(q)], SOON)
        proxy.freeze()
        results = await adapter.send([out(q, id="same"), out(q)], 0.2)
        assert [type(error) for error in results] == [Timeout, Timeout]
        proxy.thaw()
        assert await adapter.send([out(q, id="same")], SOON) == [None]
    got = await drink(await (await lab.adapter(q)).subscribe(source(q)), 4)
    assert [m.id for m in got].count("same") == 2


async def test_tls_verifies_unless_told_otherwise(lab: Bench, tmp_path: Any) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    q = lab.queue()
    async with Proxy(lab.url, context) as proxy:
        adapter = await lab.adapter(q, endpoint=lab.endpoint(proxy.url(), ca_file=str(ca)))
        subscription = await adapter.subscribe(source(q))
        assert await adapter.send([out(q, b"sealed")], SOON) == [None]
        assert [m.body for m in await drink(subscription)] == [b"sealed"]
        await lab.adapter(endpoint=lab.endpoint(proxy.url(), verify=False))
        with pytest.raises(ConfigError, match="ca_file"):
            await lab.adapter(endpoint=lab.endpoint(proxy.url()))
        with pytest.raises(ConfigError, match="no such file"):
            await lab.adapter(endpoint=lab.endpoint(proxy.url(), ca_file=str(tmp_path / "missing.pem")))
        for adapter in lab.adapters:
            await adapter.close()


async def test_closing_works_in_every_state(lab: Bench) -> None:
    adapter = await lab.adapter()
    await adapter.close()
    await adapter.close()
    with pytest.raises(ConnectionLost):
        await adapter.send([out(lab.queue())], SOON)
    await adapter.connect()
    assert (await adapter.check()).up
    assert adapter.capabilities.version
    assert json.dumps(adapter.capabilities.version)


async def test_a_late_delivery_of_another_channel_is_not_settled(lab: Bench) -> None:
    q = lab.queue()
    adapter = await lab.adapter(q)
    await adapter.send([out(q)], SOON)
    first = await adapter.subscribe(source(q))
    held = await take(first)
    await first.close()
    second = await adapter.subscribe(source(q))
    await take(second)
    (error,) = await second.settle(Outcome.ACCEPTED, held)
    assert isinstance(error, LeaseLost)
    assert (await adapter.check()).up
