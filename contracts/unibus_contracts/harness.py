"""Where the contracts run: a broker, reached by a URL.

`UrlHarness` serves any broker whose adapter is installed. An adapter with more to say (a broker that it can restart, a
link that it can cut, an admin client that deletes what was made) overrides the fixture `unibus_harness` in its conftest.py
with an object of the same five methods.

What the contracts make on a broker: every name begins with one random prefix per run, and every contract has channels of
its own, so that runs and contracts don't meet. `UrlHarness` deletes nothing: the SPI has no delete, on purpose. It is meant
for brokers that are thrown away after the run; on any other, override `cleanup` and delete what begins with the prefix.
"""

from __future__ import annotations

import itertools
import re
import secrets
import socket
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol
from urllib.parse import parse_qs, quote, urlencode

from unibus import Bus

_USERINFO = re.compile(r"://.*@")


class FaultUnavailable(Exception):
    """This harness can't inject the fault. A contract that needs it is reported as not run, never as passed."""


class Harness(Protocol):
    """Five methods. `bus` makes no connection; `channel` returns a name that nothing else in this run has.

    Every name on the broker begins with `prefix`. All buses of one harness reach the same broker.
    """

    url: str
    prefix: str

    def bus(self, **settings: Any) -> Bus: ...

    def channel(self, label: str) -> str: ...

    async def restart_broker(self) -> None: ...

    def cut_link(self) -> AbstractAsyncContextManager[None]: ...

    async def cleanup(self) -> None: ...


class UrlHarness:
    """Any broker that answers at `url`. No faults, no cleanup."""

    def __init__(self, url: str, prefix: str | None = None) -> None:
        # A URL without a host is a broker inside this process; named, it is one that the buses of a contract share.
        self.url = re.sub(r"://(?=\?|$)", f"://ctr-{secrets.token_hex(3)}", url, count=1)
        self.prefix = prefix if prefix is not None else f"ctr-{secrets.token_hex(3)}."
        # With a given prefix, parallel workers share it: the token keeps their channels apart.
        self._token = secrets.token_hex(2)
        self._count = itertools.count(1)

    def bus(self, **settings: Any) -> Bus:
        """A bus that reads no file and no environment: what is tested is what is written here."""
        given: dict[str, Any] = {"service": "svc", "prefix": self.prefix, "config": False, "environ": {}}
        return Bus(settings.pop("url", self.url), **(given | settings))

    def channel(self, label: str) -> str:
        return f"{label}-{self._token}{next(self._count)}"

    async def restart_broker(self) -> None:
        raise FaultUnavailable("a URL alone gives no way to restart the broker")

    def cut_link(self) -> AbstractAsyncContextManager[None]:
        raise FaultUnavailable("a URL alone gives no way to cut the link")

    async def cleanup(self) -> None:
        return None

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
