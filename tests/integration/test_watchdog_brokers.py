"""Consumers that a broker has put out, and a broker that takes no messages: told, and over when the cause is, by itself."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aio_pika
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.group import LeaveGroupRequest
from redis.asyncio import Redis

from unibus import Bus, Queue
from unibus.url import parse
from unibus.watchdog import ENDLESS, Watchdog
from unibus_contracts import supply
from unibus_contracts.kit import FACTOR, eventually, until
from unibus_contracts.supply.rabbitmq import RabbitMQ
from unibus_kafka import config

LONG = 60.0 * FACTOR  # bounds a failure


def bus_at(url: str) -> tuple[Bus, str]:
    prefix = f"it-{secrets.token_hex(4)}."
    return Bus(url, service="svc", prefix=prefix, config=False, environ={}), prefix


async def goes_on(url: str, put_out: Callable[[str], Awaitable[object]]) -> None:
    """A service handles a message, is put out of its place (the queue's physical name is given), and handles the next one."""
    queue: Queue[str] = Queue("work", str)
    (bus, prefix), handled = bus_at(url), list[str]()

    @bus.consumer(queue)
    async def handle(body: str) -> None:
        handled.append(body)

    async with bus.running():
        await bus.send(queue, "before")
        await until(lambda: handled == ["before"], "handled", LONG)
        await until(lambda: not bus._opened().intakes[0].holding, "settled", LONG)
        await put_out(prefix + queue.name)
        async with asyncio.timeout(LONG):
            while "after" not in handled:
                await send_where_it_is(bus, queue)
                await asyncio.sleep(0.05)
        await eventually(bus.health, lambda health: health.status == "ok", "well again")
        assert set(handled) == {"before", "after"}


async def send_where_it_is(bus: Bus, queue: Queue[str]) -> None:
    """A queue that was deleted may not be there yet, and one that is there may still be the old one."""
    await asyncio.gather(bus.send(queue, "after", timeout=2), return_exceptions=True)


async def test_rabbitmq_cancels_a_consumer_whose_queue_is_deleted() -> None:
    url = supply.running(["rabbitmq"])[0].url

    async def delete(name: str) -> None:
        async with await aio_pika.connect(url) as connection:
            await (await connection.channel()).queue_delete(name)

    await goes_on(url, delete)


async def test_redis_forgets_a_consumer() -> None:
    """XGROUP DELCONSUMER, as tools that tidy up do, while it waits for messages."""
    url = supply.running(["redis"])[0].url

    async def forget(name: str) -> None:
        async with Redis.from_url(url) as raw:
            (consumer,) = await raw.xinfo_consumers(name, "unibus")
            await raw.xgroup_delconsumer(name, "unibus", consumer["name"])

    await goes_on(url, forget)


async def test_kafka_removes_a_member() -> None:
    url = supply.running(["kafka"])[0].url

    async def remove(name: str) -> None:
        admin = AIOKafkaAdminClient(**config.client(parse(url), config.settings({}), None, "raw"))
        await admin.start()
        try:
            (answer,) = await admin.describe_consumer_groups([name])
            ((_, group, state, _, _, members, *_),) = answer.groups
            assert state == "Stable"
            coordinator = await admin.find_coordinator(group)
            for member in members:
                left = await admin._send_request(LeaveGroupRequest(group, member[0]), coordinator)
                assert left.error_code == 0
        finally:
            await admin.close()

    await goes_on(url, remove)


async def stands_by(name: str, looks: Counter[Watchdog]) -> None:
    """Of two consumers of an ordered queue one has nothing to receive: for longer than a receive may be silent, and it is well."""
    url = supply.running([name])[0].url
    if name == "kafka":
        url += "?partitions=1"
    queue: Queue[str] = Queue("work", str, ordered=True)
    (first, prefix), handled = bus_at(url), list[str]()
    second = Bus(url, service="svc", prefix=prefix, config=False, environ={})
    both = (first, second)

    for bus in both:

        @bus.consumer(queue)
        async def handle(body: str) -> None:
            handled.append(body)

    async with first.running(), second.running():
        await first.send(queue, "1", key="k")
        await until(lambda: handled == ["1"], "handled", LONG)
        intakes = [bus._opened().intakes[0] for bus in both]
        if name != "rabbitmq":  # which tells no consumer that another one is served

            async def words() -> set[str]:
                return {await intake._subscription.check() for intake in intakes if intake._subscription is not None}

            await eventually(words, lambda words: "standby" in words, "one stands by")
        made = [(intake._subscription, intake._watchdog) for intake in intakes]
        since = Counter(looks)
        await until(
            lambda: all(looks[dog] - since[dog] > ENDLESS for _, dog in made if dog), "both were looked at", LONG
        )
        assert made == [(intake._subscription, intake._watchdog) for intake in intakes]
        for bus in both:
            health = await bus.health()
            assert (health.status, health.reasons, bus.counts.get("resubscribed", 0)) == ("ok", (), 0)
        await second.send(queue, "2", key="k")
        await until(lambda: handled == ["1", "2"], "the next one", LONG)


async def test_who_stands_by_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: Counter[Watchdog] = Counter()
    look = Watchdog._look

    def counted(self: Watchdog) -> None:
        looks[self] += 1
        look(self)

    monkeypatch.setattr(Watchdog, "_look", counted)
    await asyncio.gather(*(stands_by(name, looks) for name in ("rabbitmq", "kafka", "redis")))


@pytest.fixture
def own() -> Iterator[supply.Broker]:
    broker = supply.start("rabbitmq", instance="watch")
    yield broker
    broker.stop()


@pytest.mark.timeout(300)
async def test_rabbitmq_without_memory_is_told_pauses_the_intake_and_is_over_by_itself(own: supply.Broker) -> None:
    queue, target = Queue[str]("work", str), Queue[str]("target", str)
    (bus, _), begun, handled = bus_at(own.url), list[str](), list[str]()
    bus.channels.append(target)

    @bus.consumer(queue, concurrency=2, prefetch=5)
    async def handle(body: str) -> None:
        begun.append(body)
        await bus.send(target, body, timeout=LONG)
        handled.append(body)

    async with bus:
        await bus.send_many(queue, [f"{n}" for n in range(50)])
        await asyncio.to_thread(control, own, "set_vm_memory_high_watermark", "absolute", "1MB")
        async with bus.running():
            await eventually(bus.health, lambda health: health.status == "degraded", "told")
            assert "memory" in " ".join((await bus.health()).reasons)
            (intake,) = bus._opened().intakes
            await until(lambda: len(intake.holding) == 5, "the prefetch is held", LONG)
            assert (len(begun), handled) == (2, []), "more is begun, though nothing can be sent"
            assert (await bus.backlog(queue)).ready == 50 - 5
            await asyncio.to_thread(control, own, "set_vm_memory_high_watermark", "0.4")
            await until(lambda: len(handled) == 50, "all are handled", LONG)
            await until(lambda: not intake.holding, "and settled", LONG)
            assert (await bus.health()).status == "ok"
        assert (await bus.backlog(target)).ready >= 50


def control(broker: supply.Broker, *words: str) -> None:
    """Tell a server of our own, by rabbitmqctl."""
    assert broker.record is not None
    server = RabbitMQ().native(broker.record.site)
    # The cookie, by which it is let in, is in the server's HOME.
    environment = {"PATH": os.environ["PATH"], "HOME": str(broker.home), **server.environment}
    command = [str(Path(server.argv[0]).with_name("rabbitmqctl")), "--quiet", *words]
    subprocess.run(command, env=environment, check=True, timeout=LONG, capture_output=True)
