"""Does it still receive? A subscription that has fallen silent without an error is noticed here.

A receive is to return within the seconds it was given, and to raise once its subscription is over. One that does neither
would leave a process that is connected, well and idle. What is counted are looks, not seconds: a process that got no
processor for a while, or whose event loop was blocked, has had no time to receive either.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import current_task
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from unibus.adapter import Standing, Subscription
from unibus.clock import Clock, Timer, within
from unibus.errors import ConnectionLost
from unibus.waiting import OWN_CALL, answered

log = logging.getLogger("unibus")
T = TypeVar("T")

LOOK = 5.0  # seconds
LONG = 2  # looks, after which a receive is longer than it was asked to be: is the subscription still there?
ENDLESS = 6  # looks, after which nobody believes that it will return; a slow answer is no silence


class Receiving:
    """One loop of receives. `looks`: how often the watchdog has looked at the receive under way; None between receives."""

    __slots__ = ("looks",)

    def __init__(self) -> None:
        self.looks: int | None = None


class Watchdog:
    """Of one subscription. `silent` is told why nothing comes from it any more; a standby member is left alone."""

    def __init__(self, subscription: Subscription, clock: Clock, silent: Callable[[str], object]) -> None:
        self._subscription = subscription
        self._clock = clock
        self._silent = silent
        self._loops: list[Receiving] = []
        self._timer: Timer | None = None
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._timer = self._clock.call_later(LOOK, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def loop(self) -> Receiving:
        """For a loop of receives, which says when it is in one."""
        self._loops.append(receiving := Receiving())
        return receiving

    def _look(self) -> None:
        longest = 0
        for receiving in self._loops:
            if receiving.looks is not None:
                receiving.looks += 1
                longest = max(longest, receiving.looks)
        if longest >= ENDLESS:
            self._silent(f"a receive has not returned for {longest * LOOK:g} s")
        elif longest >= LONG and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._ask())
        self.begin()

    async def _ask(self) -> None:
        if await standing(self._subscription, self._clock) == "gone":
            self._silent("its subscription is gone, and its receive has not said so")


async def standing(subscription: Subscription, clock: Clock) -> Standing | None:
    """What it says of itself; None where it can't tell, or not in time."""
    try:
        return await within(clock, LOOK, answered(subscription.check()))
    except Exception as error:
        log.debug(
            "the subscription of %s can't be checked: %s", subscription.address, str(error) or type(error).__name__
        )
        return None


class Calls:
    """Calls of one owner that have to end, one at a time of each task.

    They are on every message's way: there is one timer for all, and only while there are any.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._looks = 0
        self._calls: dict[asyncio.Task[Any], tuple[int, float]] = {}  # at which look it began, and its seconds
        self._cut: set[asyncio.Task[Any]] = set()  # cancelled, since they have not ended
        self._timer: Timer | None = None

    async def bounded(self, call: Awaitable[T], seconds: float) -> T:
        """What it returns. Raises ConnectionLost when it has not returned in about so many seconds, and cancels it."""
        task = current_task()
        assert task is not None  # noqa: S101  # we are in one
        self._calls[task] = self._looks, seconds
        if self._timer is None:
            self._timer = self._clock.call_later(LOOK, self._look)
        try:
            return await call
        except asyncio.CancelledError:
            if task.cancelling() > (task in self._cut):
                raise
            if task in self._cut:
                raise ConnectionLost(f"a call of the adapter has not returned for {seconds:g} s") from None
            raise ConnectionLost(OWN_CALL) from None
        finally:
            del self._calls[task]
            if self._cut and task in self._cut:
                self._cut.discard(task)
                task.uncancel()

    def slow(self) -> float | None:
        """Seconds that the longest has taken, once that is too long for a call that will end well."""
        looks = max((self._looks - began for began, _ in self._calls.values()), default=0)
        return looks * LOOK if looks >= LONG else None

    def _look(self) -> None:
        self._looks += 1
        for task, (began, seconds) in self._calls.items():
            if (self._looks - began) * LOOK >= seconds and task not in self._cut and task.cancel():
                self._cut.add(task)
        self._timer = self._clock.call_later(LOOK, self._look) if self._calls else None
