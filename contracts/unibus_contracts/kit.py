"""What a contract works with: buses, channels of its own, and ways to wait that are bounded and never a fixed sleep."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, fields
from typing import Any, Generic, TypeVar
from urllib.parse import unquote, urlsplit

import pytest

from unibus import Bus, ConfigError, Delivery, NotFound, Queue, RetryPolicy, Topic, deadletter
from unibus.adapter import Declared, Outcome, Source, Topology
from unibus.capabilities import Capabilities, Support
from unibus.channel import dead_letter_queue, invalid_queue

from .channels import AssumingHarness
from .harness import Harness, NotTried, nowhere

T = TypeVar("T")
Place = Queue[Any] | tuple[Topic[Any], str]  # where messages wait: a queue, or a topic's group

FACTOR = float(os.environ.get("UNIBUS_TEST_TIMEOUT_FACTOR", "1"))
SOON = 10.0 * FACTOR  # seconds within which what must happen has happened
LIMIT = 45.0 * FACTOR  # seconds a contract may take in all
GONE = 5.0 * FACTOR  # seconds after which a broker that can't be reached any more has gone, and is not restarting
POLL = 0.005
FEATURES = tuple(field.name for field in fields(Capabilities) if field.type == Support.__name__)
SENTINEL = b"sentinel-"
TAKEN = 1000  # dead letters held at once, where they can only be looked at by taking them

# Few and short, because a broker may need a queue of its own for each different wait of a run.
AT_ONCE = RetryPolicy(max_retries=2, backoff=0)
LATER = RetryPolicy(max_retries=2, backoff=1, multiplier=1)
NEVER = RetryPolicy(max_retries=0)


async def until(condition: Callable[[], object], what: str, timeout: float = SOON) -> None:
    """Return once the condition holds; fail, saying what was waited for, when it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        await asyncio.sleep(POLL)


async def eventually(
    probe: Callable[[], Awaitable[T]], enough: Callable[[T], object], what: str, timeout: float = SOON
) -> T:
    """The first answer of the probe that is good enough."""
    deadline = time.monotonic() + timeout
    while not enough(answer := await probe()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}; last answer: {answer!r}")
        await asyncio.sleep(POLL * 10)
    return answer


class Seen(Generic[T]):
    """What handlers have noted, in order; also from threads."""

    def __init__(self) -> None:
        self.all: list[T] = []

    def __call__(self, item: T) -> None:
        self.all.append(item)

    def __len__(self) -> int:
        return len(self.all)

    async def reach(self, count: int) -> list[T]:
        """All that was noted, once it is `count` or more."""
        await until(lambda: len(self.all) >= count, f"{count} noted, {len(self.all)} so far")
        return list(self.all)


async def take(receiver: Any, count: int = 1, timeout: float = SOON) -> list[Delivery[Any]]:
    """The next `count` deliveries of a receiver, not settled."""
    taken: list[Delivery[Any]] = []
    while len(taken) < count:
        delivery = await receiver.receive(timeout=timeout)
        assert delivery is not None, f"{len(taken)} of {count} messages arrived within {timeout:g} s"
        taken.append(delivery)
    return taken


async def leftover(bus: Bus, place: Place) -> list[Delivery[Any]]:
    """All that still waits at a place whose bodies are bytes. It is taken away.

    Proves absence without waiting: a sentinel is sent now, and what had been there before comes before it.
    """
    sentinel = SENTINEL + os.urandom(8).hex().encode()
    found: list[Delivery[Any]] = []
    channel, group = place if isinstance(place, tuple) else (place, None)
    async with bus.receiver(channel, group=group, prefetch=100) as receiver, asyncio.TaskGroup() as acks:
        if isinstance(channel, Topic):
            await bus.publish(channel, sentinel)
        else:
            await bus.send(channel, sentinel)
        while True:
            (delivery,) = await take(receiver)
            acks.create_task(delivery.ack())  # beside the next one: a round trip each would be most of the time
            if delivery.body == sentinel:
                return found
            if not delivery.body.startswith(SENTINEL):  # of another group of this topic
                found.append(delivery)


