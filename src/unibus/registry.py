"""From a URL's scheme to the adapter behind it, by entry points of the group `unibus.adapters`; profiles likewise.

Nothing is imported until an adapter is asked for: a name is answered from the installed metadata alone.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, cast

from unibus.adapter import AdapterFactory, Endpoint, Profile, ProfileFactory
from unibus.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "unibus.adapters"
PROFILES = "unibus.profiles"  # section of the broker -> what its adapter says without a broker


@cache
def adapter_factory(scheme: str) -> AdapterFactory:
    """What makes the adapter for URLs of `scheme`. Raises ConfigError: unknown scheme, missing client library."""
    return cast(AdapterFactory, _load(_entry(scheme), f"{scheme}://"))


def profile_of(text: str, endpoint: Endpoint) -> Profile:
    """What the adapter of `kafka`, or of `rabbitmq-4.1` at that version, says without a broker. Raises ConfigError."""
    name, _, version = text.partition("-")
    return profile_factory(name)(endpoint, version or None)


@cache
def profile_factory(name: str) -> ProfileFactory:
    """What makes the profile of a broker. Raises ConfigError for one that no adapter has."""
    found = [entry for entry in _profiles() if entry.name == name]
    if not found:
        near = get_close_matches(name, profile_names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(profile_names()) or 'none'}"
        raise ConfigError(f"profile={name}: no installed adapter has a profile of that name; {hint}")
    return cast(ProfileFactory, _load(found[0], f"profile={name}"))


def profile_names() -> tuple[str, ...]:
    """The brokers that have a profile, sorted."""
    return tuple(sorted({entry.name for entry in _profiles()}))


def _load(entry: EntryPoint, what: str) -> object:
    try:
        return entry.load()
    except ImportError as exc:
        raise ConfigError(f"{what}: {_missing(entry, exc)}") from exc
    except AttributeError as exc:
        raise ConfigError(
            f"{what}: {entry.value} of {_distribution(entry)} does not exist ({exc}); reinstall it"
        ) from exc
    except Exception as exc:  # whatever its code does wrong
        raise ConfigError(
            f"{what}: {entry.module} of {_distribution(entry)} can't be imported: {type(exc).__name__}: {exc}"
        ) from exc


def broker_name(scheme: str) -> str:
    """The broker's section in unibus.toml: `rabbitmq` for amqp and amqps. Raises ConfigError for an unknown scheme."""
    return _section(_entry(scheme))


def broker_names() -> frozenset[str]:
    """The sections of all brokers whose adapters are installed, with or without their client libraries."""
    return frozenset(_section(entry) for entries in _entries().values() for entry in entries)


def schemes() -> tuple[str, ...]:
    """All known URL schemes, sorted."""
    return tuple(sorted(_entries()))


@cache
def _entries() -> dict[str, list[EntryPoint]]:
    """Scheme -> entry points. One that is found twice, as with an editable install beside another copy, counts once."""
    from importlib.metadata import (
        entry_points,
    )  # an eighth of what importing unibus costs: paid at start, not at import

    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        same = found.setdefault(entry.name, [])
        if all(entry.value != other.value for other in same):
            same.append(entry)
    return found


@cache
def _profiles() -> list[EntryPoint]:
    from importlib.metadata import entry_points  # as above

    return list(entry_points(group=PROFILES))


def _entry(scheme: str) -> EntryPoint:
    found = _entries().get(scheme)
    if not found:
        near = get_close_matches(scheme, schemes(), n=1)
        hint = f"did you mean {near[0]}://? " if near else ""
        known = ", ".join(f"{name}://" for name in schemes()) or "none; unibus itself is not properly installed"
        own = f"an adapter of your own names its scheme in the entry-point group {GROUP}"
        raise ConfigError(f"url: no adapter for {scheme}://; {hint}known here: {known}; {own}")
    if len(found) > 1:
        who = " and ".join(f"{entry.value} of {_distribution(entry)}" for entry in found)
        raise ConfigError(f"url: {scheme}:// is claimed by {who}; uninstall one of them")
    return found[0]


def _section(entry: EntryPoint) -> str:
    """`unibus_rabbitmq[.x]` -> rabbitmq; `unibus.memory` -> memory; a package by any other name -> that name."""
    package, _, module = entry.module.partition(".")
    if package == "unibus":
        return module.partition(".")[0]
    return package.removeprefix("unibus_")


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"


def _missing(entry: EntryPoint, error: ImportError) -> str:
    """Why an adapter can't be imported, and what to do."""
    ours = entry.dist is None or entry.dist.name == "unibus"
    name = error.name or ""
    own = entry.module.partition(".")[0]
    if name.partition(".")[0] in {own, "unibus"}:
        what = f"the adapter {own} is not complete ({error})"
        return f"{what}; reinstall {'unibus' if ours else _distribution(entry)}"
    if isinstance(error, ModuleNotFoundError):
        what = f"the adapter {own} needs the module {name!r}, which is not installed"
    else:  # there, but not what the adapter expects
        what = f"the adapter {own} can't use the installed module {name!r} ({error})"
    if ours:
        return f"{what}; pip install 'unibus[{_section(entry)}]'"
    return f"{what}; install what the distribution {_distribution(entry)} requires"
