"""`unibus compare` on the memory broker: what the probes find, and what becomes of those that fail."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rich.console import Console
from tests.unit.cli_lab import APP, Cli

from unibus import Bus, ConfigError, ConnectionLost, Queue, Topic
from unibus.url import parse
from unibus_contracts import supply
from unibus_contracts.compare import contracts
from unibus_contracts.compare import run as running
from unibus_contracts.compare.child import order
from unibus_contracts.compare.lab import Lab, percentile
from unibus_contracts.compare.model import FULL, QUICK, Found, NotMeasurable, Probe, Row, Sizes
from unibus_contracts.compare.probes import ALL
from unibus_contracts.compare.run import Run, failures, known_names, yours_first
from unibus_contracts.compare.table import show
from unibus_contracts.compare.targets import Target, resolve
from unibus_contracts.compare.touches import touched

TINY = Sizes(
    loads=(100, 200),
    load_seconds=0.05,
    batches=(1, 10),
    bodies=(10, 100),
    flow_seconds=0.01,
    groups=(1, 2),
    publishes=5,
    delays=(0.02, 0.05),
    backoff=0.5,
    repeats=2,
    members=2,
    idle_seconds=0.05,
    largest=10_000,
    patience=0.1,
)
PROBES = [probe for probe in ALL if isinstance(probe, Probe)]


def targets(*names: str) -> list[Target]:
    return resolve(list(names))[0]


def cells(document: Mapping[str, Any], column: int = 0) -> dict[str, dict[str, Any]]:
    return {row["id"]: row["cells"][column] for row in document["rows"]}


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Every probe, once, on a memory broker."""
    chapters = {probe.rows[0].chapter for probe in PROBES}
    return asyncio.run(Run(targets("memory://"), TINY, only=chapters)())


def test_every_probe_of_the_memory_broker(measured: dict[str, Any]) -> None:
    assert failures(measured) == []
    assert measured["finished"] is True
    [target] = measured["targets"]
    assert (target["name"], target["adapter"], target["emulator"]) == ("memory", "memory", None)
    found = cells(measured)
    said = {id: cell["text"] for id, cell in found.items()}
    assert said["receiving.unit"] == "one message"
    assert said["receiving.priority"] == "higher first"
    assert said["receiving.expiry"] == "dropped by the consumer"
    assert said["receiving.browse"] == "sees all, takes none"
    assert found["receiving.browse"]["note"] == "taken afterwards: in order; deliveries: 1, 1, 1"
    assert said["receiving.count"] == "1, 1, 1"  # what was given back is not counted
    assert said["sending.unroutable"] == "refused: NotFound"
    assert said["sending.nobody"] == "accepted, and counted"
    assert said["sending.twice"] == "arrives twice"
    assert said["sending.risks"] == "1 found"
    assert said["order.competing"] == "0 of 240 out of order"
    assert said["order.retrying"] == "kept; other keys went on"
    assert said["requests.late"] == "an error for who replies, counted"
    assert said["failure.retry_told"] == "attempt, count, error, header, key"
    assert said["failure.letter"] == "body, id, key, header, correlation id"
    assert said["limits.key"] == "4,096 characters"
    assert said["limits.body"] == "9.77 KiB tried; declares no limit"
    assert found["delays.late"]["value"] >= 0
    assert found["failure.retry_late"]["value"] >= 0
    assert found["throughput.batch"]["points"].keys() == {"sent"}
    assert [x for x, _ in found["latency.confirm"]["points"]["p50"]] == [100, 200]


def test_what_is_declared_refused_or_beyond_measuring_is_marked_so(measured: dict[str, Any]) -> None:
    found = cells(measured)
    assert found["delays.longest"]["state"] == "declared"
    assert (found["receiving.replay"]["state"], found["receiving.replay"]["level"]) == ("refused", "refused")
    assert found["receiving.replay"]["declared"] == "the memory broker keeps no history"
    for id in ("failure.redelivery", "failure.standstill", "failure.copies", "sending.confirm", "limits.trimming"):
        assert (found[id]["state"], found[id]["text"].partition(":")[0]) == ("not run", "can't be measured here"), id
    assert (found["failure.retry_late"]["level"], found["latency.confirm"]["level"]) == ("native", "plain")


