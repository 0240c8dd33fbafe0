"""`unibus dlq`: look at dead letters, send them back, delete them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Annotated, Any

import typer

from unibus import deadletter
from unibus import message as names
from unibus.bus import Bus
from unibus.channel import Group
from unibus.cli import output
from unibus.cli.commands.channels import backlogs
from unibus.cli.filters import DigestOption, ErrorOption, IdOption, SinceOption, UntilOption, choose
from unibus.cli.lines import body_of, line
from unibus.cli.run import Failure, command
from unibus.cli.target import AppOption, ConfigOption, GroupOption, JsonOption, Target, UrlOption
from unibus.delivery import Delivery
from unibus.errors import ConfigError
from unibus.tooling import address_of

Channel = Annotated[str, typer.Argument(help="The queue, or the topic with --group.")]
Invalid = Annotated[bool, typer.Option("--invalid", help="Messages that could not be decoded, instead.")]
Limit = Annotated[int | None, typer.Option("--limit", "-n", min=1, help="At most so many.")]
Rate = Annotated[float | None, typer.Option(min=0.001, help="At most so many a second.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only count them.")]
Where = Callable[[Delivery[Any]], bool]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Dead letters: list, show, redrive, purge.", no_args_is_help=True)
    for function, name in ((list_, "list"), (show, "show"), (redrive, "redrive"), (purge, "purge")):
        group.command(name=name)(command(function))
    app.add_typer(group, name="dlq")


async def list_(
    channel: Annotated[str | None, typer.Argument(help="Without it: how many there are, everywhere.")] = None,
    group: GroupOption = None,
    invalid: Invalid = False,
    error: ErrorOption = None,
    digest: DigestOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    message_id: IdOption = None,
    limit: Limit = None,
    app: AppOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Dead letters, oldest first, and why they are: a table, or JSON lines with all there is about each."""
    where = choose(error, digest, since, until, message_id)
    async with Target(app, url, config).opened(channel, group=group) as bus:
        as_json = as_json or output.piped()
        if channel is None:
            await _overview(bus, as_json=as_json)
            return
        rows = []
        async with aclosing(_letters(bus, channel, group, where, limit, invalid=invalid)) as letters:
            async for letter in letters:
                if as_json:
                    output.write_json(line(letter))
                else:
                    rows.append(_row(letter))
        if rows:
            output.table(("id", "key", "dead since", "tries", "reason", "error", "digest", "text"), rows)
        if not as_json:
            output.say(f"{output.plural(len(rows), 'message')}")


