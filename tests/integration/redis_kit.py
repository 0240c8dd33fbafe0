"""Several Redis processes as one installation: a primary with its replica and three sentinels; a cluster of six."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from redis import Redis, RedisError

from unibus_contracts.supply import KINDS
from unibus_contracts.supply.broker import LOOPBACK, free_ports

PASSWORD = "open-sesame"
_SOON = 60.0


def wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + _SOON
    while True:
        try:
            if condition():
                return
        except RedisError as error:
            what = f"{what}; {error}"
        assert time.monotonic() < deadline, f"not within {_SOON} s: {what}"
        time.sleep(0.05)  # between two looks


class Server:
    def __init__(self, folder: Path, port: int, *options: str) -> None:
        self.port = port
        self._folder = folder / str(port)
        self._folder.mkdir()
        self._options = options
        password = None if "--sentinel" in options else PASSWORD
        self.raw: Any = Redis(LOOPBACK, port, password=password, decode_responses=True)
        self.start()

    def start(self) -> None:
        words = ["--port", str(self.port), "--bind", LOOPBACK, "--dir", str(self._folder), *self._options]
        if "--sentinel" in self._options:
            path = self._folder / "sentinel.conf"
            path.touch()
            words = [str(path), *words]
        else:
            words += [
                "--requirepass",
                PASSWORD,
                "--masterauth",
                PASSWORD,
                "--save",
                "",
                "--repl-diskless-sync-delay",
                "0",
            ]
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(["redis-server", *words], stdout=log, stderr=log)  # noqa: S607  # of PATH
        wait(self.raw.ping, f"the server at {self.port} answers")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def role(self) -> str:
        return str(self.raw.info("replication")["role"])


@contextmanager
def _installation() -> Iterator[list[Server]]:
    KINDS["redis"].install()
    servers: list[Server] = []
    try:
        yield servers
    finally:
        for server in servers:
            server.kill()
            server.raw.close()


class Sentinels:
    """`url` names the three; their master is "main"."""

    def __init__(self, servers: list[Server], folder: Path) -> None:
        ports = list(free_ports("12345").values())
        self.primary = Server(folder, ports[0])
        servers.append(self.primary)
        self.replica = Server(folder, ports[1], "--replicaof", f"{LOOPBACK} {ports[0]}")
        servers.append(self.replica)
        wait(lambda: self.primary.raw.info("replication")["connected_slaves"] == 1, "the replica is there")
        sentinels = [Server(folder, port, "--sentinel") for port in ports[2:]]
        servers += sentinels
        for sentinel in sentinels:
            sentinel.raw.execute_command("SENTINEL", "MONITOR", "main", LOOPBACK, ports[0], 2)
            for option, value in (
                ("auth-pass", PASSWORD),
                ("down-after-milliseconds", 1000),
                ("failover-timeout", 5000),
            ):
                sentinel.raw.execute_command("SENTINEL", "SET", "main", option, value)
        for sentinel in sentinels:
            wait(partial(self._knows_all, sentinel), "the sentinels know each other and the replica")
        self.url = f"redis://:{PASSWORD}@{','.join(f'{LOOPBACK}:{port}' for port in ports[2:])}/0?sentinel=main"

    @staticmethod
    def _knows_all(sentinel: Server) -> bool:
        found = sentinel.raw.execute_command("SENTINEL", "MASTER", "main")
        if not isinstance(found, dict):
            found = dict(zip(found[::2], found[1::2], strict=True))
        return [str(found[key]) for key in ("num-slaves", "num-other-sentinels")] == ["1", "2"]


class Cluster:
    """Three masters, each with a replica. `url` names two of the six."""

    def __init__(self, servers: list[Server], folder: Path) -> None:
        self.servers = servers
        ports = list(free_ports("123456abcdef").values())
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "5000", "--cluster-port")
        for port, bus in zip(ports[:6], ports[6:], strict=True):
            servers.append(Server(folder, port, *options, str(bus)))
        hosts = [f"{LOOPBACK}:{port}" for port in ports[:6]]
        self.cli("create", *hosts, "--cluster-replicas", "1", "--cluster-yes")
        for server in servers:
            wait(partial(self._whole, server), f"{server.port} sees the whole cluster")
        self.url = f"redis://:{PASSWORD}@{hosts[5]},{hosts[0]}"

    def _whole(self, server: Server) -> bool:
        info = server.raw.execute_command("CLUSTER", "INFO")
        text = info if isinstance(info, str) else "".join(f"{k}:{v}\n" for k, v in info.items())
        roles = [s.role() for s in self.servers]
        up = all(s.raw.info("replication").get("master_link_status", "up") == "up" for s in self.servers)
        return "cluster_state:ok" in text and roles.count("slave") == 3 and up

    def cli(self, *words: str) -> None:
        command = ["redis-cli", "-a", PASSWORD, "--no-auth-warning", "--cluster", *words]
        subprocess.run(command, check=True, timeout=_SOON, stdout=subprocess.DEVNULL)  # our own words

    def owner(self, slot: int) -> Server:
        """The master that has the slot."""
        for server in self.servers:
            if server.process.poll() is None and server.role() == "master":
                for first, last, (_, port, *_), *_ in server.raw.execute_command("CLUSTER SLOTS"):
                    if first <= slot <= last:
                        return next(s for s in self.servers if s.port == port)
        raise AssertionError(f"nobody has slot {slot}")


class Pair:
    """A primary and its replica. `url` names both, the primary first."""

    def __init__(self, servers: list[Server], folder: Path) -> None:
        ports = list(free_ports("12").values())
        self.primary, self.replica = (Server(folder, port) for port in ports)
        servers += (self.primary, self.replica)
        self.follow(self.replica, self.primary)
        self.url = f"redis://:{PASSWORD}@{LOOPBACK}:{ports[0]},{LOOPBACK}:{ports[1]}"

    @staticmethod
    def follow(replica: Server, primary: Server) -> None:
        primary.raw.replicaof("NO", "ONE")
        replica.raw.replicaof(LOOPBACK, primary.port)
        wait(lambda: primary.raw.info("replication").get("slave0", {}).get("state") == "online", "the replica is there")


@contextmanager
def pair(folder: Path) -> Iterator[Pair]:
    with _installation() as servers:
        yield Pair(servers, folder)


@contextmanager
def sentinels(folder: Path) -> Iterator[Sentinels]:
    with _installation() as servers:
        yield Sentinels(servers, folder)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    with _installation() as servers:
        yield Cluster(servers, folder)
