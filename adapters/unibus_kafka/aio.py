"""The engine on aiokafka: `kafka://`."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.consumer.fetcher import FetchResult, PartitionRecords
from aiokafka.errors import CorruptRecordException, IllegalStateError, NoOffsetForPartitionError

from unibus_kafka import config
from unibus_kafka.engine import Consumer, Listener, Producer
from unibus_kafka.link import by_name, put_away
from unibus_kafka.wire import Record, record_of

_POLL = 500  # milliseconds; what arrives ends it
_MANY = 500  # records of one poll
_LOOK = 0.5  # seconds between looks for topics that it does not know


class AioEngine:
    def producer(self, options: dict[str, Any], given: config.Settings) -> Producer:
        return AioProducer(options, given)

    def consumer(self, options: dict[str, Any], given: config.Settings, group: str | None) -> Consumer:
        return AioConsumer(options, given, group)


class AioProducer:
    def __init__(self, options: dict[str, Any], given: config.Settings) -> None:
        self.native: Any = AIOKafkaProducer(
            **options,
            acks="all",
            enable_idempotence=True,
            max_request_size=given.max_request_size,
            max_batch_size=given.batch_size,
            compression_type=given.compression,
        )
        self.client: Any = by_name(self.native.client)

    async def start(self) -> None:
        await self.native.start()

    async def close(self) -> None:
        await put_away(self.native.stop, self.native._sender.close, self.client.close)

    def batch(self, tp: TopicPartition) -> AioBatch:
        return AioBatch(self.native, tp)


class AioBatch:
    """As large as one of the library, so that one is under way at a time: behind it the next one waits for what becomes of it."""

    __slots__ = ("_add", "_builder", "_producer", "_tp", "indices")
    failed: Mapping[int, Exception] = {}  # it fails as a whole

    def __init__(self, producer: Any, tp: TopicPartition) -> None:
        self._producer = producer
        self._tp = tp
        self._builder = producer.create_batch()
        self._add = self._builder._builder.append  # what is around it only counts, and takes as long
        self.indices: list[int] = []

    def append(
        self, i: int, key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes | None]], at: int
    ) -> bool:
        number = len(self.indices)
        if self._add(number, at, key, value, headers) is None and number:
            return False
        self.indices.append(i)
        return True

    async def send(self) -> asyncio.Future[Any]:
        self._builder._relative_offset = len(self.indices)
        self._builder.close()
        confirmed: asyncio.Future[Any] = await self._producer.send_batch(
            self._builder, self._tp.topic, partition=self._tp.partition
        )
        return confirmed


class AioConsumer:
    def __init__(self, options: dict[str, Any], given: config.Settings, group: str | None) -> None:
        rebalance = round((given.rebalance_grace + given.heartbeat + 5) * 1000)
        self._consumer = AIOKafkaConsumer(
            **options,
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            session_timeout_ms=round(given.session_timeout * 1000),
            heartbeat_interval_ms=round(given.heartbeat * 1000),
            rebalance_timeout_ms=rebalance,
            request_timeout_ms=max(40_000, rebalance + 10_000),  # joining takes as long as the slowest member
            max_poll_interval_ms=2**31
            - 1,  # slow handlers don't stop us from polling, and heartbeats tell who is alive
        )
        by_name(self._consumer._client)
        self._partitions_of = self._consumer._client.cluster.partitions_for_topic
        self._looked = 0.0

    async def start(self) -> None:
        await self._consumer.start()
        self._consumer._fetcher._records = _Fetched()

    def subscribe(self, topics: Sequence[str], listener: Listener) -> None:
        self._consumer.subscribe(list(topics), listener=_Told(listener))

    async def begin(
        self, starts: Mapping[TopicPartition, int], paused: Collection[TopicPartition], *, assign: bool
    ) -> None:
        if assign:
            self._consumer.assign(list(starts))
        for tp, offset in starts.items():
            self._consumer.seek(tp, offset)
            if tp in paused:
                self._consumer.pause(tp)

    async def getmany(self) -> Mapping[TopicPartition, Sequence[Record]]:
        try:
            found: Mapping[TopicPartition, Sequence[Record]] = await self._consumer.getmany(
                timeout_ms=_POLL, max_records=_MANY
            )
        except NoOffsetForPartitionError:  # the listener is about to say where to begin
            return {}
        return found

    def pause(self, tp: TopicPartition, *, on: bool) -> None:
        with suppress(IllegalStateError):  # taken away in this moment
            (self._consumer.pause if on else self._consumer.resume)(tp)

    async def commit(self, points: Mapping[TopicPartition, tuple[int, str]]) -> None:
        await self._consumer.commit(dict(points))

    def forgets(self, topics: Collection[str]) -> bool:
        if all(map(self._partitions_of, topics)) or self._looked > (now := time.monotonic()) - _LOOK:
            return False
        self._looked = now
        self._consumer._client.force_metadata_update()  # else it would look again after `metadata_max_age`
        return True

    async def close(self) -> None:
        consumer = self._consumer
        parts = [part.close for part in (consumer._fetcher, consumer._client) if part is not None]
        await put_away(consumer.stop, *parts)


class _Fetched(OrderedDict[TopicPartition, Any]):
    """What the library has fetched and not handed out, such that a `Record` is made of each: its own take longer to make."""

    def __setitem__(self, tp: TopicPartition, result: Any) -> None:
        if type(result) is FetchResult:
            fetched = result._partition_records
            fetched.__class__ = _Unpacked
            fetched._records_iterator = fetched.unpack()
        super().__setitem__(tp, result)


class _Unpacked(PartitionRecords):  # type: ignore[misc]  # the client library is not typed
    next_fetch_offset: int

    def __iter__(self) -> Iterator[Record]:
        return self._records_iterator  # type: ignore[no-any-return]  # the same

    def unpack(self) -> Iterator[Record]:
        """`next_fetch_offset` is where the library goes on: it hands out some of these at a time, and checks it."""
        topic, partition = self._tp
        while self._records.has_next():
            batch = self._records.next_batch()
            if not batch.validate_crc():
                raise CorruptRecordException(f"{topic}/{partition}: invalid CRC")
            if not self._withheld(batch):
                first = self.next_fetch_offset
                for record in batch:
                    offset = record.offset
                    if offset >= first:  # of a compressed batch we may have asked for the end
                        self.next_fetch_offset = offset + 1
                        fields = topic, partition, offset, record.timestamp, record.key, record.value, record.headers
                        yield record_of(fields)
            self.next_fetch_offset = batch.next_offset

    def _withheld(self, batch: Any) -> bool:
        """It is the marker of a transaction's end, or of a transaction that was aborted."""
        if (producer := batch.producer_id) is not None:
            self._consume_aborted_up_to(batch.base_offset)
            if batch.is_control_batch and self._contains_abort_marker(batch):
                self._aborted_producers.discard(producer)
            if batch.is_transactional and producer in self._aborted_producers:
                return True
        return bool(batch.is_control_batch)


class _Told(ConsumerRebalanceListener):  # type: ignore[misc]  # the client library is not typed
    """Of the library's listener, ours."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        await self._listener.assigned(assigned)

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        await self._listener.revoked(lost=False)  # a commit will have told
