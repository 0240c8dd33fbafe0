"""What drivers share: places, results and refusals."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from unibus.adapter import Outcome, Outgoing, Results, Source
from unibus.channel import Group, Inbox, Queue, Topic
from unibus.delivery import Delivery
from unibus.driver import (
    NoLease,
    NoMove,
    OnlyLooks,
    all_there,
    as_result,
    by,
    held,
    lease_lost,
    linked,
    no_history,
    nobody,
    only_one,
    place_of,
    quiet,
    send_all,
    topic_of,
)
from unibus.errors import ConfigError, ConnectionLost, LeaseLost, NotFound, Timeout, UnknownChannel, Unsupported
from unibus.message import Message

Q: Queue[bytes] = Queue("orders")
T: Topic[bytes] = Topic("charged")


def delivery(position: str = "q@1") -> Delivery[Any]:
    return Delivery(Message(b"", "m"), Source(Q), None, position=position)


def test_a_place_is_found_or_the_nearest_name_is_told() -> None:
    assert place_of({Q: 1}, Q) == 1
    with pytest.raises(UnknownChannel, match="did you mean 'orders'"):
        place_of({Q: 1}, Queue("order"))


def test_a_topic_comes_before_its_groups() -> None:
    assert topic_of({T: 1}, Group(T, "g")) == 1
    with pytest.raises(ConfigError, match="before its groups"):
        topic_of({}, Group(T, "g"))


def test_a_link_is_there_and_up() -> None:
    class Link:
        lost: ConnectionLost | None = None

    link = Link()
    assert linked(link, "X") is link
    with pytest.raises(ConnectionLost, match="not connected to X"):
        linked(None, "X")
    link.lost = ConnectionLost("the cable")
    with pytest.raises(ConnectionLost) as caught:
        linked(link, "X")
    assert caught.value is link.lost


def test_all_that_is_missing_is_one_error() -> None:
    all_there("X", [])
    with pytest.raises(NotFound) as caught:
        all_there("X", iter(["a", "b", "a"]))
    assert str(caught.value) == "missing on X: a, b; create them with `unibus declare`"


def test_a_name_on_the_broker_is_one_address() -> None:
    taken: dict[str, object] = {}
    for _ in range(2):  # declared twice is no fault
        only_one(taken, "orders", Q, "the key")
    only_one(taken, "charged", T, "the key")
    with pytest.raises(
        ConfigError, match=r"^queue 'orders' and topic 'charged' would both be the key; rename one of them$"
    ):
        only_one(taken, "orders", T, "the key")


def test_a_client_library_is_quiet_unless_it_was_asked_to_speak() -> None:
    silent, asked = (logging.getLogger(f"test_driver.{name}") for name in ("silent", "asked"))
    asked.setLevel(logging.DEBUG)
    quiet(logging.INFO, silent.name, asked.name)
    assert (silent.level, asked.level) == (logging.INFO, logging.DEBUG)


def test_what_nobody_gets_says_why() -> None:
    assert str(nobody(T)) == "topic 'charged' has no group"
    assert str(nobody(Inbox("unibus.reply.a.1"))) == "the inbox 'unibus.reply.a.1' is gone"


def test_a_broker_without_history_begins_now() -> None:
    no_history("X", Q, "new")
    for start in ("all", 12.0):
        with pytest.raises(Unsupported, match="X keeps no history"):
            no_history("X", Q, start)


def test_what_is_not_held_or_named_twice_is_lost() -> None:
    mine, other = delivery("q@1"), delivery("q@2")
    results, indices = held([other, mine, mine], lambda d: d is mine, "gone")
    assert indices == [1]
    assert results[1] is None
    for lost, where in ((results[0], "q@2"), (results[2], "q@1")):
        assert isinstance(lost, LeaseLost)
        assert str(lost) == f"{where}: settled before, or gone" == str(lease_lost(delivery(where), "gone"))


def test_a_batch_is_split_by_destination() -> None:
    assert list(by([0, 2, 3, 1], lambda i: "abba"[i]).items()) == [("a", [0, 3]), ("b", [2, 1])]


def test_each_message_has_an_error_of_its_own() -> None:
    error = Timeout("late")
    result = as_result(error)
    assert type(result) is Timeout
    assert result is not error
    assert result.__cause__ is error
    assert str(as_result(UnknownChannel("x"))) == str(UnknownChannel("x"))


async def test_a_lost_link_is_the_result_of_each() -> None:
    async def send(batch: Sequence[Outgoing], timeout: float) -> Results:
        if timeout:
            return [None] * len(batch)
        raise ConnectionLost("gone")

    batch = [Outgoing(Q, Message(b""))] * 2
    assert await send_all(send, batch, 1.0) == [None, None]
    assert [type(error) for error in await send_all(send, batch, 0.0)] == [ConnectionLost] * 2


async def test_the_halves_that_a_broker_lacks_refuse() -> None:
    class Plain(NoMove, NoLease):
        address = Q

    class Looking(OnlyLooks):
        address = Q

    with pytest.raises(Unsupported, match=r"orders.*no atomic move"):
        await Plain().move([], 1)
    with pytest.raises(Unsupported, match=r"orders.*no lease"):
        await Plain().extend([], 1)
    looking = Looking()
    for refused in (looking.settle(Outcome.ACCEPTED, []), looking.move([], 1), looking.extend([], 1)):
        with pytest.raises(Unsupported, match=r"orders.*only looked at"):
            await refused
