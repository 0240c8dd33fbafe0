"""Several processes that run the same application.

One that is killed by a signal (a crash, the OOM killer) is started again, later and later if it keeps dying. One that ends by
itself has said why, and would end so again: the others are drained, and its exit code is that of the whole.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import nullcontext

from unibus.cli.probe import OfWorkers, serving
from unibus.clock import SystemClock, within
from unibus.supervisor import back_off

log = logging.getLogger("unibus")

_LONGEST_WAIT = 10.0  # seconds until one that dies again and again is started again; who lived longer was well
_AT_ONCE = 128  # and the signal's number: the exit code after a second signal


async def supervise(command: Sequence[str], count: int, probe: str | None = None) -> int:
    """Run `command` in `count` processes until a signal; the exit code. `probe`: HOST:PORT where their state can be asked.

    The first SIGTERM or SIGINT drains them, a second one ends all at once. Should this process be killed, they find their stdin
    closed.
    """
    state = OfWorkers(count) if probe is not None else None
    crew = _Crew(command, state)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, crew.signalled, number)
    async with serving(probe, state) if probe is not None and state is not None else nullcontext():
        codes = await asyncio.gather(*(crew.keep(n) for n in range(1, count + 1)))
    return crew.code or max(codes)


class _Crew:
    def __init__(self, command: Sequence[str], state: OfWorkers | None) -> None:
        self.code = 0  # why all of it ends, unless it was asked to
        self._command = command
        self._state = state
        self._listening: set[asyncio.Task[None]] = set()
        self._processes: set[Process] = set()
        self._stopping = asyncio.Event()

    def signalled(self, number: int) -> None:
        if self._stopping.is_set():
            self.code = _AT_ONCE + number
            for process in self._processes:
                process.kill()
            return
        log.info("%s: draining %d workers", signal.Signals(number).name, len(self._processes))
        self._stop()

    def _stop(self) -> None:
        self._stopping.set()
        for process in self._processes:
            process.terminate()

    async def _start(self, number: int) -> Process:
        if self._state is None:
            return await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, process_group=0)
        ours, its = os.pipe()
        try:
            task = asyncio.create_task(self._state.listen(number, ours))
            self._listening.add(task)
            task.add_done_callback(self._listening.discard)
            command = [*self._command, "--tell", str(its)]
            return await asyncio.create_subprocess_exec(*command, stdin=PIPE, process_group=0, pass_fds=(its,))
        finally:
            os.close(its)  # the worker has its own; its end is the end of the pipe

    async def keep(self, number: int) -> int:
        """Worker `number`, as often as it takes; the exit code of the last one."""
        failures = 0
        while not self._stopping.is_set():
            since = time.monotonic()
            # A group of its own: a Ctrl-C at the terminal comes to us alone, and each worker gets one signal, not two.
            process = await self._start(number)
            self._processes.add(process)
            if self._stopping.is_set():  # meanwhile
                process.terminate()
            log.info("worker %d is process %d", number, process.pid)
            code = await process.wait()
            self._processes.discard(process)
            if self._stopping.is_set():
                return 0 if code == -signal.SIGTERM else abs(code)  # stopped before it had begun
            if code >= 0:
                log.error("worker %d (process %d) ended with code %d; so do the others", number, process.pid, code)
                self.code = code
                self._stop()
                return code
            failures = failures + 1 if time.monotonic() - since < _LONGEST_WAIT else 0
            wait = back_off(failures, _LONGEST_WAIT)
            name = signal.Signals(-code).name
            log.error("worker %d (process %d) was killed by %s; again in %.1f s", number, process.pid, name, wait)
            try:
                await within(SystemClock(), wait, self._stopping.wait())
            except TimeoutError:
                continue
        return 0
