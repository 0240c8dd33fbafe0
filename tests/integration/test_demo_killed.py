"""The demo on RabbitMQ, and what becomes of its orders when the service is killed in the middle.

The service runs in a child that gets no chance to clean up (SIGKILL); all that it did stands in its journal.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from examples.orders import service
from examples.orders.generate import DATA, write
from examples.orders.payments import Journal
from pydantic import ValidationError

from unibus import Message, deadletter

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 100.0  # ample: the machine may be busy with other tests

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def url() -> str:
    """A broker that was to be tested and isn't there is a failure, not a skip."""
    if url := os.environ.get("UNIBUS_TEST_RABBITMQ_URL"):
        return url
    pytest.fail("UNIBUS_TEST_RABBITMQ_URL names no broker; `make integration` does")


class Service:
    """`serve` as a child: started, killed, started again."""

    def __init__(self, url: str, prefix: str, path: Path) -> None:
        self.options = ["--url", url, "--prefix", prefix, "--journal", str(path)]
        self.journal = Journal(path)
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "examples.orders", "serve", *self.options], cwd=ROOT
        )  # our own

    def kill(self) -> None:
        assert self._child is not None
        assert self._child.poll() is None, "it had ended by itself"
        self._child.kill()
        self._child.wait()
        self._child = None

    async def reaches(self, there: Callable[[], bool]) -> None:
        """Until the journal says so."""
        deadline = time.monotonic() + DEADLINE
        while not self._read_until(there):
            assert time.monotonic() < deadline, f"not reached; the journal has {self.journal.lines} lines"
            assert self._child is None or self._child.poll() is None, "the service has ended by itself"
            await asyncio.sleep(0.005)

    def _read_until(self, there: Callable[[], bool]) -> bool:
        self.journal.read()
        return there()

    async def adds(self, lines: int) -> None:
        goal = self.journal.lines + lines
        await self.reaches(lambda: self.journal.lines >= goal)

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self.journal.close()


@pytest.fixture
def killable(url: str, tmp_path: Path) -> Iterator[Service]:
    child = Service(url, f"test-demo-{secrets.token_hex(4)}.", tmp_path / "journal")
    yield child
    child.close()


async def test_no_order_is_lost_when_the_service_is_killed(
    killable: Service, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNIBUS_URL", url)
    monkeypatch.setenv("UNIBUS_PREFIX", killable.options[3])
    monkeypatch.setenv("ORDERS_JOURNAL", killable.options[5])
    valid = []
    for line in DATA.read_bytes().splitlines():
        with suppress(ValidationError):
            valid.append(service.Order.model_validate_json(line))
    ids = {order.id for order in valid}
    assert len(ids) == 2970

    killable.start()
    async with service.bus as bus:
        sending = asyncio.create_task(bus.send_many(service.orders, valid))
        for lines in (100, 1000, 2000):  # early, in the middle of retries, and later
            await killable.adds(lines)
            killable.kill()
            handled = len(killable.journal.of("charged"))
            assert handled < len(valid) - 100, "there was nothing left to lose"
            killable.start()
        assert len(await sending) == len(valid)
        await bus.send(service.orders, Message(b"{", id="malformed"))

        journal, dead = killable.journal, set[str]()
        deadline = time.monotonic() + DEADLINE
        while missing := ids - journal.of("charged").keys() - journal.of("discarded").keys() - dead:
            assert time.monotonic() < deadline, f"lost: {sorted(missing)}"
            await asyncio.sleep(0.2)
            journal.read()
            dead = {letter.body.id async for letter in deadletter.browse(bus, service.orders)}
        await killable.reaches(lambda: set(journal.of("billed")) == set(journal.of("charged")))
        await killable.reaches(lambda: set(journal.of("shipped")) == set(journal.of("charged")))
        assert journal.repeated("charged") == 0
        # The malformed one may be delivered more than once, as any other.
        assert {letter.message.id async for letter in deadletter.browse(bus, service.orders, invalid=True)} == {
            "malformed"
        }


def demo(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "examples.orders", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # our own


async def test_the_table_is_the_same_after_a_kill(killable: Service, tmp_path: Path) -> None:
    """The whole demo with its service elsewhere, which is killed once while it works."""
    killable.start()
    driver = demo("demo", *killable.options, "--elsewhere")
    try:
        await killable.adds(1500)
        killable.kill()
        killable.start()
        output, _ = await asyncio.to_thread(driver.communicate, timeout=DEADLINE)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode == 0, output
    assert "the numbers add up" in output


async def test_the_demo_in_one_process(url: str, tmp_path: Path) -> None:
    file = tmp_path / "orders.jsonl"
    write(file, 1000, seed=5)
    driver = demo("--url", url, "--file", str(file))
    output, _ = await asyncio.to_thread(driver.communicate, timeout=DEADLINE)
    assert driver.returncode == 0, output
    assert "1000 of 1000 lines came to rest" in output
