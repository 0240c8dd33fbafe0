"""The environment as a source of settings.

Our own, since the one of pydantic-settings can't know that ORDER_CHARGED is the topic "order.charged", nor that a
variable is misspelt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from unibus.config_sources import PREFIX, Layer, flat, normalised
from unibus.config_tables import Key, Root, bare, element, explain, is_table, unpack
from unibus.errors import ConfigError

_OURS = re.compile(r"UNIBUS_(CONFIG|TEST_\w*)")
# What Kubernetes puts into every pod for a Service named unibus or unibus-something; never with two underscores.
_KUBERNETES = re.compile(
    r"UNIBUS_(?!\w*__)(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)


@dataclass
class Names:
    """The names that variables of one bus may address: what its code and its part of unibus.toml declare."""

    scope: Key
    known: dict[Key, list[str]] = field(default_factory=dict)

    def add(self, table: Key, names: Iterable[str]) -> None:
        have = self.known.setdefault((*self.scope, *table), [])
        have += [name for name in names if name not in have]

    def find(self, table: Key, rest: str) -> tuple[str, str] | None:
        """Split ORDER_CHARGED__GROUPS__... into "order.charged" and GROUPS__... . Raises ConfigError.

        None: the name is another bus' to know, whose own start checks the variable.
        """
        names = {name: normalised(name) for name in self.known.get(table, ())}
        hits = {name: norm for name, norm in names.items() if rest == norm or rest.startswith(f"{norm}__")}
        longest = max(map(len, hits.values()), default=0)
        best = [name for name, norm in hits.items() if len(norm) == longest]
        if len(best) > 1:
            raise ConfigError(f"means {' and '.join(map(repr, sorted(best)))} alike; use unibus.toml for these")
        if best:
            return best[0], rest[longest + 2 :]
        if table[0] == "bus" and table[:2] != self.scope:
            return None
        if self.scope and table[0] != "bus":
            return None
        raise ConfigError(f"no {table[-1].removesuffix('s')} that is declared has this name")


def read_environment(root: type[Root], environ: Mapping[str, str], names: Names, problems: list[str]) -> Layer:
    """All UNIBUS_* variables, converted to the types of the settings."""
    layer = Layer(root)
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or _OURS.fullmatch(variable) or _KUBERNETES.fullmatch(variable):
            continue
        rest = variable.removeprefix(PREFIX).upper()
        try:
            located = _locate(root, rest, names)
        except ConfigError as exc:
            problems.append(f"environment {variable}: {exc}{_nearest(variable, root, names)}")
            continue
        if located is None:
            continue
        key, annotation = located
        value, found = _convert(annotation, environ[variable])
        for wrong in found:
            layer.wrong.add(key)
            problems.append(f"environment {variable}: {wrong}")
        if not found:
            for path, item in flat({"": value}):
                if not layer.put((*key, *path[1:]), item, f"environment {variable}"):
                    problems.append(f"environment {variable}: is set by another variable too; keep one of them")
    _password_file(layer, names.scope, problems)
    return layer


def _locate(root: type[Root], rest: str, names: Names) -> tuple[Key, Any] | None:
    """Where a variable's value goes, and its type; None: nothing of this bus. Raises ConfigError."""
    key: Key = ()
    annotation: Any = root
    while rest:
        shape = bare(annotation)
        if is_table(shape):
            head, _, rest = rest.partition("__")
            name = head.lower()
            fields: Mapping[str, FieldInfo] = shape.model_fields
            if name == "password_file" and "password" in fields and not rest:
                return (*key, name), str
            if name not in fields:
                raise ConfigError("no setting has this name")
            annotation = fields[name].annotation
        elif element(shape) is object:  # a broker's own table: the driver knows what may stand there
            parts = rest.lower().split("__")
            if not all(parts):
                raise ConfigError("no setting has this name")
            return (*key, *parts), object
        elif is_table(inner := element(shape)):
            found = names.find(key, rest)
            if found is None:
                return None
            name, rest = found
            annotation = inner
        else:
            raise ConfigError("no setting has this name")
        key = (*key, name)
    if not key or is_table(element(bare(annotation))):
        raise ConfigError("is a table; name the key in it")
    return key, annotation


def _convert(annotation: Any, text: str) -> tuple[Any, list[str]]:
    """The value that `text` stands for, or what is wrong with it."""
    shape = bare(annotation)
    model = shape if is_table(shape) else BaseModel
    try:
        value = TypeAdapter(annotation).validate_python(unpack(annotation, text))
    except ValidationError as exc:
        return None, [
            f"{'.'.join((*table, key))}: {words}".removeprefix(": ") for table, key, words in explain(model, exc)
        ]
    except ValueError:
        return None, ['expected JSON, such as [1, 2] or {"key": 1}']
    return (value.model_dump(exclude_none=True, exclude_unset=True) if isinstance(value, BaseModel) else value), []


def _nearest(variable: str, root: type[Root], names: Names) -> str:
    match = get_close_matches(variable.upper(), list(_spellings(root, names, PREFIX, ())), n=1, cutoff=0.8)
    return f"; did you mean {match[0]}?" if match and match[0] != variable else ""


def _spellings(shape: Any, names: Names, prefix: str, key: Key) -> Iterator[str]:
    """All variables that mean something."""
    for name, info in shape.model_fields.items():
        inner = bare(info.annotation)
        variable, path = prefix + name.upper(), (*key, name)
        item_type = element(inner)
        if is_table(inner):
            yield from _spellings(inner, names, f"{variable}__", path)
        elif is_table(item_type):
            for item in names.known.get(path, ()):
                yield from _spellings(item_type, names, f"{variable}__{normalised(item)}__", (*path, item))
        elif item_type is not object:
            yield variable
        if name == "password":
            yield f"{variable}_FILE"


def _password_file(layer: Layer, scope: Key, problems: list[str]) -> None:
    key = (*scope, "password_file")
    path = layer.table(scope).pop("password_file", None)
    for bus in layer.table(("bus",)).values():
        bus.pop("password_file", None)  # of another bus: its own start reads it
    layer.tree.pop("password_file", None)
    if path is None:
        return
    place = layer.places.pop(key)
    if (*scope, "password") in layer.places:
        problems.append(f"{place}: {layer.places[*scope, 'password'].partition(' ')[2]} is set too; keep one of them")
        return
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError):  # the path stays unsaid: the password itself may stand there by mistake
        problems.append(f"{place}: names no file that can be read")
        return
    password = text.removesuffix("\n").removesuffix("\r")
    if not password:
        problems.append(f"{place}: names a file that is empty")
        return
    layer.put((*scope, "password"), SecretStr(password), place)
