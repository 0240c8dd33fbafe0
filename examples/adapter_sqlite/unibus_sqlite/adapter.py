"""A table in an SQLite file behind the SPI."""

from __future__ import annotations

import asyncio
import logging
import secrets
import sqlite3
from collections.abc import Sequence
from typing import Any

from unibus.adapter import Backlog, Endpoint, Health, Inspected, Outgoing, Results, Source, Subscription, Topology
from unibus.channel import Address, Group, Inbox, Queue
from unibus.driver import all_there, as_result, linked, no_history, place_of
from unibus.errors import ConnectionLost, NotFound, Timeout, TransportError, Unroutable, Unsupported
from unibus.inboxes import inbox, inbox_name
from unibus.waiting import Waiter
from unibus_sqlite import config, topology, wire
from unibus_sqlite.capabilities import known
from unibus_sqlite.link import Link
from unibus_sqlite.subscription import Browser, Put, SqliteSubscription
from unibus_sqlite.topology import Place

log = logging.getLogger("unibus.sqlite")

_PUT = """INSERT INTO message (place, body, headers, key, priority, sent, visible)
    SELECT name, ?, ?, ?, ?, ?, ? FROM place WHERE {} = ? AND (ends IS NULL OR ends > ?)"""
_PUT_TO_ONE, _PUT_TO_GROUPS = _PUT.format("name"), _PUT.format("topic")


