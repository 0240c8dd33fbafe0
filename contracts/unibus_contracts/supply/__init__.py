"""Test brokers, from wherever they can be had.

In this order: a URL in the environment (`UNIBUS_TEST_RABBITMQ_URL`), a Docker container, a native process. A broker that
can't be had is a `SupplyError`. On the command line: `python -m unibus_contracts.supply up|down|urls|restart`. In a fault test:

    broker = supply.start("rabbitmq", instance="faults")    # one of its own, so that nobody else's tests feel it
    broker.kill()                                           # SIGKILL
    broker.restart()                                        # same data, same ports
    broker.stop()                                           # and its data is gone

And several that are one, natively only (`cluster-up`, `cluster-down`):

    cluster = supply.cluster("kafka", instance="faults")    # its URL names all hosts
    cluster.nodes[0].kill()                                 # each is a broker as above
    cluster.stop()
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .broker import Kind, Record, Site, SupplyError, brokers_folder, free_ports, locked, variable, wait_until
from .clusters import ASSEMBLIES, Assembly
from .containers import Docker
from .elasticmq import ElasticMQ
from .kafka import Kafka
from .native import Native
from .postgresql import PostgreSQL
from .rabbitmq import RabbitMQ
from .redis import Redis
from .sqs import SQS

__all__ = [
    "ASSEMBLIES",
    "KINDS",
    "STORES",
    "Broker",
    "Cluster",
    "SupplyError",
    "cluster",
    "emulator",
    "running",
    "start",
    "stop",
]

KINDS: dict[str, Kind] = {kind.name: kind for kind in (RabbitMQ(), Kafka(), Redis(), SQS())}
STORES: dict[str, Kind] = {kind.name: kind for kind in (PostgreSQL(),)}  # no brokers; `up` starts them all the same
_PRIVATE: dict[str, Kind] = {kind.name: kind for kind in (ElasticMQ(),)}  # only as instances, for the tests that ask
_MEMBERS: dict[str, Kind] = {member.kind.name: member.kind for made in ASSEMBLIES.values() for member in made.members}

_READY = 120.0  # seconds; a native RabbitMQ needs 5 on an idle machine


class _Source(Protocol):
    source: str
    address: str

    def unavailable(self) -> str | None: ...
    def folder(self, home: Path) -> str: ...
    def create(self, kind: Kind, site: Site, home: Path, files: Mapping[str, bytes]) -> None: ...
    def resume(self, kind: Kind, record: Record, home: Path) -> None: ...
    def pid(self, kind: Kind, record: Record, home: Path) -> int | None: ...
    def running(self, record: Record, home: Path) -> bool: ...
    def kill(self, kind: Kind, record: Record, home: Path) -> None: ...
    def terminate(self, kind: Kind, record: Record, home: Path) -> None: ...
    def pause(self, kind: Kind, record: Record, home: Path) -> None: ...
    def unpause(self, kind: Kind, record: Record, home: Path) -> None: ...
    def remove(self, record: Record | None, home: Path) -> None: ...
    def complaint(self, record: Record, home: Path) -> str: ...


_SOURCES: tuple[_Source, ...] = (Docker(), Native())


@dataclass(frozen=True)
class Broker:
    """A broker that answers. One from the environment has no record: it isn't ours, so nothing may be done to it."""

    name: str
    variables: Mapping[str, str]  # UNIBUS_TEST_RABBITMQ_URL and the like; "URL" comes first
    record: Record | None
    home: Path

    @property
    def url(self) -> str:
        return next(iter(self.variables.values()))

    @property
    def source(self) -> str:
        return "environment" if self.record is None else self.record.source

    @property
    def native(self) -> bool:
        return self.source == "native"

    @property
    def pid(self) -> int | None:
        """The server process; None while it is down."""
        kind, record, source = self._ours()
        return source.pid(kind, record, self.home)

    def kill(self) -> None:
        """SIGKILL; returns when it is dead."""
        kind, record, source = self._ours()
        source.kill(kind, record, self.home)

    def restart(self) -> None:
        """Stop it in an orderly way if it runs, start it with the same data and ports; returns when it answers."""
        kind, record, source = self._ours()
        source.terminate(kind, record, self.home)
        source.resume(kind, record, self.home)
        _wait(source, kind, record, self.home)

    def pause(self) -> None:
        """SIGSTOP: its connections stay open, and it does nothing."""
        kind, record, source = self._ours()
        source.pause(kind, record, self.home)

    def unpause(self) -> None:
        """It goes on and knows nothing of it."""
        kind, record, source = self._ours()
        source.unpause(kind, record, self.home)

    def stop(self) -> None:
        """Stop it for good: no process and no data is left. Nothing happens if that is done already."""
        self._ours()
        _remove(self.home)

    def _ours(self) -> tuple[Kind, Record, _Source]:
        if self.record is None:
            raise SupplyError(
                f"{self.name} at {variable(self.name)} wasn't started by the supply, so it can't be stopped or disturbed; "
                'use supply.start(..., instance="...") for a broker of your own, or unset the variable'
            )
        return _kind(self.record.kind), self.record, _source(self.record)


