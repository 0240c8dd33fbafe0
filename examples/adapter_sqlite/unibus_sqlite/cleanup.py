"""For the contract suite: delete the places of a run, and their messages with them. Nothing else calls this."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection

from unibus_sqlite.adapter import SqliteAdapter


async def delete(
    adapter: SqliteAdapter,
    prefix: str,
    names: Collection[str],  # noqa: ARG001  # for brokers that can't list what they have
    delays: Collection[float],  # noqa: ARG001
) -> list[str]:
    """All whose name begins with `prefix`; the file tells which."""

    def work(connection: sqlite3.Connection) -> list[str]:
        sql = "DELETE FROM place WHERE substr(name, 1, ?) = ? RETURNING name"
        return [name for (name,) in connection.execute(sql, (len(prefix), prefix)).fetchall()]

    return await adapter.link.run(work, "delete")
