"""`unibus run --workers`: what 1, 2 and 4 processes handle, each message with about a quarter of a millisecond of computing."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks import children
from benchmarks.cases import Case
from benchmarks.flows import Plan, Stage, rotated
from benchmarks.load import BODY, STEP, Miscount, flood
from unibus import Bus, Queue

COUNTS = (1, 2, 4)
_PARTITIONS = {"UNIBUS_KAFKA__PARTITIONS": str(max(COUNTS))}  # or the workers beyond the first would have nothing to do
_MESSAGES = 4_000
_OF_A_GROUP = 30_000  # it takes seconds until all have joined, and the first ones are at work meanwhile
_LONGEST = 120.0
_ROUNDS = 3


async def measure(kind: str, broker: str, url: str, stage: Stage, plan: Plan) -> list[Case]:
    case = Case(f"{broker}: unibus run --workers", _name(1))
    messages = min(plan.messages, _OF_A_GROUP if kind == "kafka" else _MESSAGES)
    for number in range(min(_ROUNDS, plan.rounds)):
        for count in rotated(COUNTS, number):
            case.add(_name(count), {"messages/s": await _once(kind, url, stage, count, messages)})
    case.samples = {_name(count): case.samples[_name(count)] for count in COUNTS}
    return [case]


def together(notes: Sequence[Sequence[float]]) -> float:
    """Handlings a second while all processes were at work: they don't begin at the same moment, nor end so.

    `notes`: for each process when it had handled another `STEP`. Raises Miscount where there was no such time.
    """
    begun, ended = max(own[0] for own in notes), min(own[-1] for own in notes)
    if ended <= begun:
        raise Miscount("the workers were never at work at the same time: more messages are needed")
    steps = sum(bisect_right(own, ended) - bisect_left(own, begun) - 1 for own in notes)
    return steps * STEP / (ended - begun)


def _notes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="ascii")) for path in folder.iterdir()]


def _name(count: int) -> str:
    return f"{count} worker" + "s" * (count > 1)


async def _once(kind: str, url: str, stage: Stage, count: int, messages: int) -> float:
    name = stage.name()
    orders = Queue(name, bytes)
    environ = _PARTITIONS if kind == "kafka" else {}
    async with stage.made(name):
        async with Bus(url, channels=[orders], service="bench", config=False, environ=environ) as bus:
            await flood(partial(bus.send, orders, BODY), messages)
            with tempfile.TemporaryDirectory() as folder:
                await _handled(url, name, count, folder, bus)
                found = _notes(Path(folder))
        handled = sum(own["handled"] for own in found)
        if handled != messages:
            raise Miscount(f"{count} workers: {messages} were in the queue, {handled} handled")
        notes = [own["notes"] for own in found if len(own["notes"]) > 1]
        if len(notes) != count:
            raise Miscount(f"{count} workers, but {len(notes)} had anything to do: more messages are needed")
        return together(notes)


async def _handled(url: str, queue: str, count: int, folder: str, bus: Bus) -> None:
    """Until the queue is empty and the processes have drained."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "unibus", "run", "benchmarks.served:bus", "--workers", str(count)),
        *("--log-level", "error"),
        stdin=DEVNULL,
        stdout=DEVNULL,
        stderr=PIPE,
        cwd=children.ROOT,
        env=children.environment({"BENCH_URL": url, "BENCH_QUEUE": queue, "BENCH_NOTES": folder}),
    )
    ended = asyncio.ensure_future(process.communicate())
    try:
        await _empty(bus, queue, ended)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(_LONGEST):
            _, error = await asyncio.shield(ended)
        if process.returncode:
            raise Miscount(f"unibus run ended with {process.returncode}: {error.decode()[-1000:]}")
    finally:
        await _gone(process, ended)


async def _empty(bus: Bus, queue: str, ended: asyncio.Future[Any]) -> None:
    deadline = monotonic() + _LONGEST
    while not ended.done():
        left = await bus.backlog(queue)
        if not left.ready + (left.in_flight or 0):
            return
        if monotonic() > deadline:
            raise Miscount(f"the workers have left {left.ready} messages after {_LONGEST:.0f} s")
        await asyncio.sleep(0.1)
    raise Miscount(f"unibus run has ended by itself: {ended.result()[1].decode()[-1000:]}")


async def _gone(process: Process, ended: asyncio.Future[Any]) -> None:
    if process.returncode is None:
        process.kill()  # its workers find their stdin closed
    await ended
