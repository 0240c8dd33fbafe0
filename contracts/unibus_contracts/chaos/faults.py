"""The faults: each does its worst for a while, heals, and says how it is known to have bitten; `NoBite` where it has not."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from unibus_contracts.chaos import (
    cluster_faults,
    http_faults,
    kafka_faults,
    process_faults,
    rabbitmq_faults,
    redis_faults,
)
from unibus_contracts.chaos.stage import Fault, NoBite, Stage, bit, reaches

__all__ = ["FAULTS", "NOT_DRAWN", "NOT_ON", "NoBite", "Stage", "not_tried", "possible", "schedule"]


@asynccontextmanager
async def cut(stage: Stage) -> AsyncIterator[None]:
    """All connections are reset."""
    bit(stage, stage.proxy.cut(), "links were cut that had work in flight")
    yield


@asynccontextmanager
async def torn(stage: Stage) -> AsyncIterator[None]:
    """A connection is reset in the middle of what a client sends."""
    before = stage.proxy.torn
    stage.proxy.tear()
    await reaches(lambda: stage.proxy.torn > before, stage.pause)
    bit(stage, stage.proxy.torn - before, "links were reset within a request")
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
    bit(stage, stage.proxy.withheld - before, "bytes were held back")


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
    bit(stage, stage.proxy.withheld - before, "bytes of answers were lost")


@asynccontextmanager
async def late(stage: Stage) -> AsyncIterator[None]:
    """Every chunk takes 300 ms more."""
    before = stage.proxy.late
    stage.proxy.delay = 0.3
    try:
        yield
    finally:
        stage.proxy.delay = 0.0
    bit(stage, stage.proxy.late - before, "chunks were late")


@asynccontextmanager
async def narrow(stage: Stage) -> AsyncIterator[None]:
    """20 kB a second on each connection."""
    before = stage.proxy.late
    stage.proxy.rate = 20_000.0
    try:
        yield
    finally:
        stage.proxy.rate = 0.0
    bit(stage, stage.proxy.late - before, "chunks were slowed")


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
        await reaches(lambda: _state(pid) == "T", 1.0)
        state = _state(pid)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
    if state != "T":
        raise NoBite(f"process {pid} is in state {state}, not stopped")
    stage.proof = f"process {pid} was stopped"


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


_OWN: tuple[Fault, ...] = (
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
_ANYWHERE: Mapping[str, Fault] = {
    **{fault.__name__.replace("_", "-"): fault for fault in _OWN},
    **process_faults.FAULTS,
}

_OF: Mapping[str, Mapping[str, Fault]] = {
    "kafka": kafka_faults.FAULTS,
    "rabbitmq": rabbitmq_faults.FAULTS,
    "redis": redis_faults.FAULTS,
    "sqs": http_faults.FAULTS,
}  # those that only one kind of broker knows

FAULTS: Mapping[str, Fault] = {
    **_ANYWHERE,
    **{name: fault for of in (_OF, cluster_faults.FAULTS) for own in of.values() for name, fault in own.items()},
}
# Those of the consumers: they need neither a proxy nor a broker that is alone.
_CONSUMERS = ("consumer-killed", "consumer-hangs", *process_faults.FAULTS)

# What one would look for there, and why it isn't tried.
_NOT_ANYWHERE = {
    "broker-clock": "a wrong time for one process alone needs libfaketime; consumers get theirs without it"
}
NOT_ON: Mapping[str, Mapping[str, str]] = {
    "kafka": {
        **_NOT_ANYWHERE,
        "kafka-leader-moved": "one node has no other leader: CLUSTER=1",
        "kafka-replicas-missing": "a server asks for no more replicas than a topic has, and here each has one: CLUSTER=1",
        "kafka-coordinator-gone": "one node has no other coordinator, and it is gone with the node by broker-killed",
        "kafka-disk-full": "with its only folder gone a node ends itself, as by broker-killed; that needs three of them",
    },
    "rabbitmq": {**_NOT_ANYWHERE, "rabbitmq-disk-full": "its disk alarm comes before, and that is tried"},
    "redis": {
        **_NOT_ANYWHERE,
        "consumer-killed-copied": "a copy and the end of its original are one step there",
        "redis-failover": "one node has no replica: CLUSTER=1",
        **({"redis-disk-full": why} if (why := redis_faults.cannot_mount()) else {}),
    },
    "sqs": {
        **_NOT_ANYWHERE,
        "broker-killed": "the emulator keeps nothing over a kill, and AWS has no server that we could kill",
    },
}

# What can be made there, and is not drawn: by `--only`.
_TIME_OF_DAY = {
    "clock-fast": "a due time is a time of day: what fails meanwhile may be due an hour later, and the drain would wait for it",
    "clock-slow": "the same of what fails in the moment in which the clock jumps: its due time is of before, its wait is counted after",
}
NOT_DRAWN: Mapping[str, Mapping[str, str]] = dict.fromkeys(_OF, _TIME_OF_DAY)
_NOT_ON_CLUSTER = {
    **_NOT_ANYWHERE,
    "cut, torn, silent, unanswered, late, narrow": "clients of a cluster come by many ways, and one proxy is one of them: without CLUSTER=1",
}


def not_tried(kind: str, cluster: bool = False) -> Mapping[str, str]:
    """What one would look for on this kind of broker, or on a cluster of it, and why it isn't tried."""
    return {**cluster_faults.NOT_ON.get(kind, {}), **_NOT_ON_CLUSTER} if cluster else NOT_ON.get(kind, {})


def possible(kind: str, cluster: bool = False) -> list[str]:
    """The faults that are tried on this kind of broker, or on a cluster of it."""
    if cluster:
        return [*cluster_faults.FAULTS.get(kind, ()), *(name for name in _CONSUMERS if name not in NOT_ON[kind])]
    return [name for name in (*_ANYWHERE, *_OF.get(kind, ())) if name not in NOT_ON.get(kind, {})]


def schedule(kind: str, seed: int, count: int, cluster: bool = False) -> list[str]:
    """`count` faults, drawn from the seed: each kind once before any comes again."""
    draws = random.Random(seed)  # noqa: S311  # it has to be repeatable, not secret
    drawn: list[str] = []
    names = [name for name in possible(kind, cluster) if name not in NOT_DRAWN.get(kind, {})]
    while len(drawn) < count:
        draws.shuffle(names)
        drawn += names
    return drawn[:count]
