"""The engines behind the Kafka adapter, as far as no broker is needed: how librdkafka is set up, and what is made of what it says."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import aiokafka.errors as kafka
import pytest
from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, FetchResult, PartitionRecords
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from confluent_kafka import KafkaError, KafkaException

from unibus.errors import ConfigError, ConnectionLost, NotFound, PermissionDenied, Throttled, Timeout
from unibus.url import parse
from unibus_kafka import config, errors
from unibus_kafka.aio import _Fetched
from unibus_kafka.confluent import ConfluentBatch, ConfluentConsumer, ConfluentProducer, common, translated
from unibus_kafka.engine import engine_of
from unibus_kafka.wire import Record

TP = TopicPartition("t", 0)


def options(url: str, **given: Any) -> tuple[dict[str, Any], config.Settings]:
    settings = config.settings(given)
    return config.client(parse(url), settings, config.tls(parse(url), settings), "svc"), settings


@pytest.mark.parametrize("scheme", ["kafka", "kafkas", "kafka+confluent", "kafkas+confluent"])
def test_the_scheme_names_the_engine(scheme: str) -> None:
    assert ("confluent" in type(engine_of(scheme)).__module__) == ("confluent" in scheme)


def test_a_missing_client_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "unibus_kafka.confluent")
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(
        ConfigError, match=r"kafka\+confluent:// needs the module 'confluent_kafka'.*unibus\[kafka-confluent\]"
    ):
        engine_of("kafka+confluent")


def test_login_and_hosts_are_told_to_librdkafka() -> None:
    found = common(*options("kafka+confluent://me:hush-4711@k1,k2:9093,[::1]:9094"))
    assert found["bootstrap.servers"] == "k1:9092,k2:9093,[::1]:9094"
    assert (found["security.protocol"], found["sasl.mechanism"]) == ("SASL_PLAINTEXT", "SCRAM-SHA-512")
    assert (found["sasl.username"], found["sasl.password"]) == ("me", "hush-4711")
    assert not any(name.startswith(("ssl.", "enable.ssl")) for name in found)
    assert "hush-4711" not in repr(found)


def test_tls_is_told_to_librdkafka() -> None:
    found = common(*options("kafkas+confluent://k1"))
    assert (found["security.protocol"], found["ssl.endpoint.identification.algorithm"]) == ("SSL", "https")
    assert found["enable.ssl.certificate.verification"] is True
    found = common(*options("kafkas+confluent://k1", verify=False))
    assert (found["enable.ssl.certificate.verification"], found["ssl.endpoint.identification.algorithm"]) == (
        False,
        "none",
    )


def test_tls_settings_need_the_tls_scheme() -> None:
    with pytest.raises(ConfigError, match=r"use kafkas\+confluent://"):
        options("kafka+confluent://k1", verify=False)


@pytest.mark.parametrize(
    ("code", "ours"),
    [
        (KafkaError._UNKNOWN_TOPIC, NotFound),
        (KafkaError.UNKNOWN_TOPIC_OR_PART, NotFound),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, PermissionDenied),
        (KafkaError._MSG_TIMED_OUT, Timeout),
        (KafkaError._TRANSPORT, ConnectionLost),
        (KafkaError._FATAL, ConnectionLost),
    ],
)
def test_errors_have_one_table(code: int, ours: type[Exception]) -> None:
    error = errors.translate(translated(KafkaError(code), "topic-of-it"), "send", "Write")
    assert type(error) is ours
    assert ("topic-of-it" in str(error)) == (ours is PermissionDenied)


class Sending:
    """A librdkafka producer that takes what it is told to."""

    def __init__(self, *refusals: Exception | None) -> None:
        self.refusals, self.reports = list(refusals), list[Any]()

    def produce(self, topic: str, value: Any, key: Any, number: int, report: Any, **_: Any) -> None:
        if (refusal := self.refusals.pop(0)) is not None:
            raise refusal
        self.reports.append(report)


async def batch_of(*refusals: Exception | None) -> tuple[ConfluentBatch, list[Any], ConfluentProducer]:
    producer = ConfluentProducer(*options("kafka+confluent://k1"))
    await producer.client.close()
    producer.native = Sending(*refusals)
    producer.sent = producer.under_way.add  # type: ignore[method-assign,assignment]  # there is nothing to look at
    batch = ConfluentBatch(producer, TP)
    for i in range(len(refusals)):
        assert batch.append(i, None, b"x", [], 1)
    return batch, producer.native.reports, producer


async def test_each_message_of_a_batch_has_its_own_fate() -> None:
    too_large = KafkaException(KafkaError(KafkaError.MSG_SIZE_TOO_LARGE))
    batch, reports, _ = await batch_of(None, BufferError(), too_large, None, None)
    done = await batch.send()
    reports[2](None, None)
    reports[1](KafkaError(KafkaError._MSG_TIMED_OUT), None)
    assert not done.done()
    assert set(batch.indices) == {0}
    reports[0](None, None)
    assert done.done()
    assert {i: type(errors.translate(e, "send")).__name__ for i, e in batch.failed.items()} == {
        1: Throttled.__name__,
        2: "MessageTooLarge",
        3: "Timeout",
    }


async def test_a_batch_that_was_refused_whole_is_done() -> None:
    batch, _, _ = await batch_of(BufferError())
    assert (await batch.send()).done()


async def test_what_is_under_way_when_the_producer_closes_is_told() -> None:
    batch, reports, producer = await batch_of(None)
    done = await batch.send()
    producer.native = None  # nothing to purge
    await producer.close()
    with pytest.raises(kafka.ProducerClosed):
        done.result()
    reports[0](None, None)  # by librdkafka's end; too late to count
    assert set(batch.indices) == {0}


def message(offset: int, error: int | None = None, topic: str | None = "t") -> Any:
    values = {"topic": topic, "partition": 0, "offset": offset, "timestamp": (1, 5), "key": None, "value": b"x"}
    given = values | {"headers": None, "error": None if error is None else KafkaError(error)}
    return SimpleNamespace(**{name: lambda value=value: value for name, value in given.items()})


def consumer(group: str | None = "g") -> ConfluentConsumer:
    return ConfluentConsumer(*options("kafka+confluent://k1"), group)


def offsets(found: Any) -> list[int]:
    return [record.offset for record in found.get(TP, [])]


async def test_what_was_read_before_a_seek_is_dropped() -> None:
    made = consumer()
    assert offsets(made._records(0, [message(7), message(8)])) == [7, 8]
    made._seeks, made._since[TP] = 1, 1
    assert offsets(made._records(0, [message(9)])) == []
    assert offsets(made._records(1, [message(3), message(4)])) == [3, 4]  # back, too


async def test_what_is_read_again_after_a_pause_comes_once() -> None:
    made = consumer()
    assert offsets(made._records(0, [message(1), message(2)])) == [1, 2]
    assert offsets(made._records(0, [message(2), message(3)])) == [3]
    assert offsets(made._records(0, [message(3)])) == []


async def test_errors_among_messages() -> None:
    made = consumer()
    assert not made.forgets("t")
    found = made._records(0, [message(1), message(0, KafkaError.UNKNOWN_TOPIC_OR_PART), message(2)])
    made._records(0, [message(0, KafkaError.UNKNOWN_TOPIC_OR_PART)])
    assert offsets(found) == [1, 2]
    assert made.forgets("t")
    assert not made.forgets("t"), "asked once for each time it is said"
    made._records(0, [message(5, KafkaError._AUTO_OFFSET_RESET), message(0, KafkaError._TRANSPORT)])
    with pytest.raises(kafka.OffsetOutOfRangeError) as caught:
        await made.getmany()
    assert list(caught.value.args[0]) == [TP]


@pytest.mark.parametrize("group", ["g", None])
async def test_rights_on_a_group_matter_to_its_members(group: str | None) -> None:
    made = consumer(group)
    made._records(0, [message(0, KafkaError.GROUP_AUTHORIZATION_FAILED, topic=None)])
    assert len(made._failures) == (group is not None)


async def test_a_record_has_the_names_of_aiokafkas() -> None:
    (record,) = consumer()._records(0, [message(7)])[TP]
    assert (record.topic, record.partition, record.offset, record.timestamp) == ("t", 0, 7, 5)
    assert (record.key, record.value, list(record.headers)) == (None, b"x", [])


def fetched(*sizes: int, start: int = 0, spoilt: bool = False) -> Any:
    """What aiokafka makes of an answer with a batch of each of these sizes; the records are numbered on."""
    data, offset = bytearray(), 0
    for size in sizes:
        builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, 1 << 20)
        for n in range(size):
            builder.append(offset=n, timestamp=n, key=None, value=b"%d" % (offset + n), headers=[])
        batch = bytearray(builder.build())
        batch[:8] = offset.to_bytes(8, "big")
        data += batch
        offset += size
    data[-1] ^= spoilt
    return PartitionRecords(TP, MemoryRecords(bytes(data)), [], start, None, None, True, READ_COMMITTED)


def unpacked(records: Any) -> Any:
    held: Any = _Fetched()
    held[TP] = FetchResult(TP, assignment=None, partition_records=records, backoff=0)
    return held[TP]._partition_records


@pytest.mark.parametrize("start", [0, 3, 9])
def test_records_are_those_that_the_library_makes_and_it_goes_on_where_it_would(start: int) -> None:
    theirs, ours = fetched(4, 1, 5, start=start), unpacked(fetched(4, 1, 5, start=start))
    for theirs_one, ours_one in zip(theirs, ours, strict=True):
        assert [getattr(theirs_one, name) for name in Record._fields[:-1]] == list(ours_one)[:-1]
        assert theirs.next_fetch_offset == ours.next_fetch_offset == ours_one.offset + 1
    assert theirs.next_fetch_offset == ours.next_fetch_offset == 10


def test_it_goes_on_behind_a_batch_of_which_nothing_is_left() -> None:
    """As compaction leaves it, and the marker of a transaction's end."""
    ours = unpacked(fetched(3, 2))
    with patch.object(type(ours), "_withheld", lambda self, batch: batch.base_offset == 3):
        assert [record.offset for record in ours] == [0, 1, 2]
    assert ours.next_fetch_offset == 5


def test_a_spoilt_batch_is_not_handed_out() -> None:
    ours = unpacked(fetched(2, 2, spoilt=True))
    assert [next(iter(ours)).offset, next(iter(ours)).offset] == [0, 1]
    with pytest.raises(CorruptRecordException, match="t/0: invalid CRC"):
        next(iter(ours))
