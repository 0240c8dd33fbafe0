"""`unibus doctor`: what is in force, and what is wrong with it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Literal

import typer

from unibus.adapter import Inspected
from unibus.bus import Bus
from unibus.channel import Queue
from unibus.cli import output
from unibus.cli.commands.channels import backlogs
from unibus.cli.run import DENIED, FAILED, code_of, command
from unibus.cli.target import AppOption, ConfigOption, JsonOption, Target, UrlOption
from unibus.config import Setting, Settings
from unibus.config_sources import variable_of
from unibus.errors import ConfigError, PermissionDenied, UnibusError
from unibus.tooling import inspect, settings_of, stores_of

Level = Literal["ok", "note", "risk", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`risk`: messages may be lost. `error`: it does not work as it is; `code` is then the exit code."""

    level: Level
    text: str
    code: int = 0


def register(app: typer.Typer) -> None:
    app.command(name="doctor")(command(doctor))


async def doctor(
    app: AppOption = None, url: UrlOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Print the settings in force and where each comes from, reach the broker, and say what is missing or loses messages.

    Makes nothing, and takes no message: so whether this user may send and receive is not tried. Exits with 1 on an error, 3 when
    the broker can't be reached, 4 when it does not let us.
    """
    target = Target(app, url, config)
    settings = settings_of(target.bus)
    shown = [_shown(setting, target, app) for setting in settings.effective()]
    if not as_json:
        output.table(("setting", "value", "from"), [(s.key, s.value, s.source) for s in shown])
    findings = [*_of_names(target.bus, settings), *[finding async for finding in _of_broker(target, settings)]]
    if as_json:
        output.write_json(
            {"settings": [asdict(s) for s in shown], "findings": [{"level": f.level, "text": f.text} for f in findings]}
        )
    else:
        output.table(("", ""), [(finding.level, finding.text) for finding in findings])
    if code := max((finding.code for finding in findings), default=0):
        raise typer.Exit(code)


def _shown(setting: Setting, target: Target, app: str | None) -> Setting:
    """What the command line says reaches the bus as if it stood in the environment."""
    value, source = setting.value, setting.source
    for option, said, key in (("--app", app, ("app",)), ("--url", target.url, target.key("url"))):
        if said is not None:
            source = source.replace(f"environment {variable_of(key)}", option)
    return Setting(setting.key, f"{value:g}" if isinstance(value, float) else value, source)


def _of_names(bus: Bus, settings: Settings) -> Iterator[Finding]:
    """Tables of unibus.toml that no handler and no channel of the application knows: a name misspelt?"""
    if not bus.registrations and not bus.channels:
        return
    own = {r.channel if isinstance(r.channel, str) else r.channel.name for r in bus.registrations}
    own |= {channel.name for channel in bus.channels}
    for channel in settings.declared_channels():
        if channel.name in own:
            continue
        table = f"[{'queues' if isinstance(channel, Queue) else 'topics'}.{channel.name}]"
        near = get_close_matches(channel.name, own, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "fine if it is for others, or sent to by name"
        yield Finding("note", f"{table}: the application has no {channel}; {hint}")
    groups = {r.group or settings.service for r in bus.registrations if r.kind == "subscriber"}
    for group in settings.declared_groups():
        if group.name not in groups and (near := get_close_matches(group.name, groups, n=1, cutoff=0.8)):
            yield Finding("note", f"{group}: the application has no such group; did you mean {near[0]!r}?")


async def _of_broker(target: Target, settings: Settings) -> AsyncIterator[Finding]:
    begun = time.monotonic()
    try:
        async with target.opened() as bus:
            took = (time.monotonic() - begun) * 1000
            known = bus.capabilities
            server = " ".join(filter(None, (known.adapter, known.version)))
            yield Finding("ok", f"{settings.url} answers: {server}, connected in {took:.0f} ms")
            if blocked := (await bus.adapter.check()).blocked:
                yield Finding("error", f"it takes no messages: {blocked}", FAILED)
            for finding in [
                *_of_handlers(bus),
                *await _of_stores(bus, settings),
                *await _of_objects(bus, settings),
                *await _of_rights(bus),
            ]:
                yield finding
    except UnibusError as error:
        yield Finding("error", str(error), code_of(error))


def _of_handlers(bus: Bus) -> Iterator[Finding]:
    for station in bus._opened()._stations:
        if station.settings.guarantee == "at-most-once":
            yield Finding(
                "risk", f"{station.registration} of {station.address} is at-most-once: a crash loses what it runs"
            )


async def _of_stores(bus: Bus, settings: Settings) -> list[Finding]:
    findings = []
    for what, store in stores_of(bus):
        try:
            await store.verify()
        except ConfigError as error:
            if settings.declare == "create":
                findings.append(Finding("note", f"{what}: {error}; the start of the service makes it, too"))
            else:
                findings.append(Finding("error", f"{what}: {error}", FAILED))
        except UnibusError as error:
            findings.append(Finding("error", f"{what} can't run: {error}", FAILED))
        else:
            findings.append(Finding("ok", f"{what} is effectively once, by {store!r}"))
    return findings


async def _of_objects(bus: Bus, settings: Settings) -> list[Finding]:
    try:
        found = await inspect(bus)
    except PermissionDenied as error:
        return [Finding("error", f"may not look: {error}", DENIED)]
    findings = _of_missing([one for one in found if one.exists is False], settings)
    if not findings:
        findings = [Finding("ok", f"all {sum(bool(one.rights) for one in found)} objects that it needs are there")]
    risks: dict[str, list[str]] = {}
    for one in found:
        if one.risk:
            risks.setdefault(one.risk, []).append(one.name)
    for risk, names in risks.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        findings.append(Finding("risk", f"{', '.join(names[:3])}{more}: {risk}"))
    for one in found:
        if one.messages and one.name.endswith("unibus.lost"):
            findings.append(Finding("error", f"{one.name} has {one.messages} messages that found no way home", FAILED))
    return findings


def _of_missing(missing: Sequence[Inspected], settings: Settings) -> list[Finding]:
    if not missing:
        return []
    names = ", ".join(f"{one.kind} {one.name}" for one in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    text = f"missing on the broker: {names}{more}; `unibus declare` makes them"
    if settings.declare == "create":
        return [Finding("note", f"{text}, or the start of the service")]
    return [Finding("error", f"{text} (declare = {settings.declare})", FAILED)]


async def _of_rights(bus: Bus) -> list[Finding]:
    try:
        await backlogs(bus)
    except PermissionDenied as error:
        return [Finding("error", f"may not see how much waits: {error}", DENIED)]
    return []
