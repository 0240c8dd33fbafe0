"""Redis Streams: unibus beside redis-py at its best with the same guarantee: pipelines of XADD, many ids in one XACK and XDEL."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from typing import Any, Self

from redis.asyncio import Redis

from benchmarks.flows import Contestant, Flow, Raw
from benchmarks.load import Handled, busy, round_trips
from benchmarks.watch import Watch

BASE = "redis-py"
PREFETCH = 500  # and entries a read
_GROUP = "unibus"


class RedisPy(Raw):
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

    def _fields(self, flow: Flow) -> dict[str, Any]:
        own = {"x-message-id": next(self._ids), "x-content-type": "application/octet-stream", **dict(flow.headers)}
        return {"body": flow.body, "headers": json.dumps(own, separators=(",", ":"))}

    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        watch.start()
        for at in range(0, messages, flow.in_flight):
            async with self._redis.pipeline(transaction=False) as pipe:
                for _ in range(min(flow.in_flight, messages - at)):
                    pipe.xadd(queue, self._fields(flow))
                await pipe.execute()
        watch.stop()

    async def consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int:
        handled = Handled(messages, watch)
        watch.start()
        while not handled.all.is_set():
            ids = []
            found = await self._redis.xreadgroup(
                _GROUP, "bench", {queue: ">"}, count=flow.prefetch or PREFETCH, block=1000
            )
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

    async def requests(self, queue: str, count: int, watch: Watch) -> list[float]:
        """Request added and read by a group, answered to a stream of the requester's, read there; the request acked and deleted."""
        inbox = f"{queue}-replies"
        waiting: dict[str, asyncio.Future[bytes]] = {}
        over = False  # a blocking read of redis-py does not end when its task is cancelled

        async def answer() -> None:
            while not over:
                found = await self._redis.xreadgroup(_GROUP, "bench", {queue: ">"}, count=10, block=1000)
                for entry_id, fields in found[0][1] if found else ():
                    await self._redis.xadd(inbox, fields)
                    async with self._redis.pipeline(transaction=True) as pipe:
                        pipe.xack(queue, _GROUP, entry_id)
                        pipe.xdel(queue, entry_id)
                        await pipe.execute()

        async def answered() -> None:
            last = b"0"
            while not over:
                found = await self._redis.xread({inbox: last}, count=10, block=1000)
                for entry_id, fields in found[0][1] if found else ():
                    last = entry_id
                    waiting.pop(json.loads(fields[b"headers"])["x-message-id"]).set_result(fields[b"body"])

        async def ask() -> None:
            fields = self._fields(Flow())
            future = asyncio.get_running_loop().create_future()
            waiting[json.loads(fields["headers"])["x-message-id"]] = future
            await self._redis.xadd(queue, fields)
            await future

        async with busy(answer(), answered()):
            times = await round_trips(ask, count, watch)
            over = True
        await self._redis.delete(inbox)
        return times


def contestants(url: str) -> list[Contestant]:
    return [RedisPy(url)]
