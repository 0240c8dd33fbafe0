"""The faults beyond the network: each does what it says to a worker or an answer, proves it, and heals."""

import asyncio
import http.client
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unibus import Bus, Queue
from unibus.adapter import Outcome, Outgoing, Source
from unibus.clock import SystemClock
from unibus.message import Message
from unibus_contracts.chaos import http_faults, kafka_faults, process_faults, rabbitmq_faults, redis_faults, traps
from unibus_contracts.chaos.faults import FAULTS
from unibus_contracts.chaos.proxy import Answer, Proxy, Request
from unibus_contracts.chaos.stage import NoBite, Stage
from unibus_contracts.chaos.traps import Traps, order_file, report_file, write
from unibus_contracts.chaos.workers import Worker


def stage(proxy: Any = None, consumers: Any = (), seed: int = 1, **broker: Any) -> Stage:
    return Stage(SimpleNamespace(**broker), proxy, list(consumers), random.Random(seed), 0.02)  # type: ignore[arg-type]  # noqa: S311


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.001)


# Traps, inside of a worker


class Trapped:
    """A bus whose adapter is wrapped, in this process: it is told to die, and doesn't."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.killed = folder, list[tuple[int, int]]()
        self.queue = Queue("q", bytes)
        self.bus = Bus("memory://", config=False, environ={}, channels=[self.queue])
        self.traps = Traps(folder, "me", lambda: None)
        monkeypatch.setattr(os, "kill", lambda pid, number: self.killed.append((pid, number)))

    async def obey(self, **order: Any) -> dict[str, Any]:
        write(order_file(self.folder, "me"), {"number": 1, **order})
        signal.raise_signal(signal.SIGUSR1)
        await until(lambda: self.report().get("order") == 1)
        return self.report()

    def report(self) -> dict[str, Any]:
        file = report_file(self.folder, "me")
        return dict(json.loads(file.read_text())) if file.exists() else {}


@pytest.fixture
async def trapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Trapped]:
    made = Trapped(tmp_path, monkeypatch)
    with made.traps.listening():
        async with made.bus:
            made.traps.set_into(made.bus)
            yield made


@pytest.mark.parametrize("point", traps.POINTS)
async def test_a_worker_dies_at_its_point_and_at_no_other(trapped: Trapped, point: str) -> None:
    await trapped.obey(die=point)
    adapter, died = trapped.bus.adapter, []
    subscription = await adapter.subscribe(Source(trapped.queue))

    def died_at(step: str) -> None:
        if trapped.killed:
            died.append(step)
            trapped.killed.clear()

    await trapped.bus.send(trapped.queue, b"x")
    died_at("sent")
    deliveries = await subscription.receive(1, 10.0)
    died_at("received")
    copy = Outgoing(trapped.queue, Message(b"x"), origin=deliveries[0])
    assert list(await adapter.send([copy], 10.0)) == [None]
    died_at("copied")
    await subscription.settle(Outcome.RELEASED, [])
    died_at("released")
    await subscription.settle(Outcome.ACCEPTED, deliveries)
    died_at("handled")
    assert died == [point]
    assert trapped.report() == {"died": point, "where": "queue 'q'"}
    await subscription.close()


async def test_a_copy_that_was_refused_is_no_copy(trapped: Trapped) -> None:
    await trapped.obey(die="copied")
    adapter = trapped.bus.adapter
    refused = Outgoing(Queue("elsewhere", bytes), Message(b"x"), origin=object())  # type: ignore[arg-type]  # any copy
    assert None not in await adapter.send([refused], 10.0)
    assert not trapped.killed


async def test_the_clock_of_the_product_is_wrong_until_told_otherwise(trapped: Trapped) -> None:
    assert (await trapped.obey(offset=-3600.0))["offset"] == pytest.approx(-3600, abs=30)
    assert trapped.bus._clock.time() == pytest.approx(time.time() - 3600, abs=30)
    trapped.report()
    report_file(trapped.folder, "me").unlink()
    assert (await trapped.obey())["offset"] == pytest.approx(0, abs=30)


def test_the_right_clock_is_back_at_the_end(tmp_path: Path) -> None:
    async def listen() -> None:
        with Traps(tmp_path, "me", lambda: None).listening():
            assert SystemClock.time is not right

    right = SystemClock.time
    asyncio.run(listen())
    assert SystemClock.time is right


async def test_a_loop_that_stood_still_says_how_long_and_what_it_held(trapped: Trapped) -> None:
    await trapped.obey(block=0.3)
    subscription = await trapped.bus.adapter.subscribe(Source(trapped.queue))
    await trapped.bus.send(trapped.queue, b"x")
    deliveries = await subscription.receive(1, 10.0)
    await until(lambda: "lag" in trapped.report())
    assert trapped.report()["held"] == 1
    assert trapped.report()["lag"] >= 0.25
    await subscription.settle(Outcome.ACCEPTED, deliveries)
    await subscription.close()


async def test_a_loop_without_work_is_blocked_all_the_same(trapped: Trapped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traps, "_PATIENCE", 0.01)
    await trapped.obey(block=0.1)
    await until(lambda: "lag" in trapped.report())
    assert trapped.report()["held"] == 0


# Faults of processes, on a worker that has a broker of its own in its memory


@asynccontextmanager
async def worker(folder: Path) -> AsyncIterator[Worker]:
    made = Worker("consume", folder, "consumer0", "", "memory://")
    await made.start()
    try:
        yield made
    finally:
        await made.kill()


async def test_orders_reach_a_worker_and_what_meets_no_work_does_not_bite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_faults, "_DIES", 0.1)
    async with worker(tmp_path) as one:
        at = stage(consumers=[one])
        async with FAULTS["clock-slow"](at):
            pass
        assert at.proof == "the clock of consumer0.1 was 3600 s slow"
        assert abs(process_faults.report(one)["offset"]) < 30
        with pytest.raises(NoBite, match="no consumer that had handled anything"):
            async with FAULTS["consumer-killed-handled"](at):
                pass
        assert one.process.returncode is None
        async with FAULTS["rolling-restart"](at):
            pass
        assert at.proof == "consumer0.1 ended by SIGTERM and were replaced"
        assert one.name == "consumer0.2"
        async with FAULTS["scaled"](at):
            pass
        assert at.proof.endswith(".1 came and left")


class Victim:
    """A consumer that does at once what it is told, or nothing."""

    def __init__(self, folder: Path, *, dies: bool) -> None:
        self.folder, self.name, self.pid, self.started = folder, "consumer0.1", 0, 0
        self.process = SimpleNamespace(wait=self.wait)
        self._dies = dies

    def obey(self, pid: int, number: int) -> None:
        assert (pid, number) == (0, signal.SIGUSR1)
        order = json.loads(order_file(self.folder, self.name).read_text())
        if self._dies and "die" in order:
            write(report_file(self.folder, self.name), {"died": order["die"], "where": "queue 'q'"})
        else:
            write(report_file(self.folder, self.name), {"order": order["number"], "offset": 7.0})

    async def wait(self) -> int:
        return -signal.SIGKILL

    async def start(self) -> None:
        self.started += 1


@pytest.mark.parametrize("point", traps.POINTS)
async def test_a_consumer_that_died_at_the_point_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    victim = Victim(tmp_path, dies=True)
    monkeypatch.setattr(os, "kill", victim.obey)
    at = stage(consumers=[victim])
    async with FAULTS[f"consumer-killed-{point}"](at):
        pass
    assert at.proof == f"consumer0.1 was killed when it had {point} messages of queue 'q'"
    assert victim.started == 1


async def test_a_clock_that_was_not_moved_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = Victim(tmp_path, dies=False)
    monkeypatch.setattr(os, "kill", victim.obey)
    with pytest.raises(NoBite, match=r"was off by 7\.0 s, not by 3600"):
        async with FAULTS["clock-fast"](stage(consumers=[victim])):
            pass


# Answers of HTTP


class Server:
    """Keeps what it is asked, and answers a batch as SQS does."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().strip().split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers["content-length"]))
                method, path, _ = first.split()
                self.asked.append(Request(method, path, headers, body))
                entries = json.loads(body).get("Entries", ())
                said = json.dumps({"Successful": [{"Id": entry["Id"]} for entry in entries]}).encode()
                writer.write(Answer(200, said).written())
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()


