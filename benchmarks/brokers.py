"""All cases on one broker."""

from __future__ import annotations

import asyncio
import sys
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
    "kafka": (("confluent", "Confluent"), ("faststream", "Kafka"), ("mq_bridge", "MqBridge")),
    "redis": (("faststream", "Redis"), ("mq_bridge", "MqBridge")),
    "sqs": (("mq_bridge", "MqBridge"),),
}


async def run(kind: str, url: str, plan: Plan, profiles: Profiles) -> tuple[list[Case], list[Growth], str]:
    """The cases, how cost grew, and the broker's version."""
    name, module = NAMES[kind], import_module(f"benchmarks.{kind}")
    ours, stage = Unibus(url, module.PREFETCH), Stage(url)
    contestants: list[Contestant] = [ours]
    if not profiles:
        contestants += module.contestants(url)
        if plan.rivals:
            contestants += [*engines(kind, url, module.PREFETCH), *rivals(kind, url)]
    found: list[Case] = []
    if "flows" in plan.parts:
        for flow in plan.flows:
            found += await measure(name, stage, contestants, flow, plan, profiles)
    if "fan-out" in plan.parts:
        found.append(await fanout.measure(name, url, stage, plan))
    if "requests" in plan.parts:
        found.append(await _requests(name, stage, contestants[:2], plan, profiles))
    if "cold" in plan.parts:
        found.append(await cold.measure(kind, name, url, stage, plan, module.BASE))
    if "workers" in plan.parts:
        found.append(await workers.measure(kind, name, url, stage, plan))
    grown = await growth.measure(kind, name, url, stage) if "growth" in plan.parts else []
    if "backlog" in plan.parts:
        found.append(await backlog.measure(name, url, stage, plan.backlog))
    return found, grown, await stage.version()


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


async def _requests(broker: str, stage: Stage, contestants: list[Any], plan: Plan, profiles: Profiles) -> Case:
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
    return case
