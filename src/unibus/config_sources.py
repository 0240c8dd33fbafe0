"""Where settings come from: unibus.toml, the code, the environment. One `Layer` each, with the place of every value."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource

from unibus.config_tables import Key, Root, dotted, explain
from unibus.errors import ConfigError
from unibus.url import parse

CODE = "code"
PREFIX = "UNIBUS_"


class Layer(PydanticBaseSettingsSource):
    """Settings of one origin as a nested table, with where each stands."""

    def __init__(self, root: type[Root], origin: str = "") -> None:
        super().__init__(root)
        self.root = root
        self.origin = origin  # the file's name, or CODE
        self.tree: dict[str, Any] = {}
        self.places: dict[Key, str] = {}
        self.wrong: set[Key] = set()

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Abstract in the base class, and used by nobody here."""
        return self.tree.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self.tree

    def put(self, key: Key, value: object, place: str) -> bool:
        """Add one value; False if something stands there."""
        table = self.tree
        for part in key[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                return False
        if key[-1] in table:
            return False
        table[key[-1]] = value
        self.places[key] = place
        return True

    def add(self, key: Key, values: Mapping[str, object], place: str) -> None:
        """Add a table of this layer as a whole."""
        table = self.tree
        for part in key:
            table = table.setdefault(part, {})
        table.update(copied(values))
        self.places.update({(*key, *path): place for path, _ in flat(copied(values))})

    def table(self, key: Key) -> dict[str, Any]:
        """The table at `key`, `{}` if there is none."""
        table: Any = self.tree
        for part in key:
            table = table.get(part) if isinstance(table, dict) else None
        return table if isinstance(table, dict) else {}

    def place(self, table: Key) -> str:
        if self.origin == CODE:
            inner = table[2:] if table[:1] == ("bus",) else table
            return f"Bus({dotted(inner)}=...)" if inner else "Bus(...)"
        return f"{self.origin} [{dotted(table)}]" if table else self.origin

    def check(self) -> Iterator[str]:
        """What is wrong with this layer alone. It is taken out, so that the rest can be looked at too."""
        for path, _ in flat(self.tree):
            self.places.setdefault(path, self.place(path[:-1]) if self.origin != CODE else CODE)
        try:
            self.root(layers=[self])  # type: ignore[call-arg]  # see Root
        except ValidationError as exc:
            problems, places = list(explain(self.root, exc)), [error["loc"] for error in exc.errors()]
        else:
            return
        yield from (f"{self.place(table)}: {key}: {words}" for table, key, words in problems)
        for place in places:
            wrong = tuple(
                str(part) for part in takewhile(lambda part: isinstance(part, str), place)
            )  # a list goes whole
            self.wrong.add(wrong)
            self.table(wrong[:-1]).pop(wrong[-1], None)


def copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tables copied, the values shared: a driver's settings in code may be an SSL context."""
    return {name: copied(value) if isinstance(value, Mapping) else value for name, value in tree.items()}


def flat(tree: Mapping[str, Any], above: Key = ()) -> Iterator[tuple[Key, object]]:
    """All values with their keys. An empty table is a value: it declares a channel or group."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, (*above, name))
        else:
            yield (*above, name), value


def normalised(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "_", name.upper())


def variable_of(key: Key) -> str:
    """The variable that stands for a key of the file."""
    return PREFIX + "__".join(map(normalised, key))


def read_file(
    root: type[Root], file: str | Path | Literal[False] | None, environ: Mapping[str, str], problems: list[str]
) -> Layer:
    """unibus.toml, or the file that was asked for."""
    asked = environ.get("UNIBUS_CONFIG") if file is None else file
    name = "unibus.toml" if asked is None else str(asked)
    layer = Layer(root, name)
    path = Path(name)
    if asked is False or (asked is None and not path.is_file()):
        return layer
    by = "environment UNIBUS_CONFIG" if file is None else "file"
    if not name or not path.is_file():
        problems.append(f"{by}: there is no file {name!r}")
        return layer
    try:
        layer.tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as exc:
        problems.append(f"{name}: is not TOML: {exc}")
    except UnicodeDecodeError:
        problems.append(f"{name}: is not UTF-8")
    except OSError as exc:
        problems.append(f"{name}: can't be read: {exc.strerror}")
    for key in [(), *(("bus", bus) for bus in layer.table(("bus",)))]:
        problems += _credentials(layer, key)
    return layer


def _credentials(layer: Layer, key: Key) -> Iterator[str]:
    variable = variable_of((*key, "password"))
    hint = f"no password is read from a file; set {variable}, or {variable}_FILE to a path"
    table = layer.table(key)
    for name in ("password", "password_file"):
        if table.pop(name, None) is not None:
            yield f"{layer.place(key)}: {name}: {hint}"
    try:
        password = parse(table["url"]).password if isinstance(table.get("url"), str) else None
    except ConfigError:
        return  # told when the URL is used
    if password is not None:
        layer.wrong.add((*key, "url"))
        del table["url"]
        yield f"{layer.place(key)}: url: there is a password in it; {hint}"


def from_code(root: type[Root], scope: Key, values: Mapping[str, object], origin: str = CODE) -> Layer:
    """What `Bus(...)` was given, or the built-in values, as a layer."""
    layer = Layer(root, origin)
    given = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}
    layer.add(scope, given, origin)
    return layer
