"""SQS: unibus beside aiobotocore at its best with the same guarantee: batches of ten, ten of them in flight, eight pollers."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Self

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from benchmarks.flows import Contestant, Flow, Raw
from benchmarks.load import BODY, Handled, Miscount, busy, round_trips
from benchmarks.watch import Watch
from unibus.url import parse

BASE = "aiobotocore"
PREFETCH = 80
_BATCH, _IN_FLIGHT, _POLLERS = 10, 10, 8
_LARGEST = 250_000  # bytes of bodies in one batch


def client(url: str) -> Any:
    found = parse(url)
    password = found.password.value if found.password is not None else None
    return get_session().create_client(
        "sqs",
        region_name=found.hosts[0][0],
        endpoint_url=found.query.get("endpoint_url"),
        aws_access_key_id=found.username,
        aws_secret_access_key=password,
        config=AioConfig(retries={"total_max_attempts": 1}, max_pool_connections=50, parameter_validation=False),
    )


class AioBotocore(Raw):
    """aiobotocore. The attribute that unibus writes; it is read."""

    name = BASE

    def __init__(self, url: str) -> None:
        self._url = url
        self._ids = map(f"{secrets.token_hex(8)}-%x".__mod__, itertools.count(1))

    async def __aenter__(self) -> Self:
        self._client = client(self._url)
        self._sqs = await self._client.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.__aexit__(None, None, None)

    def _entry(self, number: int, text: str, flow: Flow) -> dict[str, Any]:
        own = {"x-message-id": next(self._ids), "x-content-type": "application/octet-stream", **dict(flow.headers)}
        attribute = {"DataType": "String", "StringValue": json.dumps(own, separators=(",", ":"))}
        return {"Id": str(number), "MessageBody": text, "MessageAttributes": {"unibus": attribute}}

    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        url = (await self._sqs.get_queue_url(QueueName=queue))["QueueUrl"]
        text = flow.body.decode()
        size = max(1, min(_BATCH, flow.in_flight, _LARGEST // len(text)))
        batches = iter(range(0, messages, size))

        async def work() -> None:
            for at in batches:
                entries = [self._entry(n, text, flow) for n in range(min(size, messages - at))]
                answer = await self._sqs.send_message_batch(QueueUrl=url, Entries=entries)
                if answer.get("Failed"):
                    raise Miscount(f"{queue}: {answer['Failed']}")

        watch.start()
        await asyncio.gather(*[work() for _ in range(min(_IN_FLIGHT, flow.in_flight))])
        watch.stop()

    async def consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int:
        url = (await self._sqs.get_queue_url(QueueName=queue))["QueueUrl"]
        handled = Handled(messages, watch)

        async def poll() -> None:
            while not handled.all.is_set():
                answer = await self._sqs.receive_message(
                    QueueUrl=url,
                    MaxNumberOfMessages=_BATCH,
                    WaitTimeSeconds=1,
                    MessageAttributeNames=["All"],
                    AttributeNames=["All"],
                )
                found = answer.get("Messages") or []
                for message in found:
                    own = json.loads(message["MessageAttributes"]["unibus"]["StringValue"])
                    at = int(message["Attributes"]["SentTimestamp"]) / 1000
                    body = message["Body"].encode()
                    handled.handle(body, own.pop("x-message-id"), own.pop("x-content-type"), at, own)
                if found:
                    entries = [{"Id": str(n), "ReceiptHandle": m["ReceiptHandle"]} for n, m in enumerate(found)]
                    await self._sqs.delete_message_batch(QueueUrl=url, Entries=entries)
                for _ in found:
                    handled.settled()

        watch.start()
        async with busy(*[poll() for _ in range(_POLLERS)]):
            await handled.all.wait()
            watch.stop()
        return handled.count

    async def requests(self, queue: str, count: int, watch: Watch) -> list[float]:
        """Request and answer each sent to a queue, polled from it and deleted."""
        url = (await self._sqs.get_queue_url(QueueName=queue))["QueueUrl"]
        inbox = (await self._sqs.create_queue(QueueName=f"{queue}-replies"))["QueueUrl"]
        waiting: dict[str, asyncio.Future[str]] = {}

        async def poll(source: str, handle: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
            while True:
                answer = await self._sqs.receive_message(
                    QueueUrl=source, MaxNumberOfMessages=_BATCH, WaitTimeSeconds=1, MessageAttributeNames=["All"]
                )
                for message in answer.get("Messages") or []:
                    await handle(message)
                    await self._sqs.delete_message(QueueUrl=source, ReceiptHandle=message["ReceiptHandle"])

        async def answer(message: dict[str, Any]) -> None:
            own = message["MessageAttributes"]
            await self._sqs.send_message(QueueUrl=inbox, MessageBody=message["Body"], MessageAttributes=own)

        async def answered(message: dict[str, Any]) -> None:
            own = json.loads(message["MessageAttributes"]["unibus"]["StringValue"])
            waiting.pop(own["x-message-id"]).set_result(message["Body"])

        async def ask() -> None:
            entry = self._entry(0, text, Flow())
            del entry["Id"]
            future = asyncio.get_running_loop().create_future()
            own = json.loads(entry["MessageAttributes"]["unibus"]["StringValue"])
            waiting[own["x-message-id"]] = future
            await self._sqs.send_message(QueueUrl=url, **entry)
            await future

        text = BODY.decode()
        async with busy(poll(url, answer), poll(inbox, answered)):
            times = await round_trips(ask, count, watch)
        await self._sqs.delete_queue(QueueUrl=inbox)
        return times


def contestants(url: str) -> list[Contestant]:
    return [AioBotocore(url)]
