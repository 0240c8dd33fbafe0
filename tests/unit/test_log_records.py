"""What the log says beside its text: one record for each failed attempt and each discard, and ids on the handler's own."""

from __future__ import annotations

import asyncio
import logging
import logging.config
from typing import Any

import pytest
from tests.unit.core_lab import ASKS, EVENTS, ORDERED, ORDERS, lab, later, make_bus, spy_of, turns, until

from unibus import Delivery, Discard, LeaseLost, Message, RemoteError, RetryPolicy, deadletter
from unibus.retry import SUSPECT_AFTER
from unibus.telemetry import LogIds

own = logging.getLogger("shop")
STORY = ("channel", "group", "attempt", "verdict", "delay", "reason", "error_type")


def told(caplog: pytest.LogCaptureFixture, message_id: str) -> list[tuple[Any, ...]]:
    """All records with a verdict on one message."""
    found = [r.__dict__ for r in caplog.records if r.__dict__.get("message_id") == message_id and hasattr(r, "verdict")]
    assert all("canary" not in repr(record) for record in found)
    return [tuple(record[name] for name in STORY) for record in found]


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


async def test_each_attempt_is_one_record(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()

    @bus.consumer(ORDERS, retry=RetryPolicy(max_retries=1, backoff=5))
    async def handle(body: str) -> None:
        raise OSError("broken disk")

    async with lab(bus) as it:
        sent = await bus.send(ORDERS, Message("canary", correlation_id="talk"), key="canary", headers={"h": "canary"})
        await it.idle()
        await later(it, 6)
        await it.idle()
    assert told(caplog, sent) == [
        ("orders", None, 1, "retry", 5.0, None, "OSError"),
        ("orders", None, 2, "dead letter", None, "retries_exhausted", "OSError"),
    ]
    assert {r.correlation_id for r in caplog.records if r.__dict__.get("message_id") == sent} == {"talk"}  # type: ignore[attr-defined]


async def test_a_retry_in_place_is_told_like_any_other(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()

    @bus.consumer(ORDERED, retry=RetryPolicy(max_retries=1, backoff=5))
    async def handle(body: str) -> None:
        raise OSError("broken disk")

    async with lab(bus) as it:
        sent = await bus.send(ORDERED, "x", key="k")
        await it.idle()
        await later(it, 6)
        await it.idle()
    assert [(story[2], story[3]) for story in told(caplog, sent)] == [(1, "retry"), (2, "dead letter")]


@pytest.mark.parametrize("error", [OSError("broken disk"), Discard("not for us")])
async def test_at_most_once_a_failure_is_one_record_with_its_id(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus()

    @bus.consumer(ORDERS, guarantee="at-most-once")
    async def handle(body: str) -> None:
        raise error

    async with lab(bus) as it:
        sent = await bus.send(ORDERS, "x")
        await it.idle()
    assert told(caplog, sent) == [("orders", None, 1, "discard", None, "at most once", type(error).__name__)]


async def test_a_failure_after_the_handler_has_settled(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        await delivery.ack()
        raise OSError("too late")

    async with lab(bus) as it:
        sent = await bus.send(ORDERS, "x")
        await it.idle()
    assert told(caplog, sent) == [("orders", None, 1, "lost", None, "it was settled before", "OSError")]


async def test_deliveries_that_could_not_be_settled_are_one_record(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()

    @bus.subscriber(EVENTS, group="g")
    async def handle(body: str) -> None: ...

    async with lab(bus) as it:
        spy_of(bus).faults["settle"].append(LeaseLost("it is another's"))
        for body in ("1", "2", "3"):
            await bus.publish(EVENTS, Message(body, id=body))
        await it.idle()
    (record,) = (r.__dict__ for r in caplog.records if "deliveries not settled" in r.getMessage())
    found = tuple(record[name] for name in ("channel", "group", "number", "message_id"))
    assert found[:2] == ("events", "g")
    assert found[2] == record["args"][1] > 0
    assert found[3] == "1"


async def test_what_the_crash_guard_suspects(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None: ...

    async with lab(bus) as it:
        await it.idle()
        intake = bus._opened().intakes[0]
        message = Message(b"canary", id="m1", key="canary")
        intake._admit([Delivery(message, intake.source, None, deliveries=SUSPECT_AFTER + 1)])
        await it.idle()
    assert told(caplog, "m1")[0] == ("orders", None, 1, "suspected", None, "crash guard", None)


async def test_a_purged_dead_letter(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()

    @bus.consumer(ORDERS, retry=RetryPolicy(max_retries=0))
    async def handle(body: str) -> None:
        raise OSError("broken disk")

    async with lab(bus) as it:
        sent = [await bus.send(ORDERS, f"canary {n}") for n in range(3)]
        await it.idle()
        caplog.clear()
        assert await deadletter.purge(bus, ORDERS, where=lambda letter: letter.body != "canary 1") == 2
        assert bus.counts.get("handled", 0) == 0
    purged = ("orders.dlq", None, 1, "discard", None, "purged", None)
    assert [told(caplog, id) for id in sent] == [[purged], [], [purged]]
    assert all(r.levelno == logging.INFO for r in caplog.records if hasattr(r, "verdict"))


async def test_an_answered_failure_and_a_handler_that_took_too_long(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()
    ids: dict[str, str] = {}

    @bus.responder(ASKS, timeout=10)
    async def answer(body: str, message: Message) -> str:
        ids[body] = message.id
        if body == "hangs":
            await asyncio.Event().wait()
        raise OSError("broken disk")

    async with lab(bus) as it:
        with pytest.raises(RemoteError):
            await bus.request(ASKS, "fails")
        slow = asyncio.ensure_future(bus.request(ASKS, "hangs"))
        await turns()
        await later(it, 11)
        with pytest.raises(RemoteError):
            await slow
    assert told(caplog, ids["fails"]) == [("asks", None, 1, "answered", None, None, "OSError")]
    assert told(caplog, ids["hangs"]) == [("asks", None, 1, "answered", None, None, "HandlerTimeout")]


async def test_a_reply_and_a_request_that_came_too_late(caplog: pytest.LogCaptureFixture) -> None:
    bus = make_bus()
    gate = asyncio.Event()

    @bus.responder(ASKS, concurrency=1, prefetch=1)
    async def answer(body: str, delivery: Delivery[str]) -> str:
        await gate.wait()
        delivery.message.expires_at = None  # a responder that does not look at the time
        return body

    async with lab(bus) as it:
        calls = [asyncio.ensure_future(bus.request(ASKS, body, timeout=5)) for body in ("late", "expired")]
        await later(it, 6)
        assert all(isinstance(error, TimeoutError) for error in await asyncio.gather(*calls, return_exceptions=True))
        gate.set()
        await it.idle()
        await until(lambda: bus.counts.get("late_replies"), "the late reply is counted")
        assert bus.counts["late_replies"] == bus.counts["expired"] == 1
    found = {r.__dict__.get("reason"): r.__dict__ for r in caplog.records if r.__dict__.get("verdict") == "discard"}
    assert found.keys() == {"late reply", "expired"}
    assert all(record["message_id"] in record["msg"] % record["args"] for record in found.values())


async def test_ids_on_the_records_of_a_handler(tmp_path: Any) -> None:
    path = tmp_path / "log"
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"ids": {"()": "unibus.telemetry.LogIds"}},
            "formatters": {"plain": {"format": "%(message)s %(channel)s %(group)s %(message_id)s %(correlation_id)s"}},
            "handlers": {
                "file": {"class": "logging.FileHandler", "filename": path, "filters": ["ids"], "formatter": "plain"}
            },
            "loggers": {"shop": {"handlers": ["file"], "level": "INFO", "propagate": False}},
        }
    )
    bus = make_bus()

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        own.info("one")

    @bus.subscriber(EVENTS, group="g", batch=5)
    async def many(bodies: list[str]) -> None:
        own.info("batch")

    try:
        async with lab(bus) as it:
            one = await bus.send(ORDERS, "x")
            await bus.publish(EVENTS, "y")
            await it.idle()
        own.info("outside")
    finally:
        for handler in own.handlers[:]:
            own.removeHandler(handler)
            handler.close()
        own.propagate = True
    assert sorted(path.read_text().splitlines()) == [
        "batch events g None None",
        f"one orders None {one} {one}",
        "outside None None None None",
    ]


def test_what_a_record_says_of_itself_stays() -> None:
    record = logging.makeLogRecord({"message_id": "mine", "channel": "orders"})
    assert LogIds().filter(record) is True
    assert (record.message_id, record.channel, record.group) == ("mine", "orders", None)  # type: ignore[attr-defined]
