"""Logs: quiet while all goes well, a line for whatever is given up, and no payload in any of them."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from unibus import Delivery, Discard, Message, telemetry
from unibus_contracts.contract import contract
from unibus_contracts.kit import AT_ONCE, NEVER, SOON, Kit, Seen, letters, until


class Said(logging.Handler):
    """Keeps what every logger says, drivers' too."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []
        self.records: list[dict[str, Any]] = []  # the attributes of each
        self.addFilter(telemetry.LogIds())

    def of(self, message_id: str, *, verdict: bool = True) -> list[dict[str, Any]]:
        """What was said of one message; `verdict`: only where it says what becomes of it."""
        found = [record for record in self.records if record.get("message_id") == message_id]
        return [record for record in found if "verdict" in record] if verdict else found

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(dict(record.__dict__))
        self.lines.append(f"{record.levelname} {record.name}: {self.format(record)}")  # with its traceback


@contextmanager
def listening(level: int) -> Iterator[Said]:
    root, said = logging.getLogger(), Said(level)
    before = root.level
    root.addHandler(said)
    root.setLevel(level)
    try:
        yield said
    finally:
        root.setLevel(before)
        root.removeHandler(said)


@contract("obs.quiet_on_success", "What goes well is not worth a warning in the log.")
async def test_quiet(kit: Kit) -> None:
    queue, topic = kit.queue(), kit.topic()
    bus, seen = kit.bus(), Seen[bytes]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen(body)

    @bus.subscriber(topic, group="g")
    async def on_topic(body: bytes) -> None:
        seen(body)

    with listening(logging.WARNING) as said:
        async with bus.running():
            await bus.send_many(queue, [b"x"] * 10)
            await bus.publish(topic, b"y")
            await seen.reach(11)
    assert said.lines == []


@contract("obs.every_end_is_logged", "A discard and a dead letter each leave a line in the log, with id and reason.")
async def test_logged(kit: Kit) -> None:
    queue = kit.queue()
    bus = kit.bus()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: bytes) -> None:
        if body == b"discard":
            raise Discard("not for us")
        raise OSError("broken disk")

    with listening(logging.INFO) as said:
        async with bus.running():
            discarded = await bus.send(queue, b"discard")
            dead = await bus.send(queue, b"dead")
            await until(lambda: bus.counts.get("discarded") == 1, "discarded")
            await letters(bus, queue)
    assert any(discarded in line and "not for us" in line for line in said.lines)
    assert any(dead in line and "broken disk" in line for line in said.lines)


@contract("obs.failed_attempt_is_one_record", "Each failed attempt is one log record, with its story as attributes.")
async def test_one_record(kit: Kit) -> None:
    queue, topic = kit.queue(), kit.topic()
    bus = kit.bus()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: bytes) -> None:
        raise OSError("broken disk")

    @bus.subscriber(topic, group="g", retry=NEVER)
    async def on_topic(body: bytes) -> None:
        raise LookupError("no such customer")

    with listening(logging.INFO) as said:
        async with bus.running():
            sent = await bus.send(
                queue, Message(b"canary-body", correlation_id="talk-1", headers={"h": "canary-header"})
            )
            published = await bus.publish(topic, b"canary-body", key="canary-key")
            await letters(bus, queue)
            await letters(bus, (topic, "g"))
    told = [
        [r[name] for name in ("channel", "group", "correlation_id", "attempt", "verdict", "delay", "error_type")]
        for r in (*said.of(sent), *said.of(published))
    ]
    assert told == [
        [queue.name, None, "talk-1", 1, "retry", 0, "OSError"],
        [queue.name, None, "talk-1", 2, "retry", 0, "OSError"],
        [queue.name, None, "talk-1", 3, "dead letter", None, "OSError"],
        [topic.name, "g", published, 1, "dead letter", None, "LookupError"],
    ]
    assert [record for record in said.records if "canary" in repr(record)] == []


