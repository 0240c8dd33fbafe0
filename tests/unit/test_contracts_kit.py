"""The contract suite's own parts that need no broker: decorator, waiting, URLs, reports, summary, plugin."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from unibus import ConfigError, Queue
from unibus.adapter import Endpoint, Url
from unibus.capabilities import Capabilities
from unibus.clock import SystemClock
from unibus.memory import MemoryAdapter
from unibus.tooling import settings_of
from unibus_contracts import __main__ as command
from unibus_contracts import report, summary
from unibus_contracts.contract import contract
from unibus_contracts.harness import FaultUnavailable, UrlHarness, nowhere, of_file, shown
from unibus_contracts.kit import Kit, Seen, checked, eventually, take, until
from unibus_contracts.refusals import REFUSALS

pytest_plugins = ["pytester"]


async def body(kit: Kit) -> None: ...


class TestContract:
    def test_terms(self) -> None:
        marked = contract("publish.works", "It works.", needs="delay")(body)
        terms = marked.__unibus_contract__  # type: ignore[attr-defined]  # how the plugin finds it
        assert terms.as_dict() == {
            "id": "publish.works",
            "promise": "It works.",
            "chapter": "contracts_kit",
            "capability": "delay",
            "assumes": None,
        }

    @pytest.mark.parametrize(
        ("id", "promise", "needs"),
        [
            ("nodot", "It works.", None),
            ("Publish.x", "It works.", None),
            ("publish.with space", "It works.", None),
            ("publish.x", "No full stop", None),
            ("publish.x", "Two\nlines.", None),
            ("publish.x", "It works.", "telepathy"),
        ],
    )
    def test_refused(self, id: str, promise: str, needs: str | None) -> None:
        with pytest.raises(ValueError, match="contract"):
            contract(id, promise, needs=needs)

    def test_a_refusal_for_every_feature(self) -> None:
        features = {name for name, field in Capabilities.__dataclass_fields__.items() if field.type == "Support"}
        assert features == set(REFUSALS)


class TestWaiting:
    async def test_until(self) -> None:
        begun = time.monotonic()
        await until(lambda: time.monotonic() - begun > 0.02, "a moment")
        with pytest.raises(AssertionError, match="pigs fly"):
            await until(lambda: False, "pigs fly", timeout=0.02)

    async def test_eventually(self) -> None:
        seen = Seen[int]()

        async def probe() -> int:
            seen(len(seen))
            return len(seen)

        assert await eventually(probe, lambda n: n >= 3, "three") == 3
        assert await seen.reach(2) == [0, 1, 2]


class TestUrls:
    @pytest.mark.parametrize(
        ("url", "text"),
        [
            ("amqp://user:secret@host:5672/shop", "amqp://host:5672/shop"),
            ("amqp://user:se/cr@et@host/", "amqp://host/"),
            ("amqp://user:secret?@host/", "amqp://host/"),
            ("amqp://a:secret@one,b:secret@two/?key=secret", "amqp://two/"),
            ("sqs://eu-west-1?endpoint_url=http://u:secret@host", "sqs://host"),
            ("redis://:secret@host", "redis://host"),
            ("memory://", "memory://"),
        ],
    )
    def test_shown(self, url: str, text: str) -> None:
        assert shown(url) == text
        assert "secret" not in repr(UrlHarness(url))

    def test_nowhere(self) -> None:
        url = nowhere("amqp://u:p@host:5672/shop?heartbeat=5", "p@ss/word")
        assert url is not None
        assert url.startswith("amqp://user:p%40ss%2Fword@127.0.0.1:")
        assert url.endswith("/shop?heartbeat=5")
        url = nowhere("sqs://eu-west-1?endpoint_url=http%3A%2F%2Flocalhost%3A4566", "x")
        assert url is not None
        assert "eu-west-1" in url
        assert "4566" not in url
        assert nowhere("memory://", "x") is None
        assert nowhere("memory://name", "x") is None

    def test_harness(self) -> None:
        one, two = UrlHarness("memory://"), UrlHarness("memory://", "p.")
        assert one.url.startswith("memory://ctr-")  # shared by the buses of this harness, and by no other
        assert one.url != two.url
        assert one.prefix != UrlHarness("memory://").prefix
        assert two.prefix.startswith("p.")  # and something random, so that what is deleted is its own
        assert len({one.channel("q") for _ in range(100)} | {two.channel("q") for _ in range(100)}) == 200

    async def test_a_link_that_is_cut(self) -> None:
        """Of a server: its end of the connection sees the end of the stream, again when it is made anew. Then no more."""
        ended: asyncio.Queue[bytes] = asyncio.Queue()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            ended.put_nowait(await reader.read())
            writer.close()

        one = UrlHarness("memory://")
        with pytest.raises(FaultUnavailable, match="no connection that could be cut"):
            async with one.cut_link():
                raise AssertionError("nothing was cut")
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            where = server.sockets[0].getsockname()[:2]
            _, writer = await asyncio.open_connection(*where)
            async with one.cut_link():
                assert await ended.get() == b""
                _, again = await asyncio.open_connection(*where)
                assert await ended.get() == b""
            _, last = await asyncio.open_connection(*where)
            last.write(b"whole")
            last.write_eof()
            assert await ended.get() == b"whole"
            for each in (writer, again, last):
                each.close()

    async def test_a_link_in_this_process_that_is_cut(self) -> None:
        one = UrlHarness("memory://")
        async with one.bus() as bus:
            async with one.cut_link():
                await eventually(bus.health, lambda health: health.status == "down", "it is cut")
            await eventually(bus.health, lambda health: health.status == "ok", "it is mended")

    async def test_a_restart_by_command(self, tmp_path: Path) -> None:
        await UrlHarness("amqp://host", restart=f"touch {tmp_path}/done").restart_broker()
        assert (tmp_path / "done").exists()
        with pytest.raises(RuntimeError, match=r"restarts the broker ended with status 3: one / two$"):
            await UrlHarness("amqp://host", restart="echo one; echo two >&2; exit 3").restart_broker()

    async def test_a_restart_that_hangs_is_killed_with_its_contract(self, tmp_path: Path) -> None:
        """And all that it has started."""
        pids = tmp_path / "pids"
        command = f"sleep 600 & echo $! $$ > {pids}.new; mv {pids}.new {pids}; wait"
        restarting = asyncio.create_task(UrlHarness("amqp://host", restart=command).restart_broker())
        await until(pids.exists, "it has begun")
        restarting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await restarting
        await until(lambda: not any(map(runs, pids.read_text().split())), "they have ended")

    async def test_a_restart_in_this_process(self) -> None:
        """The links break, and what waits is still there."""
        one, queue = UrlHarness("memory://"), Queue("q", bytes)
        async with one.bus(channels=[queue]) as bus:
            await bus.send(queue, b"x")
            await one.restart_broker()
            async with bus.receiver(queue) as receiver:
                (delivery,) = await take(receiver)
                assert delivery.body == b"x"
                await delivery.ack()


def runs(pid: str) -> bool:
    """Not one that has ended and that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def terms(id: str, capability: str | None = None) -> dict[str, Any]:
    return {"id": id, "promise": "It works.", "chapter": "x", "capability": capability}


