"""Kafka: unibus beside aiokafka at its best with the same guarantee: idempotent sends in batches; a commit for each batch read."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from time import time
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from benchmarks.flows import Contestant, Flow, Raw
from benchmarks.load import BODY, Handled, busy, flood, round_trips
from benchmarks.watch import Watch
from unibus.url import parse

BASE = "aiokafka"
BATCH = 256 * 1024  # bytes, as unibus has it
PREFETCH = 500  # and records a read
_CONTENT_TYPE = ("x-content-type", b"application/octet-stream")


def options(url: str) -> dict[str, Any]:
    """For any client of the library; there is a password in it."""
    found = parse(url)
    sasl: dict[str, Any] = {}
    if found.username is not None and found.password is not None:
        sasl = {
            "security_protocol": "SASL_PLAINTEXT",
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_plain_username": found.username,
            "sasl_plain_password": found.password.value,
        }
    return {"bootstrap_servers": [f"{host}:{port}" for host, port in found.hosts], **sasl}


class AioKafka(Raw):
    """aiokafka. Headers and timestamp as unibus writes them; all of them are read."""

    name = BASE

    def __init__(self, url: str) -> None:
        self._options = options(url)
        self._ids = map(f"{secrets.token_hex(8)}-%x".__mod__, itertools.count(1))

    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        more = [(name, value.encode()) for name, value in flow.headers]

        async def one() -> None:
            own = [("x-message-id", next(self._ids).encode()), _CONTENT_TYPE, *more]
            await producer.send_and_wait(queue, flow.body, headers=own, timestamp_ms=round(time() * 1000))

        producer = AIOKafkaProducer(**self._options, acks="all", enable_idempotence=True, max_batch_size=BATCH)
        async with producer:
            watch.start()
            await flood(one, messages, flow.in_flight)
            watch.stop()

    async def consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int:
        handled = Handled(messages, watch)
        consumer = AIOKafkaConsumer(
            queue, **self._options, group_id=queue, enable_auto_commit=False, auto_offset_reset="earliest"
        )
        watch.start()
        async with consumer:
            while not handled.all.is_set():
                for records in (await consumer.getmany(timeout_ms=200, max_records=PREFETCH)).values():
                    for record in records:
                        found = {name: value.decode() for name, value in record.headers}
                        own, kind = found.pop("x-message-id"), found.pop("x-content-type")
                        handled.handle(record.value, own, kind, record.timestamp, found)
                        handled.settled()
                    await consumer.commit()
            watch.stop()
        return handled.count

    async def requests(self, queue: str, count: int, watch: Watch) -> list[float]:
        """Request sent and read by a group, answered to a topic of the requester's, read there; then its offset committed."""
        inbox = f"{queue}-replies"
        waiting: dict[bytes, asyncio.Future[bytes]] = {}
        producer = AIOKafkaProducer(**self._options, acks="all", enable_idempotence=True)
        own = {**self._options, "enable_auto_commit": False, "auto_offset_reset": "earliest"}
        asked = AIOKafkaConsumer(queue, **own, group_id=queue)
        answers = AIOKafkaConsumer(**own)

        async def answer() -> None:
            async for record in asked:
                await producer.send_and_wait(inbox, record.value, headers=list(record.headers))
                await asked.commit()

        async def answered() -> None:
            async for record in answers:
                waiting.pop(dict(record.headers)["x-message-id"]).set_result(record.value)

        async def ask() -> None:
            number = next(self._ids).encode()
            future = waiting[number] = asyncio.get_running_loop().create_future()
            await producer.send_and_wait(queue, BODY, headers=[("x-message-id", number), _CONTENT_TYPE])
            await future

        async with producer:
            await producer.send_and_wait(inbox, BODY, headers=[("x-message-id", b"")])  # makes the topic
            waiting[b""] = asyncio.get_running_loop().create_future()
            answers.assign([TopicPartition(inbox, p) for p in await producer.partitions_for(inbox)])
            async with asked, answers, busy(answer(), answered()):
                return await round_trips(ask, count, watch)


class Batches(AioKafka):
    """What is left where nothing is done for a message but to put it into one of aiokafka's batches, for a caller who awaits it."""

    name = "aiokafka's batches, nothing else"
    only_sends = True

    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        loop = asyncio.get_running_loop()
        waiting: list[asyncio.Future[None]] = []
        flying: asyncio.Task[None] | None = None
        headers = [("x-message-id", next(self._ids).encode()), _CONTENT_TYPE]

        async def fly() -> None:
            nonlocal waiting, flying
            while waiting:
                sent, waiting = waiting, []
                at = 0
                while at < len(sent):
                    batch, begin = producer.create_batch(), at
                    while at < len(sent) and batch.append(timestamp=0, key=None, value=flow.body, headers=headers):
                        at += 1
                    await (await producer.send_batch(batch, queue, partition=0))
                    for each in sent[begin:at]:
                        each.set_result(None)
            flying = None

        async def one() -> None:
            nonlocal flying
            waiting.append(confirmed := loop.create_future())
            if flying is None:
                flying = loop.create_task(fly())
            await confirmed

        producer = AIOKafkaProducer(**self._options, acks="all", enable_idempotence=True, max_batch_size=BATCH)
        async with producer:
            watch.start()
            await flood(one, messages, flow.in_flight)
            watch.stop()


def contestants(url: str) -> list[Contestant]:
    return [AioKafka(url), Batches(url)]