async def letters(bus: Bus, place: Place, count: int = 1, *, invalid: bool = False) -> list[Delivery[Any]]:
    """The dead letters of a queue or group, once there are `count` of them. They stay where they are.

    `invalid`: those of its invalid-message channel instead. Where the adapter refuses to browse, they are taken and given back.
    """
    channel, group = place if isinstance(place, tuple) else (place, None)

    async def look() -> list[Delivery[Any]]:
        if not bus.capabilities.browse:
            return await _taken(bus, channel, group, invalid=invalid)
        return [letter async for letter in deadletter.browse(bus, channel, group=group, invalid=invalid)]

    found = await eventually(look, lambda found: len(found) >= count, f"{count} dead letters")
    assert len(found) == count, f"{len(found)} dead letters instead of {count}"
    return found


async def _taken(
    bus: Bus, channel: Queue[Any] | Topic[Any], group: str | None, *, invalid: bool
) -> list[Delivery[Any]]:
    """What `deadletter.browse` would show, received by hand."""
    session = bus._opened()
    codec, address = session.codec(channel), session.address(channel, group)
    dead = invalid_queue(address) if invalid else dead_letter_queue(address)
    waiting = await bus.adapter.backlog(dead)
    left = waiting.ready if waiting.exact else TAKEN
    if not left:
        return []
    subscription = await bus.adapter.subscribe(Source(dead, prefetch=TAKEN))
    found: list[Delivery[Any]] = []
    try:
        while left > len(found) and (more := await subscription.receive(left - len(found), deadletter.QUIET)):
            found += more
        if bus.capabilities.release:  # else they go back as the subscription ends
            failed = [e for e in await subscription.settle(Outcome.RELEASED, found) if e is not None]
            assert not failed, f"dead letters that can't be given back: {failed[0]!r}"
    finally:
        await subscription.stop()
        await subscription.close()
    for delivery in found:
        delivery.message.correlation_id = delivery.message.correlation_id or delivery.message.id
        delivery.body = deadletter.readable(codec, delivery.message)
    return found


async def handed_over(kit: Kit) -> int:
    """The attempt number of a message that failed once in a process, which was then cut off in the middle of the next run."""
    queue, seen = kit.queue(), Seen[int]()
    first = kit.bus(shutdown_timeout=0.2)

    @first.consumer(queue, retry=AT_ONCE)
    async def fail(body: bytes, delivery: Delivery[bytes]) -> None:
        seen(delivery.attempt)
        if delivery.attempt == 1:
            raise OSError("once")
        await asyncio.Event().wait()

    async with first.running():
        await first.send(queue, b"x")
        assert await seen.reach(2) == [1, 2]
    async with kit.bus(queue) as heir, heir.receiver(queue) as receiver:
        (delivery,) = await take(receiver)
        await delivery.ack()
        return delivery.attempt


def bodies(deliveries: Iterable[Delivery[Any]]) -> list[Any]:
    return [delivery.body for delivery in deliveries]


def _as_dict(capabilities: Capabilities) -> dict[str, Any]:
    """What a report says of the adapter: it travels as JSON."""
    features = {name: asdict(support) for name, support in capabilities.features().items()}
    told = {field.name: getattr(capabilities, field.name) for field in fields(capabilities)}
    numbers = {name: value for name, value in told.items() if name not in {"adapter", "version", *FEATURES}}
    return {"adapter": capabilities.adapter, "version": capabilities.version, "features": features, "numbers": numbers}


def checked(capabilities: object) -> Capabilities:
    """The same; fails where it is something else. What stands in it was checked when it was made."""
    assert isinstance(capabilities, Capabilities), f"capabilities are {type(capabilities).__name__}, no Capabilities"
    return capabilities


