"""What is on a broker, seen by its own client: nothing of unibus takes part, so that unibus can't hide a loss.

`left` reads a broker that one run had for itself, after the run. On Kafka it also finds what was read long ago, since a log
keeps it (`logged`): whether the broker has ever had a message is known there. RabbitMQ, Redis and SQS forget what is settled, so
of them it is only known what is there still.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from unibus_contracts.history.check import DEAD, INVALID, LOGGED, STORED
from unibus_contracts.supply import Broker

_VALUE = re.compile(rb'\\*"value\\*":\\*"([^"\\]+)')


@dataclass(frozen=True, slots=True)
class Found:
    """A message on the broker. `where`: as a history's `look` says it; `object`: the broker's own name of where it lies."""

    value: str
    where: str
    object: str

    def group(self, groups: Iterable[str]) -> str:
        """Whose it is, by the name of where it lies; empty when it may be anybody's."""
        return next((g for g in groups if re.search(rf"[._-]{g}(?![a-z])", self.object)), "")


def _found(body: bytes, name: str, where: str = "") -> Found | None:
    """None for a body that is not of this work."""
    match = _VALUE.search(body)
    return Found(match[1].decode(), where or _where(name), name) if match else None


def _where(name: str) -> str:
    last = re.split(r"[._-]+", name.removesuffix(".fifo"))[-1]
    return {"dlq": DEAD, "invalid": INVALID}.get(last, STORED)


async def left(kind: str, broker: Broker) -> AsyncIterator[Found]:
    """All messages on the broker. Raises what the client raises."""
    seen: Callable[[Broker], AsyncIterator[Found | None]] = _CLIENTS[kind]
    async for found in seen(broker):
        if found is not None:
            yield found


async def _rabbitmq(broker: Broker) -> AsyncIterator[Found | None]:
    import aio_pika
    import aiohttp

    api = urlsplit(broker.variables["UNIBUS_TEST_RABBITMQ_API"])
    account = f"{unquote(api.username or '')}:{unquote(api.password or '')}"
    headers = {"Authorization": f"Basic {b64encode(account.encode()).decode()}"}
    server = f"{api.scheme}://{api.hostname}:{api.port}{api.path}"
    async with aiohttp.ClientSession(headers=headers) as http, http.get(f"{server}/queues/%2F") as answer:
        answer.raise_for_status()
        names = [queue["name"] for queue in await answer.json()]
    async with await aio_pika.connect(broker.url) as connection:
        for name in names:
            channel = await connection.channel()
            queue = await channel.declare_queue(name, passive=True)
            count = queue.declaration_result.message_count or 0
            async with queue.iterator(
                timeout=30
            ) as messages:  # basic.get is refused where there is a single active consumer
                while count:
                    message = await anext(messages)
                    yield _found(message.body, name)
                    count -= 1
            await channel.close()  # nothing was acked: it all goes back


async def _redis(broker: Broker) -> AsyncIterator[Found | None]:
    from redis.asyncio import Redis

    async with Redis.from_url(broker.url) as client:
        async for key in client.scan_iter(count=1000):
            name = key.decode()
            kind = await client.type(key)
            if kind == b"hash":
                values: list[Any] = await client.hvals(key)
                for value in values:
                    yield _found(value, name)
            elif kind == b"stream":
                groups = await client.xinfo_groups(key)
                if not groups:
                    for _, fields in await client.xrange(key) or ():
                        yield _found(_body(fields), name)
                for group in groups:
                    # Not handed out yet, and handed out without an end. What all have settled may wait to be trimmed.
                    rest: list[Any] = list(await client.xrange(key, min=b"(" + group["last-delivered-id"]) or ())
                    held = await client.xpending_range(key, group["name"], "-", "+", max(1, group["pending"]))
                    for entry in held:
                        rest += await client.xrange(key, entry["message_id"], entry["message_id"]) or ()
                    for _, fields in rest:
                        yield _found(_body(fields), f"{name}.{group['name'].decode()}", _where(name))


