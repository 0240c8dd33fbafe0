"""What a service would find on another broker: what it uses of it, and how that broker has it. Nothing is made or sent.

The judge is the one of the start: `topology.needs`, and the adapter's own plan of what it would declare. So a plan and a bus
can't disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unibus.adapter import Endpoint, Profile
from unibus.bus import Bus
from unibus.capabilities import Capabilities, Support
from unibus.channel import Group, Queue, Topic
from unibus.clock import SystemClock
from unibus.config import Settings
from unibus.errors import ConfigError, Unsupported
from unibus.registry import profile_names, profile_of
from unibus.session import Session
from unibus.topology import Station, needs

Level = Literal["native", "emulated", "absent", "refused"]

# What no handler asks for, and every handler meets.
_EVERYWHERE = {
    "attempt": "attempts are counted over a crash",
    "delivery_count": "the broker counts deliveries, for the crash guard",
    "settle_confirmed": "an ack is confirmed",
    "atomic_move": "a retry or dead letter and its ack are one step",
    "release": "at the end of a process what it holds goes back, uncounted",
    "lease": "what a process holds is another's once it has died or hangs",
    "browse": "`peek` and `dlq list` look without taking",
}
_LIMITS = {
    "max_body": "bytes of a body",
    "max_header_bytes": "bytes of all headers",
    "max_headers": "headers",
    "max_key": "bytes of a key",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that the service uses. `absent`: the target has it not, and the service runs without it; `refused`: it does not start.

    `how`: how it is emulated and what that costs, or why it is refused. `limit`: of the feature, seconds, bytes or levels.
    """

    channel: str
    feature: str
    level: Level
    what: str
    how: str
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """`target`, `version`: the broker that was asked. The service starts there if no row is refused."""

    target: str
    version: str | None
    rows: tuple[Row, ...]

    @property
    def refused(self) -> list[Row]:
        return [row for row in self.rows if row.level == "refused"]


async def plan(bus: Bus, source: Settings | None = None) -> Plan:
    """Of a bus, closed, whose URL is the target's: a server is asked, `memory://?profile=` needs none.

    `source`: the settings where it is now. Raises ConfigError for what is wrong on any broker or with the target's own
    settings, and what the server says when it can't be reached.
    """
    session = bus._prepare()
    adapter = session.kit.link.adapter
    try:
        await adapter.connect()
        known = adapter.capabilities
    finally:
        await adapter.close()
    rows = [*_features(session, known), *_handlers(session, known), *_everywhere(known)]
    rows += [*_limits(known, source), *_settings(session, source)]
    if session.settings.broker in profile_names():
        refused = {row.channel for row in rows if row.level == "refused"}
        found = _objects(session, _profile(session.settings, known.version))
        rows += [row for row in found if row.channel not in refused]
    return Plan(known.adapter, known.version, tuple(rows))


def _profile(settings: Settings, version: str | None) -> Profile:
    number = (version or "").removesuffix("in memory").strip()
    given = Endpoint(settings.url, settings.service, "plan", SystemClock(), settings.prefix, settings.driver)
    return profile_of(f"{settings.broker}-{number}" if number else settings.broker, given)


def _features(session: Session, known: Capabilities) -> Iterator[Row]:
    quiet = {
        s.address
        for s in session._stations
        if s.registration.kind == "responder" and "retry" not in s.registration.options
    }
    for need in needs(session.channels, session._stations, known):
        channel, support = _label(need.address), need.support
        what = need.what.replace(str(need.address), channel)
        short = what.removeprefix(f"{channel} ")
        if need.problem is not None:
            how = str(need.problem).replace(str(need.address), channel).removeprefix(f"{what}: ")
            yield Row(channel, need.feature, "refused", short, how, support.limit)
        elif need.address not in quiet or need.what.startswith(channel):  # a responder answers an error at once
            yield _row(channel, need.feature, short, support)
        if need.feature == "reply" and need.problem is None:
            yield _row(channel, "inbox", "a reply to a process that has gone is an error", known.inbox)


def _label(address: Queue[Any] | Topic[Any] | Group) -> str:
    """A broadcast's group has another name in each process."""
    if isinstance(address, Group) and address.ephemeral:
        return f"broadcast of {address.topic}"
    return str(address)


def _row(channel: str, feature: str, what: str, support: Support) -> Row:
    """Of a feature that no start is refused for."""
    level: Level = "absent" if support.level == "refused" else support.level
    return Row(channel, feature, level, what, support.how, support.limit)


def _handlers(session: Session, known: Capabilities) -> Iterator[Row]:
    for station in session._stations:
        channel, registration = _label(station.address), station.registration
        if registration.broadcast:
            yield Row(
                channel, "broadcast", "native", "each process gets all", "a subscription that ends with its process"
            )
        else:
            yield _row(channel, "share", "its consumers take message by message", known.share)
        if registration.batch > known.receive_batch:
            how = f"a receive brings {known.receive_batch} at most: a batch is filled by several"
            yield Row(channel, "batch", "emulated", f"batches of {registration.batch}", how, known.receive_batch)
        elif registration.batch:
            yield Row(channel, "batch", "native", f"batches of {registration.batch}", "", known.receive_batch)
        if (row := _timeout(station, known)) is not None:
            yield row


def _timeout(station: Station, known: Capabilities) -> Row | None:
    """A handler that may run for longer than the broker lets a message be held."""
    most, limit = station.settings.timeout, known.park_limit
    if limit is None or (most is not None and most <= limit):
        return None
    what = "a handler may run for ever" if most is None else f"a handler may run for {most:g} s"
    how = f"a message is safely held for {limit:g} s" + (f": {known.lease.how}" if known.lease.how else "")
    return Row(_label(station.address), "timeout", "absent", what, how, limit)


def _everywhere(known: Capabilities) -> Iterator[Row]:
    for feature, what in _EVERYWHERE.items():
        yield _row("all", feature, what, getattr(known, feature))


def _limits(known: Capabilities, source: Settings | None) -> Iterator[Row]:
    before = None
    if source is not None and source.broker in profile_names():
        before = _profile(source, None).capabilities
    for name, what in _LIMITS.items():
        limit = getattr(known, name)
        if limit is None:
            continue
        how = "more is MessageTooLarge before anything is sent"
        if before is not None and (getattr(before, name) or float("inf")) > limit:
            how += f"; less than on {before.adapter} ({getattr(before, name) or 'no limit'})"
        yield Row("all", name, "native", what, how, limit)


def _settings(session: Session, source: Settings | None) -> Iterator[Row]:
    """What the file or the code says to the driver in use now, and the other one does not read."""
    if source is None or source.broker == session.settings.broker:
        return
    of: dict[str, Mapping[str, object]] = {f"[{source.broker}]": source.driver}
    for declared in session.topology.channels:
        if declared.role == "channel":
            of[str(declared.address)] = source.options(declared.address)
    for where, table in of.items():
        if table:
            yield Row(
                where,
                "settings",
                "absent",
                ", ".join(table),
                f"read on {source.broker} only; see the settings of the target",
            )


def _objects(session: Session, profile: Profile) -> Iterator[Row]:
    """Names and options, as the driver checks them before it makes anything."""
    try:
        profile.plan(session.topology)
    except (ConfigError, Unsupported) as error:
        yield Row(_named(session, str(error)), "names and options", "refused", "what it would declare", str(error))


def _named(session: Session, text: str) -> str:
    """The channel that an error begins with."""
    addresses: list[Queue[Any] | Topic[Any] | Group] = [declared.address for declared in session.topology.channels]
    return next((str(address) for address in addresses if text.startswith(f"{address}")), "all")
