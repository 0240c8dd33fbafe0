"""A consumer dies: a child process takes messages, acks some, and is killed by SIGKILL."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from unibus import Delivery, Queue

from ..child import order
from ..lab import Lab, Missing, short
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


async def _kill(lab: Lab, queue: Queue[bytes]) -> tuple[set[bytes], set[bytes], float]:
    """Bodies that the dead process held, those that it had acked, and when it died."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "unibus_contracts.compare.child"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not for it
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        child.stdin.write(order(lab.target, lab.prefix, queue.name, ACKED, HELD))
        await child.stdin.drain()
        line = await asyncio.wait_for(child.stdout.readline(), 40)
        if not line:
            said = (await child.stderr.read()).decode(errors="replace").strip().splitlines()
            raise Missing(f"the child has ended: {said[-1] if said else 'it said nothing'}")
        told = json.loads(line)
        if "error" in told:
            raise NotMeasurable("another process has no part in this broker")  # its queue is not there
    finally:
        if child.returncode is None:
            child.kill()
        killed = perf_counter()
        child.stdin.close()
        await child.wait()
    return {body.encode() for body in told["held"]}, {body.encode() for body in told["acked"]}, killed


PROBES = (Probe(name="crash", rows=(REDELIVERY, AGAIN, COUNT), measure=measure, waits=True, long=True, limit=180.0),)
