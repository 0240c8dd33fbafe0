"""SQLite's errors as unibus': one table, used at every edge of the adapter."""

from __future__ import annotations

import sqlite3

from unibus.errors import (
    ConfigError,
    ConnectionLost,
    MessageTooLarge,
    NotFound,
    PermissionDenied,
    Throttled,
    UnibusError,
)
from unibus.translation import common

# By the beginning of SQLite's name of the error; what to say and to do.
_BY_NAME: dict[str, tuple[type[UnibusError], str]] = {
    "SQLITE_BUSY": (Throttled, "another process is writing; if that is usual, raise sqlite.busy_timeout"),
    "SQLITE_FULL": (Throttled, "the disk is full"),
    "SQLITE_READONLY": (PermissionDenied, "the user of this process may not write to the file"),
    "SQLITE_PERM": (PermissionDenied, "the user of this process may not use the file"),
    "SQLITE_TOOBIG": (MessageTooLarge, "larger than what SQLite stores"),
    "SQLITE_CANTOPEN": (ConfigError, "the file can't be opened; is the folder there, and may this user write to it?"),
    "SQLITE_NOTADB": (ConfigError, "the file is something else than a database; correct the path of url"),
    "SQLITE_CONSTRAINT_FOREIGNKEY": (NotFound, "the place is gone; declare it"),
}


def translate(exc: BaseException, doing: str) -> UnibusError:
    """The error to raise `from exc`. Never called with CancelledError."""
    if (known := common(exc, doing, "SQLite")) is not None:
        return known
    name = getattr(exc, "sqlite_errorname", "") if isinstance(exc, sqlite3.Error) else ""
    for beginning, (kind, words) in _BY_NAME.items():
        if name.startswith(beginning):
            return kind(f"{doing}: {words}")
    return ConnectionLost(f"{doing}: {str(exc) or type(exc).__name__}")