@dataclass(frozen=True)
class Cluster:
    """Several that are one, all started by the supply: each may be killed, restarted and paused by itself."""

    name: str
    url: str  # with all hosts; of Redis, those of the Sentinels
    nodes: tuple[Broker, ...]  # that hold messages; of Redis, the first began as the primary
    sentinels: tuple[Broker, ...]  # of Redis

    @property
    def variables(self) -> Mapping[str, str]:
        return {variable(self.name.partition("-")[0], "CLUSTER_URL"): self.url}

    def stop(self) -> None:
        """Stop all of them for good. Nothing happens if that is done already."""
        for broker in (*self.nodes, *self.sentinels):
            broker.stop()


def start(name: str, instance: str = "") -> Broker:
    """The broker of this kind; it is started unless it runs. With `instance`, a private one that `up` knows nothing of."""
    kind = _kind(name)
    home = brokers_folder() / (f"{name}-{_checked(instance)}" if instance else name)
    with locked(home.with_suffix(".lock")):
        record = Record.load(home)
        given = {} if instance else _given(kind)
        if given and (record is None or given["URL"] != record.variables["URL"]):
            return _borrowed(kind, given, home)
        if record is not None and _answers(kind, record):
            return _broker(record, home)
        _remove(home)
        return _broker(_create(kind, home), home)


def cluster(name: str, instance: str = "") -> Cluster:
    """The cluster of this kind; it is started anew unless all of it answers. With `instance`, one of your own."""
    if (assembly := ASSEMBLIES.get(name)) is None:
        raise SupplyError(f"no cluster of {name!r}; there are: {', '.join(ASSEMBLIES)}")
    if reason := Native().unavailable():
        raise SupplyError(
            f"a cluster is made of native processes ({reason}); docker-compose.test.yml has them as containers"
        )
    base = brokers_folder() / f"{name}-cluster{f'-{_checked(instance)}' if instance else ''}"
    homes = [base.with_name(f"{base.name}-{member.role}") for member in assembly.members]
    with locked(base.with_suffix(".lock")):
        records = [record for record in map(Record.load, homes) if record is not None]
        if len(records) < len(homes) or not all(_answers(_kind(record.kind), record) for record in records):
            for home in homes:
                _remove(home)
            try:
                records = _assemble(assembly, homes)
            except BaseException:  # Ctrl-C too: half of a cluster is of no use, and would run on
                for home in homes:
                    _remove(home)
                raise
    sites = [record.site for record in records]
    brokers = [_broker(record, home) for record, home in zip(records, homes, strict=True)]
    nodes = [broker for broker in brokers if broker.record is not None and broker.record.kind != "sentinel"]
    return Cluster(base.name, assembly.url(sites), tuple(nodes), tuple(brokers[len(nodes) :]))