@contract("obs.every_discard_is_one_record", "What is discarded is said once, with its id and the reason.")
async def test_discards(kit: Kit) -> None:
    queue, first, topic = kit.queue(), kit.queue(label="first"), kit.topic()
    bus = kit.bus()

    @bus.consumer(queue)
    async def by_word(body: bytes) -> None:
        raise Discard("not for us")

    @bus.consumer(first, guarantee="at-most-once")
    async def settled_first(body: bytes) -> None:
        raise OSError("broken disk")

    @bus.subscriber(topic, broadcast=True, retry=NEVER)
    async def private(body: bytes) -> None:
        raise OSError("broken disk")

    with listening(logging.INFO) as said:
        async with bus.running():
            ids = [await bus.send(queue, b"x"), await bus.send(first, b"x"), await bus.publish(topic, b"x")]
            await until(lambda: bus.counts.get("discarded") == len(ids), "all discarded")
    assert [[record["verdict"] for record in said.of(id)] for id in ids] == [["discard"]] * len(ids)
    assert [said.of(id)[0]["reason"] for id in ids] == ["not for us", "at most once", "retries_exhausted"]


@contract("obs.ids_on_records_of_a_handler", "What a handler logs carries the ids of its message, from a thread too.")
async def test_ids(kit: Kit) -> None:
    queue, topic = kit.queue(), kit.topic()
    bus, seen, own = kit.bus(), Seen[bytes](), logging.getLogger("shop")

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        await asyncio.create_task(note(body))

    @bus.subscriber(topic, group="g")
    def in_thread(body: bytes) -> None:
        own.info("at work on %s", "a thread")
        seen(body)

    async def note(body: bytes) -> None:
        own.info("at work")
        seen(body)

    with listening(logging.INFO) as said:
        async with bus.running():
            sent = await bus.send(queue, Message(b"x", correlation_id="talk-1"))
            published = await bus.publish(topic, b"x")
            await seen.reach(2)
            own.info("by myself")
    told = {
        record["message_id"]: (record["channel"], record["group"], record["correlation_id"])
        for record in said.records
        if record["name"] == "shop"
    }
    assert told == {
        sent: (queue.name, None, "talk-1"),
        published: (topic.name, "g", published),
        None: (None, None, None),
    }


@contract("sec.payload_not_logged", "No body, header or key is in any log, whatever becomes of the message.")
async def test_payload(kit: Kit) -> None:
    queue, typed = kit.queue(), kit.queue(dict[str, int])
    bus = kit.bus()

    @bus.consumer(queue, retry=AT_ONCE)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        raise OSError("no word of it")

    @bus.consumer(typed)
    async def never(body: dict[str, int]) -> None: ...

    with listening(logging.DEBUG) as said:
        async with bus.running():
            await bus.send(queue, b"canary-body", key="canary-key", headers={"h": "canary-header"})
            await letters(bus, queue)
            async with kit.bus(kit.named_queue(typed.name)) as sender:
                await sender.send(typed.name, b"canary-json", key="canary-key", headers={"h": "canary-header"})
            await until(lambda: bus.counts.get("invalid") == 1, "invalid")
    assert [line for line in said.lines if "canary" in line] == []


@contract("sec.credentials_not_logged", "A password is in no log, error, repr or health, also where nobody answers.")
async def test_credentials(kit: Kit) -> None:
    password = "pa@ss/5f1d%"  # noqa: S105  # of nobody
    url = kit.nowhere(password)
    own = kit.password()
    secrets = {password, quote(password, safe=""), *((own, quote(own, safe="")) if own else ())}
    queue = kit.queue()
    buses = [kit.bus(queue), *([kit.bus(queue, url=url)] if url is not None else [])]
    with listening(logging.DEBUG) as said:
        for bus in buses:
            told = [repr(bus)]
            try:
                async with asyncio.timeout(2 * SOON), bus:
                    await bus.send(queue, b"x")
                    told += [repr(bus), repr(bus.adapter), repr(await bus.health())]
            except ConnectionError as error:
                told += traceback.format_exception(error)  # with its causes: they are printed too
            said.lines += told
    assert [line for line in said.lines for secret in secrets if secret in line] == []
