"""Sending: group commit, splitting, the failed part again, deadlines, cancelled callers, order by key, the end."""

import asyncio
import itertools
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
from tests.unit.core_lab import DONE, EVENTS, ORDERED, ORDERS, Spy, lab, later, make_bus, spy_of, turns, until

from unibus import (
    Closed,
    CodecError,
    ConfigError,
    ConnectionLost,
    Message,
    MessageTooLarge,
    NotFound,
    Refused,
    SendFailed,
    Throttled,
    Timeout,
    TransportError,
    UnknownChannel,
    Unsupported,
)
from unibus.adapter import Health, Outgoing, Results
from unibus.testing import Lab


def start(call: Coroutine[Any, Any, Any]) -> "asyncio.Future[Any]":
    return asyncio.ensure_future(call)


async def all_of(calls: Sequence["asyncio.Future[Any]"]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


def bodies(it: Lab, channel: Any = ORDERS) -> list[str]:
    return [m.body.decode() for m in it.broker.waiting(channel)]


async def test_what_comes_together_goes_in_one_call() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        ids = await asyncio.gather(*(bus.send(ORDERS, str(n)) for n in range(100)))
        assert [len(batch) for batch in spy_of(bus).batches] == [100]
        assert [m.id for m in it.broker.waiting(ORDERS)] == ids


async def test_while_one_call_is_in_flight_the_next_collects() -> None:
    bus = make_bus()
    async with lab(bus):
        spy = spy_of(bus)
        spy.gate.clear()
        calls = []
        for n in range(6):
            calls.append(start(bus.send(ORDERS, str(n))))
            await turns(3)
        assert spy.sent() == [["0"]]
        spy.gate.set()
        await all_of(calls)
        assert spy.sent() == [["0"], ["1", "2", "3", "4", "5"]]


async def test_one_destination_does_not_wait_for_another() -> None:
    bus = make_bus()
    async with lab(bus):
        await asyncio.gather(bus.send(ORDERS, "a"), bus.send(DONE, "b"))
        assert spy_of(bus).sent() == [["a"], ["b"]]
        assert spy_of(bus).most_flying == 2


async def test_a_call_holds_no_more_messages_than_the_adapter_takes() -> None:
    bus = make_bus()
    async with lab(bus, send_batch=3) as it:
        await bus.send_many(ORDERS, [str(n) for n in range(8)])
        assert spy_of(bus).sent() == [["0", "1", "2"], ["3", "4", "5"], ["6", "7"]]
        assert bodies(it) == [str(n) for n in range(8)]


async def test_a_call_holds_no_more_bytes_than_the_adapter_takes() -> None:
    bus = make_bus()
    async with lab(bus, send_bytes=10):
        await bus.send_many(ORDERS, ["aaaa", "bbbb", "cccc", "d" * 30, "e"])
        assert spy_of(bus).sent() == [["aaaa", "bbbb"], ["cccc"], ["d" * 30], ["e"]]


async def test_headers_and_key_count_as_bytes() -> None:
    bus = make_bus()
    async with lab(bus, send_bytes=10):
        await asyncio.gather(
            bus.send(ORDERS, "a", headers={"h": "12345"}), bus.send(ORDERS, "b", key="key"), bus.send(ORDERS, "c")
        )
        assert spy_of(bus).sent() == [["a"], ["b", "c"]]


async def test_as_many_full_calls_at_once_as_the_adapter_likes() -> None:
    bus = make_bus()
    async with lab(bus, send_batch=2, flights=3):
        spy = spy_of(bus)
        spy.gate.clear()
        call = start(bus.send_many(ORDERS, [str(n) for n in range(9)]))
        await turns()
        assert spy.sent() == [["0", "1"], ["2", "3"], ["4", "5"]]
        spy.gate.set()
        await call
        assert spy.most_flying == 3


async def test_only_the_part_that_failed_is_sent_again() -> None:
    bus = make_bus()

    async with lab(bus) as it:
        spy = spy_of(bus)
        it.broker.refuse(ORDERS, Throttled("slow down"), times=2)  # the first two of the batch
        call = start(bus.send_many(ORDERS, ["1", "2", "3"]))
        await turns()
        assert not call.done()
        assert bodies(it) == ["3"]
        await later(it, 1)
        assert len(await call) == 3
        assert spy.sent() == [["1", "2", "3"], ["1", "2"]]


async def test_back_off_grows_and_a_success_ends_it() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        spy = spy_of(bus)
        it.broker.refuse(ORDERS, Throttled("slow down"), times=5)
        call = start(bus.send(ORDERS, "x"))
        times: list[float] = []
        while not call.done():
            await turns()
            times += [it.clock.monotonic()] * (len(spy.batches) - len(times))
            it.clock.move(it.clock.next_due() or 0)
        waits = [b - a for a, b in itertools.pairwise(times)]
        assert len(waits) == 5
        assert waits[0] == pytest.approx(0.1, rel=0.26)
        assert all(late > early for early, late in itertools.pairwise(waits))
        await call
        it.broker.refuse(ORDERS, Throttled("slow down"), times=1)
        call = start(bus.send(ORDERS, "y"))
        await later(it, 0.13)
        await call  # the first wait again, not the sixth


async def test_later_messages_do_not_overtake_what_is_sent_again() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        it.broker.refuse(ORDERS, Throttled("slow down"), times=1)
        first = start(bus.send(ORDERS, "1"))
        await turns()
        second = start(bus.send(ORDERS, "2"))
        await turns()
        assert bodies(it) == []
        await later(it, 1)
        await all_of([first, second])
        assert bodies(it) == ["1", "2"]


async def test_a_final_error_is_the_callers_at_once() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        it.broker.refuse(ORDERS, Refused("no"), times=1)
        with pytest.raises(Refused, match="no"):
            await bus.send(ORDERS, "x")
        it.broker.delete(ORDERS)
        with pytest.raises(NotFound, match="orders"):
            await bus.send(ORDERS, "x")
        assert len(spy_of(bus).batches) == 2


async def test_three_messages_of_one_id_to_a_missing_queue_are_three_errors() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        it.broker.delete(ORDERS)
        calls = [start(bus.send(ORDERS, Message("x", id="same"))) for _ in range(3)]
        results = await all_of(calls)
        assert [type(r) for r in results] == [NotFound] * 3
        with pytest.raises(SendFailed) as caught:
            await bus.send_many(ORDERS, [Message("x", id="same") for _ in range(3)])
        assert sorted(caught.value.failed) == [0, 1, 2]


async def test_the_deadline_says_message_place_and_last_error() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        it.broker.refuse(ORDERS, Throttled("too many"))
        call = start(bus.send(ORDERS, "secret body", timeout=3))
        await later(it, 3)
        with pytest.raises(Timeout) as caught:
            await call
        text = str(caught.value)
        assert "queue 'orders'" in text
        assert "not confirmed in time" in text
        assert "may or may not be there" in text
        assert "too many" in text
        assert "secret" not in text
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value.__cause__, Throttled)


