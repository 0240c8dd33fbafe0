"""The RabbitMQ adapter without a broker: frames against pamqp's, the envelope there and back, names, delays, capabilities."""

from __future__ import annotations

import asyncio
import itertools
import struct
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pamqp.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from yarl import URL

from unibus.adapter import Adapter, Declared, Endpoint, Outgoing, Secret, Source, Topology, Url
from unibus.channel import Group, Inbox, Queue, Topic, dead_letter_queue
from unibus.clock import SystemClock
from unibus.config_tables import check_table
from unibus.delivery import Delivery
from unibus.errors import ConfigError, Refused, Unsupported
from unibus.inboxes import inbox_name
from unibus.message import Message
from unibus_rabbitmq import RabbitMQAdapter, config, errors, link, topology, wire
from unibus_rabbitmq.capabilities import known
from unibus_rabbitmq.link import Link, _Tap
from unibus_rabbitmq.subscription import acks

FRAME_MAX = 131072
Q: Queue[bytes] = Queue("q")
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20).map("h-".__add__)


def delivered(headers: dict[str, Any] | None = None, body: bytes = b"", **properties: Any) -> wire.Received:
    """A delivery as pamqp would have written it."""
    deliver = commands.Basic.Deliver("tag", 7, redelivered=False, exchange="ex", routing_key="rk")
    header = ContentHeader(body_size=len(body), properties=commands.Basic.Properties(headers=headers, **properties))
    received = wire.Received(pamqp.frame.marshal(deliver, 3)[7:-1], pamqp.frame.marshal(header, 3)[7:-1])
    assert wire.body_size(pamqp.frame.marshal(header, 3)[7:-1]) == len(body)
    received.body = body
    return received


def encoded(outgoing: Outgoing, message_id: str | None = None, not_before: float | None = None) -> wire.Received:
    """What is sent, as it is received."""
    properties = wire.encode(outgoing, message_id or outgoing.message.id, not_before, 1000.0)
    deliver = pamqp.frame.marshal(commands.Basic.Deliver("tag", 1, False, "", "q"), 3)[7:-1]
    return wire.Received(deliver, b"".join(link.content_frames(3, properties, b"", FRAME_MAX))[7:-1])


def there_and_back(message: Message, to: Any = Q, message_id: str | None = None) -> Message:
    return wire.decode(encoded(Outgoing(to, message), message_id), inbox=isinstance(to, Inbox), fallback="none")


# -- frames -------------------------------------------------------------------------------------------------------


def test_frames_are_those_of_pamqp() -> None:
    ack = commands.Basic.Ack(delivery_tag=2**40, multiple=True)
    assert link.ack_frame(5, 2**40, True) == pamqp.frame.marshal(ack, 5)
    nack = commands.Basic.Nack(delivery_tag=9, multiple=False, requeue=True)
    assert link.nack_frame(5, 9) == pamqp.frame.marshal(nack, 5)