async def test_a_finding_has_the_level_of_the_capability_that_decides_it(measured: dict[str, Any]) -> None:
    """On each broker its own: plain is for what no capability stands for."""
    ids = ("receiving.unit", "failure.retry_told", "failure.letter")
    levels = {"memory": [cells(measured)[id]["level"] for id in ids]}
    for profile in ("kafka", "redis"):
        run = Run(targets(f"memory://?profile={profile}"), TINY, only=set(ids))
        found = cells(await run())
        levels[profile] = [found[id]["level"] for id in ids]
        assert {found[id]["state"] for id in ids} == {"measured"}
    assert levels == {
        "memory": ["native", "emulated", "native"],
        "kafka": ["refused", "emulated", "refused"],
        "redis": ["native", "emulated", "native"],
    }
    plain = {id.partition(".")[0] for id, cell in cells(measured).items() if cell["level"] == "plain"}
    assert plain == {"latency", "throughput", "cost", "limits", "topics", "sending", "receiving"}


def test_the_document_is_json_and_every_row_says_how(measured: dict[str, Any]) -> None:
    assert json.loads(json.dumps(measured)) == measured
    for row in measured["rows"]:
        assert len(row["how"]) > 30, row["id"]
        assert len(row["cells"]) == 1, row["id"]
        assert all(cell["text"] for cell in row["cells"]), row["id"]


def test_names_are_unique_and_features_exist(measured: dict[str, Any]) -> None:
    ids = [row["id"] for row in measured["rows"]]
    assert len(set(ids)) == len(ids) >= 35
    names = [probe.name for probe in PROBES]
    assert len(set(names)) == len(names)
    assert {"latency", "order", "contracts", "load"} <= known_names()


def test_full_measures_no_less_than_quick() -> None:
    for field in Sizes.__dataclass_fields__:
        quick, full = getattr(QUICK, field), getattr(FULL, field)
        assert (full >= quick) if not isinstance(quick, tuple) else (max(full) >= max(quick)), field


# What fails


def probe(measure: Any, *, name: str = "p", waits: bool = False, limit: float = 20.0, **more: Any) -> Probe:
    row = Row(id=f"x.{name}", chapter="x", title=f"title of {name}", how="by hand", **more)
    return Probe(name=name, rows=(row,), measure=measure, waits=waits, limit=limit)


async def fine(lab: Lab) -> Mapping[str, Found]:
    return {"x.fine": Found(text="fine", value=1.0)}


async def broken(lab: Lab) -> Mapping[str, Found]:
    raise ValueError("on purpose")


async def empty(lab: Lab) -> Mapping[str, Found]:
    return {}


async def impossible(lab: Lab) -> Mapping[str, Found]:
    raise NotMeasurable("no way")


async def endless(lab: Lab) -> Mapping[str, Found]:
    await asyncio.Event().wait()
    raise AssertionError


def run_of(*probes: Probe, names: tuple[str, ...] = ("memory://",), **more: Any) -> Run:
    return Run(targets(*names), TINY, only={"x"}, probes=probes, **more)


async def test_a_probe_that_fails_is_a_cell_and_the_others_go_on() -> None:
    seen: list[str] = []
    run = run_of(
        probe(broken, name="broken"),
        probe(empty, name="empty"),
        probe(impossible, name="impossible", waits=True),
        probe(endless, name="endless", limit=0.01),
        probe(fine, name="fine"),
        progress=lambda target, done, seconds: seen.append(done),
    )
    found = cells(await run())
    states = {id.removeprefix("x."): (cell["state"], cell["text"]) for id, cell in found.items()}
    assert states["broken"] == ("failed", "ValueError: on purpose")
    assert states["empty"] == ("failed", "nothing was found")
    assert states["impossible"] == ("not run", "can't be measured here: no way")
    assert states["endless"][0] == "failed"
    assert "not done within" in states["endless"][1]
    assert states["fine"] == ("measured", "fine")
    assert [line.partition(": title")[0] for line in failures(run.document)] == ["memory"] * 3
    assert sorted(seen) == ["broken", "empty", "endless", "fine", "impossible"]


