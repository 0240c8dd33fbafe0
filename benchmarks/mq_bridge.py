"""mq-bridge as a contestant: its Rust core, in batches that the caller makes; confirmed, and committed after the batch was handled."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

from mq_bridge import Consumer, Message, Publisher

from benchmarks.flows import Flow, Raw
from benchmarks.kafka import options
from benchmarks.load import Handled
from benchmarks.watch import Watch
from unibus.url import parse

MQ_BRIDGE = "mq-bridge, batches"
_MANY = 500
_PATIENCE = 30  # polls of a second without anything, until what is missing is taken for lost
_GROUP = "unibus"  # the group that Declared has made on the stream
_OWN = {"content-type": "application/octet-stream"}


class MqBridge(Raw):
    """mq-bridge on one broker. `endpoint`: its configuration of a queue there, to publish or to consume."""

    name = MQ_BRIDGE

    def __init__(self, url: str) -> None:
        self._url = url
        scheme = urlsplit(url).scheme
        self._endpoint = {"amqp": _amqp, "kafka": _kafka, "redis": _redis, "sqs": _sqs}[scheme]
        self.leaves = scheme == "redis"
        self.declares = scheme == "amqp"  # a classic queue: its consumer declares it, and takes no other

    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        await asyncio.to_thread(self._send, queue, messages, flow, watch)

    def _send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        metadata, many = {**_OWN, **dict(flow.headers)}, min(_MANY, flow.in_flight)
        publisher = Publisher.from_config(self._endpoint(self._url, queue, publishes=True))
        watch.start()
        for at in range(0, messages, many):
            publisher.send_batch([Message(flow.body, metadata) for _ in range(min(many, messages - at))])
        watch.stop()

    async def consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int:
        return await asyncio.to_thread(self._consume, queue, messages, watch)

    def _consume(self, queue: str, messages: int, watch: Watch) -> int:
        count = 0
        handled = Handled(messages, watch)
        watch.start()
        with Consumer.from_config(self._endpoint(self._url, queue, publishes=False)) as consumer:
            empty = 0
            while count < messages and empty < _PATIENCE:
                found = consumer.poll(_MANY, timeout_ms=1000)
                empty = 0 if found else empty + 1
                for message in found:
                    handled.handle(message.payload, message.id, None, None, message.metadata)
                    count += 1
                if found:
                    consumer.commit()
            watch.stop()
        return count


def _amqp(url: str, queue: str, *, publishes: bool) -> dict[str, Any]:
    parts = urlsplit(url)
    default = parts.path in {"", "/"}  # to its client, an empty virtual host
    own: dict[str, Any] = {"url": parts._replace(path="/%2f").geturl() if default else url, "queue": queue}
    return {"amqp": own if publishes else {**own, "prefetch_count": _MANY}}


def _kafka(url: str, queue: str, *, publishes: bool) -> dict[str, Any]:
    found = options(url)
    more = []
    if "sasl_mechanism" in found:
        more = [["security.protocol", found["security_protocol"]], ["sasl.mechanism", found["sasl_mechanism"]]]
    own: dict[str, Any] = {"url": ",".join(found["bootstrap_servers"]), "topic": queue}
    if "sasl_plain_username" in found:
        own |= {"username": found["sasl_plain_username"], "password": found["sasl_plain_password"]}
    if publishes:
        durable = [["acks", "all"], ["enable.idempotence", "true"]]
        return {"kafka": {**own, "create_topic": False, "producer_options": [*more, *durable]}}
    return {"kafka": {**own, "group_id": queue, "consumer_options": [*more, ["auto.offset.reset", "earliest"]]}}


def _redis(url: str, queue: str, *, publishes: bool) -> dict[str, Any]:
    own: dict[str, Any] = {"url": url, "stream": queue}
    return {"redis_streams": own if publishes else {**own, "group": _GROUP, "consumer_name": "bench"}}


def _sqs(url: str, queue: str, *, publishes: bool) -> dict[str, Any]:  # noqa: ARG001  # the same for both
    found = parse(url)
    endpoint = found.query["endpoint_url"]
    own = {
        "queue_url": f"{endpoint}/000000000000/{queue}",
        "region": found.hosts[0][0],
        "endpoint_url": endpoint,
        "access_key": found.username,
        "secret_key": found.password.value if found.password is not None else None,
        "max_messages": 10,
    }
    return {"aws": own}
