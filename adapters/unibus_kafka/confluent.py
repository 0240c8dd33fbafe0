"""The engine on confluent-kafka, which is librdkafka: `kafka+confluent://`.

librdkafka has threads of its own. What they report of sends is asked for by the event loop, while anything is under way: a
thread that waits for it would take the interpreter from the loop for each message. A consumer is called by one thread only (it
lets no other one in while it is read); the lists of messages that it reads are made into records on the loop.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, cast

import aiokafka.errors as kafka
import confluent_kafka as native
from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient
from confluent_kafka import KafkaException

from unibus.errors import Throttled
from unibus.waiting import happens
from unibus_kafka import config
from unibus_kafka.engine import Consumer, Listener, Producer
from unibus_kafka.link import by_name, put_away
from unibus_kafka.wire import Record, record_of

log = logging.getLogger("unibus.kafka")

_SOON, _LATER = (
    0.001,
    0.01,
)  # seconds between looks at what was sent: at first, and when nothing has come back for longer
_LINGER = 0.7  # milliseconds librdkafka waits for more: else it makes many small requests of what one send has for it
_POLL = 0.5  # seconds; what arrives ends it
_MANY = 500  # records of one poll
_AHEAD = 2  # polls that are not taken yet
_WAIT = 0.05  # seconds after which the reading thread looks what else there is to do
_PATIENCE = 20  # of these until it stops librdkafka, which then forgets what it has read ahead
_CLOSE = 5.0  # seconds
_DOUBT = 3.0  # seconds without a record after which a topic may be gone: librdkafka does not always say so
_UNDECIDED = 40_000  # milliseconds after which a message is given up; aiokafka has the same
_BUFFERED = 16 * 1024  # KiB that are read ahead, of all partitions together

_LOCAL: dict[int, type[kafka.KafkaError]] = {
    native.KafkaError._UNKNOWN_TOPIC: kafka.UnknownTopicOrPartitionError,
    native.KafkaError._UNKNOWN_PARTITION: kafka.UnknownTopicOrPartitionError,
    native.KafkaError._AUTHENTICATION: kafka.AuthenticationFailedError,
    native.KafkaError._TIMED_OUT: kafka.RequestTimedOutError,
    native.KafkaError._MSG_TIMED_OUT: kafka.RequestTimedOutError,
    native.KafkaError._ASSIGNMENT_LOST: kafka.IllegalGenerationError,
}
_GONE = (kafka.IllegalGenerationError, kafka.UnknownMemberIdError)
_REFUSED = (
    kafka.TopicAuthorizationFailedError,
    kafka.GroupAuthorizationFailedError,
    kafka.ClusterAuthorizationFailedError,
    kafka.AuthenticationFailedError,
)


class ConfluentEngine:
    def producer(self, options: dict[str, Any], given: config.Settings) -> Producer:
        return ConfluentProducer(options, given)

    def consumer(self, options: dict[str, Any], given: config.Settings, group: str | None) -> Consumer:
        return ConfluentConsumer(options, given, group)


def common(options: dict[str, Any], given: config.Settings) -> config.Options:
    """What every client of librdkafka is made with, from what aiokafka's are made with."""
    found: dict[str, Any] = {
        "bootstrap.servers": ",".join(options["bootstrap_servers"]),
        "client.id": options["client_id"],
        "security.protocol": options["security_protocol"],
        "topic.metadata.refresh.interval.ms": min(options["metadata_max_age_ms"], 3_600_000),
        "allow.auto.create.topics": False,
        "topic.metadata.propagation.max.ms": 1000,  # until one that is not there is taken for gone
        "reconnect.backoff.max.ms": 1000,
        "log_level": 0,  # it would write to stderr; what is wrong is told by errors
    }
    if "sasl_mechanism" in options:
        found["sasl.mechanism"] = options["sasl_mechanism"]
        found["sasl.username"] = options["sasl_plain_username"]
        found["sasl.password"] = options["sasl_plain_password"]
    if options["ssl_context"] is not None:
        trusted = ssl.get_default_verify_paths()
        files = {
            "ssl.ca.location": given.ca_file or trusted.cafile or trusted.capath,
            "ssl.certificate.location": given.cert_file,
            "ssl.key.location": given.key_file or given.cert_file,
        }
        found |= {name: str(path) for name, path in files.items() if path is not None}
        found["enable.ssl.certificate.verification"] = given.verify
        found["ssl.endpoint.identification.algorithm"] = "https" if given.verify else "none"
    return config.Options(found)


def translated(error: native.KafkaError, name: str) -> Exception:
    """The error of aiokafka that it is. `name`: of the topic or group that it is about."""
    code = error.code()
    kind = kafka.for_code(code) if code > 0 else _LOCAL.get(code, kafka.KafkaError)
    return cast(Exception, kind(name if issubclass(kind, _REFUSED) else error.str()))


