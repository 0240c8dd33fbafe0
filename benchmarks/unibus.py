"""unibus as a contestant: the bus as a service has it, on queues that are the benchmark's."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

from benchmarks.cases import OURS
from benchmarks.flows import Flow, Raw
from benchmarks.load import BODY, Handled, flood, round_trips
from benchmarks.watch import Watch
from unibus import Bus, Delivery, Message, Queue, Retry, RetryPolicy

UNIBUS = OURS
_MANY = 500  # messages in one call of send_many


class Unibus(Raw):
    """`prefetch`: where a flow names none. As many slots as the prefetch, since the raw clients run a task for each delivery."""

    def __init__(self, url: str, prefetch: int = 200, name: str = UNIBUS) -> None:
        self.name = name
        self._url = url
        self._prefetch = prefetch

    def bus(self, *channels: Queue[Any], declare: Any = "assume") -> Bus:
        return Bus(self._url, channels=channels, service="bench", declare=declare, config=False, environ={})

    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        orders = Queue(queue, bytes, ordered=bool(flow.keys))
        headers = dict(flow.headers) or None
        async with self.bus(orders) as bus:
            watch.start()
            if flow.many:
                for at in range(0, messages, _MANY):
                    await bus.send_many(orders, [flow.body] * min(_MANY, messages - at))
            elif flow.keys:
                keys = map("k%d".__mod__, itertools.cycle(range(flow.keys)))
                await flood(lambda: bus.send(orders, flow.body, key=next(keys), headers=headers), messages)
            else:
                await flood(partial(bus.send, orders, flow.body, headers=headers), messages, flow.in_flight)
            watch.stop()

    async def consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int:
        orders = Queue(queue, bytes, ordered=bool(flow.keys))
        handled = Handled(messages, watch)
        prefetch = flow.prefetch or self._prefetch
        if flow.by_hand:
            async with self.bus(orders) as bus, bus.receiver(orders, prefetch=prefetch) as receiver:
                watch.start()
                async for delivery in receiver:
                    async with delivery:
                        if not handled.count:
                            watch.restart()
                        handled.count += 1
                    if handled.count == messages:
                        break
                watch.stop()
            return handled.count
        settings: dict[str, Any] = {"prefetch": prefetch, "concurrency": prefetch}
        if flow.at_most_once:
            settings["guarantee"] = "at-most-once"
        numbers = itertools.count(1)

        async def handle(body: bytes, message: Message) -> None:
            handled.handle(body, message.id, message.content_type, message.timestamp, message.headers)
            handled.settled()  # that is, to be settled: the end of `running` waits for it

        async def fails(body: bytes, delivery: Delivery[bytes]) -> None:
            if delivery.attempt == 1 and not next(numbers) % flow.failing:
                raise Retry("for the benchmark")
            await handle(body, delivery.message)

        if flow.failing:
            bus = self.bus(declare="create")  # what waits for its retry needs a place
            bus.consumer(orders, retry=RetryPolicy(max_retries=1, backoff=1), **settings)(fails)
        else:
            bus = self.bus()
            bus.consumer(orders, **settings)(handle)
        async with bus:
            watch.start()
            async with bus.running():
                await handled.all.wait()
                watch.stop()
        return handled.count

    async def requests(self, queue: str, count: int, watch: Watch) -> list[float]:
        asks = Queue(queue, bytes, reply=bytes)
        bus = self.bus()

        @bus.responder(asks)
        async def answer(body: bytes) -> bytes:
            return body

        async with bus.running():
            return await round_trips(partial(bus.request, asks, BODY), count, watch)
