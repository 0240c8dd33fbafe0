"""`unibus contracts`: the suite as a command, in memory and against a saboteur."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from textwrap import dedent

import pytest
from tests.unit.cli_lab import Cli

from unibus import registry
from unibus_contracts import runner
from unibus_contracts.catalogue import catalogue
from unibus_contracts.kit import FACTOR
from unibus_contracts.report import NOT_RUN, PASSED, REFUSED
from unibus_contracts.saboteurs.base import HOST, SCHEME
from unibus_contracts.saboteurs.run import contracts, installed

pytestmark = pytest.mark.timeout(180)  # a pytest of its own is started, on a machine that may be busy


def test_the_catalogue_is_the_suite() -> None:
    """Imported it is the same as read."""
    assert {id: place for id, (_, place) in catalogue().items()} == contracts()
    assert all(terms.id == id and terms.promise for id, (terms, _) in catalogue().items())


class TestLooking:
    def test_list(self, cli: Cli) -> None:
        found = cli("contracts", "list", "--json", url=None).lines
        assert [one["id"] for one in found] == list(catalogue())
        some = cli("contracts", "list", "-k", "size.", url=None).lines
        assert {one["id"] for one in some} >= {"size.at_max", "size.over_max"}
        assert all("size." in one["id"] for one in some)

    def test_show(self, cli: Cli) -> None:
        shown = cli("contracts", "show", "fanout.new_group_may_start_at_a_time", url=None)
        assert shown.code == 0
        for text in (
            "starts at a time",
            "replay",
            "A user who may make",
            "The clocks of this machine",
            "test_fanout::",
        ):
            assert text in shown.out

    def test_an_id_that_is_none(self, cli: Cli) -> None:
        done = cli("contracts", "show", "size.at_mx", url=None)
        assert done.code == 1
        assert "did you mean size.at_max?" in done.err


class TestRun:
    def test_a_pass(self, cli: Cli, tmp_path: Path) -> None:
        path = tmp_path / "out" / "report.json"
        junit = tmp_path / "junit.xml"
        done = cli(
            *("contracts", "run", "memory://", "-k", "ttl.", "--report", str(path), "--junit", str(junit)), url=None
        )
        assert done.code == 0, done
        assert "kept" in done.out
        assert "0 failed" in done.out
        written = json.loads(path.read_text())
        outcomes = {entry["id"]: entry["outcome"] for entry in written["contracts"]}
        assert list(outcomes) == list(catalogue())
        ran = {id: outcome for id, outcome in outcomes.items() if outcome != NOT_RUN}
        assert ran == dict.fromkeys(("ttl.is_told", "ttl.expired_is_not_handled"), PASSED)
        assert "testsuite" in junit.read_text()

    def test_several_brokers(self, cli: Cli, tmp_path: Path) -> None:
        done = cli(
            *("contracts", "run", "memory://", "memory://two", "-k", "ttl.is_told", "--json"),
            *("--report", str(tmp_path)),
            url=None,
        )
        assert done.code == 0, done
        assert [one["url"].partition("://")[0] for one in done.lines] == ["memory", "memory"]
        assert {path.name for path in tmp_path.glob("*.json")} == {"memory-1.json", "memory-2.json"}

    def test_what_is_broken_is_told(self, cli: Cli, sabotaged: str, tmp_path: Path) -> None:
        done = cli("contracts", "run", sabotaged, "-k", "ttl.is_told", "-n", "2", "--pin", str(tmp_path), url=None)
        assert done.code == 1, done
        assert "nothing is pinned of sabotaged" in done.out
        assert "broken: ttl.is_told: The receiver of a message with an expiry is told when it ends." in done.out
        assert "1 failed" in done.out

    def test_an_old_report_does_not_stand_for_a_run_that_has_none(self, cli: Cli, tmp_path: Path) -> None:
        report, junit = tmp_path / "report.json", tmp_path / "junit.xml"
        options = ("-k", "ttl.is_told", "--report", str(report), "--junit", str(junit))
        assert cli("contracts", "run", "memory://", *options, url=None).code == 0
        done = cli("contracts", "run", "memory://", *options, "--declare", "assume", url=None)
        assert done.code == 2, done
        assert "needs --unibus-channels FILE" in done.err
        assert done.out == ""
        assert not report.exists()
        assert not junit.exists()

    def test_what_a_report_points_to_is_let_be(self, cli: Cli, tmp_path: Path) -> None:
        """A link stays a link, and what an earlier run has written there goes."""
        report, link = tmp_path / "report.json", tmp_path / "link"
        report.write_text("old")
        link.symlink_to(report)
        done = cli("contracts", "run", "redis://127.0.0.1:1", "--report", str(link), url=None)
        assert done.code == 3
        assert link.is_symlink()
        assert report.read_text() == ""

    def test_the_working_directory_has_no_say(self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither in the process of the run nor in those that share its work."""
        for name in ("conftest", "queue", "pytest", "unibus_contracts"):
            (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__name__} of the working directory')")
        (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --nonsense")
        monkeypatch.chdir(tmp_path)
        done = cli("contracts", "run", "memory://", "-k", "ttl.is_told", "-n", "2", url=None)
        assert done.code == 0, done


STUBBORN = """
    import asyncio, signal, sys
    from pathlib import Path
    from unibus.memory import MemoryAdapter

    class Adapter(MemoryAdapter):
        async def connect(self):
            steps = [given for given in sys.argv if given.startswith("--unibus-steps=")]
            if steps:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                if Path(steps[0].partition("=")[2]).stat().st_size:
                    await asyncio.Event().wait()
            await super().connect()
"""


class Started:
    """`unibus contracts run` as a process, with temporary files where the test sees them."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.report = folder / "tmp", folder / "report.json"
        self.folder.mkdir()
        command = [sys.executable, "-m", "unibus", "contracts", "run", url, "--report", str(self.report)]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(self.folder)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
        )

    def reach(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def tested(self) -> bool:
        """Has a contract been run?"""
        return any(steps.stat().st_size for steps in self.folder.glob("unibus-contracts-*/steps"))

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> tuple[str, str]:
        """What it has printed; the status is that of an interrupt, and no temporary file is left."""
        with self.process:
            out, err = self.process.communicate(timeout=120)
        assert self.process.returncode == 130, (out, err)
        assert err == "unibus: interrupted\n"
        assert list(self.folder.glob("unibus-*")) == []
        return out, err


class TestInterrupted:
    def test_once(self, tmp_path: Path) -> None:
        """The table and the report have what was done by then, and say that it is a part."""
        run = Started(tmp_path, "memory://")
        run.reach(run.tested)
        run.interrupt()
        out, _ = run.end()
        assert "the run was broken off" in out
        written = json.loads(run.report.read_text())
        assert not written["finished"]
        assert {"passed", "not-run"} <= {entry["outcome"] for entry in written["contracts"]}

    def test_before_anything_was_done(self, tmp_path: Path) -> None:
        run = Started(tmp_path, "memory://")
        run.reach(lambda: any(run.folder.glob("unibus-contracts-*/said")))
        run.interrupt()
        out, _ = run.end()
        assert out == ""
        assert not run.report.exists()

    def test_twice(self, tmp_path: Path, adapter: Callable[[str], str]) -> None:
        """It is killed; what it was seen to do is told, and what it may have left on the broker."""
        run = Started(tmp_path, adapter(STUBBORN))
        run.reach(run.tested)
        run.interrupt()
        time.sleep(0.5)  # a second one at once is taken for the same
        run.interrupt()
        out, _ = run.end()
        assert "the run was broken off: interrupted twice" in out
        written = json.loads(run.report.read_text())
        assert not written["finished"]
        outcomes = [entry["outcome"] for entry in written["contracts"]]
        assert outcomes.count(PASSED) == 1
        assert outcomes.count(NOT_RUN) == len(catalogue()) - 1
        (left,) = written["left"]
        assert left.startswith("not deleted: what begins with 'ctr-")
        assert left in out


HANGING = """
    import asyncio
    from unibus.memory import MemoryAdapter

    class Adapter(MemoryAdapter):
        async def connect(self):
            await asyncio.Event().wait()
"""
WRONG = """
    from unibus.memory import MemoryAdapter

    class Adapter(MemoryAdapter):
        capabilities = {"order": True}
"""


class TestRefused:
    def test_nobody_answers(self, cli: Cli) -> None:
        done = cli("contracts", "run", "redis://:hunter2@127.0.0.1:1", url=None)
        assert done.code == 3
        assert "connect to Redis at 127.0.0.1:1" in done.err
        assert "hunter2" not in done.err + done.out

    def test_an_unknown_scheme(self, cli: Cli) -> None:
        done = cli("contracts", "run", "nosuch://host", url=None)
        assert done.code == 2
        assert "no adapter for nosuch://" in done.err

    @pytest.mark.parametrize("option", ["--report", "--junit", "--channels"])
    def test_a_report_that_cant_be_written(self, option: str, cli: Cli, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        path = str(tmp_path / "file" / "report.json")
        done = cli("contracts", "run", "memory://", "-k", "ttl.is_told", option, path, url=None)
        assert done.code == 2
        assert done.err == f"unibus: {path} can't be written: File exists\n"

    def test_a_file_that_is_not_there(self, cli: Cli) -> None:
        done = cli("contracts", "run", "nosuch.toml", url=None)
        assert done.code == 2
        assert done.err == "unibus: nosuch.toml can't be read: No such file or directory\n"

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (["memory://"], "--restart: name one broker"),
            (["-n", "2"], "--restart: not with -n, since it would strike the contracts of the other processes"),
        ],
    )
    def test_a_restart_that_would_strike_others(self, more: Sequence[str], said: str, cli: Cli) -> None:
        done = cli("contracts", "run", "memory://", *more, "--restart", "true", url=None)
        assert done.code == 2
        assert done.err == f"unibus: {said}\n"

    def test_a_restart_that_fails_is_told(self, cli: Cli) -> None:
        done = cli("contracts", "run", "memory://", "-k", "restart_keeps", "--restart", "echo no; exit 4", url=None)
        assert done.code == 1
        assert "the command that restarts the broker ended with status 4: no" in done.out

    @pytest.mark.parametrize("prefix", ["a b!", "x" * 47])
    def test_a_prefix_that_is_none(self, prefix: str, cli: Cli) -> None:
        done = cli("contracts", "run", "memory://", "-k", "ttl.is_told", "--prefix", prefix, url=None)
        assert done.code == 2
        assert done.out == ""
        assert f"--prefix {prefix!r}: use letters, digits, '.', '_' and '-', 46 of them at most" in done.err

    def test_a_connect_that_hangs(
        self, cli: Cli, adapter: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("unibus.cli.commands.contracts._CHECK", 0.3 / FACTOR)
        done = cli("contracts", "run", adapter(HANGING), "-k", "ttl.is_told", url=None)
        assert done.code == 3
        assert done.err == "unibus: mine://somewhere does not answer: no link within 0.3 s\n"

    def test_capabilities_that_are_none(self, cli: Cli, adapter: Callable[[str], str]) -> None:
        done = cli("contracts", "run", adapter(WRONG), "-k", "ttl.is_told", url=None)
        assert done.code == 2
        assert done.err == "unibus: capabilities are dict, no Capabilities of unibus.capabilities\n"

    def test_who_is_refused_leaves_no_empty_files(self, cli: Cli, tmp_path: Path) -> None:
        options = [
            word for name in ("report", "junit", "channels") for word in (f"--{name}", str(tmp_path / "out" / name))
        ]
        done = cli("contracts", "run", "redis://127.0.0.1:1", *options, url=None)
        assert done.code == 3
        assert list((tmp_path / "out").iterdir()) == []

    @pytest.mark.parametrize("command", [("run", "memory://"), ("list",)])
    def test_no_such_contract(self, command: Sequence[str], cli: Cli) -> None:
        done = cli("contracts", *command, "-k", "nope", url=None)
        assert done.code == 2
        assert "no contract has 'nope' in its id" in done.err

    def test_without_the_extra(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "xdist", None)
        done = cli("contracts", "list", url=None)
        assert done.code == 2
        assert "pip install 'unibus[contracts]'" in done.err


BLIND = """
    from dataclasses import replace
    from unibus import Unsupported
    from unibus.capabilities import refused
    from unibus.memory import MemoryAdapter

    REFUSED = {name: refused("it can't") for name in NAMES}

    class Adapter(MemoryAdapter):
        @property
        def capabilities(self):
            return replace(super().capabilities, adapter="blind", **REFUSED)

        async def subscribe(self, source):
            if source.browse:
                raise Unsupported("it can't look")
            return await super().subscribe(source)
"""


@pytest.mark.parametrize("refused", [["browse"], ["browse", "release"]])
def test_who_refuses_to_browse_can_keep_the_others(refused: list[str], adapter: Callable[[str], str]) -> None:
    """Contracts look at dead letters that promise nothing about looking."""
    ids = (
        "dlq.after_max_attempts",
        "dlq.redrive_some",
        "dlq.missing_target_keeps_message",
        "invalid.missing_target_keeps_message",
        "invalid.redrive_after_repair",
        "dlq.browse_leaves_everything",
    )
    url = adapter(BLIND.replace("NAMES", repr(refused)))
    found, _ = runner.run(url, lambda _id, _outcome: None, tests=[catalogue()[id][1] for id in ids])
    ran = {entry["id"]: entry["outcome"] for entry in found["contracts"] if entry["outcome"] != NOT_RUN}
    assert ran == dict.fromkeys(ids[:-1], PASSED) | {ids[-1]: REFUSED}, found


@pytest.fixture
def sabotaged(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an adapter that loses the expiry, installed for this process and its children."""
    with installed() as folder:
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        registry._entries.cache_clear()
        yield f"{SCHEME}://{HOST}?saboteur=loses-the-expiry"
    registry._entries.cache_clear()


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Installs an adapter, for this process and its children; its URL."""

    def install(code: str) -> str:
        folder, name = tmp_path / "installed", f"adapter_{tmp_path.name}"
        about = folder / f"{name}-0.dist-info"
        about.mkdir(parents=True)
        (folder / f"{name}.py").write_text(dedent(code))
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
        (about / "entry_points.txt").write_text(f"[unibus.adapters]\nmine = {name}:Adapter\n")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        forget()
        return "mine://somewhere"

    def forget() -> None:
        for cache in (registry._entries, registry.adapter_factory):
            cache.cache_clear()

    yield install
    forget()
