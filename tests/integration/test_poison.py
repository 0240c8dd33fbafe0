"""A message that kills its process each time, by SIGKILL: it ends as a dead letter, and what was held beside it is handled."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
from typing import Any

import pytest
from tests.integration.lives import POISON, QUEUE, bus_at

from unibus import Bus, deadletter
from unibus.message import DLQ_REASON
from unibus.retry import CRASH_LOOP
from unibus_contracts import supply

# A dead process' messages are free when the broker notices: at once, or after what is made short here.
SHORT = {"rabbitmq": "", "kafka": "session_timeout=1&heartbeat=0.2", "redis": "lease=1", "sqs": "lease=3"}
INNOCENT = [f"{n}" for n in range(15)]
MOST = (
    4 + 3 + 1 + 1
)  # deaths until it is a suspect (Kafka sees the first only by the second life), alone; who buries it
DEADLINE = 240.0


@pytest.mark.timeout(300)
async def test_a_message_that_kills_its_process_dies_alone() -> None:
    """On all four side by side: most of the time is waiting until what a dead process held is free again."""
    async with asyncio.TaskGroup() as brokers:
        for kind in SHORT:
            brokers.create_task(poisoned(kind), name=kind)


async def poisoned(kind: str) -> None:
    url = supply.running([kind])[0].url
    url += f"{'&' if '?' in url else '?'}{SHORT[kind]}" if SHORT[kind] else ""
    prefix = f"it-{secrets.token_hex(4)}."
    async with bus_at(url, prefix) as bus:
        await bus.send_many(QUEUE, [*INNOCENT[:5], POISON, *INNOCENT[5:]])
        told = await told_by_lives(url, prefix, bus)
        ends = [line["ended"] for line in told if "ended" in line]
        assert set(ends[:-1]) == {-signal.SIGKILL}, kind
        assert ends[-1] == 0, kind
        assert len(ends) <= MOST, f"{kind}: {len(ends)} lives"
        (letter,) = [letter async for letter in deadletter.browse(bus, QUEUE)]
        assert (letter.body, letter.message.headers[DLQ_REASON]) == (POISON, CRASH_LOOP), kind
        backlog = await bus.backlog(QUEUE)
        assert (backlog.ready, backlog.in_flight or 0) == (0, 0), kind


async def buried(bus: Bus) -> None:
    """Until there is a dead letter."""
    while not [letter async for letter in deadletter.browse(bus, QUEUE)]:
        pass


async def told_by_lives(url: str, prefix: str, bus: Bus) -> list[dict[str, Any]]:
    """What they tell, until all innocents are handled and there is a dead letter; then they end in order."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.lives", "dies", prefix),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    told: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(DEADLINE):
            process.stdin.write(url.encode() + b"\n")
            missing = set(INNOCENT)
            while missing:
                told.append(line := json.loads(await process.stdout.readline()))
                missing.discard(line.get("handled"))
            await buried(bus)
            os.killpg(process.pid, signal.SIGTERM)
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return told + [json.loads(line) for line in output.splitlines()]
