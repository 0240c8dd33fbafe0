"""Cold start: a new interpreter imports, connects, sends one message and handles it. Beside the raw client, which does the same."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from benchmarks import children
from benchmarks.cases import Case
from benchmarks.flows import Flow, Plan, Stage, rotated
from benchmarks.unibus import UNIBUS
from unibus.url import parse

_LONGEST = 60.0


async def measure(kind: str, broker: str, url: str, stage: Stage, plan: Plan, base: str) -> Case:
    """Seconds of each step, and of the whole process from outside: the interpreter's own start is in that one."""
    case = Case(f"{broker}: cold start", base)
    own = known(kind, url)
    for number in range(plan.rounds):
        for name, client in rotated([(UNIBUS, "unibus"), (base, kind)], number):
            async with stage.queue(Flow(), declare=True) as queue:
                case.add(name, await _child(client, {**own, "queue": queue}))
                await stage.expect(queue, 0, f"after the first message of {name}")
    case.samples = {name: case.samples[name] for name in (UNIBUS, base)}
    return case


def known(kind: str, url: str) -> dict[str, Any]:
    """What a client has to know; there is a password in it."""
    if kind == "kafka":
        from benchmarks.kafka import options

        return {"url": url, "options": options(url)}
    if kind == "sqs":
        found = parse(url)
        secret = found.password.value if found.password is not None else None
        return {
            "url": url,
            "options": {
                "region_name": found.hosts[0][0],
                "endpoint_url": found.query.get("endpoint_url"),
                "aws_access_key_id": found.username,
                "aws_secret_access_key": secret,
            },
        }
    return {"url": url}


async def _child(client: str, own: dict[str, Any]) -> dict[str, float]:
    begun = perf_counter()
    steps: dict[str, float] = await children.ask("benchmarks.first_message", own, _LONGEST, client)
    whole = perf_counter() - begun
    return {**{f"{step} ms": seconds * 1e3 for step, seconds in steps.items()}, "whole process ms": whole * 1e3}