async def test_the_deadline_of_a_call_that_never_returns() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        spy = spy_of(bus)
        spy.gate.clear()
        quick, slow = start(bus.send(ORDERS, "q", timeout=1)), start(bus.send(ORDERS, "s", timeout=9))
        await later(it, 1)
        assert (quick.done(), slow.done()) == (True, False)
        spy.gate.set()
        await slow
        with pytest.raises(Timeout):
            await quick


async def test_the_deadline_names_the_alarm_by_which_the_broker_takes_no_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bus = make_bus()
    async with lab(bus) as it:
        spy = spy_of(bus)

        async def blocked() -> Health:
            return Health(True, "the broker blocks publishing: low on memory")

        monkeypatch.setattr(spy, "check", blocked)
        spy.gate.clear()
        first, behind = start(bus.send(ORDERS, "1", timeout=1)), start(bus.send(ORDERS, "2", timeout=2))
        await later(it, 2)
        for call in (first, behind):
            with pytest.raises(Timeout, match=r"not confirmed in time.*; the broker blocks publishing: low on memory"):
                await call
        spy.gate.set()


@pytest.mark.parametrize("answer", [ConnectionLost("gone"), None])
async def test_the_deadline_needs_no_word_from_the_broker(
    monkeypatch: pytest.MonkeyPatch, answer: Exception | None
) -> None:
    bus = make_bus()
    async with lab(bus) as it:
        spy = spy_of(bus)

        async def silent() -> Health:
            if answer is not None:
                raise answer
            await asyncio.Event().wait()
            raise AssertionError

        monkeypatch.setattr(spy, "check", silent)
        spy.gate.clear()
        call = start(bus.send(ORDERS, "1", timeout=1))
        await later(it, 2)
        with pytest.raises(Timeout, match=r"not confirmed in time; it may or may not be there$"):
            await call
        spy.gate.set()


