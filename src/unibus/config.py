"""Settings: read at start, from the environment, unibus.toml and the code, checked as a whole.

A variable stands for the key of the file that it names and replaces it. The narrower place wins: a queue's own table,
or a group's and then its topic's; then the code; then `[defaults]`; then the built-in values. `retry` and the tables of
drivers are merged key by key.

`Bus(name="analytics")` reads `[bus.analytics]` and UNIBUS_BUS__ANALYTICS__* with the same keys. Of the top level it
takes `service` alone, which names the process; all the rest belongs to the other broker.

In a variable a list is JSON or comma-separated, a table is JSON.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from unibus.adapter import Secret, Url
from unibus.channel import Group, Queue, Topic, check_name
from unibus.config_environment import Names, read_environment
from unibus.config_settings import ConsumerSettings, Setting, Settings, consumer_values
from unibus.config_sources import CODE, Layer, flat, from_code, read_file, variable_of
from unibus.config_tables import (
    FEATURES,
    BusTable,
    Guarantee,
    Key,
    RetryTable,
    Root,
    check_table,
    dotted,
    joined,
    schema,
)
from unibus.errors import ConfigError
from unibus.registry import broker_name, broker_names, profile_factory, profile_names
from unibus.retry import RetryPolicy
from unibus.url import MASK, is_secret, masked, parse

__all__ = ["ConsumerSettings", "Guarantee", "Setting", "Settings", "check_table", "load"]

PROFILE = "profile"  # in the query of a memory URL
_POLICY = RetryPolicy()
_BUILT_IN: dict[str, Any] = {
    "prefix": "",
    "declare": "create",
    "delays": [],
    "send_timeout": 30.0,
    "request_timeout": 30.0,
    "shutdown_timeout": 25.0,
    "max_body": 64 * 1024 * 1024,
    "defaults": {
        "concurrency": 10,  # prefetch is twice the concurrency, whatever that is
        "timeout": 900.0,
        "guarantee": "at-least-once",
        "on_lease_lost": "mark",
        "retry": {name: getattr(_POLICY, name) for name in RetryTable.model_fields},
    },
}


def load(
    code: Mapping[str, object],
    *,
    bus: str | None = None,
    channels: Iterable[Queue[Any] | Topic[Any]] = (),
    groups: Iterable[Group] = (),
    environ: Mapping[str, str] | None = None,
    file: str | Path | Literal[False] | None = None,
) -> Settings:
    """The settings of one bus. Raises one ConfigError that names all that is wrong.

    `code`: what `Bus(...)` was given. `channels`, `groups`: what the code declares. `file`: False for none; None for
    what UNIBUS_CONFIG names, else unibus.toml of the working directory, if there is one.
    """
    environ = os.environ if environ is None else environ
    groups = tuple(groups)
    channels = tuple(dict.fromkeys((*channels, *(group.topic for group in groups))))
    problems: list[str] = []
    root = schema(tuple(sorted(_brokers())))
    scope: Key = ("bus", check_name(bus, "bus")) if bus is not None else ()
    written = read_file(root, file, environ, problems)
    values, settings, exceptions = _from_bus(code, problems)
    given = from_code(root, scope, values)
    names = _names(scope, channels, groups, written, _early_service(environ, written, given, scope))
    environment = read_environment(root, environ, names, problems)
    problems += [*written.check(), *given.check()]
    layers = [environment, written, given, from_code(root, scope, _BUILT_IN, "built-in")]

    merged, tables = _merge(root, layers, scope)
    problems += _clashes(tables, written, scope, channels)
    url, broker, standing = _url(tables, layers, scope, problems)
    service = tables.service or merged.service or _program(merged.app)
    standing["service"] = _place(layers, (*scope, "service")) or _place(layers, ("service",)) or "built-in"
    try:
        check_name(service, "service")
    except ConfigError as exc:
        problems.append(f"{standing['service']}: {exc}")
    if problems or url is None:
        raise ConfigError(joined(problems))

    # The broker is known only now, and with it the table that the code's settings and the URL's query belong to.
    if settings and _belongs(given, scope, broker):
        given.add((*scope, broker), settings, CODE)
    if table := {key: value for key, value in url.query.items() if key != PROFILE or broker != _profile(url)}:
        query = Layer(root)
        query.add((*scope, broker), table, f"query of url, {standing['url']}")
        layers.insert(0, query)
    merged, tables = _merge(root, layers, scope)
    return Settings(
        app=merged.app,
        service=service,
        url=url,
        broker=broker,
        prefix=tables.prefix or "",
        declare=tables.declare or "create",
        delays=tuple(sorted(set(tables.delays or ()))),
        send_timeout=tables.send_timeout or 0.0,
        request_timeout=tables.request_timeout or 0.0,
        shutdown_timeout=tables.shutdown_timeout or 0.0,
        max_body=tables.max_body or 0,
        driver=getattr(tables, broker, {}),
        _tables=tables,
        _found=tuple(_found(merged.app, service, url, standing, tables, layers, scope, broker)),
        _exceptions=exceptions,
        _channels=channels,
        _groups=groups,
        _written={t: tuple(written.table((*scope, "topics", t, "groups"))) for t in tables.topics},
    )


def app_of(environ: Mapping[str, str], file: str | Path | None = None) -> str | None:
    """The application that the environment or the file names, for who has to import it before its bus can be asked."""
    problems: list[str] = []
    written = read_file(schema(tuple(sorted(_brokers()))), file, environ, problems)
    if problems:
        raise ConfigError(joined(problems))
    app = environ.get("UNIBUS_APP") or written.tree.get("app")
    return app if isinstance(app, str) else None  # any other kind is told when the settings are read


def _brokers() -> frozenset[str]:
    """Whose tables may stand in the file: both sides of a swap, also where the adapter of one isn't installed."""
    return broker_names() | {"rabbitmq", "kafka", "sqs", "redis", *profile_names()}


