"""What is pure of the SQS adapter: names, bodies, headers as one attribute, foreign messages, errors."""

from __future__ import annotations

import json
import string
from base64 import b64encode
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError
from hypothesis import given
from hypothesis import strategies as st

from unibus import ConfigError, LeaseLost, NotFound, PermissionDenied, Refused, Throttled, Unsupported
from unibus.adapter import Declared, Outgoing, Source, Topology
from unibus.channel import Group, Queue, Topic, dead_letter_queue, invalid_queue
from unibus.delivery import Delivery
from unibus.errors import AuthenticationFailed, ConnectionLost, MessageTooLarge, Timeout
from unibus.message import Message
from unibus_sqs import errors, topology, wire
from unibus_sqs.capabilities import HEADERS, LIMIT, RESERVE, known

QUEUE = Queue("q")
NAMES = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=150)
LEGAL = st.characters(exclude_categories=["Cs"])


def sent(message: Message, not_before: float | None = None, **more: Any) -> dict[str, Any]:
    """As it is received."""
    body, attributes, size = wire.encode(Outgoing(QUEUE, message, None, more.pop("origin", None)), not_before, **more)
    assert 0 < len(attributes) <= 10
    assert not wire._ILLEGAL.search(body)
    assert body
    assert size == len(body.encode()) + wire.size(attributes)
    for attribute in attributes.values():
        assert not wire._ILLEGAL.search(attribute.get("StringValue", "x"))
    return {
        "MessageId": "native",
        "Body": body,
        "MessageAttributes": attributes,
        "Attributes": {"SentTimestamp": "1500"},
    }


def foreign(body: str, attributes: dict[str, Any] | None = None, **system: str) -> Message:
    native = {"MessageId": "native", "Body": body, "MessageAttributes": attributes or {}, "Attributes": system}
    return wire.decode(native)[0]


def text(value: str, kind: str = "String") -> dict[str, str]:
    return {"DataType": kind, "StringValue": value}


# Names


@given(NAMES, NAMES)
def test_two_names_never_meet(one: str, other: str) -> None:
    name = wire.physical(one)
    assert set(name) <= set(string.ascii_letters + string.digits + "_-")
    assert len(name + ".fifo") <= 80
    assert (name == wire.physical(other)) == (one == other)


@given(NAMES)
def test_a_short_name_can_be_read_back(name: str) -> None:
    encoded = wire.physical(name)
    if len(name) <= 30:
        read, rest = "", encoded
        while rest:
            part = rest[:2] if rest[:2] in ("__", "_-") else rest[:1]
            read += {"__": "_", "_-": "."}.get(part, part)
            rest = rest[len(part) :]
        assert read == name


@given(NAMES, st.text(string.ascii_letters + string.digits + "._-", max_size=60))
def test_no_channel_is_an_inbox(name: str, prefix: str) -> None:
    stem = wire.private_stem(prefix)
    assert not wire.physical(name).startswith(stem + "reply_")
    assert wire.reply_address(stem + "reply_" + "0" * 16).name
    with pytest.raises(Refused):
        wire.reply_address(wire.physical(name))


@pytest.mark.parametrize(
    ("name", "physical"),
    [("orders", "orders"), ("my_queue", "my_queue"), ("a.b", "a_-b"), ("a_.b", "a___-b"), ("a_-b", "a__-b")],
)
def test_names_are_readable(name: str, physical: str) -> None:
    assert wire.physical(name) == physical


def test_two_channels_of_one_name_are_refused() -> None:
    twice = (Declared(Queue("a"), "same"), Declared(Queue("b", ordered=True), "same"))
    with pytest.raises(ConfigError, match=r"queue 'a' and queue 'b' would both be 'same\.fifo'"):
        topology.plan(Topology(channels=twice))


def test_a_plan_has_fifo_queues_where_order_is_asked_for() -> None:
    queue = Queue("q", ordered=True)
    topic = Topic("t", ordered=True)
    group = Group(topic, "g")
    declared = (
        Declared(queue, "p.q"),
        Declared(dead_letter_queue(queue), "p.q.dlq", "dead letter"),
        Declared(invalid_queue(queue), "p.q.invalid", "invalid"),
        Declared(topic, "p.t"),
        Declared(group, "p.t.g"),
    )
    made = topology.plan(Topology(channels=declared))
    names = [place.name for place in made.values()]
    assert names == ["p_-q.fifo", "p_-q_-dlq.fifo", "p_-q_-invalid", "p_-t.fifo", "p_-t_-g.fifo"]
    assert made[queue].letters is made[dead_letter_queue(queue)]
    assert made[dead_letter_queue(queue)].dead is made[queue]
    with pytest.raises(Unsupported):
        topology.plan(Topology(channels=(Declared(queue, "q", start="all"),)))