@pytest.mark.parametrize("size", [0, 1, FRAME_MAX - 8, FRAME_MAX - 7, 3 * FRAME_MAX])
def test_bodies_are_split_by_the_frame_size(size: int) -> None:
    data = b"".join(link.content_frames(1, b"\0\0", b"x" * size, FRAME_MAX))
    body, count = b"", 0
    while data:
        used, _, frame = pamqp.frame.unmarshal(data)
        assert used <= FRAME_MAX
        data = data[used:]
        if isinstance(frame, ContentBody):
            body += frame.value or b""
            count += 1
    assert body == b"x" * size
    assert count == -(-size // (FRAME_MAX - 8))


@given(headers=st.dictionaries(NAMES, TEXT, max_size=5), type=st.none() | TEXT, priority=st.none() | st.integers(0, 9))
def test_pamqp_reads_what_is_written(headers: dict[str, str], type: str | None, priority: int | None) -> None:
    message = Message(b"", "id-1", type=type, headers=headers, priority=priority, timestamp=1_700_000_000.9)
    properties = wire.encode(Outgoing(Q, message), "id-1", None, 0.0)
    _, _, header = pamqp.frame.unmarshal(b"".join(link.content_frames(1, properties, b"", FRAME_MAX)))
    assert isinstance(header, ContentHeader)
    assert header.properties.headers == (headers or None)
    assert header.properties.message_type == (type or None)
    assert header.properties.priority == (priority or None)
    assert header.properties.message_id == "id-1"
    assert header.properties.delivery_mode == 2
    assert header.properties.timestamp == datetime.fromtimestamp(1_700_000_000, UTC)


def test_all_types_of_a_table_are_read_and_copied_exactly() -> None:
    when = datetime(2024, 1, 2, tzinfo=UTC)
    table = {
        "bool": True,
        "int": -5,
        "big": 2**60,
        "float": 0.5,
        "decimal": Decimal("1.25"),
        "when": when,
        "none": None,
        "list": [1, "two", {"three": 3}],
        "table": {"a": {"b": "c"}},
        "bytes": bytearray(b"\xff\x00"),
        "text": "täxt",
    }
    received = delivered(table)
    got = received.headers
    assert {**got, "bytes": bytearray(got["bytes"])} == table
    copy = wire.encode_table({**received.raw_headers(), "text": "täxt"})
    assert wire.decode_table(copy, 0, len(copy)) == got


def test_what_pamqp_would_change_is_copied_exactly() -> None:
    double, name = b"\x01dd" + struct.pack(">d", 0.1), b"\xc8" + b"n" * 200 + b"l" + struct.pack(">q", 5)
    found: dict[str, wire.Raw] = {}
    assert wire.decode_table(double + name, 0, len(double + name), found) == {"d": 0.1, "n" * 200: 5}
    assert wire.encode_table(found) == double + name


@pytest.mark.parametrize(
    "odd", [b"\x01t" + b"T" + struct.pack(">Q", 2**63), b"\x01n?", b"\x01f" + b"F\0\0\0\x02\x01\xff"]
)
def test_odd_tables_are_no_poison(odd: bytes) -> None:
    """What can't be read hides what stands behind it, and goes along with it."""
    before = b"\x01s" + b"S\x00\x00\x00\x02\xff\xfe" + b"\x01a" + b"S\x00\x00\x00\x01b"
    table, raw = before + odd + before, dict[str, wire.Raw]()
    found = wire.decode_table(table, 0, len(table), raw)
    assert {name: found[name] for name in "sa"} == {"s": b"\xff\xfe", "a": "b"}
    assert list(raw) == ["s", odd[1:2].decode()]
    assert wire.encode_table({"s": raw["s"], "a": "b", odd[1:2].decode(): raw[odd[1:2].decode()]}) == table


@given(cuts=st.lists(st.integers(0, 400), max_size=8))
async def test_the_tap_takes_its_channel_and_passes_on_the_rest(cuts: list[int]) -> None:
    mine = [link.ack_frame(2, n, False) for n in range(5)]
    others = [
        pamqp.frame.marshal(commands.Basic.Deliver("t", n, False, "e", "k"), 1) for n in range(5)
    ]  # pamqp's order
    stream = b"".join(part for pair in zip(mine, others, strict=True) for part in pair)
    taken: list[bytes] = []

    def sink(kind: int, payload: bytes) -> bool:
        taken.append(payload)
        return kind == link.METHOD

    tap = _Tap({2: sink})
    places = sorted({0, *(cut % (len(stream) + 1) for cut in cuts), len(stream)})
    for start, stop in itertools.pairwise(places):
        tap.feed_data(stream[start:stop])
    tap.feed_eof()
    passed = await tap.read()
    assert taken == [frame[7:-1] for frame in mine]
    assert passed.replace(link._BEAT, b"") == b"".join(others)
    assert link._BEAT in passed  # so that aiormq does not take the link for dead


async def test_the_tap_hears_blocked_and_close_and_keeps_nothing_back() -> None:
    made = Link(URL("amqp://localhost"), None)
    tap = _Tap(made.sinks)
    blocked = pamqp.frame.marshal(commands.Connection.Blocked("low on disk"), 0)
    tap.feed_data(blocked)
    assert made.blocked == "low on disk"
    assert not made.unblocked.is_set()
    tap.feed_data(pamqp.frame.marshal(commands.Connection.Unblocked(), 0))
    assert made.unblocked.is_set()
    closed = pamqp.frame.marshal(commands.Connection.Close(320, "CONNECTION_FORCED", 0, 0), 0)
    tap.feed_data(closed)
    assert made.said == (320, "CONNECTION_FORCED")
    assert (await tap.readexactly(len(blocked))) == blocked
    other = _Tap({})
    other.feed_data(b"AMQP\x00\x01\x00\x00")
    assert await other.readexactly(8) == b"AMQP\x00\x01\x00\x00"


# -- the envelope -------------------------------------------------------------------------------------------------


@given(
    message=st.builds(
        Message,
        st.just(b""),
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=300),
        type=st.none() | TEXT.filter(bool),
        content_type=st.none() | TEXT.filter(bool),
        headers=st.dictionaries(NAMES, TEXT, max_size=4),
        key=st.none() | TEXT,
        correlation_id=st.none() | st.text(min_size=1, max_size=300).filter(str.isprintable),
        causation_id=st.none() | TEXT.filter(bool),
        reply_to=st.none() | st.just("amq.gen-x"),
        timestamp=st.none() | st.integers(0, 2**33).map(float),
        expires_at=st.none() | st.integers(0, 2**33).map(lambda n: n / 8),
        priority=st.none() | st.integers(1, 9),
    ),
    alias=st.booleans(),
)
def test_the_envelope_comes_back(message: Message, alias: bool) -> None:
    long = len(message.id.encode()) > 255
    assert there_and_back(message, Q, "alias~1" if alias or long else None) == message
    reply = Message(b"", "r", correlation_id=message.correlation_id, causation_id=message.id)
    assert there_and_back(reply, Inbox("i")) == reply


