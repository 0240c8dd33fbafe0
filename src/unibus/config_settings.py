"""`Settings`: what is in force for one bus, and for each of its channels and consumers. Made by `config.load`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from unibus.adapter import DeclareMode, Url
from unibus.channel import Group, Queue, Topic
from unibus.config_tables import (
    FEATURES,
    BusTable,
    ConsumerTable,
    GroupTable,
    Guarantee,
    OnLeaseLost,
    QueueTable,
    RetryTable,
    explain,
    joined,
)
from unibus.errors import ConfigError
from unibus.retry import RetryPolicy


@dataclass(frozen=True, slots=True)
class ConsumerSettings:
    """What is in force for one consumer, subscriber or responder. `timeout` None: none."""

    concurrency: int
    prefetch: int
    timeout: float | None
    retry: RetryPolicy
    guarantee: Guarantee
    on_lease_lost: OnLeaseLost


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting in force, credentials masked. `source`: "environment UNIBUS_URL", "unibus.toml", "code", "built-in"."""

    key: str
    value: object
    source: str


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of one bus, checked. `driver`: the broker's own table with the URL's query over it."""

    app: str | None
    service: str
    url: Url
    broker: str
    prefix: str
    declare: DeclareMode
    delays: tuple[float, ...]  # ascending
    send_timeout: float
    request_timeout: float
    shutdown_timeout: float
    max_body: int
    driver: Mapping[str, object] = field(repr=False)
    _tables: BusTable = field(repr=False)
    _found: tuple[Setting, ...] = field(repr=False)
    _exceptions: RetryPolicy = field(repr=False)  # of Bus(defaults=...): retry_on, give_up_on
    _channels: tuple[Queue[Any] | Topic[Any], ...] = field(repr=False)
    _groups: tuple[Group, ...] = field(repr=False)
    _written: Mapping[str, tuple[str, ...]] = field(repr=False)  # the groups of each topic that stand in the file

    def consumer(self, address: Queue[Any] | Group, code: Mapping[str, object]) -> ConsumerSettings:
        """For the consumer of `address`; `code` is what its decorator was given."""
        values, policy = consumer_values(code)
        layers: list[ConsumerTable] = [*self._own(address), _checked(values, f"consumer of {address}")]
        layers.append(self._tables.defaults)
        concurrency = _first(layers, "concurrency")
        retries = [table.retry for table in layers if table.retry is not None]
        exceptions = policy or self._exceptions
        return ConsumerSettings(
            concurrency=concurrency,
            prefetch=_first(layers, "prefetch") or 2 * concurrency,
            timeout=_first(layers, "timeout") or None,
            guarantee=_first(layers, "guarantee"),
            on_lease_lost=_first(layers, "on_lease_lost"),
            retry=RetryPolicy(
                **{name: _first(retries, name) for name in RetryTable.model_fields},
                retry_on=exceptions.retry_on,
                give_up_on=exceptions.give_up_on,
            ),
        )

    def physical(self, address: Queue[Any] | Topic[Any] | Group) -> str:
        """The name on the broker, before the driver's own alphabet. Of dead letters and invalid ones: `derived`."""
        table = self._table(address)
        if table is not None and table.name is not None:
            return self.prefix + table.name
        if isinstance(address, Group):
            return f"{self.physical(address.topic)}.{address.name}"
        return self.prefix + address.name

    def derived(self, address: Queue[Any] | Group, suffix: str) -> str:
        """The physical name of the queue for dead letters or invalid messages of `address`."""
        return self.physical(address) + suffix

    def options(self, address: Queue[Any] | Topic[Any] | Group) -> Mapping[str, object]:
        """What unibus.toml says about `address` to the driver in use. Tables of other brokers stay unread."""
        return deepcopy(getattr(self._table(address), self.broker, {}))

    def declared_channels(self) -> list[Queue[Any] | Topic[Any]]:
        """Those that only unibus.toml declares; their bodies are bytes."""
        code = {channel.name for channel in self._channels}
        found: list[Queue[Any] | Topic[Any]] = []
        found += [Queue(name, **_features(t)) for name, t in self._tables.queues.items() if name not in code]
        found += [Topic(name, **_features(t)) for name, t in self._tables.topics.items() if name not in code]
        return found

    def declared_groups(self) -> list[Group]:
        """Those that only unibus.toml declares, before their service is deployed."""
        topics = {c.name: c for c in (*self.declared_channels(), *self._channels) if isinstance(c, Topic)}
        found = [Group(topics[name], g) for name, groups in self._written.items() for g in groups]
        return [group for group in found if group not in self._groups]

    def effective(self) -> list[Setting]:
        """Every setting in force and where it came from; what code says of single consumers aside."""
        return list(self._found)

    def source(self, key: str) -> str:
        """Where a setting came from: `source("service")`."""
        return next((setting.source for setting in self._found if setting.key == key), "built-in")

    def _table(self, address: Queue[Any] | Topic[Any] | Group) -> GroupTable | None:
        if isinstance(address, Queue):
            return self._tables.queues.get(address.name)
        if isinstance(address, Topic):
            return self._tables.topics.get(address.name)
        topic = self._tables.topics.get(address.topic.name)
        return topic.groups.get(address.name) if topic is not None else None

    def _own(self, address: Queue[Any] | Group) -> list[GroupTable]:
        """The tables of `address`, narrowest first."""
        tables = [self._table(address), self._table(address.topic) if isinstance(address, Group) else None]
        return [table for table in tables if table is not None]


def consumer_values(code: Mapping[str, object]) -> tuple[dict[str, Any], RetryPolicy | None]:
    """What code says of a consumer, as unibus.toml would say it; and the policy, for its exceptions."""
    values = {name: value for name, value in code.items() if value is not None}
    if "timeout" in code:
        values["timeout"] = code["timeout"] or 0  # in code, None is how one says "no timeout"
    policy = values.get("retry")
    if not isinstance(policy, RetryPolicy):
        return values, None
    return {**values, "retry": {name: getattr(policy, name) for name in RetryTable.model_fields}}, policy


def _checked(values: Mapping[str, object], place: str) -> ConsumerTable:
    try:
        return ConsumerTable.model_validate(values)
    except ValidationError as exc:
        problems = [f"{place}: {'.'.join((*table, key))}: {words}" for table, key, words in explain(ConsumerTable, exc)]
    raise ConfigError(joined(problems))  # outside of `except`: the cause would show values


def _first(tables: Sequence[ConsumerTable | RetryTable], name: str) -> Any:
    return next((value for table in tables if (value := getattr(table, name)) is not None), None)


def _features(table: QueueTable) -> dict[str, Any]:
    return {name: value for name in FEATURES if (value := getattr(table, name)) is not None}
