"""What the documents say is true: their snippets run, the names and files that they mention exist, the rules hold."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.metadata import distribution
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import typer
from tests.unit.snippets import ROOT, blocks, compiled, in_an_empty_folder, read, sections

import unibus
from unibus import Bus, Queue, Topic, registry
from unibus.config import load

SRC = ROOT / "src" / "unibus"
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DEADLINE = 60.0


GUIDE = sections(read("docs/guide.md"))
PRELUDE = blocks(GUIDE.pop(""), "python")


# README


def test_the_example_of_the_readme_runs_and_stops(tmp_path: Path) -> None:
    [example] = blocks(read("README.md"), "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 14
    (tmp_path / "hello.py").write_text(example, encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("UNIBUS_")}
    child = subprocess.Popen(  # our own
        [sys.executable, "-u", "hello.py"], cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    watchdog = threading.Timer(DEADLINE, child.kill)  # reading a line has no timeout
    watchdog.start()
    try:
        assert child.stdout.readline() == "Hello, world!\n"
        child.send_signal(signal.SIGINT)
        assert child.wait() == 0
    finally:
        watchdog.cancel()
        child.kill()
        child.wait()
        child.stdout.close()


def test_the_broker_table_says_which_urls_work() -> None:
    ours = distribution("unibus").entry_points.select(group=registry.GROUP)
    rows = [line for line in read("README.md").splitlines() if line.startswith("|") and "://" in line]
    working = {scheme for row in rows for scheme in re.findall(r"`([\w+]+)://`", row)}
    assert working == {entry.name for entry in ours}


def test_the_commands_of_the_readme_are_targets() -> None:
    makefile = read("Makefile")
    for target in set(re.findall(r"(?:`|^)make ([a-z-]+)", read("README.md"), re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


# The guide


class Section:
    """One section of the guide: definitions first, then what awaits, on the open bus."""

    def __init__(self, title: str) -> None:
        self.names: dict[str, Any] = {"__name__": "guide"}
        awaiting: list[CodeType] = []
        whole: list[CodeType] = []  # opens the bus itself
        for number, source in enumerate([*PRELUDE, *blocks(GUIDE[title], "python")]):
            code = compiled(source, f"{title} {number}")
            if source.startswith("async with bus:"):
                whole.append(code)
            elif code.co_flags & inspect.CO_COROUTINE:
                awaiting.append(code)
            else:
                exec(code, self.names)  # noqa: S102  # that is the test
        self._awaiting = awaiting
        self.bus: Bus = self.names["bus"]
        for code in whole:
            asyncio.run(eval(code, self.names))  # noqa: S307  # same
        if awaiting:
            asyncio.run(self._run())

    async def _run(self) -> None:
        async with self.bus.running():
            for code in self._awaiting:
                await eval(code, self.names)  # noqa: S307  # same
                await self._calm()

    async def _calm(self) -> None:
        """Until the handlers have nothing to do now."""
        session = self.bus._opened()
        calm, deadline = 0, asyncio.get_running_loop().time() + DEADLINE
        while calm < 10:
            assert asyncio.get_running_loop().time() < deadline, "the handlers find no end"
            ready = [(await session.kit.link.adapter.backlog(intake.address)).ready for intake in session.intakes]
            calm = 0 if session.busy() or any(ready) else calm + 1
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_an_empty_folder(monkeypatch, tmp_path)


# What has to be printed in a section.
PRINTED = {
    "Settings": ["url memory:// environment UNIBUS_URL"],
    "Handle": ["north o-1 1", "audited"],
    "Retries and dead letters": ["o-1 non_retryable negative total", "o-2 non_retryable no such card"],
    "Topics and groups": ["bill o-1", "ship o-1", "each process drops o-1"],
    "Receive by hand": ["o-1"],
    "Other formats and other programs": ["line o-1 7"],
}


@pytest.mark.parametrize("title", [title for title in GUIDE if title != "Test"])
def test_the_snippets_of_the_guide_run(title: str, capsys: pytest.CaptureFixture[str]) -> None:
    section = Section(title)
    if check := CHECKS.get(title):
        check(section)
    printed = capsys.readouterr().out
    for line in PRINTED.get(title, []):
        assert line.split(" ")[0] in printed, printed
        assert line in printed, printed


def _all_ways_to_open(section: Section) -> None:
    async def stop_soon() -> None:
        running = asyncio.create_task(section.names["as_a_service"]())
        deadline = asyncio.get_running_loop().time() + DEADLINE
        while (await section.bus.health()).status != "ok":
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.001)
        section.bus.stop()
        await running

    async def with_resources() -> None:
        service = section.names["service"]
        async with service:
            assert service.state == {"database": "open"}

    for way in (
        section.names["in_a_web_process"],
        section.names["inside_another_framework"],
        stop_soon,
        with_resources,
    ):
        asyncio.run(way())


def _handled(section: Section) -> None:
    """Those handlers that no snippet sends to."""

    async def publish() -> None:
        async with section.bus.running():
            await section.bus.publish("order.charged", section.names["OrderCharged"](id="o-9"))
            price = await section.bus.request("quotes", section.names["Ask"](sku="cup", quantity=2), timeout=5)
            assert price == section.names["Price"](total=200)
            await section._calm()

    asyncio.run(publish())


def _redriven(section: Section) -> None:
    assert section.names["n"] == 1


def _charged_once(section: Section) -> None:
    with closing(sqlite3.connect("shop.db")) as database:
        assert database.execute("SELECT id FROM charges").fetchall() == [("o-1",)]
        assert database.execute("SELECT place, message_id, token FROM unibus_handled").fetchall() == [
            ("orders", "m-1", None)
        ]


def _from_a_thread(section: Section) -> None:
    """Also while the bus is open, as in a handler that is a plain function."""

    async def run() -> None:
        async with section.bus:
            await asyncio.to_thread(section.names["import_orders"])
            assert (await section.bus.backlog("orders")).ready == 2

    asyncio.run(run())


CHECKS: dict[str, Callable[[Section], None]] = {
    "Open and run": _all_ways_to_open,
    "Handle": _handled,
    "Retries and dead letters": _redriven,
    "Effectively once": _charged_once,
    "Code without asyncio": _from_a_thread,
}


def test_the_test_of_the_guide_passes() -> None:
    section = Section("Test")
    asyncio.run(section.names["test_a_closed_bank_is_asked_again"]())


def test_the_settings_of_the_guide_are_accepted(tmp_path: Path) -> None:
    [toml] = blocks(GUIDE["Settings"], "toml")
    file = tmp_path / "example.toml"
    file.write_text(toml, encoding="utf-8")
    queue = Queue[bytes]("orders")
    channels: list[Queue[bytes] | Topic[bytes]] = [queue, Topic("order.charged")]
    settings = load({}, channels=channels, environ={"UNIBUS_QUEUES__ORDERS__CONCURRENCY": "65"}, file=file)
    assert settings.declare == "verify"
    of_orders = settings.consumer(queue, {})
    assert (of_orders.concurrency, of_orders.retry.max_retries) == (65, 8)
    # What it calls built-in values is what holds without a file.
    plain = load({"url": "memory://"}, environ={}, file=False).consumer(Queue[bytes]("any"), {})
    defaults = load({}, channels=channels, environ={}, file=file).consumer(Queue[bytes]("any"), {})
    assert plain == defaults


def test_the_waits_of_the_guide() -> None:
    from unibus import RetryPolicy

    assert RetryPolicy().waits() == (1, 4, 16, 64, 256)
    assert RetryPolicy(max_retries=3, backoff=1, multiplier=5).waits() == (1, 5, 25)


# What is named, is there


def _defined() -> Iterator[str]:
    """All functions, classes and methods of the core: `name` and `Class.name`, also by module."""
    for path in SRC.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield f"{path.stem}.{node.name}"
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                        yield f"{node.name}.{inner.name}"


def test_the_functions_that_the_architecture_names_exist() -> None:
    text = read("docs/architecture.md")
    defined = set(_defined())
    named = {name for name in re.findall(r"`(_?[A-Za-z]+\.[a-z_]+)`", text) if not name.endswith((".py", ".toml"))}
    assert len(named) > 25
    assert named - defined - {"unibus.adapter", "unibus.errors", "unibus.adapters", "unibus.profiles"} == set()


def test_the_modules_of_the_core_are_all_in_the_architecture() -> None:
    table = sections(read("docs/architecture.md"))["The rooms"]
    named = set(re.findall(r"`([a-z_]+\*?)`", table))
    for path in SRC.glob("*.py"):
        if not path.stem.startswith("__"):
            assert {path.stem, f"{path.stem.partition('_')[0]}_*"} & named, path.stem


def test_the_files_of_an_adapter_are_those_that_the_architecture_lists() -> None:
    rows = re.findall(r"^\| `(\w+\.py)`", read("docs/architecture.md"), re.MULTILINE)
    there = {path.name for path in (ROOT / "adapters/unibus_rabbitmq").glob("*.py")}
    assert {*rows, "__init__.py"} == there


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_files_and_links_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target
    for target in re.findall(r"`((?:src|adapters|contracts|tests|examples|docs)/[\w/.]+)`", text):
        assert (ROOT / target).exists(), target


def test_the_names_of_the_guide_are_public() -> None:
    for source in [block for text in GUIDE.values() for block in blocks(text, "python")]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module == "unibus":
                assert {alias.name for alias in node.names} <= {*unibus.__all__, "deadletter"}


# Who may import whom


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_the_core_imports_no_adapter_and_no_client() -> None:
    allowed = {"unibus", "pydantic", "pydantic_core", "pydantic_settings", *sys.stdlib_module_names}
    clients = {
        "redis.py": {"redis"},
        "sql.py": {"sqlalchemy"},
    }  # of stores that nobody imports who does not ask for them
    for path in (*SRC.glob("*.py"), *SRC.glob("stores/*.py")):
        more = clients.get(path.name, set()) if path.parent.name == "stores" else set()
        assert {name.partition(".")[0] for name in _imports(path)} <= allowed | more, path.name
        assert not _imports(path) & {"unibus.stores.redis", "unibus.stores.sql"}, path.name


def test_an_adapter_imports_nothing_that_drives_it() -> None:
    above = "blocking bus consumer intake publisher receiver registrations reply session settler supervisor testing topology"
    for folder in (*(ROOT / "adapters").iterdir(), ROOT / "examples/adapter_sqlite/unibus_sqlite"):
        for path in folder.glob("*.py"):
            imported = _imports(path)
            assert not imported & {f"unibus.{name}" for name in above.split()}, path
            ours = {name.partition(".")[0] for name in imported if name.startswith("unibus_")}
            assert ours <= {folder.name}, path


def test_the_service_of_the_demo_imports_nothing_of_a_broker() -> None:
    for path in (ROOT / "examples/orders").rglob("*.py"):
        outside = {name.partition(".")[0] for name in _imports(path)} - sys.stdlib_module_names
        assert outside <= {"unibus", "pydantic", "examples", "rich"}, path  # rich: the table of `everywhere`


def test_no_two_files_of_tests_have_one_name() -> None:
    """Or `pytest tests` collects neither."""
    names = [path.name for folder in ("tests", "examples") for path in (ROOT / folder).rglob("test_*.py")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("page", ["docs/from-faststream.md", "docs/from-celery.md"])
def test_the_command_lines_of_the_pages_for_those_who_move_exist(page: str) -> None:
    from unibus.cli.app import make

    commands: Any = typer.main.get_command(make())
    lines = re.findall(r"`unibus ([a-z]+)((?: [^`]*)?)`", read(page))
    assert len(lines) > 1
    for name, rest in lines:
        command = commands.commands[name]
        assert set(re.findall(r"--[a-z]+", rest)) <= {option for p in command.params for option in p.opts}, name
