"""The contract suite where nothing may be made: `--channels FILE`, `unibus declare`, `--declare assume`."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.unit.cli_lab import Cli

from unibus import Bus, ConfigError, Queue
from unibus.tooling import topology_of
from unibus_contracts import channels, pins, report, runner
from unibus_contracts.catalogue import catalogue

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.timeout(600)  # pytests of their own are started, on a machine that may be busy

# Two that are about when something is made, and some of each kind that are not.
MAKE = ("fanout.new_group_starts_now", "cap.undeclared_is_refused")
KEEP = (
    "settle.ack_consumes",
    "dlq.at_once",
    "fanout.groups_get_all",
    "publish.missing_destination_raises",
    "ttl.is_told",
)


class Site:
    """A broker in a file, and the list of what some contracts need there."""

    def __init__(self, cli: Cli, folder: Path) -> None:
        self.cli = cli
        self.url = f"sqlite:///{folder / 'broker.db'}"
        self.list = folder / "list.toml"

    def run(self, *arguments: str, url: str | None = None) -> dict[str, Any]:
        """Id -> what was told of it."""
        tests = [catalogue()[id][1] for id in (*MAKE, *KEEP)]
        options = (f"--unibus-channels={self.list}", *arguments)
        found, _ = runner.run(url or self.url, lambda _id, _outcome: None, *options, tests=tests)
        assert not report.problems(found), found
        return {one["id"]: one for one in found["contracts"] if one["outcome"] != report.NOT_RUN}

    def rows(self, query: str, *values: str) -> list[Any]:
        with sqlite3.connect(self.url.removeprefix("sqlite:///")) as connection:
            return connection.execute(query, values).fetchall()

    def places(self) -> set[str]:
        return {name for (name,) in self.rows("SELECT name FROM place")}


def test_a_run_on_what_somebody_has_made(cli: Cli, tmp_path: Path) -> None:
    """It makes and deletes nothing, and what earlier runs have left is no harm."""
    site = Site(cli, tmp_path)
    made = site.run("--unibus-prefix=perm.", url=f"sqlite:///{tmp_path / 'elsewhere.db'}")
    assert report.NOT_TRIED not in {one["outcome"] for one in made.values()}
    assert tomllib.loads(site.list.read_text())["prefix"] == "perm."
    declared = cli("declare", "--config", str(site.list), url=site.url)
    assert declared.code == 0, declared
    before = site.places()
    assert before
    assert all(name.startswith("perm.") for name in before)

    site.rows("INSERT INTO message (place, body) SELECT name, 'left' FROM place WHERE kind <> 'topic'")
    assert site.rows("SELECT count(*) FROM message")[0][0] > len(KEEP)
    for _ in range(2):  # the second run finds what the first one has left
        found = site.run("--unibus-declare=assume")
        assert {id: one["outcome"] for id, one in found.items()} == {
            **dict.fromkeys(MAKE, report.NOT_TRIED),
            **dict.fromkeys(KEEP, report.PASSED),
        }
        assert {found[id]["reason"] for id in MAKE} == {"it makes channels while it runs"}
        assert site.places() == before


class TestList:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        """Each feature, groups, delays; and `unibus declare` reads it as what it is, a unibus.toml."""
        path = tmp_path / "list.toml"
        noted = {
            "queues": {"q-1": {"ordered": True, "priorities": 3}, "q-2": {}},
            "topics": {"t-1": {"delayed": True, "groups": ["a", "b.c"]}},
            "delays": [2.0, 0.5],
        }
        channels.write(path, "perm.", [("a.one", "It works.", noted), ("a.none", "It needs nothing.", EMPTY)])
        assert "# a.one: It works." in path.read_text()
        assert "a.none" not in path.read_text()
        listed = channels.read(path)
        assert listed.prefix == "perm."
        assert listed.delays == {0.5, 2.0}
        bus = Bus("memory://", config=path, environ={}, channels=[Queue("q-1", ordered=True, priorities=3)])
        topology = asyncio.run(opened(bus))
        assert {d.name for d in topology.channels if d.role == "channel"} == {
            *("perm.q-1", "perm.q-2", "perm.t-1", "perm.t-1.a", "perm.t-1.b.c")
        }
        assert listed.missing(topology) == []
        more = Bus("memory://", config=False, environ={}, delays=[7], channels=[Queue("q-1"), Queue("q-3")])
        assert listed.missing(asyncio.run(opened(more))) == ["queue 'q-3'", "the delay of 7 s"]

    @pytest.mark.parametrize("text", ["", "prefix = 1 2", 'prefix = ""\ndelays = 3', 'prefix = ""\ndelays = ["x"]'])
    def test_a_file_that_is_none(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "list.toml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"list\.toml lists no channels of the contract suite"):
            channels.read(path)

    def test_no_two_contracts_share_names(self) -> None:
        assert len({channels.stem(id) for id in catalogue()}) == len(catalogue())


async def opened(bus: Bus) -> Any:
    async with bus:
        return topology_of(bus)


class TestRefused:
    """Before any contract is run, each with the option that is wrong."""

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--unibus-declare=assume"], "--unibus-declare assume needs --unibus-channels FILE"),
            (["--unibus-declare=assume", "--unibus-channels=absent.toml"], "absent.toml lists no channels"),
            (["--unibus-declare=assume", "--unibus-channels=x", "--unibus-prefix=y"], "--unibus-prefix: under assume"),
            (["--unibus-channels=file/x"], "--unibus-channels file/x can't be written"),
        ],
    )
    def test_options(self, arguments: list[str], said: str, pytester: pytest.Pytester) -> None:
        (pytester.path / "file").write_text("")
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "--unibus-url=memory://", *arguments)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([f"*{said}*"])

    def test_one_broker(self, cli: Cli) -> None:
        done = cli("contracts", "run", "memory://", "memory://two", "--channels", "x", url=None)
        assert done.code == 2
        assert "--channels: name one broker" in done.err

    def test_a_harness_with_names_of_its_own(self, pytester: pytest.Pytester) -> None:
        pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
        pytester.makeconftest(HARNESS)
        pytester.makepyfile(test_it=CONTRACT)
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "--unibus-channels=list.toml")
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.stdout.fnmatch_lines(
            ["*--unibus-channels: give --unibus-url, since UrlHarness(*) makes names of its own"]
        )


HARNESS = """
    import pytest
    from unibus_contracts.harness import UrlHarness

    @pytest.fixture(scope="session")
    def unibus_harness():
        return UrlHarness("memory://")
