"""Leases on the brokers that have them: how many requests it takes to keep what is held, waiting and running alike."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import pytest

from unibus import Bus, Delivery, Queue
from unibus_contracts import supply
from unibus_contracts.kit import FACTOR, until
from unibus_redis import scripts
from unibus_redis.subscription import RedisSubscription
from unibus_sqs.link import Link

HELD = 25


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Of each broker, how many messages each request to extend was about."""
    seen: dict[str, list[int]] = {"redis": [], "sqs": []}
    script, batch = RedisSubscription._script, Link.batch

    async def counted_script(self: Any, script_: Any, keys: Any, arguments: Any, doing: str) -> Any:
        if script_ is scripts.HOLD:
            seen["redis"].append(len(arguments) - 2)
        return await script(self, script_, keys, arguments, doing)

    async def counted_batch(self: Any, operation: Any, doing: str, name: str, entries: Any, **more: Any) -> Any:
        if all(entry.get("VisibilityTimeout") for entry in entries):
            seen["sqs"].append(len(entries))
        return await batch(self, operation, doing, name, entries, **more)

    monkeypatch.setattr(RedisSubscription, "_script", counted_script)
    monkeypatch.setattr(Link, "batch", counted_batch)
    return seen


@pytest.mark.parametrize(("kind", "each"), [("redis", [25]), ("sqs", [10, 10, 5])])
async def test_one_heartbeat_for_all_that_is_held(requests: dict[str, list[int]], kind: str, each: list[int]) -> None:
    url = supply.running([kind])[0].url
    bus = Bus(url, service="svc", prefix=f"it-{secrets.token_hex(4)}.", config=False, environ={})
    queue: Queue[str] = Queue("work", str)
    gate, seen = asyncio.Event(), list[tuple[str, int | None]]()

    @bus.consumer(queue, concurrency=2, prefetch=HELD)
    async def handle(body: str, delivery: Delivery[str]) -> None:
        await gate.wait()
        seen.append((body, delivery.deliveries))

    async with bus.running():
        await bus.send_many(queue, [f"{n}" for n in range(HELD)])
        (intake,) = bus._opened().intakes
        await until(lambda: len(intake.holding) == HELD, "all are held", 30 * FACTOR)
        first = min(delivery.lease_until or 0.0 for delivery in intake.holding)
        found, heartbeat = requests[kind], intake._heartbeat
        assert heartbeat is not None
        found.clear()
        heartbeat._beat = lambda: None  # type: ignore[method-assign] # from here on by hand
        for delivery in intake.holding:
            delivery.lease_until = 0.0
        type(heartbeat)._beat(heartbeat)
        await until(
            lambda: all((d.lease_until or 0.0) > first for d in intake.holding), "all are extended", 30 * FACTOR
        )
        assert sorted(found) == sorted(each)
        gate.set()
        await until(lambda: len(seen) == HELD, "all are handled", 30 * FACTOR)
    assert {count for _, count in seen} == {1}, "one came twice"
