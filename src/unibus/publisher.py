"""Sending: many callers' single messages in few calls of the adapter, each caller told its own result.

Group commit (as in databases' logs): while a call is in flight, collect; when it returns, send all that came together.
No timers, no waiting for a batch to fill. What failed in passing is sent again until its deadline, and only that.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from unibus import telemetry
from unibus.adapter import Outgoing
from unibus.capabilities import Capabilities
from unibus.channel import Address, Group, Inbox, Topic
from unibus.clock import Clock, Timer, within
from unibus.errors import Closed, ConnectionLost, MessageTooLarge, Timeout, TransportError, UnibusError, Unroutable
from unibus.message import Message
from unibus.supervisor import Link, back_off
from unibus.telemetry import Counts
from unibus.waiting import answered

log = logging.getLogger("unibus")

CLOSED = "the bus is closed; nothing was sent"
SILENT = 5.0  # seconds without an answer, until the health tells
_ANSWER = 1.0  # seconds that the adapter has to say why nothing is confirmed


class _Many:
    """The shared result of a `send_all`: one future for the lot."""

    __slots__ = ("future", "left", "results")

    def __init__(self, size: int) -> None:
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.left = size
        self.results: list[UnibusError | None] = [None] * size


class _Entry:
    """One message on its way. `future` is its caller's: of one message it gets the error or None, of many `many` does."""

    __slots__ = ("deadline", "error", "future", "index", "many", "outgoing", "over")

    def __init__(
        self,
        outgoing: Outgoing,
        deadline: float,
        future: asyncio.Future[Any],
        many: _Many | None = None,
        index: int = 0,
    ) -> None:
        self.outgoing = outgoing
        self.deadline = deadline
        self.future = future
        self.many = many
        self.index = index
        self.error: TransportError | None = None  # of the last try
        self.over = False

    def open(self) -> bool:
        """Does somebody still wait for it?"""
        return not (self.over or self.future.done())

    def done(self, error: UnibusError | None) -> None:
        if self.over:
            return
        self.over = True
        many = self.many
        if many is not None:
            many.results[self.index] = error
            many.left -= 1
            if many.left:
                return
        if not self.future.done():
            self.future.set_result(error)


class Publisher:
    """All sends of one bus."""

    def __init__(self, link: Link, clock: Clock, counts: Counts, timeout: float) -> None:
        self.link = link
        self.clock = clock
        self.counts = counts
        self.timeout = timeout
        self.closed = False
        self._lanes: dict[Address, Lane] = {}

    def submit(self, outgoing: Outgoing, timeout: float | None = None) -> asyncio.Future[UnibusError | None]:
        """Send one; the future's result is None once the broker has it, or the error."""
        return self.lane(outgoing.to).submit(outgoing, timeout)

    async def send_all(self, batch: Sequence[Outgoing], timeout: float | None = None) -> list[UnibusError | None]:
        """Send many; one result for each, in order."""
        if not batch:
            return []
        deadline = self.clock.monotonic() + (self.timeout if timeout is None else timeout)
        many = _Many(len(batch))
        for index, outgoing in enumerate(batch):
            self.lane(outgoing.to).add(_Entry(outgoing, deadline, many.future, many, index))
        await many.future
        return many.results

    def lane(self, address: Address) -> Lane:
        """The way to one destination; who sends there often keeps it."""
        if self.closed:
            raise Closed(CLOSED)
        lane = self._lanes.get(address)
        if lane is None:
            lane = self._lanes[address] = Lane(self, address)
        return lane

    def busy(self) -> bool:
        return any(lane.pending or lane.flying for lane in self._lanes.values())

    def complaints(self) -> list[str]:
        """Of each destination that takes no messages now."""
        return [text for lane in self._lanes.values() if (text := lane.complaint())]

    async def drain(self) -> None:
        """Until all that was submitted has its result; each has a deadline, so this ends."""
        while waiting := {e.future for lane in self._lanes.values() for e in lane.outstanding() if e.open()}:
            await asyncio.wait(waiting)

    async def close(self) -> None:
        """Refuse new sends; give what is still waiting the error Closed."""
        self.closed = True
        for lane in self._lanes.values():
            await lane.close()


