"""The consumer that is killed: `python -m unibus_contracts.compare.child`. What it needs comes as a line of JSON on stdin, a password
among it, so no argument holds it. It prints what it has, and waits for its end.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from unibus import NotFound, Queue
from unibus.adapter import Url
from unibus.url import parse

from .lab import take
from .targets import Target


def order(target: Target, prefix: str, queue: str, ack: int, hold: int) -> bytes:
    """The line that the child reads."""
    return (
        json.dumps(
            {
                "url": target.text(),
                "settings": dict(target.settings),
                "prefix": prefix,
                "queue": queue,
                "ack": ack,
                "hold": hold,
            }
        ).encode()
        + b"\n"
    )


async def main(told: dict[str, Any]) -> None:
    url: Url = parse(told["url"])
    target = Target("", url, told["settings"])
    queue: Queue[bytes] = Queue(told["queue"], bytes)
    try:
        async with (
            target.bus(channels=[queue], prefix=told["prefix"], declare="assume") as bus,
            bus.receiver(queue, prefetch=told["ack"] + told["hold"]) as receiver,
        ):
            taken = await take(receiver, told["ack"] + told["hold"])
            for delivery in taken[: told["ack"]]:
                await delivery.ack()
            names = [delivery.body.decode() for delivery in taken]
            print(json.dumps({"acked": names[: told["ack"]], "held": names[told["ack"] :]}), flush=True)
            await asyncio.to_thread(sys.stdin.read)  # its parent has gone, where this ever returns
    except* NotFound as errors:
        print(json.dumps({"error": str(errors.exceptions[0])}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.stdin.readline())))
