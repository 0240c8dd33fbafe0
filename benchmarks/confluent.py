"""confluent-kafka as a contestant: librdkafka under Python, idempotent, batches read and committed as aiokafka's are."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from functools import partial
from time import time
from typing import Any

from confluent_kafka import Consumer, KafkaError, Message, Producer

from benchmarks.flows import Flow, Raw
from benchmarks.kafka import options
from benchmarks.load import Handled, Miscount, flood
from benchmarks.watch import Watch

CONFLUENT = "confluent-kafka"
_MANY = 500
_LONGEST = 60.0  # seconds that nobody needs


class Confluent(Raw):
    """Its own calls on a thread, without an event loop: the best one can do with it."""

    name = CONFLUENT

    def __init__(self, url: str) -> None:
        self._options = settings(options(url))
        self._ids = map(f"{secrets.token_hex(8)}-%x".__mod__, itertools.count(1))

    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        await asyncio.to_thread(self._send, queue, messages, flow, watch)

    def _send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        confirmed = 0

        def on_delivery(error: KafkaError | None, _: Message) -> None:
            nonlocal confirmed
            if error is not None:
                raise Miscount(f"{CONFLUENT}: {error.str()}")
            confirmed += 1

        producer = Producer({**self._options, "acks": "all", "enable.idempotence": True, "linger.ms": 1})
        kind, more = ("x-content-type", b"application/octet-stream"), [(n, v.encode()) for n, v in flow.headers]
        watch.start()
        for sent in range(messages):
            own: Any = [("x-message-id", next(self._ids).encode()), kind, *more]
            at = round(time() * 1000)
            producer.produce(queue, flow.body, headers=own, timestamp=at, on_delivery=on_delivery)
            while sent - confirmed >= flow.in_flight - 1:
                producer.poll(0.01)
        producer.flush(_LONGEST)
        watch.stop()
        if confirmed != messages:
            raise Miscount(f"{CONFLUENT}: {confirmed} of {messages} were confirmed")

    async def consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int:
        return await asyncio.to_thread(self._consume, queue, messages, watch)

    def _consume(self, queue: str, messages: int, watch: Watch) -> int:
        handled = Handled(messages, watch)
        own = {"group.id": queue, "enable.auto.commit": False, "auto.offset.reset": "earliest"}
        consumer = Consumer({**self._options, **own})
        consumer.subscribe([queue])
        watch.start()
        try:
            while handled.count < messages:
                for record in (found := consumer.consume(_MANY, timeout=1.0)):
                    if (error := record.error()) is not None:
                        raise Miscount(f"{CONFLUENT}: {error.str()}")
                    headers: Any = record.headers()
                    fields = {name: value.decode() for name, value in headers}
                    name, kind = fields.pop("x-message-id"), fields.pop("x-content-type")
                    handled.handle(record.value() or b"", name, kind, record.timestamp()[1], fields)
                if found:
                    consumer.commit(asynchronous=False)
            watch.stop()
        finally:
            consumer.close()
        return handled.count


class Futures(Confluent):
    """What is left where nothing is done for a message but to hand it to librdkafka, for a caller who awaits it."""

    name = f"{CONFLUENT}, a future each"
    only_sends = True

    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        loop = asyncio.get_running_loop()
        producer = Producer({**self._options, "acks": "all", "enable.idempotence": True, "linger.ms": 0})
        headers: Any = [("x-message-id", next(self._ids).encode()), ("x-content-type", b"application/octet-stream")]
        polling: asyncio.TimerHandle | None = None

        def poll() -> None:
            nonlocal polling
            producer.poll(0)
            polling = loop.call_later(0.001, poll) if len(producer) else None

        def told(confirmed: asyncio.Future[None], error: KafkaError | None, _: Message) -> None:
            if error is None:
                confirmed.set_result(None)
            else:
                confirmed.set_exception(Miscount(f"{self.name}: {error.str()}"))

        async def one() -> None:
            nonlocal polling
            confirmed: asyncio.Future[None] = loop.create_future()
            producer.produce(queue, flow.body, headers=headers, timestamp=1, on_delivery=partial(told, confirmed))
            if polling is None:
                polling = loop.call_later(0.001, poll)
            await confirmed

        watch.start()
        await flood(one, messages, flow.in_flight)
        watch.stop()


def settings(given: dict[str, Any]) -> dict[str, Any]:
    """The options of benchmarks.kafka in librdkafka's words; there is a password in it."""
    own: dict[str, Any] = {"bootstrap.servers": ",".join(given["bootstrap_servers"])}
    if "sasl_mechanism" in given:
        own |= {
            "security.protocol": given["security_protocol"],
            "sasl.mechanism": given["sasl_mechanism"],
            "sasl.username": given["sasl_plain_username"],
            "sasl.password": given["sasl_plain_password"],
        }
    return own
