"""Every row of "Bad input" of the first issue that needs no real broker.

Each gives a clear error that names the cause, or ends in a channel where somebody will look; nothing is lost, and no
password shows: not in a log, not in a repr, not in a traceback.

Rows and where else they stand: header values (test_message), config keys and variables (test_config), missing extra
(test_registry), forged reply address (test_reply), BaseException and endless handlers (test_consumer).
"""

import asyncio
import logging
import traceback
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
from pydantic import BaseModel
from tests.unit.core_lab import ORDERS, Spy, lab, make_bus, spy_of, spying, turns

from unibus import (
    AuthenticationFailed,
    Bus,
    CodecError,
    ConfigError,
    ConnectionLost,
    Message,
    Queue,
    UnknownChannel,
    Unroutable,
    deadletter,
)
from unibus.memory_broker import MemoryBroker
from unibus.message import ORIGINAL_ERROR

PASSWORD = "hunter2-very-secret"


class Order(BaseModel):
    id: int
    total: int


MODELS = Queue[Order]("models", Order)


@pytest.mark.parametrize(
    ("body", "content_type", "said"),
    [
        (b"{", None, "json_invalid"),
        (b"[1, 2]", None, "not a valid Order"),
        (b'{"id": "x", "total": 1}', None, "id: int_parsing"),
        (b'{"id": 1}', None, "total: missing"),
        (b"<order/>", "application/xml", "content type 'application/xml'"),
        (b"", None, "body is empty"),
        (b"\xff\xfe", None, "not a valid Order"),
        (b"[" * 10_000_000, None, "not a valid Order"),
    ],
    ids=["malformed", "wrong type", "wrong field", "missing field", "content type", "empty", "no text", "10 MB"],
)
async def test_a_body_that_can_not_be_read_is_kept_as_it_is(body: bytes, content_type: str | None, said: str) -> None:
    bus = make_bus(channels=[MODELS])

    @bus.consumer(MODELS)
    async def handle(order: Order) -> None:
        raise AssertionError("it must not run")

    async with lab(bus) as it:
        await bus.send(MODELS, Message(body, content_type=content_type))
        await it.idle()
        [invalid] = it.invalid(MODELS)
        assert invalid.body == body
        assert said in invalid.headers[ORIGINAL_ERROR]


class Counting:
    """A codec that is asked only for what is small enough."""

    content_type = "application/x-counted"

    def __init__(self) -> None:
        self.decoded: list[int] = []

    def encode(self, body: str) -> bytes:
        return body.encode()

    def decode(self, data: bytes) -> str:
        self.decoded.append(len(data))
        return data.decode()


async def test_a_body_above_max_body_is_kept_without_a_look_into_it() -> None:
    codec = Counting()
    counted, raw = Queue[str]("counted", str, codec=codec), Queue[bytes]("raw")
    ask = Queue[str]("ask", str, reply=str)
    bus = make_bus(channels=[MODELS, counted, raw, ask], max_body=100)
    seen: list[object] = []

    @bus.consumer(MODELS)
    async def one(order: Order) -> None:
        raise AssertionError("it must not run")

    @bus.consumer(counted, batch=10)
    async def some(bodies: list[str]) -> None:
        seen.extend(bodies)

    @bus.consumer(raw)
    async def as_it_is(body: bytes) -> None:
        seen.append(len(body))

    @bus.responder(ask)
    async def answer(body: str) -> str:
        return "x" * 101

    large = b'{"id": 1, "total": 2, "note": "' + b"x" * 100 + b'"}'
    async with lab(bus) as it:
        await bus.send(MODELS, Message(large))
        await bus.send(counted, "x" * 101)
        await bus.send(counted, "y" * 100)
        await bus.send(raw, b"x" * 101)  # of bytes nothing is looked into
        await it.idle()
        with pytest.raises(CodecError, match="101 bytes, and max_body is 100"):
            await bus.request(ask, "x")
        [invalid] = it.invalid(MODELS)
        assert invalid.body == large
        assert (
            invalid.headers[ORIGINAL_ERROR]
            == f"the body has {len(large)} bytes, and max_body is 100; it was not looked into"
        )
        [letter] = [letter async for letter in deadletter.browse(bus, counted, invalid=True)]
        assert letter.body == b"x" * 101
    assert codec.decoded == [100]
    assert sorted(map(str, seen)) == ["101", "y" * 100]


