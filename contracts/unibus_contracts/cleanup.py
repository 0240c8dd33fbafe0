"""What a run has made on a broker, and its removal at the end.

The SPI has no delete, on purpose. An adapter that can clean up after the suite has a function in the entry-point group
`unibus.cleanup`, under the schemes of its URLs:

    async def delete(adapter, prefix, names, delays) -> list[str]

`adapter` is connected. It deletes every object whose name on the broker begins with `prefix`, nothing else, and returns
what it has deleted. `names` and `delays` are those of all that was declared, for brokers that can't list what they have.
The prefix ends in something random, so nothing that was there before can begin with it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unibus import Bus
from unibus.adapter import Topology
from unibus.tooling import settings_of

if TYPE_CHECKING:
    from unibus.session import Session

GROUP = "unibus.cleanup"
SECONDS = 120.0  # a removal may take; hundreds of queues take their time on small machines

Delete = Callable[[Any, str, Collection[str], Collection[float]], Awaitable[list[str]]]


def delete_of(scheme: str) -> Delete | None:
    """What cleans up on brokers of this URL scheme; None: its adapter has no such function."""
    found: list[Delete] = [entry.load() for entry in entry_points(group=GROUP, name=scheme)]
    return found[0] if found else None


async def in_memory(adapter: object, prefix: str, names: Collection[str], delays: Collection[float]) -> list[str]:
    """A broker inside the process ends with it."""
    return []


@dataclass(slots=True)
class Made:
    """All that was declared under one prefix. `journal`: a file that has it too, for when this process is killed."""

    prefix: str
    names: set[str] = field(default_factory=set)
    delays: set[float] = field(default_factory=set)
    journal: Path | None = None

    def name(self, name: str) -> None:
        """Something will be made under this name. Called before it is."""
        self._note({name} - self.names, set())

    def topology(self, topology: Topology) -> None:
        """All this will be made. Called before it is."""
        self._note({d.name for d in topology.channels} - self.names, set(topology.delays) - self.delays)

    def _note(self, names: set[str], delays: set[float]) -> None:
        names = {name for name in names if name.startswith(self.prefix)}  # what isn't ours is never deleted
        if not names and not delays:
            return
        self.names |= names
        self.delays |= delays
        if self.journal is not None:
            line = json.dumps({"prefix": self.prefix, "names": sorted(names), "delays": sorted(delays)})
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def removed(self) -> None:
        """It is gone from the broker."""
        if self.journal is not None:
            self.journal.unlink(missing_ok=True)


class NotingBus(Bus):
    """A bus that says what it will make, before it does."""

    made: Made | None = None

    def _prepare(self) -> Session:
        session = super()._prepare()
        if self.made is not None:
            self.made.topology(session.topology)
        return session


def read(journal: Path) -> list[Made]:
    """What a process that was killed had made, by prefix."""
    found: dict[str, Made] = {}
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            told: Mapping[str, Any] = json.loads(line)
        except ValueError:  # the last one, half written
            continue
        made = found.setdefault(told["prefix"], Made(told["prefix"]))
        made.names.update(told["names"])
        made.delays.update(told["delays"])
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Removal:
    """What became of it: how many objects were deleted, and why others were not, None where all are gone."""

    deleted: int = 0
    left: str | None = None


def not_deleted(prefix: str, why: str) -> str:
    """A line for people."""
    return f"not deleted: what begins with {prefix!r}: {why}"


async def remove(bus: Bus, made: Made) -> Removal:
    """Delete what was made. `bus` is closed, and reaches the broker. Raises nothing that the broker says."""
    if not made.names:
        return Removal()
    try:
        scheme = settings_of(bus).url.scheme
        delete = delete_of(scheme)
        if delete is None:
            return Removal(0, f"the adapter of {scheme}:// has no function in the entry-point group {GROUP}")
        async with asyncio.timeout(SECONDS), bus:
            return Removal(len(await delete(bus.adapter, made.prefix, made.names, made.delays)))
    except Exception as error:
        return Removal(0, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
