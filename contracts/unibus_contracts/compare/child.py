"""The consumer that is killed: `python -m unibus_contracts.compare.child`. What it needs comes as a line of JSON on stdin, a password
among it, so no argument holds it. It prints what it has, and waits for its end.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from unibus import Bus, NotFound, Queue, RetryPolicy
from unibus.adapter import Results, Source, Subscription, Url
from unibus.url import parse

from .lab import take
from .targets import Target


def order(target: Target, prefix: str, queue: str, **what: float) -> bytes:
    """The line that the child reads. `what`: `ack` so many and `hold` so many more, or fail and die, with a retry after `backoff`."""
    place = {"url": target.text(), "settings": dict(target.settings), "prefix": prefix, "queue": queue}
    return json.dumps({**place, **what}).encode() + b"\n"


def once_after(backoff: float) -> RetryPolicy:
    return RetryPolicy(max_retries=1, backoff=backoff, multiplier=1)


async def main(told: dict[str, Any]) -> None:
    url: Url = parse(told["url"])
    target = Target("", url, told["settings"])
    queue: Queue[bytes] = Queue(told["queue"], bytes)
    bus = target.bus(channels=[queue], prefix=told["prefix"], declare="assume")
    try:
        await (
            _fail(bus, queue, told["backoff"]) if "backoff" in told else _hold(bus, queue, told["ack"], told["hold"])
        )
    except* NotFound as errors:
        print(json.dumps({"error": str(errors.exceptions[0])}), flush=True)


async def _hold(bus: Bus, queue: Queue[bytes], ack: int, hold: int) -> None:
    async with bus, bus.receiver(queue, prefetch=ack + hold) as receiver:
        taken = await take(receiver, ack + hold)
        for delivery in taken[:ack]:
            await delivery.ack()
        names = [delivery.body.decode() for delivery in taken]
        print(json.dumps({"acked": names[:ack], "held": names[ack:]}), flush=True)
        await asyncio.to_thread(sys.stdin.read)  # its parent has gone, where this ever returns


async def _fail(bus: Bus, queue: Queue[bytes], backoff: float) -> None:
    """Die as soon as the copy is there: the adapter's own functions are wrapped."""

    @bus.consumer(queue, retry=once_after(backoff))
    async def handle(body: bytes) -> None:
        raise ValueError("on purpose")

    async with bus:
        await bus.backlog(queue)  # NotFound, where this process can't have it
        adapter: Any = bus.adapter
        adapter.send, subscribe = _and_die(adapter.send), adapter.subscribe

        async def wrapped(source: Source) -> Subscription:
            subscription: Any = await subscribe(source)
            subscription.move = _and_die(subscription.move)
            return subscription  # type: ignore[no-any-return]  # any adapter's

        adapter.subscribe = wrapped
        async with bus.running():
            await asyncio.to_thread(sys.stdin.read)  # as above


def _and_die(function: Callable[..., Awaitable[Results]]) -> Callable[..., Awaitable[Results]]:
    """Of an adapter: the function, and the end of this process once it has done its work."""

    async def wrapped(work: Any, timeout: float) -> Results:
        results = await function(work, timeout)
        if None in results:
            print(json.dumps({"copied": True}), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return results

    return wrapped


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.stdin.readline())))
