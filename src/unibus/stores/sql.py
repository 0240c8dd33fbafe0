"""A store in a table of the service's own database (extra `sql`): SQLAlchemy 2, on PostgreSQL or SQLite.

A handler that asks for an `AsyncSession` works in the same transaction as its mark: both are committed, or neither.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

try:
    from sqlalchemy import Column, Float, Index, MetaData, String, Table, event, inspect, text
    from sqlalchemy.exc import (
        DBAPIError,
        IntegrityError,
        InterfaceError,
        OperationalError,
        ProgrammingError,
        SQLAlchemyError,
    )
    from sqlalchemy.exc import TimeoutError as PoolTimeout
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session
    from sqlalchemy.pool import StaticPool
    from sqlalchemy.schema import CreateIndex, CreateTable
except ImportError as error:
    raise ImportError("unibus.stores.sql needs SQLAlchemy: pip install 'unibus[sql]'") from error

from unibus.clock import Clock
from unibus.errors import ConfigError
from unibus.idempotency import KEEP, LEASE, Key, Standing, StoreUnavailable
from unibus.stores.checks import seconds

TABLE = "unibus_handled"
SOME = 500  # rows that one step of `tidy` removes
STEPS = 100  # of one `tidy`

# The time is the database's: hosts need not agree on it. Written out, since the rest of the SQL is the same on both.
_NOW = {
    "postgresql": "cast(extract(epoch from clock_timestamp()) as double precision)",
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
}


class SqlStore:
    """Remembers in a table, one row a message: `token` is that of who is at it, NULL once it is done; `until` in epoch seconds.

    `database`: the engine of the service, or what makes its sessions, bound to an engine. Its pool should have one connection more than
    the handlers' concurrency. `table`: its name, with a schema if need be. `lease`, `keep`: seconds, see `unibus.stores.Store`. The engine
    stays the service's own: it is never disposed of here. Raises ConfigError for other databases than PostgreSQL and SQLite.
    """

    def __init__(
        self,
        database: AsyncEngine | async_sessionmaker[Any],
        *,
        table: str = TABLE,
        lease: float = LEASE,
        keep: float = KEEP,
    ) -> None:
        seconds("SqlStore", lease=lease, keep=keep)
        if isinstance(database, AsyncEngine):
            database = async_sessionmaker(database, expire_on_commit=False)
        engine = getattr(database, "kw", {}).get("bind")
        if not isinstance(engine, AsyncEngine):
            raise ConfigError("SqlStore: give it an AsyncEngine, or an async_sessionmaker that is bound to one")
        if engine.dialect.name not in _NOW:
            raise ConfigError(f"SqlStore knows {' and '.join(_NOW)}, not {engine.dialect.name}")
        if isinstance(engine.pool, StaticPool):  # a handler's transaction and the store's own steps would be one
            raise ConfigError("SqlStore: this engine has one connection for all, as SQLite in memory has; use a file")
        if not re.fullmatch(r"([A-Za-z_]\w*\.)?[A-Za-z_]\w*", table, re.ASCII):
            raise ConfigError(
                f"SqlStore(table={table!r}): use a name of letters, digits and _, after its schema if need be"
            )
        self.lease = lease
        self.keep = keep
        self.provides: type = database.class_
        self._sessions = database
        # Each statement below is a transaction by itself, in one round trip.
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._table = _table(table)
        self._sql = _statements(table, engine.dialect.name)

    def __repr__(self) -> str:
        return f"SqlStore({self._engine.dialect.name}, table {self._table.fullname})"

    def open(self, clock: Clock) -> None:
        """The time is that of the database."""

    async def close(self) -> None:
        """The engine is the service's own."""

    async def create(self) -> None:
        async with self._asked() as connection:
            try:
                await connection.execute(CreateTable(self._table, if_not_exists=True))
                for index in self._table.indexes:
                    await connection.execute(CreateIndex(index, if_not_exists=True))
            except (IntegrityError, ProgrammingError):  # PostgreSQL: another process was faster by a moment
                await connection.run_sync(self._check)

    async def verify(self) -> None:
        async with self._asked() as connection:
            await connection.run_sync(self._check)

    def _check(self, connection: Any) -> None:
        table, inspector = self._table, inspect(connection)
        if not inspector.has_table(table.name, schema=table.schema):
            raise ConfigError(f"{self!r}: there is no such table; `unibus declare` makes it, or `await store.create()`")
        there = {column["name"] for column in inspector.get_columns(table.name, schema=table.schema)}
        if missing := {column.name for column in table.columns} - there:
            raise ConfigError(f"{self!r}: the table lacks {', '.join(sorted(missing))}; it is not one of this store's")

    async def begin(self, key: Key, token: str) -> Standing:
        values = {"place": key[0], "id": key[1], "token": token}
        async with self._asked() as connection:
            while True:
                taken = await connection.execute(self._sql["begin"], {**values, "lease": self.lease})
                if taken.first() is not None:
                    return Standing.OURS
                found = (await connection.execute(self._sql["look"], values)).first()
                if found is not None:  # else it was freed between the two
                    return Standing.DONE if found.token is None else Standing.TAKEN

    async def renew(self, keys: Sequence[Key], token: str) -> Sequence[bool]:
        async with self._asked() as connection:
            return [
                bool((await connection.execute(self._sql["renew"], self._values(key, token, self.lease))).rowcount)
                for key in keys
            ]

    async def finish(self, key: Key, token: str) -> bool:
        async with self._asked() as connection:
            return await self._mark(connection, key, token)

    async def free(self, key: Key, token: str) -> None:
        async with self._asked() as connection:
            await connection.execute(self._sql["free"], {"place": key[0], "id": key[1], "token": token})

    async def tidy(self) -> None:
        async with self._asked() as connection:
            for _ in range(STEPS):
                if (await connection.execute(self._sql["tidy"], {"some": SOME})).rowcount < SOME:
                    return

    @asynccontextmanager
    async def transaction(self, key: Key, token: str) -> AsyncIterator[_Work]:
        async with self._sessions() as session:
            yield _Work(self, session, key, token)

    async def _mark(self, connection: AsyncConnection | AsyncSession, key: Key, token: str) -> bool:
        done = await connection.execute(self._sql["finish"], self._values(key, token, self.keep))
        return done.first() is not None

    def _values(self, key: Key, token: str, seconds: float) -> dict[str, object]:
        return {"place": key[0], "id": key[1], "token": token, "seconds": seconds}

    @asynccontextmanager
    async def _asked(self) -> AsyncIterator[AsyncConnection]:
        try:
            async with self._engine.connect() as connection:
                yield connection
        except (SQLAlchemyError, OSError) as error:
            raise self.unavailable(error) from error

    def unavailable(self, error: BaseException) -> StoreUnavailable:
        # `orig`: without the statement and its parameters.
        cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        return StoreUnavailable(f"{self!r}: {type(cause).__name__}: {cause}")