"""
CONTRACT = """
    from unibus_contracts.contract import contract

    @contract("a.one", "It needs nothing.")
    async def test_one(kit):
        pass
"""


class TestReport:
    def test_what_could_not_be_tried_is_told_and_proves_nothing(self) -> None:
        for declare, wrong in (
            ("assume", []),
            ("create", ["feature 'delay' is declared, and no passed contract has used it"]),
        ):
            built = report.build(*PARTLY, errors={"b.b": "why"}, declare=declare)
            assert report.problems(built) == wrong
            assert report.untried(built)[0] == "not tried, why: b.b"
        assert report.untried(report.build(*PARTLY, declare="assume"))[1:] == [
            "declared, but not proven by this run: delay"
        ]

    def test_it_is_compared_with_the_pins_and_not_pinned(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        url, known, outcomes, told = PARTLY
        whole = report.build(url, known, dict.fromkeys(outcomes, (report.PASSED, 0.1)), told)
        file = tmp_path / "report.json"
        file.write_text(json.dumps(whole))
        assert pins.main(["--folder", str(tmp_path / "pins"), str(file)]) == 0
        part = report.build(*PARTLY, declare="assume")
        assert pins.differences(tmp_path / "pins", part) == []
        assert pins.differences(tmp_path / "pins", report.build(*PARTLY)) != []
        file.write_text(json.dumps(part))
        assert pins.main(["--folder", str(tmp_path / "pins"), str(file)]) == 1
        assert "it has left out what makes channels" in capsys.readouterr().err


EMPTY: dict[str, Any] = {"queues": {}, "topics": {}, "delays": []}
PARTLY: Any = (
    "memory://",
    {
        id: {"id": id, "promise": "It works.", "chapter": "x", "capability": needs}
        for id, needs in (("a.a", None), ("b.b", "delay"))
    },
    {"a.a": (report.PASSED, 0.1), "b.b": (report.NOT_TRIED, 0.1)},
    {
        "adapter": "mine",
        "version": None,
        "features": {"delay": {"level": "native", "how": "", "limit": None}},
        "numbers": {},
    },
)
