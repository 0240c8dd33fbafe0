"""With clients that know nothing of unibus: both ways, on each broker, for a queue and for a topic.

What a native client sends is handled as an ordinary message, and what unibus sends is read by a native client: body, key
where the broker has one, and the user's headers, where the documents of that broker say they are.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

import aio_pika
import pytest
from aiobotocore.session import get_session
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from redis.asyncio import Redis

from unibus import Bus, Delivery, Queue, Topic
from unibus.url import parse
from unibus_contracts import supply
from unibus_kafka import config as kafka_config

SOON = 50.0
BODY = b'{"a": 1}'
HEADERS = {"tenant": "a\u00e7me"}


class Native(Protocol):
    """A client of the broker's own. Names are those on the broker, prefix and all."""

    async def send(self, name: str, *, topic: bool) -> None:
        """BODY with HEADERS."""
        ...

    @asynccontextmanager
    async def reading(self, name: str, *, topic: bool) -> AsyncIterator[Callable[[], Any]]:
        """From now on; the callable awaits (body, user's headers) of the next message."""
        yield lambda: None


class RabbitMQ:
    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self._url, self._stack = url, stack

    async def _channel(self) -> Any:
        return await (await self._stack.enter_async_context(await aio_pika.connect(self._url))).channel()

    async def send(self, name: str, *, topic: bool) -> None:
        channel = await self._channel()
        exchange = await channel.get_exchange(name) if topic else channel.default_exchange
        await exchange.publish(aio_pika.Message(BODY, headers=dict(HEADERS)), "" if topic else name)

    @asynccontextmanager
    async def reading(self, name: str, *, topic: bool) -> AsyncIterator[Callable[[], Any]]:
        channel = await self._channel()
        if topic:
            queue = await channel.declare_queue(exclusive=True)
            await queue.bind(name, "#")
        else:
            queue = await channel.get_queue(name)

        async def read() -> tuple[bytes, dict[str, Any]]:
            message = await queue.get(timeout=SOON, fail=False)
            while message is None:
                await asyncio.sleep(0.05)
                message = await queue.get(timeout=SOON, fail=False)
            await message.ack()
            return message.body, dict(message.headers)

        yield read


class Kafka:
    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self._options = kafka_config.client(parse(url), kafka_config.settings({}), None, "raw")

    async def send(self, name: str, *, topic: bool) -> None:
        async with AIOKafkaProducer(**self._options) as producer:
            await producer.send_and_wait(name, BODY, headers=[(n, v.encode()) for n, v in HEADERS.items()])

    @asynccontextmanager
    async def reading(self, name: str, *, topic: bool) -> AsyncIterator[Callable[[], Any]]:
        async with AIOKafkaConsumer(name, **self._options, auto_offset_reset="earliest") as consumer:

            async def read() -> tuple[bytes, dict[str, Any]]:
                record = await consumer.getone()
                return record.value, {n: v.decode() for n, v in record.headers}

            yield read


class RedisStreams:
    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self._url = url

    async def send(self, name: str, *, topic: bool) -> None:
        async with Redis.from_url(self._url, protocol=2) as client:
            fields: Any = {"body": BODY, **HEADERS}
            await client.xadd(name, fields)

    @asynccontextmanager
    async def reading(self, name: str, *, topic: bool) -> AsyncIterator[Callable[[], Any]]:
        async with Redis.from_url(self._url, protocol=2) as client:
            if topic:  # a queue has the group of unibus; a topic has whoever makes one
                await client.xgroup_create(name, "theirs", "$")
            group = "theirs" if topic else "unibus"

            async def read() -> tuple[bytes, dict[str, Any]]:
                found: Any = None
                while not found:
                    found = await client.xreadgroup(group, "me", {name: ">"}, count=1, block=1000)
                ((_, ((id, fields),)),) = found
                await client.xack(name, group, id)
                return fields[b"body"], json.loads(fields[b"headers"])

            yield read


