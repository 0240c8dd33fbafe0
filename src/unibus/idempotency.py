"""The Idempotent Receiver: a store remembers what was handled, so that a message that comes again is not handled again.

A key is in progress from before its handler runs until its fate is known, under a lease that is renewed meanwhile; and done, once the
handler has succeeded, before the message is acked. Whoever gets the message again finds it done, and acks it; or in progress, and waits;
or free, since its handler failed or its process died and the lease ended, and runs it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from unibus.clock import Clock, Timer, within
from unibus.delivery import Delivery
from unibus.errors import ConfigError, UnibusError
from unibus.layers import Handling
from unibus.retry import Postponed, Repeated, Verdict
from unibus.supervisor import back_off

log = logging.getLogger("unibus")

LEASE = 60.0  # seconds
KEEP = 7 * 86400.0  # seconds: longer than any retry, and than a dead letter waits to be sent back
SHORTEST_WAIT = 0.05  # seconds: less is the error of a sum of floats
LONGEST_POLL = 1.0  # seconds until it is looked again whether the other run has ended
UNASKED = 5.0  # seconds after which no message is left that would ask again: what waited is tried sooner
LAST_WORD = 2.0  # seconds that a store has at the end to record what it could not record before

LONGEST_ID = 200  # characters

# The physical name of the queue or group, and the message's id: what is printed, and at most 200 characters of it.
Key = tuple[str, str]


class StoreUnavailable(UnibusError):
    """The store of an effectively-once handler can't be asked now. Its messages wait, unhandled and uncounted."""

    retryable = True


class Standing(Enum):
    """What a store says of a key."""

    OURS = "ours"  # it was free, or ours already: run the handler
    TAKEN = "taken"  # another run of it is in progress
    DONE = "done"


class Store(Protocol):
    """Where it is remembered which messages were handled. Implement this for a store of your own.

    A key is free, in progress in the name of a token, or done. `lease`: seconds until what is in progress is free again unless it is renewed.
    `keep`: seconds that what is done is remembered. Each method is one atomic step, and they may run concurrently, in many processes. All
    but `open` raise StoreUnavailable when the store can't be asked; the step may then have been taken or not.
    """

    lease: float
    keep: float

    def open(self, clock: Clock) -> None:
        """Before anything else, with the clock of the bus; once for each bus that uses the store. No I/O."""
        ...

    async def create(self) -> None:
        """Make what the store needs, such as a table, unless it is there."""
        ...

    async def verify(self) -> None:
        """Return if what the store needs is there. Raises ConfigError that says what is missing."""
        ...

    async def begin(self, key: Key, token: str) -> Standing:
        """Take a key that is free, expired, or in progress by the same token: it is in progress by `token` for `lease` seconds."""
        ...

    async def renew(self, keys: Sequence[Key], token: str) -> Sequence[bool]:
        """Prolong to `lease` seconds from now; of each, whether it still is in progress by `token`."""
        ...

    async def finish(self, key: Key, token: str) -> bool:
        """Done, for `keep` seconds. False where it is another token's or done already; nothing is changed then."""
        ...

    async def free(self, key: Key, token: str) -> None:
        """Free it, if it is in progress by `token`; else nothing."""
        ...

    async def tidy(self) -> None:
        """Remove what is too old, in small steps. Called now and then."""
        ...

    async def close(self) -> None:
        """The counterpart of `open`."""
        ...


class Work(Protocol):
    """A transaction that a handler's effects and the mark that it is done go into together."""

    resource: Any  # what the handler gets, such as a session

    async def commit(self) -> bool:
        """Mark the key as done and commit. False where it is another's by now: nothing was committed.

        Raises StoreUnavailable when it is not known whether it was committed; anything else is the handler's own failure.
        """
        ...


@runtime_checkable
class Transactional(Protocol):
    """A store whose transactions handlers can work in: a parameter annotated with `provides`, or a base of it, gets the resource."""

    provides: type

    def transaction(self, key: Key, token: str) -> AbstractAsyncContextManager[Work]:
        """For one run. What was not committed at its end is rolled back."""
        ...


