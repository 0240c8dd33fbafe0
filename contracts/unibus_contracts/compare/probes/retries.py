"""Retries and dead letters: when they come, what they carry, what guards against a message that kills."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from time import perf_counter, time
from typing import Any

from unibus import Delivery, Message, RetryPolicy, deadletter

from ..lab import POLL, Lab, milliseconds, percentile, until
from ..model import Found, Probe, Row

CHAPTER = "failure"
BACKOFF = 1.0

LATENESS = Row(
    id="failure.retry_late",
    chapter=CHAPTER,
    title="a retry is late by",
    how="Handlers fail once; the retry is due a second later. From when it was due to when it ran: the largest of all.",
    feature="delay",
    touches=("retry",),
    unit="ms",
    better="less",
)
TOLD = Row(
    id="failure.retry_told",
    chapter=CHAPTER,
    title="a retry tells its story",
    how="What the second run of a failed message is told: its attempt, the count and the error in its headers, and the user's own header and key. `attempt` is the count over a crash.",
    feature="attempt",
    touches=("retry",),
)
LETTER = Row(
    id="failure.letter",
    chapter=CHAPTER,
    title="a dead letter keeps",
    how="A message with id, key, header, correlation id and a body of bytes that are no text dies on its first run; its dead letter is compared. unibus "
    "makes it: with `atomic_move` the copy and the ack of the original are one step.",
    feature="atomic_move",
    touches=("retry",),
)


async def late(lab: Lab) -> Mapping[str, Found]:
    queue, count = lab.queue("late"), lab.sizes.repeats
    failed: dict[str, float] = {}
    lateness: list[float] = []
    second: list[Delivery[Any]] = []
    bus = lab.bus()

    @bus.consumer(queue, concurrency=20, retry=RetryPolicy(max_retries=1, backoff=BACKOFF, multiplier=1))
    async def handle(body: bytes, delivery: Delivery[Any]) -> None:
        now = time()
        if delivery.attempt == 1:
            failed[delivery.message.id] = now
            raise ValueError("on purpose")
        lateness.append(now - failed[delivery.message.id] - BACKOFF)
        second.append(delivery)

    async with lab.bus(queue) as sender, bus.running():
        await sender.send_many(queue, _some(count))
        await until(lambda: len(lateness) >= count, lambda: f"{len(lateness)} of {count} retries", 40)
    worst, middle = max(lateness), percentile(lateness, 0.5)
    early = sum(value < 0 for value in lateness)
    note = f"p50 {milliseconds(middle)} of {count}" + (f"; {early} too early" if early else "")
    message = second[0].message
    missing = [
        what
        for what, there in {
            "attempt": second[0].attempt == 2,
            "count": message.headers.get("x-retry-count") == "1",
            "error": "on purpose" in message.headers.get("x-original-error", ""),
            "header": message.headers.get("tenant") == "north",
            "key": message.key == "k",
        }.items()
        if not there
    ]
    told = f"not: {', '.join(missing)}" if missing else "attempt, count, error, header, key"
    return {
        LATENESS.id: Found(text=milliseconds(worst), value=worst * 1000, note=note),
        TOLD.id: Found(text=told, value=float(len(missing))),
    }


def _some(count: int) -> list[Message]:
    return [Message(b"x", key="k", headers={"tenant": "north"}) for _ in range(count)]


async def letter(lab: Lab) -> Mapping[str, Found]:
    queue = lab.queue("letter")
    bus = lab.bus()
    found: list[Delivery[Any]] = []

    @bus.consumer(queue, retry=RetryPolicy(max_retries=0))
    async def handle(body: bytes) -> None:
        raise ValueError("on purpose")

    sent = Message(b"\x00\xff\xfe", id="the-id", key="k", headers={"tenant": "north"}, correlation_id="c")
    async with bus.running():
        await bus.send(queue, sent)
        deadline = perf_counter() + 20
        while not found and perf_counter() < deadline:
            found = [one async for one in deadletter.browse(bus, queue)]
            await asyncio.sleep(0 if found else 10 * POLL)
    if len(found) != 1:
        return {LETTER.id: Found(text=f"{len(found)} dead letters instead of 1", value=5.0)}
    message = found[0].message
    lost = [
        what
        for what, there in {
            "body": found[0].body == sent.body,
            "id": message.id == sent.id,
            "key": message.key == "k",
            "header": message.headers.get("tenant") == "north",
            "correlation id": message.correlation_id == "c",
        }.items()
        if not there
    ]
    text = f"all but {', '.join(lost)}" if lost else "body, id, key, header, correlation id"
    return {LETTER.id: Found(text=text, value=float(len(lost)))}


PROBES = (
    Probe(name="retry", rows=(LATENESS, TOLD), measure=late, waits=True),
    Probe(name="dead letter", rows=(LETTER,), measure=letter, waits=True),
)
