"""One consumer of one place."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from unibus.adapter import Move, Outcome, Results, Source, Standing
from unibus.channel import Address, Topic
from unibus.delivery import Delivery
from unibus.driver import OnlyLooks, as_result, held, lease_lost
from unibus.errors import ConnectionLost, NotFound, TransportError, Unroutable
from unibus.inflow import closed
from unibus_sqlite.topology import LIFE, Place
from unibus_sqlite.wire import COLUMNS, Row, decode

if TYPE_CHECKING:
    from unibus_sqlite.adapter import SqliteAdapter

log = logging.getLogger("unibus.sqlite")

_NEXT = f"""SELECT {COLUMNS} FROM message AS m WHERE place = :place AND visible <= :now {{}}
    ORDER BY priority DESC, id LIMIT :limit"""  # noqa: S608  # our constants
# Of a key: the first that may be taken, and none while one is out.
_IN_ORDER = """AND NOT EXISTS (SELECT 1 FROM message AS o WHERE o.place = m.place AND o.key = m.key AND o.id != m.id
    AND (o.visible <= :now AND o.id < m.id OR o.visible > :now AND o.holder IS NOT NULL))"""
_TAKE = "UPDATE message SET visible = ?, holder = ?, deliveries = deliveries + 1 WHERE id = ?"
_MINE = "WHERE id = :id AND holder = :holder"
_ACCEPT = f"DELETE FROM message {_MINE}"  # noqa: S608  # our constants
_RELEASE = f"UPDATE message SET visible = :visible, holder = :left, deliveries = deliveries - 1 {_MINE}"  # noqa: S608  # as above
_EXTEND = f"UPDATE message SET visible = :visible {_MINE}"  # noqa: S608  # as above
_BROWSE = f"SELECT {COLUMNS} FROM message WHERE place = ? AND visible <= ? AND id > ? ORDER BY id LIMIT ?"  # noqa: S608  # as above

_WHY = "its lease has ended"

Put = Callable[[sqlite3.Connection], list[TransportError | None]]  # stores a batch, one result for each


class SqliteSubscription:
    """Takes rows by hiding them for the length of the lease, with a word in them that says who has them."""

    def __init__(self, adapter: SqliteAdapter, source: Source, place: Place, token: str) -> None:
        self._adapter = adapter
        self._source = source
        self._place = place
        self._token = token
        self._takes = 0
        self._held: dict[Delivery[Any], None] = {}
        self._taking: asyncio.Task[list[Delivery[Any]]] | None = None
        self._stopped = self._closed = False
        self._living = asyncio.create_task(self._live()) if place.private else None
        self._next = _NEXT.format(_IN_ORDER if source.ordered else "")

    @property
    def address(self) -> Address:
        return self._place.address

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        clock = self._adapter.clock
        deadline = clock.monotonic() + timeout
        while not self._stopped:
            # A receive that is cancelled while the thread takes rows would lose them for the length of a lease: the next
            # call, or stop, gets them from the task.
            room = min(limit, self._source.prefetch - len(self._held))
            taking = self._taking = self._taking or asyncio.ensure_future(self._take(room))
            try:
                taken = await asyncio.shield(taking)
            except Exception:
                self._taking = None
                raise
            if self._taking is not taking:  # stop was faster, and has given them back
                return ()
            self._taking = None
            left = deadline - clock.monotonic()
            if taken or left <= 0:
                return taken
            await self._adapter.sent.wait(min(left, self._adapter.settings.poll))
        if self._closed:
            raise closed(self.address)
        return ()

    async def _take(self, limit: int) -> list[Delivery[Any]]:
        clock, lease = self._adapter.clock, self._adapter.settings.lease
        now = clock.time()
        found = {"place": self._place.name, "now": now, "limit": max(0, limit)}
        if not await self._adapter.link.run(self._look, f"receive from {self.address}", write=False):
            return []

        self._takes += 1
        holder = f"{self._token}.{self._takes}"

        def work(connection: sqlite3.Connection) -> list[Row]:
            rows = [Row(*row) for row in connection.execute(self._next, found)]
            connection.executemany(_TAKE, [(now + lease, holder, row.id) for row in rows])
            return rows

        rows = await self._adapter.link.run(work, f"receive from {self.address}")
        until = clock.monotonic() + lease
        taken = [_delivery(row, self._source, holder, until) for row in rows]
        self._held.update(dict.fromkeys(taken))
        return taken

    def _look(self, connection: sqlite3.Connection) -> bool:
        """Is there anything? A look takes no lock, so that consumers who find nothing cost the others nothing."""
        found = {"place": self._place.name, "now": self._adapter.clock.time(), "limit": 1}
        if connection.execute(self._next, found).fetchone():
            return True
        if not connection.execute("SELECT 1 FROM place WHERE name = ?", (self._place.name,)).fetchone():
            raise NotFound(f"{self.address} was deleted")
        return False

    async def _live(self) -> None:
        """Tell the others that the process of a private place is there, also while its handlers are too busy to receive."""
        while True:
            await self._adapter.clock.sleep(LIFE / 3)
            try:
                await self._adapter.link.run(self._stay, f"keep {self.address}")
            except TransportError as error:
                log.warning("%s", error)

    def _stay(self, connection: sqlite3.Connection) -> None:
        until = self._adapter.clock.time() + LIFE
        connection.execute("UPDATE place SET ends = ? WHERE name = ?", (until, self._place.name))

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        now = self._adapter.clock.time()
        if outcome is Outcome.ACCEPTED:
            return await self._change(_ACCEPT, deliveries, [{} for _ in deliveries])
        waits = delays or [0.0] * len(deliveries)
        released = [{"visible": now + wait, "left": "" if wait > 0 else None} for wait in waits]
        return await self._change(_RELEASE, deliveries, released)

    async def extend(self, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
        clock = self._adapter.clock
        until = [{"visible": clock.time() + seconds} for _ in deliveries]
        results = await self._change(_EXTEND, deliveries, until, keep=True)
        for delivery, error in zip(deliveries, results, strict=True):
            if error is None:
                delivery.lease_until = clock.monotonic() + seconds
        return results

    async def _change(
        self,
        statement: str,
        deliveries: Sequence[Delivery[Any]],
        values: Sequence[dict[str, Any]],
        *,
        keep: bool = False,
    ) -> Results:
        """One statement for each delivery that is ours. It changes no row where the lease has gone to somebody else."""
        results, mine = held(deliveries, self._held.__contains__, _WHY)

        def work(connection: sqlite3.Connection) -> list[bool]:
            return [connection.execute(statement, values[i] | _whose(deliveries[i])).rowcount > 0 for i in mine]

        def settled(i: int, changed: bool) -> TransportError | None:
            if not keep or not changed:
                self._held.pop(deliveries[i], None)
            return None if changed else lease_lost(deliveries[i], _WHY)

        await self._write(work, mine, results, settled)
        return results

    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        deliveries = [move.delivery for move in moves]
        results, mine = held(deliveries, self._held.__contains__, _WHY)
        puts = {i: self._adapter.putting(moves[i].sends) for i in mine}

        def work(connection: sqlite3.Connection) -> list[TransportError | None]:
            return [self._move(connection, moves[i], puts[i]) for i in mine]

        def settled(i: int, error: TransportError | None) -> TransportError | None:
            if error is None:
                self._held.pop(deliveries[i], None)
            return error

        await self._write(work, mine, results, settled)
        return results

    def _move(self, connection: sqlite3.Connection, move: Move, put: Put) -> TransportError | None:
        """All or nothing for each, and all of them in one transaction. A topic without groups takes a message, as in send."""
        connection.execute("SAVEPOINT move")
        errors = [
            error
            for outgoing, error in zip(move.sends, put(connection), strict=True)
            if error is not None and not (isinstance(error, Unroutable) and isinstance(outgoing.to, Topic))
        ]
        if not connection.execute(_ACCEPT, _whose(move.delivery)).rowcount:
            errors = [lease_lost(move.delivery, _WHY)]
        if errors:
            connection.execute("ROLLBACK TO move")
        connection.execute("RELEASE move")
        return errors[0] if errors else None

    async def _write(
        self,
        work: Callable[[sqlite3.Connection], Sequence[Any]],
        mine: Sequence[int],
        results: list[TransportError | None],
        settled: Callable[[int, Any], TransportError | None],
    ) -> None:
        """Carry out `work`, which has an answer for each index of `mine`, and note what `settled` makes of it."""
        try:
            answers = await self._adapter.link.run(work, f"settle from {self.address}")
        except ConnectionLost:
            raise
        except TransportError as error:  # the transaction, and all that was in it: it is still ours
            for i in mine:
                results[i] = as_result(error)
            return
        for i, answer in zip(mine, answers, strict=True):
            results[i] = settled(i, answer)
        self._adapter.sent.wake()  # what was given back, the next of a key, or what was moved

    async def check(self) -> Standing:
        if self._closed:
            return "gone"
        try:
            await self._adapter.link.run(self._look, f"check {self.address}", write=False)
        except NotFound:
            return "gone"
        return "consuming"

    async def stop(self) -> None:
        self._stopped = True
        self._adapter.sent.wake()
        taking, self._taking = self._taking, None
        if taking is not None:
            await asyncio.wait([taking])
            if taking.exception() is None:  # taken, and given out to nobody
                await self.settle(Outcome.RELEASED, taking.result())

    async def close(self) -> None:
        self._closed = True
        self._adapter.subscriptions.discard(self)
        if self._living is not None:
            self._living.cancel()
        try:
            await self.stop()
            await self.settle(Outcome.RELEASED, list(self._held))
            if self._place.private:
                delete = "DELETE FROM place WHERE name = ?"
                await self._adapter.link.run(
                    lambda connection: connection.execute(delete, (self._place.name,)), f"close {self.address}"
                )
        except TransportError:
            self._held.clear()  # they come again when their leases end


class Browser(OnlyLooks):
    """Sees what may be taken now, by the order of sending."""

    def __init__(self, adapter: SqliteAdapter, source: Source, place: Place) -> None:
        self.address: Address = place.address
        self._adapter = adapter
        self._source = source
        self._place = place
        self._last = 0

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        """What has come meanwhile is seen too. It does not wait for more."""
        arguments = (self._place.name, self._adapter.clock.time(), self._last, limit)

        def work(connection: sqlite3.Connection) -> list[Row]:
            return [Row(*row) for row in connection.execute(_BROWSE, arguments)]

        rows = await self._adapter.link.run(work, f"look at {self.address}", write=False)
        self._last = rows[-1].id if rows else self._last
        return [_delivery(row, self._source, "", None) for row in rows]

    async def check(self) -> Standing:
        return "consuming"

    async def stop(self) -> None: ...

    async def close(self) -> None: ...


def _delivery(row: Row, source: Source, holder: str, until: float | None) -> Delivery[Any]:
    count = row.deliveries + (until is not None)
    return Delivery(decode(row), source, (row.id, holder), 0, count, until, row, row.position)


def _whose(delivery: Delivery[Any]) -> dict[str, Any]:
    id, holder = delivery.token
    return {"id": id, "holder": holder}