def test_correlation_on_requests_and_replies() -> None:
    request = encoded(Outgoing(Q, Message(b"", "req", correlation_id="talk", reply_to="amq.gen-x")))
    assert (request.properties["correlation_id"], request.headers) == ("req", {"x-correlation-id": "talk"})
    reply = encoded(Outgoing(Inbox("i"), Message(b"", "rep", causation_id="req", expires_at=1002.5)))
    assert reply.properties["correlation_id"] == "req"
    assert reply.properties["expiration"] == "2500"
    plain = encoded(Outgoing(Q, Message(b"", "m", correlation_id="talk")))
    assert (plain.properties["correlation_id"], plain.headers) == ("talk", {})


def test_a_foreign_request_is_known_by_its_correlation_id() -> None:
    request = delivered(correlation_id="call-1", message_id="m", reply_to="amq.gen-x")
    assert wire.decode(request, inbox=False, fallback="none").id == "call-1"
    answer = wire.decode(delivered(correlation_id="call-1"), inbox=True, fallback="none")
    assert (answer.causation_id, answer.correlation_id, answer.id) == ("call-1", None, "none")


def test_what_the_broker_wrote_is_not_copied() -> None:
    table = {
        "x-death": [{"queue": "a", "reason": "expired"}],
        "x-first-death-queue": "a",
        "x-delivery-count": 3,
        "CC": ["elsewhere"],
        "n": 1,
        "user": "text",
    }
    origin: Delivery[Any] = Delivery(
        Message(b"", "m"), Source(Q), None, native=delivered(table, content_encoding="gzip")
    )
    message = wire.decode(origin.native, inbox=False, fallback="f")  # type: ignore[arg-type] # Received
    assert message.headers == {"user": "text"}
    copy = encoded(Outgoing(Q, message, None, origin))
    assert copy.headers == {"user": "text", "n": 1}
    assert copy.properties["content_encoding"] == "gzip"


