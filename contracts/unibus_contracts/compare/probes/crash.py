"""A consumer dies, or stands still: a child process takes messages, and is killed or stopped in the worst moment."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

from unibus import Delivery, Queue

from ..child import once_after, order
from ..lab import Lab, Missing, short, until
from ..model import Found, NotMeasurable, Probe, Row

CHAPTER = "failure"
HELD, ACKED = 5, 5
LIMIT = 100.0  # seconds until all that it held has come again

REDELIVERY = Row(
    id="failure.redelivery",
    chapter=CHAPTER,
    title="redelivery after a consumer was killed",
    how="A child process takes ten messages, acks five of them, and is killed (SIGKILL). Another consumer starts at once; from the kill until it has all that the "
    "dead one held. Heartbeats, leases and sessions are as the settings say; by default those of the adapter.",
    feature="lease",
    unit="s",
    better="less",
)
AGAIN = Row(
    id="failure.again",
    chapter=CHAPTER,
    title="acked before the kill, and delivered again",
    how="Of the five that the killed process had acked, in the moment before: how many came again. A duplicate, where the ack was not yet "
    "stored.",
    feature="settle_confirmed",
    unit="messages",
    better="less",
)
COUNT = Row(
    id="failure.count",
    chapter=CHAPTER,
    title="counts after the kill",
    how="What the messages that the dead consumer held say of themselves when they come again: `attempt`, which is to be 1 since nothing has failed, and "
    "`deliveries`, where the broker counts.",
    feature="attempt",
)
STILL = Row(
    id="failure.standstill",
    chapter=CHAPTER,
    title="a consumer that stands still loses its message after",
    how="A child process takes a message and is stopped (SIGSTOP), as by a blocked event loop or a machine that sleeps: its connection stays, "
    "and nothing renews what it holds. Until another consumer has the message, for 200 s at most [90 s].",
    feature="lease",
    unit="s",
    better="less",
)
COPIES = Row(
    id="failure.copies",
    chapter=CHAPTER,
    title="copies, where a consumer dies as it retries",
    how="A child process fails a message and kills itself (SIGKILL) once the broker has the copy for the retry, and before the original is settled, "
    "where these are two steps. How many a consumer gets after that: of two, one is a duplicate. None would be a loss.",
    feature="atomic_move",
    touches=("retry",),
    unit="messages",
    better="less",
)


async def measure(lab: Lab) -> Mapping[str, Found]:
    queue = lab.queue("crash")
    async with lab.bus(queue) as bus:
        await bus.send_many(queue, [b"%d" % n for n in range(HELD + ACKED)], key=lambda _: "k")
        held, acked, killed = await _kill(lab, queue)
        again: dict[bytes, Delivery[Any]] = {}
        repeated: set[bytes] = set()
        took = 0.0
        async with bus.receiver(queue) as receiver:
            while perf_counter() - killed < LIMIT:
                delivery = await receiver.receive(timeout=2.0)
                if delivery is not None:
                    body = delivery.body
                    await delivery.ack()
                    if body in acked:
                        repeated.add(body)
                    elif body in held and body not in again:
                        again[body], took = delivery, perf_counter() - killed
                elif held <= again.keys():
                    break
    if not held <= again.keys():
        raise Missing(f"{len(again)} of {len(held)} came again within {LIMIT:g} s")
    counts = sorted({str(d.deliveries) if d.deliveries is not None else "not told" for d in again.values()})
    attempts = sorted({d.attempt for d in again.values()})
    attempt = ", ".join(map(str, attempts))
    return {
        REDELIVERY.id: Found(text=f"{short(took)} s", value=took),
        AGAIN.id: Found(text=f"{len(repeated)} of {len(acked)}", value=float(len(repeated))),
        COUNT.id: Found(text=f"attempt {attempt}; deliveries {', '.join(counts)}"),
    }


async def still(lab: Lab) -> Mapping[str, Found]:
    queue, patience = lab.queue("still"), lab.sizes.patience
    async with lab.bus(queue) as bus:
        await bus.send(queue, b"x")
        async with child(lab, queue, ack=0, hold=1) as (process, _):
            process.send_signal(signal.SIGSTOP)
            begun = perf_counter()
            async with bus.receiver(queue) as receiver:
                delivery = await receiver.receive(timeout=patience)
                took = perf_counter() - begun
                if delivery is not None:
                    await delivery.ack()
    if delivery is None:
        return {
            STILL.id: Found(text=f"not within {patience:g} s", note="nobody else gets it as long as it stands still")
        }
    return {STILL.id: Found(text=f"{short(took)} s", value=took)}


async def copies(lab: Lab) -> Mapping[str, Found]:
    queue, known = lab.queue("copies"), lab.known
    backoff = max(1.0, known.park_below)  # sooner than that there is no copy
    ran: list[int] = []

    async def handle(body: bytes, delivery: Delivery[Any]) -> None:
        ran.append(delivery.attempt)

    first, second = lab.bus(), lab.bus()
    for bus in (first, second):
        bus.consumer(queue, retry=once_after(backoff))(handle)
    async with first:
        await first.send(queue, b"x")
        async with child(lab, queue, backoff=backoff) as (process, _):
            await process.wait()  # by its own hand
        died = perf_counter()
    original = min(known.lease.limit or 0.0, 60.0) + 5.0  # seconds in which it would have come, had it not been settled
    async with second.running():
        await until(
            lambda: len(ran) >= 2 or (2 in ran and perf_counter() - died > original),
            lambda: f"{len(ran)} messages came; the copy was among them: {2 in ran}",
            LIMIT,
        )
    text = "one: the copy" if ran == [2] else f"{len(ran)}: attempts {', '.join(map(str, sorted(ran)))}"
    return {COPIES.id: Found(text=text, value=float(len(ran)))}


async def _kill(lab: Lab, queue: Queue[bytes]) -> tuple[set[bytes], set[bytes], float]:
    """Bodies that the dead process held, those that it had acked, and when it died."""
    async with child(lab, queue, ack=ACKED, hold=HELD) as (process, told):
        process.kill()
        killed = perf_counter()
    return {body.encode() for body in told["held"]}, {body.encode() for body in told["acked"]}, killed


@asynccontextmanager
async def child(lab: Lab, queue: Queue[bytes], **what: float) -> AsyncIterator[tuple[Process, dict[str, Any]]]:
    """A consumer in a process of its own, and what it says when it is so far. It is killed at the end. Raises Missing, NotMeasurable."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "unibus_contracts.compare.child"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not for it
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        process.stdin.write(order(lab.target, lab.prefix, queue.name, **what))
        await process.stdin.drain()
        line = await asyncio.wait_for(process.stdout.readline(), 40)
        if not line:
            said = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
            raise Missing(f"the child has ended: {said[-1] if said else 'it said nothing'}")
        told = json.loads(line)
        if "error" in told:
            raise NotMeasurable("another process has no part in this broker")  # its queue is not there
        yield process, told
    finally:
        if process.returncode is None:
            process.kill()
        process.stdin.close()
        await process.wait()


PROBES = (
    Probe(name="crash", rows=(REDELIVERY, AGAIN, COUNT), measure=measure, waits=True, long=True, limit=180.0),
    Probe(name="standstill", rows=(STILL,), measure=still, waits=True, long=True, limit=280.0),
    Probe(name="copies", rows=(COPIES,), measure=copies, waits=True, long=True, limit=180.0),
)
