"""Redis: foreign producers and consumers, bad input, and what breaks under a running service."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from unibus import (
    AuthenticationFailed,
    Bus,
    ConfigError,
    DeadLetter,
    Delivery,
    Message,
    Queue,
    RetryPolicy,
    Topic,
    deadletter,
)
from unibus.adapter import Declared, Move, Outcome, Outgoing, Source, Subscription, Topology
from unibus.channel import Group, dead_letter_queue
from unibus.errors import LeaseLost, NotFound, PermissionDenied, Refused
from unibus.message import new_id
from unibus_contracts import supply
from unibus_contracts.supply import Broker
from unibus_contracts.supply.native import processes
from unibus_redis import RedisAdapter, scripts
from unibus_redis.subscription import RedisSubscription

SOON = 15.0


def given(name: str) -> str:
    """A broker that was to be tested and isn't there is a failure, not a skip."""
    if value := os.environ.get(name):
        return value
    pytest.fail(f"{name} is not set; `make integration` does that")


@pytest.fixture
def url() -> str:
    return given("UNIBUS_TEST_REDIS_URL")


# The client types each reply as the union of all that any version and protocol may answer, hence Any.
@pytest.fixture
async def raw(url: str) -> AsyncIterator[Any]:
    async with Redis.from_url(url) as client:
        yield client


@pytest.fixture
def name() -> str:
    return f"int-{new_id()}"


@pytest.fixture(scope="module")
def private() -> Iterator[Broker]:
    """One that may be disturbed."""
    broker = supply.start("redis", instance="faults")
    yield broker
    broker.stop()


def make(url: str, *channels: Any, **settings: Any) -> Bus:
    return Bus(url, service="svc", config=False, environ={}, channels=list(channels), **settings)


def adapter_of(bus: Bus) -> RedisAdapter:
    assert isinstance(bus.adapter, RedisAdapter)
    return bus.adapter


async def until(condition: Callable[[], object], what: str, seconds: float = SOON) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.01)


async def eventually(probe: Callable[[], Awaitable[Any]], enough: Callable[[Any], object], what: str) -> Any:
    deadline = time.monotonic() + SOON
    while not enough(found := await probe()):
        assert time.monotonic() < deadline, f"not within {SOON} s: {what}; last: {found!r}"
        await asyncio.sleep(0.05)
    return found


async def take(subscription: Subscription, count: int = 1) -> list[Delivery[Any]]:
    found: list[Delivery[Any]] = []

    async def more() -> int:
        found.extend(await subscription.receive(count - len(found), 0.5))
        return len(found)

    await eventually(more, lambda n: n >= count, f"{count} deliveries")
    return found


# Interoperation


async def test_entries_of_a_foreign_producer_are_messages(url: str, raw: Any, name: str) -> None:
    queue = Queue(name)
    bus, seen = make(url), list[tuple[bytes, dict[str, str], str, int]]()

    @bus.consumer(queue, retry=RetryPolicy(max_retries=1, backoff=0))
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen.append((body, dict(delivery.message.headers), delivery.message.id, delivery.attempt))
        if body == b"bad":
            raise OSError("no")

    async with bus.running():
        first = await raw.xadd(name, {"body": "plain"})
        await raw.xadd(name, {"tenant": "acme", "total": "5"})
        await raw.xadd(name, {"body": "with", "tenant": "acme", "headers": '{"h": "v"}'})
        await until(lambda: len(seen) == 3, "three handled")
        await raw.xadd(name, {"body": "bad", "trace": b"\xff\xfe", "headers": '{"n": 5}'})
        await until(lambda: bus.counts.get("dead_lettered") == 1, "a dead letter")
    plain, fields, with_headers = seen[:3]
    assert plain == (b"plain", {}, f"{name}@{first.decode()}", 1)
    assert json.loads(fields[0]) == {"tenant": "acme", "total": "5"}
    assert with_headers[:2] == (b"with", {"tenant": "acme", "h": "v"})
    assert [attempt for body, _, _, attempt in seen if body == b"bad"] == [1, 2]
    ((_, letter),) = await raw.xrange(f"{{{name}}}.dlq")
    assert (letter[b"body"], letter[b"trace"]) == (b"bad", b"\xff\xfe")
    headers = json.loads(letter[b"headers"])
    assert headers["n"] == 5
    assert headers["x-message-id"] == seen[-1][2], "an id that was derived stays the same"


