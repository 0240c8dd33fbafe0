"""The processes that work: `python -m unibus_contracts.chaos.worker produce|consume FOLDER NAME PREFIX`, the URL in the environment.

A producer does what stands on its standard input: `go 500 3.5` sends 500 messages over 3.5 seconds; it says `done` when each of
them has been confirmed or given up, and ends with its input. A consumer works until SIGTERM. Both say `ready` when connected.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from unibus import Bus, Topic
from unibus_contracts.chaos import service
from unibus_contracts.chaos.traps import Traps
from unibus_contracts.history import Recorder

URL = "UNIBUS_CHAOS_URL"
_IN_FLIGHT = 200


async def produce(bus: Bus, recorder: Recorder) -> None:
    loop = asyncio.get_running_loop()
    slots = asyncio.Semaphore(_IN_FLIGHT)
    count = 0
    async with bus, asyncio.TaskGroup() as group:
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            _, messages, seconds = line.split()
            began, tasks = loop.time(), []
            for index in range(int(messages)):
                # Paced, so that there is work for as long as a fault lasts.
                await asyncio.sleep(max(0.0, began + float(seconds) * index / int(messages) - loop.time()))
                await slots.acquire()
                count += 1
                task = group.create_task(_send(bus, recorder, count))
                task.add_done_callback(lambda _: slots.release())
                tasks.append(task)
            await asyncio.gather(*tasks)
            print("done", flush=True)


async def _send(bus: Bus, recorder: Recorder, count: int) -> None:
    place = service.PLACES[count % len(service.PLACES)]
    turn = count // len(service.PLACES)
    key, seq = f"{recorder.process}.k{turn % service.KEYS}", turn // service.KEYS
    item = service.Item(value=f"{recorder.process}-{count}", key=key, seq=seq)
    try:
        with recorder.during("send", value=item.value, place=place.name, key=key, seq=seq):
            await (bus.publish(place, item, key=key) if isinstance(place, Topic) else bus.send(place, item, key=key))
    except Exception as error:  # it is written down; the next one may go
        print(f"{item.value}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


async def consume(bus: Bus, recorder: Recorder, traps: Traps) -> None:
    handling = service.Handling(recorder)
    handling.register(bus)
    with traps.listening():
        async with bus:
            traps.set_into(bus)
            print("ready", flush=True)
            receiving = asyncio.create_task(handling.by_hand(bus))
            try:
                await bus.run()  # until SIGTERM
            finally:
                receiving.cancel()
                await asyncio.gather(receiving, return_exceptions=True)


def main(arguments: list[str]) -> None:
    role, folder, name, prefix = arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if role == "produce":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # its input tells it when to end
    with Recorder(Path(folder), name) as recorder:
        bus = service.make(os.environ[URL], prefix)
        traps = Traps(Path(folder), name)
        asyncio.run(produce(bus, recorder) if role == "produce" else consume(bus, recorder, traps))


if __name__ == "__main__":
    main(sys.argv[1:])
