"""What the SQS tests work with: an adapter behind the SPI, buses, and raw aiobotocore clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache
from typing import Any

import pytest
from aiobotocore.session import get_session

from unibus import Bus, Delivery, Message, Queue, Topic
from unibus.adapter import Declared, Endpoint, Outgoing, Source, Subscription, Topology, Url
from unibus.channel import Group
from unibus.clock import SystemClock
from unibus.message import new_id
from unibus.url import parse
from unibus_sqs import SqsAdapter
from unibus_sqs.subscription import SqsSubscription

SOON = 15.0
URL = "UNIBUS_TEST_SQS_URL"


async def eventually(probe: Callable[[], Awaitable[Any]]) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + SOON
    while not (answer := await probe()):
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.02)
    return answer


@cache
def _session() -> Any:
    """One for all: it reads the description of a service once, which takes longer than most tests."""
    return get_session()


class Bench:
    """Names of its own, adapters behind the SPI, buses, and raw clients."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.prefix = f"it-{secrets.token_hex(4)}."
        self.stack = contextlib.AsyncExitStack()
        self.adapters: list[SqsAdapter] = []
        self.sqs: Any = None
        self.sns: Any = None

    async def client(self, service: str) -> Any:
        parsed = parse(self.url)
        assert parsed.password is not None
        return await self.stack.enter_async_context(
            _session().create_client(
                service,
                region_name=parsed.hosts[0][0],
                endpoint_url=parsed.query["endpoint_url"],
                aws_access_key_id=parsed.username,
                aws_secret_access_key=parsed.password.value,
            )
        )

    def endpoint(self, url: Url | None = None, **settings: object) -> Endpoint:
        url = url or parse(self.url)
        return Endpoint(url, "svc", secrets.token_hex(4), SystemClock(), self.prefix, {**url.query, **settings})

    async def adapter(self, *channels: Declared, endpoint: Endpoint | None = None, **more: Any) -> SqsAdapter:
        adapter = SqsAdapter(endpoint or self.endpoint(**more))
        self.adapters.append(adapter)
        await adapter.connect()
        if channels:
            await adapter.declare(Topology(channels=channels))
        return adapter

    def bus(self, *channels: Any, **settings: Any) -> Bus:
        given: dict[str, Any] = {"service": "svc", "prefix": self.prefix, "config": False, "environ": {}, **settings}
        return Bus(self.url, channels=channels, **given)

    def queue(self, name: str = "q", options: dict[str, object] | None = None, **features: Any) -> Declared:
        return Declared(Queue(name, **features), self.prefix + name, options=options or {})

    def topic(self, name: str = "t", options: dict[str, object] | None = None, **features: Any) -> Declared:
        return Declared(Topic(name, **features), self.prefix + name, options=options or {})

    def group(self, topic: Declared, name: str = "g", options: dict[str, object] | None = None) -> Declared:
        assert isinstance(topic.address, Topic)
        return Declared(Group(topic.address, name), f"{topic.name}.{name}", options=options or {})

    async def url_of(self, name: str) -> str:
        """The queue of this name as AWS spells it."""
        answer = await self.sqs.get_queue_url(QueueName=self.prefix.replace(".", "_-") + name)
        return str(answer["QueueUrl"])

    async def topic_arn(self, name: str) -> str:
        answer = await self.sns.create_topic(Name=self.prefix.replace(".", "_-") + name)
        return str(answer["TopicArn"])

    async def raw_receive(self, name: str, **more: Any) -> list[Any]:
        answer = await self.sqs.receive_message(
            QueueUrl=await self.url_of(name), MaxNumberOfMessages=10, MessageAttributeNames=["All"], **more
        )
        return list(answer.get("Messages") or [])


@contextlib.asynccontextmanager
async def at(url: str) -> AsyncIterator[Bench]:
    bench = Bench(url)
    bench.sqs, bench.sns = await bench.client("sqs"), await bench.client("sns")
    try:
        yield bench
    finally:
        for adapter in bench.adapters:
            await adapter.close()
        await bench.stack.aclose()


def broker_url() -> str:
    url = os.environ.get(URL)
    if not url:
        pytest.fail(f"{URL} is not set; `make brokers-up` starts a broker and prints it")
    return url


def out(to: Any, body: bytes = b"x", not_before: float | None = None, **fields: Any) -> Outgoing:
    return Outgoing(
        to.address if isinstance(to, Declared) else to, Message(body, **{"id": new_id(), **fields}), not_before
    )


async def send(adapter: SqsAdapter, *batch: Outgoing) -> None:
    assert list(await adapter.send(batch, SOON)) == [None] * len(batch)


async def take(subscription: Subscription, count: int = 1) -> list[Delivery[Any]]:
    taken: list[Delivery[Any]] = []

    async def more() -> bool:
        taken.extend(await subscription.receive(count - len(taken), 1))
        return len(taken) >= count

    await eventually(more)
    return taken


async def subscribe(adapter: SqsAdapter, of: Declared, **source: Any) -> SqsSubscription:
    assert not isinstance(of.address, Topic)
    return await adapter.subscribe(Source(of.address, **source))
