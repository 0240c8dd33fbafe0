"""One connection to the file, and the thread that waits for it: SQLite's calls block, and the event loop must not."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from unibus.errors import ConnectionLost
from unibus_sqlite import errors
from unibus_sqlite.topology import SCHEMA

T = TypeVar("T")


class Link:
    """Open until `close`. Nothing but `run` uses the connection, so one thread is enough, and keeps the order of calls."""

    def __init__(self, path: str, busy_timeout: float) -> None:
        self._path = path
        self._busy_timeout = busy_timeout
        self._thread = ThreadPoolExecutor(1, "unibus-sqlite")
        self._open = False
        self.connection: sqlite3.Connection

    async def open(self) -> None:
        """Raises ConfigError, PermissionDenied, ConnectionLost."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._connect)
        except sqlite3.Error as exc:
            self._thread.shutdown(wait=False)
            raise errors.translate(exc, f"open {self._path}") from exc
        self._open = True

    def _connect(self) -> None:
        connection = sqlite3.connect(self._path, timeout=self._busy_timeout, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")  # readers don't wait for a writer
            connection.execute("PRAGMA synchronous = FULL")  # a send that returned is on the disk
            connection.execute("PRAGMA foreign_keys = ON")
            for statement in SCHEMA:
                connection.execute(statement)
        except sqlite3.Error:
            connection.close()
            raise
        self.connection = connection

    async def run(self, work: Callable[[sqlite3.Connection], T], doing: str, *, write: bool = True) -> T:
        """`work` in one transaction: all of it is in the file afterwards, or nothing. Raises TransportError.

        `doing`: what was tried, with the object's name. Cancelled while it runs, it may still be carried out.
        """
        if not self._open:
            raise ConnectionLost(f"{doing}: {self._path} is closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._transaction, work, write)
        except sqlite3.Error as exc:
            raise errors.translate(exc, doing) from exc

    def _transaction(self, work: Callable[[sqlite3.Connection], T], write: bool) -> T:
        with self.connection:  # commits at the end, and takes everything back after an error
            # A transaction that begins by reading could find, at its first write, that another one was faster.
            self.connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            return work(self.connection)

    async def close(self) -> None:
        if self._open:
            self._open = False
            await asyncio.get_running_loop().run_in_executor(self._thread, self.connection.close)
            self._thread.shutdown(wait=False)
