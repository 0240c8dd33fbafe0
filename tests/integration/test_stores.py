"""Stores of what was handled, on real servers: what each has to do, alike; and what a handler can rely on."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import TextClause, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from unibus import Bus, ConfigError, Delivery, Message, Queue, RetryPolicy
from unibus.clock import SystemClock
from unibus.stores import MemoryStore, Standing, Store, StoreUnavailable
from unibus.stores.redis import RedisStore
from unibus.stores.sql import SqlStore

KINDS = ("memory", "redis", "sqlite", "postgresql")
SQL = ("sqlite", "postgresql")
PATIENCE = 30.0  # seconds: only a failure waits for it
SHORT = 0.2  # seconds of a lease that is to end
Q = Queue[str]("q", str)


def named(name: str) -> str:
    """A server that was to be tested and isn't there is a failure, not a skip."""
    if value := os.environ.get(name):
        return value
    pytest.fail(f"{name} is not set; `make integration` does that")


def engine_of(kind: str, folder: Path, **options: Any) -> AsyncEngine:
    if kind == "sqlite":
        engine = create_async_engine(f"sqlite+aiosqlite:///{folder}/handled.db", **options)
        # What a file's sync to the disk takes is of no interest here.
        event.listen(engine.sync_engine, "connect", lambda raw, _: raw.execute("PRAGMA synchronous = OFF"))
        return engine
    url = named("UNIBUS_TEST_POSTGRESQL_URL")
    return create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://", 1), **options)


async def nothing(body: str) -> None: ...


def sql(statement: str, table: str) -> TextClause:
    """`%` stands for the table, since a name can't be a parameter."""
    return text(statement.replace("%", table))


