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
from unibus.config_settings import ConsumerSettings, Setting, Settings, consumer_values
from unibus.config_sources import CODE, Layer, Names, flat, from_code, read_environment, read_file, variable_of
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
from unibus.registry import broker_name, broker_names
from unibus.retry import RetryPolicy
from unibus.url import MASK, is_secret, masked, parse

__all__ = ["ConsumerSettings", "Guarantee", "Setting", "Settings", "check_table", "load"]

_POLICY = RetryPolicy()
_BUILT_IN: dict[str, Any] = {
    "prefix": "",
    "declare": "create",
    "delays": [],
    "send_timeout": 30.0,
    "request_timeout": 30.0,
    "shutdown_timeout": 25.0,
    "defaults": {
        "concurrency": 10,  # prefetch is twice the concurrency, whatever that is
        "timeout": 900.0,
        "guarantee": "at-least-once",
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
    environment = read_environment(root, environ, _names(scope, channels, groups, written), problems)
    values, settings, exceptions = _from_bus(code, problems)
    given = from_code(root, scope, values)
    problems += [*written.check(), *given.check()]
    layers = [environment, written, given, from_code(root, scope, _BUILT_IN, "built-in")]

    merged, tables = _merge(root, layers, scope)
    problems += _clashes(tables, written, scope, channels)
    url, broker, place = _url(tables, layers, scope, problems)
    service = _service(tables.service or merged.service, merged.app, problems)
    if problems or url is None:
        raise ConfigError(joined(problems))

    # The broker is known only now, and with it the table that the code's settings and the URL's query belong to.
    if settings and _belongs(given, scope, broker):
        given.add((*scope, broker), settings, CODE)
    if url.query:
        query = Layer(root)
        query.add((*scope, broker), url.query, f"query of url, {place}")
        layers.insert(0, query)
    merged, tables = _merge(root, layers, scope)
    derived = {"url": str(url), "service": service}
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
        driver=getattr(tables, broker, {}),
        _tables=tables,
        _found=tuple(_found(merged, tables, layers, scope, broker, derived)),
        _exceptions=exceptions,
        _channels=channels,
        _groups=groups,
    )


def _brokers() -> frozenset[str]:
    """Whose tables may stand in the file: both sides of a swap, also where the adapter of one isn't installed."""
    return broker_names() | {"rabbitmq", "kafka", "sqs", "redis"}


def _merge(root: type[Root], layers: Sequence[Layer], scope: Key) -> tuple[Root, BusTable]:
    merged = root(layers=layers)  # type: ignore[call-arg]  # see Root
    return merged, merged.bus[scope[1]] if scope else merged


def _names(scope: Key, channels: Sequence[Queue[Any] | Topic[Any]], groups: Sequence[Group], written: Layer) -> Names:
    """All names that this bus knows: those of the code first."""
    names = Names(scope)
    names.known["bus",] = [*written.table(("bus",)), *scope[1:]]
    for kind, cls in (("queues", Queue), ("topics", Topic)):
        names.add((kind,), [channel.name for channel in channels if isinstance(channel, cls)])
        names.add((kind,), written.table((*scope, kind)))
    for group in groups:
        if not group.ephemeral:
            names.add(("topics", group.topic.name, "groups"), [group.name])
    for topic in written.table((*scope, "topics")):
        names.add(("topics", topic, "groups"), written.table((*scope, "topics", topic, "groups")))
    return names


def _from_bus(
    code: Mapping[str, object], problems: list[str]
) -> tuple[dict[str, object], Mapping[str, object], RetryPolicy]:
    """What `Bus(...)` was given: plain settings, the driver's, and the policy whose exceptions count."""
    values = dict(code)
    password = values.get("password")
    if isinstance(password, Secret):
        values["password"] = password.value
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


def _url(tables: BusTable, layers: Sequence[Layer], scope: Key, problems: list[str]) -> tuple[Url | None, str, str]:
    """The URL with user and password, its broker, and where it stands.

    Of two users or passwords the one of the higher source counts: a URL in the environment over a `username` in the
    file; a setting over a URL of the same source.
    """
    if tables.url is None:
        if not any((*scope, "url") in layer.wrong for layer in layers):
            where = f"[{dotted(scope)}] of unibus.toml" if scope else "unibus.toml"
            problems.append(f"no url: set {variable_of((*scope, 'url'))}, or url in {where}, or pass Bus(url=...)")
        return None, "", ""
    rank, place = _standing(layers, (*scope, "url"))
    try:
        url = parse(tables.url.get_secret_value())
        broker = broker_name(url.scheme)
    except ConfigError as exc:
        problems.append(f"{place}: {exc}")
        return None, "", ""
    username, password = url.username, url.password
    if tables.username is not None and (username is None or _standing(layers, (*scope, "username"))[0] <= rank):
        if username != tables.username:
            password = None  # it was another user's
        username = tables.username
    if tables.password is not None and (password is None or _standing(layers, (*scope, "password"))[0] <= rank):
        password = Secret(tables.password.get_secret_value())
    return replace(url, username=username, password=password), broker, place


def _standing(layers: Sequence[Layer], key: Key) -> tuple[int, str]:
    """Which layer a value in force comes from, and its place there."""
    return next((n, layer.places[key]) for n, layer in enumerate(layers) if key in layer.places)


def _service(given: str | None, app: str | None, problems: list[str]) -> str:
    """The name of this process' kind: given, or the package of its app, or the program."""
    if given is not None:
        try:
            return check_name(given, "service")
        except ConfigError as exc:
            problems.append(str(exc))
            return given
    program = Path(sys.argv[0] if sys.argv else "")
    name = app.partition(":")[0].partition(".")[0] if app else program.stem
    if name == "__main__":  # python -m package
        name = program.parent.name
    return re.sub(r"[^A-Za-z0-9_-]", "-", name).strip("-")[:60] or "unibus"


def _belongs(given: Layer, scope: Key, broker: str) -> bool:
    """Whether the driver's settings in code are of the broker in use, and not of the one that a swap has replaced."""
    url = given.table(scope).get("url")
    try:
        return url is None or broker_name(parse(url).scheme) == broker
    except ConfigError:
        return False


def _found(
    merged: Root, tables: BusTable, layers: Sequence[Layer], scope: Key, broker: str, derived: Mapping[str, str]
) -> Iterator[Setting]:
    """Every setting in force, with the place of the layer that it comes from."""
    others = _brokers() - {broker}
    places: dict[Key, str] = {}
    for layer in reversed(layers):
        places.update(layer.places)
    if merged.app is not None:
        yield Setting("app", merged.app, places["app",])
    inherited = places.get(("service",), "built-in")
    yield Setting("service", derived["service"], places.get((*scope, "service"), inherited))
    for key, value in flat(tables.model_dump(exclude_unset=True)):
        at = {"queues": 2, "topics": 4 if key[2:3] == ("groups",) else 2}.get(
            key[0], 0
        )  # where a broker's name may stand
        if key[0] in {"app", "service", "bus"} or key[at : at + 1] in {(name,) for name in others} or value is None:
            continue
        shown = MASK if any(is_secret(part) for part in key[at:]) else masked("", value)
        yield Setting(dotted(key), derived.get(dotted(key), shown), places[*scope, *key])