def test_deliveries() -> None:
    assert wire.deliveries(delivered(), counted=True) == 1
    assert wire.deliveries(delivered({"x-delivery-count": 4}), counted=True) == 5
    again = delivered()
    again.redelivered = True
    assert wire.deliveries(again, counted=False) == 2
    assert wire.deliveries(again, counted=True) == 1


@pytest.mark.parametrize(
    ("reason", "expected"), [("delivery_limit", "broker_limit"), ("maxlen", "broker_limit"), ("expired", "expired")]
)
def test_deaths_of_the_broker(reason: str, expected: str) -> None:
    when = datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)
    death = {"queue": "orders", "reason": reason, "time": when, "count": 1}
    assert wire.broker_death(delivered({"x-death": [death]})) == (expected, when.timestamp(), "orders")
    for forged in ([], ["forged"], [{"time": "forged"}]):
        assert wire.broker_death(delivered({"x-death": forged})) == ("broker_limit", None, "")


def test_reply_addresses() -> None:
    mine = inbox_name("stage.", "billing/eu", "0123456789abcdef")
    for text in (mine, "amq.gen-JzTY20BRgKO-HjmUJj0wLg"):
        assert wire.reply_address(text) == Inbox(text)
    for text in ("amq.rabbitmq.reply-to", "amq.rabbitmq.reply-to.g1.x", "orders", f"{mine}\n", "amq.gen-x/../y"):
        with pytest.raises(Refused):
            wire.reply_address(text)


# -- settling -----------------------------------------------------------------------------------------------------


def test_one_ack_for_the_prefix_and_single_ones_beyond_a_gap() -> None:
    assert acks(1, [4], 1) == link.ack_frame(1, 4, False)
    assert acks(1, [1, 2], 3) == link.ack_frame(1, 2, True)
    assert acks(1, [3, 6], 5) == link.ack_frame(1, 3, True) + link.ack_frame(1, 6, False)
    assert acks(1, [5], None) == link.ack_frame(1, 5, True)


def test_the_adapter_is_one() -> None:
    adapter: Adapter = RabbitMQAdapter(Endpoint(Url("amqp", password=Secret("hunter2")), "svc", "i", SystemClock()))
    assert adapter.native is None
    assert adapter.capabilities.adapter == "rabbitmq"
    assert "hunter2" not in repr(vars(adapter))


# -- topology -----------------------------------------------------------------------------------------------------


def _plan(*channels: Declared, version: str = "3.10.8", delays: tuple[float, ...] = ()) -> topology.Plan:
    return topology.plan(Topology(channels=channels, delays=delays), "p.", version)


def test_steps_cover_every_wait() -> None:
    steps = _plan(Declared(Q, "p.q"), delays=(0.05, 5.0)).steps
    assert {50, 1000, 2000, 4000, 5000, 4096000} <= set(steps)
    for wait in (0.001, 0.05, 0.6, 0.999, 1.0, 1.5, 4.9999, 5.0, 600.0, 86400.0, 3_000_000.123):
        left, hops = wait, 0
        while True:
            ms, last = topology.step(steps, left)
            hops += 1
            if last:
                assert left <= ms / 1000 < left + 1
                break
            assert ms / 1000 <= left
            left -= ms / 1000
        assert hops <= 13 + wait / 4096


def test_arguments_are_constants() -> None:
    q: Queue[bytes] = Queue("q")
    alone = _plan(Declared(q, "p.q"))
    letters = Declared(dead_letter_queue(q), "p.q.dlq", "dead letter")
    with_letters = _plan(Declared(q, "p.q"), letters, delays=(7.0,))
    assert alone.queues["p.q"] == with_letters.queues["p.q"]
    assert alone.queues["p.q.dlq"] == with_letters.queues["p.q.dlq"]
    assert alone.queues["p.q"].arguments == _plan(Declared(q, "p.q"), version="4.3.1").queues["p.q"].arguments
    assert alone.queues["p.q.dlq"].arguments == {"x-queue-type": "quorum"}
    assert _plan(letters, version="4.1.0").queues["p.q.dlq"].arguments["x-delivery-limit"] == -1


