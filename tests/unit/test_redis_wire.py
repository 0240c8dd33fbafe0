"""Redis: entries and envelopes, names of keys, settings; without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from unibus import ConfigError, Message, Queue, Topic, Unsupported
from unibus.adapter import Declared, Outgoing, Source, Topology
from unibus.channel import Group, Inbox, dead_letter_queue, invalid_queue
from unibus.channel import Queue as AnyQueue
from unibus.delivery import Delivery
from unibus.errors import (
    AuthenticationFailed,
    ConnectionLost,
    LeaseLost,
    NotFound,
    PermissionDenied,
    Refused,
    Throttled,
)
from unibus.inboxes import inbox_name
from unibus.url import parse
from unibus_redis import config, errors, topology, wire
from unibus_redis.capabilities import known
from unibus_redis.wire import Entry

NOW = 1_700_000_000.0
ORDERS = Queue("orders")
FULL = Message(
    b"\0\xff body",
    "id-1",
    "order",
    "application/json",
    {"tenant": "acme", "x-retry-count": "2"},
    "c42",
    "corr",
    "cause",
    "unibus:reply:svc:0123456789abcdef",
    NOW - 500,
    NOW + 60,
)


def entry(*fields: bytes, id: bytes = b"1700000000000-7", key: str = "orders") -> Entry:
    return Entry(key, [id, list(fields)], 1, 0.0)


def sent(message: Message, **more: Any) -> Entry:
    fields = wire.encode(Outgoing(ORDERS, message, **more), NOW)
    return entry(*(part.encode() if isinstance(part, str) else part for part in fields))


def test_an_envelope_comes_back_as_it_was() -> None:
    assert wire.decode(sent(FULL)) == FULL


def test_nothing_is_written_that_has_its_default() -> None:
    there = sent(Message(b"x", "id-1", timestamp=NOW - 0.2))
    assert there.fields[::2] == [b"body", b"headers"]
    assert json.loads(there.fields[3]) == {"x-message-id": "id-1"}
    assert wire.decode(there).timestamp == NOW, "the time of the entry"


def test_a_copy_keeps_the_time_of_the_first_sending() -> None:
    origin: Delivery[bytes] = Delivery(Message(b"x"), Source(ORDERS), None)
    for more in ({"origin": origin}, {"not_before": NOW + 5}):
        assert wire.decode(sent(Message(b"x", "id-1", timestamp=NOW - 0.2), **more)).timestamp == NOW - 0.2


def test_an_entry_without_body_is_the_json_of_its_fields() -> None:
    message = wire.decode(entry(b"total", b"5", b"caf\xc3\xa9", b"\xff", b"headers", b"mine"))
    assert json.loads(message.body) == {"total": "5", "café": "\udcff", "headers": "mine"}
    assert message.content_type == "application/json"
    assert message.id == "orders@1700000000000-7"


@pytest.mark.parametrize("headers", [b"", b"text", b"[1]", b'{"a"', b"\xff", b"[" * 100_000])
def test_foreign_headers_that_are_no_json_object_are_a_field_like_others(headers: bytes) -> None:
    message = wire.decode(entry(b"body", b"x", b"headers", headers))
    assert (message.body, message.id) == (b"x", "orders@1700000000000-7")
    assert dict(message.headers) == ({} if headers == b"\xff" else {"headers": headers.decode()})


def test_foreign_fields_are_headers_where_they_are_text_and_copied_where_not() -> None:
    foreign = entry(
        *(
            b"body",
            b"x",
            b"tenant",
            b"acme",
            b"raw",
            b"\xff",
            b"x-key",
            b"no",
            b"headers",
            b'{"n": 5, "h": "v", "x-expires-at": "soon"}',
        )
    )
    message = wire.decode(foreign)
    assert dict(message.headers) == {"tenant": "acme", "h": "v"}
    assert (message.key, message.expires_at) == (None, None)
    origin: Delivery[bytes] = Delivery(message, Source(ORDERS), None, native=foreign)
    again = sent(message, origin=origin)
    pairs = dict(zip(again.fields[::2], again.fields[1::2], strict=True))
    assert pairs[b"raw"] == b"\xff"
    assert json.loads(pairs[b"headers"])["n"] == 5
    assert dict(wire.decode(again).headers) == {"tenant": "acme", "h": "v"}


def test_what_is_larger_than_headers_may_be_is_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_MOST", 100)
    headers = b'{"tenant":"' + b"x" * 100 + b'"}'
    large = entry(b"body", b"b", b"headers", headers, b"more", b"y" * 100, b"h", b"v")
    monkeypatch.setattr(wire, "_load", None)  # to call it would fail
    assert dict(wire.decode(large).headers) == {"h": "v"}
    assert large.foreign() == ([b"more", b"y" * 100], {})


def test_a_delay_is_rounded_up() -> None:
    assert wire.delay(Outgoing(ORDERS, Message(b"")), NOW) == ""
    assert wire.delay(Outgoing(ORDERS, Message(b""), NOW), NOW) == ""
    delay = wire.delay(Outgoing(ORDERS, Message(b""), NOW + 0.0101), NOW)
    assert isinstance(delay, int)
    assert 11 < delay <= 13


@pytest.mark.parametrize(
    "text",
    ["orders", "unibus:reply:x", "{orders}:unibus:reply:s:0123456789abcdef", "p.unibus:reply:s:0123456789ABCDEF", ""],
)
def test_a_reply_address_can_only_be_an_inbox(text: str) -> None:
    with pytest.raises(Refused):
        wire.reply_address(text)


def test_an_inbox_that_was_made_is_a_reply_address() -> None:
    name = inbox_name("staging.", "billing/ü", "0123456789abcdef", wire.SEPARATOR)
    assert wire.reply_address(name) == Inbox(name)


# Keys


def declared(*addresses: Any, prefix: str = "p.") -> Topology:
    channels = []
    for address in addresses:
        name = f"{prefix}{address.topic.name}.{address.name}" if isinstance(address, Group) else prefix + address.name
        channels.append(Declared(address, name))
        if not isinstance(address, Topic):
            for queue, role in ((dead_letter_queue(address), "dead letter"), (invalid_queue(address), "invalid")):
                channels.append(Declared(queue, prefix + queue.name, role))  # type: ignore[arg-type]  # the two literals
    return Topology(channels=tuple(channels))


def test_all_that_belongs_to_a_channel_has_its_hash_tag() -> None:
    topic = Topic("charged", priorities=2)
    group = Group(topic, "billing")
    places = topology.plan(declared(ORDERS, topic, group), NOW, 0)
    assert places[ORDERS].streams == ("p.orders",)
    assert places[dead_letter_queue(ORDERS)].streams == ("{p.orders}.dlq",)
    assert places[topic].streams == ("p.charged", "{p.charged}:p1")
    assert places[group].lanes == (
        *("{p.charged}.billing:p1", "{p.charged}:p1"),
        *("{p.charged}.billing", "p.charged"),
    )
    assert places[dead_letter_queue(group)].streams == ("{p.charged}.billing.dlq",)
    assert places[group].delayed == ("{p.charged}:delayed", "{p.charged}:delayed:messages")


def test_dead_letters_have_one_key_with_or_without_their_queue() -> None:
    letters = dead_letter_queue(ORDERS)
    alone = topology.plan(Topology(channels=(Declared(letters, "p.orders.dlq", "dead letter"),)), NOW, 0)
    assert alone[letters] == topology.plan(declared(ORDERS), NOW, 0)[letters]


def test_a_group_of_another_name_stays_with_its_topic() -> None:
    topic = Topic("charged")
    group = Group(topic, "billing")
    places = topology.plan(Topology(channels=(Declared(topic, "charged"), Declared(group, "old"))), NOW, 0)
    assert (places[group].group, places[group].streams) == ("old", ("{charged}/old",))


@pytest.mark.parametrize("name", ["a{b}", "a\nb"])
def test_names_that_break_a_key_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="character"):
        topology.plan(Topology(channels=(Declared(ORDERS, name),)), NOW, 0)


def test_one_key_is_one_channel() -> None:
    with pytest.raises(ConfigError, match="'same'"):
        topology.plan(Topology(channels=(Declared(ORDERS, "same"), Declared(Topic("t"), "same"))), NOW, 0)


def test_order_and_priorities_exclude_each_other() -> None:
    with pytest.raises(Unsupported, match="order of a key"):
        topology.plan(declared(AnyQueue("q", ordered=True, priorities=2)), NOW, 0)


def test_a_group_starts_no_earlier_than_the_topic_keeps() -> None:
    topic = Topic("t")
    group = Group(topic, "g")

    def start(at: Any, retention: float) -> str:
        channels = (Declared(topic, "t"), Declared(group, "t.g", start=at))
        return topology.plan(Topology(channels=channels), NOW, retention)[group].start

    assert start("new", 0) == "$"
    assert start("all", 60) == "0"
    assert start(NOW - 30, 60) == f"{int(NOW - 30) * 1000 - 1}-18446744073709551615"
    for at, retention in (("all", 0), (NOW - 90, 60)):
        with pytest.raises(Unsupported, match=r"redis\.retention"):
            start(at, retention)
    assert not known().replay
    assert known(retention=60).replay


# Settings and errors


def test_a_connection_prints_no_password() -> None:
    url = parse("redis://u:hunter2@h1,h2:7000/3")
    login = config.login(url, config.settings({}), "billing/ü")
    assert login.commands() == [
        ("AUTH", "u", "hunter2"),
        ("SELECT", 3),
        ("CLIENT", "SETNAME", "billing--"),
        ("CLIENT", "ID"),
    ]
    assert "hunter2" not in repr(login)


def test_what_is_not_there_is_not_sent() -> None:
    bare = config.login(parse("redis://h"), config.settings({}), "svc")
    assert bare.commands() == [("CLIENT", "SETNAME", "svc"), ("CLIENT", "ID")]
    assert config.login(parse("redis://:pw@h"), config.settings({}), "svc").commands()[0] == ("AUTH", "pw")


@pytest.mark.parametrize(
    ("url", "table", "text"),
    [
        ("redis://h/x", {}, "number of its database"),
        ("redis://h", {"ca_file": "/ca.pem"}, "use rediss://"),
        ("redis://h", {"lease": "0"}, "redis.lease"),
        ("rediss://h", {"ca_file": "/no/such.pem"}, r"redis\.ca_file: no such file"),
        ("redis://h", {"leese": "1"}, "did you mean 'lease'"),
    ],
)
def test_wrong_settings_are_named(url: str, table: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config.login(parse(url), config.settings(table), "svc")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("NOTFOUND", NotFound),
        ("NOGROUP No such key 'q' or consumer group 'g' script: 12ab, on @user_script:3.", NotFound),
        ("LEASELOST", LeaseLost),
        ("WRONGTYPE q", Refused),
        ("WRONGPASS invalid username-password pair or user is disabled.", AuthenticationFailed),
        ("ERR AUTH <password> called without any password configured for the default user.", AuthenticationFailed),
        ("MOVED 3999 127.0.0.1:6381", ConnectionLost),
        ("ASK 3999 127.0.0.1:6381", Throttled),
        ("READONLY You can't write against a read only replica.", ConnectionLost),
        ("ERR WAIT cannot be used with replica instances.", ConnectionLost),
        ("OOM command not allowed when used memory > 'maxmemory'.", Throttled),
        ("ERR ACL failure in script: User u has no permissions to run the 'xadd' command", PermissionDenied),
        ("ERR something new", Refused),
    ],
)
def test_error_replies_have_one_meaning_each(text: str, kind: type[Exception]) -> None:
    error = errors.refusal(text, "send to queue 'orders'")
    assert type(error) is kind
    assert "queue 'orders'" in str(error)
    assert "script: 12ab" not in str(error)