# Messages


@given(st.binary(max_size=300))
def test_any_body_arrives_byte_for_byte(body: bytes) -> None:
    assert wire.decode(sent(Message(body, id="i")))[0].body == body


@given(st.text(LEGAL, max_size=300), st.dictionaries(st.from_regex(r"[!-~]{1,40}", fullmatch=True), st.text(LEGAL)))
def test_any_text_and_headers_arrive(body: str, headers: dict[str, str]) -> None:
    headers = {name: value for name, value in headers.items() if not name.startswith("x-")}
    message, due = wire.decode(sent(Message(body.encode(), id="i", headers=headers, key=body or None)))
    assert (message.body, dict(message.headers), message.key, due) == (body.encode(), headers, body or None, None)


def test_legal_text_stays_readable() -> None:
    assert sent(Message(b'{"a": 1}\r\n', id="i"))["Body"] == '{"a": 1}\r\n'


def test_all_of_the_envelope_arrives() -> None:
    message = Message(b"x", "i", "t", "c", {"h": "1"}, "k", "co", "ca", "re", 1.5, 2.5)
    found, due = wire.decode(sent(message, 99.25))
    assert (found, due) == (message, 99.25)


def test_a_hundred_headers_are_one_attribute_and_promoted_ones_are_their_own() -> None:
    headers = {f"h{n}": str(n) for n in range(100)}
    native = sent(Message(b"x", id="i", type="t", headers=headers), promoted=["h1", "x-type", "missing"])
    assert set(native["MessageAttributes"]) == {"unibus", "h1", "x-type"}
    assert wire.decode(native)[0].headers == headers