class Lane:
    """The messages to one destination.

    On an ordered one a key has at most one message among `pending` and in flight; later ones wait `behind` it. Where the
    adapter's sends are `ordered_batches`, a key may have many in one call: what fails in passing is then the end of it.
    """

    def __init__(self, publisher: Publisher, address: Address) -> None:
        channel = address.topic if isinstance(address, Group) else address
        self.address = address
        self.ordered = not isinstance(channel, Inbox) and channel.ordered
        self._one_by_one = self.ordered and not publisher.link.adapter.capabilities.ordered_batches
        self.pending: deque[_Entry] = deque()
        self.flying: dict[asyncio.Task[None], list[_Entry]] = {}
        self._publisher = publisher
        self._link = publisher.link
        self.loop = asyncio.get_running_loop()
        self._monotonic = publisher.clock.monotonic
        self._scheduled = False
        self._waiting = False  # after a failure: nothing is sent until its back-off is over
        self._failures = 0
        self._heard = 0.0  # when a call last began with none under way, or came back; monotonic
        self._behind: dict[str, deque[_Entry]] = {}  # one by one: by key, as long as one of the key is on its way
        self._asking: set[asyncio.Task[None]] = set()  # why what is late was not confirmed
        self._timer: Timer | None = None
        self._timer_at = float("inf")
        self._said_unrouted = False
        self._batch = self._capabilities.send_batch
        self._sent = publisher.counts.counter(telemetry.SENT, address)

    @property
    def _capabilities(self) -> Capabilities:
        return self._link.adapter.capabilities

    def submit(self, outgoing: Outgoing, timeout: float | None = None) -> asyncio.Future[UnibusError | None]:
        """As `Publisher.submit`."""
        if self._publisher.closed:
            raise Closed(CLOSED)
        future: asyncio.Future[UnibusError | None] = self.loop.create_future()
        self.add(
            _Entry(outgoing, self._monotonic() + (self._publisher.timeout if timeout is None else timeout), future)
        )
        return future

    def add(self, entry: _Entry) -> None:
        if entry.deadline < self._timer_at:
            self._arm(entry.deadline)
        if self._one_by_one and (key := entry.outgoing.message.key) is not None:
            if (behind := self._behind.get(key)) is not None:
                behind.append(entry)
                return
            self._behind[key] = deque()
        self.pending.append(entry)
        if not self._scheduled and (not self.flying or len(self.pending) >= self._batch):
            self._schedule()

    def _schedule(self) -> None:
        self._scheduled = True
        self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Put the next flights on their way."""
        self._scheduled = False
        capabilities = self._capabilities
        flights = 1 if self.ordered else max(1, capabilities.flights)
        while self.pending and not self._waiting and len(self.flying) < flights:
            if self.flying and len(self.pending) < capabilities.send_batch:
                return  # group commit: these go when the one in flight is back
            batch = self._take(capabilities)
            if not batch:
                return
            if not self.flying:
                self._heard = self._monotonic()
            task = self.loop.create_task(self._fly(batch))
            self.flying[task] = batch
            task.add_done_callback(self._landed)

    def _take(self, capabilities: Capabilities) -> list[_Entry]:
        """The next batch, within the adapter's limits."""
        room = capabilities.send_bytes
        if room is None and not self._one_by_one and len(self.pending) <= capabilities.send_batch:
            batch = [entry for entry in self.pending if not (entry.over or entry.future.done())]
            self.pending.clear()
            return batch
        batch = []
        while self.pending and len(batch) < capabilities.send_batch:
            entry = self.pending.popleft()
            if not entry.open():  # its caller was cancelled
                self._next_of_key(entry)
                continue
            if room is not None:
                room -= weight(entry.outgoing.message)
                if room < 0 and batch:
                    self.pending.appendleft(entry)
                    break
            batch.append(entry)
        return batch

    def _next_of_key(self, entry: _Entry) -> None:
        """`entry` is through, or given up: let the next message of its key follow."""
        if not self._one_by_one or (key := entry.outgoing.message.key) is None or key not in self._behind:
            return
        behind = self._behind[key]
        while behind:
            following = behind.popleft()
            if following.open():
                self.pending.append(following)
                return
        del self._behind[key]

    def outstanding(self) -> Iterator[_Entry]:
        """All that somebody may still wait for."""
        yield from self.pending
        for batch in self.flying.values():
            yield from batch
        for behind in self._behind.values():
            yield from behind

    def complaint(self) -> str | None:
        """Why messages wait here, or None."""
        waiting = [entry for entry in self.outstanding() if entry.open()]
        if not waiting:
            return None
        if (error := waiting[0].error) is not None:
            return f"{len(waiting)} messages to {self.address} wait: {error}"
        silent = self._monotonic() - self._heard
        if silent < SILENT:
            return None
        return f"{len(waiting)} messages to {self.address} wait: none was confirmed for {silent:.0f} s"

    async def _fly(self, batch: list[_Entry]) -> None:
        """One call of the adapter, and what becomes of each message."""
        clock = self._publisher.clock
        epoch = self._link.epoch
        remaining = max(entry.deadline for entry in batch) - clock.monotonic()
        results: Sequence[UnibusError | None]
        try:
            epoch = await self._link.up(remaining)
            call = self._link.adapter.send([entry.outgoing for entry in batch], max(0.0, remaining))
            results = await answered(call)
        except ConnectionLost as error:
            self._link.lost(epoch, error)
            results = [error] * len(batch)
        except UnibusError as error:
            results = [error] * len(batch)
        except Exception as error:  # a fault of the adapter must not leave callers hanging
            log.exception("the adapter failed to send to %s", self.address)
            broken = TransportError(f"the adapter failed to send to {self.address}: {type(error).__name__}")
            broken.__cause__ = error
            results = [broken] * len(batch)
        self._sort_out(batch, results)

    def _sort_out(self, batch: list[_Entry], results: Sequence[UnibusError | None]) -> None:
        if (
            len(results) == len(batch) and not self._one_by_one and not any(results)
        ):  # the usual case, without a call for each message
            self._sent.n += len(batch)
            self._failures = 0
            for entry in batch:
                if entry.many is not None:
                    entry.done(None)
                elif not entry.future.done():
                    entry.future.set_result(None)
            return
        now = self._publisher.clock.monotonic()
        counts = self._publisher.counts
        again: list[_Entry] = []
        sent = 0
        for entry, error in zip(batch, results, strict=True):
            if error is None:
                sent += 1
                entry.done(None)
            elif error.retryable and isinstance(error, TransportError) and now < entry.deadline:
                entry.error = error
                again.append(entry)
                continue
            elif isinstance(error, Unroutable) and isinstance(self.address, Topic):
                sent += 1
                counts.add(telemetry.UNROUTED, self.address)
                self._say_unrouted()
                entry.done(None)
            elif error.retryable and not isinstance(error, ConnectionLost):
                entry.error = error if isinstance(error, TransportError) else None
                entry.done(self._timed_out(entry))
            else:
                entry.done(error)
            self._next_of_key(entry)
        self._sent.n += sent
        if again:
            self.pending.extendleft(reversed(again))
            self._waiting = True
            wait = back_off(self._failures)
            self._failures += 1
            log.warning(
                "%d messages to %s are sent again in %.1f s: %s", len(again), self.address, wait, again[0].error
            )
            self._publisher.clock.call_later(wait, self._go_on)
        else:
            self._failures = 0

    def _go_on(self) -> None:
        self._waiting = False
        self._flush()

    def _landed(self, task: asyncio.Task[None]) -> None:
        batch = self.flying.pop(task)
        self._heard = self._monotonic()
        if task.cancelled():
            self._fail(
                batch, Closed("the bus was closed before the broker confirmed; the message may or may not be there")
            )
        elif (error := task.exception()) is not None:
            log.error("internal error while sending to %s", self.address, exc_info=error)
            self._fail(batch, TransportError(f"internal error while sending to {self.address}: {type(error).__name__}"))
        if self.pending and not self._scheduled and not self._publisher.closed:
            self._flush()

    def _fail(self, entries: Iterable[_Entry], error: UnibusError) -> None:
        for entry in entries:
            entry.done(error)
            self._next_of_key(entry)

    def _say_unrouted(self) -> None:
        if not self._said_unrouted:
            self._said_unrouted = True
            log.warning(
                "%s has no group yet: what is published reaches nobody (said once, counted always)", self.address
            )

    # Deadlines: one timer for the lane, armed for the earliest; it costs nothing while messages keep flowing.

    def _arm(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        clock = self._publisher.clock
        self._timer_at = deadline
        self._timer = clock.call_later(max(0.0, deadline - clock.monotonic()), self._sweep)

    def _sweep(self) -> None:
        now = self._publisher.clock.monotonic()
        self._timer, self._timer_at = None, float("inf")
        earliest = float("inf")
        late = []
        for entry in list(self.outstanding()):
            if not entry.open():
                continue
            if entry.deadline <= now:
                late.append(entry)
            else:
                earliest = min(earliest, entry.deadline)
        if any(entry.error is None for entry in late) and self._link.is_up:
            task = asyncio.get_running_loop().create_task(self._ask_why(late))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        else:
            for entry in late:
                entry.done(self._timed_out(entry))
        if earliest < float("inf"):
            self._arm(earliest)

    async def _ask_why(self, late: list[_Entry]) -> None:
        """Nobody has said why these were not confirmed. An alarm of the broker, by which it takes none, should be named."""
        why = ""
        try:
            health = await within(self._publisher.clock, _ANSWER, answered(self._link.adapter.check()))
            why = health.blocked or ""
        except (TimeoutError, UnibusError) as error:
            log.debug("%s: no word on why nothing is confirmed: %s", self.address, error)
        finally:
            for entry in late:
                entry.done(self._timed_out(entry, why))

    def _timed_out(self, entry: _Entry, why: str = "") -> Timeout:
        detail = f"; {why}" if why else ""
        if entry.error is not None:
            detail = f"; last error: {entry.error}"
        elif not self._link.is_up:
            detail = f"; no link to the broker: {self._link.trouble}"
        error = Timeout(
            f"{entry.outgoing.message!r} to {self.address} was not confirmed in time; it may or may not be there{detail}"
        )
        error.__cause__ = entry.error
        return error

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        flying = [*self.flying, *self._asking]
        for task in flying:
            task.cancel()
        if flying:
            await asyncio.wait(flying)
        closed = Closed("the bus was closed before the message was sent")
        for entry in list(self.outstanding()):
            entry.done(closed)
        self.pending.clear()
        self._behind.clear()


def weight(message: Message) -> int:
    """Bytes of a message that limits count: body, key, headers. An adapter may know better."""
    size = len(message.body) + (len(message.key.encode()) if message.key else 0)
    for name, value in message.headers.items():
        size += len(name) + len(value.encode())
    return size


def check_limits(message: Message, capabilities: Capabilities, address: Address) -> None:
    """Refuse what the broker can't carry before anything is sent. Raises MessageTooLarge."""
    limit = capabilities.max_body
    if limit is not None and len(message.body) > limit:
        raise MessageTooLarge(
            f"{address}: a body of {len(message.body)} bytes; {capabilities.adapter} carries {limit} at most"
        )
    if (
        message.key is not None
        and capabilities.max_key is not None
        and len(message.key.encode()) > capabilities.max_key
    ):
        raise MessageTooLarge(f"{address}: the key is longer than {capabilities.max_key} bytes")
    headers = message.headers
    if headers:
        if capabilities.max_headers is not None and len(headers) > capabilities.max_headers:
            raise MessageTooLarge(
                f"{address}: {len(headers)} headers; {capabilities.adapter} carries {capabilities.max_headers}"
            )
        if capabilities.max_header_bytes is not None:
            size = sum(len(name) + len(value.encode()) for name, value in headers.items())
            if size > capabilities.max_header_bytes:
                raise MessageTooLarge(
                    f"{address}: headers of {size} bytes; {capabilities.adapter} carries {capabilities.max_header_bytes}"
                )