def _profile(url: Url) -> str | None:
    """The broker that `memory://?profile=...` imitates: its settings count then, not those of memory."""
    profile = url.query.get(PROFILE) if broker_name(url.scheme) == "memory" else None
    return None if profile is None else profile.partition("-")[0]  # behind it a version may stand


def _broker(url: Url) -> str:
    """Whose settings count. Raises ConfigError."""
    if (profile := _profile(url)) is None:
        return broker_name(url.scheme)
    profile_factory(profile)  # raises what is wrong with it
    return profile


def _merge(root: type[Root], layers: Sequence[Layer], scope: Key) -> tuple[Root, BusTable]:
    merged = root(layers=layers)  # type: ignore[call-arg]  # see Root
    return merged, merged.bus[scope[1]] if scope else merged


def _names(
    scope: Key, channels: Sequence[Queue[Any] | Topic[Any]], groups: Sequence[Group], written: Layer, service: str
) -> Names:
    """All names that a variable of this bus may mean. The group of a subscriber that names none is the service."""
    names = Names(scope)
    names.known["bus",] = [*written.table(("bus",)), *scope[1:]]
    for kind, cls in (("queues", Queue), ("topics", Topic)):
        names.add((kind,), [channel.name for channel in channels if isinstance(channel, cls)])
        names.add((kind,), written.table((*scope, kind)))
    for group in groups:
        if not group.ephemeral:
            names.add(("topics", group.topic.name, "groups"), [group.name])
    for topic in list(names.known[(*scope, "topics")]):
        names.add(("topics", topic, "groups"), [service])
        names.add(("topics", topic, "groups"), written.table((*scope, "topics", topic, "groups")))
    return names


def _from_bus(
    code: Mapping[str, object], problems: list[str]
) -> tuple[dict[str, object], Mapping[str, object], RetryPolicy]:
    """What `Bus(...)` was given: plain settings, the driver's, and the policy whose exceptions count."""
    values = dict(code)
    for name in ("url", "password"):
        if isinstance(secret := values.get(name), Secret):
            values[name] = secret.value
    settings = values.pop("settings", None) or {}
    exceptions = None
    if isinstance(defaults := values.get("defaults"), Mapping):
        values["defaults"], exceptions = consumer_values(defaults)
    if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
        problems.append("Bus(settings=...): expected a table, the driver's own settings")
        settings = {}
    return values, settings, exceptions or _POLICY


def _clashes(
    tables: BusTable, written: Layer, scope: Key, channels: Sequence[Queue[Any] | Topic[Any]]
) -> Iterator[str]:
    """Names that can't be, or that the code uses otherwise."""
    code = {channel.name: channel for channel in channels}
    for kind, found, cls in (("queue", tables.queues, Queue), ("topic", tables.topics, Topic)):
        for name, table in found.items():
            place = written.place((*scope, f"{kind}s", name))
            try:
                check_name(name, kind)
                for group in getattr(table, "groups", ()):
                    check_name(group, "group")
            except ConfigError as exc:
                yield f"{place}: {exc}"
            channel = code.get(name)
            if channel is None:
                if kind == "topic" and name in tables.queues:
                    yield f"{place}: there is a queue of this name; one name is one kind of channel"
                if table.priorities == 1:
                    yield f"{place}: priorities: expected 2 to 10 levels, or 0 for none"
                continue
            if not isinstance(channel, cls):
                yield f"{place}: the code declares {channel}; one name is one kind of channel"
            for feature in FEATURES:
                if getattr(table, feature) not in {None, getattr(channel, feature)}:
                    yield f"{place}: {feature}: the code declares {getattr(channel, feature)!r}; say it there only"


