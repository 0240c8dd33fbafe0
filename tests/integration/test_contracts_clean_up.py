"""The contract suite on a real broker leaves it as it was: what it has made is gone, and nothing else is."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path

import aiohttp
import pytest
from aiobotocore.session import get_session
from aiokafka.admin import AIOKafkaAdminClient
from redis.asyncio import Redis
from yarl import URL

from unibus import Bus, Queue, Topic
from unibus.url import parse

# Contracts that make what others don't: groups, replies, delays, dead letters, priorities, private subscriptions.
SOME = "roundtrip or broadcast or group_headers or test_floor or test_priority"
SECONDS = 150  # a run takes about ten on an idle machine

pytestmark = pytest.mark.timeout(SECONDS + 30)


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


class Site:
    """One broker, and names that nobody else has. A bystander begins as they do, and must stay."""

    def __init__(self, broker: str, folder: Path) -> None:
        self.url = variable(f"UNIBUS_TEST_{broker}_URL")
        self.report = folder / "report.json"
        self._list = LISTS[broker]
        self._marker = os.urandom(4).hex()
        self._prefix = f"it-{self._marker}."

    def names(self) -> set[str]:
        return {name for name in asyncio.run(self._list()) if self._marker in name}

    def bystander(self) -> None:
        async def make() -> None:
            queue, topic = Queue("bystander", bytes), Topic("standing-by", bytes)
            bus = Bus(self.url, service="svc", prefix=self._prefix, channels=[queue, topic], config=False, environ={})
            async with bus:
                await bus.send(queue, b"stays")

        asyncio.run(make())

    def command(self, *arguments: str) -> list[str]:
        common = [f"--unibus-url={self.url}", f"--unibus-prefix={self._prefix}", f"--unibus-report={self.report}"]
        # Nothing of this repository's configuration, as with who has installed the package.
        return [
            *(sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "no:cacheprovider"),
            *("--rootdir", str(self.report.parent), "-o", "asyncio_default_fixture_loop_scope=function"),
            *("--pyargs", "unibus_contracts", *common, *arguments),
        ]


@pytest.mark.parametrize("broker", LISTS)
def test_what_a_run_has_made_is_gone(broker: str, tmp_path: Path) -> None:
    site = Site(broker, tmp_path)
    site.bystander()
    before = site.names()
    assert before
    done = subprocess.run(site.command("-q", "-k", SOME), capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stdout
    assert "deleted on the broker: " in done.stdout
    assert "not deleted" not in done.stdout
    assert site.names() == before


@pytest.mark.parametrize(("broker", "workers"), [("REDIS", []), ("RABBITMQ", ["-n", "2"])])
def test_what_was_made_before_ctrl_c_is_gone(broker: str, workers: list[str], tmp_path: Path) -> None:
    """The report says what was kept by then, and that it is a part."""
    site = Site(broker, tmp_path)
    site.bystander()
    before = site.names()
    command = site.command("-v", *workers)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stdout is not None
        said = []
        for line in run.stdout:
            said.append(line)
            if sum("PASSED" in one for one in said) == 10:
                os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all processes of the run
                break
        said.append(run.communicate(timeout=SECONDS)[0])
    text = "".join(said)
    assert run.returncode == pytest.ExitCode.INTERRUPTED, text
    assert "deleted on the broker: " in text
    assert "not deleted" not in text
    assert site.names() == before
    report = json.loads(site.report.read_text())
    assert not report["finished"]
    assert {entry["outcome"] for entry in report["contracts"]} >= {"passed", "not-run"}
