"""How cost grows: one thing varied by a thousand, or as far as the broker goes; the rest stays as it is.

A process for each point (benchmarks.growth_point). What is judged is the cost of one unit of work: total work of n log n
means that it grows by log n.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

from benchmarks import children
from benchmarks.flows import Flow, Stage
from benchmarks.load import Miscount

NOISE = 2.0  # a cost that was measured once, on a machine that does other things too
_SPARE = 8.0  # MB of buffers and arenas that come and go
_LONGEST = 300.0


@dataclass(frozen=True)
class Variable:
    """`points` of what varies; `messages` over which it does. `limits`: up to where on which broker, and why not further."""

    name: str
    unit: str
    points: tuple[int, ...]
    messages: int = 0
    limits: dict[str, tuple[int, str]] | None = None

    def on(self, kind: str) -> tuple[tuple[int, ...], str]:
        most, why = (self.limits or {}).get(kind, (self.points[-1], ""))
        return tuple(point for point in self.points if point <= most), why


_SLOW = "ministack, an emulator, is too slow for more"
VARIABLES = (
    Variable("messages", "message", (100, 1_000, 10_000, 100_000), 0, {"sqs": (1_000, _SLOW)}),
    Variable(
        "keys", "message", (10, 100, 1_000, 10_000), 5_000, {"sqs": (0, "an order by key needs FIFO queues there")}
    ),
    Variable(
        "groups",
        "handling",
        (1, 10, 100, 1_000),
        100,
        {
            "rabbitmq": (100, "a thousand quorum queues are more than one node makes in a minute"),
            "kafka": (10, "each group is a consumer with connections of its own"),
            "redis": (100, "each group reads over a connection of its own"),
            "sqs": (10, _SLOW),
        },
    ),
    Variable("messages in flight", "message", (10, 100, 1_000, 10_000), 10_000, {"sqs": (1_000, _SLOW)}),
    Variable("messages waiting for a retry", "message", (10, 100, 1_000, 10_000), 0, {"sqs": (1_000, _SLOW)}),
    Variable("bytes a body", "byte", (100, 1_000, 10_000, 100_000), 500, {"sqs": (100_000, "")}),
)

Points = Sequence[dict[str, float]]
Growth = dict[str, Any]  # broker, variable, unit, points, limit: why it went no further, if it didn't


def faster(points: Points) -> float:
    """By how much the last unit cost grew beyond log n, from where it was lowest before; up to NOISE is not worse than n log n."""
    *before, last = [(point["n"], point["CPU µs"]) for point in points]
    return max((last[1] / cost / (log(last[0] + 1) / log(n + 1)) for n, cost in before if cost), default=1.0)


def worse(points: Points) -> bool:
    """Worse than n log n."""
    return faster(points) > NOISE


def grows(points: Points) -> bool:
    """Memory with what varies, more than its tenth fold needs anyway. For what waits on a broker, not in the process."""
    before, last = [point["MB"] for point in points[:-1]], points[-1]["MB"] if points else 0.0
    return bool(before) and last > before[-1] * 1.25 + _SPARE


def verdict(own: Growth) -> str:
    """What is wrong with it; nothing, mostly. Memory is judged where a backlog waits on a broker, not in this process."""
    found = ["worse than n log n"] if own["points"] and worse(own["points"]) else []
    if own["variable"] == "messages" and own["broker"] != "memory" and grows(own["points"]):
        found.append("memory grows with the backlog")
    return ", ".join(found)


def lines(grown: Sequence[Growth]) -> list[str]:
    """For people: what each cost at its points, and the judgement."""
    found = []
    for own in grown:
        costs = "; ".join(f"{point['n']:,}: {point['CPU µs']:.3g} µs, {point['MB']:.1f} MB" for point in own["points"])
        said = verdict(own).upper() or "not worse than n log n"
        what = f"{costs} ({said})" if costs else f"not measured: {own['limit']}"
        found.append(f"{own['broker']}, {own['variable']}, CPU a {own['unit']}: {what}")
    return found


async def measure(kind: str, broker: str, url: str, stage: Stage | None) -> list[Growth]:
    """What varied, with its points. `stage` None: the memory adapter, which needs nobody to delete what it made."""
    found = []
    for variable in VARIABLES:
        wanted, why = variable.on(kind)
        points = []
        for n in wanted:
            try:
                points.append({"n": n, **await _point(kind, url, stage, variable, n)})
            except Miscount as error:
                why = f"{n:,}: {error}"
                print(f"{broker}: {variable.name}: {why}", file=sys.stderr)
                break
        found.append(
            {"broker": broker, "variable": variable.name, "unit": variable.unit, "points": points, "limit": why}
        )
    return found


async def _point(kind: str, url: str, stage: Stage | None, variable: Variable, n: int) -> dict[str, float]:
    messages = variable.messages // (5 if kind == "sqs" else 1)
    if variable.name == "keys":
        messages = max(messages, n)
    question = {"variable": variable.name, "url": url, "queue": "growth", "n": n, "messages": messages}
    if stage is None:
        return await _asked(question)
    if variable.name == "messages":
        async with stage.queue(Flow(), declare=True) as queue:
            return await _asked({**question, "queue": queue})
    async with stage.made(queue := stage.name()):
        return await _asked({**question, "queue": queue})


async def _asked(question: dict[str, Any]) -> dict[str, float]:
    answer: dict[str, float] = await children.ask("benchmarks.growth_point", question, _LONGEST)
    return answer
