"""`unibus move`: bring over what is left in one broker to another one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from unibus.adapter import Inspected
from unibus.bus import Bus
from unibus.cli import output
from unibus.cli.run import FAILED, command
from unibus.cli.target import AppOption, ConfigOption, JsonOption, Target
from unibus.deadletter import describe
from unibus.move import Place, check, held, look, refuse_the_same
from unibus.move import move as bring_over
from unibus.tooling import attached

SHOWN = 20  # messages that stay, in a table; all of them with --json


def register(app: typer.Typer) -> None:
    app.command(name="move")(command(move))


async def move(
    from_: Annotated[str, typer.Option("--from", metavar="URL", help="The broker that holds the messages.")],
    to: Annotated[str, typer.Option("--to", metavar="URL", help="The broker that gets them.")],
    channels: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CHANNEL]...", help="Queues and topics; default: all. One group: TOPIC/GROUP."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what there is. Moves nothing.")] = False,
    wait: Annotated[
        float,
        typer.Option(min=0, help="Go on for so many seconds while something is delayed that can't be taken early."),
    ] = 0.0,
    app: AppOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring over what is left in one broker: queues, backlogs of groups, what is delayed, dead letters, invalid messages.

    Each message leaves the source once the target has confirmed it: safe to interrupt, and to run again.
    """
    names = channels or []
    async with _opened(app, from_, config, names) as source, _opened(app, to, config, names) as target:
        refuse_the_same(source, target)
        places = await look(source, [name.partition("/")[0] for name in names])
        if not dry_run:
            await _move(source, target, places, wait)
        shared = await held(source)
        _print(places, shared, dry_run=dry_run, as_json=as_json)
        if dry_run:
            await check(target, places)
    if not dry_run and (shared or any(place.left for place in places)):
        raise typer.Exit(FAILED)


@asynccontextmanager
async def _opened(app: str | None, url: str, config: Path | None, names: Sequence[str]) -> AsyncIterator[Bus]:
    target = Target(app, url, config)
    bus = attached(target.bus)
    target.bus._environ = target.given  # or the application's own bus would keep this URL for the other one
    for name in names:
        channel, _, group = name.partition("/")
        bus = attached(bus, channel, group=group or None)
    async with bus:
        yield bus


async def _move(source: Bus, target: Bus, places: Sequence[Place], wait: float) -> None:
    total = sum(place.before.ready + (place.before.delayed or 0) for place in places if place.before is not None)
    try:
        with output.progress("moved", total) as advance:
            await bring_over(source, target, places, wait=wait, moved=advance)
    except BaseException:
        n = sum(place.moved for place in places)
        output.say(f"{output.plural(n, 'message')} moved so far; run it again for the rest")
        raise


def _print(places: Sequence[Place], shared: Sequence[Inspected], *, dry_run: bool, as_json: bool) -> None:
    there = [place for place in places if place.before is not None]
    if as_json:
        waiting = [{"kind": one.kind, "name": one.name, "messages": one.messages} for one in shared]
        moved = sum(place.moved for place in there)
        found = [_as_dict(place) for place in there]
        output.write_json({"dry_run": dry_run, "moved": moved, "places": found, "shared": waiting})
        return
    if dry_run:
        rows = [
            (place.name, output.estimate(seen), _number(seen.in_flight), _number(seen.delayed))
            for place in there
            if (seen := place.before) is not None and (seen.ready or seen.in_flight or seen.delayed)
        ]
        if rows:
            output.table(("place", ">ready", ">in flight", ">delayed"), rows)
        _print_shared(shared)
        if not rows and not shared:
            output.say("nothing is left")
        return
    done = [(place.name, place.moved, place.left) for place in there if place.moved or place.left]
    if done:
        output.table(("place", ">moved", ">still at the source"), done)
    stayed = [(place.name, one.id, describe(one.error)) for place in there for one in place.stayed]
    if stayed:
        output.table(("stays", "id", "why"), stayed[:SHOWN])
    _print_shared(shared)
    moved, left = sum(place.moved for place in there), sum(place.left for place in there)
    more = f", {left} stay" if left else ""
    if left > len(stayed):
        why = ": more arrived meanwhile, or both ends are one broker" if any(p.full and p.left for p in there) else ""
        more = f", {left} still at the source{why}; run it again"
    output.say(f"{output.plural(moved, 'message')} moved{more}")


def _print_shared(shared: Sequence[Inspected]) -> None:
    if shared:
        output.table(("shared by channels", ">messages"), [(f"{one.kind} {one.name}", one.messages) for one in shared])


def _number(n: int | None) -> str:
    return "-" if n is None else str(n)


def _as_dict(place: Place) -> dict[str, Any]:
    before = place.before
    return {
        "place": place.name,
        "ready": before and before.ready,
        "in_flight": before and before.in_flight,
        "delayed": before and before.delayed,
        "exact": before and before.exact,
        "moved": place.moved,
        "twice": place.twice,
        "left": place.left,
        "stayed": [{"id": one.id, "why": describe(one.error)} for one in place.stayed],
    }