async def test_the_deadline_without_a_link_says_so() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        it.broker.cut(down=True)
        call = start(bus.send(ORDERS, "x", timeout=5))
        await later(it, 5)
        with pytest.raises((Timeout, ConnectionLost), match=r"cut|down|no link"):
            await call
        it.broker.down = False


async def test_a_cancelled_caller_takes_its_message_along_if_it_is_not_on_its_way() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        spy = spy_of(bus)
        spy.gate.clear()
        flying = start(bus.send(ORDERS, "flying"))
        await turns()
        waiting, other = start(bus.send(ORDERS, "waiting")), start(bus.send(ORDERS, "other"))
        many = start(bus.send_many(ORDERS, ["many", "more"]))
        await turns()
        for call in (flying, waiting, many):
            call.cancel()
        await turns()
        spy.gate.set()
        await other
        assert bodies(it) == ["flying", "other"]  # the first was on its way already


async def test_a_cancelled_message_lets_the_next_of_its_key_go() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        spy = spy_of(bus)
        spy.gate.clear()
        calls = [start(bus.send(ORDERED, str(n), key="k")) for n in range(4)]
        await turns()
        calls[1].cancel()
        calls[2].cancel()
        await turns()
        spy.gate.set()
        await all_of(calls)
        assert bodies(it, ORDERED) == ["0", "3"]


async def test_two_messages_of_a_key_are_never_on_their_way_together() -> None:
    bus = make_bus()
    async with lab(bus, flights=8) as it:
        keys = ["a", "b", "c"]
        sends = [start(bus.send(ORDERED, f"{keys[n % 3]}{n}", key=keys[n % 3])) for n in range(30)]
        sends.append(start(bus.send_many(ORDERED, ["x1", "x2"])))  # without a key: no order to keep
        it.broker.refuse(ORDERED, Throttled("slow"), times=4)
        await later(it, 1)
        results = await all_of(sends)
        assert [r for r in results[:30] if not isinstance(r, str)] == []
        spy = spy_of(bus)
        for batch in spy.batches:
            seen = [o.message.key for o in batch if o.message.key is not None]
            assert len(seen) == len(set(seen))
        assert spy.most_flying == 1
        arrived = [m.body.decode() for m in it.broker.waiting(ORDERED)]
        for key in keys:
            mine = [int(b[1:]) for b in arrived if b[0] == key]
            assert mine == sorted(mine)
            assert len(mine) == 10


async def test_where_sends_keep_the_order_a_key_has_many_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """And when a call fails from somewhere on, all of that is sent again before anything later."""
    bus = make_bus()
    async with lab(bus, flights=8, ordered_batches=True) as it:
        spy = spy_of(bus)
        send, failing = spy.send, [3, 0, 1]

        async def broken(batch: Sequence[Outgoing], timeout: float) -> Results:
            at = failing.pop() if failing else len(batch)
            return [*await send(batch[:at], timeout), *[Throttled("slow")] * (len(batch) - at)]

        monkeypatch.setattr(spy, "send", broken)
        sends = [start(bus.send(ORDERED, str(n), key="k")) for n in range(10)]
        await turns()
        sends += [start(bus.send(ORDERED, str(n), key="k")) for n in range(10, 20)]
        await later(it, 5)
        assert all(isinstance(result, str) for result in await all_of(sends))
        assert not failing
        assert spy.most_flying == 1
        assert bodies(it, ORDERED) == [str(n) for n in range(20)]


async def test_a_failed_message_lets_the_next_of_its_key_go() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        it.broker.refuse(ORDERED, Refused("no"), times=1)
        calls = [start(bus.send(ORDERED, str(n), key="k")) for n in range(3)]
        results = await all_of(calls)
        assert [type(r) for r in results] == [Refused, str, str]
        assert bodies(it, ORDERED) == ["1", "2"]


