"""The rights in docs/brokers/rabbitmq.md are enough, each for what it is said to be, and none is more than needed."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import aio_pika
import pytest
from tests.integration.rabbitmq_kit import SOON, broker_url, until

from unibus import Bus, Queue, RetryPolicy, Topic, deadletter
from unibus.errors import PermissionDenied

PAGE = Path(__file__).parents[2] / "docs/brokers/rabbitmq.md"
API = "UNIBUS_TEST_RABBITMQ_API"

ORDERS, ASKS = Queue("orders", delayed=True), Queue("asks", str, reply=str)
CHARGED = Topic("charged", delayed=True)


def documented() -> dict[str, tuple[str, str, str]]:
    """configure, write, read, by what they are for."""
    page = PAGE.read_text().partition("## Least rights")[2].partition("\n## ")[0]
    rows = page.split("```")[1].splitlines()[2:]
    return {row.split()[0]: tuple(row.split()[1:]) for row in rows}  # type: ignore[misc] # three, or the test fails


class Users:
    """Made by the management API, as an administrator makes them."""

    def __init__(self, prefix: str) -> None:
        given = os.environ.get(API)
        if not given:
            pytest.fail(f"{API} is not set; `make brokers-up` starts a broker and prints it")
        self._api = urlsplit(given)
        self._prefix = prefix
        self._made: list[str] = []

    async def url(self, *roles: str) -> str:
        """Of a new user with the rights of all these."""
        user = self._prefix + "+".join(roles)
        self._made.append(user)
        await self._call("PUT", f"users/{user}", {"password": "pw", "tags": ""})
        rights = ("|".join(documented()[role][n] for role in roles) for n in range(3))
        patterns = (pattern.replace(r"shop\.", re.escape(self._prefix)) for pattern in rights)
        body = dict(zip(("configure", "write", "read"), patterns, strict=True))
        await self._call("PUT", f"permissions/%2F/{user}", body)
        return f"amqp://{user}:pw@{broker_url().rpartition('@')[2]}"

    async def close(self) -> None:
        for user in self._made:
            await self._call("DELETE", f"users/{user}")

    async def _call(self, method: str, path: str, body: dict[str, str] | None = None) -> None:
        api = self._api
        login = base64.b64encode(f"{api.username}:{api.password}".encode()).decode()
        request = Request(  # noqa: S310  # the URL is the test broker's
            f"{api.scheme}://{api.hostname}:{api.port}{api.path}/{path}",
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Basic {login}", "Content-Type": "application/json"},
            method=method,
        )

        def call() -> None:
            with urlopen(request, timeout=SOON):  # noqa: S310  # as above
                pass

        await asyncio.to_thread(call)


@pytest.fixture
async def users() -> AsyncIterator[Users]:
    prefix = f"rights-{secrets.token_hex(4)}."
    made = Users(prefix)
    try:
        yield made
    finally:
        await made.close()
        async with await aio_pika.connect(broker_url()) as connection:
            channel = await connection.channel()
            for name in ("orders", "asks", "charged.billing"):
                for end in ("", ".dlq", ".invalid"):
                    await channel.queue_delete(f"{prefix}{name}{end}")
            for name in ("lost", "void", "hold.100", *(f"hold.{1000 << n}" for n in range(13))):
                await channel.queue_delete(f"{prefix}unibus.{name}")
                await channel.exchange_delete(f"{prefix}unibus.{name}")
            for name in ("charged", "unibus.return"):
                await channel.exchange_delete(prefix + name)


def service(users: Users, url: str, seen: list[bytes], declare: Any, *, only: str = "all") -> Bus:
    """One that does all that the page speaks of, or `only` a part."""
    bus = make(users, url, declare, ORDERS, ASKS, CHARGED)
    wanted = {"consume", "respond", "broadcast"} if only == "all" else {only}

    if "consume" in wanted:

        @bus.consumer(ORDERS, retry=RetryPolicy(max_retries=1, backoff=0.1, max_backoff=0.1))
        async def on_order(body: bytes) -> None:
            seen.append(b"order " + body)
            raise OSError("always")

        @bus.subscriber(CHARGED, group="billing")
        async def on_charged(body: bytes) -> None:
            seen.append(b"charged " + body)

    if "respond" in wanted:

        @bus.responder(ASKS)
        async def answer(body: str) -> str:
            return body.upper()

    if "broadcast" in wanted:

        @bus.subscriber(CHARGED, broadcast=True)
        async def on_all(body: bytes) -> None:
            seen.append(b"broadcast " + body)

    return bus


def make(users: Users, url: str, declare: Any, *channels: Any) -> Bus:
    settings: Any = {"prefix": users._prefix, "service": "svc", "config": False, "environ": {}, "delays": [0.1]}
    return Bus(url, channels=list(channels), declare=declare, **settings)


async def test_the_documented_rights_are_enough(users: Users) -> None:
    seen: list[bytes] = []
    async with service(users, await users.url("declare"), [], "create"):
        pass
    async with service(users, await users.url("verify"), [], "verify"):
        pass
    consuming = service(users, await users.url("consume"), seen, "verify", only="consume")
    responding = service(users, await users.url("respond"), seen, "verify", only="respond")
    listening = service(users, await users.url("broadcast"), seen, "verify", only="broadcast")
    sending = make(users, await users.url("send"), "assume", ORDERS, CHARGED)
    asking = make(users, await users.url("request"), "verify", ASKS)
    looking = make(users, await users.url("browse"), "verify", ORDERS)
    async with consuming.running(), responding.running(), listening.running(), sending, asking, looking:
        await sending.send(ORDERS, b"1", delay=0.1)
        await sending.send(ORDERS, b"2")
        await sending.publish(CHARGED, b"3")
        await until(lambda: consuming.counts.get("dead_lettered") == 2, "two dead letters")
        await until(lambda: len(seen) == 6, "all seen")
        assert await asking.request(ASKS, "x", timeout=SOON) == "X"
        assert (await looking.backlog(ORDERS)).ready == 0
        letters = [letter.message.body async for letter in deadletter.browse(looking, ORDERS)]
    assert sorted(letters) == [b"1", b"2"]
    assert sorted(seen) == [b"broadcast 3", b"charged 3", *[b"order 1"] * 2, *[b"order 2"] * 2]


async def test_a_right_that_is_missing_is_named(users: Users) -> None:
    async with service(users, await users.url("declare"), [], "create"):
        pass
    send = await users.url("send")
    with pytest.raises(PermissionDenied, match=re.escape(users._prefix)):  # a channel that may not be made
        async with make(users, send, "create", Queue("other")):
            pass
    with pytest.raises(PermissionDenied, match=r"consume from '.*(orders|charged\.billing)'"):  # whichever comes first
        async with service(users, send, [], "assume", only="consume").running():
            pass
    async with make(users, await users.url("consume"), "assume", ORDERS, CHARGED) as bus:
        with pytest.raises(PermissionDenied, match=r"charged"):
            await bus.publish(CHARGED, b"")
        await bus.send(ORDERS, b"still works")
    async with make(users, await users.url("verify"), "assume", ORDERS) as bus:
        with pytest.raises(PermissionDenied, match=r"amq\.default"):
            await bus.send(ORDERS, b"")
