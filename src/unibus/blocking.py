"""Sending from synchronous code: the same verbs, blocking."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterable
from concurrent.futures import Future, wait
from contextvars import copy_context
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from unibus.channel import Queue, Topic
from unibus.errors import Closed

if TYPE_CHECKING:
    from unibus.bus import Bus


LOOK = 1.0  # seconds between two looks whether the loop is still there


class Blocking:
    """send, send_many, publish, publish_many and request of a bus, for threads without an event loop.

    Where the bus is open already, its loop does the work; otherwise a thread opens the bus, and closes it at the end. That
    takes a connection: a program that sends again and again enters once, and stays inside as long as it lives. It may also end
    inside, since what was sent is confirmed. After a fork the bus of the parent can't be used: that raises Closed.
    Parameters, results and errors are those of the methods of `Bus`. Correlation ids flow into it as everywhere.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closing: asyncio.Event | None = None

    def __enter__(self) -> Self:
        if _in_a_loop():
            raise Closed("bus.blocking() would block this thread's event loop; use `await bus.send(...)` here")
        if self._bus._session is not None:
            self._check_process()
            self._loop = self._bus._loop
            return self
        opened: Future[asyncio.AbstractEventLoop] = Future()
        # A daemon, for who never leaves the block: else the program would wait for this thread before its exit handlers run.
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._keep_open(opened)), name="unibus blocking", daemon=True
        )
        self._thread.start()
        try:
            self._loop = opened.result()
        except BaseException:
            self._thread.join()
            self._thread = None
            raise
        return self

    async def _keep_open(self, opened: Future[asyncio.AbstractEventLoop]) -> None:
        self._closing = asyncio.Event()
        try:
            await self._bus.__aenter__()
        except BaseException as error:
            opened.set_exception(error)
            return
        try:
            opened.set_result(asyncio.get_running_loop())
            await self._closing.wait()
        finally:
            await self._bus.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        loop, self._loop = self._loop, None
        if self._thread is not None and loop is not None and self._closing is not None:
            loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()
            self._thread = None

    def send(self, queue: Queue[Any] | str, body: Any, **more: Any) -> str:
        return str(self._wait(self._bus.send(queue, body, **more)))

    def send_many(self, queue: Queue[Any] | str, bodies: Iterable[Any], **more: Any) -> list[str]:
        ids: list[str] = self._wait(self._bus.send_many(queue, bodies, **more))
        return ids

    def publish(self, topic: Topic[Any] | str, body: Any, **more: Any) -> str:
        return str(self._wait(self._bus.publish(topic, body, **more)))

    def publish_many(self, topic: Topic[Any] | str, bodies: Iterable[Any], **more: Any) -> list[str]:
        ids: list[str] = self._wait(self._bus.publish_many(topic, bodies, **more))
        return ids

    def request(self, queue: Queue[Any] | str, body: Any, **more: Any) -> Any:
        return self._wait(self._bus.request(queue, body, **more))

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run it on the bus' loop, in this thread's context, and wait."""
        loop = self._loop
        if loop is None or _in_a_loop():
            coroutine.close()
            if loop is not None:
                raise Closed("a blocking call would block this thread's event loop; use `await` here")
            raise Closed("use `with bus.blocking() as sender:`")
        try:
            self._check_process()
        except Closed:
            coroutine.close()
            raise
        done: Future[Any] = Future()
        context = copy_context()

        def start() -> None:
            task = loop.create_task(coroutine, context=context)
            task.add_done_callback(finish)

        def finish(task: asyncio.Task[Any]) -> None:
            if task.cancelled():
                done.set_exception(Closed("the bus was closed meanwhile"))
            elif (error := task.exception()) is not None:
                done.set_exception(error)
            else:
                done.set_result(task.result())

        try:
            loop.call_soon_threadsafe(start)
        except RuntimeError:  # its loop is closed
            coroutine.close()
            raise Closed("the bus was closed meanwhile") from None
        while not wait([done], LOOK).done:
            if loop.is_closed():  # with our call in its hands
                coroutine.close()
                raise Closed("the bus was closed meanwhile")
        return done.result()

    def _check_process(self) -> None:
        if os.getpid() != self._bus._pid:  # the thread of its loop is not here, and the call would wait for ever
            raise Closed("the bus was opened before this process was forked; open it in each process, after the fork")


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
