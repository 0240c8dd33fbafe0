"""The decoders of foreign input, each with what it is fed: `fuzz_lab.MAPPINGS`."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from types import SimpleNamespace
from typing import Any

import pamqp.frame
from pamqp import commands
from pydantic import BaseModel
from tests.unit.fuzz_lab import (
    MAPPINGS,
    NAMES,
    NOW,
    ORDERS,
    TEXTS,
    captured,
    check,
    copies,
    mangled,
    mapping,
    message,
    pairs,
    text,
)

from unibus import deadletter
from unibus.adapter import Outgoing
from unibus.codec import codec_of
from unibus.envelope import read, write
from unibus.errors import CodecError, ConfigError, Refused
from unibus.message import Message
from unibus.url import parse
from unibus_kafka import offsets
from unibus_kafka import wire as kafka
from unibus_rabbitmq import link
from unibus_rabbitmq import wire as rabbitmq
from unibus_redis import wire as redis
from unibus_sqs import wire as sqs

__all__ = ["MAPPINGS"]

# RabbitMQ: the content header and the method of a delivery; and the frames around them.

_DELIVER = pamqp.frame.marshal(commands.Basic.Deliver("tag", 7, False, "ex", "rk"), 3)[7:-1]
_HEADERS = [bytes.fromhex(one["header"]) for one in captured("rabbitmq")]


def _content(rng: random.Random) -> bytes:
    """A content header: a captured one, or one of ours."""
    if rng.random() < 0.5:
        return rng.choice(_HEADERS)
    made = message(rng)
    if rng.random() < 0.7:
        made.headers = pairs(rng, dict(made.headers))
    try:
        properties = rabbitmq.encode(Outgoing(ORDERS, made), made.id, None, NOW)
    except ValueError:  # a sender is refused
        return rng.choice(_HEADERS)
    return b"".join(link.content_frames(3, properties, b"", 131072))[7:-1]


def _amqp(rng: random.Random) -> tuple[bytes, bytes]:
    header = _content(rng)
    return _DELIVER, header[:12] + mangled(rng, header[12:], _content(rng)) if rng.random() < 0.85 else header


@mapping("rabbitmq", _amqp)
def amqp(given: tuple[bytes, bytes]) -> None:
    received = rabbitmq.Received(*given)
    for inbox in (False, True):
        found = rabbitmq.decode(received, inbox=inbox, fallback="queue@7")
        check(found)
    rabbitmq.not_before(received.headers)
    rabbitmq.deliveries(received, counted=False)
    if isinstance(received.headers.get(rabbitmq.DEATH), list):
        deadletter.explain(found, *rabbitmq.broker_death(received))
    for copy in copies(found, received, "queue@7"):
        try:
            properties = rabbitmq.encode(copy, copy.message.id[:60], None, NOW)
        except (ValueError, TypeError):  # told as Refused
            continue
        again = rabbitmq.Received(given[0], b"\0" * 12 + properties).properties
        assert again["message_id"]
        assert int(again.get("expiration", 0)) < 1 << 32


def _stream(rng: random.Random) -> list[bytes]:
    header, body = _content(rng), rng.randbytes(rng.randrange(40))
    frames = [
        link._head.pack(kind, channel, len(payload)) + payload + b"\xce"
        for kind, channel, payload in (
            (link.METHOD, 0, b"\0\n\0<" + b"\x05disk!"),
            (link.METHOD, 0, b"\0\n\0" + b"2\x01\x40\x06closed\0\0\0\0"),
            (link.METHOD, 3, _DELIVER),
            (link.HEADER, 3, header),
            (link.BODY, 3, body),
            (8, 0, b""),
        )
    ]
    rng.shuffle(frames)
    data = b"".join(frames)
    if rng.random() < 0.9:
        data = mangled(rng, data)
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(4)))
    return [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)]


class _Control:
    """The part of a Link that listens to channel 0."""

    blocked: str | None = None
    said: object = None

    def __init__(self) -> None:
        self.unblocked = SimpleNamespace(set=lambda: None, clear=lambda: None)


_LOOP = asyncio.new_event_loop()
_LOOP.close()  # a StreamReader wants one; it is never run


@mapping("rabbitmq frames", _stream, link.Malformed)
def frames(chunks: list[bytes]) -> None:
    tap = link._Tap.__new__(link._Tap)
    asyncio.StreamReader.__init__(tap, loop=_LOOP)
    control: Any = _Control()
    taken: list[tuple[int, bytes]] = []

    def sink(kind: int, payload: bytes) -> bool:
        taken.append((kind, payload))
        if kind == link.HEADER:  # as a subscription does
            rabbitmq.Received([p for k, p in taken if k == link.METHOD][-1], payload)
            rabbitmq.body_size(payload)
        return True

    tap._sinks = {0: lambda kind, payload: link.Link._control(control, kind, payload), 3: sink}
    tap._rest, tap._beat, tap._now = b"", 0.0, lambda: 0.0
    for chunk in chunks:
        tap.feed_data(chunk)
    assert sum(len(payload) for _, payload in taken) <= sum(map(len, chunks))


# Kafka: key, value, headers and timestamp; the metadata of commits; return addresses and positions


def _record(rng: random.Random) -> Any:
    made = message(rng)
    if rng.random() < 0.7:
        made.headers = pairs(rng, dict(made.headers))
    try:
        key, value, headers, at = kafka.encode(Outgoing(ORDERS, made), NOW, later=False)
    except UnicodeEncodeError:  # a sender's own check is before that
        key, value, headers, at = None, b"x", [], -1
    given: list[tuple[str, bytes | None]] = list(headers)
    for _ in range(rng.randrange(3)):
        name = rng.choice(NAMES) if rng.random() < 0.7 or not given else rng.choice(given)[0]
        raw = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        given.insert(rng.randrange(len(given) + 1), (name, rng.choice((None, mangled(rng, raw), raw))))
    if rng.random() < 0.3:
        key = rng.choice((None, b"", b"\xff", mangled(rng, b"c42")))
    if rng.random() < 0.2:
        value, at = rng.choice((None, b"")), rng.choice((-1, 0, 2**63 - 1, -(2**63)))
    return kafka.Record("t", 0, 7, at, key, value, tuple(given))


@mapping("kafka", _record)
def record(given: Any) -> None:
    found, due = kafka.decode(given)
    check(found)
    assert due is None or type(due) is float
    for copy in copies(found, given, "t/0@7", "unibus.reply.svc:3:svc.reply.abc"):
        key, value, headers, at = kafka.encode(copy, NOW, later=True)
        assert isinstance(key, bytes | None)
        assert isinstance(value, bytes | None)
        assert all(isinstance(v, bytes | None) for _, v in headers)
        assert -(2**63) <= at < 2**63


def _metadata(rng: random.Random) -> tuple[int, str]:
    offset = rng.choice((0, 1, 7, 2**40, 2**63 - 1))
    numbers = sorted(rng.sample(range(offset, offset + 60), rng.randrange(20)))
    made = offsets.encode(offset, offset + 60, [(n, rng.randrange(3), rng.randrange(3)) for n in numbers], open=True)
    if rng.random() < 0.5:  # what passes the checksum
        data = mangled(rng, base64.b64decode(made[3:].rstrip("\0"))[:-4], rng.randbytes(9))
        made = "u2:" + base64.b64encode(data + offsets._checksum(offset, data)).decode()
    return offset, mangled(rng, made.encode()).decode(errors="surrogateescape") if rng.random() < 0.6 else made


@mapping("kafka commits", _metadata)
def metadata(given: tuple[int, str]) -> None:
    offset, written = given
    if (found := offsets.decode(offset, written)) is not None:
        highest, unfinished, _ = found
        assert highest >= offset - 1
        assert all(number >= offset for number in unfinished)
    part = offsets.Partition(SimpleNamespace(topic="t", partition=0), offset, written)
    first, again = part.point()
    assert first >= offset
    assert len(again) <= offsets.LIMIT


def _address(rng: random.Random) -> str:
    made = rng.choice(
        (
            *(
                "unibus.reply.svc:3:svc.reply.abc",
                "p.unibus.reply.svc.0123456789abcdef",
                "amq.gen-JzTY20BRgKO-HjmUJj0wLg",
            ),
            *("p.unibus:reply:svc:0123456789abcdef", "p-unibus__reply_0123456789abcdef", "t/0@7"),
            *("https://sqs.eu-west-1.amazonaws.com/123456789012/q", "arn:aws:sqs:eu-west-1:123456789012:q", "orders"),
        )
    )
    return text(rng, made) if rng.random() < 0.9 else made


@mapping("addresses", _address)
def address(given: str) -> None:
    for take in (kafka.reply_address, rabbitmq.reply_address, redis.reply_address, sqs.reply_address):
        try:
            found = take(given)
        except Refused:
            continue
        assert given.isascii()
        assert given.isprintable()
        assert "reply" in given or given.startswith("amq.gen-")
        if isinstance(found, tuple):
            assert found[0].isascii()
            assert 0 <= found[1] < 10**6
    kafka.parsed_position(given)


# Redis: the fields of an entry

_ENTRIES = [[bytes.fromhex(part) for part in one] for one in captured("redis")]


def _entry(rng: random.Random) -> redis.Entry:
    if rng.random() < 0.3:
        fields = list(rng.choice(_ENTRIES))
    else:
        made = message(rng)
        if rng.random() < 0.7:
            made.headers = pairs(rng, dict(made.headers))
        fields = [p.encode() if isinstance(p, str) else p for p in redis.encode(Outgoing(ORDERS, made), NOW)]
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(fields))
        fields[at] = mangled(rng, fields[at], rng.choice(fields))
    if rng.random() < 0.2:
        fields += [text(rng).encode(errors="surrogatepass"), rng.choice((b"\xff", b"v", b"{}"))]
    if rng.random() < 0.1:
        fields[-2:] = []
    id = rng.choice((b"1700000000000-7", b"0-1", b"18446744073709551615-18446744073709551615"))
    return redis.Entry("orders", [id, fields], 1, 0.0)


@mapping("redis", _entry)
def entry(given: redis.Entry) -> None:
    found = redis.decode(given)
    check(found)
    for copy in copies(found, given, given.position):
        made = redis.encode(copy, NOW)
        fields = [part.encode() if isinstance(part, str) else part for part in made]
        check(redis.decode(redis.Entry("orders", [b"1-1", fields], 1, 0.0)))


# SQS and SNS: body and attributes


def _native(rng: random.Random) -> dict[str, Any]:
    made = message(rng)
    if rng.random() < 0.7:
        made.headers = pairs(rng, dict(made.headers))
    body, attributes, _ = sqs.encode(Outgoing(ORDERS, made), None)
    for name in list(attributes):
        if rng.random() < 0.4:
            attributes[name]["StringValue"] = text(rng, attributes[name]["StringValue"])
    if rng.random() < 0.3:
        attributes[rng.choice(NAMES) or "n"] = rng.choice(
            (
                {"DataType": "Binary", "BinaryValue": b"\xff"},
                {"DataType": "Number.int", "StringValue": "12"},
                {"DataType": "String", "StringValue": text(rng)},
            )
        )
    if rng.random() < 0.3:
        about: dict[str, Any] = {
            "Type": "Notification",
            "TopicArn": "arn:aws:sns:eu-west-1:123456789012:t",
            "Message": body,
        }
        about["MessageAttributes"] = {
            n: {"Type": a["DataType"], "Value": a.get("StringValue", "/w==")} for n, a in attributes.items()
        }
        if rng.random() < 0.3:
            about[rng.choice(list(about))] = rng.choice(
                (None, 1, [], {}, "x", {"a": 1}, {"a": {"Type": "Binary", "Value": "?"}})
            )
        body, attributes = json.dumps(about), {}
        if rng.random() < 0.5:
            body = text(rng, body)
    elif rng.random() < 0.3:
        body = text(rng, body)
    native: dict[str, Any] = {"MessageId": "m-1", "ReceiptHandle": "r", "Body": body, "MessageAttributes": attributes}
    native["Attributes"] = {"SentTimestamp": "1700000000000", "ApproximateReceiveCount": "1"}
    if rng.random() < 0.2:
        native["Attributes"]["MessageGroupId"] = rng.choice(("g", "x" * 128))
    return native


@mapping("sqs", _native)
def envelope(given: dict[str, Any]) -> None:
    found, due = sqs.decode(given)
    check(found)
    assert due is None or type(due) is float
    for copy in copies(found, given, "m-1"):
        body, attributes, size = sqs.encode(copy, None)
        assert not sqs._ILLEGAL.search(body)
        assert len(attributes) <= sqs.MOST_ATTRIBUTES
        assert size >= len(copy.message.body)
        sqs.group_id(copy.message.key or "x")
        sqs.dedup_id(copy.message)


# The core: headers of text, bodies, URLs


def _headers(rng: random.Random) -> dict[str, str]:
    made: dict[str, str] = {}
    sent = message(rng)
    write(sent, made, sent.timestamp)
    return pairs(rng, {**made, **sent.headers})


@mapping("headers", _headers)
def headers(given: dict[str, str]) -> None:
    found = Message(b"x", "m")
    read(dict(given), found)
    check(found)
    for copy in copies(found, None, "orders@1"):
        check(copy.message)


class _Order(BaseModel):
    id: int
    lines: list[dict[str, float]] = []
    note: str = ""


_CODECS = [codec_of(kind) for kind in (_Order, dict[str, Any], list[int], str, bytes, Any)]
_BODY = b'{"id": 1, "lines": [{"a": 1.5e3}], "note": "\\u20ac \xe2\x82\xac"}'


def _body(rng: random.Random) -> tuple[bytes, str | None]:
    body = mangled(rng, _BODY, rng.choice(TEXTS).encode(errors="surrogatepass") or b"x")
    if rng.random() < 0.1:
        body = rng.choice((b"[", b'{"a":', b"1")) * rng.randrange(9999)
    return body, rng.choice((None, "application/json", "text/plain; charset=latin-1", text(rng, "application/json")))


@mapping("bodies", _body)
def bodies(given: tuple[bytes, str | None]) -> None:
    for codec in _CODECS:
        try:
            codec.decode(*given)
        except CodecError as error:
            problem: CodecError | None = error
        else:
            problem = None
        # What it came from would show the value.
        assert problem is None or (problem.__cause__ is None and problem.__context__ is None)


def _url(rng: random.Random) -> str:
    made = rng.choice(
        (
            "amqp://me:pa%40ss@h1:5672,h2/shop?heartbeat=5",
            "sqs://k:s@eu-west-1?endpoint_url=http://127.0.0.1:4566&wait=1",
            "rediss://:x@[::1]:6379/0?ca_file=/tmp/ca.pem",
        )
    )
    return text(rng, made)


@mapping("urls", _url, ConfigError)
def url(given: str) -> None:
    repr(parse(given))
