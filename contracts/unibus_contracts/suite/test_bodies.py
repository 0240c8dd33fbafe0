"""Bodies: what is sent is what arrives, byte for byte, up to the size that is declared and not beyond."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel

from unibus import CodecError, ConfigError, Message, MessageTooLarge, Queue, SendFailed, Topic
from unibus_contracts.contract import contract
from unibus_contracts.kit import Kit, bodies, leftover, take

ODD = "naïve e\u0301 \U0001f98a \u202eright to left\u202c \ufffe \ufeff \x00 \x1f \x7f \u0085 \u2028 中文 عربي"


class Order(BaseModel):
    id: int
    note: str
    lines: list[str] = []


@dataclass
class Point:
    x: float
    y: float
    label: str | None = None


@contract("body.bytes_exact", "Bytes arrive as they are: every value, none at all, one, text that is no text.")
async def test_bytes(kit: Kit) -> None:
    queue = kit.queue()
    sent = [bytes(range(256)), b"", b"\x00", b"\xff\xfe", b"<a>&amp;\r\n</a>", b"e30=", b'{"a": 1}', b" padded ", b"\n"]
    async with kit.bus(queue) as bus:
        await bus.send_many(queue, sent)
        for body in sent:
            await bus.send(queue, body)
        assert sorted(bodies(await leftover(bus, queue))) == sorted(sent * 2)


@contract("body.types_roundtrip", "Models, dataclasses, text and plain data arrive equal to what was sent.")
async def test_types(kit: Kit) -> None:
    cases: list[tuple[Any, Any]] = [
        (Order, Order(id=1, note=ODD, lines=["", "x" * 1000])),
        (Point, Point(0.1, -1e300, "é")),
        (str, ODD),
        (str, ""),
        (dict[str, int], {"a": 1, "ü": -(2**53)}),
        (list[Order], [Order(id=n, note="") for n in range(3)]),
        (Order | None, None),
    ]
    queues = [kit.queue(kind) for kind, _ in cases]
    async with kit.bus(*queues) as bus:
        for queue, (_, value) in zip(queues, cases, strict=True):
            await bus.send(queue, value)
            async with bus.receiver(queue) as receiver:
                (delivery,) = await take(receiver)
                assert delivery.body == value
                assert type(delivery.body) is type(value)
                await delivery.ack()


@contract(
    "body.wrong_type_is_refused", "A body of another type than the channel's is refused by send; nothing arrives."
)
async def test_wrong_type(kit: Kit) -> None:
    queue = kit.queue(Order)
    raw: Queue[bytes] = Queue(queue.name, bytes)
    async with kit.bus(queue) as bus:
        with pytest.raises(CodecError):
            await bus.send(queue, b"no order")
        with pytest.raises(CodecError):
            await bus.send(queue, Point(1, 2))
    async with kit.bus(raw) as bus:
        assert await leftover(bus, raw) == []


@contract("body.unicode_roundtrip", "Text of any script, control characters included, is the same in body and headers.")
async def test_unicode(kit: Kit) -> None:
    queue = kit.queue(str)
    value = ODD.replace("\x00", "")  # NUL is refused in headers; a contract of its own
    async with kit.bus(queue) as bus, bus.receiver(queue) as receiver:
        await bus.send(queue, ODD, headers={"odd": value}, key="schlüssel-\U0001f511")
        (delivery,) = await take(receiver)
        assert delivery.body == ODD
        assert delivery.message.headers["odd"] == value
        assert delivery.message.key == "schlüssel-\U0001f511"
        await delivery.ack()


@contract(
    "size.at_max",
    "A body of exactly the declared maximum arrives whole; without a maximum, one of 8 MiB.",
    assumes="The broker itself takes messages as large as the adapter declares.",
)
async def test_at_max(kit: Kit) -> None:
    queue = kit.queue()
    size = (await kit.capabilities()).max_body or 8 << 20
    body = bytes(1 << 20) * (size >> 20) + b"\xff" * (size % (1 << 20))
    async with kit.bus(queue) as bus, bus.receiver(queue, prefetch=1) as receiver:
        await bus.send(queue, body)
        (delivery,) = await take(receiver)
        assert len(delivery.body) == size
        assert delivery.body == body
        await delivery.ack()


@contract(
    "size.over_max",
    "One byte more than declared raises MessageTooLarge; nothing arrives, and the bus goes on.",
    assumes="The broker itself takes messages as large as the adapter declares.",
)
async def test_over_max(kit: Kit) -> None:
    queue = kit.queue()
    capabilities = await kit.capabilities()
    async with kit.bus(queue) as bus:
        if capabilities.max_body is not None:
            with pytest.raises(MessageTooLarge):
                await bus.send(queue, bytes(capabilities.max_body + 1))
        if capabilities.max_key is not None:
            with pytest.raises(MessageTooLarge):
                await bus.send(queue, b"", key="k" * (capabilities.max_key + 1))
        if capabilities.max_headers is not None:
            with pytest.raises(MessageTooLarge):
                await bus.send(queue, b"", headers={f"h{n}": "" for n in range(capabilities.max_headers + 1)})
        if capabilities.max_header_bytes is not None:
            with pytest.raises(MessageTooLarge):
                await bus.send(queue, b"", headers={"h": "x" * capabilities.max_header_bytes})
        await bus.send(queue, b"after")
        assert bodies(await leftover(bus, queue)) == [b"after"]


@contract(
    "size.one_of_many",
    "Of many bodies with one too large, that one is named by its index; the others arrive once.",
    assumes="The broker itself takes messages as large as the adapter declares.",
)
async def test_one_of_many(kit: Kit) -> None:
    queue = kit.queue()
    limit = (await kit.capabilities()).max_body
    async with kit.bus(queue) as bus:
        # Without a largest body, one that can't be encoded takes the bad one's place.
        bad: Any = object() if limit is None else bytes(limit + 1)
        with pytest.raises(SendFailed) as caught:
            await bus.send_many(queue, [b"0", b"1", bad, b"3"])
        assert set(caught.value.sent) == {0, 1, 3}
        assert {i: type(e) for i, e in caught.value.failed.items()} == {
            2: CodecError if limit is None else MessageTooLarge
        }
        found = await leftover(bus, queue)
        assert sorted(bodies(found)) == [b"0", b"1", b"3"]
        assert sorted(d.message.id for d in found) == sorted(caught.value.sent.values())


@contract("size.keys", "Keys of one character and of 200 arrive as they are.")
async def test_keys(kit: Kit) -> None:
    queue = kit.queue()
    limit = (await kit.capabilities()).max_key
    keys = ["k", " ", "a/b?c=d&e", "k" * (200 if limit is None else min(limit, 200))]
    async with kit.bus(queue) as bus:
        for key in keys:
            await bus.send(queue, b"x", key=key)
        assert [d.message.key for d in await leftover(bus, queue)] == keys


@contract(
    "unicode.destination_names", "A name is either taken as it is, to its full length, or refused when it is made."
)
async def test_names(kit: Kit) -> None:
    for name in ("", "a b", "ü", "a/b", "a\n", "x" * 61, "q.dlq", "q.invalid", "q.retry.1", "*", "#", "a:b"):
        for kind in (Queue, Topic):
            with pytest.raises(ConfigError):
                kind(name, bytes)
    stem = kit.harness.channel("n")
    longest = kit.named_queue((stem + "-_.0Zz" * 10)[:60])
    async with kit.bus(longest) as bus:
        await bus.send(longest, b"x")
        assert bodies(await leftover(bus, longest)) == [b"x"]


@contract("body.envelope_roundtrip", "Every field of the envelope that a sender sets arrives as it was set.")
async def test_envelope(kit: Kit) -> None:
    queue = kit.queue()
    message = Message(
        b"x",
        id="id-ü-1",
        type="order.placed",
        content_type="application/x-mine",
        headers={"h": "1"},
        key="k",
        correlation_id="conversation",
        causation_id="cause",
        timestamp=1_700_000_000.0,
        expires_at=4_000_000_000.0,
    )
    async with kit.bus(queue) as bus:
        await bus.send(queue, message)
        (delivery,) = await leftover(bus, queue)
    got = delivery.message
    for name in ("id", "type", "content_type", "key", "correlation_id", "causation_id", "timestamp", "expires_at"):
        assert getattr(got, name) == getattr(message, name), name
    assert dict(got.headers) == {"h": "1"}
