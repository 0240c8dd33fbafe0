"""What unibus.toml may hold, as pydantic models; and how an error of pydantic becomes words that hold no value.

The models describe the file and the environment alike. None means "not given": built-in values stand in `config`,
below what the code says. Nothing here leaves the config modules but `DriverTable`, `check_table` and `check_options`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core.core_schema import ErrorType
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from unibus.adapter import Declared, DeclareMode
from unibus.channel import Group
from unibus.errors import ConfigError
from unibus.url import is_secret

Key = tuple[str, ...]  # where a setting stands, from the root of the file
M = TypeVar("M", bound=BaseModel)

Guarantee = Literal["at-least-once", "at-most-once"]
OnLeaseLost = Literal["mark", "cancel"]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Wait = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Physical = Annotated[str, Field(min_length=1, max_length=255)]


FEATURES = ("ordered", "priorities", "delayed")  # of a channel that is declared here alone


class Table(BaseModel):
    """Strict: `concurrency = "10"` in the file is a mistake. The environment, all text, is converted before."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class DriverTable(BaseModel):
    """Of a driver's own tables. Not strict: `check_table` also gets text, from the environment and the URL's query."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class RetryTable(Table):
    max_retries: Count | None = None
    backoff: Seconds | None = None
    multiplier: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    max_backoff: Seconds | None = None
    jitter: Annotated[float, Field(ge=0, le=1)] | None = None
    immediate: Count | None = None
    crash_limit: Annotated[int, Field(ge=1)] | None = None


class ConsumerTable(Table):
    concurrency: Annotated[int, Field(ge=1)] | None = None
    prefetch: Annotated[int, Field(ge=1)] | None = None
    timeout: Seconds | None = None
    guarantee: Guarantee | None = None
    on_lease_lost: OnLeaseLost | None = None
    retry: RetryTable | None = None


class GroupTable(ConsumerTable):
    name: Physical | None = None


class QueueTable(GroupTable):
    ordered: bool | None = None
    priorities: Annotated[int, Field(ge=0, le=10)] | None = None
    delayed: bool | None = None


class TopicTable(QueueTable):
    groups: dict[str, GroupTable] = {}


class BusTable(Table):
    service: str | None = None
    url: SecretStr | None = None  # may hold a password
    username: str | None = None
    password: SecretStr | None = None
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,60}$")] | None = None
    declare: DeclareMode | None = None
    delays: list[Wait] | None = None
    send_timeout: Wait | None = None
    request_timeout: Wait | None = None
    shutdown_timeout: Seconds | None = None
    max_body: Annotated[int, Field(ge=1)] | None = None
    defaults: ConsumerTable = ConsumerTable()
    queues: dict[str, QueueTable] = {}
    topics: dict[str, TopicTable] = {}


class Root(BusTable, BaseSettings):
    """The whole file. Made as `Root(layers=[...])`, highest first: pydantic-settings merges them key by key."""

    app: str | None = None
    bus: dict[str, BusTable] = {}

    model_config = SettingsConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  # pydantic-settings passes all five by name
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # see above
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # see above
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # see above
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Our layers alone: what pydantic-settings reads by itself knows neither our names nor where a value stood."""
        assert isinstance(init_settings, InitSettingsSource)  # noqa: S101  # for mypy: the signature names its base class
        return tuple(init_settings.init_kwargs["layers"])


@lru_cache(maxsize=8)
def schema(brokers: tuple[str, ...]) -> type[Root]:
    """`Root` in which each broker has its table wherever one may stand. Which brokers there are is known at run time."""
    tables: Any = {name: (dict[str, object], {}) for name in brokers}
    group: Any = create_model("GroupTable", __base__=GroupTable, **tables)
    queue: Any = create_model("QueueTable", __base__=QueueTable, **tables)
    topic: Any = create_model("TopicTable", __base__=TopicTable, **tables, groups=(dict[str, group], {}))
    channels: Any = {"queues": (dict[str, queue], {}), "topics": (dict[str, topic], {})}
    bus: Any = create_model("BusTable", __base__=BusTable, **tables, **channels)
    return create_model("Root", __base__=Root, **tables, **channels, bus=(dict[str, bus], {}))


def bare(annotation: Any) -> Any:
    """The annotation without `| None` and without constraints."""
    while get_origin(annotation) in {Annotated, Union, UnionType}:
        annotation = next(a for a in get_args(annotation) if a is not NoneType)
    return annotation


def element(shape: Any) -> Any:
    """What a list or table of this type is made of; None for anything else."""
    return bare(get_args(shape)[-1]) if get_args(shape) else None


def is_table(shape: Any) -> bool:
    return isinstance(shape, type) and issubclass(shape, BaseModel)


def keys_at(model: type[BaseModel], path: Key) -> list[str]:
    """The keys that may stand in the table at `path`."""
    shape: Any = model
    for part in path:
        if is_table(shape):
            field = shape.model_fields.get(part)
            shape = bare(field.annotation) if field else None
        else:
            shape = element(shape)
    return list(shape.model_fields) if is_table(shape) else []


