"""What is measured: flows, and their turns. One contestant after the other, round by round, each on a queue of its own."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol, Self

from benchmarks.cases import OURS, Case
from benchmarks.load import BODY, IN_FLIGHT, TENANT, Miscount, body
from benchmarks.watch import Profiles, Watch
from unibus import Bus, Queue
from unibus_contracts.cleanup import Made, remove

EACH = ", ack each"
SETTLES_IN = 10.0  # seconds until a broker has counted the last acks
LEAST = 100  # messages in a turn
TURN = 300.0  # seconds that nobody needs, even on a busy machine


class NoBroker(Exception):
    """There is no such broker to be had; the text says why."""


@dataclass(frozen=True)
class Flow:
    """Send so many, then consume them. `prefetch` 0: what suits the broker best.

    `sends`, `consumes`: what of it is shown. `share`: of the messages of a round, where a case is slow. The rest, from `many`
    on, is what only unibus has.
    """

    title: str = ""
    prefetch: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = BODY
    in_flight: int = IN_FLIGHT
    sends: bool = True
    consumes: bool = True
    share: float = 1.0
    many: bool = False
    by_hand: bool = False
    at_most_once: bool = False
    keys: int = 0
    failing: int = 0  # each so many'th message fails once

    @property
    def beside(self) -> int:
        """How many others are measured beside unibus."""
        if self.many or self.by_hand or self.at_most_once or self.keys or self.failing:
            return 0
        return 99 if self == Flow() else 1


HEADLINE = (Flow(),)
FLOWS = (
    *HEADLINE,
    Flow("prefetch 20, the default", 20, sends=False),
    Flow("one header of the user's", headers=TENANT),
    Flow("one at a time", in_flight=1, consumes=False, share=0.1),
    Flow("send_many", many=True, consumes=False),
    Flow("at most once", at_most_once=True, sends=False),
    Flow("by hand", by_hand=True, sends=False),
    Flow("100 B", body=body(100)),
    Flow("1 kB", body=body(1_000)),
    Flow("64 kB", body=body(64_000), share=0.1),
    Flow("ordered, 1 key", keys=1, share=0.2),
    Flow("ordered, 100 keys", keys=100, share=0.5),
    Flow("ordered, 100,000 keys", keys=100_000, share=0.5),
    Flow("1 % retried after 1 s", failing=100, sends=False),
    Flow("10 % retried after 1 s", failing=10, sends=False),
)


class Contestant(Protocol):
    """`leaves`: entries stay behind after they were settled; `declares` its queue; `only_sends`; `untried`: it knows how to warm up."""

    name: str
    leaves: bool
    declares: bool
    only_sends: bool
    untried: bool

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...
    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None: ...
    async def consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int: ...


class Raw:
    """What a contestant is that does what all can do, with every message, on a queue made for it."""

    leaves = False
    declares = False
    only_sends = False
    untried = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int:
        raise NotImplementedError(type(self).__name__)  # who only sends is not asked


class Stage:
    """A broker: queues that unibus makes for one turn, with its own arguments, and looks at from outside; gone afterwards."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._prefix = f"bench-{secrets.token_hex(4)}"
        self._made = 0

    def name(self) -> str:
        self._made += 1
        return f"{self._prefix}-{self._made}"

    @asynccontextmanager
    async def queue(self, flow: Flow, *, declare: bool) -> AsyncIterator[str]:
        name = self.name()
        channel = Queue(name, bytes, ordered=bool(flow.keys))
        async with self.made(name):
            if declare:
                async with self._bus(channel):
                    pass  # so that it is there
            async with self._bus(channel, declare="assume") as self._looking:
                yield name

    @asynccontextmanager
    async def made(self, *names: str) -> AsyncIterator[None]:
        """These, and what unibus makes beside them, are deleted at the end."""
        try:
            yield
        finally:
            left = (await remove(self._bus(declare="assume"), Made(self._prefix, set(names), delays={1.0}))).left
            if left is not None:
                raise Miscount(f"{', '.join(names)} could not be deleted: {left}")

    def _bus(self, *channels: Queue[Any], **settings: Any) -> Bus:
        return Bus(self._url, channels=channels, service="bench", config=False, environ={}, **settings)

    async def version(self) -> str:
        async with self._bus(declare="assume") as bus:
            return bus.capabilities.version or "?"

    async def expect(self, queue: str, messages: int, when: str) -> None:
        """The broker's own count. It may lag behind a little. Raises Miscount."""
        deadline = monotonic() + SETTLES_IN
        while (left := await self._looking.backlog(queue)).ready + (left.in_flight or 0) != messages:
            if monotonic() > deadline:
                raise Miscount(f"the broker has {left.ready} messages and {left.in_flight} out, not {messages}, {when}")
            await asyncio.sleep(0.1)


