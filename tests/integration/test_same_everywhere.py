"""One service on all brokers: its attempts, the headers of its dead letters and its order per key are equal, byte for byte.

The memory adapter is the reference. Times and positions are masked, and nothing else. That the comparison notices a
header that differs is proved on a memory adapter that was tampered with.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import BaseModel

from unibus import Bus, DeadLetter, Delivery, Discard, Message, Queue, Retry, RetryPolicy, Topic, deadletter
from unibus.adapter import Source
from unibus.memory_subscription import MemorySubscription
from unibus.message import (
    CRASH_COUNT,
    ERROR_TYPE,
    FIRST_FAILED_AT,
    LAST_FAILED_AT,
    MOVED_TO_DLQ_AT,
    ORIGINAL_POSITION,
    POLICY_HEADERS,
    REDRIVE_COUNT,
    REPLY_ERROR,
    REPLY_STATUS,
)
from unibus_contracts import supply

BROKERS = ("rabbitmq", "kafka", "redis", "sqs")
DEADLINE = 60.0
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_MASKED = {
    FIRST_FAILED_AT: _STAMP,
    LAST_FAILED_AT: _STAMP,
    MOVED_TO_DLQ_AT: _STAMP,
    ORIGINAL_POSITION: re.compile(".+"),
}


class Job(BaseModel):
    id: str
    what: str = "ok"


class Broken(Exception):
    pass


# What is sent: id of the message -> what its handler does. The rest of the envelope is given, so that nothing is random.
JOBS = {
    "m-ok": "ok",
    "m-twice": "fail-once",
    "m-later": "retry-once",
    "m-always": "fail",
    "m-dead": "dead-letter",
    "m-gone": "discard",
}
KEYS = ("red", "green", "blue")
PER_KEY = 5
RUNS = 10 + 6 + len(KEYS) * PER_KEY + 1  # of jobs, of news in both groups, and in line
LETTERS = 5


class Run:
    """One run of the service, and all that is compared of it."""

    def __init__(self, url: str, prefix: str) -> None:
        self.attempts: dict[str, list[int]] = defaultdict(list)
        self.order: dict[str, list[list[Any]]] = defaultdict(list)
        self.jobs = Queue("jobs", Job)
        self.lined_up = Queue("lined.up", Job, ordered=True)
        self.news = Topic("news", Job)
        self.bus = Bus(url, service="same", prefix=prefix, config=False, environ={})
        policy = RetryPolicy(max_retries=2, backoff=0.1, multiplier=1)
        self.bus.consumer(self.jobs, retry=policy)(self.work)
        self.bus.consumer(self.lined_up, retry=policy)(self.in_line)
        self.bus.subscriber(self.news, group="readers", retry=policy)(self.work)
        self.bus.subscriber(self.news, group="others", retry=policy)(self.other)

    async def work(self, job: Job, delivery: Delivery[Job]) -> None:
        self.attempts[f"{delivery.source.address.name} {delivery.message.id}"].append(delivery.attempt)
        if job.what == "discard":
            raise Discard("not wanted")
        if job.what == "dead-letter":
            raise DeadLetter("never: \u00fc, \u20ac and https://user:secret@host/")
        if job.what == "retry-once" and delivery.attempt == 1:
            raise Retry("in a moment", delay=0.2)
        if job.what == "fail" or (job.what == "fail-once" and delivery.attempt == 1):
            raise Broken(f"{job.id}\nfailed")

    async def other(self, job: Job, delivery: Delivery[Job]) -> None:
        self.attempts[f"others {delivery.message.id}"].append(delivery.attempt)

    async def in_line(self, job: Job, delivery: Delivery[Job]) -> None:
        self.order[str(delivery.message.key)].append([job.id, delivery.attempt])
        if job.what == "fail-once" and delivery.attempt == 1:
            raise Broken("its key waits")

    async def observed(self) -> dict[str, Any]:
        async with self.bus.running():
            await self._send()
            async with asyncio.timeout(DEADLINE):
                letters: dict[str, list[Any]] = {}
                while sum(map(len, letters.values())) < LETTERS:
                    await asyncio.sleep(0.05)
                    letters = await self._letters() if self._ran_all() else {}
            return {
                "attempts": dict(sorted(self.attempts.items())),
                "order": dict(sorted(self.order.items())),
                "letters": letters,
            }

    def _ran_all(self) -> bool:
        runs = sum(map(len, self.attempts.values())) + sum(map(len, self.order.values()))
        counts = self.bus.counts
        return runs >= RUNS and counts.get("dead_lettered", 0) + counts.get("invalid", 0) >= LETTERS

    async def _letters(self) -> dict[str, list[dict[str, Any]]]:
        found = {}
        for of, channel, group in (("jobs", self.jobs, None), ("readers", self.news, "readers")):
            for invalid in (False, True):
                looking = deadletter.browse(self.bus, channel, group=group, invalid=invalid)
                found[f"{of} {'invalid' if invalid else 'dead'}"] = [_seen(delivery) async for delivery in looking]
        return found

    async def _send(self) -> None:
        bus, past = self.bus, 1_000_000_000.0
        for id, what in JOBS.items():
            await bus.send(self.jobs, _message(id, Job(id=id, what=what)))
        await bus.send(self.jobs, _message("m-late", Job(id="m-late"), expires_at=past, correlation_id=None))
        await bus.send(self.jobs, _message("m-odd", b"\x00 not JSON", content_type="application/json"))
        for id in ("m-ok", "m-always"):
            await bus.publish(self.news, _message(f"t-{id}", Job(id=id, what=JOBS[id])))
        for n in range(PER_KEY):
            for key in KEYS:
                what = "fail-once" if n == 1 and key == "green" else "ok"
                await bus.send(self.lined_up, _message(f"{key}-{n}", Job(id=f"{key}-{n}", what=what), key=key))


def _message(id: str, body: Any, **more: Any) -> Message:
    headers = {"tenant": "a\u00e7me", "empty": "", "trace": "x" * 300}
    more = {"key": "k", "correlation_id": "talk", "causation_id": "cause", "type": "Job", **more}
    return Message(body, id, headers=headers, **more)


def _seen(delivery: Delivery[Any]) -> dict[str, Any]:
    """A dead letter without its position, and with times masked where they have the shape of one."""
    message = delivery.message
    headers = dict(sorted(message.headers.items()))
    headers.pop(ORIGINAL_POSITION, None)  # the broker's own; memory has none
    for name, shape in _MASKED.items():
        if shape.fullmatch(headers.get(name, "")):
            headers[name] = "(masked)"
    fields = {
        name: getattr(message, name)
        for name in ("id", "type", "content_type", "key", "correlation_id", "causation_id", "reply_to", "expires_at")
    }
    return {"headers": headers, **fields, "body": message.body.hex()}


def as_bytes(observed: dict[str, Any]) -> bytes:
    """The letters of a channel have no order among them."""
    letters = {of: sorted(found, key=lambda letter: str(letter["id"])) for of, found in observed["letters"].items()}
    return json.dumps({**observed, "letters": letters}, indent=1, ensure_ascii=False).encode()


async def run(url: str) -> bytes:
    return as_bytes(await Run(url, f"same-{secrets.token_hex(4)}.").observed())


@pytest.fixture
async def reference() -> bytes:
    return await run("memory://")


def test_the_reference_is_what_the_policies_say() -> None:
    """Else all could be equal, and wrong."""
    observed = json.loads(asyncio.run(run("memory://")))
    assert observed["attempts"] == {
        **{f"jobs {id}": [1, 2, 3] if id == "m-always" else [1] for id in JOBS},
        "jobs m-twice": [1, 2],
        "jobs m-later": [1, 2],
        "others t-m-always": [1],
        "others t-m-ok": [1],
        "readers t-m-always": [1, 2, 3],
        "readers t-m-ok": [1],
    }
    assert observed["order"]["green"] == [["green-0", 1], ["green-1", 1], ["green-1", 2], *_rest("green", 2)]
    assert observed["order"]["red"] == _rest("red", 0)
    letters = {of: [letter["id"] for letter in found] for of, found in observed["letters"].items()}
    assert letters == {
        "jobs dead": ["m-always", "m-dead", "m-late"],
        "jobs invalid": ["m-odd"],
        "readers dead": ["t-m-always"],
        "readers invalid": [],
    }


def _rest(key: str, first: int) -> list[list[Any]]:
    return [[f"{key}-{n}", 1] for n in range(first, PER_KEY)]


@pytest.mark.timeout(600)  # five services, one after the other
async def test_the_same_service_does_the_same_on_every_broker(reference: bytes) -> None:
    for broker in supply.running(BROKERS):
        assert (await run(broker.url)).decode() == reference.decode(), broker.name


# That it would notice


async def test_a_broker_that_loses_one_header_is_noticed(reference: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saboteur between broker and core, who takes one header off one dead letter."""
    honest = MemorySubscription.receive

    async def receive(self: MemorySubscription, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        found = await honest(self, limit, timeout)
        for delivery in found:
            if self.source.browse and delivery.message.id == "m-dead":
                del delivery.message.headers[ERROR_TYPE]  # type: ignore[attr-defined] # a dict, on memory
        return found

    monkeypatch.setattr(MemorySubscription, "receive", receive)
    assert await run("memory://") != reference


async def test_every_header_of_every_letter_is_compared(reference: bytes) -> None:
    seen: set[str] = set()
    for of, found in json.loads(reference)["letters"].items():
        for number, letter in enumerate(found):
            for name, value in letter["headers"].items():
                seen.add(name)
                changed, without = json.loads(reference), json.loads(reference)
                changed["letters"][of][number]["headers"][name] = f"{value}."
                del without["letters"][of][number]["headers"][name]
                assert reference not in {as_bytes(changed), as_bytes(without)}
    assert as_bytes(json.loads(reference)) == reference, "what was not tampered with is the same"
    never = {ORIGINAL_POSITION, CRASH_COUNT, REDRIVE_COUNT, REPLY_STATUS, REPLY_ERROR}
    assert seen == {"tenant", "empty", "trace"} | (POLICY_HEADERS - never)


@pytest.mark.parametrize("value", ["", "yesterday", "2023-11-14 22:13:20"])
def test_only_a_time_is_masked_as_one(value: str) -> None:
    good = Message(b"", "m", headers={MOVED_TO_DLQ_AT: "2023-11-14T22:13:20.000Z"})
    assert _seen(_delivery(good))["headers"] == {MOVED_TO_DLQ_AT: "(masked)"}
    assert _seen(_delivery(Message(b"", "m", headers={MOVED_TO_DLQ_AT: value})))["headers"] == {MOVED_TO_DLQ_AT: value}


@pytest.mark.parametrize("what", ["attempts", "order"])
async def test_attempts_and_order_are_compared(reference: bytes, what: str) -> None:
    observed = json.loads(reference)
    first = next(found for found in observed[what].values() if len(found) > 1)
    first.reverse()
    assert as_bytes(observed) != reference


def _delivery(message: Message) -> Delivery[Any]:
    return Delivery(message, Source(Queue("q")), None)