async def test_a_foreign_consumer_reads_ours(url: str, raw: Any, name: str) -> None:
    queue, topic = Queue(name, dict[str, int]), Topic(f"{name}.t")
    await raw.xgroup_create(topic.name, "theirs", "$", mkstream=True)
    async with make(url, queue, topic) as bus:
        id = await bus.send(queue, {"a": 1}, headers={"tenant": "acme"}, key="k")
        await bus.publish(topic, b"\0raw")
    ((_, fields),) = await raw.xrange(name)
    assert fields[b"body"] == b'{"a":1}'
    assert json.loads(fields[b"headers"]) == {
        "tenant": "acme",
        "x-message-id": id,
        "x-key": "k",
        "x-content-type": "application/json",
    }
    ((_, [(_, fields)]),) = await raw.xreadgroup("theirs", "c", {topic.name: ">"})
    assert fields[b"body"] == b"\0raw"


# Bad input


async def test_a_key_of_another_type_is_named(url: str, raw: Any, name: str) -> None:
    await raw.set(name, "a string")
    for mode in ("create", "verify"):
        with pytest.raises(ConfigError, match=f"'{name}' is a string"):
            async with make(url, Queue(name), declare=mode):
                pass
    async with make(url, Queue(name), declare="assume") as bus:
        with pytest.raises(Refused, match=name):
            await bus.send(name, b"x")
    assert await raw.get(name) == b"a string"


async def test_one_name_is_one_kind(url: str, name: str) -> None:
    async with make(url, Queue(name)):
        pass
    with pytest.raises(ConfigError, match="is a queue"):
        async with make(url, Topic(name)):
            pass
    topic = Topic(f"{name}.t")
    bus = make(url)

    @bus.subscriber(topic, group="g")
    async def handle(body: bytes) -> None: ...

    async with bus:
        pass
    with pytest.raises(ConfigError, match="other consumer groups"):
        async with make(url, Queue(topic.name)):
            pass


async def test_wrong_credentials_are_told_without_them(url: str) -> None:
    before, _, rest = url.rpartition("@")
    wrong = f"{before.rpartition(':')[0]}:hunter2@{rest}"
    with pytest.raises(AuthenticationFailed) as caught:
        async with make(wrong):
            pass
    assert "hunter2" not in str(caught.value)


async def test_a_database_that_is_not_there_is_a_mistake_in_the_url(url: str) -> None:
    with pytest.raises(ConfigError, match="no such database"):
        async with make(url.rpartition("/")[0] + "/9999"):
            pass


async def test_a_user_without_rights_is_told(url: str, raw: Any, name: str) -> None:
    await raw.execute_command("ACL", "SETUSER", name, "on", ">pw", "~*", "+@all", "-xgroup")
    try:
        with pytest.raises(PermissionDenied, match="declare queue"):
            async with make(f"redis://{name}:pw@{url.rpartition('@')[2]}", Queue(name)):
                pass
    finally:
        await raw.execute_command("ACL", "DELUSER", name)