class SqliteAdapter:
    """A client of one file."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.clock = endpoint.clock
        self.settings = config.settings(endpoint.settings)
        self._path = config.file(endpoint.url)
        self.capabilities = known(sqlite3.sqlite_version, lease=self.settings.lease, poll=self.settings.poll)
        self._link: Link | None = None
        self._places: dict[Address, Place] = {}
        self.sent = Waiter(self.clock)  # wakes the consumers of this process
        self.subscriptions: set[SqliteSubscription] = set()

    @property
    def native(self) -> sqlite3.Connection | None:
        """The connection, or None while not connected. It is used in a thread: open another one to the same file."""
        return self._link.connection if self._link else None

    @property
    def link(self) -> Link:
        """Raises ConnectionLost."""
        return linked(self._link, "SQLite")

    async def connect(self) -> None:
        await self.close()
        link = Link(self._path, self.settings.busy_timeout)
        await link.open()
        self._link = link

    async def close(self) -> None:
        for subscription in list(self.subscriptions):
            await subscription.close()
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    # Channels

    async def declare(self, topology_: Topology) -> None:
        places = topology.plan(topology_)

        def work(connection: sqlite3.Connection) -> list[Place]:
            missing = topology.missing(connection, places)
            if topology_.mode == "create":
                for place in missing:
                    topology.make(connection, place)
            return missing

        if topology_.mode != "assume":
            missing = await self.link.run(work, "declare")
            if topology_.mode == "verify":
                all_there("SQLite", (str(place.address) for place in missing))
            for place in missing:
                log.info("created %s", place.address)
        self._places = places

    async def inspect(self, topology_: Topology) -> list[Inspected]:
        places = topology.plan(topology_)
        missing = await self.link.run(lambda c: topology.missing(c, places), "inspect", write=False)
        found = [Inspected("file", self._path, True)]
        for place in places.values():
            rights = f"writing to {self._path}"
            found.append(Inspected(place.kind, place.name, place not in missing, rights, place.address))
        return found

    def _place(self, address: Address) -> Place:
        return topology.inbox(address) if isinstance(address, Inbox) else place_of(self._places, address)

    # Sending

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        work = self.putting(batch)
        try:
            async with asyncio.timeout(timeout):
                results = await self.link.run(work, "send")
        except TimeoutError:
            return [Timeout(f"send to {o.to}: SQLite took more than {timeout:g} s") for o in batch]
        except ConnectionLost:
            raise
        except TransportError as error:  # the transaction, and all that was in it
            return [as_result(error) for _ in batch]
        self.sent.wake()
        return results

    def putting(self, batch: Sequence[Outgoing]) -> Put:
        """What stores a batch, inside a transaction. Made here, so that nothing but SQL runs in the thread."""
        now = self.clock.time()
        rows = [(self._place(outgoing.to), wire.encode(outgoing, now)) for outgoing in batch]
        return lambda connection: [_put(connection, place, row, now) for place, row in rows]

    # Receiving

    async def subscribe(self, source: Source) -> Subscription:
        address = source.address
        no_history("SQLite", address, source.start)
        if source.early:
            raise Unsupported(f"{address}: while somebody has a row, its delay is not to be seen")
        token = secrets.token_hex(8)
        if isinstance(address, Inbox):
            place = topology.inbox(Inbox(inbox_name(self._endpoint.prefix, self._endpoint.service, token)))
        elif isinstance(address, Group) and address.ephemeral:
            place = topology.group(address, self._place(address.topic), f"{address.name}.{token}")
        else:
            place = self._place(address)
        if place.private:
            await self.link.run(lambda c: _make_private(c, place, self.clock.time()), f"subscribe to {address}")
        else:
            await self.backlog(source.address)  # type: ignore[arg-type] # no inbox. Raises NotFound
        if source.browse:
            return Browser(self, source, place)
        subscription = SqliteSubscription(self, source, place, token)
        self.subscriptions.add(subscription)
        return subscription

    async def backlog(self, address: Queue[Any] | Group) -> Backlog:
        place, now = self._place(address), self.clock.time()

        def work(connection: sqlite3.Connection) -> tuple[Any, ...] | None:
            row: tuple[Any, ...] | None = connection.execute(_BACKLOG, {"name": place.name, "now": now}).fetchone()
            return row

        row = await self.link.run(work, f"backlog of {address}", write=False)
        if row is None:
            raise NotFound(f"{address} does not exist on SQLite; declare it")
        ready, held, delayed, oldest = row
        return Backlog(ready, held, None if oldest is None else max(0.0, now - oldest), delayed=delayed)

    async def check(self) -> Health:
        return Health(self._link is not None)

    def reply_to(self, text: str) -> Address:
        return inbox(wire.INBOX, text, "...unibus.reply....")


_BACKLOG = """SELECT
        count(m.id) FILTER (WHERE m.visible <= :now),
        count(m.id) FILTER (WHERE m.visible > :now AND m.holder != ''),
        count(m.id) FILTER (WHERE m.visible > :now AND coalesce(m.holder, '') = ''),
        min(m.sent) FILTER (WHERE m.visible <= :now)
    FROM place p LEFT JOIN message m ON m.place = p.name WHERE p.name = :name GROUP BY p.name"""


def _put(connection: sqlite3.Connection, place: Place, row: tuple[object, ...], now: float) -> TransportError | None:
    """One message, to each place where it has to be: how many rows were inserted says whether there was one."""
    put = _PUT_TO_GROUPS if place.kind == "topic" else _PUT_TO_ONE
    if connection.execute(put, (*row, place.name, now)).rowcount:
        return None
    if place.kind == "inbox":
        return Unroutable(f"inbox {place.name!r} is gone: its process has ended")
    if connection.execute("SELECT 1 FROM place WHERE name = ?", (place.name,)).fetchone():
        return Unroutable(f"{place.address} has no group")
    return NotFound(f"{place.address} does not exist on SQLite; declare it")


def _make_private(connection: sqlite3.Connection, place: Place, now: float) -> None:
    """Also the end of what other processes have left behind."""
    connection.execute("DELETE FROM place WHERE ends < ?", (now,))
    if place.topic and not connection.execute("SELECT 1 FROM place WHERE name = ?", (place.topic,)).fetchone():
        raise NotFound(f"{place.address} can't be made: its topic does not exist on SQLite; declare it")
    topology.make(connection, place, now + topology.LIFE)