@pytest.fixture
async def behind() -> AsyncIterator[tuple[Server, Proxy]]:
    server = Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with listening, Proxy(("127.0.0.1", listening.sockets[0].getsockname()[1])) as proxy:
        yield server, proxy


def post(proxy: Proxy, operation: str, entries: int, *, json_: bool = True) -> tuple[int, Any]:
    link = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
    try:
        body = json.dumps({"Entries": [{"Id": str(number)} for number in range(entries)]})
        link.request("POST", "/", body, {"X-Amz-Target": f"AmazonSQS.{operation}"} if json_ else {})
        answer = link.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if text.startswith("{") else text
    finally:
        link.close()


async def test_what_no_fault_is_for_passes_on(behind: tuple[Server, Proxy]) -> None:
    server, proxy = behind
    status, said = await asyncio.to_thread(post, proxy, "SendMessageBatch", 2)
    assert (status, [entry["Id"] for entry in said["Successful"]]) == (200, ["0", "1"])
    with pytest.raises(NoBite, match="no requests met the fault"):
        async with FAULTS["http-500"](stage(proxy)):
            pass
    assert proxy.judge is None
    assert len(server.asked) == 1


@pytest.mark.parametrize(("name", "status"), [("http-500", 500), ("http-503", 503), ("http-throttled", 400)])
@pytest.mark.parametrize("json_", [True, False])
async def test_the_bad_answers(
    behind: tuple[Server, Proxy], monkeypatch: pytest.MonkeyPatch, name: str, status: int, json_: bool
) -> None:
    _, proxy = behind
    monkeypatch.setattr(http_faults, "_SHARE", 1.0)
    monkeypatch.setattr(http_faults.Service.drawn, "__defaults__", (1.0,))
    at = stage(proxy)
    async with FAULTS[name](at):
        answered, said = await asyncio.to_thread(post, proxy, "SendMessage", 0, json_=json_)
    assert answered == status
    if name != "http-503":
        assert ("__type" in said) if json_ else said.startswith("<ErrorResponse>")
    assert at.proof.startswith("1 were ")


