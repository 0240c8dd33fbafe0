"""SQS: unibus beside aiobotocore at its best with the same guarantee: batches of ten, ten of them in flight, eight pollers."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from benchmarks import backlog
from benchmarks.cases import Case
from benchmarks.flows import Contestant, Declared, Flow, Plan, Unibus, measure
from benchmarks.load import BODY, Handled, Miscount
from benchmarks.watch import Profiles, Watch
from unibus.url import parse

BASE = "aiobotocore"
FLOWS = (Flow(80),)
_BATCH, _IN_FLIGHT, _POLLERS = 10, 10, 8
_TEXT = BODY.decode()


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


class AioBotocore:
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

    def _entry(self, number: int, headers: Mapping[str, str] | None) -> dict[str, Any]:
        own = {"x-message-id": next(self._ids), "x-content-type": "application/octet-stream", **(headers or {})}
        attribute = {"DataType": "String", "StringValue": json.dumps(own, separators=(",", ":"))}
        return {"Id": str(number), "MessageBody": _TEXT, "MessageAttributes": {"unibus": attribute}}

    async def send(self, queue: str, messages: int, headers: Mapping[str, str] | None, watch: Watch) -> None:
        url = (await self._sqs.get_queue_url(QueueName=queue))["QueueUrl"]
        batches = iter(range(0, messages, _BATCH))

        async def work() -> None:
            for at in batches:
                entries = [self._entry(n, headers) for n in range(min(_BATCH, messages - at))]
                answer = await self._sqs.send_message_batch(QueueUrl=url, Entries=entries)
                if answer.get("Failed"):
                    raise Miscount(f"{queue}: {answer['Failed']}")

        watch.start()
        await asyncio.gather(*[work() for _ in range(_IN_FLIGHT)])
        watch.stop()

    async def consume(self, queue: str, messages: int, prefetch: int, watch: Watch) -> int:
        url = (await self._sqs.get_queue_url(QueueName=queue))["QueueUrl"]
        handled = Handled(messages)

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
        pollers = [asyncio.create_task(poll()) for _ in range(_POLLERS)]
        await handled.all.wait()
        watch.stop()
        for poller in pollers:
            poller.cancel()
            with suppress(asyncio.CancelledError):
                await poller
        return handled.count


async def run(url: str, plan: Plan, profiles: Profiles) -> tuple[list[Case], str]:
    """The cases, and the service: an emulator, unless the URL names none."""
    async with client(url) as sqs:

        async def delete(queue: str) -> None:
            for found in (await sqs.list_queues(QueueNamePrefix=queue)).get("QueueUrls", ()):
                await sqs.delete_queue(QueueUrl=found)

        found: list[Case] = []
        contestants: list[Contestant] = [Unibus(url)] if profiles else [Unibus(url), AioBotocore(url)]
        stage = Declared(url, delete)
        if plan.backlog:
            found.append(await backlog.measure("SQS", url, stage, plan.backlog))
            plan = replace(plan, flows=0)
        for flow in FLOWS[: 1 if profiles else plan.flows]:
            found += await measure("SQS", stage, contestants, flow, plan, profiles)
    return found, "ministack, an emulator" if "endpoint_url" in parse(url).query else "of AWS"