async def test_a_timed_out_message_lets_the_next_of_its_key_go() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        it.broker.refuse(ORDERED, Throttled("slow"))
        short = start(bus.send(ORDERED, "1", key="k", timeout=1))
        long = start(bus.send(ORDERED, "2", key="k", timeout=60))
        await later(it, 2)
        it.broker.refuse(ORDERED, None)
        await later(it, 15)
        assert isinstance((await all_of([short]))[0], Timeout)
        await long
        assert bodies(it, ORDERED) == ["2"]


async def test_a_topic_without_groups_is_counted_always_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()
    async with lab(bus):
        for n in range(3):
            await bus.publish(EVENTS, str(n))
        await bus.publish_many(EVENTS, ["a", "b"])
        assert bus.counts["unrouted"] == 5
        assert bus.counts["sent"] == 5
    said = [r for r in caplog.records if "has no group" in r.message]
    assert len(said) == 1
    assert said[0].levelno == logging.WARNING


async def test_send_many_says_which_messages_were_not_sent() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        it.broker.refuse(ORDERS, Refused("no"), times=1)
        bad: Any = 5
        with pytest.raises(SendFailed) as caught:
            await bus.send_many(ORDERS, ["0", bad, "2", "3"])
        error = caught.value
        assert {i: type(e) for i, e in error.failed.items()} == {0: Refused, 1: CodecError}
        assert list(error.failed) == [0, 1]
        assert error.sent == {i: m.id for i, m in zip((2, 3), it.broker.waiting(ORDERS), strict=True)}
        assert "2 of 4" in str(error)


async def test_send_many_of_nothing_is_nothing() -> None:
    bus = make_bus()
    async with lab(bus):
        assert await bus.send_many(ORDERS, []) == []
        assert spy_of(bus).batches == []


async def test_send_many_gives_each_its_key() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        await bus.send_many(ORDERED, ["a1", "b1"], key=lambda body: body[0])
        assert [m.key for m in it.broker.waiting(ORDERED)] == ["a", "b"]


async def test_a_cut_in_mid_send_is_invisible_to_the_caller() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        spy = spy_of(bus)
        spy.gate.clear()
        calls = [start(bus.send(ORDERS, str(n))) for n in range(3)]
        await turns()
        it.broker.cut(down=True)
        spy.gate.set()
        await later(it, 3)
        assert not any(c.done() for c in calls)
        it.broker.down = False
        await later(it, 15)
        assert all(isinstance(r, str) for r in await all_of(calls))
        assert bodies(it) == ["0", "1", "2"]