async def test_a_long_wait_is_beside_the_others_of_its_broker() -> None:
    over = asyncio.Event()

    async def waits(lab: Lab) -> Mapping[str, Found]:
        await over.wait()
        return {"x.waits": Found(text="waited")}

    async def ends_it(lab: Lab) -> Mapping[str, Found]:
        over.set()
        return {"x.other": Found(text="fine")}

    first = replace(probe(waits, name="waits", waits=True), long=True)
    found = cells(await run_of(first, probe(ends_it, name="other", waits=True))())
    assert {id: cell["text"] for id, cell in found.items()} == {"x.waits": "waited", "x.other": "fine"}


async def test_a_run_that_is_broken_off_keeps_what_it_has() -> None:
    reached = asyncio.Event()

    async def stuck(lab: Lab) -> Mapping[str, Found]:
        reached.set()
        return await endless(lab)

    run = run_of(probe(fine, name="fine"), probe(stuck, name="stuck"), probe(fine, name="later"))
    task = asyncio.ensure_future(run())
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert run.document["finished"] is False
    states = {id: cell["state"] for id, cell in cells(run.document).items()}
    assert states == {"x.fine": "measured", "x.stuck": "not run", "x.later": "not run"}


SUITE = """#!{python}
import json, signal, sys, time
def end(*_):
    time.sleep(0.2)  # it cleans up
    open(report, "w").write(json.dumps({{"finished": False, "left": ["not deleted: what begins with 'x': y"], "contracts": [
        {{"id": "order.a", "chapter": "order", "outcome": "passed"}}, {{"id": "order.b", "chapter": "order", "outcome": "not-run"}},
        {{"id": "retry.a", "chapter": "retry", "outcome": "not-run"}}]}}))
    sys.exit(2)
signal.signal(signal.SIGINT, end)
(report,) = [one.partition("=")[2] for one in sys.argv if one.startswith("--unibus-report=")]
open({begun!r}, "w").close()
time.sleep(60)
"""


