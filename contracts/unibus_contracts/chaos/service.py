"""The work that is done meanwhile: two queues, a topic with two subscriptions, and a queue that is received by hand; a queue
with few messages, never behind others, by which is seen when work goes on after a fault; and a few requests that are answered.

What becomes of a message follows from its number alone, so that every process knows it without asking.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

from pydantic import BaseModel

from unibus import Bus, Delivery, Queue, RetryPolicy, Topic
from unibus_contracts.history import Expected, Recorder

KEYS = 16
WORK = 0.02  # seconds that the handler of every tenth message needs
BY_HAND = 20  # messages that are received by hand at once
PAD = "x" * 160  # so that a body has about 256 bytes


class Item(BaseModel):
    value: str
    key: str
    seq: int
    pad: str = PAD


work = Queue("work", Item)
lined = Queue("lined", Item, ordered=True)
told = Topic("told", Item)
manual = Queue("manual", Item)
pulse = Queue("pulse", Item)
asks = Queue("asks", Item, reply=Item)
GROUPS = ("audit", "billing")
PLACES = (work, lined, told, manual)
CHANNELS = (*PLACES, pulse, asks)
PULSE = "pulse"  # the producer of that queue
ASKER = "asker"  # the requester
ANSWER = 10.0  # seconds it waits for an answer

POLICY = RetryPolicy(max_retries=3, backoff=0.2, multiplier=2)


class Refusal(Exception):
    """What a handler raises that was told to fail."""


def number(value: str) -> int:
    return int(value.rpartition("-")[2])


def place_of(value: str) -> Queue[Item] | Topic[Item]:
    if value.startswith(ASKER):
        return asks
    return pulse if value.startswith(PULSE) else PLACES[number(value) % len(PLACES)]


def value_of(body: bytes) -> str:
    """The value of an encoded Item, without decoding all of it; empty for anything else."""
    begin = body.find(b'"value":"') + 9
    return body[begin : body.index(b'"', begin)].decode() if begin >= 9 else ""


def fails(value: str, attempt: int) -> bool:
    """One message in about a hundred fails once, one in about five hundred always."""
    return number(value) % 503 == 7 or (number(value) % 97 == 5 and attempt == 1)


@dataclass
class Handling:
    """The handlers, writing down what they do."""

    recorder: Recorder

    async def one(self, item: Item, attempt: int, place: str, group: str = "") -> None:
        about: dict[str, str | int] = {
            "value": item.value,
            "place": place,
            "group": group,
            "key": item.key,
        }
        with self.recorder.during("handle", attempt=attempt, **about):
            await asyncio.sleep(WORK if number(item.value) % 10 == 0 else 0)
            if fails(item.value, attempt):
                raise Refusal(item.value)

    def register(self, bus: Bus) -> None:
        @bus.consumer(work, retry=POLICY)
        async def on_work(item: Item, delivery: Delivery[Item]) -> None:
            await self.one(item, delivery.attempt, "work")

        @bus.consumer(lined, retry=POLICY)
        async def on_lined(item: Item, delivery: Delivery[Item]) -> None:
            await self.one(item, delivery.attempt, "lined")

        @bus.consumer(pulse, retry=POLICY)
        async def on_pulse(item: Item, delivery: Delivery[Item]) -> None:
            await self.one(item, delivery.attempt, "pulse")

        @bus.responder(asks)
        async def on_asks(item: Item, delivery: Delivery[Item]) -> Item:
            with self.recorder.during("handle", value=item.value, place="asks", key=item.key, attempt=delivery.attempt):
                return item

        @bus.subscriber(told, group="audit", retry=POLICY)
        async def on_audit(item: Item, delivery: Delivery[Item]) -> None:
            await self.one(item, delivery.attempt, "told", "audit")

        @bus.subscriber(told, group="billing", retry=POLICY)
        async def on_billing(item: Item, delivery: Delivery[Item]) -> None:
            await self.one(item, delivery.attempt, "told", "billing")

    async def by_hand(self, bus: Bus) -> None:
        """Receives from `manual` until cancelled; here the settlement's end is seen too."""
        slots = asyncio.Semaphore(BY_HAND)
        taken: set[asyncio.Task[None]] = set()
        async with bus.receiver(manual) as receiver:
            try:
                async for delivery in receiver:
                    await slots.acquire()
                    task = asyncio.create_task(self.take(delivery))
                    taken.add(task)
                    task.add_done_callback(taken.discard)
                    task.add_done_callback(lambda _: slots.release())
            finally:  # an orderly end leaves nothing half done
                await asyncio.gather(*taken)

    async def take(self, delivery: Delivery[Item]) -> None:
        item = delivery.body
        about: dict[str, str | int] = {"value": item.value, "place": "manual", "key": item.key}
        with self.recorder.during("handle", attempt=delivery.attempt, **about):
            await asyncio.sleep(0)
        try:
            with self.recorder.during("settle", value=item.value, place="manual"):
                await delivery.ack()
        except Exception as error:  # written down as unknown; the message comes again
            print(f"manual: {item.value} was not settled: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def make(url: str, prefix: str) -> Bus:
    return Bus(url, service="chaos", prefix=prefix, config=False, environ={}, channels=CHANNELS)


def expected(bus: Bus) -> Expected:
    """What an open bus promises of this work on its broker."""
    able = bus.capabilities
    return Expected(
        groups={told.name: GROUPS},
        ordered=frozenset({lined.name}) if able.order else frozenset(),
        settle_confirmed=bool(able.settle_confirmed),
        runs=POLICY.max_retries + 1,
        least=100,
    )
