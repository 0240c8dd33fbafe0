"""The chaos machinery: its proxy does what it says, its faults prove that they bit, and its schedule follows from the seed."""

import asyncio
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unibus_contracts.chaos import faults, native, service, worker
from unibus_contracts.chaos.__main__ import main, summary
from unibus_contracts.chaos.faults import FAULTS, NOT_DRAWN, NOT_ON, NoBite, Stage, schedule
from unibus_contracts.chaos.proxy import Proxy
from unibus_contracts.chaos.run import Fault, Plan, Progress, Result, Run, proxied
from unibus_contracts.history import History, Recorder, Verdict
from unibus_contracts.supply import KINDS


@dataclass
class Echo:
    """A server that sends back what it gets, and counts it."""

    port: int
    got: bytearray


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    got = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1000):
                got.extend(data)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # the proxy resets connections, that is what it is for
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield Echo(server.sockets[0].getsockname()[1], got)


async def ask(proxy: Proxy, text: bytes = b"hello") -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        writer.write(text)
        return await reader.readexactly(len(text))
    finally:
        writer.close()


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.001)


async def test_it_passes_on_what_it_gets(echo: Echo) -> None:
    async with Proxy(("127.0.0.1", echo.port)) as proxy:
        assert await ask(proxy) == b"hello"
        assert proxy.accepted == 1


async def test_a_cut_resets_links_and_counts_those_in_use(echo: Echo) -> None:
    async with Proxy(("127.0.0.1", echo.port)) as proxy:
        assert proxy.cut() == 0
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        try:
            writer.write(b"x")
            await reader.readexactly(1)
            assert proxy.cut() == 1
            with pytest.raises(ConnectionResetError):
                await reader.readexactly(1)
        finally:
            writer.close()
        assert await ask(proxy) == b"hello"


async def test_silence_holds_back_and_later_passes_on(echo: Echo) -> None:
    async with Proxy(("127.0.0.1", echo.port)) as proxy:
        proxy.silent = True
        asked = asyncio.create_task(ask(proxy))
        await until(lambda: proxy.withheld == 5)
        assert echo.got == b""
        proxy.heal()
        assert await asked == b"hello"


async def test_mute_lets_requests_through_and_answers_not(echo: Echo) -> None:
    async with Proxy(("127.0.0.1", echo.port)) as proxy:
        proxy.mute = True
        asked = asyncio.create_task(ask(proxy))
        await until(lambda: proxy.withheld == 5)
        assert echo.got == b"hello"
        assert not asked.done()
        proxy.cut()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asked


async def test_a_tear_ends_in_the_middle_of_a_request(echo: Echo) -> None:
    async with Proxy(("127.0.0.1", echo.port)) as proxy:
        proxy.tear()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await ask(proxy, b"abcdefgh")
        assert proxy.torn == 1
        assert bytes(echo.got) in {b"", b"abcd"}  # a reset may overtake what was on its way
        assert await ask(proxy) == b"hello"


@pytest.mark.parametrize("fault", [{"delay": 0.05}, {"rate": 100.0}])
async def test_late_chunks_are_late(echo: Echo, fault: dict[str, float]) -> None:
    loop = asyncio.get_running_loop()
    async with Proxy(("127.0.0.1", echo.port)) as proxy:
        for name, value in fault.items():
            setattr(proxy, name, value)
        began = loop.time()
        assert await ask(proxy) == b"hello"
        assert loop.time() - began >= 0.1  # both ways
        assert proxy.late == 2


async def test_a_line_that_was_narrow_is_not_so_for_long_after_it_was_healed(echo: Echo) -> None:
    """What is on its way is in small pieces: else a run would take the proxy's slowness for the product's."""
    async with Proxy(("127.0.0.1", echo.port)) as proxy:
        proxy.rate = 40_000.0
        asked = asyncio.create_task(ask(proxy, bytes(1_000_000)))  # 25 s at that rate, each way
        await until(lambda: proxy.late >= 2)
        proxy.heal()
        async with asyncio.timeout(10):
            assert await asked == bytes(1_000_000)


