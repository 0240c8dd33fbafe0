"""The rights in docs/brokers/kafka.md are enough, each for what it is said to be, and without any one of them it fails and says why."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from tests.integration.kafka_acls import Acls, Right
from tests.integration.test_kafka import SOON, Bench, until

from unibus import Bus, DeadLetter, Delivery, Queue, Retry, RetryPolicy, Topic, deadletter, tooling
from unibus.errors import PermissionDenied
from unibus.url import parse
from unibus_contracts import supply

PAGE = Path(__file__).parents[2] / "docs/brokers/kafka.md"

ORDERS, ASKS, CHARGED = Queue("orders", int, delayed=True), Queue("asks", str, reply=str), Topic("charged", int)
SOON_AGAIN = RetryPolicy(max_retries=1, backoff=0.1)
LATER = 60  # the body of a message that is to be tried again after so many seconds: on a rung, that is
Role = Callable[["Shop"], Awaitable[None]]


def documented() -> dict[str, list[Right]]:
    """By what they are for, in the order of the page."""
    page = PAGE.read_text().partition("## Least rights")[2].partition("\n## ")[0]
    roles: dict[str, list[Right]] = {}
    role = ""
    for row in page.split("```")[1].splitlines()[2:]:
        role = row[:10].strip() or role
        kind, name, *operations = row[10:].split()
        roles.setdefault(role, []).extend((kind, name, operation) for operation in operations)
    return roles


DOCUMENTED = documented()


class Shop(Bench):
    """A bench, and on it services of the administrator and of a user whose rights are `acls`."""

    def __init__(self, broker: supply.Broker) -> None:
        super().__init__(broker)
        variables = {name.rpartition("KAFKA_")[2]: value for name, value in broker.variables.items()}
        assert "LIMITED_URL" in variables, "set UNIBUS_TEST_KAFKA_LIMITED_URL too: a user without rights"
        self.limited = variables["LIMITED_URL"]
        self.numbers = itertools.count()
        self.acls: Acls

    def rights(self, role: str) -> list[Right]:
        """What the page says of it, for names on this bench."""
        return [(kind, re.sub(r"^shop\.", self.prefix, name), operation) for kind, name, operation in DOCUMENTED[role]]

    async def give(self, rights: list[Right]) -> None:
        """To the limited user; and what it takes to connect, where nothing is written."""
        writes = any(operation == "Write" for _, _, operation in rights)
        await self.acls.give(rights if writes else [*rights, *DOCUMENTED["connect"]])

    def mine(self, *channels: Any, declare: str = "assume", **settings: Any) -> Bus:
        """A bus of the limited user."""
        return self.bus(*channels, url=self.limited, declare=declare, **settings)

    async def delete(self, topic: str) -> None:
        if topic in await self.topics():
            await self.admin.delete_topics([self.prefix + topic])

            async def gone() -> bool:
                return topic not in await self.topics()

            await until(gone, f"{topic} is gone")

    def add_consumer(self, bus: Bus) -> None:
        @bus.consumer(ORDERS, retry=SOON_AGAIN)
        async def on_order(body: int, delivery: Delivery[int]) -> None:
            await fail(body)

    def add_subscriber(self, bus: Bus) -> None:
        @bus.subscriber(CHARGED, group="billing", retry=SOON_AGAIN)
        async def on_charged(body: int) -> None:
            await fail(body)

    def add_responder(self, bus: Bus) -> None:
        @bus.responder(ASKS)
        async def answer(body: str) -> str:
            return body.upper()

    def whole(self, **settings: Any) -> Bus:
        """A service that does all that the page speaks of; it never runs."""
        bus = self.bus(**settings)
        for add in (self.add_consumer, self.add_subscriber, self.add_responder):
            add(bus)
        return bus


async def fail(body: int) -> None:
    if body == LATER:
        raise Retry("not yet", delay=LATER)
    raise OSError("always")


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    made = Shop(supply.running(["kafka"])[0])
    made.raw_producer = AIOKafkaProducer(**made.raw)
    made.admin = AIOKafkaAdminClient(**made.raw)
    async with AsyncExitStack() as stack:
        await made.raw_producer.start()
        stack.push_async_callback(made.raw_producer.stop)
        await made.admin.start()
        stack.push_async_callback(made.admin.close)
        made.acls = Acls(made.admin, str(parse(made.limited).username))
        stack.push_async_callback(made.acls.take)
        short = {"config": {"retention.ms": "3600000"}}  # what `look` is to warn of
        async with made.whole(declare="create", settings=short):
            pass
        yield made


# What each role does


async def declare(shop: Shop) -> None:
    n = next(shop.numbers)  # what is not there yet
    bus = shop.mine(Queue(f"queue{n}"), declare="create")

    @bus.subscriber(Topic(f"topic{n}"), group="g")
    async def handle(body: bytes) -> None: ...

    async with bus:
        pass
    assert {f"queue{n}", f"topic{n}", f"topic{n}.g.dlq"} <= await shop.topics()


async def verify(shop: Shop) -> None:
    async with shop.whole(url=shop.limited, declare="verify"):
        pass


async def send(shop: Shop) -> None:
    async with shop.mine(ORDERS) as bus:
        await bus.send(ORDERS, 1)
        await bus.send(ORDERS, 2, delay=LATER)


async def publish(shop: Shop) -> None:
    async with shop.mine(CHARGED) as bus:
        await bus.publish(CHARGED, 1)


async def consume(shop: Shop) -> None:
    bus = shop.mine(declare="verify")
    shop.add_consumer(bus)
    async with shop.bus(ORDERS) as sender, bus.running():
        await sender.send_many(ORDERS, [1, LATER])
        await shop.send_raw("orders", b"no json")
        await handled(bus)


async def subscribe(shop: Shop) -> None:
    bus = shop.mine(declare="verify")
    shop.add_subscriber(bus)
    async with shop.bus(CHARGED) as sender, bus.running():
        await sender.publish_many(CHARGED, [1, LATER])
        await shop.send_raw("charged", b"no json")
        await handled(bus)


async def handled(bus: Bus) -> None:
    """Tried again at once and on a rung, dead, and invalid."""
    await until(
        lambda: (
            bus.counts.get("dead_lettered", 0) >= 1
            and bus.counts.get("invalid", 0) >= 1
            and bus.counts.get("retried", 0) >= 2
        ),
        "retried, dead and invalid",
    )


async def broadcast(shop: Shop) -> None:
    bus, seen = shop.mine(CHARGED), list[int]()

    @bus.subscriber(CHARGED, broadcast=True)
    async def on_all(body: int) -> None:
        seen.append(body)

    async with shop.bus(CHARGED) as sender, bus.running():
        await sender.publish(CHARGED, 1)
        await until(lambda: seen == [1], "seen")


async def request(shop: Shop) -> None:
    await shop.delete("unibus.reply.web")  # an earlier one's
    responder = shop.bus()
    shop.add_responder(responder)
    async with responder.running(), shop.mine(ASKS, service="web") as bus:
        assert await bus.request(ASKS, "x", timeout=SOON) == "X"


async def respond(shop: Shop) -> None:
    responder = shop.mine(declare="verify")
    shop.add_responder(responder)
    async with responder.running(), shop.bus(ASKS, service="web") as bus:
        assert await bus.request(ASKS, "x", timeout=SOON) == "X"


async def browse(shop: Shop) -> None:
    await consume_as_administrator(shop)
    async with shop.mine(ORDERS) as bus:
        assert [letter async for letter in deadletter.browse(bus, ORDERS)]


async def redrive(shop: Shop) -> None:
    await consume_as_administrator(shop)
    async with shop.mine(ORDERS) as bus:
        assert await deadletter.redrive(bus, ORDERS) >= 1


async def consume_as_administrator(shop: Shop) -> None:
    """So that there are dead letters."""
    bus = shop.bus()

    @bus.consumer(ORDERS)
    async def kill(body: int) -> None:
        raise DeadLetter("always")

    async with bus.running():
        await bus.send(ORDERS, 1)
        await until(lambda: bus.counts.get("dead_lettered"), "a dead letter")


async def look(shop: Shop) -> None:
    async with shop.whole(url=shop.limited, declare="assume") as bus:
        found = await tooling.inspect(bus)
        assert [f"needs Describe on {one.name}" for one in found if not one.exists] == []
        assert any(one.risk.startswith("one replica") for one in found)
        assert any("retention" in one.risk for one in found), f"needs DescribeConfigs on {found[0].name}"
        await bus.backlog(ORDERS)


ROLES: tuple[Role, ...] = (
    *(declare, verify, send, publish, consume, subscribe, broadcast, request, respond, browse, redrive, look),
)


def test_each_role_of_the_page_is_tried() -> None:
    assert {role.__name__ for role in ROLES} | {"connect", "count"} == set(DOCUMENTED)


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.__name__)
async def test_the_rights_of_the_page_are_enough_and_none_is_too_many(
    shop: Shop, role: Role, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "unibus")
    rights = shop.rights(role.__name__)
    await shop.give(rights)
    await role(shop)
    for missing in rights:
        await shop.give([right for right in rights if right != missing])
        caplog.clear()
        await refused(shop, role, missing, caplog)


async def refused(shop: Shop, role: Role, missing: Right, caplog: pytest.LogCaptureFixture) -> None:
    """Returns once the role's work, or the log while it is at work, has named the right that is missing, and on what.

    The first request that is refused may be one that needs no more than Describe, which Read and Write include.
    """
    _, name, operation = missing
    right = re.compile(rf"(needs|lacks?|may not) ({operation}|Describe)\b")
    work = asyncio.ensure_future(role(shop))

    def text() -> str:
        return caplog.text + (repr(work.exception()) if work.done() else "")

    def told() -> bool:
        return name.rstrip("*") in text() and right.search(text()) is not None

    try:
        await until(lambda: told() or work.done(), f"{role.__name__} without {missing} is told")
        assert told(), f"{role.__name__} without {missing}: {text() or 'it works'}"
    finally:
        work.cancel()
        await asyncio.wait([work])


@pytest.mark.parametrize("role", [declare, verify, broadcast, browse, look], ids=lambda role: role.__name__)
async def test_who_writes_nowhere_needs_a_right_to_connect(shop: Shop, role: Role) -> None:
    await shop.acls.give(shop.rights(role.__name__))
    with pytest.raises(PermissionDenied, match=r"needs IdempotentWrite on the cluster, or .*Write on any"):
        await role(shop)


async def test_without_describe_on_its_groups_a_publish_counts_as_unrouted(shop: Shop) -> None:
    for rights, unrouted in ((shop.rights("publish"), 1), (shop.rights("publish") + shop.rights("count"), 0)):
        await shop.give(rights)
        async with shop.mine(CHARGED) as bus:
            await bus.publish(CHARGED, 1)
            assert bus.counts.get("unrouted", 0) == unrouted
