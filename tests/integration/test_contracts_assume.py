"""The contract suite as a user of RabbitMQ who may create nothing, on channels that an administrator has made."""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aio_pika
import aiohttp
import pytest
from tests.integration.broker_lists import rabbitmq, variable
from yarl import URL

from unibus import Bus, PermissionDenied
from unibus.tooling import attached, declare
from unibus_contracts import report, runner
from unibus_contracts.catalogue import catalogue

KEEP = ("settle.individually", "dlq.at_once", "fanout.groups_get_all", "delay.is_floor", "publish.missing_topic_raises")
CREATE = {
    "fanout.new_group_starts_now": "it makes channels while it runs",
    "reply.roundtrip": "this user may not make inboxes: .*ACCESS_REFUSED",
    "fanout.broadcast_reaches_each": "this user may not make groups of a process: .*ACCESS_REFUSED",
}
SECONDS = 900  # ten on an idle machine

pytestmark = pytest.mark.timeout(SECONDS)


def run(url: str, listed: Path, *arguments: str) -> dict[str, Any]:
    tests = [catalogue()[id][1] for id in (*KEEP, *CREATE)]
    found, _ = runner.run(url, lambda _id, _outcome: None, f"--unibus-channels={listed}", *arguments, tests=tests)
    assert report.problems(found) == [], found
    return {one["id"]: one for one in found["contracts"] if one["outcome"] != report.NOT_RUN}


class Site:
    """`url`: of a user who may read and write what begins with the prefix, and create nothing."""

    def __init__(self) -> None:
        self.prefix = f"assume-{secrets.token_hex(4)}."
        self.user = self.prefix.rstrip(".")
        self.url = f"amqp://{self.user}:pw@{variable('UNIBUS_TEST_RABBITMQ_URL').rpartition('@')[2]}"

    async def call(self, method: str, path: str, body: dict[str, str] | None = None) -> None:
        """The management API, as an administrator uses it."""
        api = URL(variable("UNIBUS_TEST_RABBITMQ_API"))
        login = {"Authorization": f"Basic {base64.b64encode(f'{api.user}:{api.password}'.encode()).decode()}"}
        async with aiohttp.ClientSession(headers=login, raise_for_status=True) as session:
            await session.request(method, URL(f"{api.with_user(None)}/{path}", encoded=True), json=body)

    async def names(self) -> set[str]:
        return {name for name in await rabbitmq() if self.prefix in name}


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    made = Site()
    await made.call("PUT", f"users/{made.user}", {"password": "pw", "tags": ""})
    ours = re.escape(made.prefix)
    rights = {"configure": "^$", "write": rf"^({ours}.*|amq\.default)$", "read": f"^{ours}"}
    await made.call("PUT", f"permissions/%2F/{made.user}", rights)
    try:
        yield made
    finally:
        await made.call("DELETE", f"users/{made.user}")
        async with await aio_pika.connect(variable("UNIBUS_TEST_RABBITMQ_URL")) as connection:
            channel = await connection.channel()
            for kind, _, name in (one.partition(" ") for one in await made.names()):
                await (channel.queue_delete if kind == "queues" else channel.exchange_delete)(name)


async def test_a_user_who_may_create_nothing(site: Site, tmp_path: Path) -> None:
    listed = tmp_path / "list.toml"
    made = run(variable("UNIBUS_TEST_RABBITMQ_URL"), listed, f"--unibus-prefix={site.prefix}")
    assert {one["outcome"] for one in made.values()} == {report.PASSED}
    assert await site.names() == set(), "what the first run has made is deleted"

    with pytest.raises(PermissionDenied):  # or the test proves nothing
        await make(site.url, listed)
    assert await site.names() == set()
    await make(variable("UNIBUS_TEST_RABBITMQ_URL"), listed)
    before = await site.names()
    assert before
    for _ in range(2):  # dead letters of the first run are in the way of the second
        found = run(site.url, listed, "--unibus-declare=assume")
        assert {id for id, one in found.items() if one["outcome"] == report.PASSED} == set(KEEP)
        for id, reason in CREATE.items():
            assert found[id]["outcome"] == report.NOT_TRIED
            assert re.match(reason, found[id]["reason"]), found[id]
        assert await site.names() == before


async def make(url: str, listed: Path) -> None:
    """As `unibus declare` does it."""
    async with attached(Bus(url, config=listed, environ={})) as bus:
        await declare(bus)
