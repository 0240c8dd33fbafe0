"""The typer application, made of the modules in `commands`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated

import typer

from unibus.cli import commands


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"unibus {version('unibus')}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run services, and look after their queues and topics: the same commands on every broker.

    What they work on comes from the application (`--app`, or `app` in unibus.toml), unibus.toml and the environment.
    """


def make() -> typer.Typer:
    """All commands, in the order of their modules' names."""
    app = typer.Typer(name="unibus", callback=_root, no_args_is_help=True, pretty_exceptions_enable=False)
    for module in sorted(info.name for info in iter_modules(commands.__path__)):
        import_module(f"{commands.__name__}.{module}").register(app)
    return app


def run() -> None:
    """Parse the command line and run what it says."""
    make()(prog_name="unibus")
