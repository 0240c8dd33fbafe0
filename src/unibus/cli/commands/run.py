"""`unibus run`: the handlers of an application, in one process or several."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from contextlib import nullcontext
from typing import Annotated, Literal

import typer

from unibus.bus import Bus
from unibus.cli.probe import OfBus, address, serving, tell
from unibus.cli.run import command
from unibus.cli.target import ConfigOption, Target, UrlOption
from unibus.cli.workers import supervise
from unibus.errors import ConfigError
from unibus.telemetry import LogIds
from unibus.tooling import settings_of

Level = Literal["debug", "info", "warning", "error"]


def register(app: typer.Typer) -> None:
    app.command(name="run")(command(run, own_log=True))


def run(
    app: Annotated[
        str | None,
        typer.Argument(metavar="MODULE:BUS", help="The bus of the application. Default: `app` of unibus.toml."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with all handlers.")] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="CHANNEL", help="Only the handlers of these: orders,order.charged or topic.group."),
    ] = None,
    probe: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Answer /live and /ready there, over HTTP.")
    ] = None,
    log_level: Annotated[Level, typer.Option(help="What goes to stderr.")] = "info",
    url: UrlOption = None,
    config: ConfigOption = None,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
    pipe: Annotated[int | None, typer.Option("--tell", hidden=True)] = None,
) -> None:
    """Run the handlers until SIGTERM or Ctrl-C, then drain: what has begun is finished, what has not goes back.

    A second signal ends it at once. With workers: one that was killed is started again; one that ends by itself ends all.
    """
    _log(log_level)
    if probe is not None:
        address(probe)  # what is wrong with it is said before the application is imported
    target = Target(app, url, config)
    if target.app is None:
        raise ConfigError("which application? unibus run module:bus, or set `app` in unibus.toml")
    if not target.bus.registrations:
        raise ConfigError(f"app {target.app!r} has no handlers to run; does a module still have to be imported?")
    chosen = [name for each in only or () for name in each.split(",") if name] or None
    if workers == 1:
        asyncio.run(_work(target.bus, chosen, probe, worker=worker, pipe=pipe))
        return
    if settings_of(target.tool()).url.scheme == "memory":  # and what is wrong with the settings is said once
        raise ConfigError(
            "--workers: a memory broker is in one process only, so others would have none of its messages"
        )
    arguments = [target.app, "--worker", "--log-level", log_level]
    for option, value in (("--url", url), ("--config", config), ("--only", ",".join(chosen or ()))):
        arguments += [option, str(value)] if value else []
    code = asyncio.run(supervise([sys.executable, "-m", "unibus", "run", *arguments], workers, probe))
    raise typer.Exit(code)


async def _work(bus: Bus, only: list[str] | None, probe: str | None, *, worker: bool, pipe: int | None) -> None:
    if worker:  # stdin ends with the process that has started us, however it ends
        loop = asyncio.get_running_loop()

        def orphaned() -> None:
            loop.remove_reader(0)
            os.kill(os.getpid(), signal.SIGTERM)

        loop.add_reader(0, orphaned)
    telling = None if pipe is None else asyncio.create_task(tell(bus, pipe))
    try:
        async with nullcontext() if probe is None else serving(probe, OfBus(bus)):
            await bus.run(only=only)
    finally:
        if telling is not None:
            telling.cancel()


class _Ids(logging.Formatter):
    """What a handler of the application logs names its message; what unibus says does so in its own words."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name for it
        text = super().formatMessage(record)
        message_id, channel = getattr(record, "message_id", None), getattr(record, "channel", None)
        if message_id is None or record.name.partition(".")[0] == "unibus":
            return text
        return f"{text} [message {message_id} of {channel}]"


def _log(level: Level) -> None:
    """Before the application is imported, which may set it up otherwise."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(LogIds())
    handler.setFormatter(_Ids("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
