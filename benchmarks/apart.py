"""Each broker's cases in a process of their own.

In one process for all, Kafka's consumers, who came second, were up to a tenth slower, and not all of them alike: what the cases before
them had left of the memory was in pieces.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks import brokers
from benchmarks.flows import Plan
from benchmarks.watch import Profiles


def run(kind: str, url: str, plan: Plan, profiles: Profiles, *, uvloop: bool) -> brokers.Measured:
    """Raises Miscount. What is profiled stays in this process, as the profiles do."""
    if profiles:
        return _measured(kind, url, plan, profiles)
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=prepare, initargs=(uvloop,)) as process:
        return process.submit(_measured, kind, url, plan, profiles).result()


def prepare(uvloop_too: bool) -> None:
    """Of each process: how it logs, and its event loop."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("unibus").setLevel(logging.ERROR)  # else it says each retry
    if uvloop_too:
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def _measured(kind: str, url: str, plan: Plan, profiles: Profiles) -> brokers.Measured:
    return asyncio.run(brokers.run(kind, url, plan, profiles))