def _body(fields: Any) -> bytes:
    found: bytes = (fields or {}).get(b"body", b"")
    return found


async def _kafka(broker: Broker) -> AsyncIterator[Found | None]:
    from aiokafka import AIOKafkaConsumer, TopicPartition
    from aiokafka.admin import AIOKafkaAdminClient

    parts = urlsplit(broker.url)
    to: dict[str, Any] = {
        "bootstrap_servers": parts.netloc.rpartition("@")[2],
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": parse_qs(parts.query).get("sasl_mechanism", ["PLAIN"])[0],
        "sasl_plain_username": unquote(parts.username or ""),
        "sasl_plain_password": unquote(parts.password or ""),
    }
    admin = AIOKafkaAdminClient(**to)
    await admin.start()
    try:
        names = [group for group, _ in await admin.list_consumer_groups()]
        committed = {name: await admin.list_consumer_group_offsets(name) for name in names}
        topics = {topic["topic"]: topic["partitions"] for topic in await admin.describe_topics()}
    finally:
        await admin.close()
    for topic, partitions in topics.items():
        tps = [TopicPartition(topic, each["partition"]) for each in partitions if not topic.startswith("__")]
        if not tps:
            continue
        async with AIOKafkaConsumer(**to, enable_auto_commit=False) as consumer:
            consumer.assign(tps)
            begins, ends = await consumer.beginning_offsets(tps), await consumer.end_offsets(tps)
            for tp in tps:
                consumer.seek(tp, begins[tp])
            at = dict(begins)
            while any(at[tp] < ends[tp] for tp in tps):
                for tp, records in (await consumer.getmany(timeout_ms=1000, max_records=5000)).items():
                    at[tp] = records[-1].offset + 1
                    for record in records:
                        for group, where in _of_record(topic, tp, record.offset, committed):
                            yield _found(record.value or b"", f"{topic}.{group}" if group else topic, where)


def _of_record(
    topic: str, tp: Any, offset: int, committed: Mapping[str, Mapping[Any, Any]]
) -> Iterable[tuple[str, str]]:
    """What is known of a record: that it was there, and which groups have not come so far."""
    if _where(topic) != STORED:
        yield "", _where(topic)
        return
    yield "", LOGGED
    for group, offsets in committed.items():
        if tp in offsets and offset >= offsets[tp].offset:
            yield group, STORED


async def _sqs(broker: Broker) -> AsyncIterator[Found | None]:
    from aiobotocore.session import get_session

    parts = urlsplit(broker.url)
    given = parse_qs(parts.query)
    session = get_session()
    async with session.create_client(
        "sqs",
        region_name=parts.hostname,
        endpoint_url=given["endpoint_url"][0],
        aws_access_key_id=unquote(parts.username or ""),
        aws_secret_access_key=unquote(parts.password or ""),
    ) as client:
        async for page in client.get_paginator("list_queues").paginate():
            for url in page.get("QueueUrls", ()):
                name = url.rpartition("/")[2]
                # An empty answer of SQS does not prove that nothing is there; two of them, after a wait, come close.
                empty, taken = 0, []
                while empty < 2:
                    answer = await client.receive_message(
                        QueueUrl=url, MaxNumberOfMessages=10, VisibilityTimeout=600, WaitTimeSeconds=empty
                    )
                    messages = answer.get("Messages", ())
                    empty = 0 if messages else empty + 1
                    for message in messages:
                        taken.append(message["ReceiptHandle"])
                        yield _found(message["Body"].encode(), name)
                for handle in taken:  # the next one who looks is to see them too
                    await client.change_message_visibility(QueueUrl=url, ReceiptHandle=handle, VisibilityTimeout=0)


_CLIENTS: Mapping[str, Callable[[Broker], AsyncIterator[Found | None]]] = {
    "rabbitmq": _rabbitmq,
    "redis": _redis,
    "kafka": _kafka,
    "sqs": _sqs,
}
