"""Where the contracts run: a broker, reached by a URL.

`UrlHarness` serves any broker whose adapter is installed. An adapter with more to say (a broker that it can restart, a
link that it can cut, an admin client that deletes what was made) overrides the fixture `unibus_harness` in its conftest.py
with an object of the same five methods.

What the contracts make on a broker: every name begins with a prefix that ends in something random, one for each process
of a run, and every contract has channels of its own, so that runs and contracts don't meet. At the end what was made is
deleted, where the adapter says how (`cleanup`).
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import socket
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, quote, urlencode
from weakref import WeakSet

from unibus import Bus, ConfigError
from unibus.adapter import Topology
from unibus.config import load
from unibus.url import parse

from . import links
from .cleanup import Made, NotingBus, Removal, remove

CREDENTIALS = (
    "UNIBUS_PASSWORD",
    "UNIBUS_PASSWORD_FILE",
    "UNIBUS_USERNAME",
)  # what a unibus.toml may leave to the environment
_USERINFO = re.compile(r"://.*@")


class NotTried(Exception):
    """The contract can't be tried here. It is reported as such, with this reason, and never as passed."""


class FaultUnavailable(NotTried):
    """This harness can't inject the fault."""


class Harness(Protocol):
    """Five methods. `bus` makes no connection; `channel` returns a name that nothing else in this run has.

    Every name on the broker begins with `prefix`. All buses of one harness reach the same broker. `restart_broker` ends it in an orderly
    way and starts it with what it had; it may return before the broker answers again.
    """

    url: str
    prefix: str

    def bus(self, **settings: Any) -> Bus: ...

    def channel(self, label: str) -> str: ...

    async def restart_broker(self) -> None: ...

    def cut_link(self) -> AbstractAsyncContextManager[None]: ...

    async def cleanup(self) -> None: ...


class TestedBus(NotingBus):
    """`opened` hears what it works with, once it is open."""

    opened: Callable[[TestedBus, Topology], Awaitable[None]] | None = None

    async def _open(self, only: Iterable[str] | None = None) -> None:
        await super()._open(only)
        if self.opened is not None and self._tool is None:  # a tool looks at what may not be there
            try:
                await self.opened(self, self._opened().topology)
            except BaseException:
                await self.close()
                raise


def of_file(path: Path) -> tuple[str, dict[str, Any]]:
    """The URL in a unibus.toml, and what else of it is about the broker: user, password, the driver's own settings.

    All else in it, channels and policies, is an application's. The password may come from UNIBUS_PASSWORD, as ever.
    Raises ConfigError, OSError.
    """
    try:
        url = tomllib.loads(path.read_text(encoding="utf-8")).get("url")
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(url, str):
        raise ConfigError(f"{path}: there is no url")
    environ = {name: os.environ[name] for name in CREDENTIALS if name in os.environ}
    found = load({}, file=path, environ=environ)
    more: dict[str, Any] = {"settings": dict(found.driver)} if found.driver else {}
    if parse(url).username is None and found.url.username is not None:
        more["username"] = found.url.username
        more["password"] = None if found.url.password is None else found.url.password.value
    return url, more


class UrlHarness:
    """Any broker that answers at `url`. It can cut the links of this process; it restarts the broker by the shell's command `restart`.

    `prefix` begins every name; what follows is random, so that what is deleted at the end can only be this harness' own.
    `more`: further settings of every bus, such as user and password. `journal`: a file that notes what will be made, for who deletes it when this process is killed.
    """

    def __init__(
        self,
        url: str,
        prefix: str = "ctr-",
        *,
        more: Mapping[str, Any] | None = None,
        journal: Path | None = None,
        restart: str | None = None,
    ) -> None:
        self.more = dict(more or {})
        self.restart = restart
        # A URL without a host is a broker inside this process; named, it is one that the buses of a contract share.
        self.url = re.sub(r"://(?=\?|$)", f"://ctr-{secrets.token_hex(3)}", url, count=1)
        self.prefix = f"{prefix}{secrets.token_hex(3)}."
        self.made = Made(self.prefix, journal=journal)
        self.removal: Removal | None = None  # what came of the cleanup
        self._buses: WeakSet[Bus] = WeakSet()
        self._token = secrets.token_hex(2)
        self._count = itertools.count(1)

    def bus(self, **settings: Any) -> TestedBus:
        """A bus that reads no file and no environment: what is tested is what is written here."""
        given: dict[str, Any] = {"service": "svc", "prefix": self.prefix, "config": False, "environ": {}}
        if "url" in settings:  # another place, another user
            given |= {name: value for name, value in self.more.items() if name == "settings"}
        else:
            given |= self.more
        bus = TestedBus(settings.pop("url", self.url), **(given | settings))
        bus.made = self.made
        self._buses.add(bus)
        return bus

    def channel(self, label: str) -> str:
        name = f"{label}-{self._token}{next(self._count)}"
        self.made.name(self.prefix + name)  # a child process may be the one who makes it
        return name

    async def restart_broker(self) -> None:
        """One inside this process breaks its links and keeps what it has."""
        if self.restart is not None:
            await links.by_command(self.restart)
            return
        brokers = links.inside(self._buses)
        if not brokers:
            raise FaultUnavailable(
                "a URL alone gives no way to restart the broker; --restart COMMAND does (in pytest: --unibus-restart)"
            )
        for broker in brokers:
            broker.cut()

    @asynccontextmanager
    async def cut_link(self) -> AsyncIterator[None]:
        """Of all buses in this process, for as long as the context lasts."""
        try:
            stack = AsyncExitStack()
            await stack.enter_async_context(links.cut(self._buses))
        except LookupError as error:
            raise FaultUnavailable(str(error)) from None
        async with stack:
            yield

    async def cleanup(self) -> None:
        """Delete what was made. `removal` says what came of it; nothing is raised."""
        self.removal = await remove(UrlHarness.bus(self), self.made)
        if self.removal.left is None:
            self.made.removed()

    def __repr__(self) -> str:
        return f"UrlHarness({shown(self.url)!r})"


def shown(url: str) -> str:
    """The URL for people: without user, password and query, whatever characters they hold."""
    return _USERINFO.sub("://", url).partition("?")[0]


def nowhere(url: str, password: str) -> str | None:
    """`url` with this password and a port of this machine where nobody listens; None where it names no host.

    A server that is given as `endpoint_url` is replaced there.
    """
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    if "." not in authority and ":" not in authority and authority != "localhost" and "endpoint_url" not in query:
        return None  # the name of something inside this process
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{closed.getsockname()[1]}"
    parameters = parse_qs(query)
    if "endpoint_url" in parameters:
        parameters["endpoint_url"] = [f"http://{host}"]
        server = f"user:{quote(password, safe='')}@{authority.rpartition('@')[2]}"
    else:
        server = f"user:{quote(password, safe='')}@{host}"
    return f"{scheme}://{server}{slash}{path}" + (f"?{urlencode(parameters, doseq=True)}" if parameters else "")