def told(**levels: str) -> dict[str, Any]:
    features = {name: {"level": level, "how": "", "limit": None} for name, level in levels.items()}
    return {"adapter": "memory", "version": "1", "features": features}


def built(outcomes: dict[str, str], needs: str | None = None, levels: dict[str, str] | None = None) -> dict[str, Any]:
    known = {id: terms(id, needs) for id in outcomes}
    run = {id: (outcome, 0.1) for id, outcome in outcomes.items() if outcome != report.NOT_RUN}
    return report.build("memory://", known, run, told(**(levels or {})))


class TestReport:
    def test_build(self) -> None:
        result = built({"a.a": report.PASSED, "b.b": report.NOT_RUN})
        assert [entry["outcome"] for entry in result["contracts"]] == ["passed", "not-run"]
        assert result["contracts"][0] == {**terms("a.a"), "outcome": "passed", "duration": 0.1}
        assert json.loads(json.dumps(result)) == result

    def test_not_tried_is_no_pass_and_hides_nothing(self) -> None:
        levels = {"delay": "native"}
        result = built({"a.a": report.PASSED, "b.b": report.NOT_TRIED}, None, levels)
        assert report.line(result).endswith("0 failed, 1 not tried, 0 not run")
        assert result["unexercised"] == ["delay"]
        assert report.problems(built({"b.b": report.NOT_TRIED}))

    def test_line(self) -> None:
        result = built({"a.a": report.PASSED, "b.b": report.REFUSED, "c.c": report.FAILED, "d.d": report.NOT_RUN})
        assert report.line(result) == "memory 1 at memory://: 1 passed, 1 refused as declared, 1 failed, 1 not run"

    def test_a_pass(self) -> None:
        assert report.problems(built({"a.a": report.PASSED, "b.b": report.REFUSED})) == []

    @pytest.mark.parametrize(
        "outcomes", [{}, {"a.a": report.NOT_RUN}, {"a.a": report.REFUSED}, {"a.a": report.PASSED, "b.b": report.FAILED}]
    )
    def test_no_pass(self, outcomes: dict[str, str]) -> None:
        assert report.problems(built(outcomes))

    def test_a_run_that_was_broken_off_is_no_pass(self) -> None:
        result = report.build("memory://", {"a.a": terms("a.a")}, {"a.a": (report.PASSED, 0.1)}, None, finished=False)
        assert report.problems(result) == ["the run was broken off"]

    def test_a_declared_feature_must_be_used(self) -> None:
        levels = {"delay": "native", "order": "refused"}
        assert built({"a.a": report.PASSED}, None, levels)["unexercised"] == ["delay"]
        assert built({"a.a": report.PASSED}, "delay", levels)["unexercised"] == []
        assert built({"a.a": report.FAILED}, "delay", levels)["unexercised"] == ["delay"]
        # Of a part of the suite nothing follows.
        assert built({"a.a": report.PASSED, "b.b": report.NOT_RUN}, None, levels)["unexercised"] == []