class ConfluentProducer:
    def __init__(self, options: dict[str, Any], given: config.Settings) -> None:
        self.native: Any = None
        self.client: Any = by_name(AIOKafkaClient(**options))
        self._options = common(options, given) | {
            "enable.idempotence": True,  # and with it acks=all
            "message.max.bytes": given.max_request_size,
            "batch.size": given.batch_size,
            "linger.ms": _LINGER,
            "message.timeout.ms": _UNDECIDED,
            "compression.type": given.compression or "none",
        }
        self._timer: asyncio.TimerHandle | None = None
        self._waited = 0.0  # since something came back
        self.under_way: set[ConfluentBatch] = set()
        self.closed = False

    async def start(self) -> None:
        await self.client.bootstrap()
        self.native = await asyncio.to_thread(native.Producer, self._options)

    async def close(self) -> None:
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self.native is not None:
            await asyncio.to_thread(self._end)
        for batch in list(self.under_way):
            batch.end(kafka.ProducerClosed())
        await put_away(self.client.close)

    def _end(self) -> None:
        self.native.purge()
        self.native.close()

    def batch(self, tp: TopicPartition) -> ConfluentBatch:
        return ConfluentBatch(self, tp)

    def sent(self, batch: ConfluentBatch) -> None:
        self.under_way.add(batch)
        if self._timer is None:
            self._waited = 0.0
            self._timer = asyncio.get_running_loop().call_later(_SOON, self._look)

    def _look(self) -> None:
        self._timer = None
        pause = min(max(_SOON, self._waited / 4), _LATER)
        self._waited = 0.0 if self.native.poll(0) else self._waited + pause
        if len(self.native):
            self._timer = asyncio.get_running_loop().call_later(pause, self._look)


class ConfluentBatch:
    """All that one send has for a partition. librdkafka has them at once, and keeps their order over its own retries."""

    __slots__ = ("_done", "_produce", "_producer", "_tp", "failed", "indices")

    def __init__(self, producer: ConfluentProducer, tp: TopicPartition) -> None:
        self._producer = producer
        self._produce = producer.native.produce
        self._tp = tp
        self._done: asyncio.Future[None] | None = None
        self.indices: dict[int, None] = {}
        self.failed: dict[int, Exception] = {}

    def append(
        self, i: int, key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes | None]], at: int
    ) -> bool:
        topic, number = self._tp
        try:
            self._produce(topic, value, key, number, partial(self._told, i), timestamp=at, headers=headers)
        except BufferError:
            self.failed[i] = Throttled(f"send to {topic!r}: too many messages wait for the broker; send them later")
        except KafkaException as exc:
            self.failed[i] = translated(exc.args[0], topic)
        else:
            self.indices[i] = None
        return True

    async def send(self) -> asyncio.Future[None]:
        self._done = asyncio.get_running_loop().create_future()
        if self.indices:
            self._producer.sent(self)
        else:
            self._done.set_result(None)
        return self._done

    def _told(self, i: int, error: native.KafkaError | None, _: native.Message) -> None:
        if self._producer.closed:  # by a thread
            return
        del self.indices[i]
        if error is not None:
            self.failed[i] = translated(error, self._tp.topic)
        if not self.indices:
            self.end()

    def end(self, error: Exception | None = None) -> None:
        self._producer.under_way.discard(self)
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