def running(names: Iterable[str] = KINDS) -> list[Broker]:
    """The shared brokers that tests can use now. Starts nothing; SupplyError when one of `names` doesn't answer."""
    found = []
    for name in names:
        kind = _kind(name)
        home = brokers_folder() / name
        record = Record.load(home)
        given = _given(kind)
        if given and (record is None or given["URL"] != record.variables["URL"]):
            found.append(_borrowed(kind, given, home))
        elif record is not None and _answers(kind, record):
            found.append(_broker(record, home))
        else:
            raise SupplyError(f"{name} isn't running; start it with `make brokers-up`, or set {variable(name)}")
    return found


def stop(names: Iterable[str] | None = None, *, clusters: bool = False) -> list[str]:
    """Stop everything the supply started in this checkout, private instances too, or those of some kinds; their names.

    `clusters`: nothing but clusters.
    """
    folder = brokers_folder()
    kinds = set({**KINDS, **STORES, **_PRIVATE} if names is None else (_kind(name).name for name in names))
    homes = [
        home
        for home in sorted(folder.glob("*/"))
        if home.name.partition("-")[0] in kinds
        and (not clusters or "-cluster-" in home.name)
        and any(entry.name != "log" for entry in home.iterdir())
    ]
    for home in homes:
        with locked(home.with_suffix(".lock")):
            _remove(home)
    return [home.name for home in homes]


def emulator(name: str) -> str | None:
    """What a broker of this kind really is where that is no server of its own, such as "SQS/SNS on ministack"."""
    found: str | None = getattr(_kind(name), "emulator", None)
    return found


def emulator_at(name: str, server: str) -> str | None:
    """The same of a server that others have started, where it tells that it is that emulator."""
    tells = getattr(KINDS.get(name), "tells", None)
    return emulator(name) if tells is not None and tells(server) else None


def _kind(name: str) -> Kind:
    if (kind := KINDS.get(name) or STORES.get(name) or _PRIVATE.get(name) or _MEMBERS.get(name)) is None:
        raise SupplyError(f"no broker {name!r}; there are: {', '.join([*KINDS, *STORES])}")
    return kind


def _checked(instance: str) -> str:
    if not re.fullmatch(r"[a-z0-9]{0,20}", instance):
        raise SupplyError(f"instance {instance!r}: at most 20 lower-case letters and digits")
    return instance


def _given(kind: Kind) -> dict[str, str]:
    """What the environment says of this broker, by suffix; empty when it names no URL."""
    start_of_name = variable(kind.name, "")
    if not os.environ.get(start_of_name + "URL"):
        return {}
    found = {
        name.removeprefix(start_of_name): value for name, value in os.environ.items() if name.startswith(start_of_name)
    }
    return {"URL": found.pop("URL"), **found}


def _borrowed(kind: Kind, given: Mapping[str, str], home: Path) -> Broker:
    try:
        kind.check(given["URL"])
    except OSError as error:
        raise SupplyError(
            f"{variable(kind.name)} is set, but no broker answers there ({error}); start that broker, or unset the variable "
            "and have one started here"
        ) from error
    return Broker(kind.name, {variable(kind.name, suffix): value for suffix, value in given.items()}, None, home)


def _create(kind: Kind, home: Path) -> Record:
    """From the first source that can; with the reasons of all when none can."""
    reasons = []
    for source in _SOURCES:
        try:
            reason = source.unavailable()
            if reason is None:
                return _create_from(source, kind, home)
        except SupplyError as error:
            reason = str(error)
            print(f"{home.name}: {source.source}: {reason}", file=sys.stderr)
            _remove(home)
        reasons.append(f"{source.source}: {reason}")
    raise SupplyError(
        f"no {home.name} can be had. Set {variable(kind.name)}, or mend one of these:\n- " + "\n- ".join(reasons)
    )