async def test_a_body_of_10_mb_arrives() -> None:
    bus = make_bus()
    seen: list[int] = []

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        seen.append(len(body))

    async with lab(bus) as it:
        await bus.send(ORDERS, "x" * 10_000_000)
        await it.idle()
    assert seen == [10_000_000]


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"h": 5}, "'h'.*not int"),
        ({"h": "a\r\nb"}, "'h'.*line break"),
        ({"h": "a\nb"}, "'h'.*line break"),
        ({"h\n": "a"}, "printable ASCII"),
        ({5: "a"}, "not int"),
        ({"x-retry-count": "9"}, "reserved"),
        ({"h": None}, "not NoneType"),
    ],
)
async def test_an_illegal_header_is_refused_before_anything_is_sent(headers: Any, said: str) -> None:
    bus = make_bus()
    async with lab(bus):
        with pytest.raises(CodecError, match=said):
            await bus.send(ORDERS, "x", headers=headers)
        with pytest.raises(CodecError, match=said):
            await bus.send(ORDERS, Message("x", headers=headers))
        assert spy_of(bus).batches == []


@pytest.mark.parametrize("key", [5, "", "a\0b"])
async def test_an_illegal_key_is_refused(key: Any) -> None:
    bus = make_bus()
    async with lab(bus):
        with pytest.raises(CodecError, match="key"):
            await bus.send(ORDERS, "x", key=key)


@pytest.mark.parametrize("field", ["id", "type", "content_type", "correlation_id", "causation_id", "reply_to"])
async def test_a_line_break_in_the_envelope_is_refused(field: str) -> None:
    bus = make_bus()
    given: dict[str, Any] = {field: "a\r\nb"}
    async with lab(bus):
        with pytest.raises(CodecError, match=field):
            await bus.send(ORDERS, Message("x", **given))


async def test_a_body_of_the_wrong_type_is_named_and_not_shown() -> None:
    bus = make_bus()
    wrong: Any = {"card": PASSWORD}
    async with lab(bus):
        with pytest.raises(CodecError, match=r"queue 'orders' takes str, not dict") as caught:
            await bus.send(ORDERS, wrong)
        assert PASSWORD not in "".join(traceback.format_exception(caught.value))


async def test_an_unknown_channel_has_a_nearest_name() -> None:
    bus = make_bus()
    async with lab(bus):
        for call in (bus.send("ordesr", "x"), bus.publish("event", "x"), bus.request("ask", "x"), bus.backlog("ordes")):
            with pytest.raises(UnknownChannel, match="did you mean"):
                await call
        with pytest.raises(UnknownChannel, match=r"channels=\["):
            await bus.send(Queue("undeclared"), b"x")
        with pytest.raises(UnknownChannel, match="did you mean 'orders'"):
            bus.receiver("oders")


@pytest.mark.parametrize(
    ("options", "environ", "said"),
    [
        ({"url": "memry://"}, {}, "did you mean memory://"),
        ({"url": "memory://"}, {"UNIBUS_URLL": "x"}, "UNIBUS_URLL"),
        ({"url": "memory://", "settings": {"leese": 3}}, {}, "lease"),
        ({"url": None}, {}, "UNIBUS_URL"),
        ({"url": "memory://", "defaults": {"concurency": 3}}, {}, "concurency"),
        ({"url": "memory://", "max_body": 0}, {}, "max_body"),
    ],
)
async def test_a_wrong_setting_is_named_at_the_start(options: dict[str, Any], environ: Any, said: str) -> None:
    bus = Bus(config=False, environ=environ, service="s", **options)
    with pytest.raises(ConfigError, match=said):
        async with bus:
            pass


