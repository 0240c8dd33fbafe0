"""What a broker of the supply is: the facts about one that runs, and what each kind of broker has to say about itself."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

LOOPBACK = "127.0.0.1"
STATE = "broker.json"
_POLL = 0.05


class SupplyError(Exception):
    """A test broker can't be had, or can't do what was asked of it. The text names the cause and what to do."""


@dataclass(frozen=True)
class Site:
    """Where one broker runs, as its configuration has to spell it."""

    name: str  # "rabbitmq", or "rabbitmq-<instance>" for a private one
    node: str  # unique on this machine, also among checkouts
    address: str  # to listen on: loopback, or every interface inside a container
    folder: str  # where the broker finds its files and keeps its data
    ports: Mapping[str, int]
    user: str
    password: str


@dataclass(frozen=True)
class Command:
    """A server process: what to run and what its environment is on top of PATH and HOME."""

    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


class Kind(Protocol):
    """One kind of broker. A new one is a file with a class like this and a line in `KINDS`."""

    name: str  # its variables are UNIBUS_TEST_<NAME>_*
    process: str  # the command name of the server process, as in `ps -o comm`
    image: str  # for Docker; the same as in docker-compose.test.yml
    ports: Sequence[str]  # names of the ports that clients use
    private_ports: Sequence[str]  # and of those that only a native process needs

    def install(self) -> None:
        """Make the native program available, or raise SupplyError that says what to install."""

    def files(self, site: Site) -> Mapping[str, bytes]:
        """Configuration by file name, to be put into `site.folder` before the first start."""

    def native(self, site: Site) -> Command:
        """The server process that reads these files."""

    def container(self, site: Site) -> Command:
        """The command (empty: that of the image) and environment which make the image read these files."""

    def variables(self, site: Site, files: Path) -> Mapping[str, str]:
        """What tests get to know, by the last part of the variable's name. `URL` is the broker itself."""

    def settled(self, home: Path) -> bool:
        """Whether what clients have declared survives a SIGKILL by now; `kill` waits for it."""

    def check(self, url: str) -> None:
        """Return when the broker at `url` answers; raise OSError when it doesn't."""


@dataclass
class Record:
    """A broker that the supply started. Kept as JSON in its folder, so that any later process can use or stop it."""

    kind: str
    source: str  # "docker" or "native"
    site: Site
    variables: dict[str, str]

    def save(self, home: Path) -> None:
        # Written beside and renamed: a reader never sees half of it. It holds a password, if a worthless one.
        draft = home / f"{STATE}.{os.getpid()}"
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(asdict(self), indent=2))
        draft.replace(home / STATE)

    @classmethod
    def load(cls, home: Path) -> Record | None:
        try:
            data = json.loads((home / STATE).read_text())
            return cls(**{**data, "site": Site(**data["site"])})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            # Another version of the supply wrote it. Its processes are found without, a container by its name.
            print(f"{home / STATE} is of another version, so it is ignored ({error!r})", file=sys.stderr)
            return None


def variable(kind: str, suffix: str = "URL") -> str:
    return f"UNIBUS_TEST_{kind.upper()}_{suffix}"


def brokers_folder() -> Path:
    """`.brokers` of the checkout that holds the current folder; of the current folder itself outside any project."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").exists() or (folder / ".git").exists():
            return folder / ".brokers"
    return here / ".brokers"


def free_ports(names: Sequence[str]) -> dict[str, int]:
    """One free port a name, below the ephemeral range.

    From there the kernel takes the source ports of outgoing connections: a broker that was killed might find its port
    taken when it restarts, and a client that reconnects to a dead port there may even connect to itself.
    """
    try:
        ceiling = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:  # no Linux: IANA's range, which macOS uses
        ceiling = 49152
    floor = 15000 if ceiling > 20000 else 1024
    found: dict[str, int] = {}
    for port in random.sample(range(floor, ceiling), k=min(2000, ceiling - floor)):
        if len(found) == len(names):
            return found
        with socket.socket() as probe:
            # As servers do: a port in TIME_WAIT is free, one that somebody listens on isn't.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:  # taken: the next one
                continue
        found[names[len(found)]] = port
    raise SupplyError(f"no {len(names)} free ports between {floor} and {ceiling} on {LOOPBACK}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the kernel frees the lock when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll until `condition` holds; False after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log, for an error message."""
    try:
        text = log.read_text(errors="replace").rstrip()
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join(["  | " + line for line in text.splitlines()[-lines:]]) or f"({log} is empty)"