async def test_the_rights_in_the_documentation_are_enough(url: str, raw: Any, name: str) -> None:
    page = (Path(__file__).parents[2] / "docs/brokers/redis.md").read_text().partition("## Least rights")[2]
    lines = re.findall(r"^- (\w+)[ ,:](.*?)(?=^-|^#)", page, re.MULTILINE | re.DOTALL)
    rights = {
        who: [right for part in re.findall("`(.+?)`", text, re.DOTALL) for right in part.split() if right[0] == "+"]
        for who, text in lines
    }
    rights["consume"] += rights["send"]

    async def as_user(role: str) -> str:
        patterns = (f"~{name}*", f"~{{{name}*", "~unibus:reply:*")
        allowed = [*rights["everyone"], *rights[role]]
        known = await raw.execute_command("COMMAND LIST")
        words = (*patterns, *(right for right in allowed if right[1:].encode() in known))
        await raw.execute_command("ACL", "SETUSER", f"{name}.{role}", "reset", "on", ">pw", *words)
        return f"redis://{name}.{role}:pw@{url.rpartition('@')[2]}"

    work, ordered = Queue(f"{name}.work", delayed=True), Queue(f"{name}.ordered", ordered=True)
    asks, topic = Queue(f"{name}.asks", str, reply=str), Topic(f"{name}.topic")

    def service(url: str, seen: list[bytes], **settings: Any) -> Bus:
        bus = make(url, **settings)

        @bus.consumer(work, retry=RetryPolicy(max_retries=1, backoff=0.1, max_backoff=0.1))
        async def on_work(body: bytes) -> None:
            seen.append(body)
            raise OSError("always")

        @bus.consumer(ordered)
        async def on_ordered(body: bytes) -> None:
            seen.append(body)

        @bus.subscriber(topic, group="g")
        async def on_topic(body: bytes) -> None:
            seen.append(body)

        @bus.subscriber(topic, broadcast=True)
        async def on_broadcast(body: bytes) -> None:
            seen.append(body)

        @bus.responder(asks)
        async def answer(body: str) -> str:
            return body.upper()

        return bus

    try:
        async with service(await as_user("declare"), []):
            pass
        seen: list[bytes] = []
        consuming = service(await as_user("consume"), seen, declare="verify")
        sender = make(await as_user("send"), work, ordered, topic, declare="assume")
        async with consuming.running(), sender:
            await sender.send(work, b"work", delay=0.1)
            await sender.send(ordered, b"ordered", key="k")
            await sender.publish(topic, b"topic")
            assert await consuming.request(asks, "x", timeout=SOON) == "X"
            await until(lambda: consuming.counts.get("dead_lettered") == 1, "a dead letter")
            await until(lambda: len(seen) == 5, "all seen")
            for queue in (work, ordered, asks):
                backlog = await consuming.backlog(queue)
                assert (backlog.ready, backlog.in_flight) == (0, 0)
            assert len([letter async for letter in deadletter.browse(consuming, work)]) == 1
        assert await raw.xinfo_consumers(work.name, "unibus") == []
        assert len(await raw.xinfo_groups(topic.name)) == 1
    finally:
        await raw.execute_command("ACL", "DELUSER", *(f"{name}.{role}" for role in ("declare", "consume", "send")))