@dataclass(frozen=True)
class Plan:
    """`seconds`: what sending or consuming may take in one turn; the slow ones get fewer messages, not more time."""

    rounds: int
    messages: int
    seconds: float
    requests: int
    flows: Sequence[Flow]
    parts: frozenset[str]
    rivals: bool = True
    backlog: int = 0


def find_broker(kind: str) -> tuple[str, str]:
    """URL, and where it is from. The URL has a password in it: not to be shown. Raises NoBroker."""
    variable = f"UNIBUS_TEST_{kind.upper()}_URL"
    try:
        from unibus_contracts import supply
    except ImportError as error:
        if url := os.environ.get(variable):
            return url, "environment"
        raise NoBroker(f"the broker supply can't be imported ({error}); set {variable}") from error
    try:
        broker = supply.start(kind)  # the one of the environment, where it names one
    except (supply.SupplyError, OSError) as error:
        raise NoBroker(str(error)) from error
    return broker.url, broker.source


async def measure(
    broker: str, stage: Stage, contestants: Sequence[Contestant], flow: Flow, plan: Plan, profiles: Profiles
) -> list[Case]:
    """The second contestant is the base. One whose name ends in EACH sends like the one before it: that isn't shown."""
    contestants = contestants[: 1 + flow.beside]
    rounds, seconds = (plan.rounds, plan.seconds) if flow.beside > 1 else (min(3, plan.rounds), plan.seconds / 2)
    base = contestants[1].name if len(contestants) > 1 else None
    after = f", {flow.title}" if flow.title else ""
    sends = Case(f"{broker}: send{after}", base)
    consumes = Case(f"{broker}: consume{after}", base)
    most = round(plan.messages * flow.share)
    planned = {}
    for contestant in list(contestants):
        try:
            planned[contestant.name] = await _fitting(stage, contestant, flow, most, seconds)
        except Miscount as error:
            if contestant.name in {OURS, base}:
                raise
            print(f"{broker}: without {contestant.name}: {error}", file=sys.stderr)
    contestants = [contestant for contestant in contestants if contestant.name in planned]
    for number in range(rounds):
        for contestant in rotated(contestants, number):
            name, messages = contestant.name, planned[contestant.name]
            send = Watch(profiles.of(sends.name, messages))
            consume = Watch(profiles.of(consumes.name, messages))
            await _turn(stage, contestant, flow, messages, send, consume)
            if flow.consumes and not contestant.only_sends:
                consumes.add(name, consume.figures(messages))
            if flow.sends and not name.endswith(EACH):  # sends like the other one
                sends.add(name, send.figures(messages))
    order = [contestant.name for contestant in contestants]
    for case in (sends, consumes):  # the rounds began with another one each time
        case.samples = {name: case.samples[name] for name in order if name in case.samples}
    return [case for case in (sends, consumes) if case.samples]


async def _fitting(stage: Stage, contestant: Contestant, flow: Flow, most: int, seconds: float) -> int:
    """How many messages of a flow one has time for; the trial warms it up, too."""
    trial, send, consume = max(LEAST, most // 20), Watch(), Watch()
    if contestant.untried:
        return fitting(most, most)
    await _turn(stage, contestant, flow, trial, send, consume)
    if flow.failing:  # the wait for the retries is the same for few and for many
        return fitting(most, most)
    return fitting(trial * 2 * seconds / (send.wall + consume.wall), most)


async def _turn(stage: Stage, contestant: Contestant, flow: Flow, messages: int, send: Watch, consume: Watch) -> None:
    """One contestant, one round: fill a new queue, see that all is there, empty it, see that nothing is left."""
    try:
        async with asyncio.timeout(TURN), stage.queue(flow, declare=not contestant.declares) as queue:
            async with contestant:
                await contestant.send(queue, messages, flow, send)
                await stage.expect(queue, messages, f"sent by {contestant.name}")
                if contestant.only_sends:
                    return
                handled = await contestant.consume(queue, messages, flow, consume)
            if handled != messages:
                raise Miscount(f"{contestant.name}: {messages} were in the queue, {handled} handled")
            if not contestant.leaves:  # with its connection closed, what it has not acked is back in the queue
                await stage.expect(queue, 0, f"after {contestant.name} had handled all")
    except TimeoutError as error:
        raise Miscount(f"{contestant.name} is not through with {messages} messages after {TURN:.0f} s") from error


def fitting(fits: float, planned: int) -> int:
    """How many messages: as planned, or what fits; whole hundreds, which is what tools with batches of their own can send."""
    return max(LEAST, round(min(fits, planned) / LEAST) * LEAST)


def rotated(contestants: Sequence[Any], by: int) -> list[Any]:
    """Nobody always comes first, or always after the same one."""
    at = by % len(contestants)
    return [*contestants[at:], *contestants[:at]]
