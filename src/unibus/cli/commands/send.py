"""`unibus send` and `unibus publish`: one message of the command line, or JSON lines of stdin."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any

import typer

from unibus.bus import Bus
from unibus.channel import Queue, Topic
from unibus.cli import output
from unibus.cli.lines import message_of, read
from unibus.cli.run import Failure, command, complain
from unibus.cli.target import AppOption, ConfigOption, JsonOption, Target, UrlOption
from unibus.errors import CodecError, ConfigError, SendFailed, UnibusError
from unibus.message import Message
from unibus.telemetry import UNROUTED

_AT_ONCE = 500  # lines that are under way together

Body = Annotated[
    str | None, typer.Argument(help="JSON, or text where the queue takes text. Without it: JSON lines of stdin.")
]
Key = Annotated[str | None, typer.Option("--key", "-k", help="Messages of one key keep their order.")]
Headers = Annotated[list[str] | None, typer.Option("--header", "-H", metavar="NAME=VALUE", help="May be repeated.")]
Delay = Annotated[float | None, typer.Option(min=0, help="Seconds to wait before it is delivered.")]
Expires = Annotated[float | None, typer.Option(min=0, help="Seconds after which nobody wants it any more.")]
Priority = Annotated[int | None, typer.Option(min=0, help="Higher first.")]
Text = Annotated[bool, typer.Option("--text", help="BODY is text, not JSON.")]
Bodies = Annotated[bool, typer.Option("--bodies", help="Each line of stdin is a body, not a whole message.")]


def register(app: typer.Typer) -> None:
    app.command(name="send")(command(send))
    app.command(name="publish")(command(publish))


async def send(
    queue: Annotated[str, typer.Argument()],
    body: Body = None,
    key: Key = None,
    header: Headers = None,
    delay: Delay = None,
    expires_in: Expires = None,
    priority: Priority = None,
    text: Text = False,
    bodies: Bodies = False,
    app: AppOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send to a queue: BODY, or each line of stdin, {"body": …, "key": …, "headers": {…}}, as `peek` and `receive` write them.

    Returns once the broker has confirmed. A body is checked by the queue's type, where an application says it.
    """
    options = _options(key, header, delay, expires_in, priority)
    async with Target(app, url, config).opened(queue, kind="queue") as bus:
        await _Sending(bus, queue, Queue).run(body, options, text=text, bodies=bodies, as_json=as_json)


async def publish(
    topic: Annotated[str, typer.Argument()],
    body: Body = None,
    key: Key = None,
    header: Headers = None,
    delay: Delay = None,
    expires_in: Expires = None,
    priority: Priority = None,
    text: Text = False,
    bodies: Bodies = False,
    app: AppOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish to every group of a topic; as `send` otherwise. Says so when there is no group to get it."""
    options = _options(key, header, delay, expires_in, priority)
    async with Target(app, url, config).opened(topic, kind="topic") as bus:
        await _Sending(bus, topic, Topic).run(body, options, text=text, bodies=bodies, as_json=as_json)


def _options(
    key: str | None, headers: list[str] | None, delay: float | None, expires_in: float | None, priority: int | None
) -> dict[str, Any]:
    """What the command line says of every message."""
    found: dict[str, Any] = {"key": key, "delay": delay, "priority": priority}
    if expires_in is not None:
        found["expires_at"] = time.time() + expires_in
    if headers:
        pairs = [header.partition("=") for header in headers]
        if wrong := [name for name, equals, _ in pairs if not equals]:
            raise ConfigError(f"--header {wrong[0]}: write NAME=VALUE")
        found["headers"] = {name: value for name, _, value in pairs}
    return {name: value for name, value in found.items() if value is not None}


class _Sending:
    def __init__(self, bus: Bus, name: str, kind: type[Queue[Any] | Topic[Any]]) -> None:
        self.bus = bus
        self.channel = bus._opened().channels.find(name)
        if not isinstance(self.channel, kind):
            verb = "publish" if isinstance(self.channel, Topic) else "send"
            raise ConfigError(f"{self.channel}: use `unibus {verb}`")
        self._failed = self._sent = 0

    async def run(self, body: str | None, options: dict[str, Any], *, text: bool, bodies: bool, as_json: bool) -> None:
        as_json = as_json or output.piped()
        if body is not None:
            if text:
                message = message_of({"text": body}, self.channel)
            elif self.channel.body is str:
                message = message_of({"body": body}, self.channel)
            else:
                message = self._read(body, bare=True)
            await self._send({0: _with(message, options)}, "", as_json=as_json)
        else:
            if sys.stdin.isatty():
                output.say("JSON lines, one message each; Ctrl-D ends")
            with output.progress(f"to {self.channel}") as advance:
                numbered = enumerate(sys.stdin, 1)
                while chunk := list(islice(numbered, _AT_ONCE)):
                    await self._send(dict(self._messages(chunk, options, bare=bodies)), "line {}: ", as_json=as_json)
                    advance(len(chunk))
        if (nobody := self.bus.counts.get(UNROUTED, 0)) and not self._failed:
            complain(f"{self.channel} has no group: {output.plural(nobody, 'message')} went to nobody")
        if self._failed:
            raise Failure(f"{output.plural(self._sent, 'message')} sent, {self._failed} not")
        if not as_json:
            output.say(f"{output.plural(self._sent, 'message')} sent to {self.channel}")

    def _read(self, text: str, *, bare: bool) -> Message:
        try:
            return read(text, self.channel, bare=bare)
        except CodecError as error:
            hint = "; for text say --text" if "is not JSON" in str(error) else ""
            raise CodecError(f"the body {error}{hint}" if hint else str(error)) from None

    def _messages(
        self, chunk: list[tuple[int, str]], options: dict[str, Any], *, bare: bool
    ) -> Iterator[tuple[int, Message]]:
        for number, text in chunk:
            if not text.strip():
                continue
            try:
                yield number, _with(read(text, self.channel, bare=bare), options)
            except CodecError as error:
                self._failed += 1
                complain(f"line {number}: {error}")

    async def _send(self, messages: dict[int, Message], where: str, *, as_json: bool) -> None:
        failed: dict[int, UnibusError] = {}
        many = self.bus.publish_many if isinstance(self.channel, Topic) else self.bus.send_many
        try:
            ids = await many(self.channel, messages.values())  # type: ignore[arg-type]  # of its own kind
        except SendFailed as error:
            numbers = list(messages)
            ids = list(error.sent.values())
            failed = {numbers[n]: problem for n, problem in error.failed.items()}
            if not where:
                raise next(iter(failed.values())) from None
        for number, problem in failed.items():
            complain(f"{where.format(number)}{problem}")
        self._sent += len(ids)
        self._failed += len(failed)
        if as_json:
            for message_id in ids:
                output.write_json({"id": message_id})
            output.flush()


def _with(message: Message, options: dict[str, Any]) -> Message:
    """What the command line says stands above what the line says."""
    for name, value in options.items():
        setattr(message, name, {**message.headers, **value} if name == "headers" else value)
    return message
