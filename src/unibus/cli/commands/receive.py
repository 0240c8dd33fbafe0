"""`unibus peek` and `unibus receive`: messages as JSON lines, or as a table for people."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Annotated, Any

import typer

from unibus.bus import Bus
from unibus.channel import Group, Queue
from unibus.cli import output
from unibus.cli.lines import body_of, line
from unibus.cli.run import command
from unibus.cli.target import AppOption, ConfigOption, GroupOption, JsonOption, Target, UrlOption
from unibus.delivery import Delivery
from unibus.tooling import address_of
from unibus.tooling import peek as look
from unibus.tooling import receive as take

Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")]


def register(app: typer.Typer) -> None:
    app.command(name="peek")(command(peek))
    app.command(name="receive")(command(receive))


async def peek(
    channel: Annotated[str, typer.Argument()],
    group: GroupOption = None,
    limit: Limit = 10,
    app: AppOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at what waits in a queue, or in a group of a topic, and leave it there.

    Where a broker can't look, the messages are taken and given back, and it is said what that does to them.
    """
    async with Target(app, url, config).opened(channel, group=group) as bus:
        address, printer = address_of(bus, channel, group), Printer(as_json=as_json)
        browse = bus.capabilities.browse
        if browse.level == "emulated":
            output.say(f"{bus.capabilities.adapter} can't look: {browse.how}")
        async with aclosing(look(bus, address, limit)) as deliveries:
            async for delivery in deliveries:
                printer.add(delivery)
        printer.end(address)
        await _more(bus, address, printer.count, limit)


async def receive(
    channel: Annotated[str, typer.Argument()],
    group: GroupOption = None,
    limit: Limit = 1,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the next one.")] = 5.0,
    ack: Annotated[bool, typer.Option("--ack", help="Take them: each is gone once it is written.")] = False,
    app: AppOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Receive as a consumer does, competing with the others. Without --ack all go back in the end."""
    async with Target(app, url, config).opened(channel, group=group) as bus:
        address, printer = address_of(bus, channel, group), Printer(as_json=as_json, at_once=True)
        async with aclosing(take(bus, address, limit, wait, ack=ack)) as batches:
            async for batch in batches:
                for delivery in batch:
                    printer.add(delivery)
                output.flush()  # before they are acked
        printer.end(address)
        if printer.count and not ack:
            counted = ", and count as delivered once more" if bus.capabilities.release_counts else ""
            output.say(f"{output.plural(printer.count, 'message')} given back{counted}; --ack takes them")


class Printer:
    """JSON lines as they come, or a table in the end. `at_once`: what is taken must be seen before it is gone."""

    def __init__(self, *, as_json: bool, at_once: bool = False) -> None:
        self.count = 0
        self._as_json = as_json or output.piped()
        self._at_once = at_once
        self._rows: list[tuple[Any, ...]] = []

    def add(self, delivery: Delivery[Any]) -> None:
        self.count += 1
        message = delivery.message
        if self._as_json:
            output.write_json(line(delivery))
        elif self._at_once:
            headers = "".join(f" {name}={value}" for name, value in message.headers.items())
            print(f"{message.id} {message.key or '-'}{headers}\n  {output.short(body_of(message)[1], 2000)}")
        else:
            since = None if message.timestamp is None else time.time() - message.timestamp
            self._rows.append(
                (message.id, message.key, output.age(since), message.content_type, output.short(body_of(message)[1]))
            )

    def end(self, address: Queue[Any] | Group) -> None:
        if not self.count:
            output.say(f"{address}: nothing waits there")
        elif self._rows:
            output.table(("id", "key", ">age", "content type", "body"), self._rows)


async def _more(bus: Bus, address: Queue[Any] | Group, seen: int, limit: int) -> None:
    if seen < limit:
        return
    waiting = await bus.adapter.backlog(address)
    if waiting.ready > seen:
        output.say(f"{output.estimate(waiting)} in all; --limit shows more")