async def test_an_end_is_passed_on_and_held_back_by_silence(echo: Echo) -> None:
    async with Proxy(("127.0.0.1", echo.port)) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        try:
            proxy.silent = True
            writer.write(b"x")
            writer.write_eof()
            await until(lambda: proxy.withheld == 1)
            assert len(proxy.links) == 1
            proxy.heal()
            assert await reader.read() == b"x"  # the server has ended too
        finally:
            writer.close()
        await until(lambda: not proxy.links)


async def test_more_than_a_peer_takes_waits_in_its_kernel_and_arrives(echo: Echo) -> None:
    async with Proxy(("127.0.0.1", echo.port)) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        try:
            sent = bytes(range(256)) * 40_000
            writer.write(sent)  # nobody reads the answers yet
            await until(lambda: proxy.links and all(link.client._holds or link.server._holds for link in proxy.links))
            assert await reader.readexactly(len(sent)) == sent
        finally:
            writer.close()


async def test_a_server_that_is_down_is_down_behind_the_proxy_too() -> None:
    async with Proxy(("127.0.0.1", 1)) as proxy:
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await ask(proxy)


# Faults


def stage(proxy: Proxy, **more: Any) -> Stage:
    return Stage(SimpleNamespace(**more), proxy, more.get("consumers", []), random.Random(1), 0.02)  # type: ignore[arg-type]  # noqa: S311


@pytest.mark.parametrize("name", ["cut", "torn", "silent", "unanswered", "late", "narrow"])
async def test_a_fault_that_meets_no_work_does_not_bite(echo: Echo, name: str) -> None:
    async with Proxy(("127.0.0.1", echo.port)) as proxy:
        with pytest.raises(NoBite, match=r"^no "):
            async with FAULTS[name](stage(proxy)):
                pass


@pytest.mark.parametrize("name", ["silent", "unanswered", "late", "narrow"])
async def test_a_fault_that_meets_work_says_what_it_did(echo: Echo, name: str) -> None:
    async with Proxy(("127.0.0.1", echo.port)) as proxy:
        at = stage(proxy)
        async with FAULTS[name](at):
            asked = asyncio.create_task(ask(proxy))
            await until(lambda: proxy.withheld or proxy.late)
        assert int(at.proof.split()[0]) > 0
        assert not proxy.silent
        assert not proxy.mute
        assert proxy.delay == proxy.rate == 0.0
        await asyncio.gather(asked, return_exceptions=True)


async def test_a_stopped_process_is_seen_to_be_stopped_and_goes_on() -> None:
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)
    async with Proxy(("127.0.0.1", 1)) as proxy:
        at = stage(proxy, pid=child.pid)
        async with faults.broker_hangs(at):
            assert faults._state(child.pid) == "T"
        assert at.proof == f"process {child.pid} was stopped"
    await child.communicate(b"\n")
    assert child.returncode == 0


async def test_a_broker_that_was_not_killed_is_no_fault() -> None:
    async with Proxy(("127.0.0.1", 1)) as proxy:
        at = stage(proxy, pid=7, kill=lambda: None, restart=lambda: None)
        with pytest.raises(NoBite, match="the server's process is 7, before it was 7"):
            async with faults.broker_killed(at):
                pass


@pytest.mark.parametrize(("status", "bites"), [(-signal.SIGKILL, True), (1, False)])
async def test_a_consumer_that_had_ended_was_not_killed(status: int, bites: bool) -> None:
    started = []

    class Victim:
        name = "consumer0.1"

        async def kill(self) -> int:
            return status

        async def start(self) -> None:
            started.append(self.name)

    async with Proxy(("127.0.0.1", 1)) as proxy:
        at = stage(proxy, consumers=[Victim()])
        if bites:
            async with faults.consumer_killed(at):
                assert at.proof == "consumer0.1 was killed"
            assert started == ["consumer0.1"]
        else:
            with pytest.raises(NoBite, match="had ended by itself, with status 1"):
                async with faults.consumer_killed(at):
                    pass


# The schedule and the run