def _not_tried(error: BaseException) -> str | None:
    """Why this error says nothing of the adapter; None: it does. Also out of a task group."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_not_tried, error.exceptions)), None)
    return str(error) if isinstance(error, NotTried) else None


class Kit:
    """One contract's hand luggage. `note` tells the plugin what the outcome stands for."""

    def __init__(self, harness: Harness, shared: dict[str, Any], note: Callable[[str, Any], None]) -> None:
        self.harness = harness
        self._shared = shared  # the same for every contract of the run: what is asked of the broker once
        self._note = note

    async def run(
        self,
        contract: Callable[[Kit], Awaitable[None]],
        needs: str | None,
        refusal: Callable[[Kit], Awaitable[None]] | None,
        limit: float,
    ) -> None:
        """The contract, or where its capability is declared refused, the proof that it is."""
        capabilities = await self.capabilities()
        self._note("unibus_capabilities", _as_dict(capabilities))
        refused = not (needs is None or refusal is None or getattr(capabilities, needs))
        try:
            async with asyncio.timeout(limit):
                if isinstance(self.harness, AssumingHarness):
                    await self.harness.empty()
                await (refusal if refused and refusal is not None else contract)(self)
        except (Exception, pytest.fail.Exception) as error:
            reason = _not_tried(error)
            if reason is None:
                if gone := await self._gone():
                    self._note("unibus_gone", gone)
                raise
            self._note("unibus_not_tried", reason)
            pytest.skip(f"not tried: {reason}")
        if refused:
            self._note("unibus_refused", needs)

    async def _gone(self) -> str | None:
        """Why the broker, which was there when the run began, can't be reached any more. None: it can, or comes back."""
        deadline = time.monotonic() + GONE
        while True:
            answered = False
            try:
                async with asyncio.timeout(GONE), self.harness.bus():
                    answered = True
            except (ConnectionError, TimeoutError) as error:
                why = f"{type(error).__name__}: {error}"
            except Exception:
                answered = True  # a refusal is an answer
            if answered:  # that it is slow to close is another matter
                return None
            if time.monotonic() > deadline:
                return why
            await asyncio.sleep(POLL * 10)

    def bus(self, *known: Queue[Any] | Topic[Any] | tuple[Topic[Any], str], **settings: Any) -> Bus:
        """A bus, not open, that knows these channels and groups beside those of its handlers.

        A group is declared as services do it, by a handler; so a bus that was given one is opened, but not run.
        """
        bus = self.harness.bus(channels=[one[0] if isinstance(one, tuple) else one for one in known], **settings)
        for one in known:
            if isinstance(one, tuple):

                @bus.subscriber(one[0], group=one[1])
                async def never(body: Any) -> None:
                    raise AssertionError("this bus is not for running")

        return bus

    def queue(self, body: Any = bytes, *, label: str = "q", **features: Any) -> Queue[Any]:
        return Queue(self.harness.channel(label), body, **features)

    def named_queue(self, name: str) -> Queue[Any]:
        """A queue of bytes whose name a contract has made of one of its own."""
        return Queue(name, bytes)

    def topic(self, body: Any = bytes, *, label: str = "t", **features: Any) -> Topic[Any]:
        return Topic(self.harness.channel(label), body, **features)

    async def capabilities(self) -> Capabilities:
        """What the connected adapter declares. Where there is none to be had, the contract fails and the run ends: no other would
        do better.
        """
        if "capabilities" not in self._shared and "error" not in self._shared:
            try:
                async with self.harness.bus() as bus:
                    self._shared["capabilities"] = checked(bus.capabilities)
            except (AssertionError, ConfigError) as error:
                self._shared["error"] = str(error)
            except Exception as error:
                self._shared["error"] = f"the broker can't be reached: {type(error).__name__}: {error}"
        if "error" in self._shared:
            self._note("unibus_unusable", self._shared["error"])
            # Not with its traceback: pytest prints the arguments of each frame, and one is the URL with its password.
            pytest.fail(self._shared["error"], pytrace=False)
        found: Capabilities = self._shared["capabilities"]
        return found

    def nowhere(self, password: str) -> str | None:
        """The tested URL with a port where nobody listens, and this password. None: it names no host."""
        return nowhere(self.harness.url, password)

    def password(self) -> str | None:
        """The password of the tested broker, if there is one that could be recognised."""
        password = unquote(urlsplit(self.harness.url).password or "") or getattr(self.harness, "more", {}).get(
            "password"
        )
        return password if password and len(password) > 5 else None

    def where(self) -> str:
        """The tested broker in one line, for a child process."""
        return json.dumps([self.harness.url, getattr(self.harness, "more", {})])

    def creates(self) -> None:
        """The contract needs to make something at a certain moment. Raises NotTried where nothing may be made."""
        if isinstance(self.harness, AssumingHarness):
            raise NotTried("it makes channels while it runs")

    async def alone(self, queue: Queue[Any]) -> str:
        """Make a queue without the channels that belong to it, as far as the adapter does; the text that tells what is missing."""
        self.creates()
        async with self.bus() as bus:
            await bus.adapter.declare(Topology("create", (Declared(queue, self.harness.prefix + queue.name),)))
        try:
            async with self.bus(queue, declare="verify"):
                return ""
        except NotFound as error:
            return str(error)
