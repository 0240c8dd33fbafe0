"""Threads for handlers that are plain functions.

Not an executor of the standard library: those join their threads at exit, so one handler that never returns would keep
the process from ending after its drain.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

_Job = tuple[Callable[[], object], asyncio.Future[Any], asyncio.AbstractEventLoop]


class Threads:
    """Up to `size` daemon threads, started when needed."""

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._started = 0
        self._idle = 0  # counted by the loop's thread only

    async def run(self, function: Callable[[], object]) -> object:
        """Call `function` in a thread, in the caller's context. Cancelling the wait doesn't stop it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        context = copy_context()
        if self._idle:
            self._idle -= 1
        elif self._started < self._size:
            self._started += 1
            threading.Thread(target=self._work, name=f"{self._name} {self._started}", daemon=True).start()
        self._jobs.put((lambda: context.run(function), future, loop))
        return await future

    def close(self) -> None:
        """Idle threads end; busy ones end after their job."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, future, loop = job
            result: object = None
            error: BaseException | None = None
            try:
                result = function()
            except BaseException as raised:
                error = raised
            try:
                loop.call_soon_threadsafe(self._report, future, result, error)
            except RuntimeError:  # the loop was closed meanwhile: nobody is there to tell
                return
            del job, function, future, result, error  # hold nothing while idle

    def _report(self, future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
        self._idle += 1
        if future.done():
            return
        if isinstance(error, StopIteration):  # a future can't carry it
            wrapped = RuntimeError("the handler raised StopIteration")
            wrapped.__cause__ = error
            error = wrapped
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