def _two(bus: Bus) -> None:
    @bus.consumer(ORDERS)
    async def one(body: str) -> None: ...

    @bus.consumer("orders")
    async def two(body: str) -> None: ...


def _unknown_parameter(bus: Bus) -> None:
    @bus.consumer(ORDERS)
    async def one(body: str, database: object) -> None: ...


def _wrong_body(bus: Bus) -> None:
    @bus.consumer(ORDERS)
    async def one(body: int) -> None: ...


def _returns(bus: Bus) -> None:
    @bus.consumer(ORDERS)
    async def one(body: str) -> str:
        return body


def _unknown_name(bus: Bus) -> None:
    @bus.consumer("oders")
    async def one(body: str) -> None: ...


@pytest.mark.parametrize(
    ("declare", "said"),
    [
        (_two, "two handlers"),
        (_unknown_parameter, "'database'"),
        (_wrong_body, "'body'"),
        (_returns, "nobody would get it"),
        (_unknown_name, "did you mean 'orders'"),
    ],
)
async def test_a_wrong_handler_is_named_at_the_start_without_io(declare: Callable[[Bus], None], said: str) -> None:
    bus = make_bus()
    declare(bus)
    made: list[Spy] = []
    with spying(made):
        with pytest.raises(ConfigError, match=said):
            async with bus.running():
                pass
        assert not any(spy.calls for spy in made)


@pytest.mark.parametrize("error", [AuthenticationFailed("user 'svc' was refused"), ConnectionLost("nobody there")])
async def test_a_broker_that_says_no_at_the_start(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    class Refusing(Spy):
        changes: dict[str, Any] = {}  # noqa: RUF012  # as the base has it
        made: list[Spy] = []  # noqa: RUF012  # same

        def call(self, name: str) -> None:
            if name == "connect":
                raise error

    bus = make_bus(username="svc", password=PASSWORD, url="amqp://broker.internal")
    with (
        patch("unibus.bus.adapter_factory", lambda _: Refusing),
        patch("unibus.memory._broker", _any_broker),
        pytest.raises(type(error)) as caught,
    ):
        async with bus:
            pass
    shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert PASSWORD not in shown
    assert PASSWORD not in caplog.text
    assert PASSWORD not in repr(bus)
    assert repr(bus) == "<Bus closed>"


def _any_broker(endpoint: Any) -> Any:
    return MemoryBroker(endpoint.clock)


async def test_a_broker_gone_in_mid_run_loses_nothing_and_the_log_has_no_password(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    bus = make_bus(username="svc", password=PASSWORD)
    handled: list[str] = []

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None:
        handled.append(body)

    with patch("unibus.memory._broker", _any_broker):
        async with lab(bus) as it:
            await bus.send(ORDERS, "0")
            await it.idle()
            it.broker.cut()
            sends = [asyncio.ensure_future(bus.send(ORDERS, str(n))) for n in range(2, 5)]
            await turns(50)
            await it.advance(5)
            await asyncio.gather(*sends)
            await it.idle()
            assert sorted(handled) == ["0", "2", "3", "4"]
            assert PASSWORD not in repr(bus.settings)
            assert PASSWORD not in repr(bus.settings.effective())
    assert PASSWORD not in caplog.text


async def test_an_unroutable_message_is_an_error_on_a_queue() -> None:
    bus = make_bus()
    async with lab(bus) as it:
        it.broker.refuse(ORDERS, Unroutable("no queue is bound"), times=1)
        with pytest.raises(Unroutable, match="no queue is bound"):
            await bus.send(ORDERS, "x")


@pytest.mark.parametrize(("what", "value"), [("delay", -1), ("delay", float("nan")), ("delay", float("inf"))])
async def test_a_time_that_can_not_be_is_refused(what: str, value: float) -> None:
    queue = Queue[str]("delayed", str, delayed=True)
    bus = make_bus(channels=[queue])
    more: dict[str, Any] = {what: value}
    async with lab(bus):
        with pytest.raises(CodecError, match=what):
            await bus.send(queue, "x", **more)
