"""Redis of several servers: Sentinel's failover, and a cluster whose channels are on different masters."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster
from redis.crc import key_slot
from tests.integration import redis_kit
from tests.integration.redis_kit import Cluster, Pair, Sentinels

from unibus import Bus, ConfigError, DeadLetter, Delivery, Queue, RetryPolicy, Topic, deadletter
from unibus.adapter import Declared, Move, Outgoing, Source, Topology
from unibus.channel import dead_letter_queue
from unibus.errors import ConnectionLost, Timeout, Unsupported
from unibus.message import Message, new_id
from unibus.tooling import inspect

SOON = 60.0


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with redis_kit.pair(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    with redis_kit.sentinels(tmp_path_factory.mktemp("sentinels")) as found:
        yield found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with redis_kit.cluster(tmp_path_factory.mktemp("cluster")) as found:
        yield found


def make(url: str, *channels: Any, **settings: Any) -> Bus:
    return Bus(url, service="svc", config=False, environ={}, channels=list(channels), **settings)


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, f"not within {SOON} s: {what}"
        await asyncio.sleep(0.01)


async def eventually(probe: Callable[[], Awaitable[object]], what: str) -> None:
    deadline = time.monotonic() + SOON
    while not await probe():
        assert time.monotonic() < deadline, f"not within {SOON} s: {what}"
        await asyncio.sleep(0.05)


def on_three_masters() -> list[str]:
    """Names, each in another third of the slots."""
    names: dict[int, str] = {}
    while len(names) < 3:
        name = f"int-{new_id()}"
        names.setdefault(key_slot(name.encode()) // 5462, name)
    return [names[third] for third in range(3)]


# Several hosts


async def test_a_primary_that_has_become_a_replica_is_left_and_later_used_again(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    queue = Queue(f"int-{new_id()}")
    async with make(pair.url, queue, send_timeout=SOON) as bus:
        await bus.send(queue, b"before")
        await until(lambda: pair.replica.raw.xlen(queue.name) == 1, "the replica has it")
        pair.follow(pair.primary, pair.replica)  # connections stay open, but take nothing any more
        await bus.send(queue, b"after")
        assert "read only replica" in caplog.text
        assert pair.replica.raw.xlen(queue.name) == 2
        await until(lambda: pair.primary.raw.xlen(queue.name) == 2, "the other one has it")
        pair.follow(pair.replica, pair.primary)
        pair.replica.kill()
        await bus.send(queue, b"again")
    assert pair.primary.raw.xlen(queue.name) == 3


async def test_a_send_is_confirmed_once_the_replicas_have_it(pair: Pair) -> None:
    queue = Queue(f"int-{new_id()}")
    async with make(pair.url, queue, settings={"wait_replicas": 1}) as bus:
        await bus.send(queue, b"first")
        pair.replica.process.send_signal(signal.SIGSTOP)
        with pytest.raises(Timeout, match="may or may not be there"):
            await bus.send(queue, b"second", timeout=1)
        waiting = asyncio.create_task(bus.send(queue, b"third", timeout=SOON))
        await until(lambda: pair.primary.raw.xlen(queue.name) == 3, "the primary has it")
        assert (await bus.backlog(queue)).ready == 3, "nothing else waits for the replica"
        assert not waiting.done()
        pair.replica.process.send_signal(signal.SIGCONT)
        await waiting
        assert pair.replica.raw.xlen(queue.name) == 3
        assert not [one for one in await inspect(bus) if "asynchronous" in one.risk]

        pair.replica.kill()

        async def told() -> bool:
            return any("redis.wait_replicas asks for 1" in reason for reason in (await bus.health()).reasons)

        await eventually(told, "health says that nothing is confirmed")


async def test_that_a_failover_may_lose_messages_is_said(pair: Pair) -> None:
    async with make(pair.url) as bus:
        [server] = [one for one in await inspect(bus) if one.kind == "server"]
        assert "replication is asynchronous" in server.risk


# Sentinel


async def test_a_sentinel_that_knows_no_such_master_says_so(sentinels: Sentinels) -> None:
    with pytest.raises(ConfigError, match=r"redis\.sentinel: .* no master named 'other'"):
        async with make(sentinels.url.replace("=main", "=other")):
            pass


async def test_a_failover_is_survived(sentinels: Sentinels) -> None:
    queue = Queue(f"int-{new_id()}", delayed=True)
    bus, seen = make(sentinels.url, send_timeout=SOON), set[bytes]()

    @bus.consumer(queue, retry=RetryPolicy(max_retries=3, backoff=1))
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        if delivery.attempt == 1 and body.startswith(b"fails"):
            raise OSError("later")
        seen.add(body)

    async with bus.running():
        assert isinstance(bus.native, Redis)
        await bus.send_many(queue, [b"fails %d" % n for n in range(20)])
        await bus.send(queue, b"delayed", delay=3)
        await until(lambda: bus.counts.get("retried") == 20, "all have failed once")
        # Replication is asynchronous: what the replica does not have is lost with the primary, and that is Redis' promise.
        behind = sentinels.primary.raw.info("replication")["master_repl_offset"]
        await until(
            lambda: sentinels.replica.raw.info("replication")["slave_repl_offset"] >= behind, "the replica has all"
        )
        sentinels.primary.kill()
        after = [b"after %d" % n for n in range(20)]
        await bus.send_many(queue, after)
        await until(lambda: len(seen) == 41, "all are handled by the new primary")
        assert sentinels.replica.role() == "master"
        # The old one comes back as a replica; until then it would be written to in vain.
        sentinels.primary.start()
        await until(lambda: sentinels.primary.role() == "slave", "the old primary follows the new one")
        await bus.send(queue, b"last")
        await until(lambda: b"last" in seen, "the last one is handled")
    assert sentinels.replica.raw.xlen(queue.name) == 0


async def test_a_replica_alone_is_no_server_to_send_to(sentinels: Sentinels) -> None:
    replica = next(s for s in (sentinels.primary, sentinels.replica) if s.role() == "slave")
    with pytest.raises(ConnectionLost, match="is a replica"):
        async with make(f"redis://:{redis_kit.PASSWORD}@127.0.0.1:{replica.port}"):
            pass


# Cluster


def service(
    url: str, names: list[str], seen: set[tuple[str, bytes]], **settings: Any
) -> tuple[Bus, list[Queue[bytes]]]:
    """A queue on each master; each fails once, and a letter of the first is dead."""
    bus = make(url, send_timeout=SOON, **settings)
    queues = [Queue(name, delayed=True) for name in names]

    def consume(queue: Queue[bytes]) -> None:
        @bus.consumer(queue, retry=RetryPolicy(max_retries=2, backoff=0.1))
        async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
            if body == b"dead":
                raise DeadLetter("dead")
            if delivery.attempt == 1:
                raise OSError("later")
            seen.add((queue.name, body))

    for queue in queues:
        consume(queue)
    return bus, queues


async def test_channels_are_on_all_masters(cluster: Cluster) -> None:
    seen: set[tuple[str, bytes]] = set()
    names = on_three_masters()
    bus, queues = service(cluster.url, names, seen, settings={"wait_replicas": 1})
    topic, asks = Topic(f"int-{new_id()}", priorities=2), Queue(f"int-{new_id()}", str, reply=str)
    heard: list[bytes] = []

    @bus.subscriber(topic, group="g")
    async def hear(body: bytes) -> None:
        heard.append(body)

    @bus.subscriber(topic, broadcast=True)
    async def hear_too(body: bytes) -> None:
        heard.append(body)

    @bus.responder(asks)
    async def answer(body: str) -> str:
        return body.upper()

    async with bus.running():
        assert isinstance(bus.native, RedisCluster)
        owners = {cluster.owner(key_slot(name.encode())).port for name in names}
        assert len(owners) == 3
        for queue in queues:
            await bus.send_many(queue, [b"%d" % n for n in range(50)])
            await bus.send(queue, b"delayed", delay=0.2)
        await bus.publish(topic, b"x", priority=1)
        assert await bus.request(asks, "x", timeout=SOON) == "X"
        await bus.send(queues[0], b"dead")
        await until(lambda: len(seen) == 3 * 51, "all handled")
        await until(lambda: len(heard) == 2, "both groups have heard")
        await until(lambda: bus.counts.get("dead_lettered") == 1, "a dead letter")
        assert len([letter async for letter in deadletter.browse(bus, queues[0])]) == 1
        for queue in queues:
            assert (await bus.backlog(queue)).ready == 0
        health = await bus.health()
        assert health.status == "ok"
        found = await bus.adapter.inspect(
            Topology("verify", tuple(Declared(queue, queue.name) for queue in (*queues, Queue("gone"))))
        )
        assert len([one for one in found if one.kind == "server" and "appendonly is off" in one.risk]) == 3
        assert [one.name for one in found if one.exists is False] == ["gone, group unibus"]
        assert [one.messages for one in found if one.kind == "delayed set"] == [0, 0, 0, 0]


async def test_a_batch_goes_to_all_masters_and_a_move_to_one(cluster: Cluster) -> None:
    queues = [Queue(name) for name in on_three_masters()]
    async with make(cluster.url, *queues) as bus:
        batch = [Outgoing(queue, Message(b"%d" % n, new_id())) for n in range(4) for queue in queues]
        assert list(await bus.adapter.send(batch, SOON)) == [None] * 12
        for queue in queues:
            assert (await bus.backlog(queue)).ready == 4
        subscription = await bus.adapter.subscribe(Source(queues[0]))
        first, second = await subscription.receive(2, SOON)
        moves = [
            Move(first, [Outgoing(queues[1], first.message, None, first)]),
            Move(second, [Outgoing(dead_letter_queue(queues[0]), second.message, None, second)]),
        ]
        far, near = await subscription.move(moves, SOON)
        assert isinstance(far, Unsupported)
        assert near is None
        await subscription.close()
        assert [(await bus.backlog(queue)).ready for queue in queues] == [3, 4, 4]


async def test_a_channel_that_is_moved_to_another_master_goes_on(cluster: Cluster) -> None:
    seen: set[tuple[str, bytes]] = set()
    names = on_three_masters()
    bus, queues = service(cluster.url, names, seen)
    slot = key_slot(names[0].encode())
    async with bus.running():
        await bus.send_many(queues[0], [b"before %d" % n for n in range(20)])
        source, target = cluster.owner(slot), cluster.owner(key_slot(names[1].encode()))
        ids = [server.raw.execute_command("CLUSTER", "MYID") for server in (source, target)]
        target.raw.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
        source.raw.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
        sending = asyncio.create_task(bus.send_many(queues[0], [b"meanwhile %d" % n for n in range(20)]))

        async def moved() -> bool:
            keys = source.raw.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100)
            if keys:
                words = ("127.0.0.1", target.port, "", 0, 5000, "AUTH", redis_kit.PASSWORD, "KEYS", *keys)
                source.raw.execute_command("MIGRATE", *words)
            return not keys

        await eventually(moved, "all keys are moved")
        for server in (target, source):
            server.raw.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
        await sending
        await until(lambda: len(seen) == 40, "all handled")
    assert target.raw.xlen(names[0]) == 0


async def test_the_failover_of_a_master_is_survived(cluster: Cluster) -> None:
    seen: set[tuple[str, bytes]] = set()
    names = on_three_masters()
    bus, queues = service(cluster.url, names, seen)
    async with bus.running():
        for queue in queues:
            await bus.send_many(queue, [b"before %d" % n for n in range(20)])
        await until(lambda: len(seen) == 60, "all handled")
        slot = key_slot(names[2].encode())
        lost = cluster.owner(slot)
        assert lost.raw.execute_command("WAIT", 1, 10_000) == 1
        lost.kill()
        for queue in queues:
            await bus.send_many(queue, [b"after %d" % n for n in range(20)])
        await until(lambda: len(seen) == 120, "all handled")
        assert cluster.owner(slot) is not lost
    lost.start()
