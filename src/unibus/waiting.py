"""Waiting for what happens elsewhere, and work in the background: what every driver needs the same way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

from unibus.clock import Clock
from unibus.errors import ConnectionLost

T = TypeVar("T")

AT_ONCE = 8
OWN_CALL = "the client of the broker cancelled its own call"


class Waiter:
    """What several may wait for at once; `wake` lets all of them go on. It keeps nothing: who comes later waits."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._future: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def wait(self, seconds: float) -> None:
        """Until the next `wake`, or so long. Look again afterwards: it does not say which."""
        if self._future is None or self._future.done():
            self._future = asyncio.get_running_loop().create_future()
        timer = self._clock.call_later(seconds, self.wake)
        try:
            await asyncio.shield(self._future)
        finally:
            timer.cancel()


async def happens(event: asyncio.Event, seconds: float) -> bool:
    """Wait until it is set, real time, or so long; is it set?"""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


async def answered(call: Awaitable[T]) -> T:
    """Await a call of an adapter. What its client calls off by itself is an error of the call, not the end of who waits.

    Raises ConnectionLost for an `asyncio.CancelledError` that nobody has asked this task for: a client cancels its own
    waiting calls when its connection has ended. In a task that was ever asked to end it is taken for that: a signal may
    have asked just before this call, and the error come within it.
    """
    try:
        return await call
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ConnectionLost(OWN_CALL) from None


class Tasks:
    """Work in the background that belongs to one owner. `failed` gets the error of each task that ended with one."""

    def __init__(self, failed: Callable[[BaseException], object]) -> None:
        self._failed = failed
        self._running: set[asyncio.Task[Any]] = set()

    def __iter__(self) -> Iterator[asyncio.Task[Any]]:
        return iter(tuple(self._running))

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            self._failed(exc)


async def side_by_side(items: Iterable[T], act: Callable[[T], Awaitable[object]], at_once: int = AT_ONCE) -> None:
    """`act` on all items, `at_once` of them at a time. The first failure is raised, once nothing runs any more."""
    waiting = iter(list(items))

    async def work() -> None:
        for item in waiting:
            await act(item)

    for result in await asyncio.gather(*(work() for _ in range(at_once)), return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
