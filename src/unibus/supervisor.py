"""The link to the broker, kept up: one place that connects, declares, and reconnects with back-off."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from unibus import telemetry
from unibus.adapter import Adapter, Topology
from unibus.clock import Clock, within
from unibus.errors import (
    AuthenticationFailed,
    Closed,
    ConfigError,
    ConnectionLost,
    PermissionDenied,
    UnibusError,
)
from unibus.telemetry import Counts
from unibus.waiting import answered

log = logging.getLogger("unibus")
T = TypeVar("T")

FIRST_WAIT = 0.1
LONGEST_WAIT = 2.0  # when a broker takes requests again, messages flow again within 5 s: so often it is tried
STEADY = 10.0  # seconds that a link has to last to count as a success
PATIENCE = 10.0  # seconds that a question waits for a link
# Trying again would not help, and may lock the account.
FATAL = (AuthenticationFailed, PermissionDenied, ConfigError)


def back_off(failures: int, longest: float = LONGEST_WAIT) -> float:
    """Seconds before the next try, with jitter so that many processes don't come back at once."""
    return float(min(FIRST_WAIT * 2.0 ** min(failures, 16), longest) * random.uniform(0.75, 1.25))  # noqa: S311  # no secret


class Link:
    """One adapter, connected and declared. `epoch` counts the connections: a failure of an older one is old news."""

    def __init__(self, adapter: Adapter, topology: Topology, clock: Clock, counts: Counts) -> None:
        self.adapter = adapter
        self.topology = topology
        self.epoch = 0
        self.failure: UnibusError | None = None  # why the link is down for good
        self.failed = asyncio.Event()  # set with `failure`
        self.trouble: str | None = None  # why it is down now
        self.on_lost: set[Callable[[], object]] = set()  # of those that may be busy with something else when it breaks
        self._clock = clock
        self._counts = counts
        self._up = asyncio.Event()
        self._closed = False
        self._short = 0  # links in a row that broke soon after they came up
        self._since = float("-inf")  # when it came up again, monotonic
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect and declare once; a failure is the caller's."""
        try:
            await answered(self._connect())
        except BaseException:
            await answered(self.adapter.close())
            raise
        self.epoch += 1
        self._up.set()

    async def _connect(self) -> None:
        await self.adapter.connect()
        await self.adapter.declare(self.topology)

    @property
    def is_up(self) -> bool:
        return self._up.is_set() and not self._closed

    async def up(self, timeout: float | None = None) -> int:
        """Wait until the link is up; its epoch. Raises ConnectionLost after `timeout`, Closed, or what ended the link."""
        if not self._up.is_set():
            try:
                await within(self._clock, timeout, self._up.wait())
            except TimeoutError:
                raise ConnectionLost(f"no link to the broker: {self.trouble}") from None
        if self.failure is not None:
            raise self.failure
        if self._closed:
            raise Closed("the bus is closed")
        return self.epoch

    async def ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """The answer to a question that changes nothing on the broker; asked once more when the link breaks under it.

        Nothing else may be going on that would notice the break. Raises what the broker says; ConnectionLost when there is
        no link for 10 s.
        """
        epoch = await self.up(PATIENCE)
        try:
            return await answered(question())
        except ConnectionLost as error:
            self.lost(epoch, error)
        epoch = await self.up(PATIENCE)
        try:
            return await answered(question())
        except ConnectionLost as error:
            self.lost(epoch, error)
            raise

    def lost(self, epoch: int, error: BaseException) -> None:
        """Say that the connection of `epoch` broke. Starts to reconnect, once."""
        if epoch != self.epoch or self._closed or self.failure is not None or not self._up.is_set():
            return
        self._up.clear()
        self.trouble = str(error) or type(error).__name__
        log.warning("link to the broker lost: %s", self.trouble)
        self._task = asyncio.create_task(self._reconnect())
        for tell in self.on_lost:
            tell()

    def give_up(self, error: UnibusError) -> None:
        """Trying again would not help: from now on everything gets `error`."""
        if self.failure is None and not self._closed:
            log.error("link to the broker given up: %s", error)
            self.failure = error
            self.failed.set()
            self._up.set()

    async def redeclare(self) -> None:
        """Make again what was deleted on the broker (declare=create), or say what is missing. Never raises."""
        epoch = self.epoch
        try:
            await answered(self.adapter.declare(self.topology))
        except ConnectionLost as error:
            self.lost(epoch, error)
        except Exception as error:
            log.warning("what was deleted could not be declared again: %s", error)

    async def _reconnect(self) -> None:
        # A link that comes up and breaks at once is no success: without a wait it would be tried thousands of times a second.
        # How often it could not come up before that says nothing of it: else a cut after a long outage would cost another wait.
        self._short = self._short + 1 if self._clock.monotonic() - self._since < STEADY else 0
        if self._short:
            await self._clock.sleep(back_off(self._short - 1))
        failures = 0
        while True:
            try:
                await answered(self.adapter.close())
                await answered(self._connect())
            except FATAL as error:
                self.give_up(error)
                return
            except Exception as error:
                self.trouble = str(error) or type(error).__name__
                wait = back_off(failures)
                failures += 1
                known = isinstance(error, UnibusError)
                log.warning("no link to the broker yet, again in %.1f s: %s", wait, error, exc_info=not known)
                await self._clock.sleep(wait)
            else:
                break
        self.epoch += 1
        self._since = self._clock.monotonic()
        self.trouble = None
        self._counts.add(telemetry.RECONNECTED, None)
        log.info("link to the broker is up again")
        self._up.set()

    async def close(self) -> None:
        """Idempotent."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        self._up.set()
        await answered(self.adapter.close())
