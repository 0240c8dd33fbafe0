"""A table in an SQLite file as a broker: the example of docs/adapters.md."""

from unibus_sqlite.adapter import SqliteAdapter
from unibus_sqlite.wire import Row

__all__ = ["Row", "SqliteAdapter"]
