"""Brokers as processes of this machine. Linux only: processes are found by a mark in their environment, in /proc.

The mark is the folder of the broker. A process inherits it however often it forks and detaches (epmd, erl_child_setup,
the JVM's helpers), so that stopping a broker leaves nothing behind, and never touches what the supply didn't start.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from .broker import LOOPBACK, Kind, Record, Site, SupplyError, tail, wait_until

MARK = "UNIBUS_TEST_BROKER_HOME"
_GRACE = 30.0  # seconds between SIGTERM and SIGKILL at a restart
_DEATH = 10.0  # seconds until the kernel has cleared away what got SIGKILL
_EXEC = 0.1  # seconds that a process may show no environment while it becomes another program
_EXEC_BUSY = 2.0  # where the machine may be so busy that it stays in between for long
_SETTLED = 5.0  # seconds that a kill waits for declarations to reach the disk


class Native:
    source = "native"
    address = LOOPBACK

    def unavailable(self) -> str | None:
        """Why no native process can be started here; None when one can."""
        return None if sys.platform == "linux" else f"native brokers need Linux, this is {sys.platform}"

    def folder(self, home: Path) -> str:
        return str(home)

    def create(self, kind: Kind, site: Site, home: Path, files: Mapping[str, bytes]) -> None:
        kind.install()
        self.resume(kind, Record(kind.name, self.source, site, {}), home)

    def resume(self, kind: Kind, record: Record, home: Path) -> None:
        command = kind.native(record.site)
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(home),
            "LC_ALL": "C.UTF-8",
            **command.environment,
            MARK: str(home),
        }
        # The shell ends at once, so that the server belongs to init and outlives us, in a session of its own: a Ctrl-C
        # for the tests doesn't reach it.
        subprocess.run(
            ["/bin/sh", "-c", 'exec </dev/null >>"$0" 2>&1; "$@" &', str(self._log(home)), *command.argv],
            env=environment,
            cwd=home,
            start_new_session=True,
            check=True,
        )

    def pid(self, kind: Kind, record: Record, home: Path) -> int | None:
        return next((pid for pid, name in processes(home).items() if name == kind.process), None)

    def running(self, record: Record, home: Path) -> bool:
        return wait_until(lambda: bool(processes(home)), _EXEC_BUSY)

    def kill(self, kind: Kind, record: Record, home: Path) -> None:
        if not wait_until(lambda: kind.settled(home), _SETTLED):
            print(f"{home.name}: killed with declarations that are not on disk yet", file=sys.stderr)
        pid = self.pid(kind, record, home)
        if pid is not None:
            _end([pid], home.name)

    def terminate(self, kind: Kind, record: Record, home: Path) -> None:
        pid = self.pid(kind, record, home)
        if pid is not None:
            _signal(pid, signal.SIGTERM)
            _signal(pid, signal.SIGCONT)  # one that is paused would not hear of it
            if not wait_until(lambda: _dead(pid), _GRACE):
                self.kill(kind, record, home)

    def pause(self, kind: Kind, record: Record, home: Path) -> None:
        self._send(signal.SIGSTOP, kind, record, home)

    def unpause(self, kind: Kind, record: Record, home: Path) -> None:
        self._send(signal.SIGCONT, kind, record, home)

    def _send(self, number: signal.Signals, kind: Kind, record: Record, home: Path) -> None:
        pid = self.pid(kind, record, home)
        if pid is None:
            raise SupplyError(f"{home.name} isn't running, so it gets no {number.name}")
        _signal(pid, number)

    def remove(self, record: Record | None, home: Path) -> None:
        # Its data goes too, so nothing is gained by a graceful end. Repeated, since a process may fork while we look; and
        # one in the midst of exec shows no environment for a moment.
        while wait_until(lambda: bool(processes(home)), _EXEC):
            _end(processes(home), home.name)
        for entry in home.iterdir():  # logs stay, to read after a failed run
            if entry.is_dir() and entry.name != "log":
                shutil.rmtree(entry)
            elif entry.is_file():
                entry.unlink()

    def complaint(self, record: Record, home: Path) -> str:
        return "\n".join(f"{log}:\n{tail(log)}" for log in sorted((home / "log").glob("*.log")))

    def _log(self, home: Path) -> Path:
        folder = home / "log"
        folder.mkdir(exist_ok=True)
        return folder / "output.log"


def processes(home: Path) -> dict[int, str]:
    """Command names by process id of everything that was started for the broker in `home`. The dead don't count.

    Those of PostgreSQL write their titles over the mark; but their parent has it, and comes first.
    """
    mark = f"{MARK}={home}".encode()
    found, others = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "comm").read_text().strip()
            else:
                name, rest = (entry / "stat").read_text().partition("(")[2].rsplit(")", 1)
                others[int(entry.name)] = name, int(rest.split()[1])
        except OSError:  # it ended meanwhile, or it is another user's and so none of ours
            continue
    children = {pid: name for pid, (name, parent) in others.items() if parent in found}
    return {**found, **children}


def _end(pids: Collection[int], name: str) -> None:
    for pid in pids:
        _signal(pid, signal.SIGKILL)
    if not wait_until(lambda: all(_dead(pid) for pid in pids), _DEATH):
        raise SupplyError(f"{name}: still running {_DEATH:.0f} s after SIGKILL: {sorted(pids)}")


def _dead(pid: int) -> bool:
    """A process that lost its memory may still hold its sockets: it is dead when it is gone, or a zombie of one thread."""
    folder = Path(f"/proc/{pid}")
    try:
        # After the command name, which stands in brackets and may hold anything.
        state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        return state in "ZX" and len(list((folder / "task").iterdir())) <= 1
    except OSError:  # it is gone
        return True


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it ended by itself, which is what was wanted
        return