async def test_a_500_may_have_been_carried_out(behind: tuple[Server, Proxy]) -> None:
    server, proxy = behind
    at = stage(proxy)
    async with FAULTS["http-500"](at):
        found = [(await asyncio.to_thread(post, proxy, "SendMessage", 0))[0] for _ in range(40)]
    bad = found.count(500)
    carried_out = len(server.asked) - found.count(200)
    assert 0 < carried_out < bad < 40
    told = {text: int(count) for count, _, text in (part.partition(" ") for part in at.proof.split("; "))}
    assert told["were answered with 500 though they had been carried out"] == carried_out
    assert sum(told.values()) == bad


async def test_an_answer_that_ends_in_its_middle(behind: tuple[Server, Proxy]) -> None:
    server, proxy = behind
    at = stage(proxy)
    torn = 0
    async with FAULTS["http-torn"](at):
        for _ in range(60):
            try:
                await asyncio.to_thread(post, proxy, "SendMessage", 0)
            except (http.client.HTTPException, ConnectionError):
                torn += 1
    assert len(server.asked) == 60
    assert at.proof == f"{torn} were cut off in the middle of their answer"


async def test_what_is_late_is_carried_out_all_the_same(
    behind: tuple[Server, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, proxy = behind
    monkeypatch.setattr(http_faults, "_LATE", 0.001)
    at = stage(proxy)
    async with FAULTS["http-late"](at):
        for _ in range(60):
            assert (await asyncio.to_thread(post, proxy, "SendMessage", 0))[0] == 200
    assert len(server.asked) == 60
    assert at.proof.endswith("were carried out 0 s late")


async def test_lateness_is_over_when_the_last_request_is_carried_out(
    behind: tuple[Server, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the time that a run takes to recover would be that of the fault."""
    server, proxy = behind
    monkeypatch.setattr(http_faults, "_LATE", 0.3)
    met: list[bool] = []

    def drawn(*_: object) -> bool:
        met.append(True)
        return True

    monkeypatch.setattr(http_faults.Service, "drawn", drawn)
    at = stage(proxy)
    async with FAULTS["http-late"](at):
        asking = asyncio.create_task(asyncio.to_thread(post, proxy, "SendMessage", 0))
        await until(lambda: bool(met))
    assert len(server.asked) == 1
    assert (await asking)[0] == 200


async def test_some_entries_of_a_batch_fail_and_were_not_carried_out(behind: tuple[Server, Proxy]) -> None:
    server, proxy = behind
    at = stage(proxy)
    failed = 0
    async with FAULTS["http-partial"](at):
        for _ in range(20):
            before = len(server.asked)
            status, said = await asyncio.to_thread(post, proxy, "DeleteMessageBatch", 10)
            assert status == 200
            refused = {entry["Id"] for entry in said.get("Failed", ())}
            failed += len(refused)
            assert refused | {entry["Id"] for entry in said["Successful"]} == set(map(str, range(10)))
            carried_out = [
                entry["Id"] for request in server.asked[before:] for entry in json.loads(request.body)["Entries"]
            ]
            assert not refused & set(carried_out)
            assert len(carried_out) == 10 - len(refused)
        assert (await asyncio.to_thread(post, proxy, "SendMessage", 0))[0] == 200
    assert failed > 20
    assert at.proof == f"{failed} entries of batches failed"


async def test_a_request_in_many_pieces_is_judged_as_one(behind: tuple[Server, Proxy]) -> None:
    _, proxy = behind
    judged: list[Request] = []

    async def judge(request: Request) -> Answer:
        judged.append(request)
        return Answer(200, b"{}")

    proxy.judge = judge
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    for piece in (b"POST /a HT", b"TP/1.1\r\nContent-", b"Length: 6\r\n\r", b"\nab", b"cdef"):
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.01)  # apart on the wire, as a rule; the result is the same where they are not
    assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
    writer.close()
    assert [(request.method, request.path, request.body) for request in judged] == [("POST", "/a", b"abcdef")]


# What only one kind of broker knows, with a stand-in for the server


class FakeRedis:
    """Counts its refusals, as the server does: one more whenever it is asked to."""

    def __init__(self, *, refuses: bool) -> None:
        self.settings: list[tuple[str, str]] = []
        self._refuses, self._count = refuses, 3

    async def config_set(self, name: str, value: str) -> None:
        self.settings.append((name, value))
        self._count += self._refuses

    async def info(self, section: str) -> dict[str, Any]:
        assert section == "errorstats"
        return {"errorstat_OOM": {"count": self._count}}


@pytest.mark.parametrize("refuses", [True, False])
async def test_a_server_without_memory_has_to_refuse_something(monkeypatch: pytest.MonkeyPatch, refuses: bool) -> None:
    fake = FakeRedis(refuses=refuses)

    @asynccontextmanager
    async def client(_: Stage) -> AsyncIterator[FakeRedis]:
        yield fake

    monkeypatch.setattr(redis_faults, "_client", client)
    at = stage()
    if refuses:
        async with FAULTS["redis-memory-full"](at):
            assert fake.settings == [("maxmemory", "1")]
        assert at.proof == "2 commands were refused with OOM: its maxmemory is reached"
    else:
        with pytest.raises(NoBite, match="no commands were refused with OOM"):
            async with FAULTS["redis-memory-full"](at):
                pass
    assert fake.settings[-1] == ("maxmemory", "0")


@pytest.mark.parametrize(
    ("state", "bites"),
    [
        ("{[{{resource_limit, memory, n@localhost}, []}], [blocked, blocking, blocked]}", True),
        ("{[{{resource_limit,memory,n@localhost},[]}],[blocking]}", False),
        ("{[], [blocked]}", False),
    ],
)
async def test_an_alarm_has_to_block_somebody_and_is_lifted(
    monkeypatch: pytest.MonkeyPatch, state: str, bites: bool
) -> None:
    asked: list[str] = []

    async def evaluate(_: Stage, expression: str) -> str:
        asked.append(expression)
        return state if "get_alarms" in expression else "0.4"

    monkeypatch.setattr(rabbitmq_faults, "evaluate", evaluate)
    monkeypatch.setattr(rabbitmq_faults, "_BLOCKED", 0.05)
    at = stage()
    if bites:
        async with FAULTS["rabbitmq-memory-alarm"](at):
            pass
        assert at.proof == "2 connections were blocked by the memory alarm"
    else:
        with pytest.raises(NoBite):
            async with FAULTS["rabbitmq-memory-alarm"](at):
                pass
    assert asked[-1] == "vm_memory_monitor:set_vm_memory_high_watermark(0.4)"


@pytest.mark.parametrize("generations", [[4, 6, 8], [4, 4]])
async def test_a_storm_has_to_change_the_group(monkeypatch: pytest.MonkeyPatch, generations: list[int]) -> None:
    left = list(generations)

    async def visit(_: Stage, name: str) -> int:
        assert name == "p-work"
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    monkeypatch.setattr(kafka_faults, "_visit", visit)
    at = stage(consumers=[SimpleNamespace(prefix="p-")])
    if generations[-1] > generations[0]:
        async with FAULTS["kafka-rebalances"](at):
            await until(lambda: not left)
        assert at.proof == "the group went from generation 4 to 8 by 3 visits"
    else:
        with pytest.raises(NoBite, match="did not change"):
            async with FAULTS["kafka-rebalances"](at):
                await until(lambda: not left)


async def test_what_ends_a_storm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def visit(_: Stage, name: str) -> int:
        raise OSError(f"no way to {name}")

    monkeypatch.setattr(kafka_faults, "_visit", visit)
    with pytest.raises(OSError, match="no way to p-work"):
        async with FAULTS["kafka-rebalances"](stage(consumers=[SimpleNamespace(prefix="p-")])):
            pass


def test_the_small_disk_has_room_for_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.aof").write_bytes(bytes(1000))
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "b.aof").write_bytes(bytes(500))
    assert redis_faults._size(tmp_path) == 1500
