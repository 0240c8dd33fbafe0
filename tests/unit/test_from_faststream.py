"""docs/from-faststream.md: each row of its table has a snippet, and each snippet does what its section says."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pamqp.commands import Basic
from tests.unit.core_lab import until
from tests.unit.snippets import Page, Play, captured, from_rabbitmq, in_an_empty_folder

from unibus import Bus, Handlers, Message, UnknownChannel
from unibus.adapter import Outgoing
from unibus.channel import Group
from unibus.codec import codec_for
from unibus_kafka import wire as kafka_wire
from unibus_rabbitmq import wire as rabbitmq_wire
from unibus_rabbitmq.topology import plan
from unibus_redis import wire as redis_wire
from unibus_redis.wire import Entry

PAGE = Page("docs/from-faststream.md")
WIRE = "What is on the wire during the change"


@pytest.fixture(autouse=True)
def _in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_an_empty_folder(monkeypatch, tmp_path)


def test_each_row_has_a_section_with_snippets_and_each_section_a_check() -> None:
    assert len(PAGE.rows()) > 25
    PAGE.assert_complete(beside={WIRE})


@pytest.mark.parametrize("title", PAGE.sections)
async def test_the_snippets_do_what_the_page_says(
    title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await PAGE.play(title, tmp_path, capsys)


@PAGE.on_its_own("App and broker")
async def _open(names: dict[str, Any]) -> None:
    await names["main"]()
    assert names["analytics"].name == "analytics"


@PAGE.check("Publish")
async def _publish(play: Play) -> None:
    first, second = play.lab.broker.waiting(play.orders)
    assert (first.id, dict(first.headers)) == (play.message_id, {"tenant": "north"})
    assert (second.id, second.correlation_id, second.type) == ("from-legacy-17", "c-17", "order.placed")
    with pytest.raises(UnknownChannel):
        await play.bus.send("order", play.order("o-3"))


@PAGE.check("Publish a result")
async def _publish_a_result(play: Play) -> None:
    await play.send("o-1")
    assert play.lab.sent(play.charged) == [play.Charged(id="o-1")]


@PAGE.check("Consume a queue")
async def _consume(play: Play) -> None:
    await play.send("o-1")
    assert play.printed() == ["charged o-1"]
    await play.bus.send(play.orders, Message(b"no order"))
    await play.lab.idle()
    assert [letter.body for letter in play.lab.invalid(play.orders)] == [b"no order"]
    assert play.printed() == []


@PAGE.check("Filters")
async def _filters(play: Play) -> None:
    await play.bus.send(play.mixed, play.Refund(id="o-1"))
    await play.bus.send(play.mixed, play.Sale(id="o-2"))
    await play.lab.idle()
    assert sorted(play.printed()) == ["refund o-1", "sale o-2"]


@PAGE.check("Groups and fanout")
async def _groups(play: Play) -> None:
    await play.bus.publish(play.charged, play.Charged(id="o-1"))
    await play.lab.idle()
    assert sorted(play.printed()) == ["bill o-1", "ship o-1"]


@PAGE.check("Broadcast")
async def _broadcast(play: Play) -> None:
    await play.bus.publish(play.charged, play.Charged(id="o-1"))
    await play.lab.idle()
    assert play.printed() == ["forget o-1"]


@PAGE.check("Routing keys")
async def _routing_keys(play: Play) -> None:
    await play.bus.publish(play.charged, play.Charged(id="o-1"))
    await play.bus.publish(play.refunded, play.Charged(id="o-2"))
    await play.lab.idle()
    assert sorted(play.printed()) == ["audit o-1", "audit o-2"]
    # What unibus.toml says is read on RabbitMQ only.
    bus = Bus(service="shop", environ={"UNIBUS_URL": "amqp://localhost"})
    bus.include(_copy_of(play.bus))
    made = plan(bus._prepare().topology, "", "4.1")
    assert ("events", "order.charged.audit", "order.*") in {(b.source, b.destination, b.key) for b in made.bindings}
    assert (made.routes[play.charged].exchange, made.routes[play.charged].routing_key) == ("events", "order.charged")


def _copy_of(bus: Bus) -> Any:
    handlers = Handlers()
    handlers.registrations = list(bus.registrations)
    return handlers


@PAGE.check("Request and reply")
async def _request(play: Play) -> None:
    assert play.refusal == "ValueError"


@PAGE.check("Ack policies")
async def _ack_policies(play: Play) -> None:
    lab = play.lab
    for queue in (play.orders, play.once, play.lossy, play.shrug):
        await play.bus.send(queue, play.order("o-1"))
    await lab.idle()
    assert not lab.dead_letters(play.orders)  # it waits for its retry
    assert [letter.headers["x-retry-count"] for letter in lab.dead_letters(play.once)] == ["1"]
    for queue in (play.lossy, play.shrug):
        assert not lab.dead_letters(queue)
        assert (await play.bus.backlog(queue)).ready == 0
    assert play.bus.counts_of(play.shrug)["discarded"] == 1
    await lab.advance(10)
    assert [letter.headers["x-retry-count"] for letter in lab.dead_letters(play.orders)] == ["3"]


@PAGE.check("Settle by hand")
async def _by_hand(play: Play) -> None:
    await play.send("o-1", total=-1)
    await play.send("o-2", total=0)
    await play.send("o-3", total=1)
    assert [letter.body.id for letter in play.lab.dead_letters(play.orders)] == ["o-1"]
    assert play.bus.counts_of(play.orders)["handled"] == 1
    await play.lab.advance(60)
    assert play.bus.counts_of(play.orders)["handled"] == 2


@PAGE.check("Settle by exception")
async def _by_exception(play: Play) -> None:
    await play.send("o-1", total=0)
    await play.send("o-2", total=-1)
    await play.send("o-3", total=1, customer="closed")
    counts = play.bus.counts_of(play.orders)
    assert (counts["discarded"], counts["dead_lettered"], counts["retried"]) == (1, 1, 1)
    await play.lab.advance(599)
    assert play.bus.counts_of(play.orders)["retried"] == 1
    await play.lab.advance(1)
    assert play.bus.counts_of(play.orders)["retried"] == 2


@PAGE.check("Retries")
async def _retries(play: Play) -> None:
    await play.send("o-1")
    times = [len(play.printed())]
    for seconds in (1, 5, 25):
        await play.lab.advance(seconds - 0.5)
        assert play.printed() == []
        await play.lab.advance(0.5)
        times.append(len(play.printed()))
    assert times == [1, 1, 1, 1]
    assert [letter.headers["x-dlq-reason"] for letter in play.lab.dead_letters(play.orders)] == ["retries_exhausted"]


@PAGE.check("Dead letters")
async def _dead_letters(play: Play) -> None:
    await play.lab.idle()
    [dead, charged] = play.printed()
    assert dead.startswith("dead o-1")
    assert "no such card" in dead
    assert charged == "charged o-1"
    assert not play.lab.dead_letters(play.orders)


@PAGE.check("Prefetch and concurrency")
async def _concurrency(play: Play) -> None:
    [consumer] = play.bus._opened()._stations
    assert (consumer.settings.concurrency, consumer.settings.prefetch) == (32, 64)  # the file, over the code
    await play.send("o-1")
    assert play.printed() == ["charged o-1"]


@PAGE.check("Middlewares")
async def _middlewares(play: Play) -> None:
    await play.send("o-1")
    [begin, charged, end] = play.printed()
    assert (begin.split()[0], charged, end.split()[0]) == ("begin", "charged o-1", "end")


@PAGE.check("Context and dependencies")
async def _context(play: Play) -> None:
    message_id = await play.bus.send(play.orders, play.order("o-1"), headers={"tenant": "north"})
    await play.lab.idle()
    assert play.printed() == [f"north o-1 2 {message_id}"]
    await play.send("o-2", customer="c2")
    [line] = play.printed()
    assert line.startswith("- o-2 1 ")


@PAGE.check("Lifespan")
async def _lifespan(play: Play) -> None:
    await play.send("o-1")
    assert play.printed() == ["o-1 paid"]


@PAGE.check("Routers")
async def _routers(play: Play) -> None:
    await play.bus.send("shop.orders", play.order("o-1"))
    await play.lab.idle()
    assert play.printed() == ["charged o-1"]
    assert play.handlers.bus is play.bus


@PAGE.check("Batches")
async def _batches(play: Play) -> None:
    assert play.printed() == ["charged ['o-1', 'o-3']"]
    assert [letter.body.id for letter in play.lab.dead_letters(play.orders)] == ["o-2"]


@PAGE.check("Keys and order")
async def _keys(play: Play) -> None:
    assert play.printed() == ["step c2 o-3"]  # o-2 waits behind o-1
    await play.lab.advance(1)
    assert play.printed() == ["step c1 o-1", "step c1 o-2"]


@PAGE.check("Delay, expiry and priority")
async def _delay(play: Play) -> None:
    assert play.printed() == ["alert o-1"]
    await play.lab.advance(59)
    assert play.printed() == []
    await play.lab.advance(1)
    assert play.printed() == ["alert o-2"]


@PAGE.check("Correlation ids")
async def _correlation(play: Play) -> None:
    assert play.printed() == ["audit c-1 m-1"]


@PAGE.check("Decoders")
async def _decoders(play: Play) -> None:
    await play.bus.send(play.lines, Message(b"o-1;7"))
    await play.bus.send(play.lines, play.order("o-2", total=8))
    await play.lab.idle()
    assert sorted(play.printed()) == ["charged o-1 7", "charged o-2 8"]


@PAGE.check("Receive one")
async def _receive_one(play: Play) -> None:
    assert play.delivery.body == play.order("o-1")
    assert (await play.bus.backlog(play.orders)).ready == 0


@PAGE.on_its_own("Test")
async def _test(names: dict[str, Any]) -> None:
    await names["test_charge"]()


@PAGE.check("Health and counts")
async def _health(play: Play) -> None:
    assert play.bus.counts_of("orders") == {"sent": 1}


@PAGE.on_its_own("Run")
async def _run(names: dict[str, Any]) -> None:
    running = asyncio.create_task(names["main"]())
    await until(lambda: names["bus"]._session is not None and names["bus"]._session.running)
    names["bus"].stop()
    await running


@PAGE.on_its_own("Settings")
async def _settings(names: dict[str, Any]) -> None:
    async with names["bus"] as bus:
        assert bus.settings.source("shutdown_timeout") == "unibus.toml"
        assert bus.settings.source("url") == "environment UNIBUS_URL"
        assert bus.settings.consumer(names["orders"], {}).prefetch == 20


@PAGE.on_its_own("Inside FastAPI")
async def _fastapi(names: dict[str, Any]) -> None:
    bus = names["bus"]
    async with names["lifespan"](None):
        await bus.send("orders", names["Order"](id="o-1"))
        await until(lambda: bus.counts.get("handled") == 1)
    assert (await bus.health()).status == "down"


VERSIONS = ("0.5.48", "0.6.7", "0.7.8")


@PAGE.check(WIRE)
async def _wire(play: Play) -> None:
    for version in VERSIONS:
        order, text, raw = map(from_rabbitmq, captured(f"faststream {version}", "rabbitmq"))
        assert (order.content_type, dict(order.headers)) == ("application/json", {"tenant": "north"})
        assert order.correlation_id
        assert (text.content_type, text.body) == ("text/plain", b"plain")
        assert (raw.id, raw.correlation_id, raw.body) == ("m-1", "c-1", b"raw")
        await play.arrives(play.orders, order)
        entry = Entry(
            "orders", [b"1-0", [bytes.fromhex(part) for part in captured(f"faststream {version}", "redis")[0]]], 1, 0
        )
        await play.arrives(play.stream, redis_wire.decode(entry))
    [record] = captured("faststream 0.7.8", "kafka")
    message, _ = kafka_wire.decode(
        kafka_wire.Record(
            topic="orders",
            partition=0,
            offset=7,
            timestamp=1,
            key=bytes.fromhex(record["key"]),
            value=bytes.fromhex(record["value"]),
            headers=[(name, bytes.fromhex(value)) for name, value in record["headers"]],
        )
    )
    assert (message.key, message.id, message.headers["tenant"]) == ("c1", "orders/0@7", "north")
    assert message.headers["correlation_id"]
    await play.arrives(play.orders, message)
    await play.bus.send(play.stream, play.order("o-2", total=6))  # ours, by the same codec
    await play.lab.idle()
    assert sorted(play.printed()) == ["charged o-1 5"] * 3 + ["charged o-2 6"]
    assert [m.id for m in play.lab.broker.waiting(play.orders)][-1] == "orders/0@7"
    bodies = [codec_for(play.orders).decode(m.body, m.content_type) for m in play.lab.broker.waiting(play.orders)]
    assert bodies == [play.order("o-1", total=5)] * 4
    billing = Group(play.charged, "billing")
    assert play.bus.settings.physical(billing) == "billing-v1"
    # To FastStream: AMQP properties that it reads, and on Redis the two fields that the old snippet takes.
    out = Outgoing(play.orders, Message(b"{}", id="m-1", content_type="application/json", correlation_id="c-1"))
    properties = Basic.Properties()  # of the client library beneath FastStream
    written = rabbitmq_wire.encode(out, "m-1", None, 0.0)
    properties.unmarshal(int.from_bytes(written[:2]), written[2:])
    assert (properties.content_type, properties.message_id) == ("application/json", "m-1")
    assert properties.correlation_id == "c-1"
    assert redis_wire.encode(out, 0.0)[::2] == [b"body", b"headers"]