class TestFile:
    def write(self, folder: Path, text: str) -> Path:
        path = folder / "broker.toml"
        path.write_text(text)
        return path

    def test_url_user_and_settings(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing else of it: channels and policies are an application's."""
        monkeypatch.setenv("UNIBUS_PASSWORD", "hunter2")
        text = 'url = "redis://host:1/0"\nusername = "me"\nprefix = "x."\n[redis]\nlease = 60\n[queues.orders]\n'
        url, more = of_file(self.write(tmp_path, text))
        assert url == "redis://host:1/0"
        assert more == {"username": "me", "password": "hunter2", "settings": {"lease": 60}}
        harness = UrlHarness(url, more=more)
        assert settings_of(harness.bus()).url.username == "me"
        assert settings_of(harness.bus(url="redis://u:p@nowhere")).url.username == "u"
        assert "hunter2" not in repr(harness)

    @pytest.mark.parametrize(
        ("text", "said"), [("", "there is no url"), ("url =", "broker.toml"), ("url = 'x'", "url")]
    )
    def test_refused(self, text: str, said: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=said):
            of_file(self.write(tmp_path, text))


class TestCommands:
    def test_summary(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        good, bad, broken = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "broken.json"
        good.write_text(json.dumps(built({"a.a": report.PASSED})))
        bad.write_text(json.dumps(built({"a.a": report.FAILED})))
        broken.write_text("{}")
        assert summary.main([str(good)]) == 0
        assert capsys.readouterr().out.count("\n") == 1
        assert summary.main([str(good), str(bad)]) == 1
        assert summary.main([str(broken)]) == 1
        assert summary.main([str(tmp_path / "absent.json")]) == 1
        assert summary.main([]) == 1

    def test_one_report_for_each_url(self) -> None:
        urls = ["memory://", "amqp://one", "amqp://two"]
        assert [path.name for path in command.report_paths(urls, Path("r"))] == [
            "memory.json",
            "amqp-1.json",
            "amqp-2.json",
        ]

    def test_an_empty_url_is_an_error(self) -> None:
        with pytest.raises(SystemExit):
            command.main(["memory://", ""])


CONTRACTS = """
    from unibus_contracts.contract import contract

    @contract("a.good", "It passes.")
    async def test_good(kit):
        assert (await kit.capabilities()).adapter == "memory"

    @contract("a.bad", "It fails.")
    async def test_bad(kit):
        assert False

    @contract("a.refused", "It needs what the broker can't do.", needs="replay")
    async def test_refused(kit):
        raise AssertionError("the refusal runs instead")

    @contract("a.fault", "It needs a fault.")
    async def test_fault(kit):
        await kit.harness.restart_broker()
"""


FAULTS = """
    import asyncio
    from unibus_contracts.contract import contract

    @contract("a.fault", "It needs a fault.")
    async def test_fault(kit):
        async def inject():
            FAULT
        if WHERE:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(inject())
        else:
            await inject()
"""

LEFT = {
    "tells": """
        import pytest
        from unibus_contracts.cleanup import Removal
        from unibus_contracts.harness import UrlHarness

        class Mine(UrlHarness):
            async def cleanup(self):
                self.prefix = "mine."
                self.removal = Removal(0, "OSError: no rights")

        @pytest.fixture(scope="session")
        def unibus_harness():
            return Mine("memory://")
    """,
    "raises": """
        import pytest
        from unibus_contracts.harness import UrlHarness

        class Mine(UrlHarness):
            async def cleanup(self):
                self.prefix = "mine."
                raise OSError("no rights")

        @pytest.fixture(scope="session")
        def unibus_harness():
            return Mine("memory://")
    """,
}

INI = "[pytest]\nasyncio_default_fixture_loop_scope = function\n"  # unset, it is a warning


class TestPlugin:
    def run(self, pytester: pytest.Pytester, *arguments: str) -> tuple[pytest.RunResult, dict[str, Any]]:
        pytester.makeini(INI)
        pytester.makepyfile(test_them=CONTRACTS)
        given = [
            "--unibus-url",
            "memory://",
            "--unibus-report",
            "out/report.json",
            "-p",
            "no:cacheprovider",
            *arguments,
        ]
        result = pytester.runpytest_inprocess(*given)
        return result, json.loads((pytester.path / "out/report.json").read_text())

    def test_report(self, pytester: pytest.Pytester) -> None:
        result, written = self.run(pytester)
        result.assert_outcomes(passed=1, failed=1, skipped=1)
        result.stdout.fnmatch_lines(
            ["memory at memory://*: 1 passed, 1 refused as declared, 1 failed, 1 not tried, 0 not run"]
        )
        assert written["finished"]
        outcomes = {entry["id"]: entry["outcome"] for entry in written["contracts"]}
        assert outcomes.pop("a.fault") == "not-tried"
        assert outcomes == {"a.good": "passed", "a.bad": "failed", "a.refused": "refused-as-declared"}
        assert written["adapter"] == "memory"
        assert written["features"]["replay"]["level"] == "refused"

    def test_what_was_left_out_is_not_run(self, pytester: pytest.Pytester) -> None:
        result, written = self.run(pytester, "-k", "good")
        assert result.ret == 0
        outcomes = {entry["id"]: entry["outcome"] for entry in written["contracts"]}
        assert outcomes.pop("a.good") == "passed"
        assert set(outcomes.values()) == {"not-run"}

    def test_a_declared_feature_that_nothing_used_fails_the_run(self, pytester: pytest.Pytester) -> None:
        pytester.makeini(INI)
        pytester.makepyfile(test_them=CONTRACTS.replace("assert False", "pass").partition('    @contract("a.fault"')[0])
        result = pytester.runpytest_inprocess("--unibus-url", "memory://", "-p", "no:cacheprovider")
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.stdout.fnmatch_lines(["*feature 'order' is declared, and no passed contract has used it"])

    def test_a_pin_that_differs_fails_the_run(self, pytester: pytest.Pytester) -> None:
        result, _ = self.run(pytester, "-k", "good", "--unibus-pin", "answers")
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.stdout.fnmatch_lines(["*nothing is pinned of memory: answers/memory.json is missing*"])

    def junit(self, pytester: pytest.Pytester, *arguments: str) -> tuple[dict[str, str | None], dict[str, str]]:
        """Name of each test -> what it is beside a pass, and why; and the counts."""
        self.run(pytester, "--junitxml=$WHERE/junit.xml", *arguments)
        (suite,) = ET.parse(pytester.path / "junit.xml").getroot()  # noqa: S314  # our own
        cases = {case.get("name", ""): case for case in suite}
        found = {
            name: next((f"{one.tag}: {one.get('message')}" for one in case if one.tag != "properties"), None)
            for name, case in cases.items()
        }
        return found, {name: suite.get(name, "") for name in ("tests", "failures", "errors", "skipped")}

    def test_junit_tells_all_that_fails_a_run(self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pin that differs, a feature that nothing has used; and what was refused is no pass."""
        monkeypatch.setenv("WHERE", str(pytester.path))
        found, counts = self.junit(pytester, "--unibus-pin", "answers")
        assert found.pop("test_good") is None
        assert found.pop("test_bad") == "failure: assert False"
        assert found.pop("test_refused") == "skipped: refused as declared: replay: the memory broker keeps no history"
        assert (found.pop("test_fault") or "").startswith("skipped: not tried")
        problems = {"feature 'order' is declared, and no passed contract has used it"}
        assert problems < set(found)
        assert any(name.startswith("nothing is pinned of memory") for name in found)
        assert all(said == f"failure: {name}" for name, said in found.items())
        assert counts == {
            "tests": str(4 + len(found)),
            "failures": str(1 + len(found)),
            "errors": "0",
            "skipped": "2",
        }

    def test_junit_tells_of_a_run_that_is_not_complete(
        self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WHERE", str(pytester.path))
        found, _ = self.junit(pytester, "-x", "--unibus-url", "nosuch://host")
        assert any(name.startswith("the run was broken off: ") for name in found)

    def test_junit_of_a_pass(self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WHERE", str(pytester.path))
        found, counts = self.junit(pytester, "-k", "good")
        assert found == {"test_good": None}
        assert counts == {"tests": "1", "failures": "0", "errors": "0", "skipped": "0"}

    def test_a_report_that_cant_be_written(self, pytester: pytest.Pytester) -> None:
        pytester.makeini(INI)
        pytester.makepyfile(test_them=CONTRACTS)
        pytester.path.joinpath("file").write_text("")
        result = pytester.runpytest_inprocess("--unibus-url", "memory://", "--unibus-report", "file/report.json")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["*--unibus-report file/report.json can't be written: *"])

    def test_a_restart_and_several_workers(self, pytester: pytest.Pytester) -> None:
        pytester.makepyfile(test_them=CONTRACTS)
        result = pytester.runpytest_inprocess("--unibus-url=memory://", "--unibus-restart=true", "-n", "2")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["*--unibus-restart: not with -n, *"])

    def test_a_run_that_is_interrupted(self, pytester: pytest.Pytester) -> None:
        pytester.makeini(INI)
        pytester.makepyfile(test_them=CONTRACTS.replace("assert False", "raise KeyboardInterrupt"))
        result = pytester.runpytest_subprocess("--unibus-url", "memory://", "--unibus-report", "report.json")
        assert result.ret == pytest.ExitCode.INTERRUPTED
        written = json.loads((pytester.path / "report.json").read_text())
        assert not written["finished"]
        assert {entry["outcome"] for entry in written["contracts"]} >= {"passed", "not-run"}

    @pytest.mark.parametrize("fault", ["await kit.harness.restart_broker()", "async with kit.harness.cut_link(): pass"])
    @pytest.mark.parametrize("where", ["", "task group"])
    def test_a_fault_that_cant_be_injected_is_not_tried(
        self, fault: str, where: str, pytester: pytest.Pytester
    ) -> None:
        """Each hook that the harness leaves out; also out of a task group, where the error comes wrapped."""
        pytester.makeini(INI)
        pytester.makepyfile(test_them=FAULTS.replace("FAULT", fault).replace("WHERE", repr(where)))
        result = pytester.runpytest_inprocess(
            *("--unibus-url=memory://", "--unibus-report=report.json", "-p", "no:cacheprovider")
        )
        result.assert_outcomes(skipped=1)
        written = json.loads((pytester.path / "report.json").read_text())
        (entry,) = written["contracts"]
        assert entry["outcome"] == "not-tried"
        assert entry["reason"] in {
            "a URL alone gives no way to restart the broker; --restart COMMAND does (in pytest: --unibus-restart)",
            "this process has no connection that could be cut",
        }
        assert "no contract passed: an empty report proves nothing" in report.problems(written)
        result.stdout.fnmatch_lines([f"  not tried, {entry['reason']}: a.fault"])

    @pytest.mark.parametrize(("harness", "workers"), [("tells", []), ("raises", []), ("tells", ["-n", "1"])])
    def test_a_removal_that_fails_is_told_and_fails_nothing(
        self, harness: str, workers: list[str], pytester: pytest.Pytester
    ) -> None:
        """In the terminal, in the report and in the line of the summary; also what only a worker of xdist knows."""
        pytester.makeini(INI)
        pytester.makeconftest(LEFT[harness])
        pytester.makepyfile(test_them=CONTRACTS)
        arguments = ["-k", "good", "--unibus-report=report.json", "-p", "no:cacheprovider", *workers]
        result = pytester.runpytest_subprocess(*arguments) if workers else pytester.runpytest_inprocess(*arguments)
        written = json.loads((pytester.path / "report.json").read_text())
        assert written["left"] == written["cleanup"] == ["not deleted: what begins with 'mine.': OSError: no rights"]
        result.stdout.fnmatch_lines(["*1 passed, *; not all that it made is deleted", written["left"][0]])
        if not workers:  # of which the main process would know no contract that was left out
            assert result.ret == 0
            assert summary.main([str(pytester.path / "report.json")]) == 0

    def test_a_capability_of_a_wrong_type(self) -> None:
        known = MemoryAdapter(Endpoint(Url("memory"), "svc", "1", SystemClock())).capabilities
        with pytest.raises(ConfigError, match="memory declares replay=True: use native"):
            dataclasses.replace(known, replay=True)  # type: ignore[arg-type]  # that is the point
        with pytest.raises(ConfigError, match="memory declares flights=True: it is int"):
            dataclasses.replace(known, flights=True)
        with pytest.raises(ConfigError, match=r"memory declares park_limit='1': it is float \| None"):
            dataclasses.replace(known, park_limit="1")  # type: ignore[arg-type]
        assert dataclasses.replace(known, park_limit=1, max_body=None) != known
        with pytest.raises(AssertionError, match="capabilities are dict"):
            checked({})

    def test_a_broker_that_is_not_there(self, pytester: pytest.Pytester) -> None:
        result, written = self.run(pytester, "--unibus-url", "nosuch://u:hunter2@host")
        assert result.ret == pytest.ExitCode.INTERRUPTED
        assert {entry["outcome"] for entry in written["contracts"]} == {"failed", "not-run"}
        assert "hunter2" not in result.stdout.str()
        assert "hunter2" not in json.dumps(written)

    def test_no_url(self, pytester: pytest.Pytester) -> None:
        pytester.makeini(INI)
        pytester.makepyfile(test_them=CONTRACTS)
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
        assert result.ret != 0
        result.stdout.fnmatch_lines(["*contracts need a broker: give --unibus-url*"])
