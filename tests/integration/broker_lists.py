"""What a broker has, by its own tools: to see what a run has left there."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Coroutine

import aiohttp
import pytest
from aiobotocore.session import get_session
from aiokafka.admin import AIOKafkaAdminClient
from redis.asyncio import Redis
from yarl import URL

from unibus.url import parse


def variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        pytest.fail(f"{name} is not set; `make brokers-up` starts a broker and prints it")
    return value


async def rabbitmq() -> set[str]:
    """By the management API: names, without those of the server."""
    where = URL(variable("UNIBUS_TEST_RABBITMQ_API"))
    login = base64.b64encode(f"{where.user}:{where.password}".encode()).decode()
    found = set()
    async with aiohttp.ClientSession(headers={"Authorization": f"Basic {login}"}) as session:
        for kind in ("queues", "exchanges"):
            async with session.get(where.with_user(None) / kind) as answer:
                found |= {f"{kind} {one['name']}" for one in await answer.json()}
    return found


async def redis() -> set[str]:
    async with Redis.from_url(variable("UNIBUS_TEST_REDIS_URL")) as client:
        return {key.decode() async for key in client.scan_iter(count=1000)}


async def kafka() -> set[str]:
    url = parse(variable("UNIBUS_TEST_KAFKA_URL"))
    servers = ",".join(f"{host}:{port}" for host, port in url.targets(9092))
    login = {}
    if url.username is not None and url.password is not None:
        login = {
            "security_protocol": "SASL_PLAINTEXT",
            "sasl_mechanism": "PLAIN",
            "sasl_plain_username": url.username,
            "sasl_plain_password": url.password.value,
        }
    client = AIOKafkaAdminClient(bootstrap_servers=servers, **login)
    await client.start()
    try:
        groups = {f"group {name}" for name, _ in await client.list_consumer_groups()}
        return groups | {f"topic {name}" for name in await client.list_topics()}
    finally:
        await client.close()


async def sqs() -> set[str]:
    url = parse(variable("UNIBUS_TEST_SQS_URL"))
    where = {
        "region_name": url.hosts[0][0],
        "endpoint_url": url.query["endpoint_url"],
        "aws_access_key_id": url.username or "x",
        "aws_secret_access_key": url.password.value if url.password else "x",
    }
    session, found = get_session(), set()
    async with session.create_client("sqs", **where) as queues:
        async for page in queues.get_paginator("list_queues").paginate(PaginationConfig={"PageSize": 1000}):
            found |= {f"queue {one}" for one in page.get("QueueUrls", ())}
    async with session.create_client("sns", **where) as topics:
        async for page in topics.get_paginator("list_topics").paginate():
            found |= {f"topic {one['TopicArn']}" for one in page["Topics"]}
        async for page in topics.get_paginator("list_subscriptions").paginate():
            found |= {f"subscription {one['SubscriptionArn']}" for one in page["Subscriptions"]}
    return found


LISTS: dict[str, Callable[[], Coroutine[None, None, set[str]]]] = {
    "RABBITMQ": rabbitmq,
    "KAFKA": kafka,
    "REDIS": redis,
    "SQS": sqs,
}
