"""A service in a process of its own, for the contract on SIGTERM: `python -m unibus_contracts.child PREFIX QUEUE`.

The URL and the settings beside it come on standard input, as JSON. It prints a line of JSON when its first handler has begun, then waits for the signal and
for a line that says that it was sent. It prints a second line when it has stopped, with what it did and what it had left for others. It looks itself, since a broker inside a
process can't be looked at from outside.
"""

from __future__ import annotations

import asyncio
import json
import sys

from unibus import Queue

from .harness import UrlHarness
from .kit import SOON, take, until


async def main(where: str, prefix: str, name: str) -> None:
    url, more = json.loads(where)
    harness = UrlHarness(url, more=more)
    harness.prefix = prefix  # that of the parent, who cleans up
    queue: Queue[str] = Queue(name, str)
    bus = harness.bus()
    done: list[str] = []
    stopping = asyncio.Event()

    @bus.consumer(queue, concurrency=1, prefetch=5)
    async def handle(body: str) -> None:
        if done:
            done.append(body)  # one too many: the parent will see it
            return
        print(json.dumps({"begun": body}), flush=True)
        await stopping.wait()
        done.append(body)

    async with harness.bus(channels=[queue]) as sender:
        await sender.send_many(queue, [str(n) for n in range(5)])
    running = asyncio.create_task(bus.run())
    await asyncio.to_thread(sys.stdin.readline)  # the parent has sent the signal
    # It may arrive a moment after the line does: a handler that ends before the drain would go on with the next message.
    await until(lambda: all(intake._stopping for intake in bus._opened().intakes), "the drain that the signal begins")
    async with harness.bus(channels=[queue]) as other, other.receiver(queue, prefetch=5) as receiver:
        if not other.capabilities.share:  # the rest is others' only when this one has left
            stopping.set()
            await running
        rest = await take(receiver, 4, timeout=2 * SOON)  # given back while the handler still runs
        stopping.set()
        await running
        for delivery in rest:
            await delivery.ack()
    print(json.dumps({"done": done, "left": [d.body for d in rest], "attempts": [d.attempt for d in rest]}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.stdin.readline().strip(), *sys.argv[1:3]))
