"""What a subscription costs: a topic with 1, 4 and 16 groups, each of which handles every message."""

from __future__ import annotations

import asyncio
from functools import partial

from benchmarks.cases import Case
from benchmarks.flows import TURN, Plan, Stage
from benchmarks.load import BODY, Miscount, flood
from benchmarks.unibus import UNIBUS
from benchmarks.watch import Watch
from unibus import Bus, Topic

GROUPS = (1, 4, 16)


async def measure(broker: str, url: str, stage: Stage, plan: Plan) -> list[Case]:
    case = Case(f"{broker}: publish to so many groups")
    for _ in range(min(3, plan.rounds)):
        figures: dict[str, float] = {}
        for groups in GROUPS:
            messages = max(20, plan.messages // 4 // groups)
            published, handled = Watch(), Watch()
            try:
                async with asyncio.timeout(TURN):
                    await _once(url, stage, groups, messages, published, handled)
            except TimeoutError as error:
                raise Miscount(
                    f"{groups} groups are not through with {messages} messages after {TURN:.0f} s"
                ) from error
            figures[f"published/s, {groups}"] = messages / published.wall
            figures[f"handled/s, {groups}"] = messages * groups / handled.wall
        case.add(UNIBUS, figures)
    return [case]


async def _once(url: str, stage: Stage, groups: int, messages: int, published: Watch, handled: Watch) -> None:
    """All are published, then handled: so that the one's time is not the other's."""
    name = stage.name()
    events = Topic(name, bytes)
    names = [f"{name}-g{n}" for n in range(groups)]
    left = messages * groups
    done = asyncio.Event()

    async def handle(body: bytes) -> None:  # noqa: ARG001  # every handler takes a body
        nonlocal left
        left -= 1
        if not left:
            done.set()

    async with stage.made(name, *names):
        bus = Bus(url, service="bench", config=False, environ={})
        for group in names:
            bus.subscriber(events, group=group, prefetch=100, concurrency=100)(handle)
        async with bus:  # its groups are there from now on
            published.start()
            await flood(partial(bus.publish, events, BODY), messages)
            published.stop()
            handled.start()
            async with bus.running():
                await done.wait()
                handled.stop()
    if left:
        raise Miscount(f"{groups} groups: {-left} messages more than were published")
