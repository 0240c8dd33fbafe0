"""`unibus plan`: what a service uses that another broker refuses, emulates or lacks, before anyone swaps."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any
from urllib.parse import quote

import typer

from unibus.cli import output
from unibus.cli.run import FAILED, command
from unibus.cli.target import ConfigOption, JsonOption, Target
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

    With the name of a broker nothing is connected to: the answers are those its adapter declares, which the contract suite has
    tried. Exits with 1 if anything would be refused.
    """
    source = _source(app, config)
    if "://" not in to:
        profile_factory(to.partition("-")[0])
    url = to if "://" in to else f"memory://?profile={quote(to, safe='')}"
    made = await plan_swap(Target(app, url, config).tool(), source)
    rows = sorted(made.rows, key=lambda row: _ORDER.index(row.level))
    pinned = None if "://" in to else _pinned(made)
    if as_json:
        told = {"target": made.target, "version": made.version, "from": source and source.broker, "pinned": pinned}
        output.write_json({**told, "refused": len(made.refused), "rows": [asdict(row) for row in rows]})
    else:
        output.table(
            ("channel", "feature", "level", ">limit", "what it uses", "how, why, and what it costs"), map(_cells, rows)
        )
        _sum_up(made, pinned)
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


def _sum_up(made: Plan, pinned: dict[str, Any] | None) -> None:
    counts = {level: sum(row.level == level for row in made.rows) for level in _ORDER}
    output.say(f"{made.target}: " + ", ".join(f"{n} {level}" for level, n in counts.items()))
    if pinned is not None:
        on = f" on {made.target} {pinned['version']}" if pinned["version"] else ""
        output.say(
            f"declared by its adapter; the contract suite{on}: {pinned['kept']} kept, {pinned['refused']} refused as declared"
        )
    output.say("it would not start" if made.refused else "it would start")


def _pinned(made: Plan) -> dict[str, Any] | None:
    """How the suite found the adapter, from the pinned answers; None where there are none."""
    try:
        from unibus_contracts.pins import ANSWERS, pin_of
    except ImportError:  # a package of the same distribution, which an image may leave out
        return None
    version = (made.version or "").removesuffix("in memory").strip()
    path = pin_of(ANSWERS, {"adapter": made.target, "version": version})
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    answers = list(found["contracts"].values())
    return {"version": found["version"], "kept": answers.count("kept"), "refused": answers.count("refused")}