@pytest.mark.parametrize("count", [9, 10])
def test_nine_binary_attributes_are_kept_and_a_tenth_is_left_out_aloud(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    binary = {f"b{n}": {"DataType": "Binary", "BinaryValue": bytes([n])} for n in range(count)}
    native: Any = {"MessageId": "m", "Body": "x", "MessageAttributes": binary}
    message, _ = wire.decode(native)
    origin: Delivery[Any] = Delivery(message, Source(QUEUE), "handle", native=native)
    again = sent(message, origin=origin)
    assert again["MessageAttributes"].keys() == {"unibus", *list(binary)[:9]}
    assert again["MessageAttributes"]["b8"] == binary["b8"]
    assert [record.getMessage() for record in caplog.records] == [
        "the copy of message m leaves out its binary attribute 'b9': SQS takes ten"
    ] * (count - 9)


def test_a_foreign_message_has_what_its_attributes_say() -> None:
    attributes = {"a": text("1"), "n": text("7", "Number"), "x-type": text("t"), "x-expires-at": text("inf")}
    message = foreign("caf\u00e9", attributes, SentTimestamp="1500", MessageGroupId="k")
    assert message == Message("caf\u00e9".encode(), "native", "t", headers={"a": "1", "n": "7"}, key="k", timestamp=1.5)


@pytest.mark.parametrize("value", ["no JSON", "[]", '{"a": 1}', '"x"', "[" * 100_000])
def test_a_foreign_attribute_of_our_name_is_a_header(value: str) -> None:
    assert dict(foreign("x", {"unibus": text(value)}).headers) == {"unibus": value}


def test_a_foreign_encoding_that_is_none_leaves_the_body() -> None:
    assert foreign("***", {"unibus-encoding": text("base64")}).body == b"***"


def test_a_notification_is_taken_out_of_its_envelope() -> None:
    inside = {"a": {"Type": "String", "Value": "1"}, "b": {"Type": "Binary", "Value": b64encode(b"\xff").decode()}}
    envelope = {"Type": "Notification", "TopicArn": "arn", "Message": "news", "MessageAttributes": inside}
    native: Any = {"MessageId": "m", "Body": json.dumps(envelope)}
    message, _ = wire.decode(native)
    assert (message.body, dict(message.headers)) == (b"news", {"a": "1"})
    assert native["Body"] == "news"  # so that a copy is not taken out twice
    assert native["MessageAttributes"]["b"] == {"DataType": "Binary", "BinaryValue": b"\xff"}


@pytest.mark.parametrize(
    "body",
    [
        '{"TopicArn": 1',
        '{"TopicArn": "a", "Type": "Other", "Message": "m"}',
        '{"Type": "Notification", "TopicArn": "", "Message": {}}',
        '{"Type": "Notification", "TopicArn": "", "Message": "", "MessageAttributes": [1]}',
        '{"Type": "Notification", "TopicArn": "", "Message": "", "MessageAttributes": {"a": 1}}',
        '{"TopicArn": ' + "[" * 100_000,
    ],
)
def test_what_only_looks_like_a_notification_stays(body: str) -> None:
    assert foreign(body).body == body.encode()


@given(st.text(min_size=1))
def test_a_group_and_a_deduplication_id_are_legal(value: str) -> None:
    for found in (wire.group_id(value), wire.dedup_id(Message(b"", id=value))):
        assert 0 < len(found) <= 128
        assert set(found) <= set(string.ascii_letters + string.digits + string.punctuation)


def test_each_life_of_a_message_has_its_own_deduplication_id() -> None:
    lives: list[dict[str, str]] = [{}, {"x-retry-count": "1"}, {"x-crash-count": "1"}, {"x-redrive-count": "1"}]
    assert len({wire.dedup_id(Message(b"", id="i", headers=life)) for life in lives}) == 4
    assert wire.dedup_id(Message(b"", id="i", headers={"other": "1"})) == "i"


def test_the_largest_body_fits_whatever_its_bytes() -> None:
    declared = known()
    assert declared.max_body is not None
    assert declared.max_header_bytes is not None
    headers = {"h": "\u00fc" * (declared.max_header_bytes // 2 - 1)}  # three times as long as JSON
    assert len(json.dumps(headers)) > HEADERS
    message = Message(b"\xff" * declared.max_body, id="i", headers={"h": "x" * (declared.max_header_bytes - 1)})
    _, _, size = wire.encode(Outgoing(QUEUE, message), None)
    assert size <= LIMIT - RESERVE


# Errors


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("QueueDoesNotExist", 400, NotFound),
        ("AWS.SimpleQueueService.NonExistentQueue", 400, NotFound),
        ("NotFound", 404, NotFound),
        ("ReceiptHandleIsInvalid", 404, LeaseLost),
        ("com.amazonaws.sqs#OverLimit", 403, Throttled),
        ("ThrottlingException", 400, Throttled),
        ("Whatever", 503, Throttled),
        ("Whatever", 400, Refused),
        ("InvalidClientTokenId", 403, AuthenticationFailed),
        ("SignatureDoesNotMatch", 403, AuthenticationFailed),
        ("AccessDenied", 403, PermissionDenied),
        ("AuthorizationError", 403, PermissionDenied),
        ("BatchRequestTooLong", 400, MessageTooLarge),
    ],
)
def test_codes(code: str, status: int, kind: type[Exception]) -> None:
    native = ClientError({"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "x")  # type: ignore[typeddict-item, unused-ignore]  # botocore may have types
    error = errors.translate(native, "send to queue 'q'")
    assert type(error) is kind
    assert str(error).startswith("send to queue 'q'")


def test_texts_decide_where_codes_do_not() -> None:
    expired = "Value x for parameter ReceiptHandle is invalid. Reason: The receipt handle has expired."
    assert type(errors.by_code("InvalidParameterValue", expired.replace("ReceiptHandle", "it"), "settle")) is LeaseLost
    too_long = {
        "Id": "0",
        "Code": "InvalidParameterValue",
        "Message": "Message must be shorter than 9",
        "SenderFault": True,
    }
    assert type(errors.of_entry(too_long, "send")) is MessageTooLarge
    assert type(errors.of_entry({"Code": "InternalError", "SenderFault": False}, "send")) is Throttled


@pytest.mark.parametrize(
    ("native", "kind"),
    [
        (EndpointConnectionError(endpoint_url="http://h"), ConnectionLost),
        (ReadTimeoutError(endpoint_url="http://h"), Timeout),
        (TimeoutError(), Timeout),
        (NoCredentialsError(), AuthenticationFailed),
        (OSError("down"), ConnectionLost),
        (KeyError("x"), Refused),
    ],
)
def test_errors_of_the_client(native: Exception, kind: type[Exception]) -> None:
    assert type(errors.translate(native, "connect")) is kind
