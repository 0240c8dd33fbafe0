"""The Kafka adapter on a real broker; what it does is checked with a client that knows nothing of unibus."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic, RecordsToDelete
from aiokafka.errors import KafkaConnectionError

from unibus import Bus, Delivery, Queue, RetryPolicy, Topic, deadletter
from unibus.adapter import Outcome, Outgoing, Source
from unibus.errors import AuthenticationFailed, ConfigError, LeaseLost, NotFound, PermissionDenied, Timeout
from unibus.message import Message
from unibus.url import parse
from unibus_contracts import supply
from unibus_kafka import config, subscription, topology
from unibus_kafka.adapter import KafkaAdapter
from unibus_kafka.aio import AioConsumer

SOON = 20.0


async def until(condition: Callable[[], Any], what: str, timeout: float = SOON) -> None:
    deadline = time.monotonic() + timeout
    while True:
        found = condition()
        if found if not isinstance(found, Awaitable) else await found:
            return
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        await asyncio.sleep(0.02)


class Bench:
    """A prefix of its own, buses on it, and the raw client beside them."""

    raw_producer: Any
    admin: Any

    def __init__(self, broker: supply.Broker, scheme: str = "kafka") -> None:
        self.broker = broker
        self.url = self.of(broker.url, scheme)
        self.prefix = f"it-{secrets.token_hex(4)}."
        url = parse(broker.url)
        self.raw = config.client(url, config.settings({}), None, "raw")

    @staticmethod
    def of(url: str, scheme: str) -> str:
        """The same server, by the engine of this scheme."""
        return url.replace("://", f"{scheme.removeprefix('kafka')}://", 1)

    def bus(self, *channels: Any, url: str | None = None, **settings: Any) -> Bus:
        given = {"service": "svc", "prefix": self.prefix, "config": False, "environ": {}, **settings}
        return Bus(url or self.url, channels=channels, **given)

    @asynccontextmanager
    async def subscribed(self, bus: Bus, queue: Queue[Any], prefetch: int = 20) -> AsyncIterator[Any]:
        made = await bus.adapter.subscribe(Source(queue, prefetch))
        try:
            yield made
        finally:
            await made.stop()
            await made.close()

    async def send_raw(self, topic: str, value: bytes | None, **more: Any) -> None:
        await self.raw_producer.send_and_wait(self.prefix + topic, value, **more)

    async def read_raw(self, topic: str, count: int) -> list[Any]:
        consumer = AIOKafkaConsumer(self.prefix + topic, **self.raw, auto_offset_reset="earliest")
        await consumer.start()
        try:
            async with asyncio.timeout(SOON):
                return [await consumer.getone() for _ in range(count)]
        finally:
            await consumer.stop()

    async def topics(self) -> set[str]:
        return {t.removeprefix(self.prefix) for t in await self.admin.list_topics() if t.startswith(self.prefix)}


async def take(made: Any, count: int) -> list[Delivery[Any]]:
    found: list[Delivery[Any]] = []
    deadline = time.monotonic() + SOON
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count}"
        found += await made.receive(count - len(found), 1.0)
    return found


def bodies(deliveries: Sequence[Delivery[Any]]) -> list[bytes]:
    return [delivery.message.body for delivery in deliveries]


# What depends on the client library that moves the records. `lab` is on aiokafka unless a test is of both.
both = pytest.mark.parametrize("lab", ["kafka", "kafka+confluent"], indirect=True)


@pytest.fixture
async def lab(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    bench = Bench(supply.running(["kafka"])[0], getattr(request, "param", "kafka"))
    bench.raw_producer = AIOKafkaProducer(**bench.raw)
    bench.admin = AIOKafkaAdminClient(**bench.raw)
    await bench.raw_producer.start()
    await bench.admin.start()
    try:
        yield bench
    finally:
        await bench.raw_producer.stop()
        await bench.admin.close()


# On the wire


@both
async def test_a_raw_consumer_reads_ours(lab: Bench) -> None:
    queue = Queue("q", dict[str, int])
    async with lab.bus(queue) as bus:
        before = time.time()
        id = await bus.send(queue, {"a": 1}, key="k", headers={"tenant": "açme"})
    (record,) = await lab.read_raw("q", 1)
    assert (record.key, record.value) == (b"k", b'{"a":1}')
    assert dict(record.headers) == {"x-message-id": id.encode(), "tenant": "açme".encode()}
    assert before - 1 < record.timestamp / 1000 < time.time() + 1


@both
async def test_foreign_records_are_handled(lab: Bench) -> None:
    queue = Queue("q", dict[str, int])
    bus, seen = lab.bus(), list[tuple[Any, Any, str]]()

    @bus.consumer(queue)
    async def handle(body: dict[str, int], delivery: Delivery[dict[str, int]]) -> None:
        seen.append((body, delivery.message.key, delivery.message.id))

    async with bus.running():
        await lab.send_raw("q", b'{"a": 1}', key=b"k", headers=[("h", b"\xff")])
        await lab.send_raw("q", b"no json")
        await until(
            lambda: bus.counts.get("handled") == 1 and bus.counts.get("invalid") == 1, "one handled, one invalid"
        )
        assert seen == [({"a": 1}, "k", f"{lab.prefix}q/0@0")]
    (invalid,) = await lab.read_raw("q.invalid", 1)
    assert invalid.value == b"no json"


@both
async def test_what_the_envelope_cannot_hold_survives_retries_and_death(lab: Bench) -> None:
    queue: Queue[bytes] = Queue("q")
    bus, natives = lab.bus(), list[Any]()
    headers = [("twice", b"1"), ("twice", b"2"), ("binary", b"\xff"), ("nothing", None)]

    @bus.consumer(queue, retry=RetryPolicy(max_retries=1, backoff=0.1))
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        assert body == b""
        natives.append(delivery.native)
        raise OSError("always")

    async with bus.running():
        await lab.send_raw("q", None, key=b"\xfe", headers=headers)
        await until(lambda: bus.counts.get("dead_lettered") == 1, "dead")
    (letter,) = await lab.read_raw("q.dlq", 1)
    for record in (*natives, letter):
        assert (record.key, record.value) == (b"\xfe", None)
        assert [h for h in record.headers if not h[0].startswith("x-")] == headers
    assert dict(letter.headers)["x-retry-count"] == b"2"


# Order


async def test_order_by_key_survives_a_batch_that_failed(lab: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    queue: Queue[bytes] = Queue("q", ordered=True)
    numbers = [b"%04d" % n for n in range(400)]
    async with lab.bus(queue, url=lab.url + "?batch_size=1024") as bus:
        producer: Any = bus.adapter.native
        send_batch, calls = producer.send_batch, list[int]()

        async def failing(builder: Any, topic: str, **more: Any) -> Any:
            calls.append(builder.record_count())
            if len(calls) in {3, 6}:
                raise KafkaConnectionError("cut")
            return await send_batch(builder, topic, **more)

        monkeypatch.setattr(producer, "send_batch", failing)
        await asyncio.gather(*(bus.send(queue, body, key="k") for body in numbers))
    assert [record.value for record in await lab.read_raw("q", 400)] == numbers
    assert max(calls) > 1, "many of a key go together"


# Commits


@both
async def test_a_restart_runs_nothing_again_that_had_finished(lab: Bench) -> None:
    queue: Queue[bytes] = Queue("q")
    async with lab.bus(queue) as bus:
        await bus.send_many(queue, [b"%d" % n for n in range(10)])
        async with lab.subscribed(bus, queue) as made:
            held = await take(made, 10)
            held[4].failures += 2  # as the core does for failures in place
            await made.settle(Outcome.ACCEPTED, [d for n, d in enumerate(held) if n not in {0, 4, 9}])
        async with lab.subscribed(bus, queue) as made:
            again = await take(made, 3)
            assert bodies(again) == [b"0", b"4", b"9"]
            assert [d.failures for d in again] == [0, 2, 0]
            await made.settle(Outcome.ACCEPTED, again)
        await bus.send(queue, b"next")
        async with lab.subscribed(bus, queue) as made:
            assert bodies(await take(made, 1)) == [b"next"]
    found = await lab.admin.list_consumer_group_offsets(lab.prefix + "q")
    assert found[TopicPartition(lab.prefix + "q", 0)].offset == 10


async def test_commits_are_not_per_message(lab: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    queue: Queue[bytes] = Queue("q")
    bus, commits, commit = lab.bus(), list[Any](), AIOKafkaConsumer.commit

    async def counted(self: Any, points: Any) -> None:
        commits.append(points)
        await commit(self, points)

    monkeypatch.setattr(AIOKafkaConsumer, "commit", counted)

    @bus.consumer(queue)
    async def handle(body: bytes) -> None: ...

    async with bus.running():
        await bus.send_many(queue, [b"x"] * 2000)
        await until(lambda: bus.counts.get("handled") == 2000, "handled")
    assert 1 <= len(commits) < 2000 / 10  # by time, so a busy machine has more of them


@both
async def test_nothing_is_committed_for_a_partition_that_is_no_longer_ours(lab: Bench) -> None:
    queue: Queue[bytes] = Queue("q")
    async with lab.bus(queue) as one, lab.bus(queue) as two:
        await one.send_many(queue, [b"1", b"2"])
        lost: list[Any] = []

        async def losing(deliveries: Sequence[Delivery[Any]], grace: float) -> None:
            assert grace > 0
            lost.extend(deliveries)
            await first.settle(Outcome.ACCEPTED, deliveries[:1])  # one ends in time

        first = await one.adapter.subscribe(Source(queue, losing=losing))
        held = await take(first, 2)
        seconds = [
            await two.adapter.subscribe(Source(queue)) for _ in range(3)
        ]  # one of them, or the first, has it then
        await until(lambda: len(lost) == 2, "told")
        await until(lambda: held[1].lost, "lost")
        (error,) = await first.settle(Outcome.ACCEPTED, held[1:])
        assert isinstance(error, LeaseLost)
        found: list[bytes] = []
        while not found:
            for made in (first, *seconds):
                found += bodies(await made.receive(5, 0.2))
        assert found == [b"2"]
        for made in (first, *seconds):
            await made.close()


# Delays


async def test_long_delays_hop_from_rung_to_rung(lab: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "RUNGS", (0.5, 2.0))  # as 10 s, 1 min, ..., only sooner
    monkeypatch.setattr(subscription, "HOLD_BELOW", 0.5)
    queue, topic = Queue("q", delayed=True), Topic("t", delayed=True)
    bus, seen = lab.bus(), dict[bytes, float]()

    @bus.consumer(queue)
    async def on_queue(body: bytes) -> None:
        seen[body] = time.monotonic() - begun

    @bus.subscriber(topic, group="g")
    async def on_topic(body: bytes) -> None:
        seen[body] = time.monotonic() - begun

    waits = {b"queue 3.3": 3.3, b"queue 0.7": 0.7, b"queue 0.2": 0.2, b"queue 2.6": 2.6}
    async with bus.running():
        begun = time.monotonic()
        for body, wait in waits.items():
            await bus.send(queue, body, delay=wait)
        await bus.publish(topic, b"topic", delay=2.7)
        await until(lambda: len(seen) == 5, "all")
    for body, wait in {**waits, b"topic": 2.7}.items():
        assert wait <= seen[body] < wait + 1.5, body


# Bad input


@both
async def test_a_topic_deleted_under_its_consumer_is_declared_again(lab: Bench) -> None:
    queue: Queue[bytes] = Queue("q")
    bus, seen = lab.bus(), list[bytes]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen.append(body)

    async with bus.running():
        await bus.send(queue, b"before")
        await until(lambda: seen == [b"before"], "before")
        await lab.admin.delete_topics([lab.prefix + "q"])

        async def sent() -> bool:
            try:
                await bus.send(queue, b"after", timeout=2)
            except (NotFound, Timeout):
                return False
            return True

        await until(sent, "there again", 40)
        await until(lambda: b"after" in seen, "handled again")


@both
async def test_looking_for_a_topic_does_not_make_it(lab: Bench) -> None:
    queue, topic = Queue("q"), Topic("t")
    async with lab.bus(queue, topic, declare="assume") as bus:
        with pytest.raises(NotFound):
            await bus.send(queue, b"x")
        with pytest.raises(NotFound):
            await bus.publish(topic, b"x")
        with pytest.raises(NotFound):
            await bus.adapter.subscribe(Source(queue))
        with pytest.raises(NotFound):
            await bus.backlog(queue)
    assert await lab.topics() == set()


@both
async def test_new_partitions_are_picked_up(lab: Bench) -> None:
    queue: Queue[bytes] = Queue("q")
    url = lab.url + "?metadata_max_age=0.5"
    bus, seen = lab.bus(url=url), set[str]()

    @bus.consumer(queue)
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        seen.add(delivery.native.topic + str(delivery.native.partition))  # type: ignore[attr-defined] # aiokafka's record

    async with bus.running():
        await lab.admin.create_partitions({lab.prefix + "q": NewPartitions(total_count=3)})

        async def everywhere() -> bool:
            await bus.send_many(queue, [b"x"] * 6)
            return len(seen) == 3

        await until(everywhere, "all three are read")


@both
async def test_records_deleted_before_they_were_read(lab: Bench, caplog: pytest.LogCaptureFixture) -> None:
    queue: Queue[bytes] = Queue("q")
    tp = TopicPartition(lab.prefix + "q", 0)
    async with lab.bus(queue) as bus:
        await bus.send_many(queue, [b"%d" % n for n in range(6)])
        async with lab.subscribed(bus, queue, 1) as made:
            await made.settle(Outcome.ACCEPTED, await take(made, 1))
        await lab.admin.delete_records({tp: RecordsToDelete(before_offset=4)})
        async with lab.subscribed(bus, queue) as made:
            assert bodies(await take(made, 2)) == [b"4", b"5"]
    assert "are gone" in caplog.text


async def test_a_group_whose_offsets_have_expired_misses_nothing(lab: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Its dead-letter topic tells that it is not new."""
    topic: Topic[bytes] = Topic("t")
    dlq = NewTopic(lab.prefix + "t.g.dlq", 1, 1)
    await lab.admin.create_topics([NewTopic(lab.prefix + "t", 1, 1), dlq])
    await lab.send_raw("t", b"waiting")
    bus, seen = lab.bus(), list[bytes]()

    @bus.subscriber(topic, group="g")
    async def handle(body: bytes) -> None:
        seen.append(body)

    async with bus.running():
        await until(lambda: seen == [b"waiting"], "from the beginning")
    assert "no offset is committed" in caplog.text


