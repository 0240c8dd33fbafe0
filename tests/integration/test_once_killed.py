"""Effectively once under kills and faults: consumers die at the worst points, again and again, and their links break; the effects in the
database are counted.

The same is done without a store, where effects must come twice: else the kills would prove nothing.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from tests.integration.once_child import WORK, main

from unibus import Bus, deadletter
from unibus_contracts import supply
from unibus_contracts.chaos.proxy import Proxy
from unibus_contracts.chaos.run import proxied

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.integration.once_child"])
PATIENCE = 200.0  # seconds: only a failure waits for it
MESSAGES = 60
KILLS = {"rabbitmq": 6, "kafka": 3, "redis": 6, "sqs": 3}  # where a lease or session has to end first, each takes long
STRIKES = 2  # of each fault
PART = 20  # messages of each
MUTE = 2.5  # seconds: longer than the leases and sessions below, so that others get what is held
RUNS = 4  # of each child before it is killed
ANYWHERE = ("before the ack", "in the handler", "before the commit")
AROUND = ("before the ack", "in the handler")

# What the broker needs to give out again soon what a killed consumer held.
# On Kafka two partitions at least, else one of two consumers stands by.
QUICK = {"rabbitmq": "", "kafka": "session_timeout=1&heartbeat=0.2&partitions=4", "redis": "lease=2", "sqs": "lease=3"}

pytestmark = pytest.mark.timeout(300)


def named(name: str) -> str:
    """A server that was to be tested and isn't there is a failure, not a skip."""
    if value := os.environ.get(name):
        return value
    pytest.fail(f"{name} is not set; `make integration` does that")


async def cut(proxy: Proxy) -> None:
    assert proxy.cut(), "no link was in use"


async def torn(proxy: Proxy) -> None:
    proxy.tear()


async def unanswered(proxy: Proxy) -> None:
    """What is done is not told, settlements above all; then all links break."""
    before = proxy.withheld
    proxy.mute = True
    await asyncio.sleep(MUTE)
    assert proxy.withheld > before
    proxy.cut()
    proxy.heal()


FAULTS = (cut, torn, unanswered)


