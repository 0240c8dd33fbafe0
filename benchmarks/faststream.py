"""FastStream as a contestant: what people would write with it, acked after the handler, durable, confirmed, its log off."""

from __future__ import annotations

from typing import Any

from faststream import AckPolicy
from faststream.kafka import KafkaBroker, KafkaMessage
from faststream.rabbit import Channel, RabbitBroker, RabbitMessage, RabbitQueue
from faststream.redis import RedisBroker, RedisStreamMessage, StreamSub
from faststream.security import SASLScram512

from benchmarks.flows import Flow, Raw
from benchmarks.kafka import options
from benchmarks.load import Handled, flood
from benchmarks.watch import Watch

FASTSTREAM = "FastStream"
_OCTETS = "application/octet-stream"  # else it guesses JSON, and decodes
_REDIS_IN_FLIGHT = 100  # each send takes a connection, and its pool has 100
_GROUP = "unibus"  # the group that Declared has made on the stream


class _FastStream(Raw):
    name = FASTSTREAM

    def __init__(self, url: str) -> None:
        self._url = url

    async def _consume(self, broker: Any, messages: int, subscriber: Any, kind: type, watch: Watch) -> int:
        handled = Handled(messages, watch)

        async def handle(body: bytes, message: Any) -> None:
            handled.handle(body, message.message_id, message.content_type, None, message.headers)
            handled.settled()

        handle.__annotations__["message"] = kind  # what FastStream hands over is told by the annotation
        subscriber(handle)
        watch.start()
        await broker.start()
        await handled.all.wait()
        watch.stop()
        await broker.stop()
        return handled.count


class Rabbit(_FastStream):
    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        async with RabbitBroker(self._url, logger=None) as broker:
            await broker.start()

            async def one() -> None:
                await broker.publish(
                    flow.body, queue, persist=True, mandatory=True, content_type=_OCTETS, headers=dict(flow.headers)
                )

            watch.start()
            await flood(one, messages, flow.in_flight)
            watch.stop()

    async def consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int:
        broker = RabbitBroker(self._url, logger=None)
        source = broker.subscriber(
            RabbitQueue(queue, declare=False),
            channel=Channel(prefetch_count=flow.prefetch or 200),
            ack_policy=AckPolicy.NACK_ON_ERROR,
        )
        return await self._consume(broker, messages, source, RabbitMessage, watch)


class Kafka(_FastStream):
    def _broker(self) -> KafkaBroker:
        found = options(self._url)
        security = None
        if "sasl_plain_username" in found:
            security = SASLScram512(found["sasl_plain_username"], found["sasl_plain_password"], use_ssl=False)
        return KafkaBroker(
            found["bootstrap_servers"], security=security, acks="all", enable_idempotence=True, logger=None
        )

    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        async with self._broker() as broker:
            await broker.start()

            async def one() -> None:
                await broker.publish(flow.body, queue, headers={"content-type": _OCTETS, **dict(flow.headers)})

            watch.start()
            await flood(one, messages, flow.in_flight)
            watch.stop()

    async def consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int:
        broker = self._broker()
        source = broker.subscriber(
            queue,
            group_id=queue,
            auto_offset_reset="earliest",
            ack_policy=AckPolicy.NACK_ON_ERROR,
            max_poll_records=flow.prefetch or 500,
        )
        return await self._consume(broker, messages, source, KafkaMessage, watch)


class Redis(_FastStream):
    leaves = True

    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        async with RedisBroker(self._url, logger=None) as broker:
            await broker.start()

            async def one() -> None:
                await broker.publish(flow.body, stream=queue, headers={"content-type": _OCTETS, **dict(flow.headers)})

            watch.start()
            await flood(one, messages, min(flow.in_flight, _REDIS_IN_FLIGHT))
            watch.stop()

    async def consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int:
        broker = RedisBroker(self._url, logger=None)
        source = broker.subscriber(
            stream=StreamSub(queue, group=_GROUP, consumer="bench", max_records=flow.prefetch or 500),
            ack_policy=AckPolicy.NACK_ON_ERROR,
        )
        return await self._consume(broker, messages, source, RedisStreamMessage, watch)
