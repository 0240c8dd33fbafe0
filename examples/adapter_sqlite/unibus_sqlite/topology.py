"""What stands in the file for each channel: a row of `place`, to which the rows of `message` belong."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Literal

from unibus.adapter import Topology
from unibus.channel import Address, Group, Inbox, Topic
from unibus.driver import no_history, topic_of
from unibus.errors import ConfigError

# `ends`: of places that belong to one process, which says by it that it is still there. `visible`: when a message may be
# taken; that is its delay, and while somebody has it the end of the lease. `holder`: who has it; NULL before the first
# time, '' for one that was given back to be taken later.
SCHEMA = (
    "CREATE TABLE IF NOT EXISTS place (name TEXT PRIMARY KEY, kind TEXT NOT NULL, topic TEXT, ends REAL)",
    """CREATE TABLE IF NOT EXISTS message (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        place TEXT NOT NULL REFERENCES place (name) ON DELETE CASCADE,
        body BLOB NOT NULL, headers TEXT, key TEXT, priority INTEGER NOT NULL DEFAULT 0, sent REAL,
        visible REAL NOT NULL DEFAULT 0, holder TEXT, deliveries INTEGER NOT NULL DEFAULT 0)""",
    "CREATE INDEX IF NOT EXISTS message_line ON message (place, priority DESC, id, visible)",
    "CREATE INDEX IF NOT EXISTS message_key ON message (place, key, id) WHERE key IS NOT NULL",
)
LIFE = 60.0  # seconds that the place of a process outlives it


@dataclass(frozen=True, slots=True)
class Place:
    """A row of the table `place`."""

    address: Address
    name: str
    kind: Literal["queue", "topic", "group", "inbox"]
    topic: str | None = None  # of a group

    @property
    def private(self) -> bool:
        return self.kind == "inbox" or (isinstance(self.address, Group) and self.address.ephemeral)


def plan(topology: Topology) -> dict[Address, Place]:
    """Raises ConfigError, Unsupported."""
    places: dict[Address, Place] = {}
    for declared in topology.channels:
        address, name = declared.address, declared.name
        if declared.options:
            raise ConfigError(f"{address}: SQLite has no setting {next(iter(declared.options))!r} for a channel")
        no_history("SQLite", address, declared.start)
        if isinstance(address, Group):
            places[address] = group(address, topic_of(places, address), name)
        else:
            places[address] = Place(address, name, "topic" if isinstance(address, Topic) else "queue")
    return places


def group(address: Group, topic: Place, name: str) -> Place:
    """No channel has a slash in its name, so a group can't meet one."""
    return Place(address, f"{topic.name}/{name}", "group", topic.name)


def inbox(address: Inbox) -> Place:
    return Place(address, address.name, "inbox")


def missing(connection: sqlite3.Connection, places: dict[Address, Place]) -> list[Place]:
    """What is not there. Raises ConfigError for what is there and of another kind."""
    found = []
    for place in places.values():
        row = connection.execute("SELECT kind FROM place WHERE name = ?", (place.name,)).fetchone()
        if row is None:
            found.append(place)
        elif row[0] != place.kind:
            raise ConfigError(f"{place.address}: {place.name!r} is a {row[0]} in the file; one name is one kind")
    return found


def make(connection: sqlite3.Connection, place: Place, ends: float | None = None) -> None:
    connection.execute(
        "INSERT OR IGNORE INTO place (name, kind, topic, ends) VALUES (?, ?, ?, ?)",
        (place.name, place.kind, place.topic, ends),
    )
