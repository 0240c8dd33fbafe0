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
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from unibus import Bus, Queue, SendFailed, Topic
from unibus_contracts.chaos import service
from unibus_contracts.chaos.traps import Traps
from unibus_contracts.chaos.watched import watch
from unibus_contracts.history import Recorder
from unibus_contracts.history.record import outcome

URL = "UNIBUS_CHAOS_URL"
_IN_FLIGHT = 1600
_BATCH = 80
_LOOK = 0.1  # seconds between two looks at how late the event loop is
_STALL = 1.0  # seconds that are worth a line
_TICK = 0.1  # seconds between two batches, where fewer messages than that are asked for

Place = Queue[Any] | Topic[Any]


async def produce(bus: Bus, recorder: Recorder) -> None:
    loop = asyncio.get_running_loop()
    slots = asyncio.Semaphore(_IN_FLIGHT // _BATCH)
    count = 0
    async with bus, asyncio.TaskGroup() as group:
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            _, messages, seconds = line.split()
            began, tasks, total = loop.time(), [], int(messages)
            size = max(1, min(_BATCH, int(_TICK * total / float(seconds))))
            for index in range(0, total, size):
                # Paced, so that there is work for as long as a fault lasts.
                await asyncio.sleep(max(0.0, began + float(seconds) * index / total - loop.time()))
                await slots.acquire()
                batch = range(count + 1, count + 1 + min(size, total - index))
                count += len(batch)
                # One batch in ten goes message by message, since that is how most services send.
                one_by_one = (index // size) % 10 == 0 or recorder.process.startswith(service.ASKER)
                send = _one_by_one if one_by_one else _together
                task = group.create_task(send(bus, recorder, batch))
                task.add_done_callback(lambda _: slots.release())
                tasks.append(task)
            await asyncio.gather(*tasks)
            print("done", flush=True)
        recorder.note("bye")


def _item(recorder: Recorder, count: int) -> tuple[Place, service.Item]:
    turn = count // len(service.PLACES)
    key, seq = f"{recorder.process}.k{turn % service.KEYS}", turn // service.KEYS
    value = f"{recorder.process}-{count}"
    return service.place_of(value), service.Item(value=value, key=key, seq=seq)


async def _one_by_one(bus: Bus, recorder: Recorder, batch: Iterable[int]) -> None:
    await asyncio.gather(*(_send(bus, recorder, *_item(recorder, count)) for count in batch))


async def _send(bus: Bus, recorder: Recorder, place: Place, item: service.Item) -> None:
    key = item.key
    try:
        if place is service.asks:
            with recorder.during("request", value=item.value, place=place.name, key=key, seq=item.seq) as asked:
                answer = await bus.request(service.asks, item, timeout=service.ANSWER)
                asked.detail = answer.value
            return
        with recorder.during("send", value=item.value, place=place.name, key=key, seq=item.seq):
            await (bus.publish(place, item, key=key) if isinstance(place, Topic) else bus.send(place, item, key=key))
    except Exception as error:  # it is written down; the next one may go
        print(f"{item.value}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


async def _together(bus: Bus, recorder: Recorder, batch: Iterable[int]) -> None:
    items: dict[Place, list[service.Item]] = {}
    for count in batch:
        place, item = _item(recorder, count)
        items.setdefault(place, []).append(item)
    await asyncio.gather(*(_send_many(bus, recorder, place, several) for place, several in items.items()))


async def _send_many(bus: Bus, recorder: Recorder, place: Place, items: list[service.Item]) -> None:
    with ExitStack() as stack:
        ends = [
            stack.enter_context(recorder.during("send", value=i.value, place=place.name, key=i.key, seq=i.seq))
            for i in items
        ]
        try:
            await (
                bus.publish_many(place, items, key=lambda item: item.key)
                if isinstance(place, Topic)
                else bus.send_many(place, items, key=lambda item: item.key)
            )
        except SendFailed as error:
            for index, failure in error.failed.items():
                ends[index].kind, ends[index].detail = outcome(failure), type(failure).__name__
            print(f"{items[0].value} and others: {error}", file=sys.stderr, flush=True)


async def notice_stalls(recorder: Recorder) -> None:
    """Write down when the event loop has stood still: whoever stops or starves the process, it is the one that knows."""
    while True:
        began = time.monotonic()
        await asyncio.sleep(_LOOK)
        if (late := time.monotonic() - began - _LOOK) > _STALL:
            recorder.note("stalled", detail=f"{late:.2f}")


async def consume(bus: Bus, recorder: Recorder, traps: Traps) -> None:
    handling = service.Handling(recorder)
    handling.register(bus)
    with traps.listening():
        async with bus:
            traps.set_into(bus)
            receiving = asyncio.create_task(handling.by_hand(bus))
            working = asyncio.create_task(bus.run())
            noticing = asyncio.create_task(notice_stalls(recorder))
            await asyncio.sleep(0)  # now it hears SIGTERM, which may follow at once
            print("ready", flush=True)
            try:
                await working  # until SIGTERM
            finally:
                receiving.cancel()
                noticing.cancel()
                await asyncio.gather(receiving, noticing, return_exceptions=True)
    recorder.note("bye")


def main(arguments: list[str]) -> None:
    role, folder, name, prefix = arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if role == "produce":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # its input tells it when to end
    with Recorder(Path(folder), name) as recorder:
        watch(recorder, service.value_of)
        bus = service.make(os.environ[URL], prefix)
        traps = Traps(Path(folder), name, recorder.flush)
        asyncio.run(produce(bus, recorder) if role == "produce" else consume(bus, recorder, traps))


if __name__ == "__main__":
    main(sys.argv[1:])
