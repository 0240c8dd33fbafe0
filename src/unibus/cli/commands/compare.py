"""`unibus compare`: brokers beside each other, measured. The machinery is `unibus_contracts.compare`, of the extra `contracts`."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unibus.cli import output
from unibus.cli.run import FAILED, UNREACHABLE, USAGE, Failure, command, complain
from unibus.cli.target import Target as Application
from unibus.errors import ConfigError

if TYPE_CHECKING:
    from unibus_contracts.compare.run import Document
    from unibus_contracts.compare.targets import Target


def register(app: typer.Typer) -> None:
    app.command(name="compare")(command(compare))


async def compare(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="URL...",
            help="A URL; a unibus.toml, for its url and settings; or rabbitmq, kafka, redis, sqs, which are started for the run.",
        ),
    ],
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Minutes: fewer samples, and the chapters of the contracts that matter first."),
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page that needs nothing else.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all of it as data, for --against above all.")
    ] = None,
    app: Annotated[
        str | None, typer.Option("--app", metavar="MODULE:BUS", help="What this application touches comes first.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="FILE", help="Say what has changed since this --json.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", metavar="CHAPTER", help="Of the table: latency,order. `contracts` is one. Default: all."
        ),
    ] = None,
) -> None:
    """Run the contracts and probes against brokers, and put what they found beside each other: native, emulated or refused,
    and how fast.

    Makes queues and topics under a random prefix, and deletes them at the end. Exits with 1 where anything failed, 3 where no broker could be
    reached. Ctrl-C keeps what was found, marked as partial.
    """
    try:
        import pytest_asyncio  # noqa: F401  # the contracts need it, in a process of their own

        from unibus_contracts.compare import against as changes
        from unibus_contracts.compare.model import FULL, QUICK
        from unibus_contracts.compare.run import Run, failures, known_names
        from unibus_contracts.compare.targets import resolve, stop
        from unibus_contracts.compare.touches import touched
        from unibus_contracts.supply import SupplyError
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "unibus":
            raise
        raise Failure(
            f"compare needs {error.name!r}, which is not installed; pip install 'unibus[contracts]'", USAGE
        ) from None

    chosen = _chosen(only, known_names())
    old = None if against is None else changes.load(against)
    yours = None if app is None else touched(Application(app, "memory://").bus)
    for file in (html, json_file):
        if file is not None:
            output.writable(file)
    try:
        places, started = resolve(targets)
    except SupplyError as error:
        raise Failure(str(error)) from None
    _say_unused(places)
    log = logging.getLogger("unibus")
    level = log.level
    log.setLevel(logging.CRITICAL)  # handlers fail on purpose, by the hundred
    try:
        run = Run(
            places,
            QUICK if quick else FULL,
            quick=quick,
            only=chosen,
            touched=yours,
            progress=lambda target, done, seconds: output.say(f"{target}: {done} ({seconds:.1f} s)"),
        )
        try:
            try:
                await run()
            except asyncio.CancelledError:
                complain(
                    "broken off: what is there is kept, and marked as partial; what was made on the brokers is deleted"
                )
                raise
            finally:
                await run.remove()
        except asyncio.CancelledError:  # of the removal too, by a second Ctrl-C
            _tell(run.document, old, html, json_file)
            raise
    finally:
        log.setLevel(level)
        stop(started)
    _tell(run.document, old, html, json_file)
    if all("error" in target for target in run.document["targets"]):
        raise Failure("no broker could be reached", UNREACHABLE)
    if failed := failures(run.document):
        for line in failed:
            complain(line)
        raise typer.Exit(FAILED)


def _chosen(only: Sequence[str] | None, known: set[str]) -> set[str]:
    chosen = {name for each in only or () for name in each.split(",") if name}
    if unknown := sorted(chosen - known):
        chapters = ", ".join(sorted(name for name in known if "." not in name and " " not in name))
        raise ConfigError(f"--only {unknown[0]}: there is no such chapter; there are {chapters}")
    return chosen


def _say_unused(places: Sequence[Target]) -> None:
    from unibus_contracts.compare.targets import left_out

    for place in places:
        if tables := left_out(place):
            told = ", ".join(f"[{name}]" for name in tables)
            output.say(f"{place.given}: {told} not used: the comparison has channels of its own, in default settings")


def _tell(document: Document, old: Any, html: Path | None, json_file: Path | None) -> None:
    from rich.console import Console

    from unibus_contracts.compare.against import against
    from unibus_contracts.compare.page import page
    from unibus_contracts.compare.run import yours_first
    from unibus_contracts.compare.table import show

    changed = None if old is None else against(document, old)
    document["rows"].sort(key=yours_first)
    # The files first: a terminal may have gone.
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if html is not None:
        html.write_text(page(document), encoding="utf-8")
    show(document, Console(width=200 if output.piped() else None, highlight=False))
    for target in document["targets"]:
        if target["left"] is not None:
            complain(f"{target['name']}: not deleted: {target['left']}")
    if changed is not None:
        output.say("\n".join(changed) or f"nothing has changed since {document['against']}")
