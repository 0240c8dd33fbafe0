"""The real `unibus` as its users call it, in processes of its own, on every broker of the supply: one body for all."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from tests.integration.with_us import WITH_US

BROKERS = ("RABBITMQ", "KAFKA", "REDIS", "SQS")
FACTOR = float(os.environ.get("UNIBUS_TEST_TIMEOUT_FACTOR", "1"))
SOON = 60.0 * FACTOR
UNIBUS = str(Path(sys.executable).with_name("unibus"))

APP = """
    import asyncio, os, signal
    from pathlib import Path
    from pydantic import BaseModel
    from unibus import Bus, Queue, RetryPolicy, Topic

    class Order(BaseModel):
        id: str
        total: int = 1

    bus = Bus(service="billing")
    folder = Path(__file__).parent

    def note(text: str) -> None:
        with (folder / "journal").open("a") as file:
            file.write(f"{os.getpid()} {text}\\n")

    @bus.consumer(Queue("orders", Order), retry=RetryPolicy(max_retries=0))
    async def handle(order: Order) -> None:
        note(f"begins {order.id}")
        if order.id.startswith("slow"):
            while not (folder / "go").exists():
                await asyncio.sleep(0.02)
        if order.id == "killer" and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if order.total < 0:
            raise ValueError("negative total")
        if order.total == 0:
            raise KeyError("nothing to pay")
        note(f"ends {order.id}")

    @bus.subscriber(Topic("charged", str))
    async def bill(event: str) -> None:
        note(f"billed {event}")