class Aws:
    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self._url, self._stack = parse(url), stack

    async def _client(self, service: str) -> Any:
        assert self._url.password is not None
        return await self._stack.enter_async_context(
            get_session().create_client(
                service,
                region_name=self._url.hosts[0][0],
                endpoint_url=self._url.query["endpoint_url"],
                aws_access_key_id=self._url.username,
                aws_secret_access_key=self._url.password.value,
            )
        )

    async def send(self, name: str, *, topic: bool) -> None:
        attributes = {n: {"DataType": "String", "StringValue": v} for n, v in HEADERS.items()}
        name = name.replace(".", "_-")  # SQS knows no dots
        if topic:
            sns = await self._client("sns")
            arn = (await sns.create_topic(Name=name))["TopicArn"]  # of one that is there it only says the ARN
            await sns.publish(TopicArn=arn, Message=BODY.decode(), MessageAttributes=attributes)
        else:
            sqs = await self._client("sqs")
            url = (await sqs.get_queue_url(QueueName=name))["QueueUrl"]
            await sqs.send_message(QueueUrl=url, MessageBody=BODY.decode(), MessageAttributes=attributes)

    @asynccontextmanager
    async def reading(self, name: str, *, topic: bool) -> AsyncIterator[Callable[[], Any]]:
        sqs = await self._client("sqs")
        name = name.replace(".", "_-")
        if topic:
            sns = await self._client("sns")
            url = (await sqs.create_queue(QueueName=f"{name}-theirs"))["QueueUrl"]
            arn = (await sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"]))["Attributes"]["QueueArn"]
            topic_arn = (await sns.create_topic(Name=name))["TopicArn"]
            allow = {"Effect": "Allow", "Principal": "*", "Action": "sqs:SendMessage", "Resource": arn}
            policy = json.dumps({"Version": "2012-10-17", "Statement": [allow]})
            await sqs.set_queue_attributes(QueueUrl=url, Attributes={"Policy": policy})
            raw = {"RawMessageDelivery": "true"}
            await sns.subscribe(TopicArn=topic_arn, Protocol="sqs", Endpoint=arn, Attributes=raw)
        else:
            url = (await sqs.get_queue_url(QueueName=name))["QueueUrl"]

        async def read() -> tuple[bytes, dict[str, Any]]:
            found: list[Any] = []
            while not found:
                answer = await sqs.receive_message(QueueUrl=url, WaitTimeSeconds=2, MessageAttributeNames=["All"])
                found = answer.get("Messages") or []
            await sqs.delete_message(QueueUrl=url, ReceiptHandle=found[0]["ReceiptHandle"])
            return found[0]["Body"].encode(), json.loads(found[0]["MessageAttributes"]["unibus"]["StringValue"])

        yield read


NATIVE: dict[str, Callable[[str, AsyncExitStack], Native]] = {
    "rabbitmq": RabbitMQ,
    "kafka": Kafka,
    "redis": RedisStreams,
    "sqs": Aws,
}

pytestmark = [
    pytest.mark.parametrize("broker", NATIVE),
    pytest.mark.parametrize("topic", [False, True], ids=["queue", "topic"]),
]


@asynccontextmanager
async def native(broker: str) -> AsyncIterator[tuple[Native, str]]:
    url = supply.running([broker])[0].url
    async with AsyncExitStack() as stack:
        yield NATIVE[broker](url, stack), url


def make(url: str, *channels: Any) -> tuple[Bus, str]:
    prefix = f"io-{secrets.token_hex(4)}."
    return Bus(url, service="svc", prefix=prefix, config=False, environ={}, channels=channels), prefix


async def test_what_a_native_client_sends_is_handled(broker: str, topic: bool) -> None:
    handled: asyncio.Queue[tuple[Any, dict[str, str], str, int]] = asyncio.Queue()

    async def handle(body: dict[str, int], delivery: Delivery[dict[str, int]]) -> None:
        message = delivery.message
        handled.put_nowait((body, dict(message.headers), message.id, delivery.attempt))

    async with native(broker) as (client, url):
        bus, prefix = make(url)
        if topic:
            bus.subscriber(Topic("things", dict[str, int]), group="readers")(handle)
        else:
            bus.consumer(Queue("things", dict[str, int]))(handle)
        async with bus.running(), asyncio.timeout(SOON):
            await client.send(f"{prefix}things", topic=topic)
            body, headers, id, attempt = await handled.get()
    assert (body, headers, attempt) == ({"a": 1}, HEADERS, 1)
    assert id, "it has none of its own, so one is made for it"


async def test_what_unibus_sends_is_read_by_a_native_client(broker: str, topic: bool) -> None:
    things: Any = Topic("things", dict[str, int]) if topic else Queue("things", dict[str, int])
    async with native(broker) as (client, url):
        bus, prefix = make(url, things)
        async with bus, client.reading(f"{prefix}things", topic=topic) as read, asyncio.timeout(SOON):
            await (bus.publish if topic else bus.send)(things, {"a": 1}, headers=HEADERS)
            body, headers = await read()
    assert json.loads(body) == {"a": 1}
    assert headers.items() >= HEADERS.items()