async def test_a_run_that_is_broken_off_keeps_what_the_contracts_have_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the target that was through all of it, of the one that was in the middle nothing but that, of the one that had not begun none."""
    real = contracts.run
    script = tmp_path / "suite"
    script.write_text(SUITE.format(python=sys.executable, begun=str(tmp_path / "begun")))
    script.chmod(0o755)

    async def run_one(target: Target, *rest: Any, **more: Any) -> contracts.Outcome:
        name = target.shown.removeprefix("memory://")
        if name == "one":
            return report(order_a="passed", retry_a="passed")
        if name == "three":
            await asyncio.Event().wait()
        return await real(target, *rest, **more)

    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(contracts, "run", run_one)
    run = Run(targets("memory://one", "memory://two", "memory://three"), TINY, only={contracts.CHAPTER}, quick=True)
    task = asyncio.ensure_future(run())
    async with asyncio.timeout(30):
        while not (tmp_path / "begun").exists():  # noqa: ASYNC110  # of another process
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert run.document["finished"] is False
    said = {id: [cells(run.document, n)[id] for n in range(3)] for id in ("contracts.order", "contracts.retry")}
    assert [cell["text"] for cell in said["contracts.order"]] == ["1 kept", "1 kept, 1 not run", "not run"]
    assert [cell["state"] for cell in said["contracts.order"]] == ["measured", "measured", "not run"]
    assert [cell["state"] for cell in said["contracts.retry"]] == ["measured", "not run", "not run"]
    assert run._labs[1].left == ["what begins with 'x': y"]
    assert failures(run.document) == []
    console = Console(file=io.StringIO(), width=200)
    show(run.document, console)
    assert "partial: the run was broken off" in console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


async def test_a_broker_that_can_not_be_reached_is_a_column_of_errors() -> None:
    run = run_of(probe(fine, name="fine"), names=("redis://me:hunter22@127.0.0.1:1", "memory://"))
    document = await run()
    assert cells(document, 0)["x.fine"]["state"] == "failed"
    assert "127.0.0.1:1" in cells(document, 0)["x.fine"]["text"]
    assert cells(document, 1)["x.fine"]["state"] == "measured"
    assert "hunter22" not in json.dumps(document)


async def test_a_broker_that_goes_is_asked_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(lab: Lab) -> dict[str, Found]:
        monkeypatch.setattr(Lab, "connect", gone)
        raise ConnectionLost("nobody there")

    async def gone(lab: Lab) -> None:
        raise ConnectionLost("nobody there any more")

    monkeypatch.setattr(running, "GONE", 0.01)
    run = run_of(probe(fine, name="fine"), probe(breaks, name="breaks"), probe(fine, name="later"))
    document = await run()
    found = cells(document)
    assert [found[f"x.{name}"]["state"] for name in ("fine", "breaks", "later")] == ["measured", "failed", "not run"]
    assert found["x.later"]["text"] == "the broker has gone: ConnectionLost: nobody there any more"
    assert document["finished"] is False
    assert failures(document)[0] == "memory: the broker has gone: ConnectionLost: nobody there any more"


async def test_a_feature_that_is_declared_as_anything_is_a_column_of_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    from unibus.memory import MemoryAdapter

    def declared(adapter: MemoryAdapter) -> Any:
        return replace(adapter._capabilities, delay="yes")  # type: ignore[arg-type]  # that is the mistake

    monkeypatch.setattr(MemoryAdapter, "capabilities", property(declared))
    found = cells(await run_of(probe(fine, name="fine", feature="delay"))())
    assert found["x.fine"]["state"] == "failed"
    assert "memory declares delay='yes': use native()" in found["x.fine"]["text"]


async def test_one_broker_twice_has_two_names() -> None:
    document = await run_of(probe(fine, name="fine"), names=("memory://one?lease=5", "memory://two"))()
    names = [target["name"] for target in document["targets"]]
    assert names == ["memory", "memory (memory://two)"]
    assert [target["settings"] for target in document["targets"]] == [{"lease": "5"}, {}]


async def test_one_broker_twice_is_named_by_the_settings_that_differ() -> None:
    urls = ("memory://one?lease=5&max_body=9", "memory://one?lease=7&max_body=9", "memory://one?max_body=9")
    document = await run_of(probe(fine, name="fine"), names=urls)()
    assert [target["name"] for target in document["targets"]] == ["memory (lease=5)", "memory (lease=7)", "memory"]


# Targets


def test_a_target_may_be_a_file_for_its_url_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "unibus.toml"
    file.write_text(
        'url = "redis://me@localhost/3"\nprefix = "live."\n[redis]\nretention = 60\n[queues.orders]\nordered = true\n'
        "[kafka]\npartitions = 3\n"
    )
    [target] = targets(str(file))
    assert (target.shown, target.settings) == ("redis://localhost/3", {"retention": 60})
    assert target.text() == "redis://me@localhost/3?retention=60"
    settings, channels = target.bus(prefix="x.")._load()
    assert (settings.prefix, settings.url.username, list(channels)) == ("x.", "me", [])


def test_of_the_environment_a_file_takes_user_and_password_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files are two brokers, also where UNIBUS_URL names a third."""
    monkeypatch.setenv("UNIBUS_URL", "redis://elsewhere")
    monkeypatch.setenv("UNIBUS_USERNAME", "me")
    monkeypatch.setenv("UNIBUS_PASSWORD", "hunter22")
    file = tmp_path / "unibus.toml"
    file.write_text('url = "redis://localhost/3"\n')
    [target] = targets(str(file))
    assert target.text() == "redis://me:hunter22@localhost/3"
    environ = contracts._environment(target, str(tmp_path))
    told = {name: value for name, value in environ.items() if name.startswith("UNIBUS_") and "_TEST_" not in name}
    assert told == {"UNIBUS_USERNAME": "me", "UNIBUS_PASSWORD": "hunter22"}


