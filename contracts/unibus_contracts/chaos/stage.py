"""What faults get at, and how they say what came of them."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from unibus_contracts.chaos.proxy import Proxy
from unibus_contracts.chaos.workers import Worker
from unibus_contracts.supply import Broker, Cluster


class NoBite(Exception):
    """The fault was injected and nothing shows an effect. The run proves nothing about it."""


@dataclass
class Stage:
    """What faults can get at."""

    broker: Broker
    proxy: Proxy
    consumers: list[Worker]
    random: random.Random
    pause: float  # seconds that a fault lasts
    cluster: Cluster | None = None  # that the broker is the first node of; its clients don't use the proxy
    proof: str = ""  # how the last fault is known to have bitten
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # of what faults add, such as consumers


Fault = Callable[[Stage], AbstractAsyncContextManager[None]]


def bit(stage: Stage, count: int, what: str) -> None:
    """The proof, in numbers. Raises NoBite for none."""
    if not count:
        raise NoBite(f"no {what}")
    stage.proof = f"{count} {what}"


async def reaches(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for it, so long at most; whether it came."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not condition():
        if loop.time() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True
