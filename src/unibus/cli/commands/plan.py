"""`unibus plan`: what a service uses that another broker refuses, emulates or lacks, before anyone swaps."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any
from urllib.parse import quote

import typer

from unibus.adapter import Endpoint, Url
from unibus.cli import output
from unibus.cli.run import FAILED, command
from unibus.cli.target import ConfigOption, JsonOption, Target
from unibus.clock import SystemClock
from unibus.config import Settings
from unibus.errors import ConfigError
from unibus.registry import profile_factory
from unibus.swap import Plan, Row
from unibus.swap import plan as plan_swap
from unibus.tooling import settings_of

_ORDER = ("refused", "absent", "emulated", "native")


def register(app: typer.Typer) -> None:
    app.command(name="plan")(command(plan))


async def plan(
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="BROKER|URL", help="rabbitmq, kafka, sqs, redis, rabbitmq-3.13; a URL asks that server."
        ),
    ],
    app: Annotated[
        str | None,
        typer.Argument(metavar="MODULE:BUS", help="The bus of the application. Default: `app` of unibus.toml."),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """What this service uses, and how another broker has it: native, emulated, absent (it runs without), refused (it does not start).

    With the name of a broker nothing is connected to: the answers are those its adapter declares, and the last lines say on what
    server the contract suite has tried them, or that it has not on that version. Exits with 1 if anything would be refused.
    """
    source = _source(app, config)
    asked = None if "://" in to else _asked(to)
    url = to if "://" in to else f"memory://?profile={quote(to, safe='')}"
    made = await plan_swap(Target(app, url, config).tool(), source)
    rows = sorted(made.rows, key=lambda row: _ORDER.index(row.level))
    if as_json:
        told = {"target": made.target, "version": made.version, "from": source and source.broker}
        told |= {"pinned": None, "measured": None} if asked is None else asked.told()
        output.write_json({**told, "refused": len(made.refused), "rows": [asdict(row) for row in rows]})
    else:
        output.table(
            ("channel", "feature", "level", ">limit", "what it uses", "how, why, and what it costs"), map(_cells, rows)
        )
        _sum_up(made, asked)
    if made.refused:
        raise typer.Exit(FAILED)


def _source(app: str | None, config: Any) -> Settings | None:
    """The settings where the service is now; None where it has no broker yet."""
    try:
        return settings_of(Target(app, None, config).tool())
    except ConfigError:
        return None  # what else is wrong with them is said when they are read for the target


def _cells(row: Row) -> tuple[object, ...]:
    limit = "" if row.limit is None else f"{row.limit:,.10g}"
    return row.channel, row.feature, row.level, limit, row.what, row.how


def _sum_up(made: Plan, asked: _Asked | None) -> None:
    counts = {level: sum(row.level == level for row in made.rows) for level in _ORDER}
    output.say(f"{made.target}: " + ", ".join(f"{n} {level}" for level, n in counts.items()))
    if asked is not None:
        output.say(f"declared by its adapter{asked.said()}")
    output.say("it would not start" if made.refused else "it would start")


@dataclass(frozen=True)
class _Asked:
    """A broker by its name. `version`: whose answers these are, None where they are the same on all. `pinned`: what was measured on it.

    `others`: the servers that the suite has run on where that is none of them. None: the pins are not installed.
    """

    version: str | None
    pinned: dict[str, Any] | None
    others: list[str] | None

    def told(self) -> dict[str, Any]:
        measured = None if self.others is None else self.pinned is not None
        return {"version": self.version, "measured": measured, "pinned": self.pinned}

    def said(self) -> str:
        of = f" for {self.version}" if self.version else ""
        if self.pinned is not None:
            counts = f"{self.pinned['kept']} kept, {self.pinned['refused']} refused as declared"
            return f"{of}; the contract suite on {self.pinned['server']}: {counts}"
        if self.others is None:
            return of
        if not self.others:
            return f"{of}; not measured: no answers of it are pinned"
        return f"{of}; not measured on that version, only on {' and '.join(self.others)}"


def _asked(to: str) -> _Asked:
    """Raises ConfigError for a broker or a version that nothing is known of."""
    name, _, version = to.partition("-")
    nowhere = Endpoint(Url("memory"), "plan", "plan", SystemClock())
    versions = profile_factory(name)(nowhere, None).versions
    pins = _pins(name)
    measured = {_minor(pin["version"]): pin for pin in pins or () if pin["version"]}
    if (version or "-" in to) and not _known(version, versions, measured):
        said = [f"{name}-{versions[0]} to {name}-{versions[-1]}"] if versions else [f"{name}, the same on all versions"]
        said += [f"measured: {', '.join(f'{name}-{minor}' for minor in sorted(measured))}"] if measured else []
        raise ConfigError(f"--to {to}: no such version is known; known: {'; '.join(said)}")
    if not versions:
        return _Asked(version or None, _counted(pins[0]) if pins else None, None if pins is None else [])
    version = version or versions[-1]
    pin = measured.get(_minor(version))
    others = None if pins is None else [_counted(one)["server"] for one in measured.values()]
    return _Asked(version, _counted(pin) if pin else None, others)


def _known(version: str, versions: Sequence[str], measured: Container[str]) -> bool:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)+", version):
        return False
    if not versions or _minor(version) in measured:
        return _minor(version) in measured
    first, this, last = ([int(n) for n in _minor(one).split(".")] for one in (versions[0], version, versions[-1]))
    return first <= this <= last


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _pins(name: str) -> list[dict[str, Any]] | None:
    """The pinned answers of an adapter, of each version that has some."""
    try:
        from unibus_contracts.pins import ANSWERS
    except ImportError:  # a package of the same distribution, which an image may leave out
        return None
    paths = sorted([*ANSWERS.glob(f"{name}.json"), *ANSWERS.glob(f"{name}-*.json")])
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _counted(pin: dict[str, Any]) -> dict[str, Any]:
    """How the suite found the adapter, and on what."""
    from unibus_contracts.pins import server

    answers = list(pin["contracts"].values())
    counts = {"kept": answers.count("kept"), "refused": answers.count("refused")}
    return {"server": server(pin), "version": pin["version"], **counts}