async def show(
    channel: Channel,
    message_id: Annotated[str, typer.Argument(metavar="ID")],
    group: GroupOption = None,
    invalid: Invalid = False,
    app: AppOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """All there is about one dead letter: envelope, headers, why it is dead, and its body."""
    where = choose(None, None, None, None, [message_id])
    async with (
        Target(app, url, config).opened(channel, group=group) as bus,
        aclosing(_letters(bus, channel, group, where, 1, invalid=invalid)) as letters,
    ):
        async for letter in letters:
            if as_json or output.piped():
                output.write_json(line(letter))
            else:
                _show(letter)
            return
    raise Failure(f"no dead letter of {channel} has the id {message_id}")


async def redrive(
    channel: Channel,
    group: GroupOption = None,
    invalid: Invalid = False,
    error: ErrorOption = None,
    digest: DigestOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    message_id: IdOption = None,
    limit: Limit = None,
    rate: Rate = None,
    dry_run: DryRun = False,
    app: AppOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send dead letters back to the queue or group where they failed, with all counts at zero.

    Each leaves the dead letters once its copy is confirmed, so it is safe to interrupt this, and to run it again.
    """
    where = choose(error, digest, since, until, message_id)
    async with Target(app, url, config).opened(channel, group=group) as bus:
        work = _Work(bus, channel, group, where, limit, rate, invalid=invalid)
        await work.run(deadletter.redrive, "redriven", dry_run=dry_run, as_json=as_json)


async def purge(
    channel: Channel,
    group: GroupOption = None,
    invalid: Invalid = False,
    error: ErrorOption = None,
    digest: DigestOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    message_id: IdOption = None,
    limit: Limit = None,
    rate: Rate = None,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    app: AppOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete dead letters for good. Asks first."""
    where = choose(error, digest, since, until, message_id)
    async with Target(app, url, config).opened(channel, group=group) as bus:
        work = _Work(bus, channel, group, where, limit, rate, invalid=invalid)
        if not dry_run and not yes:
            await work.ask()
        await work.run(deadletter.purge, "deleted", dry_run=dry_run, as_json=as_json)


def answerable() -> bool:
    return sys.stdin.isatty()


class _Work:
    """A redrive or a purge."""

    def __init__(
        self,
        bus: Bus,
        channel: str,
        group: str | None,
        where: Where | None,
        limit: int | None,
        rate: float | None,
        *,
        invalid: bool,
    ) -> None:
        self._bus, self._channel, self._limit, self._rate, self._where = bus, channel, limit, rate, where
        self._group, self._invalid = _group_of(bus, channel, group), invalid

    async def ask(self) -> None:
        count = await self._count()
        if not count:
            return
        if not answerable():
            raise ConfigError("purge asks before it deletes, and nobody is there to answer: say --yes")
        question = f"Delete {output.plural(count, 'dead letter')} of {self._channel} for good?"
        if not await asyncio.to_thread(typer.confirm, question, err=True):
            raise Failure("nothing was deleted")

    async def _count(self) -> int:
        n = 0
        letters = _letters(self._bus, self._channel, self._group, self._where, self._limit, invalid=self._invalid)
        async with aclosing(letters):
            async for _ in letters:
                n += 1
        return n

    async def run(self, act: Callable[..., Awaitable[int]], done: str, *, dry_run: bool, as_json: bool) -> None:
        if dry_run:
            n = await self._count()
        else:
            n = await self._act(act, done)
        if as_json:
            output.write_json({"dry_run": dry_run, done: n})
        else:
            output.say(f"{output.plural(n, 'message')} {'would be ' if dry_run else ''}{done}")

    async def _act(self, act: Callable[..., Awaitable[int]], done: str) -> int:
        before = self._bus.counts.get(self._event(done), 0)
        with output.progress(done, self._limit) as advance:

            def chosen(delivery: Delivery[Any]) -> bool:
                hit = self._where is None or self._where(delivery)
                advance(int(hit))
                return hit

            try:
                return await act(
                    self._bus,
                    self._channel,
                    group=self._group,
                    invalid=self._invalid,
                    where=chosen if self._where is not None else None,
                    limit=self._limit,
                    rate=self._rate,
                )
            except BaseException:
                n = self._bus.counts.get(self._event(done), 0) - before
                output.say(f"{output.plural(n, 'message')} {done} so far; run it again for the rest")
                raise

    @staticmethod
    def _event(done: str) -> str:
        return "purged" if done == "deleted" else done


def _group_of(bus: Bus, channel: str, group: str | None) -> str | None:
    address = address_of(bus, channel, group)
    return address.name if isinstance(address, Group) else None


async def _letters(
    bus: Bus, channel: str, group: str | None, where: Where | None, limit: int | None, *, invalid: bool
) -> AsyncGenerator[Delivery[Any], None]:
    found = deadletter.browse(bus, channel, group=_group_of(bus, channel, group), invalid=invalid)
    left = limit
    async with aclosing(found):
        async for letter in found:
            if where is not None and not where(letter):
                continue
            yield letter
            if left is not None and (left := left - 1) <= 0:
                return


async def _overview(bus: Bus, *, as_json: bool) -> None:
    rows = [row for row in await backlogs(bus) if row.backlog is not None]
    found = [row for row in rows if any(kind is not None and kind.ready for kind in (row.dead, row.invalid))]
    if as_json:
        for row in found:
            values = row.as_dict()
            output.write_json({name: values[name] for name in ("channel", "group", "dead_letters", "invalid")})
        return
    if found:
        cells = [(row.address, output.estimate(row.dead), output.estimate(row.invalid)) for row in found]
        output.table(("of", ">dead letters", ">invalid"), cells)
    else:
        output.say("no dead letters")


def _row(letter: Delivery[Any]) -> tuple[Any, ...]:
    message, headers = letter.message, letter.message.headers
    return (
        message.id,
        message.key,
        headers.get(names.MOVED_TO_DLQ_AT, "").partition(".")[0],
        headers.get(names.RETRY_COUNT),
        headers.get(names.DLQ_REASON),
        headers.get(names.ERROR_TYPE, "").rpartition(".")[2],
        headers.get(names.ERROR_STACK_DIGEST, "")[:8],
        output.short(headers.get(names.ORIGINAL_ERROR, "")),
    )


def _show(letter: Delivery[Any]) -> None:
    found = line(letter)
    found.pop(name := body_of(letter.message)[0])
    rows: list[tuple[str, Any]] = []
    for field, value in found.items():
        rows += [*value.items()] if isinstance(value, dict) else [(field, value)]
    output.table(("field", "value"), rows)
    output.show(name, body_of(letter.message)[1])
