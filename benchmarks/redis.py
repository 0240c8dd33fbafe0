"""Redis Streams: unibus beside redis-py at its best with the same guarantee: pipelines of XADD, many ids in one XACK and XDEL."""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

from redis.asyncio import Redis

from benchmarks import backlog
from benchmarks.cases import Case
from benchmarks.flows import Contestant, Declared, Flow, Plan, Unibus, measure
from benchmarks.load import BODY, IN_FLIGHT, Handled
from benchmarks.watch import Profiles, Watch

BASE = "redis-py"
FLOWS = (Flow(500), Flow(20, sends=False))
_MANY = 500  # entries a read
_GROUP = "unibus"


class RedisPy:
    """redis-py with hiredis. The fields that unibus writes; all of them are read."""

    name = BASE

    def __init__(self, url: str) -> None:
        self._url = url
        self._ids = map(f"{secrets.token_hex(8)}-%x".__mod__, itertools.count(1))

    async def __aenter__(self) -> Self:
        self._redis: Any = Redis.from_url(self._url)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._redis.aclose()

    def _fields(self, headers: Mapping[str, str] | None) -> dict[str, Any]:
        own = {"x-message-id": next(self._ids), "x-content-type": "application/octet-stream", **(headers or {})}
        return {"body": BODY, "headers": json.dumps(own, separators=(",", ":"))}

    async def send(self, queue: str, messages: int, headers: Mapping[str, str] | None, watch: Watch) -> None:
        watch.start()
        for at in range(0, messages, IN_FLIGHT):
            async with self._redis.pipeline(transaction=False) as pipe:
                for _ in range(min(IN_FLIGHT, messages - at)):
                    pipe.xadd(queue, self._fields(headers))
                await pipe.execute()
        watch.stop()

    async def consume(self, queue: str, messages: int, prefetch: int, watch: Watch) -> int:
        handled = Handled(messages)
        watch.start()
        while not handled.all.is_set():
            ids = []
            found = await self._redis.xreadgroup(_GROUP, "bench", {queue: ">"}, count=min(_MANY, prefetch), block=1000)
            for entry_id, fields in found[0][1] if found else ():
                ids.append(entry_id)
                own = json.loads(fields[b"headers"])
                at = int(entry_id.partition(b"-")[0]) / 1000
                handled.handle(fields[b"body"], own.pop("x-message-id"), own.pop("x-content-type"), at, own)
                handled.settled()
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.xack(queue, _GROUP, *ids)
                pipe.xdel(queue, *ids)
                await pipe.execute()
        watch.stop()
        return handled.count


async def run(url: str, plan: Plan, profiles: Profiles) -> tuple[list[Case], str]:
    """The cases, and the broker's version."""
    redis: Any = Redis.from_url(url)

    async def delete(queue: str) -> None:
        if keys := [key async for key in redis.scan_iter(f"*{queue}*")]:
            await redis.delete(*keys)

    async with redis:
        found: list[Case] = []
        contestants: list[Contestant] = [Unibus(url)] if profiles else [Unibus(url), RedisPy(url)]
        stage = Declared(url, delete)
        if plan.backlog:
            found.append(await backlog.measure("Redis", url, stage, plan.backlog))
            plan = replace(plan, flows=0)
        for flow in FLOWS[: 1 if profiles else plan.flows]:
            found += await measure("Redis", stage, contestants, flow, plan, profiles)
    return found, await stage.version()