@both
async def test_a_new_group_begins_now_though_a_broker_does_not_know_its_topic_yet(
    lab: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a cluster that has not heard of it. It began with all that was there."""
    topic: Topic[bytes] = Topic("t")
    await lab.admin.create_topics([NewTopic(lab.prefix + "t", 1, 1)])
    await lab.send_raw("t", b"before")
    bus, seen, begin = lab.bus(), list[bytes](), KafkaAdapter._begin

    async def forgetful(self: KafkaAdapter, link: Any, *rest: Any, **more: Any) -> None:
        link._client.cluster._partitions.pop(lab.prefix + "t")
        await begin(self, link, *rest, **more)

    monkeypatch.setattr(KafkaAdapter, "_begin", forgetful)

    @bus.subscriber(topic, group="g")
    async def handle(body: bytes) -> None:
        seen.append(body)

    async with bus.running():
        await bus.publish(topic, b"now")
        await until(lambda: seen, "what was published")
    assert seen == [b"now"]


async def test_a_consumer_whose_broker_does_not_know_its_topics_yet_looks_again(
    lab: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a cluster that has not heard of them. It got no partition, and looked again after five minutes."""
    queue: Queue[bytes] = Queue("q")
    bus, seen, subscribe, answers = lab.bus(), list[bytes](), AioConsumer.subscribe, list[Any]()

    def unheard(self: AioConsumer, *given: Any) -> None:
        cluster = self._consumer._client.cluster
        learn = cluster.update_metadata

        def update(answer: Any) -> None:
            answers.append(answer)
            if len(answers) <= 2:  # set_topics' and another one
                answer.topics = []
            learn(answer)

        cluster.update_metadata = update
        subscribe(self, *given)

    monkeypatch.setattr(AioConsumer, "subscribe", unheard)

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen.append(body)

    async with bus.running():
        await bus.send(queue, b"x")
        await until(lambda: seen, "what was sent")
    assert len(answers) > 2, "every answer named the topics"


@both
async def test_what_a_transaction_has_aborted_is_not_received(lab: Bench) -> None:
    """Nor the markers of its end: of foreign producers, since ours has no transactions."""
    queue: Queue[bytes] = Queue("q")
    bus, seen = lab.bus(), list[bytes]()
    await lab.admin.create_topics([NewTopic(lab.prefix + "q", 1, 1)])
    sent = list[bytes]()
    async with AIOKafkaProducer(**lab.raw, transactional_id=lab.prefix) as producer:
        for n in range(6):
            await producer.begin_transaction()
            bodies = [b"%d.%d" % (n, m) for m in range(3)]
            for body in bodies:
                await producer.send_and_wait(lab.prefix + "q", body)
            if n % 2:
                await producer.abort_transaction()
            else:
                await producer.commit_transaction()
                sent += bodies

    @bus.consumer(queue, prefetch=2)
    async def handle(body: bytes) -> None:
        seen.append(body)

    async with bus.running():
        await bus.send(queue, b"last")
        await until(lambda: b"last" in seen, "what came after them")
    assert seen == [*sent, b"last"]


@both
@pytest.mark.parametrize("compression", [None, "gzip"])
async def test_a_group_begins_within_a_batch(lab: Bench, compression: str | None) -> None:
    """The broker sends the whole of it."""
    topic: Topic[bytes] = Topic("t")
    bus, seen = lab.bus(), list[bytes]()
    await lab.admin.create_topics([NewTopic(lab.prefix + "t", 1, 1)])
    async with AIOKafkaProducer(**lab.raw, compression_type=compression) as producer:
        batch = producer.create_batch()
        for n in range(10):
            assert batch.append(key=None, value=b"%d" % n, timestamp=None) is not None
        await (await producer.send_batch(batch, lab.prefix + "t", partition=0))

    @bus.subscriber(topic, group="g", start=[f"{lab.prefix}t/0@6"])
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        assert delivery.position == f"{lab.prefix}t/0@{int(body)}"
        seen.append(body)

    async with bus.running():
        await until(lambda: len(seen) == 4, "the second part of the batch")
    assert seen == [b"6", b"7", b"8", b"9"]


@both
async def test_foreign_commit_metadata_is_a_replay(lab: Bench) -> None:
    queue: Queue[bytes] = Queue("q")
    name, tp = lab.prefix + "q", TopicPartition(lab.prefix + "q", 0)
    async with lab.bus(queue) as bus:
        await bus.send_many(queue, [b"0", b"1", b"2"])
        consumer = AIOKafkaConsumer(**lab.raw, group_id=name, enable_auto_commit=False)
        await consumer.start()
        consumer.assign([tp])
        await consumer.commit({tp: (1, "u2:of somebody else")})
        await consumer.stop()
        async with lab.subscribed(bus, queue) as made:
            assert bodies(await take(made, 2)) == [b"1", b"2"]


# Connections and rights


@both
@pytest.mark.parametrize("query", ["", "?sasl_mechanism=PLAIN", "?sasl_mechanism=SCRAM-SHA-256"])
async def test_logins(lab: Bench, query: str) -> None:
    async with lab.bus(url=lab.url + query) as bus:
        assert (await bus.health()).status == "ok"


@both
async def test_a_wrong_password_is_told_and_never_shown(lab: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    host = lab.url.rpartition("@")[2]
    for query in ("", "?sasl_mechanism=PLAIN"):
        with pytest.raises(AuthenticationFailed, match="UNIBUS_PASSWORD"):
            async with lab.bus(url=f"{lab.url.partition(':')[0]}://nobody:hush-4711@{host}{query}"):
                pass
    assert "hush-4711" not in caplog.text


@both
async def test_the_password_is_never_logged(lab: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    password = parse(lab.url).password
    assert password is not None
    queue: Queue[bytes] = Queue("q")
    async with lab.bus(queue, url=lab.url + "?sasl_mechanism=PLAIN") as bus, bus.receiver(queue) as receiver:
        await bus.send(queue, b"canary-body")
        delivery = await receiver.receive(timeout=SOON)
        assert delivery is not None
        await delivery.ack()
    assert password.value not in caplog.text
    assert "canary" not in caplog.text


@both
async def test_tls(lab: Bench) -> None:
    variables = {name.rpartition("KAFKA_")[2]: value for name, value in lab.broker.variables.items()}
    assert {"TLS_URL", "CA"} <= variables.keys(), "set UNIBUS_TEST_KAFKA_TLS_URL and UNIBUS_TEST_KAFKA_CA too"
    queue: Queue[bytes] = Queue("q")
    tls = Bench.of(variables["TLS_URL"], lab.url.partition(":")[0])
    async with lab.bus(queue, url=f"{tls}?ca_file={variables['CA']}") as bus:
        await bus.send(queue, b"sealed")
        assert (await bus.backlog(queue)).ready == 1
    with pytest.raises(ConfigError, match="ca_file"):
        async with lab.bus(url=tls):
            pass


@both
async def test_a_user_without_rights_is_refused(lab: Bench) -> None:
    variables = {name.rpartition("KAFKA_")[2]: value for name, value in lab.broker.variables.items()}
    assert "LIMITED_URL" in variables, "set UNIBUS_TEST_KAFKA_LIMITED_URL too: a user without rights"
    with pytest.raises(PermissionDenied):
        async with lab.bus(Queue("q"), url=Bench.of(variables["LIMITED_URL"], lab.url.partition(":")[0])):
            pass
    assert await lab.topics() == set()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("scheme", ["kafka", "kafka+confluent"])
async def test_a_broker_that_was_killed_is_found_again(scheme: str) -> None:
    broker = supply.start("kafka", instance="faults")
    lab = Bench(broker, scheme)
    queue: Queue[bytes] = Queue("q")
    bus, seen = lab.bus(send_timeout=60), list[bytes]()

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen.append(body)

    try:
        async with bus.running():
            await bus.send(queue, b"before")
            await until(lambda: seen == [b"before"], "before")
            if (
                scheme != "kafka"
            ):  # librdkafka itself gives up partitions after session_timeout, with what is not committed

                async def committed() -> bool:
                    return (await bus.backlog(queue)).ready == 0

                await until(committed, "committed")
            broker.kill()

            async def down() -> bool:
                return (await bus.health()).status == "down"

            await until(down, "down")
            with pytest.raises(Timeout):
                await bus.send(queue, b"undecided", timeout=1)
            sending = asyncio.create_task(bus.send(queue, b"kept"))
            await asyncio.to_thread(broker.restart)
            await sending
            await until(lambda: b"kept" in seen, "handled after the restart", 40)
            assert seen.count(b"before") == 1
            assert (await bus.health()).status == "ok"
            assert [letter async for letter in deadletter.browse(bus, queue)] == []
    finally:
        await asyncio.to_thread(broker.stop)


@both
async def test_a_message_beyond_the_largest_request(lab: Bench) -> None:
    queue: Queue[bytes] = Queue("q")
    async with lab.bus(queue) as bus:
        size = bus.capabilities.max_body or 0
        largest = Message(b"x" * size, id="largest", key="k" * 4096, headers={"h": "v" * (32 * 1024 - 1)})
        batch = [
            Outgoing(queue, message)
            for message in (largest, Message(b"x" * (size + 60_000), id="no"), Message(b"", id="s"))
        ]
        results = await bus.adapter.send(batch, SOON)
        assert [type(error).__name__ for error in results] == ["NoneType", "MessageTooLarge", "NoneType"]
        async with lab.subscribed(bus, queue) as made:
            assert [d.message.id for d in await take(made, 2)] == ["largest", "s"]
