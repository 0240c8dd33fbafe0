"""The faults: each does its worst for a while, heals, and says how it is known to have bitten; `NoBite` where it has not."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from unibus_contracts.chaos.proxy import Proxy
from unibus_contracts.chaos.workers import Worker
from unibus_contracts.supply import Broker

Hold = Callable[[float], Awaitable[None]]  # waits that long while the work goes on


class NoBite(Exception):
    """The fault was injected and nothing shows an effect. The run proves nothing about it."""


@dataclass
class Stage:
    """What faults can get at."""

    broker: Broker
    proxy: Proxy
    consumers: list[Worker]
    random: random.Random
    pause: float  # seconds that a fault lasts
    proof: str = ""  # how the last fault is known to have bitten


def _bit(stage: Stage, count: int, what: str) -> None:
    if not count:
        raise NoBite(f"no {what}")
    stage.proof = f"{count} {what}"


@asynccontextmanager
async def cut(stage: Stage) -> AsyncIterator[None]:
    """All connections are reset."""
    _bit(stage, stage.proxy.cut(), "links were cut that had work in flight")
    yield


@asynccontextmanager
async def torn(stage: Stage) -> AsyncIterator[None]:
    """A connection is reset in the middle of what a client sends."""
    before = stage.proxy.torn
    stage.proxy.tear()
    await _reaches(lambda: stage.proxy.torn > before, stage.pause)
    _bit(stage, stage.proxy.torn - before, "links were reset within a request")
    yield


@asynccontextmanager
async def silent(stage: Stage) -> AsyncIterator[None]:
    """Nothing passes, and nobody is told: the connections stay open."""
    before = stage.proxy.withheld
    stage.proxy.silent = True
    try:
        yield
    finally:
        stage.proxy.silent = False
    _bit(stage, stage.proxy.withheld - before, "bytes were held back")


@asynccontextmanager
async def unanswered(stage: Stage) -> AsyncIterator[None]:
    """Requests reach the server, its answers are held back, then the connections are reset: was it done or not?"""
    before = stage.proxy.withheld
    stage.proxy.mute = True
    try:
        yield
        stage.proxy.cut()
    finally:
        stage.proxy.mute = False
    _bit(stage, stage.proxy.withheld - before, "bytes of answers were lost")


@asynccontextmanager
async def late(stage: Stage) -> AsyncIterator[None]:
    """Every chunk takes 300 ms more."""
    before = stage.proxy.late
    stage.proxy.delay = 0.3
    try:
        yield
    finally:
        stage.proxy.delay = 0.0
    _bit(stage, stage.proxy.late - before, "chunks were late")


@asynccontextmanager
async def narrow(stage: Stage) -> AsyncIterator[None]:
    """20 kB a second on each connection."""
    before = stage.proxy.late
    stage.proxy.rate = 20_000.0
    try:
        yield
    finally:
        stage.proxy.rate = 0.0
    _bit(stage, stage.proxy.late - before, "chunks were slowed")


@asynccontextmanager
async def broker_killed(stage: Stage) -> AsyncIterator[None]:
    """SIGKILL to the server, later a new one on the same data."""
    before = stage.broker.pid
    await asyncio.to_thread(stage.broker.kill)
    try:
        yield
    finally:
        await asyncio.to_thread(stage.broker.restart)
    if before is None or stage.broker.pid == before:
        raise NoBite(f"the server's process is {stage.broker.pid}, before it was {before}")
    stage.proof = f"process {before} was killed, {stage.broker.pid} took over"


@asynccontextmanager
async def broker_hangs(stage: Stage) -> AsyncIterator[None]:
    """SIGSTOP to the server: its connections stay open, and it does nothing."""
    pid = stage.broker.pid
    assert pid is not None, "the server isn't running"
    async with _stopped(stage, pid):
        yield


@asynccontextmanager
async def consumer_killed(stage: Stage) -> AsyncIterator[None]:
    """SIGKILL to a consumer, with messages in its hands; later another one."""
    victim = stage.random.choice(stage.consumers)
    status = await victim.kill()
    if status != -signal.SIGKILL:
        raise NoBite(f"{victim.name} had ended by itself, with status {status}")
    stage.proof = f"{victim.name} was killed"
    try:
        yield
    finally:
        await victim.start()


@asynccontextmanager
async def consumer_hangs(stage: Stage) -> AsyncIterator[None]:
    """SIGSTOP to a consumer: it comes back and knows nothing of it."""
    async with _stopped(stage, stage.random.choice(stage.consumers).pid):
        yield


@asynccontextmanager
async def _stopped(stage: Stage, pid: int) -> AsyncIterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        await _reaches(lambda: _state(pid) == "T", 1.0)
        state = _state(pid)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
    if state != "T":
        raise NoBite(f"process {pid} is in state {state}, not stopped")
    stage.proof = f"process {pid} was stopped"


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def _reaches(condition: Callable[[], bool], seconds: float) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not condition() and loop.time() < deadline:  # noqa: ASYNC110  # what is waited for has no event
        await asyncio.sleep(0.01)


Fault = Callable[[Stage], AbstractAsyncContextManager[None]]

FAULTS: Mapping[str, Fault] = {
    fault.__name__.replace("_", "-"): fault
    for fault in (
        cut,
        torn,
        silent,
        unanswered,
        late,
        narrow,
        broker_killed,
        broker_hangs,
        consumer_killed,
        consumer_hangs,
    )
}

# A fault that proves nothing there: the emulator keeps its data in memory only, unlike the service it stands for.
NOT_ON: Mapping[str, Mapping[str, str]] = {
    "sqs": {"broker-killed": "the emulator keeps nothing over a kill, and AWS has no server that we could kill"},
}


def schedule(kind: str, seed: int, count: int) -> list[str]:
    """`count` faults, drawn from the seed: each kind once before any comes again."""
    draws = random.Random(seed)  # noqa: S311  # it has to be repeatable, not secret
    drawn: list[str] = []
    names = [name for name in FAULTS if name not in NOT_ON.get(kind, {})]
    while len(drawn) < count:
        draws.shuffle(names)
        drawn += names
    return drawn[:count]
