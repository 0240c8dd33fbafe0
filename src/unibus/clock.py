"""The one clock. Everything that waits or stamps takes its time from here, so that tests can drive it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Awaitable, Callable
from time import monotonic as _monotonic
from time import time as _time
from typing import Protocol, TypeVar

T = TypeVar("T")


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    def time(self) -> float:
        """Seconds since the Unix epoch: for stamps that travel."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back: for durations within this process."""
        ...

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        """Call `callback` on the running loop after `delay` seconds."""
        ...

    async def sleep(self, delay: float) -> None: ...


async def within(clock: Clock, seconds: float | None, awaitable: Awaitable[T]) -> T:
    """Await with a deadline on `clock`; None waits for ever. Raises the built-in TimeoutError and cancels the rest.

    Costs a task: not for the path of every message.
    """
    if seconds is None:
        return await awaitable
    current = asyncio.current_task()
    before = current.cancelling() if current is not None else 0  # who cleans up after a cancellation has deadlines, too
    task = asyncio.ensure_future(awaitable)
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = task.cancel()

    timer = clock.call_later(max(0.0, seconds), expire)
    try:
        return await task
    except asyncio.CancelledError:
        if expired and task.cancelled() and (current is None or current.cancelling() <= before):
            raise TimeoutError from None
        raise
    finally:
        timer.cancel()
        if not task.done():
            task.cancel()


class Deadline:
    """A moment that the steps of something share: each gets what the ones before it have left."""

    LEAST = 0.25  # seconds for a step that comes after it: where nothing hangs, that is enough

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._at = clock.monotonic() + seconds

    def left(self) -> float:
        return max(self.LEAST, self._at - self._clock.monotonic())


class SystemClock:
    """Real time."""

    time = staticmethod(_time)
    monotonic = staticmethod(_monotonic)

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        return asyncio.get_running_loop().call_later(delay, callback)

    async def sleep(self, delay: float) -> None:
        await asyncio.sleep(delay)


class _VirtualTimer:
    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class VirtualClock:
    """Time that moves only when told to: `move(seconds)` fires what falls due, in order.

    Kept to whole nanoseconds, so that ten moves of 0.1 s are one second.
    """

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self._start = start
        self._elapsed = 0.0
        self._firing = False  # a callback runs
        self._sequence = itertools.count()
        self._timers: list[tuple[float, int, _VirtualTimer]] = []

    def time(self) -> float:
        return self._start + self._elapsed

    def monotonic(self) -> float:
        return self._elapsed

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        timer = _VirtualTimer(callback)
        at = round(self._elapsed + max(0.0, delay), 9)
        if (
            self._firing and delay > 0 and at <= self._elapsed
        ):  # who asks for a rest that can't be seen gets one that can
            at = round(self._elapsed + 1e-9, 9)
        heapq.heappush(self._timers, (at, next(self._sequence), timer))
        return timer

    async def sleep(self, delay: float) -> None:
        done = asyncio.get_running_loop().create_future()
        timer = self.call_later(delay, lambda: None if done.done() else done.set_result(None))
        try:
            await done
        finally:
            timer.cancel()

    def next_due(self) -> float | None:
        """Seconds until the next timer, or None."""
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - self._elapsed) if self._timers else None

    def move(self, seconds: float) -> None:
        """Go forward by `seconds` and fire the timers that fall due. Tasks they wake run afterwards."""
        target = round(self._elapsed + seconds, 9)
        while self.next_due() is not None and self._timers[0][0] <= target:
            when, _, timer = heapq.heappop(self._timers)
            self._elapsed = max(self._elapsed, when)
            callback, timer.callback = timer.callback, None
            if callback is not None:
                self._firing = True
                try:
                    callback()
                finally:
                    self._firing = False
        self._elapsed = target
