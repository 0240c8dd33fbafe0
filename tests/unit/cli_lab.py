"""What the tests of the command line share: it runs in this process, on a memory broker that lasts as long as the test."""

import importlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

from typer.testing import CliRunner

from unibus.cli.app import make

URL = "memory://cli"

# One count for the whole process: an imported module outlives its test, so two tests must never share a name.
_numbers = itertools.count(1)

APP = """
    from pydantic import BaseModel
    from unibus import Bus, Discard, Queue, RetryPolicy, Topic

    class Order(BaseModel):
        id: str
        total: int = 1

    orders = Queue("orders", Order)
    names = Queue("names", str)
    charged = Topic("order.charged", str)
    opened = []

    def lifespan(bus):
        opened.append(bus)
        raise AssertionError("a tool enters no lifespan")

    bus = Bus(service="billing", channels=[names, Queue("plan", delayed=True, priorities=3)])
    NONE = RetryPolicy(max_retries=0)

    @bus.consumer(orders, retry=NONE)
    async def handle(order: Order) -> None:
        print("handled", order.id)
        if order.id == "last":
            bus.stop()
        elif order.total < 0:
            raise ValueError("negative total")
        elif order.total == 0:
            raise KeyError("sku")

    @bus.subscriber(charged)
    async def bill(event: str) -> None:
        print("billed", event)
"""


@dataclass
class Done:
    """How a command has ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        """Its JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


class Cli:
    """`cli("send", "orders", "{}")` runs a command on the memory broker; `app(source)` writes an application."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._app = make()

    def __call__(self, *arguments: str, text: str | None = None, url: str | None = URL) -> Done:
        where = [] if url is None else ["--url", url]
        result = CliRunner().invoke(self._app, [*arguments, *where], input=text, prog_name="unibus")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Done(result.exit_code, result.stdout, result.stderr)

    def ok(self, *arguments: str, text: str | None = None) -> Done:
        """The same, for what has to go well."""
        done = self(*arguments, text=text)
        assert done.code == 0, done
        return done

    def app(self, source: str = APP) -> str:
        name = f"shop{next(_numbers)}"
        (self.folder / f"{name}.py").write_text(dedent(source), encoding="utf-8")
        importlib.invalidate_caches()  # the folder may have been looked at within the same tick of its timestamp
        return f"{name}:bus"

    def toml(self, text: str) -> None:
        (self.folder / "unibus.toml").write_text(dedent(text), encoding="utf-8")