def _url(
    tables: BusTable, layers: Sequence[Layer], scope: Key, problems: list[str]
) -> tuple[Url | None, str, dict[str, str]]:
    """The URL with user and password, its broker, and where url, username and password stand.

    Of two users or passwords the one of the higher source counts: a URL in the environment over a `username` in the
    file; a setting over a URL of the same source.
    """
    if tables.url is None:
        if not any((*scope, "url") in layer.wrong for layer in layers):
            where = f"[{dotted(scope)}] of unibus.toml" if scope else "unibus.toml"
            problems.append(f"no url: set {variable_of((*scope, 'url'))}, or url in {where}, or pass Bus(url=...)")
        return None, "", {}
    place = _place(layers, (*scope, "url"))
    try:
        url = parse(tables.url.get_secret_value())
        broker = _broker(url)
    except ConfigError as exc:
        problems.append(f"{place}: {exc}")
        return None, "", {}
    standing = dict.fromkeys(("url", "username", "password"), place)
    username, password = url.username, url.password
    if tables.username is not None and (username is None or _outranks(layers, scope, "username")):
        if username != tables.username:
            password = None  # it was another user's
        username = tables.username
        standing["username"] = _place(layers, (*scope, "username"))
    if tables.password is not None and (password is None or _outranks(layers, scope, "password")):
        password = Secret(tables.password.get_secret_value())
        standing["password"] = _place(layers, (*scope, "password"))
    return replace(url, username=username, password=password), broker, standing


def _outranks(layers: Sequence[Layer], scope: Key, name: str) -> bool:
    """Whether a setting stands in the layer of the URL or in a higher one."""
    return next(name in layer.table(scope) for layer in layers if {name, "url"} & layer.table(scope).keys())


def _place(layers: Sequence[Layer], key: Key) -> str:
    return next((layer.places[key] for layer in layers if key in layer.places), "")


def _program(app: str | None) -> str:
    """What a process without a `service` is called: the package of its app, or the program."""
    program = Path(sys.argv[0] if sys.argv else "")
    name = app.partition(":")[0].partition(".")[0] if app else program.stem
    if name == "__main__":  # python -m package
        name = program.parent.name
    return re.sub(r"[^A-Za-z0-9_-]", "-", name).strip("-")[:60] or "unibus"


def _early_service(environ: Mapping[str, str], written: Layer, given: Layer, scope: Key) -> str:
    """The service before anything is checked: variables may address the group that is called like it."""
    found = [environ.get(variable_of((*scope, "service"))), written.table(scope).get("service")]
    found += [given.table(scope).get("service"), environ.get("UNIBUS_SERVICE"), written.tree.get("service")]
    app = environ.get("UNIBUS_APP") or written.tree.get("app")
    return str(next(filter(None, found), None) or _program(app if isinstance(app, str) else None))


def _belongs(given: Layer, scope: Key, broker: str) -> bool:
    """Whether the driver's settings in code are of the broker in use, and not of the one that a swap has replaced."""
    url = given.table(scope).get("url")
    try:
        return url is None or _broker(parse(url)) == broker
    except ConfigError:
        return False


def _found(
    app: str | None,
    service: str,
    url: Url,
    standing: Mapping[str, str],
    tables: BusTable,
    layers: Sequence[Layer],
    scope: Key,
    broker: str,
) -> Iterator[Setting]:
    """Every setting in force, with its place in the layer that it comes from."""
    if app is not None:
        yield Setting("app", app, _place(layers, ("app",)))
    link = {"service": service, "url": str(url), "username": url.username, "password": url.password and MASK}
    yield from (Setting(key, value, standing[key]) for key, value in link.items() if value is not None)
    others = _brokers() - {broker}
    for key, value in flat(tables.model_dump(exclude_unset=True)):
        # Where a broker's name may stand; a channel may be called like one, or "password-resets".
        at = {"queues": 2, "topics": 4 if key[2:3] == ("groups",) else 2}.get(key[0], 0)
        if key[0] in {"app", "bus", *link} or set(key[at : at + 1]) & others or value is None:
            continue
        shown = MASK if any(is_secret(part) for part in key[at:]) else masked("", value)
        yield Setting(dotted(key), shown, _place(layers, (*scope, *key)))
