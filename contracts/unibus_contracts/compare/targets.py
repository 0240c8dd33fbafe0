"""What is compared: a URL, a unibus.toml, or the name of a broker of the supply, which is started if it does not run."""

from __future__ import annotations

import os
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from unibus import ConfigError
from unibus.adapter import Secret, Url
from unibus.config import load
from unibus.registry import broker_name
from unibus.url import masked, parse

from .. import supply
from ..cleanup import Made, NotingBus
from ..harness import of_file
from ..supply.broker import variable


@dataclass(frozen=True)
class Target:
    """A broker with its settings. `given`: as it was asked for, without credentials; `emulator`: what it really is; `file`: the
    unibus.toml that it was read from.
    """

    given: str
    url: Url
    settings: Mapping[str, object] = field(
        default_factory=dict, repr=False
    )  # of the driver, the URL's query among them
    emulator: str | None = None
    file: Path | None = None

    def bus(self, *, made: Made | None = None, **more: Any) -> NotingBus:
        """A bus that reads no file and no environment: all there is to it is here. `made` notes what it will make."""
        url = self.url
        given: dict[str, Any] = {"service": "compare", "config": False, "environ": {}, "settings": dict(self.settings)}
        if url.username is not None:
            given |= {"username": url.username, "password": url.password.value if url.password else None}
        bus = NotingBus(self._bare() + _query(self._not_settings()), **(given | more))
        bus.made = made
        return bus

    @property
    def shown(self) -> str:
        return str(self.url)

    def text(self) -> str:
        """The URL with all that belongs to it: it holds a password. Tables among the settings have no place in it."""
        user = ""
        if self.url.username is not None:
            password = f":{quote(self.url.password.value, safe='')}" if self.url.password else ""
            user = f"{quote(self.url.username, safe='')}{password}@"
        plain = {k: _text(v) for k, v in self.settings.items() if not isinstance(v, dict)}
        scheme, separator, rest = self._bare().partition("://")
        return f"{scheme}{separator}{user}{rest}{_query(self._not_settings() | plain)}"

    def _bare(self) -> str:
        hosts = str(Url("x", self.url.hosts)).removeprefix("x://")
        return f"{self.url.scheme}://{hosts}" + (f"/{quote(self.url.path, safe='')}" if self.url.path else "")

    def _not_settings(self) -> dict[str, str]:
        """What of the URL's query is none of the driver's settings, and belongs to the URL: the profile of a memory broker."""
        return {k: v for k, v in self.url.query.items() if k not in self.settings}

    def told(self) -> dict[str, Any]:
        """For the document: no credential in it."""
        return {
            "given": self.given,
            "url": self.shown,
            "emulator": self.emulator,
            "settings": masked(
                "", {k: v for k, v in {**self._not_settings(), **self.settings}.items() if not isinstance(v, Secret)}
            ),
        }


def left_out(target: Target) -> list[str]:
    """The tables of its unibus.toml that are about channels of an application, and so have no part in the comparison."""
    if target.file is None:
        return []
    return [
        name
        for name in ("defaults", "queues", "topics")
        if name in tomllib.loads(target.file.read_text(encoding="utf-8"))
    ]


def _query(values: Mapping[str, str]) -> str:
    return f"?{urlencode(values, quote_via=quote)}" if values else ""


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)


def resolve(names: list[str]) -> tuple[list[Target], list[supply.Broker]]:
    """The targets, in order, and the brokers that were started for them and are to be stopped.

    Raises ConfigError for what can be read as neither of the three, before anything is started; SupplyError.
    """
    kinds = [name for name in names if name in supply.KINDS]
    found = {name: _given(name) for name in names if name not in supply.KINDS}
    started: list[supply.Broker] = []
    try:
        for name in dict.fromkeys(kinds):
            found[name] = _supplied(name, started)
    except BaseException:
        stop(started)
        raise
    return [found[name] for name in names], started


def stop(started: list[supply.Broker]) -> None:
    for broker in started:
        broker.stop()


def _supplied(name: str, started: list[supply.Broker]) -> Target:
    try:
        [broker] = supply.running([name])
    except supply.SupplyError:
        broker = supply.start(name)
        if broker.source != "environment":
            started.append(broker)
    # One of the environment may be anything; what the supply has started is known.
    emulator = None if broker.source == "environment" else supply.emulator(name)
    return _target(name, {"url": broker.url}, emulator)


def _given(text: str) -> Target:
    if text.endswith(".toml"):
        file = Path(text)
        if not file.is_file():
            raise ConfigError(f"{text}: there is no such file")
        url, more = of_file(file)
        return _target(text, {"url": url, **more}, None, file)
    if "://" not in text:
        raise ConfigError(
            f"{text!r} is no URL, no file.toml and none of the brokers that can be started here: "
            f"{', '.join(supply.KINDS)}"
        )
    place, mark, query = text.partition("?")
    if place == "memory://":  # a broker inside this process that all buses of the run share
        text = f"{place}compare-{secrets.token_hex(3)}{mark}{query}"
    return _target("", {"url": text}, _known(text))


def _target(given: str, code: Mapping[str, object], emulator: str | None, file: Path | None = None) -> Target:
    """The settings that reach a broker."""
    if isinstance(url := code["url"], str):
        broker_name(parse(url).scheme)
    settings = load(code, file=False, environ={})
    driver = dict(settings.driver)
    server = driver.get("endpoint_url")
    if emulator is None and isinstance(server, str):
        host = urlsplit(server).netloc.rpartition("@")[2]
        emulator = supply.emulator_at(settings.broker, server) or f"{settings.broker} at {host}, not the service itself"
    return Target(given or str(settings.url), settings.url, driver, emulator, file)


def _known(url: str) -> str | None:
    """The emulator behind a URL that the supply has printed."""
    for name in supply.KINDS:
        if supply.emulator(name) and not os.environ.get(variable(name)):
            try:
                [broker] = supply.running([name])
            except supply.SupplyError:
                continue
            if broker.url == url:
                return supply.emulator(name)
    return None
