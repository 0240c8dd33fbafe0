"""Headers: text to text, carried exactly or refused by send; never changed on the way."""

from __future__ import annotations

from typing import Annotated, Any

import pytest

from unibus import CodecError, Header
from unibus.message import RESERVED_HEADERS
from unibus_contracts.contract import contract
from unibus_contracts.kit import Kit, Seen, leftover

VALUES = {
    "empty": "",
    "space": " ",
    "padded": "  both ends  ",
    "tab": "a\tb",
    "number": "1.10",
    "zero": "007",
    "true": "true",
    "null": "None",
    "json": '{"a": [1, "ü"]}',
    "quotes": "\"'`\\",
    "unicode": "naïve \U0001f98a 中文",
    "long": "x" * 4000,
    "base64": "AAEC/w==",
    "percent": "%00%20+",
}


@contract("headers.exact", "Header values of every kind arrive as they were sent, and no header is added.")
async def test_exact(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        for name, value in VALUES.items():
            await bus.send(queue, b"", headers={name: value})
        small = {name: value for name, value in VALUES.items() if len(value) < 100}
        await bus.send(queue, b"", headers=small)
        found = [dict(d.message.headers) for d in await leftover(bus, queue)]
    assert found == [*({name: value} for name, value in VALUES.items()), small]


@contract("headers.names_exact", "Header names keep their case, their length and their punctuation.")
async def test_names(kit: Kit) -> None:
    queue = kit.queue()
    # One message each: whether names may differ in case alone is a contract of its own.
    names = ["UPPER", "lower", "Mixed-Case", "x-mine", "dots.and_more", "a", "n" * 128, "!#$%&'*+-.^_`|~", "a/b:c"]
    async with kit.bus(queue) as bus:
        for name in names:
            await bus.send(queue, b"", headers={name: "v"})
        assert [dict(d.message.headers) for d in await leftover(bus, queue)] == [{name: "v"} for name in names]


@contract(
    "headers.case_is_kept_or_refused", "Two headers that differ in case alone both arrive, or the send is refused."
)
async def test_case(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        try:
            await bus.send(queue, b"", headers={"a": "1", "A": "2"})
        except CodecError:
            expected = []
        else:
            expected = [{"a": "1", "A": "2"}]
        assert [dict(d.message.headers) for d in await leftover(bus, queue)] == expected


@contract(
    "headers.many",
    "A message carries 24 headers, and 100 where no smaller number is declared.",
    assumes="The broker itself takes as many headers as the adapter declares.",
)
async def test_many(kit: Kit) -> None:
    queue = kit.queue()
    limit = (await kit.capabilities()).max_headers
    async with kit.bus(queue) as bus:
        for count in (1, 9, 10, 11, 24, 100):
            if limit is not None and count > limit:
                continue  # one more than declared is refused: size.over_max
            headers = {f"header-{n}": f"value {n}" for n in range(count)}
            await bus.send(queue, b"", headers=headers)
            (delivery,) = await leftover(bus, queue)
            assert dict(delivery.message.headers) == headers


@contract("headers.illegal_are_refused", "What no broker carries unchanged is refused by send, and nothing arrives.")
async def test_illegal(kit: Kit) -> None:
    queue = kit.queue()
    illegal: list[dict[Any, Any]] = [
        {"bytes": b"x"},
        {"int": 1},
        {"float": 1.1},
        {"none": None},
        {"bool": True},
        {b"name": "x"},
        {1: "x"},
        {"lf": "a\nb"},
        {"cr": "a\rb"},
        {"crlf": "a\r\nx-forged: 1"},
        {"nul": "a\0b"},
        {"surrogate": "\ud800"},
        {"": "x"},
        {"a b": "x"},
        {"a\nb": "x"},
        {"ü": "x"},
        {"n" * 129: "x"},
    ]
    async with kit.bus(queue) as bus:
        for headers in illegal:
            with pytest.raises(CodecError):
                await bus.send(queue, b"x", headers=headers)
        assert await leftover(bus, queue) == []


@contract(
    "headers.reserved_are_refused", "A header that belongs to unibus or to a broker is refused, never overwritten."
)
async def test_reserved(kit: Kit) -> None:
    queue = kit.queue()
    async with kit.bus(queue) as bus:
        for name in sorted(RESERVED_HEADERS):
            with pytest.raises(CodecError, match="reserved"):
                await bus.send(queue, b"x", headers={name: "1"})
        assert await leftover(bus, queue) == []


@contract("headers.to_parameters", "A handler's header parameters get the header's value, or their default without it.")
async def test_parameters(kit: Kit) -> None:
    queue = kit.queue()
    bus, seen = kit.bus(), Seen[tuple[str, str]]()

    @bus.consumer(queue, concurrency=1)
    async def handle(
        body: bytes, tenant: Annotated[str, Header("tenant")] = "-", zone: Annotated[str, Header("x-zone")] = "none"
    ) -> None:
        seen((tenant, zone))

    async with bus.running():
        await bus.send(queue, b"", headers={"tenant": "blå", "x-zone": ""})
        await seen.reach(1)
        await bus.send(queue, b"", headers={"Tenant": "other case"})
        await seen.reach(2)
    assert seen.all == [("blå", ""), ("-", "none")]


@contract("headers.trace_context_verbatim", "The W3C trace headers of a sender arrive byte for byte.")
async def test_trace(kit: Kit) -> None:
    queue = kit.queue()
    headers = {
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate": "vendor=t61rcWkgMzE,other@sys=00f067aa0ba902b7",
        "baggage": "userId=al%C3%AFce,isProduction=false;meta",
    }
    async with kit.bus(queue) as bus:
        await bus.send(queue, b"", headers=headers)
        (delivery,) = await leftover(bus, queue)
    assert dict(delivery.message.headers) == headers


@contract("headers.senders_own_copy", "What a sender changes after send returned does not reach the receiver.")
async def test_own_copy(kit: Kit) -> None:
    queue = kit.queue()
    headers = {"a": "before"}
    async with kit.bus(queue) as bus:
        await bus.send(queue, b"", headers=headers)
        headers["a"] = "after"
        (delivery,) = await leftover(bus, queue)
    assert dict(delivery.message.headers) == {"a": "before"}
