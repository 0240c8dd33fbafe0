"""Cutting the links of this process to the broker, whichever client library holds them; and restarting the broker.

The sockets themselves are shut down, both ways: the peers see the end of the stream, as when a cable is pulled between them or a
load balancer is restarted. A broker inside this process has no sockets, and says itself how its links are cut.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

from unibus import Bus
from unibus.memory_broker import MemoryBroker

LAST_LINES = 3  # of what a command said that failed
AGAIN = 0.01  # seconds until what was connected anew is cut, while the fault lasts
_DESCRIPTORS = Path("/dev/fd")


def inside(buses: Iterable[Bus]) -> set[MemoryBroker]:
    """The brokers that live in this process, of the buses that are open."""
    return {broker for bus in buses if bus._session is not None and isinstance(broker := bus.native, MemoryBroker)}


@asynccontextmanager
async def cut(buses: Iterable[Bus]) -> AsyncIterator[None]:
    """Cut all that there are now, and what is connected anew, until the context ends. Raises LookupError: there are none."""
    if brokers := inside(buses):
        for broker in brokers:
            broker.cut(down=True)
        try:
            yield
        finally:
            for broker in brokers:
                broker.down = False
        return
    if not shut_down():
        raise LookupError("this process has no connection that could be cut")
    cutting = asyncio.create_task(_go_on())
    try:
        yield
    finally:
        cutting.cancel()
        await asyncio.wait([cutting])


async def _go_on() -> None:
    while True:
        await asyncio.sleep(AGAIN)
        shut_down()


def shut_down() -> int:
    """Shut down each TCP connection of this process; how many there were."""
    count = 0
    for connection in _sockets():
        with closing(connection):
            try:
                connection.getpeername()
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # it listens, or is gone in this moment
                continue
            count += 1
    return count


async def by_command(command: str) -> None:
    """Run the shell's command that restarts the broker, killed with all it started where the caller is cancelled. Raises RuntimeError."""
    with tempfile.TemporaryFile() as said:  # no pipe: a server that it starts would keep that open
        process = await asyncio.create_subprocess_shell(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        try:
            status = await process.wait()
        except asyncio.CancelledError:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            raise
        if status:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
            raise RuntimeError(f"the command that restarts the broker ended with status {status}: {' / '.join(lines)}")


def _sockets() -> Iterator[socket.socket]:
    """Copies of the descriptors: to close one ends nothing."""
    if not _DESCRIPTORS.is_dir():
        return
    for descriptor in [int(path.name) for path in _DESCRIPTORS.iterdir()]:
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            copy = socket.socket(fileno=os.dup(descriptor))
        except OSError:  # closed meanwhile, as the one by which the folder was read
            continue
        if copy.family in {socket.AF_INET, socket.AF_INET6} and copy.type == socket.SOCK_STREAM:
            yield copy
        else:
            copy.close()
