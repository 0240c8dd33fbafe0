"""Does it still receive? A subscription that has fallen silent without an error is noticed here.

A receive is to return within the seconds it was given, and to raise once its subscription is over. One that does neither
would leave a process that is connected, well and idle. What is counted are looks, not seconds: a process that got no
processor for a while, or whose event loop was blocked, has had no time to receive either.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from unibus.adapter import Standing, Subscription
from unibus.clock import Clock, Timer, within
from unibus.waiting import answered

log = logging.getLogger("unibus")

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