@pytest.mark.timeout(360)  # a pytest in a process of its own, of seconds on an idle machine
async def test_the_contracts_read_the_file_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table among the settings has no place in a URL. Whatever pytest finds where the comparison is made has no say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contracts, "QUICK_LIMIT", 300.0)
    monkeypatch.setattr(contracts, "QUICK", ("logs::test_quiet",))
    (tmp_path / "conftest.py").write_text("raise RuntimeError('of somebody else')")
    (tmp_path / "pytest.py").write_text("raise RuntimeError('no pytest')")
    (tmp_path / "bus.toml").write_text('url = "memory://"\n[memory]\nlease = 7\n')
    [target] = targets("bus.toml")
    outcome = await contracts.run(target, "cmp-x.", [], quick=True)
    assert outcome.error == ""
    assert outcome.report["finished"] is True
    assert outcome.report["features"]["lease"]["limit"] == 7


async def test_what_is_left_on_a_broker_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(probe(fine, name="fine"), names=("memory://one", "memory://two"))
    run._labs[0].made[0].name(run._labs[0].prefix + "q")
    monkeypatch.setattr("unibus_contracts.cleanup.delete_of", lambda scheme: None)
    await run()
    await run.remove()
    left = [target["left"] for target in run.document["targets"]]
    assert left[0].startswith(f"what begins with {run._labs[0].prefix!r}: the adapter of memory://")
    assert left[1] is None  # nothing was made there


async def test_what_the_contracts_left_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def left_some(*_: object, **__: object) -> contracts.Outcome:
        return contracts.Outcome({"contracts": [], "left": ["not deleted: what begins with 'cmp-1.2.': Timeout"]})

    monkeypatch.setattr(contracts, "run", left_some)
    run = Run(targets("memory://"), TINY, only={contracts.CHAPTER})
    await run()
    await run.remove()
    assert run.document["targets"][0]["left"] == "what begins with 'cmp-1.2.': Timeout"


async def test_a_removal_that_is_broken_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = asyncio.Event()

    async def slow(*_: object) -> list[str]:
        reached.set()
        await asyncio.Event().wait()
        raise AssertionError

    run = run_of(probe(fine, name="fine"))
    run._labs[0].made[0].name(run._labs[0].prefix + "q")
    monkeypatch.setattr("unibus_contracts.cleanup.delete_of", lambda scheme: slow)
    task = asyncio.ensure_future(run.remove())
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert run.document["targets"][0]["left"] == f"what begins with {run._labs[0].prefix!r}: broken off"


def test_a_password_goes_to_the_child_and_nowhere_else() -> None:
    [target] = targets("amqp://me:p%40ss%2Fword@a.example,b.example:5673/v%2F1?heartbeat=5")
    assert target.text() == "amqp://me:p%40ss%2Fword@a.example,b.example:5673/v%2F1?heartbeat=5"
    assert "p@ss" not in repr(target) + json.dumps(target.told())
    [other] = targets("sqs://eu-west-1?endpoint_url=http://user:hunter22@127.0.0.1:1")
    assert "hunter22" not in repr(other) + json.dumps(other.told())
    assert "p%40ss" not in repr(target) + json.dumps(target.told())
    assert json.loads(order(target, "p.", "q", ack=1, hold=2))["url"] == target.text()


@pytest.mark.parametrize("name", ["rabbit", "missing.toml", "nonsense://x"])
def test_what_is_no_target_is_said_before_anything_starts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(name: str) -> None:
        raise AssertionError("nothing may be started")

    monkeypatch.setattr(supply, "start", start)
    with pytest.raises(ConfigError, match=name.partition(":")[0]):
        resolve(["redis", name])


class FakeBroker:
    """What the supply hands out."""

    def __init__(self, stopped: list[str], name: str) -> None:
        self.url, self.source, self.name, self._stopped = f"memory://{name}", "native", name, stopped

    def stop(self) -> None:
        self._stopped.append(self.name)


def test_only_what_was_started_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    from unibus_contracts.compare.targets import stop

    stopped: list[str] = []

    def running(names: list[str]) -> list[FakeBroker]:
        if names == ["redis"]:
            return [FakeBroker(stopped, "redis")]
        raise supply.SupplyError("not running")

    monkeypatch.setattr(supply, "running", running)
    monkeypatch.setattr(supply, "start", lambda name: FakeBroker(stopped, name))
    found, started = resolve(["redis", "sqs", "memory://x"])
    assert [target.emulator for target in found] == [None, "SQS/SNS on ministack", None]
    stop(started)
    assert stopped == ["sqs"]


