"""Logs: quiet while all goes well, a line for whatever is given up, and no payload in any of them."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

from unibus import Delivery, Discard
from unibus_contracts.contract import contract
from unibus_contracts.kit import AT_ONCE, SOON, Kit, Seen, letters, until


class Said(logging.Handler):
    """Keeps what every logger says, drivers' too."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
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