class Trial:
    """One queue, one table, and the children that work there."""

    def __init__(self, broker: str, store: str, database: str, folder: Path) -> None:
        url, tag = named(f"UNIBUS_TEST_{broker.upper()}_URL"), uuid4().hex[:8]
        if more := QUICK[broker]:
            url += ("&" if "?" in url else "?") + more
        self.broker = broker
        self.table = f"effects_{tag}"
        self.engine: AsyncEngine = create_async_engine(database)
        self.orders: dict[str, Any] = {
            "url": url,
            "prefix": f"test-once-{tag}.",
            "store": store,
            "table": self.table,
            "database": database,
            "redis": os.environ.get("UNIBUS_TEST_REDIS_URL"),
            "log": str(folder / "children.log"),
        }
        self.kills = KILLS[broker]
        self.log = folder / "children.log"
        self.log.touch()
        self.children: list[ForkServerProcess] = []
        self.bus = Bus(url, channels=[WORK], config=False, environ={}, service="once", prefix=self.orders["prefix"])

    def start(self, point: str | None) -> ForkServerProcess:
        child = FORKS.Process(target=main, args=({**self.orders, "point": point, "runs": RUNS},))
        child.start()
        self.children.append(child)
        return child

    async def effects(self) -> Counter[str]:
        async with self.engine.connect() as connection:
            return Counter((await connection.execute(text(f"SELECT body FROM {self.table}"))).scalars())  # noqa: S608

    @asynccontextmanager
    async def behind_a_proxy(self) -> AsyncIterator[Proxy]:
        """From here on the children reach the broker through it."""
        (broker,) = supply.running([self.broker])
        async with proxied(broker) as (proxy, url):
            more = QUICK[self.broker]
            self.orders["url"] = url + (("&" if "?" in url else "?") + more if more else "")
            yield proxy

    async def struck(self) -> Counter[str]:
        """Send, and let two children work while their links break again and again; the effects once all is through."""
        async with self.bus, self.behind_a_proxy() as proxy:
            workers, sent = [self.start(None), self.start(None)], 0

            async def both_work() -> bool:  # who has not begun yet would not begin without a link
                nonlocal sent
                if len(await self.effects()) < sent:
                    return False
                if len(await self.pids()) == len(workers):
                    return True
                await self.bus.send_many(WORK, [f"w{sent + k}" for k in range(PART)])
                sent += PART
                return False

            await self.reach(both_work, "both children work")
            for n, fault in enumerate(FAULTS * STRIKES):
                await self.bus.send_many(WORK, [f"m{n}.{k}" for k in range(PART)])

                async def begun(done: int = sent + n * PART) -> bool:
                    return len(await self.effects()) > done

                await self.reach(begun, f"effects of part {n}")
                await fault(proxy)

            async def all_through() -> bool:
                assert {worker.exitcode for worker in workers} == {None}, self.log.read_text()[-4000:]
                found = await self.bus.backlog(WORK)
                whole = sent + len(FAULTS) * STRIKES * PART
                return len(await self.effects()) == whole and not (found.ready or found.in_flight)

            await self.reach(all_through, "all messages are handled")
            assert proxy.torn == STRIKES
            for worker in workers:
                worker.terminate()
            await self.reach(lambda: asyncio.sleep(0, all(w.exitcode is not None for w in workers)), "they drain")
            assert [worker.exitcode for worker in workers] == [0, 0], self.log.read_text()[-4000:]
            assert [letter async for letter in deadletter.browse(self.bus, WORK)] == []
            return await self.effects()

    async def pids(self) -> set[int]:
        async with self.engine.connect() as connection:
            return set((await connection.execute(text(f"SELECT DISTINCT pid FROM {self.table}"))).scalars())  # noqa: S608

    async def reach(self, there: Any, what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not await there():
            assert time.monotonic() < deadline, f"not reached: {what}\n{self.log.read_text()[-4000:]}"
            await asyncio.sleep(0.02)

    async def killed(self, points: tuple[str, ...]) -> Counter[str]:
        """Send, and let two children at a time work and die; the effects once all is through."""
        bodies = [f"m{n}" for n in range(MESSAGES)]
        async with self.bus:
            await self.bus.send_many(WORK, bodies)
            schedule, at_work, deaths = cycle(points), dict[Any, str](), list[str]()

            async def next_death() -> bool:
                for child in [child for child in at_work if child.exitcode is not None]:
                    assert child.exitcode == -9, self.log.read_text()[-4000:]  # it was killed, and by nothing else
                    deaths.append(at_work.pop(child))
                while len(at_work) < 2 and len(at_work) + len(deaths) < self.kills:
                    point = next(schedule)
                    at_work[self.start(point)] = point
                return len(deaths) == self.kills

            await self.reach(next_death, f"{self.kills} kills")
            assert set(deaths) == set(points)
            last = self.start(None)

            async def all_through() -> bool:
                assert last.exitcode is None, self.log.read_text()[-4000:]
                found = await self.bus.backlog(WORK)
                return len(await self.effects()) == MESSAGES and not (found.ready or found.in_flight)

            await self.reach(all_through, "all messages are handled")
            last.terminate()
            await self.reach(lambda: asyncio.sleep(0, last.exitcode is not None), "it drains")
            assert last.exitcode == 0, self.log.read_text()[-4000:]
            assert [letter async for letter in deadletter.browse(self.bus, WORK)] == []
            effects = await self.effects()
            assert set(effects) == set(bodies)
            return effects


@pytest.fixture
async def trial(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Trial]:
    broker, store, database = request.param
    if database == "sqlite":
        where = f"sqlite+aiosqlite:///{tmp_path}/effects.db"
    else:
        where = named("UNIBUS_TEST_POSTGRESQL_URL").replace("postgresql://", "postgresql+asyncpg://", 1)
    it = Trial(broker, store, where, tmp_path)
    async with it.engine.begin() as connection:
        await connection.execute(text(f"CREATE TABLE {it.table} (body varchar(20), pid int)"))
    yield it
    for child in it.children:
        child.kill()
        child.join()
        child.close()
    async with it.engine.begin() as connection:
        await connection.execute(text(f"DROP TABLE {it.table}"))
        await connection.execute(text(f"DROP TABLE IF EXISTS {it.table}_done"))
    await it.engine.dispose()


def trials(*rows: tuple[str, str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("trial", rows, indirect=True, ids=["-".join(row) for row in rows])


@trials(*((broker, "sql", "postgresql") for broker in QUICK))
async def test_in_the_handlers_transaction_each_effect_is_there_once(trial: Trial) -> None:
    effects = await trial.killed(ANYWHERE)
    assert set(effects.values()) == {1}, effects.most_common(10)


@trials(*((broker, "sql", "postgresql") for broker in QUICK))
async def test_where_links_break_each_effect_is_there_once(trial: Trial) -> None:
    effects = await trial.struck()
    assert set(effects.values()) == {1}, effects.most_common(10)


@trials(("redis", "redis", "sqlite"))
async def test_with_a_store_elsewhere_no_effect_is_repeated_that_was_recorded(trial: Trial) -> None:
    """Killed before the ack, or before the effect; between the effect and its mark no store can help."""
    effects = await trial.killed(AROUND)
    assert set(effects.values()) == {1}, effects.most_common(10)


@trials(("rabbitmq", "none", "postgresql"), ("redis", "none", "postgresql"))
async def test_where_links_break_without_a_store_effects_are_repeated(trial: Trial) -> None:
    """Not on Kafka and SQS, where a settlement whose answer was lost is simply asked for again."""
    effects = await trial.struck()
    assert sum(effects.values()) > len(effects), effects.most_common(10)


@trials(*((broker, "none", "postgresql") for broker in QUICK))
async def test_without_a_store_effects_are_repeated(trial: Trial) -> None:
    """So that the tests above can fail."""
    effects = await trial.killed(("before the ack",))
    assert sum(effects.values()) >= MESSAGES + trial.kills, effects.most_common(10)