def test_a_server_in_place_of_the_service_is_no_service() -> None:
    [target] = targets("sqs://eu-west-1?endpoint_url=http://user:secret@127.0.0.1:1")
    assert target.emulator == "sqs at 127.0.0.1:1, not the service itself"
    assert "secret" not in json.dumps(target.told())


@pytest.fixture
def answering() -> Iterator[Callable[[int, bytes], str]]:
    """Servers that answer so to everybody."""
    servers: list[ThreadingHTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status if self.path == "/_ministack/health" else 404)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_an_emulator_that_tells_its_name_has_it(
    answering: Callable[[int, bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the environment names it, and nothing of it is known to the supply."""
    host = answering(200, b'{"services": {"sqs": "available"}}')
    url = f"sqs://eu-west-1?endpoint_url=http://{host}"
    assert [target.emulator for target in targets(url)] == ["SQS/SNS on ministack"]
    monkeypatch.setenv("UNIBUS_TEST_SQS_URL", url)
    assert [target.emulator for target in targets("sqs")] == ["SQS/SNS on ministack"]
    for status, body in ((200, b"{}"), (403, b'"sqs"')):
        other = answering(status, body)
        [target] = targets(f"sqs://eu-west-1?endpoint_url=http://{other}")
        assert target.emulator == f"sqs at {other}, not the service itself"


@pytest.mark.parametrize("url", ["memory://disguised?profile=sqs&lease=40", "memory://?profile=sqs&lease=40"])
async def test_a_profile_stays_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the probes, for the contracts, for a child that is to be killed: else a column says of memory what it calls by another name."""
    [target] = targets(url)
    run = Run([target], TINY, only={"largest body", "limits", "priority"})
    document = await run()
    [told] = document["targets"]
    assert (told["name"], told["adapter"], told["settings"]) == (
        "sqs in memory",
        "sqs",
        {"profile": "sqs", "lease": "40"},
    )
    found = cells(document)
    assert found["receiving.priority"]["level"] == "refused"
    assert found["limits.body"]["text"].endswith("declares 666 KiB")
    assert run._labs[0].known.lease.limit == 40
    again = parse(json.loads(order(target, "p.", "q"))["url"])
    child = Target("", again, target.settings).bus()
    async with child:
        assert (child.capabilities.adapter, child.capabilities.lease.limit) == ("sqs", 40)
    monkeypatch.setattr(contracts, "QUICK_LIMIT", 300.0)
    monkeypatch.setattr(contracts, "QUICK", ("logs::test_quiet",))
    outcome = await contracts.run(target, "cmp-x.", [], quick=True)
    assert outcome.error == ""
    assert (outcome.report["adapter"], outcome.report["features"]["priority"]["level"]) == ("sqs", "refused")


# The contracts as rows


def report(**outcomes: str) -> contracts.Outcome:
    entries = [
        {"id": name, "chapter": name.partition("_")[0], "outcome": outcome} for name, outcome in outcomes.items()
    ]
    return contracts.Outcome({"contracts": entries})


def test_a_chapter_of_the_contracts_is_a_row() -> None:
    good = report(publish_a="passed", publish_b="refused-as-declared", order_a="passed", bodies_a="not-run")
    bad = report(publish_a="failed", publish_b="passed", order_a="not-run")
    found = {
        row.id: states for row, states in contracts.rows([good, bad, contracts.Outcome(error="no way")], quick=True)
    }
    assert list(found) == ["contracts.order", "contracts.publish"]  # a quick run leaves bodies out
    (first, one), (second, two), (third, three) = found["contracts.publish"]
    assert (first, one.text, one.note) == ("measured", "1 kept, 1 refused", "refused: publish_b")
    assert (second, two.text, two.value) == ("failed", "1 kept, 1 broken", 1.0)
    assert (third, three.text) == ("failed", "no way")


def test_where_no_suite_could_run_that_is_a_row_too() -> None:
    [(row, [(state, found)])] = contracts.rows([contracts.Outcome(error="no report")], quick=False)
    assert (row.chapter, state, found.text) == ("contracts", "failed", "no report")


# What an application touches


def test_what_an_application_touches() -> None:
    bus = Bus("memory://", service="x", config=False, environ={}, channels=[Topic("t"), Queue("d", delayed=True)])

    @bus.responder(Queue("ask", str, reply=str))
    async def answer(body: str) -> str:
        return body

    assert touched(bus) == {"queue", "topic", "delayed", "reply"}


async def test_its_rows_come_first() -> None:
    run = run_of(
        probe(fine, name="other", touches=("ordered",)), probe(fine, name="fine", touches=("queue",)), touched={"queue"}
    )
    document = await run()
    document["rows"].sort(key=yours_first)
    assert [row["id"] for row in document["rows"]] == ["x.fine", "x.other"]


def test_percentiles() -> None:
    values = [float(n) for n in range(1, 1001)]
    assert [percentile(values, share) for share in (0.5, 0.99, 0.999)] == [500.0, 990.0, 999.0]
    assert percentile([7.0], 0.999) == 7.0


# The command


def test_the_command_writes_all_three(cli: Cli, tmp_path: Path) -> None:
    html, data = tmp_path / "page.html", tmp_path / "data.json"
    app = cli.app(APP)
    arguments = ("compare", "memory://", "--quick", "--only", "limits", "--json", str(data), "--html", str(html))
    done = cli(*arguments, "--app", app, url=None)
    assert done.code == 0, done
    assert "largest body" in done.out
    document = json.loads(data.read_text())
    assert document["finished"] is True
    assert {row["chapter"] for row in document["rows"]} == {"limits"}
    assert html.read_text().startswith("<!doctype html>")
    again = cli(*arguments, "--against", str(data), url=None)
    assert again.code == 0
    assert "nothing has changed since" in again.err


def test_the_command_says_what_it_could_not_delete(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an adapter of others that has nothing that deletes. What was measured counts all the same."""
    monkeypatch.setattr("unibus_contracts.cleanup.delete_of", lambda scheme: None)
    done = cli("compare", "memory://", "--quick", "--only", "key", url=None)
    assert done.code == 0, done
    assert "memory: not deleted: what begins with 'cmp-" in done.err


def test_what_of_a_file_is_not_used_is_said(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "shop.toml"
    file.write_text('url = "memory://"\n[queues.orders]\nconcurrency = 5\n[memory]\nlease = 5\n')
    done = cli("compare", str(file), "--only", "unroutable", url=None)
    assert done.code == 0
    assert f"{file}: [queues] not used: the comparison has channels of its own" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("memory://", "--only", "lattency"), "--only lattency"),
        (("rabbit",), "'rabbit'"),
        (("memory://", "--json", f"{__file__}/x.json"), f"{__file__}/x.json can't be written"),
        (("memory://", "--against", "no.json"), "no.json"),
    ],
)
def test_what_is_wrong_is_said_first(cli: Cli, arguments: tuple[str, ...], said: str) -> None:
    done = cli("compare", *arguments, url=None)
    assert done.code == 2
    assert said in done.err


def test_a_broker_that_can_not_be_reached_is_one_line(cli: Cli, tmp_path: Path) -> None:
    arguments = ("memory://", "redis://127.0.0.1:1", "--only", "unroutable", "--json", str(tmp_path / "new" / "x.json"))
    done = cli("compare", *arguments, url=None)
    assert done.code == 1
    assert [line for line in done.err.splitlines() if line.startswith("unibus: redis")] == [
        line for line in done.err.splitlines() if "unibus: redis://127.0.0.1:1: can't be reached: " in line
    ]
    assert (tmp_path / "new" / "x.json").exists()


def test_where_no_broker_answers(cli: Cli) -> None:
    done = cli("compare", "redis://127.0.0.1:1", "--only", "limits", url=None)
    assert done.code == 3
    assert "no broker could be reached" in done.err


def test_without_the_extra_it_says_what_to_install(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def fails(name: str, *rest: Any, **more: Any) -> Any:
        if name == "pytest_asyncio":
            raise ModuleNotFoundError("No module named 'pytest_asyncio'", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", fails)
    done = cli("compare", "memory://", url=None)
    assert done.code == 2
    assert "needs 'pytest_asyncio', which is not installed; pip install 'unibus[contracts]'" in done.err