class ConfluentConsumer:
    def __init__(self, options: dict[str, Any], given: config.Settings, group: str | None) -> None:
        rebalance = max(given.rebalance_grace + given.heartbeat + 5, given.session_timeout)
        self._options = common(options, given) | {
            "group.id": group or options["client_id"],  # it must have one, also where it never joins
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "session.timeout.ms": round(given.session_timeout * 1000),
            "socket.timeout.ms": 10_000,  # of a commit, too, which holds up the thread
            "heartbeat.interval.ms": round(given.heartbeat * 1000),
            "max.poll.interval.ms": round(rebalance * 1000),  # also how long the group waits for us in a rebalance
            "partition.assignment.strategy": "roundrobin",  # what aiokafka has: a group may have members of both
            "fetch.wait.max.ms": 100,  # what is resumed meanwhile has to wait for it
            "fetch.queue.backoff.ms": 10,
            "queued.min.messages": 10_000,
            "queued.max.messages.kbytes": _BUFFERED,
        }
        self._group = group
        self._consumer: Any = None
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="unibus-kafka", daemon=True)
        # Of the thread alone
        self._assigned: dict[TopicPartition, Any] = {}
        self._paused: set[TopicPartition] = set()
        self._member = ""  # our name in the group, when partitions were assigned last
        self._rebalancing = self._begun = False
        # Between the thread and the loop
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._found: deque[tuple[int, list[Any]]] = deque()  # with the number of the last seek before it
        self._seeks = 0
        self._since: dict[TopicPartition, int] = {}  # what was found before that seek is no longer valid
        self._room = threading.Event()
        self._arrived = asyncio.Event()
        self._closing = False
        self._over = asyncio.Event()
        # Of the loop alone
        self._next: dict[TopicPartition, tuple[int, int]] = {}  # the seek, and where reading goes on since
        self._failures: deque[Exception] = deque()
        self._doubt = self._loop.time() + _DOUBT  # when to ask next whether the topic is still there

    async def start(self) -> None:
        self._consumer = await asyncio.to_thread(native.Consumer, self._options)
        self._thread.start()

    def subscribe(self, topics: Sequence[str], listener: Listener) -> None:
        self._listener = listener
        told = {
            "on_assign": partial(self._on_assign, listener),
            "on_revoke": partial(self._on_revoke, listener, False),
            "on_lost": partial(self._on_revoke, listener, True),
        }
        self._commands.put(partial(self._consumer.subscribe, list(topics), **told))

    # On the loop

    async def begin(
        self, starts: Mapping[TopicPartition, int], paused: Collection[TopicPartition], *, assign: bool
    ) -> None:
        await self._ask(partial(self._begin, dict(starts), set(paused), assign))

    async def _ask(self, what: Callable[[], None]) -> None:
        """Have it done by the thread. It is done also when we are cancelled."""
        if self._over.is_set():
            raise kafka.ConsumerStoppedError
        done = self._loop.create_future()
        self._commands.put(partial(self._do, what, done))
        await done

    @staticmethod
    def _done(done: asyncio.Future[None], error: Exception | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    async def getmany(self) -> Mapping[TopicPartition, Sequence[Any]]:
        if not self._found:
            self._arrived.clear()
            if not self._found:
                await happens(self._arrived, _POLL)
        if self._failures:
            raise self._failures.popleft()
        if not self._found:
            return {}
        number, messages = self._found.popleft()
        self._room.set()
        return self._records(number, messages)

    def _records(self, number: int, messages: list[Any]) -> dict[TopicPartition, list[Record]]:
        read: dict[TopicPartition, list[Record]] = {}
        topic, partition, records = "", -1, list[Record]()
        for message in messages:
            if (error := message.error()) is not None:
                self._failed(error, message)
                continue
            if message.partition() != partition or message.topic() != topic:  # many of one follow each other
                topic, partition = message.topic(), message.partition()
                records = read.setdefault(TopicPartition(topic, partition), [])
            kind, at = message.timestamp()
            key, value, headers = message.key(), message.value(), message.headers() or ()
            records.append(record_of((topic, partition, message.offset(), at if kind else -1, key, value, headers)))
        found = {}
        for tp, all_ in read.items():
            since = self._since.get(tp, 0)
            if number < since:
                continue
            seek, following = self._next.get(tp, (since, 0))
            records = all_
            if seek == since and all_[0].offset < following:  # after a pause
                records = [record for record in all_ if record.offset >= following]
            if records:
                self._doubt = self._loop.time() + _DOUBT
                self._next[tp] = since, records[-1].offset + 1
                found[tp] = records
        return found

    def _failed(self, error: native.KafkaError, message: Any) -> None:
        topic = message.topic() or ""
        exc = translated(error, topic or str(self._group))
        if error.code() in {native.KafkaError._AUTO_OFFSET_RESET, native.KafkaError.OFFSET_OUT_OF_RANGE}:
            self._failures.append(
                kafka.OffsetOutOfRangeError({TopicPartition(topic, message.partition()): message.offset()})
            )
        elif isinstance(exc, kafka.UnknownTopicOrPartitionError):
            self._doubt = 0.0
        elif error.fatal() or (isinstance(exc, _REFUSED) and (topic or self._group is not None)):
            self._failures.append(exc)
        else:  # librdkafka tries again by itself
            log.debug("%s: %s", topic or self._group, error.str())

    def pause(self, tp: TopicPartition, *, on: bool) -> None:
        self._commands.put(partial(self._set, tp, on))

    async def commit(self, points: Mapping[TopicPartition, tuple[int, str]]) -> None:
        offsets = [
            # It adds the NUL at the end by itself.
            native.TopicPartition(tp.topic, tp.partition, offset, metadata.rstrip("\0"))
            for tp, (offset, metadata) in points.items()
        ]
        await self._ask(partial(self._commit, offsets))

    def forgets(self, topics: Collection[str]) -> bool:
        if self._doubt > (now := self._loop.time()):
            return False
        self._doubt = now + _DOUBT
        return True

    async def close(self) -> None:
        if self._thread.is_alive():
            self._closing = True
            self._room.set()
            self._commands.put(None)
            await happens(self._over, _CLOSE)

    # In the thread

    def _run(self) -> None:
        full = 0
        try:
            while not self._closing:
                self._obey()
                self._room.clear()
                if len(self._found) < _AHEAD:
                    self._read(self._consumer.consume(_MANY, 0) or self._consumer.consume(1, _WAIT))
                    full = 0
                elif not self._room.wait(_WAIT) and (full := full + 1) >= _PATIENCE:
                    self._idle()
        except KafkaException as exc:
            self._failures.append(translated(exc.args[0], str(self._group)))
        except Exception as exc:
            self._failures.append(exc)
        try:
            self._consumer.close()
            self._obey()
        finally:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._ended)

    def _ended(self) -> None:
        self._over.set()
        self._arrived.set()

    def _read(self, messages: list[Any]) -> None:
        if messages:
            self._found.append((self._seeks, messages))
            self._loop.call_soon_threadsafe(self._arrived.set)

    def _idle(self) -> None:
        """Nobody takes what we have. Polling has to go on, for rebalances and to be seen alive, so nothing more may come."""
        while len(self._found) >= _AHEAD and not self._closing:
            with suppress(KafkaException):
                self._consumer.pause(list(self._assigned.values()))
            self._read(self._consumer.consume(1, _WAIT))
            self._obey()
        with suppress(KafkaException):
            self._consumer.resume([there for tp, there in self._assigned.items() if tp not in self._paused])

    def _obey(self) -> None:
        while not self._commands.empty():
            if (command := self._commands.get()) is not None:
                command()

    def _set(self, tp: TopicPartition, on: bool) -> None:
        (self._paused.add if on else self._paused.discard)(tp)
        if (there := self._assigned.get(tp)) is not None:
            with suppress(KafkaException):  # taken away in this moment
                (self._consumer.pause if on else self._consumer.resume)([there])

    def _do(self, what: Callable[[], None], done: asyncio.Future[None]) -> None:
        error: Exception | None = None
        try:
            what()
        except KafkaException as exc:
            error = cause = translated(exc.args[0], str(self._group))
            if isinstance(cause, (*_GONE, kafka.RebalanceInProgressError)):
                error = kafka.CommitFailedError()
                error.__cause__ = cause
        except RuntimeError:  # it is closed
            error = kafka.ConsumerStoppedError()
        except Exception as exc:
            error = exc
        self._loop.call_soon_threadsafe(self._done, done, error)

    def _begin(self, starts: dict[TopicPartition, int], paused: set[TopicPartition], assign: bool) -> None:
        self._seeks += 1
        self._since |= dict.fromkeys(starts, self._seeks)
        there = {tp: native.TopicPartition(tp.topic, tp.partition, offset) for tp, offset in starts.items()}
        if assign or self._rebalancing:
            self._begun = True
            self._assigned, self._paused = there, paused
            self._consumer.assign(list(there.values()))
        else:  # no seek: it refuses one whose offset is gone
            others = [one for tp, one in self._assigned.items() if tp not in there]
            for one in self._consumer.position(others):
                if one.offset >= 0:
                    self._assigned[TopicPartition(one.topic, one.partition)] = one
            self._assigned |= there
            self._paused |= paused
            self._consumer.assign(list(self._assigned.values()))
        if self._paused:
            self._consumer.pause([self._assigned[tp] for tp in self._paused & self._assigned.keys()])

    def _commit(self, offsets: list[Any]) -> None:
        done = self._consumer.commit(offsets=offsets, asynchronous=False)
        for error in (tp.error for tp in done if tp.error is not None):
            raise KafkaException(error)

    def _on_assign(self, listener: Listener, _: Any, tps: list[Any]) -> None:
        self._rebalancing, self._begun = True, False
        self._member = self._consumer.memberid() or ""
        self._meanwhile(listener.assigned([TopicPartition(tp.topic, tp.partition) for tp in tps]))
        self._rebalancing = False
        if not self._begun:  # it has failed, and ends the subscription
            self._consumer.assign([])

    def _on_revoke(self, listener: Listener, lost: bool, _: Any, tps: list[Any]) -> None:
        self._seeks += 1
        self._since |= dict.fromkeys(self._assigned, self._seeks)
        self._assigned = {}
        if not self._closing:
            # After a session without an answer librdkafka forgets its name, and joins as somebody new.
            gone = self._member if lost and self._consumer.memberid() != self._member else ""
            self._meanwhile(listener.revoked(lost=lost, member=gone))

    def _meanwhile(self, what: Awaitable[None]) -> None:
        """Wait for the loop, and do what it asks for."""
        done = asyncio.run_coroutine_threadsafe(cast(Coroutine[Any, Any, None], what), self._loop)
        done.add_done_callback(lambda _: self._commands.put(None))
        while not done.done():
            if (command := self._commands.get()) is not None:
                command()
