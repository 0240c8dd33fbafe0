"""Kafka: unibus beside aiokafka at its best with the same guarantee: idempotent sends in batches; a commit for each batch read."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Mapping
from dataclasses import replace
from time import time
from typing import Any, Self

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient

from benchmarks import backlog
from benchmarks.cases import Case
from benchmarks.flows import Contestant, Declared, Flow, Plan, Unibus, measure
from benchmarks.load import BODY, Handled, flood
from benchmarks.watch import Profiles, Watch
from unibus.url import parse

BASE = "aiokafka"
FLOWS = (Flow(500), Flow(20, sends=False))
_MANY = 500  # records a read
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


class AioKafka:
    """aiokafka. Headers and timestamp as unibus writes them; all of them are read."""

    name = BASE

    def __init__(self, url: str) -> None:
        self._options = options(url)
        self._ids = map(f"{secrets.token_hex(8)}-%x".__mod__, itertools.count(1))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def send(self, queue: str, messages: int, headers: Mapping[str, str] | None, watch: Watch) -> None:
        more = [(name, value.encode()) for name, value in (headers or {}).items()]

        async def one() -> None:
            own = [("x-message-id", next(self._ids).encode()), _CONTENT_TYPE, *more]
            await producer.send_and_wait(queue, BODY, headers=own, timestamp_ms=round(time() * 1000))

        producer = AIOKafkaProducer(**self._options, acks="all", enable_idempotence=True, max_batch_size=128 * 1024)
        async with producer:
            watch.start()
            await flood(one, messages)
            watch.stop()

    async def consume(self, queue: str, messages: int, prefetch: int, watch: Watch) -> int:
        handled = Handled(messages)
        consumer = AIOKafkaConsumer(
            queue, **self._options, group_id=queue, enable_auto_commit=False, auto_offset_reset="earliest"
        )
        watch.start()
        async with consumer:
            while not handled.all.is_set():
                for records in (await consumer.getmany(timeout_ms=200, max_records=_MANY)).values():
                    for record in records:
                        found = {name: value.decode() for name, value in record.headers}
                        own, kind = found.pop("x-message-id"), found.pop("x-content-type")
                        handled.handle(record.value, own, kind, record.timestamp, found)
                        handled.settled()
                    await consumer.commit()
            watch.stop()
        return handled.count


async def run(url: str, plan: Plan, profiles: Profiles) -> tuple[list[Case], str]:
    """The cases, and the broker's version."""
    admin = AIOKafkaAdminClient(**options(url))
    await admin.start()

    async def delete(queue: str) -> None:
        await admin.delete_topics([name for name in await admin.list_topics() if name.startswith(queue)])

    try:
        found: list[Case] = []
        contestants: list[Contestant] = [Unibus(url)] if profiles else [Unibus(url), AioKafka(url)]
        stage = Declared(url, delete)
        if plan.backlog:
            found.append(await backlog.measure("Kafka", url, stage, plan.backlog))
            plan = replace(plan, flows=0)
        for flow in FLOWS[: 1 if profiles else plan.flows]:
            found += await measure("Kafka", stage, contestants, flow, plan, profiles)
    finally:
        await admin.close()
    return found, await stage.version()
