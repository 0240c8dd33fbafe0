"""`unibus declare`: make on the broker what the application and unibus.toml need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from unibus.adapter import Inspected
from unibus.cli import output
from unibus.cli.run import command
from unibus.cli.target import AppOption, ConfigOption, JsonOption, Target, UrlOption
from unibus.tooling import declare as create
from unibus.tooling import inspect, stores_of


def register(app: typer.Typer) -> None:
    app.command(name="declare")(command(declare))


async def declare(
    app: AppOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be made, and the rights that takes.")
    ] = False,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the queues, topics, groups and tables of stores that are missing, whatever the setting `declare` says. Alters and deletes nothing."""
    async with Target(app, url, config).opened() as bus:
        found = await inspect(bus)
        if not dry_run:
            await create(bus)
            done = {(one.kind, one.name): one.exists for one in await inspect(bus)}
            missing = [one for one in found if not one.exists and done.get((one.kind, one.name)) is False]
            assert not missing, missing  # noqa: S101  # declare has raised otherwise
        _print(found, dry_run=dry_run, as_json=as_json)
        for store in dict.fromkeys(repr(store) for _, store in stores_of(bus)):
            if not as_json:
                output.say(f"{store} {'would be made unless it is there' if dry_run else 'is there'}")


def _print(found: Sequence[Inspected], *, dry_run: bool, as_json: bool) -> None:
    things = [one for one in found if one.rights]
    if as_json:
        output.write_json({"dry_run": dry_run, "objects": [_as_dict(one, dry_run=dry_run) for one in things]})
        return
    new = [one for one in things if one.exists is False]
    unseen = [one for one in things if one.exists is None]
    if new:
        output.table(
            ("kind", "name", "of", "right to make it"), [(o.kind, o.name, o.address or "all", o.rights) for o in new]
        )
    verb = "would be made" if dry_run else "made"
    output.say(f"{output.plural(len(new), 'object')} {verb}; {len(things) - len(new) - len(unseen)} are there")
    if unseen:
        kinds = output.plural(len(unseen), unseen[0].kind)
        output.say(f"{kinds}{' would be' if dry_run else ''} made again: nobody can see whether they are there")


def _as_dict(one: Inspected, *, dry_run: bool) -> dict[str, Any]:
    made = {True: "exists", False: "missing" if dry_run else "made", None: "unknown"}[one.exists]
    return {
        "kind": one.kind,
        "name": one.name,
        "of": None if one.address is None else str(one.address),
        "state": made,
        "rights": one.rights,
    }