async def test_credentials_are_in_no_log(url: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    password = url.rpartition("@")[0].rpartition(":")[2]
    queue = Queue(name)
    async with make(url, queue) as bus, bus.receiver(queue) as receiver:
        await bus.send(queue, b"x")
        delivery = await receiver.receive(timeout=SOON)
        assert delivery is not None
        await delivery.ack()
        assert password not in repr(bus.adapter)
        assert password not in repr(vars(adapter_of(bus))) + repr(vars(adapter_of(bus).links))
    assert caplog.records
    assert password not in caplog.text


async def test_tls(name: str) -> None:
    url, ca = given("UNIBUS_TEST_REDIS_TLS_URL"), given("UNIBUS_TEST_REDIS_CA")
    queue = Queue(name)
    async with make(f"{url}?ca_file={ca}", queue) as bus:
        await bus.send(queue, b"x")
        assert (await bus.backlog(queue)).ready == 1
    with pytest.raises(ConfigError, match=r"redis\.ca_file"):
        async with make(url, queue):
            pass


# What is deleted under a running service


@pytest.mark.parametrize("what", ["stream", "group"])
async def test_a_queue_that_was_deleted_is_made_again(url: str, raw: Any, name: str, what: str) -> None:
    queue = Queue(name)
    bus, seen = make(url), list[bytes]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen.append(body)

    async with bus.running():
        await bus.send(queue, b"before")
        await until(lambda: seen == [b"before"], "handled")
        if what == "stream":
            await raw.delete(name)
        else:
            await raw.xgroup_destroy(name, "unibus")
            await raw.xadd(name, {"body": "meanwhile"})
        await eventually(lambda: raw.exists(name), bool, "the stream is back")
        await eventually(lambda: raw.xinfo_groups(name), bool, "the group is back")
        await bus.send(queue, b"after")
        expected = [b"before", b"after"] if what == "stream" else [b"before", b"meanwhile", b"after"]
        await until(lambda: seen == expected, "handled again")


async def test_what_was_trimmed_while_it_was_held_is_told(
    url: str, raw: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    queue = Queue(name)
    async with make(f"{url}?lease=1", queue) as bus:
        dying = await bus.adapter.subscribe(Source(queue))
        await bus.send_many(queue, [b"1", b"2"])
        await take(dying, 2)
        await raw.xtrim(name, maxlen=1, approximate=False)
        heir = await bus.adapter.subscribe(Source(queue))
        (second,) = await take(heir)
        assert second.message.body == b"2"
        await until(lambda: "1 messages were deleted or trimmed" in caplog.text, "it is in the log")


async def test_a_dead_letter_without_its_stream_stays_where_it_is(url: str, raw: Any, name: str) -> None:
    queue = Queue(name)
    async with make(url, queue) as bus:
        await raw.delete(f"{{{name}}}.dlq")
        await bus.send(queue, b"x")
        subscription = await bus.adapter.subscribe(Source(queue))
        (delivery,) = await take(subscription)
        to = Outgoing(dead_letter_queue(queue), Message(b"x", "id"))
        (error,) = await subscription.move([Move(delivery, [Outgoing(queue, Message(b"y", "id")), to])], SOON)
        assert isinstance(error, NotFound)
        assert await raw.xlen(name) == 1, "nothing of the move was done"
        assert list(await subscription.settle(Outcome.ACCEPTED, [delivery])) == [None]


# Leases and consumers that die


async def test_what_a_dead_consumer_held_is_taken_over(url: str, name: str) -> None:
    queue = Queue(name)
    async with make(f"{url}?lease=1", queue) as bus, make(f"{url}?lease=1", queue) as other:
        dying = await bus.adapter.subscribe(Source(queue))
        await bus.send(queue, b"x")
        (lost,) = await take(dying)
        begun = time.monotonic()
        backlog = await bus.backlog(queue)
        assert (backlog.ready, backlog.in_flight) == (0, 1)
        heir = await other.adapter.subscribe(Source(queue))
        (delivery,) = await take(heir)
        assert time.monotonic() - begun > 0.9
        assert delivery.deliveries == 2
        for outcome in Outcome:
            assert isinstance((await dying.settle(outcome, [lost]))[0], LeaseLost)
        assert isinstance((await dying.extend([lost], 1))[0], LeaseLost)
        assert list(await heir.settle(Outcome.ACCEPTED, [delivery])) == [None]
        assert (await bus.backlog(queue)).ready == 0


async def test_a_lease_that_is_extended_is_kept(url: str, name: str) -> None:
    queue = Queue(name)
    bus, seen = make(f"{url}?lease=1"), list[int]()

    @bus.consumer(queue)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen.append(delivery.deliveries or 0)
        if len(seen) == 1:
            over = (delivery.lease_until or 0) + 1.2
            await until(lambda: time.monotonic() > over, "more than two leases are over")

    async with bus.running(), make(f"{url}?lease=1", queue) as other:
        await bus.send(queue, b"x")
        watcher = await other.adapter.subscribe(Source(queue))
        while not bus.counts.get("handled"):
            assert list(await watcher.receive(1, 0.2)) == []
    assert seen == [1]


async def test_a_consumer_that_leaves_leaves_nothing(url: str, raw: Any, name: str) -> None:
    queue, topic = Queue(name), Topic(f"{name}.t")
    bus = make(url)

    @bus.consumer(queue)
    async def handle(body: bytes) -> None: ...

    @bus.subscriber(topic, group="g")
    async def on_topic(body: bytes) -> None: ...

    @bus.subscriber(topic, broadcast=True)
    async def broadcast(body: bytes) -> None: ...

    async with bus.running():
        await bus.send(queue, b"x")
        await bus.publish(topic, b"y")
        await until(lambda: bus.counts.get("handled") == 3, "handled")
        assert len(await raw.xinfo_groups(topic.name)) == 2
    assert await raw.xinfo_consumers(name, "unibus") == []
    (group,) = await raw.xinfo_groups(topic.name)
    assert (group["name"], group["consumers"]) == (f"{topic.name}.g".encode(), 0)


async def test_the_next_in_line_takes_over_an_ordered_queue(url: str, name: str) -> None:
    queue = Queue(name, ordered=True)
    async with make(f"{url}?lease=1", queue) as bus, make(f"{url}?lease=1", queue) as other:
        leader = await bus.adapter.subscribe(Source(queue, ordered=True))
        standby = await other.adapter.subscribe(Source(queue, ordered=True))
        await bus.send_many(queue, [b"%d" % n for n in range(6)], key=lambda _: "k")
        held = await take(leader, 3)
        assert await leader.check() == "consuming"
        assert await standby.check() == "standby"
        assert list(await standby.receive(10, 0.2)) == []
        assert isinstance(leader, RedisSubscription)
        assert leader._keeper is not None
        leader._keeper.cancel()  # as if its process were gone
        found = await take(standby, 6)
        assert [delivery.message.body for delivery in found] == [b"%d" % n for n in range(6)]
        assert isinstance((await leader.settle(Outcome.ACCEPTED, held[:1]))[0], LeaseLost)
        assert list(await leader.receive(10, 0.1)) == []


# Topics


async def test_a_topic_is_trimmed_to_what_all_groups_have_read(url: str, raw: Any, name: str) -> None:
    topic = Topic(name)
    bus = make(url)

    @bus.subscriber(topic, group="quick")
    async def quick(body: bytes) -> None: ...

    @bus.subscriber(topic, group="slow")
    async def slow(body: bytes) -> None: ...

    async with bus:
        await bus.publish_many(topic, [b"%d" % n for n in range(50)])
        first = await bus.adapter.subscribe(Source(Group(topic, "quick"), 100))
        second = await bus.adapter.subscribe(Source(Group(topic, "slow"), 100))
        await first.settle(Outcome.ACCEPTED, await take(first, 50))
        held = await take(second, 50)
        await second.settle(Outcome.ACCEPTED, held[:20])
        await eventually(lambda: raw.xlen(name), lambda n: n == 30, "all that is read and settled is gone")
        assert (await bus.adapter.backlog(Group(topic, "slow"))).in_flight == 30
        await second.settle(Outcome.ACCEPTED, held[20:])
        await eventually(lambda: raw.xlen(name), lambda n: n <= 1, "the rest too")


async def test_what_is_kept_for_a_time_can_be_read_again(url: str, raw: Any, name: str) -> None:
    topic = Topic(name)
    bus, seen = make(f"{url}?retention=60"), list[bytes]()

    @bus.subscriber(topic, group="old")
    async def old(body: bytes) -> None:
        seen.append(body)

    async with bus.running():
        await bus.publish(topic, b"history")
        await until(lambda: seen == [b"history"], "handled")
        assert bus.adapter.capabilities.replay
        new = Group(topic, "new")
        channels = (Declared(topic, name), Declared(new, f"{name}.new", start="all"))
        keys = (f"{{{name}}}:delayed", f"{{{name}}}:delayed:messages", name)
        await raw.eval(scripts.KEEP.source, 3, *keys, 60_000, "unibus.private.", 3_600_000)
        await bus.adapter.declare(Topology("create", channels))
        subscription = await bus.adapter.subscribe(Source(new, start="all"))
        (delivery,) = await take(subscription)
        assert delivery.message.body == b"history"


async def test_the_group_of_a_dead_process_is_taken_away(url: str, raw: Any, name: str) -> None:
    topic = Topic(name)
    async with make(url, topic) as bus:
        await bus.adapter.subscribe(Source(Group(topic, "one", ephemeral=True)))
        assert len(await raw.xinfo_groups(name)) == 1
        keys = (f"{{{name}}}:delayed", f"{{{name}}}:delayed:messages", name)
        await raw.eval(scripts.KEEP.source, 3, *keys, 0, "unibus.private.", 3_600_000)
        assert len(await raw.xinfo_groups(name)) == 1
        await raw.eval(scripts.KEEP.source, 3, *keys, 0, "unibus.private.", -1)
        assert await raw.xinfo_groups(name) == []


# Links and servers that break


async def test_a_service_survives_its_connections(url: str, raw: Any, name: str) -> None:
    queue = Queue(name)
    bus, seen = make(url), set[bytes]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen.add(body)

    async with bus.running():
        for n in range(4):
            if n == 2:
                await raw.script_flush()
            elif n:
                for client in await raw.client_list():
                    if client["name"].startswith("svc-"):
                        await raw.client_kill(client["addr"])
            await bus.send(queue, b"%d" % n)
            await until(lambda: len(seen) == n + 1, f"message {n}")  # noqa: B023  # awaited in the same turn
    assert (await raw.xlen(name)) == 0


async def test_a_service_survives_the_death_of_the_server(private: Broker, name: str) -> None:
    queue = Queue(name)
    bus, seen = make(private.url), set[bytes]()

    @bus.consumer(queue, retry=RetryPolicy(max_retries=3, backoff=1))
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        if delivery.attempt == 1:
            raise OSError("later")
        seen.add(body)

    async with bus.running():
        await bus.send_many(queue, [b"%d" % n for n in range(20)])
        await until(lambda: bus.counts.get("retried") == 20, "all have failed once")
        await asyncio.to_thread(private.kill)
        sending = asyncio.create_task(bus.send(queue, b"meanwhile"))
        await asyncio.to_thread(private.restart)
        await sending
        await until(lambda: len(seen) == 21, "all handled", 40)
    async with Redis.from_url(private.url) as raw:
        assert await raw.xlen(name) == 0


async def test_closing_that_is_cancelled_leaves_no_connection(private: Broker, name: str) -> None:
    queue = Queue(name)
    raw: Any = Redis.from_url(private.url)
    async with raw, make(private.url, queue) as bus:
        adapter = adapter_of(bus)
        subscription = await adapter.subscribe(Source(queue))
        await bus.send(queue, b"x")
        await take(subscription)  # to be given back, for which the server has no time
        await raw.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
        try:
            closing = asyncio.create_task(adapter.close())
            assert not (await asyncio.wait([closing], timeout=0.3))[0]
            closing.cancel()
            await asyncio.wait([closing])
            await adapter.close()
            ours = f"svc-{adapter._endpoint.instance}"

            async def left() -> list[str]:
                return [client["name"] for client in await raw.client_list() if client["name"] == ours]

            await eventually(left, lambda found: not found, "all connections are gone")
        finally:
            await raw.execute_command("CLIENT", "UNPAUSE")


async def test_a_server_that_would_evict_is_refused(private: Broker, name: str) -> None:
    async with Redis.from_url(private.url) as raw:
        await raw.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(ConfigError, match="maxmemory-policy allkeys-lru"):
                async with make(private.url, Queue(name)):
                    pass
            async with make(f"{private.url}?allow_eviction=true", Queue(name)) as bus:
                await bus.send(name, b"x")
        finally:
            await raw.config_set("maxmemory-policy", "noeviction")


async def test_a_send_whose_answer_was_lost_is_not_doubled_where_the_server_can_tell(
    url: str, raw: Any, name: str
) -> None:
    queue = Queue(name)
    version = tuple(int(part) for part in (await raw.info("server"))["redis_version"].split(".")[:2])
    async with make(url, queue) as bus:
        batch = [Outgoing(queue, Message(b"%d" % n, "same")) for n in range(1000)]
        assert list(await bus.adapter.send(batch, SOON)) == [None] * 1000
        await bus.adapter.connect()  # the connection broke before the answer came, and so it is sent again
        assert list(await bus.adapter.send(batch, SOON)) == [None] * 1000
        assert await raw.xlen(name) == (1000 if version >= (8, 6) else 2000)
        for _ in range(2):  # what has the same id, and is not a repeat, is there twice
            await bus.send(queue, Message(b"x", "same"))
        assert await raw.xlen(name) == (1002 if version >= (8, 6) else 2002)


async def test_a_full_server_is_waited_for(private: Broker, name: str) -> None:
    queue = Queue(name)
    async with Redis.from_url(private.url) as raw, make(private.url, queue) as bus:
        await raw.config_set("maxmemory", "1")
        try:
            sending = asyncio.create_task(bus.send(queue, b"x"))
            done, _ = await asyncio.wait([sending], timeout=0.5)
            assert not done
            health = await bus.health()
            assert health.status == "degraded"
            assert any("its maxmemory is 1" in reason for reason in health.reasons), health.reasons
        finally:
            await raw.config_set("maxmemory", "0")
        await sending
        assert (await bus.health()).status == "ok"
        assert (await bus.backlog(queue)).ready == 1


async def test_a_redrive_that_was_cut_off_can_be_run_again(url: str, name: str) -> None:
    queue = Queue(name)
    bus = make(f"{url}?lease=1")

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        raise DeadLetter("always")

    async with bus.running():
        await bus.send_many(queue, [b"1", b"2"])
        await until(lambda: bus.counts.get("dead_lettered") == 2, "two dead letters")
    async with make(f"{url}?lease=1", queue) as tool, make(f"{url}?lease=1", queue) as again:
        cut_off = await tool.adapter.subscribe(Source(dead_letter_queue(queue)))
        await take(cut_off, 2)

        async def waiting() -> int:
            return (await again.adapter.backlog(dead_letter_queue(queue))).ready

        assert await waiting() == 0
        await eventually(waiting, lambda n: n == 2, "its leases are over")
        assert len([letter async for letter in deadletter.browse(again, queue)]) == 2
        assert await deadletter.redrive(again, queue) == 2
        assert (await again.backlog(queue)).ready == 2


def test_the_supply_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    broker = supply.start("redis", instance="gone")
    assert not broker.native or broker.pid in processes(broker.home), "a title of its own would hide the mark"
    broker.stop()
    assert processes(broker.home) == {}
