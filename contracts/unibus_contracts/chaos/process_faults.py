"""Faults of consumers as processes: killed at a chosen point, blocked, with a wrong clock; and what is no fault at all."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from unibus_contracts.chaos.stage import Fault, NoBite, Stage, reaches
from unibus_contracts.chaos.traps import Point, order_file, report_file, write
from unibus_contracts.chaos.workers import Worker

_OBEYED = 60.0  # seconds until a worker has read its order, on a busy machine
_DIES = 30.0  # seconds beyond the fault's own until a worker came by its point

# Seconds that a loop stands still: longer than the lease, the session or the heartbeats that the extra consumer is given.
_SHORT = {"redis": "lease=4", "sqs": "lease=4", "kafka": "session_timeout=4", "rabbitmq": "heartbeat=2"}
_BLOCK = 10.0
_JUMP = 3600.0


async def order(stage: Stage, worker: Worker, **what: Any) -> int:
    """Have the worker know it; the number of the order."""
    number = next(stage.numbers)
    write(order_file(worker.folder, worker.name), {"number": number, **what})
    with suppress(ProcessLookupError):  # it has died by the order before
        os.kill(worker.pid, signal.SIGUSR1)
    return number


def report(worker: Worker) -> dict[str, Any]:
    """The worker's last one."""
    try:
        return dict(json.loads(report_file(worker.folder, worker.name).read_text()))
    except FileNotFoundError:
        return {}


async def obeyed(worker: Worker, number: int) -> dict[str, Any]:
    """The report on this order. Raises NoBite without one."""
    found: dict[str, Any] = {}

    def there() -> bool:
        nonlocal found
        found = report(worker)
        return found.get("order") == number

    if not await reaches(there, _OBEYED):
        raise NoBite(f"{worker.name} did not report within {_OBEYED:.0f} s")
    return found


def _killed_at(point: Point) -> Fault:
    @asynccontextmanager
    async def fault(stage: Stage) -> AsyncIterator[None]:
        # Both are told: which of them comes by the point first is the broker's doing.
        victims = {victim: await order(stage, victim, die=point) for victim in stage.consumers}
        yield
        await reaches(lambda: any(_died(victim, point) for victim in victims), _DIES)
        told = []
        for victim in victims:
            if not _died(victim, point):
                number = await order(stage, victim)  # no more; unless it gets there before it has heard
                await reaches(lambda v=victim, n=number: _died(v, point) or report(v).get("order") == n, _OBEYED)  # type: ignore[misc]  # mypy knows no lambda with defaults
            if _died(victim, point):
                if (status := await victim.process.wait()) != -signal.SIGKILL:
                    raise NoBite(f"{victim.name} had ended by itself, with status {status}")
                told.append(f"{victim.name} was killed when it had {point} messages of {report(victim)['where']}")
                await victim.start()
        if not told:
            raise NoBite(f"no consumer that had {point} anything")
        stage.proof = "; ".join(told)

    return fault


def _died(worker: Worker, point: Point) -> bool:
    return report(worker).get("died") == point


consumer_killed_received = _killed_at("received")
consumer_killed_handled = _killed_at("handled")
consumer_killed_copied = _killed_at("copied")


@asynccontextmanager
async def loop_blocked(stage: Stage) -> AsyncIterator[None]:
    """The event loop of a consumer stands still for longer than its lease: others get its messages, and then it goes on.

    An extra consumer, with a lease so short that a run has the time for it.
    """
    async with extra(stage, _SHORT.get(stage.broker.name.partition("-")[0], "")) as victim:
        await obeyed(victim, await order(stage, victim, block=_BLOCK))
        yield
        await reaches(lambda: "lag" in report(victim), _BLOCK + _OBEYED)
        lag, held = report(victim).get("lag", 0.0), report(victim).get("held", 0)
        if lag < _BLOCK - 1:
            raise NoBite(f"the loop of {victim.name} was late by {lag:.2f} s only")
        stage.proof = f"the loop of {victim.name} stood still for {lag:.1f} s when it had received {held} messages"


def _wrong_clock(offset: float) -> Fault:
    @asynccontextmanager
    async def fault(stage: Stage) -> AsyncIterator[None]:
        victim = stage.random.choice(stage.consumers)
        off = (await obeyed(victim, await order(stage, victim, offset=offset)))["offset"]
        try:
            yield
        finally:
            await obeyed(victim, await order(stage, victim))
        if abs(off - offset) > 1:
            raise NoBite(f"the clock of {victim.name} was off by {off:.1f} s, not by {offset:.0f}")
        stage.proof = f"the clock of {victim.name} was {abs(off):.0f} s {'fast' if off > 0 else 'slow'}"

    return fault


clock_fast = _wrong_clock(_JUMP)
clock_slow = _wrong_clock(-_JUMP)


@asynccontextmanager
async def rolling_restart(stage: Stage) -> AsyncIterator[None]:
    """No fault: each consumer is ended by SIGTERM while messages flow, and replaced, one after the other."""
    ended = []
    yield
    for worker in stage.consumers:
        name, status = worker.name, await worker.end()
        await worker.start()
        if status:
            raise RuntimeError(f"{name} ended with status {status} after SIGTERM")
        ended.append(name)
    stage.proof = f"{', '.join(ended)} ended by SIGTERM and were replaced"


@asynccontextmanager
async def scaled(stage: Stage) -> AsyncIterator[None]:
    """No fault: one more consumer comes, works, and leaves by SIGTERM."""
    async with extra(stage) as one:
        yield
        if status := await one.end():
            raise RuntimeError(f"{one.name} ended with status {status} after SIGTERM")
    stage.proof = f"{one.name} came and left"


@asynccontextmanager
async def extra(stage: Stage, setting: str = "") -> AsyncIterator[Worker]:
    """One more consumer, killed at the end if it is still there. `setting`: for its URL."""
    worker = stage.consumers[0].another(f"extra{next(stage.numbers)}", setting)
    try:
        await worker.start()
        yield worker
    finally:
        await worker.kill()


FAULTS: Mapping[str, Fault] = {
    "consumer-killed-received": consumer_killed_received,
    "consumer-killed-handled": consumer_killed_handled,
    "consumer-killed-copied": consumer_killed_copied,
    "loop-blocked": loop_blocked,
    "clock-fast": clock_fast,
    "clock-slow": clock_slow,
    "rolling-restart": rolling_restart,
    "scaled": scaled,
}
