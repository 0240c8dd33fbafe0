"""The Kafka adapter without a broker: the envelope there and back, commit metadata, names and rungs, errors, settings."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.protocol.admin import CreateTopicsRequest
from hypothesis import given
from hypothesis import strategies as st

from unibus import errors as ours
from unibus.adapter import Declared, Endpoint, Outgoing, Secret, Source, Topology, Url
from unibus.channel import Group, Inbox, Queue, Topic, dead_letter_queue
from unibus.clock import SystemClock
from unibus.delivery import Delivery
from unibus.errors import ConfigError, Refused
from unibus.message import Message
from unibus_kafka import KafkaAdapter, config, errors, offsets, topology, wire
from unibus_kafka.capabilities import known
from unibus_kafka.link import Link, hash_of

NOW = 1_700_000_000.0
Q: Queue[bytes] = Queue("q")
TP = TopicPartition("q", 0)
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20).map("h-".__add__)


def record(key: Any = None, value: Any = b"", headers: Any = (), offset: int = 7, at: float = NOW) -> Any:
    return wire.Record("q", 0, offset, round(at * 1000), key, value, tuple(headers))


def there_and_back(message: Message, *, now: float = NOW, later: bool = False) -> Message:
    key, value, headers, at = wire.encode(Outgoing(Q, message), now, later=later)
    return wire.decode(record(key, value, headers, at=at / 1000))[0]


def read(part: offsets.Partition, numbers: Iterable[int]) -> list[int]:
    """Those of the records that there is something to do with."""
    ready, _ = part.read([record(offset=n) for n in numbers], Source(Q), NOW)
    return [offsets.offset_of(each) for each in ready]


def finish(part: offsets.Partition, *numbers: int) -> None:
    for n in numbers:
        part.finish(part.open[n])


def delivery(of: Any, failures: int = 0) -> Delivery[Any]:
    return Delivery(wire.decode(of)[0], Source(Q), None, failures, native=of)


# The envelope


@given(
    st.builds(
        Message,
        st.binary(max_size=50),
        id=TEXT.filter(bool),
        type=st.none() | TEXT,
        content_type=st.just("application/json") | TEXT.filter(bool),
        headers=st.dictionaries(NAMES, TEXT, max_size=4),
        key=st.none() | TEXT.filter(bool),
        causation_id=st.none() | TEXT,
        reply_to=st.none() | TEXT,
        timestamp=st.integers(0, 2_000_000_000_000).map(lambda ms: ms / 1000),
        expires_at=st.none() | st.integers(0, 2_000_000_000_000).map(lambda ms: ms / 1000),
    )
)
def test_a_message_survives_the_wire(message: Message) -> None:
    assert there_and_back(message) == message


def test_an_ordinary_message_has_one_header() -> None:
    message = Message(b"{}", id="m", content_type="application/json", key="k", timestamp=NOW, correlation_id="m")
    key, value, headers, at = wire.encode(Outgoing(Q, message), NOW + 1, later=False)
    assert (key, value, headers, at) == (b"k", b"{}", [("x-message-id", b"m")], round(NOW * 1000))


@pytest.mark.parametrize(("age", "later"), [(3600.0, False), (-3600.0, False), (1.0, True)])
def test_retention_does_not_count_from_an_old_stamp(age: float, later: bool) -> None:
    message = Message(b"", id="m", timestamp=NOW - age)
    _, _, headers, at = wire.encode(Outgoing(Q, message), NOW, later=later)
    assert at == round(NOW * 1000)
    assert dict(headers)["x-timestamp"] == b"%.3f" % (NOW - age)
    assert there_and_back(message, later=later).timestamp == NOW - age


def test_a_foreign_record_is_a_message() -> None:
    message, _ = wire.decode(
        record(b"\xff\x00", None, [("h", b"text"), ("h", b"last"), ("bin", b"\xff"), ("none", None)])
    )
    assert (message.id, message.body, message.content_type) == ("q/0@7", b"", None)
    assert dict(message.headers) == {"h": "last"}
    assert message.key is not None
    assert message.key.encode(errors="surrogateescape") == b"\xff\x00"
    assert wire.decode(record(b"", b"x"))[0].key is None
    assert wire.decode(record(value=b"x", headers=[("x-expires-at", b"soon")]))[0].expires_at is None
    assert wire.decode(record(value=b"x", headers=[("x-content-type", b"text/csv")]))[0].content_type == "text/csv"
    assert wire.decode(record(value=b"x", at=-0.001))[0].timestamp is None


def test_a_copy_keeps_what_the_envelope_cannot_hold() -> None:
    foreign = record(b"\xff", None, [("h", b"1"), ("h", b"2"), ("bin", b"\xff"), ("gone", b"text"), ("none", None)])
    origin = delivery(foreign)
    copy = Message(b"", id="m", key=origin.message.key, headers={"x-retry-count": "1"})
    key, value, headers, _ = wire.encode(Outgoing(Q, copy, None, origin), NOW, later=False)
    assert (key, value) == (b"\xff", None), "key and missing value as they were"
    assert headers[0] == ("x-message-id", b"m")
    assert headers[-4:] == [("h", b"1"), ("h", b"2"), ("bin", b"\xff"), ("none", None)]
    assert ("gone", b"text") not in headers, "what the core took off stays off"


@pytest.mark.parametrize(
    "text", ["", "orders:0:x", "unibus.reply.svc", "unibus.reply.svc:0:", "a b.unibus.reply.s:0:t"]
)
def test_a_return_address_is_not_trusted(text: str) -> None:
    with pytest.raises(Refused):
        wire.reply_address(text)


def test_a_reply_carries_the_token_of_its_inbox() -> None:
    topic, token = wire.inbox_topic("p.", "my service"), wire.inbox_token("my service.reply.abc")
    text = f"{topic}:3:{token}"
    assert wire.reply_address(text) == ("p.unibus.reply.my-service", 3, "my-service.reply.abc")
    key, *_ = wire.encode(Outgoing(Inbox(text), Message(b"", id="r", key="k")), NOW, later=False)
    assert key == token.encode()


def test_keys_go_where_the_java_client_puts_them() -> None:
    assert [hash_of(key) & 0x7FFFFFFF for key in (b"21", b"foobar", b"abc")] == [1173551340, 1357151166, 479470107]


# Commit metadata


def written(offset: int, highest: int, unfinished: dict[int, tuple[int, int]], *, open: bool = False) -> str:
    return offsets.encode(offset, highest, ((n, *notes) for n, notes in unfinished.items()), open=open)


COUNTS = st.integers(0, 300)


@given(
    st.integers(0, 2**40),
    st.dictionaries(st.integers(0, 5000), st.tuples(COUNTS, COUNTS), max_size=60),
    st.integers(-1, 9),
    st.booleans(),
)
def test_metadata_survives(offset: int, steps: dict[int, tuple[int, int]], beyond: int, open: bool) -> None:
    unfinished = {offset + step: notes for step, notes in sorted(steps.items())}
    highest = max(unfinished) + max(0, beyond) if unfinished else offset + beyond
    text = written(offset, highest, unfinished, open=open)
    assert len(text) <= offsets.LIMIT
    assert offsets.decode(offset, text) == (highest, unfinished, open)
    assert offsets.decode(offset + 1, text) is None, "it belongs to its offset"


def test_a_thousand_unfinished_among_a_million_fit() -> None:
    unfinished = {n * 1000: (0, 0) for n in range(1000)}
    text = written(0, 999_999, unfinished)
    assert len(text) < offsets.FULL
    assert offsets.decode(0, text) == (999_999, unfinished, False)


def test_what_does_not_fit_counts_as_unfinished() -> None:
    unfinished = {n * 1000: (0, 0) for n in range(5000)}
    text = written(0, 5_000_000, unfinished)
    found = offsets.decode(0, text)
    assert len(text) <= offsets.LIMIT
    assert found is not None
    highest, kept, _ = found
    assert kept == {n: (0, 0) for n in unfinished if n <= highest}


@pytest.mark.parametrize(
    "text", ["", "\0", "u2:", "u2:!!!\0", "u1:AAAAAAAA\0", "u2:AAAAAAAA\0", "something of another tool"]
)
def test_metadata_that_is_not_ours_is_ignored(text: str) -> None:
    assert offsets.decode(5, text) is None
    part = offsets.Partition(TP, 5, text)
    assert read(part, (5, 6)) == [5, 6]


def test_metadata_beyond_what_a_broker_takes_is_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("base64.b64decode", None)  # to call it would fail
    assert offsets.decode(0, "u2:" + "A" * offsets.LIMIT) is None


def test_a_restart_runs_nothing_again_that_had_finished() -> None:
    part = offsets.Partition(TP, 100)
    assert read(part, range(100, 110)) == list(range(100, 110))
    finish(part, 101, 103, 104, 109)
    offset, metadata = part.point()
    assert offset == 100
    again = offsets.Partition(TP, offset, metadata)
    unfinished = [100, 102, 105, 106, 107, 108]
    assert read(again, range(100, 112)) == [*unfinished, 110, 111]
    finish(again, *unfinished)
    assert again.point() == (110, "")


def test_what_was_finished_before_is_kept_until_it_is_read_again() -> None:
    first = offsets.Partition(TP, 0)
    read(first, range(1000))
    finish(first, *(n for n in range(1000) if n not in {0, 500}))
    second = offsets.Partition(TP, *first.point())
    assert read(second, range(10)) == [0]
    finish(second, 0)
    offset, metadata = second.point()
    third = offsets.Partition(TP, offset, metadata)
    assert read(third, range(offset, 1002)) == [500, 1000, 1001]


@given(st.data())
def test_any_number_of_restarts_loses_and_repeats_nothing(data: st.DataObject) -> None:
    done: list[int] = []
    start, metadata = 0, ""
    for _ in range(data.draw(st.integers(1, 5))):
        part = offsets.Partition(TP, start, metadata)
        there = range(start, data.draw(st.integers(start + 1, start + 60)))
        found = read(part, there)
        part.opened = data.draw(st.booleans())
        finished = data.draw(st.lists(st.sampled_from(found), unique=True)) if found else []
        finish(part, *finished)
        done += finished
        start, metadata = part.point()
    assert len(done) == len(set(done)), "something ran twice"
    rest = read(offsets.Partition(TP, start, metadata), range(start, 400))
    assert sorted(done + rest) == list(range(400)), "something was lost, or runs again"


def test_gaps_are_no_holes() -> None:
    """Compaction and transactions take offsets away."""
    part = offsets.Partition(TP, 0)
    read(part, range(0, 100, 10))
    finish(part, 0, 10, 20, 50)
    offset, metadata = part.point()
    again = offsets.Partition(TP, offset, metadata)
    assert (offset, read(again, range(30, 100, 10))) == (30, [30, 40, 60, 70, 80, 90])


def test_failures_in_place_survive_a_restart() -> None:
    part = offsets.Partition(TP, 0)
    records = [record(offset=n, headers=[("x-message-id", b"m"), ("x-retry-count", b"2")]) for n in range(3)]
    _, failed, given_back = part.read(records, Source(Q), NOW)[0]
    failed.failures = given_back.failures = 3  # as the core counts: two of the header, one in place
    fresh = part.again(given_back)
    assert (fresh.failures, given_back.lost) == (0, False)
    again = offsets.Partition(TP, *part.point())
    assert again.failures == {1: 1, 2: 1}
    handed = again.read(records, Source(Q), NOW)[0]
    for each in handed:
        again.begin(each, 0.0)
    assert [each.failures for each in handed] == [0, 1, 1]


def test_what_is_due_later_is_not_ready() -> None:
    part = offsets.Partition(TP, 0)
    dues = (b"%.3f" % (NOW - 1), b"%.3f" % (NOW + 1), b"soon")
    records = [record(offset=n, headers=[("x-message-id", b"m"), ("x-not-before", due)]) for n, due in enumerate(dues)]
    ready, later = part.read(records, Source(Q), NOW)
    assert [offsets.offset_of(each) for each in ready] == [0, 2]
    assert [(due, offsets.offset_of(each)) for due, each in later] == [(NOW + 1, 1)]


def life(part: offsets.Partition, records: list[Any]) -> dict[int, int | None]:
    """Hand these out, as the subscription does; how often each was started."""
    part.careful = 60.0 if part.orphan else 0.0
    ready, _ = part.read(records, Source(Q), NOW)
    said = [part.begin(each, 1.0) for each in ready]
    assert said[0], "a commit says first that somebody is at work"
    return {offsets.offset_of(each): each.deliveries for each in ready}


def test_starts_are_counted_after_an_owner_that_died() -> None:
    records = [record(offset=n) for n in range(3)]
    first = offsets.Partition(TP, 0)
    assert not first.orphan
    assert life(first, records) == {0: None, 1: None, 2: None}
    second = offsets.Partition(TP, *first.point())  # the first one died
    assert second.orphan
    assert life(second, records) == {0: 1, 1: 1, 2: 1}
    finish(second, 1)
    third = offsets.Partition(TP, *second.point())  # the second one as well
    assert third.orphan
    assert life(third, records) == {0: 2, 2: 2}


def test_starts_of_a_suspect_are_always_counted() -> None:
    suspect = record(offset=1, headers=[("x-message-id", b"m"), ("x-crash-count", b"1")])
    first = offsets.Partition(TP, 0)
    assert life(first, [record(offset=0), suspect]) == {0: None, 1: 1}
    assert offsets.Partition(TP, *first.point()).starts == {1: 1}


def test_a_start_that_ended_in_order_does_not_count() -> None:
    first = offsets.Partition(TP, 0)
    life(first, [record(offset=n) for n in range(3)])
    second = offsets.Partition(TP, *first.point())
    life(second, [record(offset=n) for n in range(3)])
    finish(second, 0)
    second.again(second.open[1])
    second.end(second.open.values())
    third = offsets.Partition(TP, *second.point())
    assert (third.next, third.orphan, third.starts) == (1, False, {})


def test_an_open_commit_of_nothing_but_unread_records_finishes_none() -> None:
    first = offsets.Partition(TP, 0)
    life(first, [record(offset=0)])
    finish(first, 0)
    second = offsets.Partition(TP, *first.point())
    assert second.orphan
    assert read(second, range(1, 4)) == [1, 2, 3]


# Names


def places(*channels: Declared) -> topology.Plan:
    return topology.plan(Topology(channels=channels), config.Settings())


def test_delays_go_to_the_longest_rung_that_is_not_too_long() -> None:
    place = places(Declared(Q, "p.q")).places[Q]
    topics = [place.route(wait) for wait in (-1, 9.9, 10, 59, 60, 599, 3599, 1e6)]
    names = ["p.q", "p.q", *(f"p.q.retry.{ms}" for ms in (10000, 10000, 60000, 60000, 600000, 3600000))]
    assert topics == [(name, ".retry." in name) for name in names]


def test_a_group_has_topics_of_its_own_for_what_only_it_shall_get() -> None:
    topic: Topic[bytes] = Topic("t", delayed=True)
    group = Group(topic, "g")
    letters = dead_letter_queue(group)
    plan = places(Declared(topic, "t"), Declared(group, "t.g"), Declared(letters, "t.g.dlq", "dead letter"))
    place = plan.places[group]
    assert place.route(-1) == ("t.g.retry.0", False)
    assert place.route(100) == ("t.g.retry.60000", True)
    assert [t for t in place.topics if not t.startswith("t.g.")] == [
        "t",
        *(f"t.retry.{n}" for n in (10000, 60000, 600000, 3600000)),
    ]
    assert plan.groups["t.g"][2] == "t.g.dlq"
    assert plan.places[letters].topics == {"t.g.dlq": 0.0}


def test_an_ordered_channel_needs_no_rungs() -> None:
    ordered: Queue[bytes] = Queue("o", ordered=True)
    assert list(places(Declared(ordered, "o")).topics) == ["o"]


def test_names_that_kafka_refuses_are_refused_at_start() -> None:
    with pytest.raises(ConfigError, match=r"'a\.b' and topic 'a_b'"):
        places(Declared(Queue("a.b"), "a.b"), Declared(Queue("a_b"), "a_b"))
    with pytest.raises(ConfigError, match="249"):
        places(Declared(Q, "q" * 250))
    with pytest.raises(ConfigError, match="before its groups"):
        places(Declared(Group(Topic("t"), "g"), "t.g"))


# Errors and settings


@pytest.mark.parametrize(
    ("native", "expected"),
    [
        (kafka.UnknownTopicOrPartitionError(), ours.NotFound),
        (kafka.TopicAuthorizationFailedError("t"), ours.PermissionDenied),
        (kafka.GroupAuthorizationFailedError("g"), ours.PermissionDenied),
        (kafka.SaslAuthenticationFailed("no"), ours.AuthenticationFailed),
        (kafka.MessageSizeTooLargeError(), ours.MessageTooLarge),
        (kafka.CommitFailedError(), ours.LeaseLost),
        (kafka.RequestTimedOutError(), ours.Timeout),
        (TimeoutError(), ours.Timeout),
        (ConnectionRefusedError("no"), ours.ConnectionLost),
        (kafka.KafkaConnectionError("no"), ours.ConnectionLost),
        (kafka.OutOfOrderSequenceNumber(), ours.ConnectionLost),
        (kafka.NotLeaderForPartitionError(), ours.ConnectionLost),
        (kafka.PolicyViolationError(), ours.Refused),
        (ValueError("x"), ours.Refused),
    ],
)
def test_errors_are_translated(native: BaseException, expected: type[Exception]) -> None:
    error = errors.translate(native, "send to 'q'")
    assert type(error) is expected
    assert str(error).startswith("send to 'q': ")


@pytest.mark.parametrize(
    ("native", "needed"),
    [
        (kafka.TopicAuthorizationFailedError("t"), "needs Write on topic 't'"),
        (kafka.TopicAuthorizationFailedError({"b", "a"}), "needs Write on topic 'a', 'b'"),
        (kafka.GroupAuthorizationFailedError("g"), "needs Write on group 'g'"),
        (kafka.GroupAuthorizationFailedError(), "needs Write on group"),
        (kafka.ClusterAuthorizationFailedError(), "needs IdempotentWrite on the cluster, or "),
    ],
)
def test_a_right_that_is_missing_is_named(native: BaseException, needed: str) -> None:
    error = errors.translate(native, "send to 'q'", "Write")
    assert str(error).startswith(f"send to 'q': not authorized; this user {needed}")


async def test_a_cluster_that_has_no_broker_for_a_moment_is_asked_again() -> None:
    """On a busy machine the controller misses the heartbeats of its brokers, and refuses topics until it hears of them."""
    fenced = "Unable to replicate the partition 1 time(s): All brokers are currently fenced."
    answers = [[("q", 38, fenced), ("r", 38, fenced)], [("q", 36, "it exists"), ("r", 0, None)]]

    class Client:  # what the server says; the rest is for a real broker
        cluster = SimpleNamespace(
            controller=SimpleNamespace(nodeId=1),
            brokers=lambda: [SimpleNamespace(nodeId=1)],
            partitions_for_topic=lambda _: None if answers else {0},
            leader_for_partition=lambda _: 1,
        )
        _topics = frozenset({"q", "r"})

        async def force_metadata_update(self) -> None: ...

        async def send(self, node: int, request: Any) -> Any:
            if isinstance(request, CreateTopicsRequest):
                return SimpleNamespace(topic_errors=answers.pop(0))
            return SimpleNamespace(topics=[] if answers else [(0, "q", False, [0]), (0, "r", False, [0])])

    made: Any = object.__new__(Link)
    made._client = Client()
    await made.create({"q": config.TopicOptions(), "r": config.TopicOptions()})
    assert answers == []


def endpoint(**settings: object) -> Endpoint:
    url = Url("kafka", (("k1", None), ("k2", 9999)), username="me", password=Secret("hush"))
    return Endpoint(url, "svc", "i1", SystemClock(), settings=settings)


def test_a_password_is_not_sent_in_the_clear_unless_asked_for() -> None:
    made = endpoint()
    options = config.client(made.url, config.settings({}), None, "svc")
    assert options["sasl_mechanism"] == "SCRAM-SHA-512"
    assert options["bootstrap_servers"] == ["k1:9092", "k2:9999"]
    asked = config.client(made.url, config.settings({"sasl_mechanism": "PLAIN"}), None, "svc")
    assert (asked["sasl_mechanism"], asked["security_protocol"]) == ("PLAIN", "SASL_PLAINTEXT")
    assert "hush" not in repr(KafkaAdapter(made))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"kafka\.partition: unknown key"):
        KafkaAdapter(endpoint(partition=3))
    with pytest.raises(ConfigError, match=r"queues\.q\.kafka\.partitions"):
        places(Declared(Q, "q", options={"partitions": 0}))
    with pytest.raises(ConfigError, match="needs a user"):
        config.client(Url("kafka", (("k", None),)), config.settings({"sasl_mechanism": "PLAIN"}), None, "svc")


def test_capabilities_follow_the_largest_request() -> None:
    assert known().max_body == 1_000_000
    assert KafkaAdapter(endpoint(max_request_size="2097152")).capabilities.max_body == 2_048_576