class Once:
    """One handler, made effectively once. `place`: the physical name of its queue or group.

    `trouble`: why its store can't be asked, None while all is well. Runs of this process share one token, and `_busy` keeps them apart:
    so a step whose answer was lost can simply be taken again.
    """

    def __init__(self, store: Store, place: str, clock: Clock) -> None:
        self.trouble: str | None = None
        self.resources: dict[Delivery[Any], Any] = {}  # of the runs at work, where the handler asks for one
        self._store = store
        self._place = place
        self._clock = clock
        self._token = secrets.token_hex(8)
        self._busy: set[Key] = set()
        self._held: set[Key] = set()  # in progress, in our name: renewed
        self._unrecorded: set[Key] = set()  # handled, and the store could not be told
        self._shut_until = 0.0  # monotonic; it is no use asking before
        self._failures = 0
        self._poll = min(LONGEST_POLL, store.lease / 4)
        self._timer: Timer | None = None
        self._beating: asyncio.Task[None] | None = None

    def around(self, handling: Handling, *, transactional: bool = False, in_thread: bool = False) -> Handling:
        """The same handler, run once for each message. `transactional`: it asks for the store's resource."""
        run = self._in_transaction(handling) if transactional else self._recorded(handling)

        async def once(delivery: Delivery[Any]) -> None:
            key = (self._place, _short(delivery.message.id))
            if key in self._busy:
                raise self._waits("it is being handled in this process")
            self._busy.add(key)
            settler, delivery.settler = delivery.settler, _DECIDED_BY_RETURNING
            try:
                await self._begin(key)
                await run(delivery, key)
            except BaseException as error:
                # A thread can't be stopped: until it has ended, or its process has, nobody else may run this message.
                if not (in_thread and isinstance(error, asyncio.CancelledError)):
                    await self._free(key)
                raise
            finally:
                self._held.discard(key)
                self._busy.discard(key)
                delivery.settler = settler

        return once

    async def _begin(self, key: Key) -> None:
        """Returns if the handler may run."""
        if (wait := self._shut_until - self._clock.monotonic()) > 0:
            raise Postponed(max(wait, SHORTEST_WAIT), self.trouble or "its store can't be asked")
        try:
            if key in self._unrecorded:
                recorded = await self._store.finish(key, self._token)
                self._unrecorded.discard(key)
                standing = Standing.DONE if recorded else await self._store.begin(key, self._token)
            else:
                standing = await self._store.begin(key, self._token)
        except asyncio.CancelledError:
            self._held.add(key)  # perhaps; then it is freed
            raise
        except Exception as error:  # whatever it is: the handler does not run without protection
            raise self._shut(error) from error
        self._failures, self.trouble = 0, None
        if standing is Standing.TAKEN:
            raise self._waits("another run of it is in progress")
        if standing is Standing.DONE:
            raise Repeated
        self._held.add(key)

    def _recorded(self, handling: Handling) -> Callable[[Delivery[Any], Key], Any]:
        async def run(delivery: Delivery[Any], key: Key) -> None:
            await handling(delivery)
            self._unrecorded.add(key)  # until we know better: what was handled must not be freed
            try:
                ours = await self._store.finish(key, self._token)
            except Exception as error:
                raise self._shut(error) from error
            self._unrecorded.discard(key)
            if not ours:
                self._taken_away(key)

        return run

    def _in_transaction(self, handling: Handling) -> Callable[[Delivery[Any], Key], Any]:
        store = self._store
        if not isinstance(store, Transactional):
            raise ConfigError(f"{store} has no transactions")

        async def run(delivery: Delivery[Any], key: Key) -> None:
            async with store.transaction(key, self._token) as work:
                self.resources[delivery] = work.resource
                try:
                    await handling(delivery)
                finally:
                    del self.resources[delivery]
                try:
                    ours = await work.commit()
                except StoreUnavailable as error:  # committed or not: the next look at the store tells
                    raise self._shut(error) from error
            if not ours:
                self._taken_away(key)

        return run

    def _taken_away(self, key: Key) -> None:
        log.warning("%s: message %s ran longer than its lease in the store, and is another's by now", *key)
        raise self._waits("its lease in the store had ended")

    def _waits(self, why: str) -> Postponed:
        # Not all copies of a message at the same time: they would only be in each other's way.
        return Postponed(self._poll * random.uniform(0.5, 1), why)  # noqa: S311  # no secret

    def _shut(self, error: Exception) -> Postponed:
        """The store does not answer: leave it alone for a while. What to raise."""
        now = self._clock.monotonic()
        if now >= self._shut_until:  # several may find it out at the same time
            wait = back_off(self._failures)
            self._failures += 1
            self._shut_until = now + wait
            self.trouble = f"the store of what was handled can't be asked: {error}"
            known = isinstance(error, StoreUnavailable)
            text = "%s: %s; its messages wait, again in %.1f s"
            log.warning(text, self._place, self.trouble, wait, exc_info=None if known else error)
        return Postponed(max(self._shut_until - now, SHORTEST_WAIT), self.trouble or "")

    async def _free(self, key: Key) -> None:
        if key not in self._held or key in self._unrecorded:
            return
        try:
            await self._store.free(key, self._token)
        except Exception as error:  # it is ours still, or its lease ends by itself
            known = isinstance(error, StoreUnavailable)
            log.warning("%s: message %s stays taken until its lease ends: %s", *key, error, exc_info=not known)

    # While handlers run

    def start(self) -> None:
        self._timer = self._clock.call_later(self._store.lease / 3, self._beat)

    async def stop(self) -> None:
        """After the last run. What could not be recorded is tried once more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait([self._beating])
        if self._unrecorded:
            try:
                await within(self._clock, LAST_WORD, self._record())
            except Exception as error:
                self._tell_lost(error)
        self._token = secrets.token_hex(8)  # a thread that was left behind has a run of its own

    def _tell_lost(self, error: Exception) -> None:
        text = (
            "%s: %d messages were handled, and their store could not be told; they run again when their leases end: %s"
        )
        log.error(text, self._place, len(self._unrecorded), str(error) or type(error).__name__)

    def _beat(self) -> None:
        self.start()
        if self._beating is None or self._beating.done():
            self._beating = asyncio.get_running_loop().create_task(self._tend())

    async def _tend(self) -> None:
        """Renew what is in progress, record what could not be recorded, remove what is old, see whether an ill store is well."""
        try:
            await self._record()
            if held := list(self._held):
                for key, ours in zip(held, await self._store.renew(held, self._token), strict=True):
                    if not ours and key in self._held:
                        log.warning("%s: the lease of message %s in the store has ended while it is handled", *key)
            if self.trouble is not None and self._clock.monotonic() - self._shut_until > UNASKED:
                await self._store.free((self._place, self._token), self._token)  # nobody's key: it only has to answer
                self._failures, self.trouble = 0, None
            await self._store.tidy()
        except Exception as error:  # the next beat tries again; who begins says that it is ill
            log.debug("%s: the store could not be tended: %s", self._place, error, exc_info=True)

    async def _record(self) -> None:
        for key in self._unrecorded - self._busy:
            await self._store.finish(key, self._token)  # False: another one has it by now
            self._unrecorded.discard(key)


def _short(message_id: str) -> str:
    """A foreign id may be longer than a column, or hold what a database takes for no text: then every try would fail."""
    if len(message_id) <= LONGEST_ID and message_id.isprintable():
        return message_id
    return hashlib.sha256(message_id.encode("utf-8", "surrogatepass")).hexdigest()


class _DecidedByReturning:
    """In place of a delivery's settler while its handler runs: an ack before the mark would undo what it is for."""

    async def settle(self, delivery: Delivery[Any], verdict: Verdict) -> None:
        raise ConfigError(
            "a handler with idempotency=... does not settle its delivery by hand: return to ack it, raise Retry, DeadLetter or "
            "Discard for anything else"
        )

    def judge(self, delivery: Delivery[Any], error: BaseException | None) -> Verdict:
        raise ConfigError(
            "a handler with idempotency=... does not settle its delivery by hand: raise Retry, DeadLetter or Discard"
        )


_DECIDED_BY_RETURNING = _DecidedByReturning()