async def test_what_the_adapter_breaks_with_is_the_callers_and_no_hang(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()
    async with lab(bus) as it:
        spy_of(bus).faults["send"].append(KeyError("inside"))
        with pytest.raises(TransportError, match="KeyError"):
            await bus.send(ORDERS, "x")
        await bus.send(ORDERS, "y")
        assert bodies(it) == ["y"]
    assert any(r.exc_info for r in caplog.records)  # the adapter's author needs the traceback


@pytest.mark.parametrize("count", [0, 1])
async def test_an_adapter_that_answers_for_too_few_is_found_out(count: int) -> None:
    bus = make_bus()
    async with lab(bus):

        async def wrong(batch: Sequence[Outgoing], timeout: float) -> Results:
            return [None] * count

        spy_of(bus).send = wrong  # type: ignore[method-assign]  # a broken adapter
        results = await all_of([start(bus.send(ORDERS, "x")), start(bus.send(ORDERS, "y"))])
        assert any(isinstance(r, TransportError) for r in results)
        assert all(isinstance(r, str | TransportError) for r in results)


async def test_closing_waits_for_what_is_under_way() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        spy = spy_of(bus)
        spy.gate.clear()
        call = start(bus.send(ORDERS, "x"))
        await turns()
        closing = start(bus.close())
        await turns()
        assert not call.done()
        spy.gate.set()
        await call
        await closing
        assert bodies(it) == ["x"]


async def test_what_could_not_be_sent_before_the_end_is_an_error() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        it.broker.cut(down=True)
        call = start(bus.send(ORDERS, "x"))
        await turns()
    [result] = await all_of([call])
    assert isinstance(result, Timeout | Closed | ConnectionLost)
    assert bodies(it) == []


async def test_closed_is_said() -> None:
    bus = make_bus()
    for call in (
        bus.send(ORDERS, "x"),
        bus.publish(EVENTS, "x"),
        bus.send_many(ORDERS, ["x"]),
        bus.request("asks", "x"),
    ):
        with pytest.raises(Closed, match="not open"):
            await call
    async with lab(bus):
        pass
    with pytest.raises(Closed, match="not open"):
        await bus.send(ORDERS, "x")


async def test_the_wrong_verb_is_named() -> None:
    bus = make_bus()
    async with lab(bus):
        wrong: Any = EVENTS
        with pytest.raises(ConfigError, match=r"use bus.publish"):
            await bus.send(wrong, "x")
        wrong = ORDERS
        with pytest.raises(ConfigError, match=r"use bus.send"):
            await bus.publish(wrong, "x")


async def test_a_channel_by_its_name() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        await bus.send("orders", "x")
        assert bodies(it) == ["x"]
        with pytest.raises(UnknownChannel, match="did you mean 'orders'"):
            await bus.send("order", "x")


async def test_features_have_to_be_declared() -> None:
    bus = make_bus()
    async with lab(bus):
        with pytest.raises(Unsupported, match="delayed=True"):
            await bus.send(ORDERS, "x", delay=1)
        with pytest.raises(Unsupported, match="priorities"):
            await bus.send(ORDERS, "x", priority=1)
        with pytest.raises(Unsupported, match="reply="):
            await bus.request(ORDERS, "x")
        assert spy_of(bus).batches == []


async def test_what_a_foreign_client_sent_with_priority_0_can_be_sent_on() -> None:
    """Many AMQP clients write it where none was given."""
    bus = make_bus()
    async with lab(bus) as it:
        await bus.send(ORDERS, Message("x", priority=0))
        [message] = it.broker.waiting(ORDERS)
        assert message.priority is None
        with pytest.raises(Unsupported, match="priorities"):
            await bus.send(ORDERS, Message("x", priority=1))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_body": 3}, {}),
        ({"max_key": 2}, {"key": "kkk"}),
        ({"max_headers": 1}, {"headers": {"a": "", "b": ""}}),
        ({"max_header_bytes": 5}, {"headers": {"aaa": "bbb"}}),
    ],
)
async def test_what_is_too_large_is_never_sent(limits: dict[str, int], message: dict[str, Any]) -> None:
    bus = make_bus()
    async with lab(bus, **limits):
        with pytest.raises(MessageTooLarge, match="queue 'orders'"):
            await bus.send(ORDERS, "1234", **message)
        assert spy_of(bus).batches == []


async def test_the_lane_of_each_destination_is_its_own_in_trouble() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        it.broker.refuse(ORDERS, Throttled("slow"))
        stuck = start(bus.send(ORDERS, "x"))
        await turns()
        await bus.send(DONE, "y")
        stuck.cancel()


async def test_an_expiry_a_header_and_the_ids_of_the_envelope_arrive() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        now = it.clock.time()
        await bus.send(
            ORDERS,
            Message("x", id="m1", type="t", correlation_id="c", causation_id="z", reply_to="inbox.me", key="k"),
            expires_in=5,
            headers={"h": "v"},
        )
        [message] = it.broker.waiting(ORDERS)
        assert (message.id, message.type, message.correlation_id, message.causation_id) == ("m1", "t", "c", "z")
        assert (message.reply_to, message.key, message.expires_at, message.timestamp) == ("inbox.me", "k", now + 5, now)
        assert dict(message.headers) == {"h": "v"}


async def test_idle_lanes_keep_nothing() -> None:
    bus = make_bus()
    async with lab(bus):
        await asyncio.gather(*(bus.send(ORDERED, str(n), key=str(n)) for n in range(50)))
        publisher = bus._opened().kit.publisher
        await until(lambda: not publisher.busy())
        [lane] = publisher._lanes.values()
        assert (len(lane.pending), len(lane.flying), len(lane._behind)) == (0, 0, 0)
        assert isinstance(bus.adapter, Spy)
