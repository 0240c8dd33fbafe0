"""`unibus channels`: how much waits, everywhere."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from unibus.adapter import Backlog, Inspected
from unibus.bus import Bus
from unibus.channel import Group, Queue, Topic, dead_letter_queue, invalid_queue
from unibus.cli import output
from unibus.cli.run import command
from unibus.cli.target import AppOption, ConfigOption, JsonOption, Target, UrlOption
from unibus.errors import ConfigError, NotFound
from unibus.tooling import inspect, topology_of

_AT_ONCE = 4


def register(app: typer.Typer) -> None:
    app.command(name="channels")(command(channels))


async def channels(
    channel: Annotated[str | None, typer.Argument(help="Only this one.")] = None,
    app: AppOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """What waits in each queue and group: ready, in the hands of consumers, delayed, the oldest, dead letters.

    Below it what waits in places that channels share, such as the hold queues of RabbitMQ and `unibus.lost`.
    """
    async with Target(app, url, config).opened(channel) as bus:
        rows = await backlogs(bus, channel)
        if not rows and not bus._opened().topology.channels:
            raise ConfigError("no channels are known: name one, give an --app, or declare them in unibus.toml")
        shared = [one for one in await inspect(bus) if one.address is None and one.messages is not None]
        if as_json:
            output.write_json(
                {"channels": [row.as_dict() for row in rows], "shared": [_as_dict(one) for one in shared]}
            )
            return
        output.table(
            ("channel", "group", ">ready", ">in flight", ">delayed", ">oldest", ">dead letters", ">invalid"),
            [row.cells() for row in rows],
        )
        held = [one for one in shared if one.messages]
        if held:
            output.table(("shared", ">messages"), [(f"{one.kind} {one.name}", one.messages) for one in held])


class Row:
    """One queue or group, or a topic without groups. `backlog` None: it is not there."""

    def __init__(
        self,
        address: Queue[Any] | Topic[Any] | Group,
        backlog: Backlog | None,
        dead: Backlog | None,
        invalid: Backlog | None,
    ) -> None:
        self.address, self.backlog, self.dead, self.invalid = address, backlog, dead, invalid

    def _names(self) -> tuple[str, str | None]:
        if isinstance(self.address, Group):
            return self.address.topic.name, self.address.name
        return self.address.name, None

    def cells(self) -> tuple[Any, ...]:
        name, group = self._names()
        if isinstance(self.address, Topic):
            return name, "none", *[""] * 6
        if self.backlog is None:
            return name, group, "missing", *[""] * 5
        found = self.backlog
        return (
            *(name, group, output.estimate(found), _number(found.in_flight), _number(found.delayed)),
            *(output.age(found.oldest), output.estimate(self.dead), output.estimate(self.invalid)),
        )

    def as_dict(self) -> dict[str, Any]:
        name, group = self._names()
        found = self.backlog
        return {
            "channel": name,
            "group": group,
            "kind": "queue" if isinstance(self.address, Queue) else "topic",
            "exists": None if isinstance(self.address, Topic) else found is not None,
            "ready": found and found.ready,
            "in_flight": found and found.in_flight,
            "delayed": found and found.delayed,
            "oldest": found and found.oldest,
            "exact": found and found.exact,
            "dead_letters": self.dead and self.dead.ready,
            "invalid": self.invalid and self.invalid.ready,
        }


def _number(n: int | None) -> str:
    return "-" if n is None else str(n)


def _as_dict(one: Inspected) -> dict[str, Any]:
    return {"kind": one.kind, "name": one.name, "messages": one.messages}


async def backlogs(bus: Bus, name: str | None = None) -> list[Row]:
    """One row for each queue and group, and for each topic without groups; `name`: only of this channel."""
    addresses = [d.address for d in topology_of(bus).channels if d.role == "channel"]
    grouped = {address.topic for address in addresses if isinstance(address, Group)}
    gate = asyncio.Semaphore(_AT_ONCE)

    async def look(address: Queue[Any] | Group) -> Backlog | None:
        async with gate:
            try:
                return await bus.adapter.backlog(address)
            except NotFound:
                return None

    async def row(address: Queue[Any] | Topic[Any] | Group) -> Row:
        if isinstance(address, Topic):
            return Row(address, None, None, None)
        places = (address, dead_letter_queue(address), invalid_queue(address))
        return Row(address, *await asyncio.gather(*map(look, places)))

    chosen = [
        a
        for a in addresses
        if not (isinstance(a, Topic) and a in grouped)
        and name in {None, a.topic.name if isinstance(a, Group) else a.name}
    ]
    return list(await asyncio.gather(*map(row, chosen)))
