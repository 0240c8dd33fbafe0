"""All cases on one broker."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from statistics import quantiles
from typing import Any

from benchmarks import backlog, cold, fanout, growth, tools, workers
from benchmarks.cases import Case
from benchmarks.flows import TURN, Contestant, Flow, Plan, Stage, measure, rotated
from benchmarks.goals import CONFLUENT_ENGINE
from benchmarks.growth import Growth
from benchmarks.load import Miscount
from benchmarks.unibus import Unibus
from benchmarks.watch import Profiles, Watch

NAMES = {"rabbitmq": "RabbitMQ", "kafka": "Kafka", "redis": "Redis", "sqs": "SQS"}
_ENGINES = {"kafka": {"confluent": CONFLUENT_ENGINE}}  # of URLs as kafka+confluent://, where an adapter has it
_RIVALS = {  # modules and classes
    "rabbitmq": (("faststream", "Rabbit"), ("mq_bridge", "MqBridge")),
    "kafka": (("confluent", "Confluent"), ("confluent", "Futures"), ("faststream", "Kafka"), ("mq_bridge", "MqBridge")),
    "redis": (("faststream", "Redis"), ("mq_bridge", "MqBridge")),
    "sqs": (("mq_bridge", "MqBridge"),),
}


@dataclass
class Measured:
    """`failed`: what has no figures, and why."""

    cases: list[Case] = field(default_factory=list)
    grown: list[Growth] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    version: str = "?"

    async def attempt(self, what: str, work: Awaitable[Sequence[Case]]) -> None:
        """What goes wrong is left out, and said; the others go on."""
        print(f"measuring {what}", file=sys.stderr)
        try:
            self.cases += await work
        except Exception as error:
            if not isinstance(error, Miscount):
                traceback.print_exc()
            self.failed.append(f"{what}: {error}")
            print(f"error: {self.failed[-1]}", file=sys.stderr)


async def run(kind: str, url: str, plan: Plan, profiles: Profiles) -> Measured:
    name, module = NAMES[kind], import_module(f"benchmarks.{kind}")
    ours, stage = Unibus(url, module.PREFETCH), Stage(url)
    contestants: list[Contestant] = [ours]
    if not profiles:
        contestants += module.contestants(url)
        if plan.rivals:
            contestants += [*engines(kind, url, module.PREFETCH), *rivals(kind, url)]
    found = Measured(version=await stage.version())
    for flow in plan.flows if "flows" in plan.parts else ():
        work = measure(name, stage, contestants, flow, plan, profiles)
        await found.attempt(f"{name}: {flow.title or 'send and consume'}", work)
    parts: dict[str, Callable[[], Awaitable[Sequence[Case]]]] = {
        "fan-out": lambda: fanout.measure(name, url, stage, plan),
        "requests": lambda: _requests(name, stage, contestants[:2], plan, profiles),
        "cold": lambda: cold.measure(kind, name, url, stage, plan, module.BASE),
        "workers": lambda: workers.measure(kind, name, url, stage, plan),
        "backlog": lambda: backlog.measure(name, url, stage, plan.backlog),
    }
    for part, begin in parts.items():
        if part in plan.parts:
            await found.attempt(f"{name}: {part}", begin())
    if "growth" in plan.parts:
        found.grown = await growth.measure(kind, name, url, stage)
    return found


def engines(kind: str, url: str, prefetch: int) -> list[Contestant]:
    """The bus again, over other clients of the same broker: those whose URL scheme an installed adapter has."""
    known = {point.name for point in entry_points(group="unibus.adapters")}
    scheme, rest = url.split(":", 1)
    return [
        Unibus(f"{scheme}+{engine}:{rest}", prefetch, name)
        for engine, name in _ENGINES.get(kind, {}).items()
        if f"{scheme}+{engine}" in known
    ]


def rivals(kind: str, url: str) -> list[Contestant]:
    """Other libraries, where they are installed, and the broker's own tool; what is missing is said."""
    found: list[Contestant] = []
    for module, name in _RIVALS[kind]:
        try:
            found.append(getattr(import_module(f"benchmarks.{module}"), name)(url))
        except ImportError as error:
            print(f"{NAMES[kind]}: without {error.name}: pip install 'unibus[bench]'", file=sys.stderr)
    return found + tools.of(kind, url)


async def _requests(broker: str, stage: Stage, contestants: list[Any], plan: Plan, profiles: Profiles) -> list[Case]:
    case = Case(f"{broker}: request and reply, one at a time", contestants[-1].name if len(contestants) > 1 else None)
    for number in range(plan.rounds):
        for contestant in rotated(contestants, number):
            watch = Watch(profiles.of(case.name, plan.requests))
            try:
                async with asyncio.timeout(TURN), stage.queue(Flow(), declare=True) as queue, contestant:
                    times = await contestant.requests(queue, plan.requests, watch)
            except TimeoutError as error:
                raise Miscount(f"{contestant.name} has not all replies after {TURN:.0f} s") from error
            cuts = quantiles(times, n=100)
            cpu = watch.figures(plan.requests)["CPU µs/message"]
            case.add(contestant.name, {"p50 ms": cuts[49] * 1e3, "p99 ms": cuts[98] * 1e3, "CPU µs/round trip": cpu})
    return [case]
