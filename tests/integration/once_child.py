"""A service that is killed at a chosen point, in a process that was forked from one which has imported everything.

For each message it adds a row to a table, in the transaction of its store, or in its own where it has none or one that is elsewhere. At the
chosen point of the chosen run it kills itself (SIGKILL), so that nothing of it gets a chance to clean up.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import aiosqlite  # noqa: F401  # imported before the fork, as the next ones are
import asyncpg  # type: ignore[import-untyped]  # noqa: F401
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

import unibus.config  # noqa: F401
import unibus_kafka  # noqa: F401
import unibus_rabbitmq  # noqa: F401
import unibus_redis  # noqa: F401
import unibus_sqs  # noqa: F401
from unibus import Bus, Queue, RetryPolicy, retry
from unibus.delivery import Delivery
from unibus.intake import Intake
from unibus.retry import Verdict
from unibus.stores.redis import RedisStore
from unibus.stores.sql import SqlStore

WORK = Queue[str]("work", str)
LEASE = 1.0  # seconds: what a killed process was at runs again after that

Orders = dict[str, Any]


class Trap:
    """Springs at the nth time that a point is reached. No point: never."""

    def __init__(self, point: str | None, runs: int) -> None:
        self.point = point
        self.left = runs

    def __call__(self, point: str) -> None:
        if point == self.point:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)


def before_the_ack(trap: Trap) -> None:
    """A run has succeeded, all of it is committed, and the broker is not told yet."""
    finish = Intake.finish

    def trapped(self: Intake, delivery: Delivery[Any], verdict: Verdict) -> None:
        if verdict is retry.ACK:
            trap("before the ack")
        finish(self, delivery, verdict)

    Intake.finish = trapped  # type: ignore[method-assign]  # that is the injection


def build(orders: Orders) -> tuple[Bus, Any]:
    trap = Trap(orders["point"], orders["runs"])
    before_the_ack(trap)
    engine = create_async_engine(orders["database"])
    sessions = async_sessionmaker(engine)
    statement = text(f"INSERT INTO {orders['table']} VALUES (:body, :pid)")  # noqa: S608  # our own name
    bus = Bus(orders["url"], config=False, environ={}, service="once", prefix=orders["prefix"])
    options: dict[str, Any] = {
        # A store elsewhere can't help a run between its effect and its mark: so nobody is there when a neighbour springs the trap.
        "concurrency": 1 if orders["store"] == "redis" else 3,
        "retry": RetryPolicy(max_retries=0),
    }  # what fails is seen as a dead letter

    async def work(body: str, session: AsyncSession) -> None:
        trap("in the handler")
        await session.execute(statement, {"body": body, "pid": os.getpid()})
        trap("before the commit")

    async def alone(body: str) -> None:
        async with sessions() as session:
            await work(body, session)
            await session.commit()

    if orders["store"] == "sql":
        bus.consumer(WORK, idempotency=SqlStore(sessions, table=f"{orders['table']}_done", lease=LEASE), **options)(
            work
        )
    elif orders["store"] == "redis":
        bus.consumer(WORK, idempotency=RedisStore(orders["redis"], lease=LEASE), **options)(alone)
    else:
        bus.consumer(WORK, **options)(alone)
    return bus, engine


async def serve(orders: Orders) -> None:
    bus, engine = build(orders)
    try:
        await bus.run()
    finally:
        await engine.dispose()


def main(orders: Orders) -> None:
    with Path(orders["log"]).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    asyncio.run(serve(orders))