def _create_from(source: _Source, kind: Kind, home: Path) -> Record:
    home.mkdir(parents=True, exist_ok=True)
    names = (*kind.ports, *(kind.private_ports if source.source == "native" else ()))
    site = Site(
        name=home.name,
        node=_node(home),
        address=source.address,
        folder=source.folder(home),
        ports=free_ports(names),
        user="u" + secrets.token_hex(4),
        password=secrets.token_hex(12),
    )
    files = kind.files(site)
    for file, content in files.items():
        (home / file).write_bytes(content)
    record = Record(kind.name, source.source, site, dict(kind.variables(site, home)))
    # Saved first, so that whatever goes wrong from here on can be cleared away.
    record.save(home)
    source.create(kind, site, home, files)
    _wait(source, kind, record, home)
    return record


def _assemble(assembly: Assembly, homes: Sequence[Path]) -> list[Record]:
    """Start all members in their order; returns when they are one."""
    source, members = Native(), assembly.members
    for kind in {member.kind.name: member.kind for member in members}.values():
        kind.install()
    user, password = "u" + secrets.token_hex(4), secrets.token_hex(12)
    names = [f"{at}:{name}" for at, m in enumerate(members) for name in (*m.kind.ports, *m.kind.private_ports)]
    ports = free_ports(names)  # all at once, so that no two are the same
    sites = [
        Site(
            name=home.name,
            node=_node(home),
            address=source.address,
            folder=str(home),
            ports={
                name: ports[f"{0 if name in assembly.shared else at}:{name}"]
                for name in (*member.kind.ports, *member.kind.private_ports)
            },
            user=user,
            password=password,
        )
        for at, (member, home) in enumerate(zip(members, homes, strict=True))
    ]
    records = []
    for at, (member, site, home) in enumerate(zip(members, sites, homes, strict=True)):
        home.mkdir(parents=True, exist_ok=True)
        for file, content in assembly.files(sites, at).items():
            (home / file).touch(mode=0o600)  # Erlang refuses a cookie that others may read
            (home / file).write_bytes(content)
        records.append(Record(member.kind.name, source.source, site, dict(member.kind.variables(site, home))))
        records[-1].save(home)
    for later in (False, True):
        begun = [(m, r, h) for m, r, h in zip(members, records, homes, strict=True) if m.later == later]
        for member, record, home in begun:
            source.resume(member.kind, record, home)
        for member, record, home in begun:
            _wait(source, member.kind, record, home)
        answering = [site for member, site in zip(members, sites, strict=True) if later or not member.later]
        if not wait_until(lambda: _formed(assembly, answering), _READY):  # noqa: B023  # called here and now
            logs = "\n".join(source.complaint(record, home) for record, home in zip(records, homes, strict=True))
            raise SupplyError(
                f"{homes[0].name} and the others answer, but are no cluster after {_READY:.0f} s.\n{logs}"
            )
    return records


def _formed(assembly: Assembly, sites: Sequence[Site]) -> bool:
    try:
        return assembly.formed(sites)
    except OSError:  # not yet
        return False


def _wait(source: _Source, kind: Kind, record: Record, home: Path) -> None:
    gone = False

    def settled() -> bool:
        nonlocal gone
        if _answers(kind, record):
            return True
        gone = not source.running(record, home)
        return gone

    if not wait_until(settled, _READY) or gone:
        state = "ended by itself" if gone else f"doesn't answer after {_READY:.0f} s"
        raise SupplyError(f"{home.name} ({source.source}) {state}.\n{source.complaint(record, home)}")


def _node(home: Path) -> str:
    return "unibus" + hashlib.sha256(str(home).encode()).hexdigest()[:12]


def _answers(kind: Kind, record: Record) -> bool:
    try:
        for value in record.variables.values():
            if "://" in value:
                kind.check(value)
    except OSError:  # not yet, or no more
        return False
    return True


def _remove(home: Path) -> None:
    if not home.exists():
        return
    record = Record.load(home)
    if record is not None and record.source != Native.source:
        _source(record).remove(record, home)
    Native().remove(record, home)  # and the files; and what a start that was interrupted has left


def _source(record: Record) -> _Source:
    return next(source for source in _SOURCES if source.source == record.source)


def _broker(record: Record, home: Path) -> Broker:
    named = {variable(record.kind, suffix): value for suffix, value in record.variables.items()}
    return Broker(home.name, named, record, home)