def near(name: str, known: list[str]) -> str:
    """What to append to "unknown key": the nearest name, or else all of them."""
    match = get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known are {', '.join(sorted(known))}" if known else ""


def dotted(path: Key) -> str:
    """A path as TOML writes it."""
    return ".".join(p if re.fullmatch(r"[A-Za-z0-9_-]+", p) else f'"{p}"' for p in map(str, path))


_EXPECTED = {"model_type": "expected a table", "dict_type": "expected a table", "missing": "is required"}

# Errors of pydantic itself: none of their texts quotes the input.
_SILENT = frozenset(get_args(ErrorType)) - {"value_error", "assertion_error", "get_attribute_error"}


def explain(model: type[BaseModel], exc: ValidationError) -> Iterator[tuple[Key, str, str]]:
    """Table, key and words of each error. The words hold no value."""
    for error in exc.errors(include_url=False):
        path = error["loc"]
        table = tuple(str(part) for part in path[:-1])
        key = str(path[-1]) if path else ""
        if error["type"] == "extra_forbidden":
            yield table, key, f"unknown key{near(key, keys_at(model, table))}"
            continue
        if path and isinstance(path[-1], int):  # of a list
            table, key = table[:-1], f"{table[-1]}[{key}]" if table else f"[{key}]"
        words = _EXPECTED.get(error["type"]) or re.sub(
            r"Input should be (greater|less)?",
            lambda m: f"expected a value {m[1]}" if m[1] else "expected ",
            error["msg"],
        )
        if error["type"] not in _SILENT:  # written by a validator, which may quote what it got
            words = re.sub(r"^(Value error|Assertion failed), ", "", words)
            words = _redacted(words, error["input"], secret=any(is_secret(str(part)) for part in path))
        yield table, key, words


def _redacted(words: str, value: object, *, secret: bool) -> str:
    if secret:
        return "is not valid"
    for text in sorted(_texts(value), key=len, reverse=True):
        words = re.sub(rf"(?<!\w){re.escape(text)}(?!\w)", "…", words)
    return words


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif str(value):
        yield str(value)


def unpack(annotation: Any, text: str) -> object:
    """A value given as text: a list is JSON or comma-separated, a table is JSON, anything else stays text.

    Raises ValueError for JSON that is none. Where the type is unknown, text that is no JSON list or table stays text.
    """
    shape = bare(annotation)
    origin = get_origin(shape) or shape
    bracketed = text.lstrip()[:1] in {"[", "{"}
    if shape is object:
        try:
            return json.loads(text) if bracketed else text
        except ValueError:
            return text
    if origin in {list, tuple, set, frozenset}:
        return json.loads(text) if bracketed else [item.strip() for item in text.split(",") if item.strip()]
    if origin is dict or is_table(shape):
        return json.loads(text)
    return text


def check_table(model: type[M], table: Mapping[str, object], where: str) -> M:
    """A driver's own table, checked by its model. Raises one ConfigError that names each `where`.key, never a value.

    Text is converted to what the model asks for, since settings also come from the environment and the URL's query.
    """
    problems = []
    values = dict(table)
    if model.model_config.get("extra") != "allow":
        known = [name for key, info in model.model_fields.items() for name in _spelt(model, key, info)]
        problems += [f"{where}.{key}: unknown key{near(key, known)}" for key in values if key not in known]
        values = {key: value for key, value in values.items() if key in known}
    for field, info in model.model_fields.items():
        for key in _spelt(model, field, info):
            value = values.get(key)
            try:
                values |= {key: unpack(info.annotation, value)} if isinstance(value, str) else {}
            except ValueError:
                problems.append(f"{where}.{key}: expected JSON")
                del values[key]
    checked = None
    try:
        checked = model.model_validate(values)
    except ValidationError as exc:
        problems += [
            f"{'.'.join((where, *table, *filter(None, [key])))}: {words}" for table, key, words in explain(model, exc)
        ]
    if problems or checked is None:  # outside of `except`: the cause would show values
        raise ConfigError(joined(problems))
    return checked


def check_options(model: type[M], declared: Declared, broker: str) -> M:
    """The table of a broker in the section of one queue, topic or group, checked as by `check_table`."""
    address = declared.address
    if isinstance(address, Group):
        where = f"topics.{address.topic.name}.groups.{address.name}"
    else:
        where = f"{type(address).__name__.lower()}s.{address.name}"
    return check_table(model, declared.options, f"{where}.{broker}")


def _spelt(model: type[BaseModel], key: str, info: FieldInfo) -> set[str]:
    """The keys that fill a field."""
    by_name = info.alias is None or any(model.model_config.get(k) for k in ("populate_by_name", "validate_by_name"))
    return {name for name in (info.alias, key if by_name else None) if name}


def joined(problems: list[str]) -> str:
    """One text for all that is wrong."""
    if len(problems) == 1:
        return problems[0]
    return "".join([f"{len(problems)} settings are wrong:", *(f"\n  - {p}" for p in problems)])