"""

pytestmark = pytest.mark.timeout(300 * FACTOR)


class Terminal:
    """A folder with an application and a unibus.toml; names of its own on the broker."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("UNIBUS_")}
        self.environ["UNIBUS_URL"] = url
        (folder / "shop.py").write_text(dedent(APP), encoding="utf-8")
        prefix = f"cli{secrets.token_hex(4)}."
        (folder / "unibus.toml").write_text(f'app = "shop:bus"\nprefix = "{prefix}"\n', encoding="utf-8")

    def __call__(self, *arguments: str, text: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [UNIBUS, *arguments],
            cwd=self.folder,
            env=self.environ,
            input=text,
            capture_output=True,
            text=True,
            timeout=SOON,
            check=False,
        )
        assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def lines(self, *arguments: str, text: str = "") -> list[Any]:
        return [json.loads(line) for line in self(*arguments, text=text).stdout.splitlines()]

    def channel(self, name: str) -> dict[str, Any]:
        (row,) = self.lines("channels", name, "--json")[0]["channels"]
        assert isinstance(row, dict)
        return row

    @property
    def journal(self) -> list[list[str]]:
        """Process, event, what."""
        path = self.folder / "journal"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def until(condition: Callable[[], object], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


class Service:
    """`unibus run` as a child."""

    def __init__(self, terminal: Terminal, *arguments: str) -> None:
        self.log = terminal.folder / f"log{secrets.token_hex(2)}"
        with self.log.open("w") as log:
            command = [*WITH_US, UNIBUS, "run", *arguments]
            self.process = subprocess.Popen(command, cwd=terminal.folder, env=terminal.environ, stdout=log, stderr=log)

    def says(self, text: str, times: int = 1) -> None:
        until(lambda: self.log.read_text().count(text) >= times or self.process.poll() is not None, self.log.read_text)
        assert self.log.read_text().count(text) >= times, self.log.read_text()

    def ends(self) -> int:
        return self.process.wait(SOON)


@pytest.fixture(params=BROKERS)
def terminal(request: pytest.FixtureRequest, tmp_path: Path) -> Terminal:
    """A broker that was to be tested and isn't there is a failure, not a skip."""
    variable = f"UNIBUS_TEST_{request.param}_URL"
    url = os.environ.get(variable)
    if not url:
        pytest.fail(f"{variable} is not set; `make brokers-up` starts a broker and prints it")
    return Terminal(tmp_path, url)


@pytest.fixture
def services() -> Iterator[list[Service]]:
    """None of them is left behind."""
    started: list[Service] = []
    yield started
    for service in started:
        if service.process.poll() is None:
            service.process.terminate()
            try:
                service.process.wait(SOON)
            except subprocess.TimeoutExpired:
                service.process.kill()
                service.process.wait()


def test_messages_and_dead_letters(terminal: Terminal, services: list[Service]) -> None:
    # What it would make, and that it makes it.
    dry = terminal.lines("declare", "--dry-run", "--json")[0]["objects"]
    assert {one["state"] for one in dry} <= {"missing", "unknown"}
    assert all(one["rights"] for one in dry)
    missing = terminal("send", "orders", '{"id": "o-1"}', code=1)
    assert len(missing.stderr.splitlines()) == 1
    assert "orders" in missing.stderr
    made = terminal.lines("declare", "--json")[0]["objects"]
    assert [one["name"] for one in made] == [one["name"] for one in dry]
    assert "objects that it needs are there" in terminal("doctor").stdout

    # Through a pipe and back.
    orders = '{"body": {"id": "o-1"}}\n{"body": {"id": "bad", "total": -1}}\n{"body": {"id": "worse", "total": 0}}\n'
    terminal("send", "orders", "-k", "c42", "-H", "tenant=north", text=orders)
    row = terminal.channel("orders")
    assert (row["exists"], row["ready"]) == (True, 3)
    peeked = terminal.lines("peek", "orders")
    assert sorted(line["body"]["id"] for line in peeked) == ["bad", "o-1", "worse"]
    assert "1 message given back" in terminal("receive", "orders").stderr
    taken = terminal("receive", "orders", "-n", "4", "--wait", "2", "--ack")
    lines = [json.loads(line) for line in taken.stdout.splitlines()]
    assert {line["id"] for line in lines} == {line["id"] for line in peeked}
    assert {(line["key"], line["headers"]["tenant"]) for line in lines} == {("c42", "north")}
    assert terminal.channel("orders")["ready"] == 0
    terminal("send", "orders", text=taken.stdout)

    # A service, its dead letters, and where they go.
    services.append(service := Service(terminal))
    service.says("at work")
    terminal("publish", "charged", "hello")
    service.says("is a dead letter", times=2)
    until(
        lambda: {("ends", "o-1"), ("billed", "hello")} <= {tuple(e[1:]) for e in terminal.journal},
        service.log.read_text,
    )
    service.process.send_signal(signal.SIGTERM)
    assert service.ends() == 0, service.log.read_text()
    letters = {line["body"]["id"]: line for line in terminal.lines("dlq", "list", "orders", "--since", "1h")}
    assert letters.keys() == {"bad", "worse"}
    assert letters["bad"]["policy"]["x-original-error"] == "negative total"
    redriven = terminal("dlq", "redrive", "orders", "--error", "ValueError", "--rate", "10")
    assert "1 message redriven" in redriven.stderr
    row = terminal.channel("orders")
    assert (row["ready"], row["dead_letters"]) == (1, 1)
    (back,) = terminal.lines("peek", "orders")
    assert (back["id"], back["policy"]) == (letters["bad"]["id"], {"x-redrive-count": "1"})
    terminal("dlq", "purge", "orders", code=2)  # nobody is there to be asked
    assert "1 message deleted" in terminal("dlq", "purge", "orders", "--yes").stderr
    assert terminal.lines("dlq", "list") == []


def test_workers(terminal: Terminal, services: list[Service]) -> None:
    """One that is killed is said, and started again. Drain on SIGTERM: what has begun is finished."""
    terminal("declare")
    services.append(service := Service(terminal, "--workers", "2"))
    service.says("at work", times=2)
    terminal("send", "orders", '{"id": "killer"}')
    service.says("was killed by SIGKILL; again in")
    service.says("at work", times=3)
    until(lambda: any(event[1:] == ["ends", "killer"] for event in terminal.journal), service.log.read_text)
    terminal("send", "orders", "--bodies", text="".join(f'{{"id": "slow-{n}"}}\n' for n in range(4)))
    until(lambda: any(event[1:] == ["begins", "slow-0"] for event in terminal.journal), service.log.read_text)
    service.process.send_signal(signal.SIGTERM)
    service.says("SIGTERM: draining\n", times=2)
    (terminal.folder / "go").touch()
    assert service.ends() == 0, service.log.read_text()
    assert service.log.read_text().count("drained") == 2
    slow = [event for event in terminal.journal if event[2].startswith("slow")]
    assert {(pid, what) for pid, event, what in slow if event == "begins"} == {
        (pid, what) for pid, event, what in slow if event == "ends"
    }


def test_a_broker_that_is_not_there(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, "amqp://guest:hunter2@127.0.0.1:1")
    for command in (
        ("channels",),
        ("send", "orders", '{"id": "x"}'),
        ("peek", "orders"),
        ("dlq", "list"),
        ("declare",),
    ):
        done = terminal(*command, code=3)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "127.0.0.1:1" in done.stderr
        assert "hunter2" not in done.stderr
    assert "127.0.0.1:1" in terminal("doctor", code=3).stdout
    assert "127.0.0.1:1" in terminal("run", code=3).stderr
    failed = terminal("run", "--workers", "2", code=3)
    assert "ended with code 3; so do the others" in failed.stderr


def test_workers_end_with_the_one_that_has_started_them(terminal_of_redis: Terminal, services: list[Service]) -> None:
    terminal = terminal_of_redis
    services.append(service := Service(terminal, "--workers", "2"))
    service.says("at work", times=2)
    service.process.kill()
    service.ends()
    until(lambda: service.log.read_text().count("drained") == 2, service.log.read_text)  # they outlive it


def test_a_second_signal_ends_it_at_once(terminal_of_redis: Terminal, services: list[Service]) -> None:
    terminal = terminal_of_redis
    services.append(service := Service(terminal, "--workers", "2"))
    service.says("at work", times=2)
    terminal("send", "orders", '{"id": "slow"}')
    until(lambda: terminal.journal, service.log.read_text)
    service.process.send_signal(signal.SIGINT)
    service.says("SIGTERM: draining\n", times=2)
    service.process.send_signal(signal.SIGINT)
    assert service.ends() == 130
    assert not any(event[1] == "ends" for event in terminal.journal)


@pytest.fixture
def terminal_of_redis(tmp_path: Path) -> Terminal:
    """For what has nothing to do with the broker."""
    url = os.environ.get("UNIBUS_TEST_REDIS_URL")
    if not url:
        pytest.fail("UNIBUS_TEST_REDIS_URL is not set; `make brokers-up` starts a broker and prints it")
    return Terminal(tmp_path, url)


def test_a_pipe_that_closes(terminal_of_redis: Terminal) -> None:
    """`unibus peek orders | head -1`: no traceback."""
    terminal = terminal_of_redis
    terminal("declare")
    terminal("send", "orders", "--bodies", text='{"id": "x"}\n' * 2000)
    peek = subprocess.Popen(
        [UNIBUS, "peek", "orders", "-n", "2000"],
        cwd=terminal.folder,
        env=terminal.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert peek.stdout is not None
    assert peek.stderr is not None
    with peek.stdout, peek.stderr:
        assert peek.stdout.readline()
        peek.stdout.close()
        assert peek.stderr.read() == b""
        assert peek.wait(SOON) == 128 + signal.SIGPIPE
