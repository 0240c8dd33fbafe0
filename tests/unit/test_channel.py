"""Names of channels, and addresses as values."""

from typing import Any

import pytest

from unibus.channel import Group, Inbox, Queue, Topic, check_name, dead_letter_queue, invalid_queue, stem
from unibus.errors import ConfigError


@pytest.mark.parametrize("name", ["orders", "order.charged", "A-b_c.9", "x" * 60, "dlq", "retry", "a.retry", "0"])
@pytest.mark.parametrize("kind", [Queue, Topic])
def test_legal_names(kind: Any, name: str) -> None:
    assert kind(name).name == name
    assert check_name(name, "group") == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "use 1 to 60 of"),
        ("x" * 61, "use 1 to 60 of"),
        ("a b", "use 1 to 60 of"),
        ("a/b", "use 1 to 60 of"),
        ("grüße", "use 1 to 60 of"),
        ("orders\n", "use 1 to 60 of"),
        ("orders*", "use 1 to 60 of"),
        (None, "use 1 to 60 of"),
        (5, "use 1 to 60 of"),
        ("orders.dlq", "are reserved"),
        ("orders.invalid", "are reserved"),
        ("orders.retry.1000", "are reserved"),
    ],
)
def test_illegal_names_are_named(name: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Queue(name)
    with pytest.raises(ConfigError, match=said):
        Topic(name)
    with pytest.raises(ConfigError, match=said) as caught:
        Group(Topic("t"), name)
    assert str(caught.value).startswith(f"group name {name!r}")


@pytest.mark.parametrize("priorities", [0, 2, 10])
def test_legal_priorities(priorities: int) -> None:
    channel: Queue[bytes] = Queue("q", priorities=priorities)
    assert channel.priorities == priorities


@pytest.mark.parametrize("priorities", [-1, 1, 11])
@pytest.mark.parametrize("kind", [Queue, Topic])
def test_illegal_priorities(kind: Any, priorities: int) -> None:
    with pytest.raises(ConfigError, match=rf"'q': priorities={priorities}; use 2 to 10 levels"):
        kind("q", priorities=priorities)


@pytest.mark.parametrize("kind", [Queue, Topic])
def test_a_plain_channel_carries_bytes_and_has_no_features(kind: Any) -> None:
    channel = kind("c")
    assert channel.body is bytes
    assert not channel.ordered
    assert not channel.delayed
    assert channel.priorities == 0
    assert channel.codec is None
    assert getattr(channel, "reply", None) is None


EPHEMERAL = Group(Topic("t"), "any text: it is made by unibus", ephemeral=True)
DIFFERENT: tuple[Any, ...] = (
    Queue("a"),
    Queue("b"),
    Topic("a"),
    Group(Topic("a"), "a"),
    Group(Topic("b"), "a"),
    Inbox("a"),
    EPHEMERAL,
)


@pytest.mark.parametrize("one", DIFFERENT, ids=repr)
def test_addresses_are_different_by_kind_and_name(one: object) -> None:
    assert [other for other in DIFFERENT if other == one] == [one]
    assert len(set(DIFFERENT)) == len(DIFFERENT)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Queue("a", str),
        lambda: Topic("a", str),
        lambda: Group(Topic("a", str), "g"),
        lambda: Inbox("a"),
        lambda: Queue.derived("a.dlq"),
    ],
)
def test_equal_addresses_are_interchangeable(make: Any) -> None:
    assert make() == make()
    assert hash(make()) == hash(make())
    assert {make(): 1}[make()] == 1


def test_the_type_is_not_part_of_the_name() -> None:
    one: Queue[Any] = Queue("a", str)
    assert one == Queue("a", bytes)


BILLING = Group(Topic("order.charged"), "billing")


@pytest.mark.parametrize(
    ("address", "expected"),
    [(Queue("orders"), "orders"), (Topic("t"), "t"), (BILLING, "order.charged.billing"), (Inbox("i"), "i")],
    ids=repr,
)
def test_stem(address: Any, expected: str) -> None:
    assert stem(address) == expected


def test_derived_queues() -> None:
    assert dead_letter_queue(Queue("orders")).name == "orders.dlq"
    assert dead_letter_queue(BILLING).name == "order.charged.billing.dlq"
    assert invalid_queue(Queue("orders")).name == "orders.invalid"
    assert invalid_queue(BILLING).name == "order.charged.billing.invalid"
    derived = invalid_queue(BILLING)
    assert derived.body is bytes
    assert derived.reply is None
    assert derived == Queue.derived("order.charged.billing.invalid")


@pytest.mark.parametrize(
    ("address", "text", "shown"),
    [
        (Queue("q"), "queue 'q'", "Queue('q')"),
        (Topic("t"), "topic 't'", "Topic('t')"),
        (Group(Topic("t"), "g"), "group 'g' of topic 't'", "Group(Topic('t'), 'g')"),
        (Inbox("i"), "Inbox('i')", "Inbox('i')"),
    ],
)
def test_how_addresses_read(address: object, text: str, shown: str) -> None:
    assert str(address) == text
    assert repr(address) == shown