class _Work:
    """One run's transaction. The session is the handler's; only the commit is ours."""

    def __init__(self, store: SqlStore, session: AsyncSession, key: Key, token: str) -> None:
        self.resource = session
        self._store = store
        self._key, self._token = key, token
        self._ours = False
        event.listen(session.sync_session, "before_commit", self._before_commit)

    def _before_commit(self, session: Session) -> None:
        if not self._ours and not session.in_nested_transaction():
            raise ConfigError(
                "a handler with idempotency=SqlStore(...) does not commit its session: its effects and its mark are committed "
                "together once it returns. Use begin_nested() for what may be undone alone"
            )

    async def commit(self) -> bool:
        session = self.resource
        await session.flush()  # what is wrong with the handler's own changes is its own failure
        self._ours = True
        try:
            if not await self._store._mark(session, self._key, self._token):
                return False
            await session.commit()
        except (OperationalError, InterfaceError, PoolTimeout, OSError) as error:
            raise self._store.unavailable(error) from error
        except DBAPIError as error:
            if error.connection_invalidated:
                raise self._store.unavailable(error) from error
            raise  # such as a constraint that is checked at the commit
        return True


def _table(name: str) -> Table:
    schema, _, plain = name.rpartition(".")
    return Table(
        plain,
        MetaData(schema=schema or None),
        Column("place", String(255), primary_key=True),
        Column("message_id", String(255), primary_key=True),
        Column("token", String(64)),
        Column("until", Float(53), nullable=False),
        Index(f"{plain}_until", "until"),
    )


def _statements(table: str, dialect: str) -> dict[str, Any]:
    """The same SQL for both; only the time is spelt differently. The name was checked, all else is a parameter."""
    now = _NOW[dialect]
    it = table.rpartition(".")[2]  # how ON CONFLICT calls the row that is there
    row = "place = :place AND message_id = :id"
    # Two processes that tidy at the same time don't wait for each other's rows.
    locked = " FOR UPDATE SKIP LOCKED" if dialect == "postgresql" else ""
    told = {
        "begin": f"INSERT INTO {table} (place, message_id, token, until) VALUES (:place, :id, :token, {now} + :lease) "  # noqa: S608
        "ON CONFLICT (place, message_id) DO UPDATE SET token = excluded.token, until = excluded.until "
        f"WHERE {it}.token = excluded.token OR {it}.until <= {now} RETURNING 1",
        "look": f"SELECT token FROM {table} WHERE {row}",  # noqa: S608
        "renew": f"UPDATE {table} SET until = {now} + :seconds WHERE {row} AND token = :token",  # noqa: S608
        "finish": f"INSERT INTO {table} (place, message_id, token, until) VALUES (:place, :id, NULL, {now} + :seconds) "  # noqa: S608
        "ON CONFLICT (place, message_id) DO UPDATE SET token = NULL, until = excluded.until "
        f"WHERE {it}.token = :token OR ({it}.token IS NULL AND {it}.until <= {now}) RETURNING 1",
        "free": f"DELETE FROM {table} WHERE {row} AND token = :token",  # noqa: S608
        "tidy": f"DELETE FROM {table} WHERE (place, message_id) IN (SELECT place, message_id FROM {table} "  # noqa: S608
        f"WHERE until <= {now} ORDER BY until LIMIT :some{locked})",
    }
    return {name: text(sql) for name, sql in told.items()}