def test_the_seed_decides() -> None:
    assert schedule("kafka", 7, 25) == schedule("kafka", 7, 25)
    assert schedule("kafka", 7, 10) != schedule("kafka", 8, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_comes_once_before_any_comes_again(kind: str) -> None:
    possible = set(faults.possible(kind)) - set(NOT_DRAWN.get(kind, ()))
    assert set(schedule(kind, 3, len(possible))) == possible


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_made_says_why_and_is_not_drawn(kind: str) -> None:
    assert all(NOT_ON[kind].values())
    assert not set(NOT_ON[kind]) & set(faults.possible(kind))


@pytest.mark.parametrize(
    ("name", "variables", "through"),
    [
        ("amqp", {"A_URL": "amqp://u:p@127.0.0.1:{port}/"}, "amqp://u:p@127.0.0.1:{proxy}/"),
        ("redis", {"A_URL": "redis://u:p@127.0.0.1:{port}/0"}, "redis://u:p@127.0.0.1:{proxy}/0"),
        (
            "sqs",
            {"A_URL": "sqs://u:p@eu-west-1?endpoint_url=http://127.0.0.1:{port}&wait=1"},
            "sqs://u:p@eu-west-1?endpoint_url=http%3A%2F%2F127.0.0.1%3A{proxy}&wait=1",
        ),
        ("kafka", {"A_URL": "kafka://u:p@127.0.0.1:1", "A_PROXY": "0:{port}"}, "kafka://u:p@127.0.0.1:{proxy}"),
    ],
)
async def test_the_url_leads_through_the_proxy(echo: Echo, name: str, variables: dict[str, str], through: str) -> None:
    told = {key: value.format(port=echo.port) for key, value in variables.items()}
    broker = SimpleNamespace(name=name, url=told["A_URL"], variables=told)
    async with proxied(broker) as (proxy, url):  # type: ignore[arg-type]  # the part of a broker that it needs
        assert url == through.format(proxy=proxy.port)
        assert await ask(proxy) == b"hello"


async def test_what_a_run_still_owes(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    with Recorder(tmp_path, "p") as recorder:
        for number, place in enumerate(("work", "told", "work"), 1):
            with recorder.during("send", value=f"p-{number}", place=place):
                pass
        await progress.read()
        assert len(progress.owed) == 4  # the topic has two groups
        with recorder.during("handle", value="p-2", place="told", group="audit", attempt=1):
            pass
        for attempt in range(1, service.POLICY.max_retries + 2):
            with pytest.raises(service.Refusal), recorder.during("handle", value="p-3", place="work", attempt=attempt):
                raise service.Refusal
            await progress.read()
            dead = attempt == service.POLICY.max_retries + 1
            assert ("p-3", "") not in progress.owed if dead else ("p-3", "") in progress.owed
        assert set(progress.owed) == {("p-1", ""), ("p-2", "billing")}
        assert progress.handled == 1


async def test_work_goes_on_when_a_message_that_was_sent_afterwards_is_handled(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    with Recorder(tmp_path, "a") as consumer, Recorder(tmp_path, "b") as producer:

        def send(value: str) -> None:
            with producer.during("send", value=value, place="work"):
                pass

        def handle(value: str) -> int:
            with consumer.during("handle", value=value, place="work", attempt=1):
                pass
            return time.monotonic_ns()

        send("p-1")
        healed = time.monotonic_ns()
        progress.heal(healed)
        handle("p-1")  # it had been on the broker all the time
        await progress.read()
        flows = [progress.flowing]
        send("p-2")
        last = handle("p-2")
        await progress.read()
        first = progress.flowing
        assert flows == [None]
        assert first is not None
        assert healed < first <= last
        send("p-3")
        handle("p-3")
        await progress.read()
        assert progress.flowing == first


async def test_each_channel_that_goes_on_is_seen(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    with Recorder(tmp_path, "a") as recorder:
        progress.heal(time.monotonic_ns())
        with recorder.during("handle", value="p-1", place="told", group="audit", attempt=1):
            pass
        with pytest.raises(service.Refusal), recorder.during("handle", value="p-2", place="work", attempt=1):
            raise service.Refusal
        await progress.read()
        assert list(progress.again) == [("told", "audit")]


async def test_a_worker_notices_that_its_loop_stood_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_STALL", 0.2)
    with Recorder(tmp_path, "c") as recorder:
        noticing = asyncio.create_task(worker.notice_stalls(recorder))
        await asyncio.sleep(0)
        time.sleep(0.5)  # noqa: ASYNC251  # that is the stall
        await until(lambda: list(History(tmp_path)))
        noticing.cancel()
        await asyncio.gather(noticing, return_exceptions=True)
    told = next(iter(History(tmp_path)))
    assert (told.what, told.kind) == ("stalled", "ok")
    assert float(told.detail) > 0.3


def test_pulses_are_never_behind_others() -> None:
    assert service.place_of("pulse.1-7") is service.pulse
    assert service.place_of("asker.1-7") is service.asks
    assert {service.pulse, service.asks}.isdisjoint(service.place_of(f"producer.1-{count}") for count in range(8))


def test_minutes_repeat_the_faults_until_they_are_over(tmp_path: Path) -> None:
    whole = Run(Plan("redis", 7, 100, ["cut", "torn"]), tmp_path / "a", print)
    assert list(whole._schedule()) == ["cut", "torn"]
    timed = Run(Plan("redis", 7, 100, ["cut", "torn"], minutes=60), tmp_path / "b", print)
    assert list(islice(timed._schedule(), 5)) == ["cut", "torn", "cut", "torn", "cut"]
    over = Run(Plan("redis", 7, 100, ["cut", "torn"], minutes=-1), tmp_path / "c", print)
    assert list(over._schedule()) == []


@pytest.mark.parametrize(
    ("name", "where", "group"),
    [
        ("chaos-1-work", "stored", ""),
        ("chaos-1-work.dlq", "dead", ""),
        ("{chaos-1-work}.dlq", "dead", ""),
        ("chaos-1-told.audit.dlq", "dead", "audit"),
        ("chaos-1-told_-billing_-dlq", "dead", "billing"),
        ("chaos-1-told.audit.invalid", "invalid", "audit"),
        ("{chaos-1-told}:delayed:messages", "stored", ""),
        ("chaos-1-told.auditors", "stored", ""),
    ],
)
def test_what_lies_where_on_a_broker_follows_from_names(name: str, where: str, group: str) -> None:
    found = native._found(b'{"value":"p-1","key":"k"}', name)
    assert found is not None
    assert (found.value, found.where, found.group(service.GROUPS)) == ("p-1", where, group)


def test_a_body_within_another_is_found_and_a_foreign_one_is_not() -> None:
    found = native._found(rb'{"body":"{\"value\":\"p-7\",\"key\":1}"}', "x")
    assert found is not None
    assert found.value == "p-7"
    assert native._found(b"sentinel", "x") is None


def test_some_messages_fail_and_all_processes_agree_which() -> None:
    always = [n for n in range(2000) if service.fails(f"p-{n}", 4)]
    once = [n for n in range(2000) if service.fails(f"p-{n}", 1) and n not in always]
    assert len(always) == 4
    assert len(once) == 21
    assert not any(service.fails(f"p-{n}", 2) for n in once)


def test_a_pass_needs_consumers_that_end_as_they_should() -> None:
    plan = Plan("redis", 7, 100, ["cut"])
    result = Result(
        plan, Verdict("kept", (), {"sent": 100}), [Fault("cut", "3 links were cut", 0.1, 0.2)], "redis", "7.0"
    )
    assert result.passed
    assert summary(result) == [
        "redis 7.0, 0.0 s",
        "  cut: 3 links were cut; 0.1 s until new messages were handled, 0.2 s until each channel went on",
        "kept",
        "  sent: 100",
    ]
    unclean = replace(result, unclean=["consumer0.1 ended with status 1 after SIGTERM"])
    assert not unclean.passed
    assert '"passed": false' in unclean.as_json()


def test_a_fault_that_cannot_be_made_is_said_before_anything_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["sqs", "--only", "broker-killed"])
    assert "broker-killed can't be made on sqs: the emulator keeps nothing" in capsys.readouterr().err