Make = Callable[..., Awaitable[Any]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Stores of a kind, ready; two of one kind share what they remember, as two processes would."""
    table = f"handled_{uuid4().hex}"
    opened: list[Store] = []
    engines: list[AsyncEngine] = []
    memory = MemoryStore()

    async def make(kind: str, **times: float) -> Any:
        store: Any
        if kind == "memory":
            store = memory
            memory.__dict__.update(times)
        elif kind == "redis":
            store = RedisStore(named("UNIBUS_TEST_REDIS_URL"), **times)
        else:
            engines.append(engine_of(kind, tmp_path))
            store = SqlStore(engines[-1], table=table, **times)
        store.open(SystemClock())
        opened.append(store)
        await store.create()
        return store

    yield make
    for store in opened:
        await store.close()
    for engine in engines:
        async with engine.begin() as connection:
            await connection.execute(sql("DROP TABLE IF EXISTS %", table))
        await engine.dispose()


@pytest.fixture
def key() -> tuple[str, str]:
    return ("shop.orders", uuid4().hex)


async def until(probe: Callable[[], Awaitable[object]], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not await probe():
        assert time.monotonic() < deadline, f"not in time: {what}"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_key_is_free_then_in_progress_then_done(kind: str, make: Make, key: tuple[str, str]) -> None:
    ours, theirs = await make(kind), await make(kind)
    assert await ours.begin(key, "a") is Standing.OURS
    assert await theirs.begin(key, "b") is Standing.TAKEN
    assert await ours.begin(key, "a") is Standing.OURS  # again, since an answer may be lost
    assert await theirs.renew([key], "b") == [False]
    assert await ours.renew([key, (key[0], "nobody's")], "a") == [True, False]
    assert not await theirs.finish(key, "b")
    await theirs.free(key, "b")
    assert await theirs.begin(key, "b") is Standing.TAKEN
    assert await ours.finish(key, "a")
    assert await theirs.begin(key, "b") is Standing.DONE
    assert await ours.begin(key, "a") is Standing.DONE
    assert not await ours.finish(key, "a")
    await ours.free(key, "a")  # what is done stays done
    assert await ours.renew([key], "a") == [False]
    assert await theirs.begin(key, "b") is Standing.DONE
    assert await theirs.begin((key[0] + "2", key[1]), "b") is Standing.OURS


@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_freed_can_be_taken(kind: str, make: Make, key: tuple[str, str]) -> None:
    store = await make(kind)
    assert await store.begin(key, "a") is Standing.OURS
    await store.free(key, "a")
    assert await store.begin(key, "b") is Standing.OURS
    assert not await store.finish(key, "a")  # the late owner
    assert await store.finish(key, "b")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_lease_ends_unless_it_is_renewed(kind: str, make: Make, key: tuple[str, str]) -> None:
    store, renewed = await make(kind, lease=SHORT), (key[0], f"{key[1]} renewed")
    begun = time.monotonic()
    assert await store.begin(key, "killed") is Standing.OURS
    assert await store.begin(renewed, "alive") is Standing.OURS
    store.lease = 60.0
    in_time = await store.renew([renewed], "alive") == [
        True
    ]  # else this machine was too busy, and there is nothing to see

    async def taken_over() -> bool:
        return await store.begin(key, "heir") is Standing.OURS

    await until(taken_over, "the lease ends")
    assert time.monotonic() - begun > SHORT * 0.9
    assert not await store.finish(key, "killed")
    if in_time:
        assert await store.begin(renewed, "heir") is Standing.TAKEN


@pytest.mark.parametrize("kind", KINDS)
async def test_a_run_that_succeeded_after_its_lease_counts_unless_another_has_begun(
    kind: str, make: Make, key: tuple[str, str]
) -> None:
    store = await make(kind, lease=SHORT)
    assert await store.begin(key, "late") is Standing.OURS

    async def free() -> bool:
        return bool(await store.begin((key[0], f"{key[1]} beside"), "other") is Standing.OURS)

    assert await store.begin((key[0], f"{key[1]} beside"), "first") is Standing.OURS
    await until(free, "leases that begun then are over")
    await store.tidy()
    assert await store.finish(key, "late")
    assert await store.begin(key, "other") is Standing.DONE


@pytest.mark.parametrize("kind", KINDS)
async def test_a_mark_is_kept_for_its_time_and_then_removed(kind: str, make: Make, key: tuple[str, str]) -> None:
    store = await make(kind, lease=SHORT, keep=SHORT)
    assert await store.begin(key, "a") is Standing.OURS
    assert await store.finish(key, "a")

    async def forgotten() -> bool:
        return await store.begin(key, "b") is Standing.OURS

    await until(forgotten, "it is forgotten")


@pytest.mark.parametrize("kind", SQL)
async def test_old_rows_are_removed_in_steps(
    kind: str, make: Make, key: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unibus.stores.sql.SOME", 10)
    monkeypatch.setattr("unibus.stores.sql.STEPS", 2)
    store: SqlStore = await make(kind, lease=SHORT, keep=SHORT)
    for n in range(25):
        await store.begin((key[0], f"{n}"), "a")
        await store.finish((key[0], f"{n}"), "a")

    async def rows() -> int:
        async with store._engine.connect() as connection:
            return int((await connection.execute(sql("SELECT count(*) FROM %", store._table.fullname))).scalar_one())

    async def all_old() -> bool:
        return await store.begin((key[0], "24"), "b") is Standing.OURS

    await until(all_old, "all are old")
    await store.finish((key[0], "24"), "b")
    store.keep = 1000.0
    assert await store.begin((key[0], "new"), "a") is Standing.OURS
    assert await store.finish((key[0], "new"), "a")
    before = await rows()
    await store.tidy()
    assert await rows() == before - 20  # no more at once
    await asyncio.gather(store.tidy(), store.tidy())  # as two processes

    async def removed() -> bool:
        await store.tidy()
        return await rows() == 1

    await until(removed, "all that is old is removed")
    assert await store.begin((key[0], "new"), "b") is Standing.DONE


@pytest.mark.parametrize("kind", KINDS)
async def test_of_many_who_begin_at_once_one_wins(kind: str, make: Make, key: tuple[str, str]) -> None:
    stores = [await make(kind) for _ in range(3)]
    for n in range(10):
        it = (key[0], f"{key[1]} {n}")
        found = await asyncio.gather(*(store.begin(it, f"{i}") for i, store in enumerate(stores * 2)))
        winners = {i % 3 for i, standing in enumerate(found) if standing is Standing.OURS}
        tokens = [i for i, standing in enumerate(found) if standing is Standing.OURS]
        assert len(tokens) == 1, (winners, found)
        assert [await stores[0].finish(it, f"{i}") for i in range(6)].count(True) == 1


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "renew", "finish", "free", "tidy"]), st.sampled_from("xy"), st.sampled_from("abc")
    ),
    max_size=15,
)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_store_answers_as_the_one_in_memory(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any steps, in any order, by three processes: the one in memory is the specification."""
    folder, table = tmp_path_factory.mktemp("stores"), f"handled_{uuid4().hex}"

    async def play(store: Any, place: str, steps: list[tuple[str, str, str]]) -> list[object]:
        answers: list[object] = []
        for step, name, token in steps:
            if step == "tidy":
                answers.append(await store.tidy())
            elif step == "renew":
                answers.append(list(await store.renew([(place, name)], token)))
            else:
                answers.append(await getattr(store, step)((place, name), token))
        return answers

    with asyncio.Runner() as runner:
        engine = None if kind == "redis" else engine_of(kind, folder)
        store: Any = RedisStore(named("UNIBUS_TEST_REDIS_URL")) if engine is None else SqlStore(engine, table=table)
        store.open(SystemClock())
        runner.run(store.create())

        @settings(max_examples=15, database=None, deadline=None)
        @given(STEPS)
        def alike(steps: list[tuple[str, str, str]]) -> None:
            place = uuid4().hex
            expected = runner.run(play(MemoryStore(), place, steps))
            assert runner.run(play(store, place, steps)) == expected

        async def end() -> None:
            await store.close()
            if engine is not None:
                async with engine.begin() as connection:
                    await connection.execute(sql("DROP TABLE %", table))
                await engine.dispose()

        try:
            alike()
        finally:
            runner.run(end())


# Tables


@pytest.mark.parametrize("kind", SQL)
async def test_the_table_is_made_by_declare_and_missed_by_verify(kind: str, tmp_path: Path) -> None:
    engine = engine_of(kind, tmp_path)
    table = f"handled_{uuid4().hex}"
    store = SqlStore(engine, table=table)

    def bus(declare: Any) -> Bus:
        made = Bus(f"memory://{table}", config=False, environ={}, service="t", declare=declare)
        made.consumer(Q, idempotency=store)(nothing)
        return made

    try:
        async with Bus(f"memory://{table}", channels=[Q], config=False, environ={}):
            pass  # so that the queue is there
        with pytest.raises(ConfigError, match=f"{table}.*there is no such table; `unibus declare` makes it"):
            async with bus("verify"):
                pass
        async with bus("assume"):
            pass
        await asyncio.gather(store.create(), SqlStore(engine, table=table).create())  # two processes that start
        async with bus("verify"), bus("create"):
            pass
        async with engine.begin() as connection:
            await connection.execute(sql("ALTER TABLE % DROP COLUMN token", table))
        with pytest.raises(ConfigError, match="lacks token"):
            await store.verify()
    finally:
        async with engine.begin() as connection:
            await connection.execute(sql("DROP TABLE IF EXISTS %", table))
        await engine.dispose()


async def test_databases_and_names_that_can_not_be(tmp_path: Path) -> None:
    engine = engine_of("sqlite", tmp_path)
    for table in ("a; drop table b", "a.b.c", "", "a b", 'a"b'):
        with pytest.raises(ConfigError, match="table="):
            SqlStore(engine, table=table)
    with pytest.raises(ConfigError, match="one connection for all"):
        SqlStore(create_async_engine("sqlite+aiosqlite://"))
    for wrong in (async_sessionmaker(), "sqlite://"):
        with pytest.raises(ConfigError, match="give it an AsyncEngine"):
            SqlStore(wrong)  # type: ignore[arg-type]  # the mistake that is meant
    for url in ("http://x", "localhost:6379"):
        with pytest.raises(ConfigError, match="begins with redis://"):
            RedisStore(url)
    await engine.dispose()


def test_no_credential_is_shown() -> None:
    redis = RedisStore("redis://user:SECRET@127.0.0.1:1/0?password=SECRET")
    sql = SqlStore(create_async_engine("postgresql+asyncpg://user:SECRET@127.0.0.1:1/x"))
    wrong = RedisStore("redis://user:SECRET@127.0.0.1:port/0")
    with pytest.raises(ConfigError) as caught:
        wrong.open(SystemClock())
    assert "SECRET" not in f"{redis!r} {sql!r} {wrong!r} {caught.value}"


async def test_a_server_that_is_not_there_is_unavailable_and_says_no_secret() -> None:
    engine = create_async_engine("postgresql+asyncpg://user:SECRET@127.0.0.1:1/x")
    for store in (RedisStore("redis://user:SECRET@127.0.0.1:1/0"), SqlStore(engine)):
        store.open(SystemClock())
        for step in (store.begin(("q", "1"), "a"), store.create(), store.verify(), store.renew([("q", "1")], "a")):
            with pytest.raises(StoreUnavailable) as caught:
                await step
            assert "SECRET" not in str(caught.value)
        await store.close()
    await engine.dispose()


# In the handler's own transaction


@pytest.mark.parametrize("kind", SQL)
async def test_effects_and_mark_share_a_transaction(kind: str, tmp_path: Path) -> None:
    """A failure rolls back; a commit by the handler is refused; a constraint that breaks at the end is a failed attempt."""
    engine = engine_of(kind, tmp_path)
    tag = uuid4().hex
    store = SqlStore(async_sessionmaker(engine), table=f"handled_{tag}")
    bus = Bus("memory://", config=False, environ={}, service="t")
    seen: list[tuple[str, int]] = []
    failed: list[str] = []

    @bus.consumer(Q, idempotency=store, retry=RetryPolicy(max_retries=1, backoff=0), concurrency=1)
    async def handle(body: str, session: AsyncSession, delivery: Delivery[str]) -> None:
        seen.append((body, delivery.attempt))
        await session.execute(sql("INSERT INTO % VALUES (:body)", f"effects_{tag}"), {"body": body})
        if body == "fails once" and delivery.attempt == 1:
            raise OSError("once")
        if body == "undoes a part":
            async with session.begin_nested() as part:
                await session.execute(sql("INSERT INTO % VALUES ('undone')", f"effects_{tag}"))
                await part.rollback()
        if body == "commits":
            try:
                await session.commit()
            except ConfigError as error:
                failed.append(str(error))
                raise

    async def effects() -> list[str]:
        async with engine.connect() as connection:
            return sorted((await connection.execute(sql("SELECT body FROM %", f"effects_{tag}"))).scalars())

    async with engine.begin() as connection:
        deferred = (
            "body varchar(50) UNIQUE DEFERRABLE INITIALLY DEFERRED" if kind == "postgresql" else "body text UNIQUE"
        )
        await connection.execute(text(f"CREATE TABLE effects_{tag} ({deferred})"))
        await connection.execute(sql("INSERT INTO % VALUES ('there already')", f"effects_{tag}"))
    try:
        async with bus.running():
            for body in ("plain", "fails once", "undoes a part", "commits", "there already"):
                await bus.send(Q, Message(body, id=body))

            async def over() -> bool:
                return bus.counts.get("handled") == 3 and bus.counts.get("dead_lettered") == 2

            await until(over, "all are handled or dead")
            assert await effects() == ["fails once", "plain", "there already", "undoes a part"]
            for body in ("plain", "fails once"):
                await bus.send(Q, Message(body, id=body))

            async def repeated() -> bool:
                return bus.counts.get("repeated") == 2

            await until(repeated, "copies are acked")
        assert sorted(seen) == sorted(
            [("plain", 1), ("fails once", 1), ("fails once", 2), ("undoes a part", 1)]
            + [(body, attempt) for body in ("commits", "there already") for attempt in (1, 2)]
        )
        assert len(failed) == 2
        assert "does not commit its session" in failed[0]
        assert await effects() == ["fails once", "plain", "there already", "undoes a part"]
    finally:
        async with engine.begin() as connection:
            await connection.execute(sql("DROP TABLE %", f"effects_{tag}"))
            await connection.execute(sql("DROP TABLE IF EXISTS %", f"handled_{tag}"))
        await engine.dispose()


@pytest.mark.parametrize("kind", SQL)
async def test_a_transaction_whose_key_was_taken_over_leaves_nothing(
    kind: str, make: Make, key: tuple[str, str]
) -> None:
    store: SqlStore = await make(kind, lease=SHORT)
    tag = f"effects_{uuid4().hex}"
    async with store._engine.connect() as connection:
        await connection.execute(sql("CREATE TABLE % (body varchar(50))", tag))
    assert await store.begin(key, "late") is Standing.OURS

    async def taken_over() -> bool:
        return await store.begin(key, "heir") is Standing.OURS

    await until(taken_over, "the lease ends")
    async with store.transaction(key, "late") as work:
        await work.resource.execute(sql("INSERT INTO % VALUES ('late')", tag))
        assert not await work.commit()
    async with store.transaction(key, "heir") as work:
        await work.resource.execute(sql("INSERT INTO % VALUES ('heir')", tag))
        assert await work.commit()
    async with store._engine.connect() as connection:
        assert list((await connection.execute(sql("SELECT body FROM %", tag))).scalars()) == ["heir"]
        await connection.execute(sql("DROP TABLE %", tag))
    assert await store.begin(key, "third") is Standing.DONE


async def test_two_transactions_of_one_key_can_not_both_commit(make: Make, key: tuple[str, str]) -> None:
    """Even if both believe that the key is theirs: the row decides."""
    store: SqlStore = await make("postgresql")
    assert await store.begin(key, "a") is Standing.OURS

    async def run() -> bool:
        async with store.transaction(key, "a") as work:
            await work.resource.execute(text("SELECT 1"))
            return await work.commit()

    assert sorted(await asyncio.gather(run(), run())) == [False, True]