def test_features_of_a_channel_shape_its_queues() -> None:
    t: Topic[bytes] = Topic("t", ordered=True, priorities=4)
    made = _plan(Declared(t, "p.t"), Declared(Group(t, "g"), "p.t.g"))
    arguments = made.queues["p.t.g"].arguments
    assert arguments["x-queue-type"] == "classic"
    assert arguments["x-max-priority"] == 3
    assert arguments["x-single-active-consumer"] is True
    assert topology.Binding("p.t", "p.t.g", "#") in made.bindings


def test_what_can_not_be_is_refused() -> None:
    t: Topic[bytes] = Topic("t", delayed=True)
    with pytest.raises(ConfigError, match="before its groups"):
        _plan(Declared(Group(t, "g"), "p.t.g"))
    with pytest.raises(ConfigError, match="routing_key"):
        _plan(Declared(t, "p.x"), Declared(Q, "p.x"))
    with pytest.raises(Unsupported, match="no history"):
        _plan(Declared(t, "p.t"), Declared(Group(t, "g"), "p.t.g", start="all"))
    with pytest.raises(ConfigError, match="need an exchange"):
        _plan(Declared(Q, "p.q", options={"routing_key": "x"}))
    with pytest.raises(ConfigError, match="255 bytes"):
        _plan(Declared(Q, "ü" * 130))


# -- settings, errors, capabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "vhost"), [("", "/"), ("/", "/"), ("shop", "shop"), ("a/b", "a/b"), ("ü x", "ü x")])
async def test_urls_for_the_client(path: str, vhost: str) -> None:
    from aiormq.connection import Connection

    url = Url("amqp", (("h1", None), ("::1", 1234)), path, "us@r", Secret("p:/@%%25+w"))
    first, second = config.urls(url, config.Settings(), "svc", "publish")
    client = Connection(first)
    assert (client.vhost, client.url.user, client.url.password) == (vhost, "us@r", "p:/@%%25+w")
    assert (first.host, first.port, second.host, second.port) == ("h1", 5672, "::1", 1234)
    assert client.connection_name == "svc (publish)"
    await asyncio.sleep(0)


def test_tls_settings_need_tls() -> None:
    with pytest.raises(ConfigError, match="amqps"):
        config.tls(Url("amqp"), config.Settings(verify=False))
    with pytest.raises(ConfigError, match=r"rabbitmq\.ca_file"):
        config.tls(Url("amqps"), check_table(config.Settings, {"ca_file": "/does/not/exist"}, "rabbitmq"))
    given = check_table(config.Settings, {"heartbeat": "7", "verify": "false"}, "rabbitmq")
    assert given == config.Settings(heartbeat=7, verify=False)


def test_a_mismatch_names_the_argument_and_what_to_do() -> None:
    text = (
        "PRECONDITION_FAILED - inequivalent arg 'x-max-priority' for queue 'orders' in vhost '/': "
        "received the value '4' of type 'signedint' but current is none"
    )
    error = errors.mismatch(Exception(text), "declare queue 'orders'")
    assert isinstance(error, ConfigError)
    assert "queue 'orders' exists with x-max-priority = none, and would be declared with '4'" in str(error)
    assert "change the channel's settings to match" in str(error)
    # What another library has declared: no setting of ours makes it fit.
    text = text.replace("x-max-priority", "x-dead-letter-exchange").replace("'4'", "''")
    error = errors.mismatch(Exception(text), "declare")
    assert "settings" not in str(error)
    assert "something else has declared it" in str(error)
    assert "use another name, or delete the queue once it is empty" in str(error)


def test_capabilities_by_version() -> None:
    assert known().version is None
    assert known("3.10.8").max_body == 128 * 2**20
    assert known("4.1.0").max_body == 16 * 2**20
    assert "copy" in known("4.2.1").release.how
    assert "copy" not in known("4.3.0").release.how
    assert known("4.3.0-rc.1").adapter == "rabbitmq"
    assert all(s.how or s.level == "native" for s in known().features().values())
