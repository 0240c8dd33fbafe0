"""The snippets of the documents, and a page whose sections are played on the memory adapter, in virtual time."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from unibus import Bus, Message, Queue
from unibus.adapter import Outgoing
from unibus.testing import Lab, in_memory
from unibus_rabbitmq import wire as rabbitmq_wire
from unibus_rabbitmq.wire import Received

ROOT = Path(__file__).resolve().parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def sections(text: str) -> dict[str, str]:
    """Heading -> text below it; what stands before the first is ''."""
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def compiled(source: str, name: str) -> CodeType:
    """May await at the top."""
    code: CodeType = compile(source, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    return code


def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Without unibus.toml, and with a URL in memory."""
    monkeypatch.chdir(folder)
    for name in [name for name in os.environ if name.startswith("UNIBUS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("UNIBUS_URL", "memory://")


def captured(sender: str, broker: str) -> Any:
    """Messages that this library sent to a real server, as they came from it."""
    return json.loads((ROOT / "tests/unit/captured/foreign.json").read_text(encoding="utf-8"))[sender][broker]


def from_rabbitmq(frame: dict[str, str]) -> Message:
    """As the RabbitMQ adapter reads it."""
    received = Received(
        b"\x00\x3c\x00\x3c\x00" + bytes(11), bytes.fromhex(frame["header"])
    )  # basic.deliver without a name
    received.body = frame["body"].encode()
    return rabbitmq_wire.decode(received, inbox=False, fallback="none")


@dataclass
class Play:
    """A section that has been played. `names`: all that its snippets defined; `lab`: the running bus."""

    names: dict[str, Any]
    lab: Lab
    printed: Callable[[], list[str]]  # lines since the last call

    @property
    def bus(self) -> Bus:
        return self.lab.bus

    def __getattr__(self, name: str) -> Any:
        return self.names[name]

    def order(self, id: str, **more: Any) -> Any:
        return self.names["Order"](id=id, **more)

    async def send(self, *ids: str, **more: Any) -> None:
        """Orders to the queue of the page's prelude; until they are handled."""
        for id in ids:
            await self.bus.send(self.names["orders"], self.order(id, **more))
        await self.lab.idle()

    async def arrives(self, queue: Queue[Any], message: Message) -> None:
        """As a foreign producer puts it there, past all that `bus.send` looks at."""
        assert await self.bus.adapter.send([Outgoing(queue, message)], 5) == [None]


Check = Callable[[Play], Awaitable[None]]
Whole = Callable[[dict[str, Any]], Awaitable[None]]


class Page:
    """A page about moving: a prelude, then sections with old and new snippets, each with a check of what it promises."""

    def __init__(self, name: str) -> None:
        self.text = read(name)
        self.sections = sections(self.text)
        self.overview = self.sections.pop("")
        self.prelude = blocks(self.overview, "python")
        self.checks: dict[str, Check] = {}
        self.whole: dict[str, Whole] = {}  # those whose snippets open the bus themselves

    def check(self, title: str) -> Callable[[Check], Check]:
        """Of a section whose snippets are run while the bus is."""

        def register(function: Check) -> Check:
            self.checks[title] = function
            return function

        return register

    def on_its_own(self, title: str) -> Callable[[Whole], Whole]:
        def register(function: Whole) -> Whole:
            self.whole[title] = function
            return function

        return register

    def rows(self) -> list[tuple[str, str]]:
        """Anchor and title of each row of the table of names."""
        anchors = re.findall(r"^\| \[.*?\]\(#([a-z-]+)\) \|", self.overview, re.MULTILINE)
        by_anchor = {re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-"): title for title in self.sections}
        return [(anchor, by_anchor.get(anchor, "")) for anchor in anchors]

    def assert_complete(self, *, beside: set[str]) -> None:
        """Each row leads to a section with an old and a new snippet; each section is checked, and a row or in `beside`."""
        for anchor, title in self.rows():
            assert title, anchor
            assert "```python old\n" in self.sections[title], title
            assert "```python\n" in self.sections[title], title
        assert set(self.sections) - {title for _, title in self.rows()} == beside
        assert {*self.checks, *self.whole} == set(self.sections)

    async def play(self, title: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Run the section's new snippets, and check them. `folder` is the working directory."""
        text = self.sections[title]
        (folder / "unibus.toml").write_text("".join(blocks(text, "toml")), encoding="utf-8")
        names: dict[str, Any] = {"__name__": "snippets"}
        awaiting = []
        for number, source in enumerate([*self.prelude, *blocks(text, "python")]):
            code = compiled(source, f"{title} {number}")
            if code.co_flags & inspect.CO_COROUTINE:
                awaiting.append(code)
            else:
                exec(code, names)  # noqa: S102  # that is the test
        if title in self.whole:
            for code in awaiting:
                await eval(code, names)  # noqa: S307  # same
            await self.whole[title](names)
            return
        async with in_memory(names["bus"]) as lab:
            for code in awaiting:
                await eval(code, names)  # noqa: S307  # same
                await lab.idle()

            def printed() -> list[str]:
                return capsys.readouterr().out.splitlines()

            await self.checks[title](Play(names, lab, printed))
