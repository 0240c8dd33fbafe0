"""What a command works on: the application's bus, or one made of unibus.toml, the environment and the command line."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from unibus.bus import Bus
from unibus.channel import DEAD_LETTER, INVALID
from unibus.config import app_of
from unibus.config_sources import variable_of
from unibus.deadletter import describe
from unibus.errors import ConfigError
from unibus.registry import broker_name
from unibus.tooling import Kind, attached
from unibus.url import parse

# The same on every command.
AppOption = Annotated[
    str | None,
    typer.Option("--app", metavar="MODULE:BUS", help="The bus of the application. Default: `app` of unibus.toml."),
]
UrlOption = Annotated[str | None, typer.Option("--url", help="The broker. Stands above all other settings.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="In place of unibus.toml or UNIBUS_CONFIG.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON, for scripts.")]
GroupOption = Annotated[str | None, typer.Option("--group", "-g", help="Of a topic: whose messages.")]


class Target:
    """`bus` is the application's own, or one without handlers; `app` its name, if there is one. `given`: its environment before."""

    def __init__(self, app: str | None = None, url: str | None = None, config: Path | None = None) -> None:
        if config is not None and not config.is_file():
            raise ConfigError(f"--config: there is no file {str(config)!r}")
        self.url = url
        self.config = config
        self.app = app or app_of(os.environ, config)
        self.bus = Bus() if self.app is None else load_app(self.app)
        self.given = self.bus._environ
        bus, environ = self.bus, dict(os.environ if self.bus._environ is None else self.bus._environ)
        if app is not None:
            environ["UNIBUS_APP"] = app
        if url is not None:
            given = parse(url)
            broker_name(given.scheme)  # or the error would name a variable that nobody has set
            if given.username is not None:  # those of the environment are for another URL
                for name in ("username", "password", "password_file"):
                    environ.pop(variable_of(self.key(name)), None)
            environ[variable_of(self.key("url"))] = url
        if config is not None:
            bus._config = config
        bus._environ = environ

    def key(self, name: str) -> tuple[str, ...]:
        """Where a setting of the bus stands in unibus.toml."""
        return (name,) if self.bus.name is None else ("bus", self.bus.name, name)

    def tool(self, name: str | None = None, *, kind: Kind | None = None, group: str | None = None) -> Bus:
        """A bus for tools, closed. See `tooling.attached`."""
        if name is not None and name.endswith((DEAD_LETTER, INVALID)):
            stem, _, suffix = name.rpartition(".")
            more = " --invalid" if suffix == "invalid" else ""
            raise ConfigError(f"{name} holds failed messages of {stem}: unibus dlq list {stem}{more}")
        return attached(self.bus, name, kind=kind, group=group)

    @asynccontextmanager
    async def opened(
        self, name: str | None = None, *, kind: Kind | None = None, group: str | None = None
    ) -> AsyncIterator[Bus]:
        """The same, open: connected, and nothing else."""
        async with self.tool(name, kind=kind, group=group) as bus:
            yield bus


def load_app(name: str) -> Bus:
    """The bus that `module:attribute` names. Raises ConfigError that says what is wrong with it."""
    module_name, colon, path = name.partition(":")
    if not colon or not module_name or not path:
        hint = f"{Path(name).stem}:bus" if name.endswith(".py") else "shop.main:bus"
        raise ConfigError(f"app {name!r}: write module:bus, as in {hint}")
    if module_name.endswith(".py") or "/" in module_name:
        dotted = module_name.removesuffix(".py").replace("/", ".")
        raise ConfigError(f"app {name!r}: write the module, not the file: {dotted}:{path}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _broken(name, error) from error
        raise ConfigError(f"app {name!r}: there is no module {error.name!r} here ({Path.cwd()})") from error
    except Exception as error:
        raise _broken(name, error) from error
    found: object = module
    for part in path.split("."):
        found = getattr(found, part, None)
    if isinstance(found, Bus):
        return found
    buses = [key for key, value in vars(module).items() if isinstance(value, Bus)]
    near = get_close_matches(path, buses, n=1) or buses[:1]
    hint = f"did you mean {module_name}:{near[0]}?" if near else f"{module_name} has no Bus"
    raise ConfigError(f"app {name!r}: {path!r} is no Bus; {hint}")


def _broken(name: str, error: Exception) -> ConfigError:
    """The application can't be imported: where, in its own words."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
    else:
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return ConfigError(f"app {name!r} can't be imported: {describe(error)}{where}")
