"""The contract suite on adapters that can't even be begun with: one clear line, and a report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import pytest

from unibus import registry
from unibus_contracts.plugin import _Recorder

pytest_plugins = ["pytester"]

ADAPTER = """
    from dataclasses import replace
    from unibus.adapter import Url
    from unibus.memory import MemoryAdapter

    class RaisesInConnect(MemoryAdapter):
        async def connect(self):
            raise RuntimeError("the plug is pulled")

    class WrongType(MemoryAdapter):
        @property
        def capabilities(self):
            return replace(super().capabilities, adapter="wrong", priority=True)

    class WrongLevel(WrongType):
        @property
        def capabilities(self):
            known = MemoryAdapter.capabilities.fget(self)
            return replace(known, adapter="wrong", priority=replace(known.order, level="sometimes"))

    class WrongNumber(MemoryAdapter):
        @property
        def capabilities(self):
            return replace(super().capabilities, adapter="wrong", max_body="10 MB")

    class NoCapabilities(MemoryAdapter):
        capabilities = {"order": True}

    class NoneLater(MemoryAdapter):
        links = None

        @property
        def capabilities(self):
            return super().capabilities if self.links is None else None

        async def connect(self):
            self.links = 1
            await super().connect()
"""
UNREADABLE = "class Adapter(:"
INI = "[pytest]\nasyncio_default_fixture_loop_scope = function\n"
ENTRY_POINTS = "[unibus.adapters]\n{}"
SCHEMES = {
    "raises": "bad_adapters:RaisesInConnect",
    "type": "bad_adapters:WrongType",
    "level": "bad_adapters:WrongLevel",
    "number": "bad_adapters:WrongNumber",
    "dict": "bad_adapters:NoCapabilities",
    "none": "bad_adapters:NoneLater",
    "empty": "bad_adapters:Nothing",
    "unreadable": "unreadable_adapters:Adapter",
}
CONTRACTS = """
    from unibus_contracts.contract import contract

    @contract("a.one", "It needs nothing.")
    async def test_one(kit):
        pass

    @contract("a.two", "It asks.", needs="priority")
    async def test_two(kit):
        pass
"""


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("raises", "the broker can't be reached: RuntimeError: the plug is pulled"),
        ("type", "wrong declares priority=True: use native(), emulated(how) or refused(why)"),
        ("level", "wrong declares priority=Support(level='sometimes'"),
        ("number", "wrong declares max_body='10 MB': it is int | None"),
        ("dict", "capabilities are dict, no Capabilities"),
        ("none", "capabilities are NoneType, no Capabilities"),
        ("empty", "does not exist"),
        ("unknown", "no adapter for unknown://"),
        ("unreadable", "unreadable_adapters of bad can't be imported: SyntaxError: "),
    ],
)
def test_an_adapter_that_is_none(
    scheme: str, said: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(pytester)
    monkeypatch.syspath_prepend(str(pytester.path))
    result = pytester.runpytest_inprocess(
        "-p", "no:cacheprovider", f"--unibus-url={scheme}://somewhere", "--unibus-report=report.json"
    )
    assert result.ret == pytest.ExitCode.INTERRUPTED
    written: dict[str, Any] = json.loads(Path("report.json").read_text())
    assert [entry["outcome"] for entry in written["contracts"]] == ["failed", "not-run"]
    assert said in written["contracts"][0]["error"], written["contracts"]
    assert said in written["broken_off"]
    assert not written["finished"]
    assert "async def " not in result.stdout.str()  # pytest's own way to show a traceback
    result.stdout.fnmatch_lines(["*0 passed, 0 refused as declared, 1 failed, 1 not run", "*the run was broken off: *"])


@pytest.mark.parametrize("prefix", ["a b!", "ä", "x" * 47])
def test_a_prefix_that_is_none(prefix: str, pytester: pytest.Pytester) -> None:
    pytester.makeini(INI)
    result = pytester.runpytest_inprocess("--unibus-url=memory://", "--unibus-prefix", prefix)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--unibus-prefix {prefix!r}: use letters, digits, *46 of them at most"])


@pytest.fixture(autouse=True)
def _looked_up_anew() -> Iterator[None]:
    for cache in (registry._entries, registry.adapter_factory):
        cache.cache_clear()
    yield
    for cache in (registry._entries, registry.adapter_factory):
        cache.cache_clear()


def installed(pytester: pytest.Pytester) -> None:
    """A distribution with these adapters, in the folder of the test."""
    pytester.makepyfile(bad_adapters=ADAPTER, test_them=CONTRACTS, unreadable_adapters=UNREADABLE)
    pytester.makeini(INI)
    folder = pytester.path / "bad-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 0\n")
    lines = "".join(f"{scheme} = {place}\n" for scheme, place in SCHEMES.items())
    (folder / "entry_points.txt").write_text(ENTRY_POINTS.format(lines))


def test_an_interrupt_where_python_knows_no_line() -> None:
    """As in 3.11 where a function with free variables is just being entered: pytest can't print that."""
    free = 1

    def entered() -> tuple[FrameType, int]:
        return sys._getframe(), free

    interrupt = KeyboardInterrupt()
    nowhere = TracebackType(None, entered()[0], 0, -1)
    here = TracebackType(nowhere, sys._getframe(), sys._getframe().f_lasti, sys._getframe().f_lineno)
    excinfo = pytest.ExceptionInfo.from_exc_info((KeyboardInterrupt, interrupt, here))
    recorder = _Recorder.__new__(_Recorder)
    recorder.pytest_keyboard_interrupt(excinfo)
    assert recorder._interrupted
    assert "KeyboardInterrupt" in str(excinfo.getrepr())
