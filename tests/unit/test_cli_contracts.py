"""`unibus contracts`: the suite as a command, in memory and against a saboteur."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.cli_lab import Cli

from unibus import registry
from unibus_contracts.catalogue import catalogue
from unibus_contracts.report import NOT_RUN, PASSED
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

    def test_interrupted(self, tmp_path: Path) -> None:
        """The table and the report have what was done by then, and say that it is a part."""
        path = tmp_path / "report.json"
        command = [sys.executable, "-m", "unibus", "contracts", "run", "memory://", "--report", str(path)]
        environ = {**os.environ, "TMPDIR": str(tmp_path)}
        with subprocess.Popen(
            command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
        ) as run:
            deadline = time.monotonic() + 120
            while not any(steps.stat().st_size for steps in tmp_path.glob("unibus-contracts-*/steps")):
                assert run.poll() is None, run.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            run.send_signal(signal.SIGINT)
            out, err = run.communicate(timeout=120)
        assert run.returncode == 130, (out, err)
        assert "the run was broken off" in out
        assert "interrupted" in err
        written = json.loads(path.read_text())
        assert not written["finished"]
        assert {"passed", "not-run"} <= {entry["outcome"] for entry in written["contracts"]}


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

    def test_no_such_contract(self, cli: Cli) -> None:
        done = cli("contracts", "run", "memory://", "-k", "nope", url=None)
        assert done.code == 2
        assert "no contract has 'nope' in its id" in done.err

    def test_without_the_extra(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "xdist", None)
        done = cli("contracts", "list", url=None)
        assert done.code == 2
        assert "pip install 'unibus[contracts]'" in done.err


@pytest.fixture
def sabotaged(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an adapter that loses the expiry, installed for this process and its children."""
    with installed() as folder:
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("PYTHONPATH", str(folder))
        registry._entries.cache_clear()
        yield f"{SCHEME}://{HOST}?saboteur=loses-the-expiry"
    registry._entries.cache_clear()
