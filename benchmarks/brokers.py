"""All cases on one broker."""

from __future__ import annotations

import asyncio
import sys
from importlib import import_module
from statistics import quantiles
from typing import Any

from benchmarks import backlog, fanout
from benchmarks.cases import Case
from benchmarks.flows import TURN, Contestant, Flow, Plan, Stage, measure, rotated
from benchmarks.load import Miscount
from benchmarks.unibus import Unibus
from benchmarks.watch import Profiles, Watch

NAMES = {"rabbitmq": "RabbitMQ", "kafka": "Kafka", "redis": "Redis", "sqs": "SQS"}
_RIVALS = {"rabbitmq": "Rabbit", "kafka": "Kafka", "redis": "Redis"}  # classes of benchmarks.faststream


async def run(kind: str, url: str, plan: Plan, profiles: Profiles) -> tuple[list[Case], str]:
    """The cases, and the broker's version."""
    name, module = NAMES[kind], import_module(f"benchmarks.{kind}")
    ours, stage = Unibus(url, module.PREFETCH), Stage(url)
    if plan.backlog:
        return [await backlog.measure(name, url, stage, plan.backlog)], await stage.version()
    contestants: list[Contestant] = [ours]
    if not profiles:
        contestants += module.contestants(url)
        if plan.rivals:
            contestants += rivals(kind, url)
    found: list[Case] = []
    for flow in plan.flows:
        found += await measure(name, stage, contestants, flow, plan, profiles)
    if plan.fan_out:
        found.append(await fanout.measure(name, url, stage, plan))
    if plan.requests:
        found.append(await _requests(name, stage, contestants[:2], plan, profiles))
    return found, await stage.version()


def rivals(kind: str, url: str) -> list[Contestant]:
    """Other libraries, where they are installed; what is missing is said once."""
    found: list[Contestant] = []
    try:
        if kind in _RIVALS:
            found.append(getattr(import_module("benchmarks.faststream"), _RIVALS[kind])(url))
        found.append(import_module("benchmarks.mq_bridge").MqBridge(url))
    except ImportError as error:
        print(f"{NAMES[kind]}: without {error.name}: pip install 'unibus[bench]'", file=sys.stderr)
    return found


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
