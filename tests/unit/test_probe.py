"""`unibus run --probe`: two answers over HTTP, from a bus of this process or from workers that tell how they are."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.unit.cli_lab import APP
from tests.unit.core_lab import ORDERS, lab, make_bus, until

from unibus import ConfigError
from unibus.cli import probe
from unibus.cli.probe import OfBus, OfWorkers, address, serving, tell

SOON = 120.0  # bounds a failure only


class State(OfWorkers):
    """Says what it is told to."""

    def __init__(self) -> None:
        super().__init__(0)
        self.why: list[str] = []

    async def unready(self) -> list[str]:
        return self.why


@asynccontextmanager
async def server(state: OfBus | OfWorkers, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[int]:
    async with serving("127.0.0.1:0", state):
        found = re.search(r"http://127\.0\.0\.1:(\d+)", capsys.readouterr().err)
        assert found is not None
        yield int(found[1])


async def ask(port: int, request: str | bytes) -> tuple[int, Any]:
    """Status and JSON. A text is a path."""
    raw = request if isinstance(request, bytes) else f"GET {request} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    writer.write_eof()
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    length = re.search(rb"Content-Length: (\d+)", head)
    assert length is not None
    if not raw.startswith(b"HEAD"):
        assert len(body) == int(length[1])
    return int(head.split(b" ")[1]), json.loads(body or b"null")


async def test_two_answers(capsys: pytest.CaptureFixture[str]) -> None:
    state = State()
    async with server(state, capsys) as port:
        assert await ask(port, "/live") == (200, {"live": True, "reasons": []})
        assert await ask(port, "/ready?verbose") == (200, {"ready": True, "reasons": []})
        state.why = ["orders.dlq takes no messages"]
        assert await ask(port, "/ready") == (503, {"ready": False, "reasons": state.why})
        assert await ask(port, b"HEAD /ready HTTP/1.0\r\n\r\n") == (503, None)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"POST /ready HTTP/1.1\r\n\r\n", 405),
        (b"GET /ready\r\n\r\n", 400),
        (b"GET /ready SPDY/3\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00", 400),
        (b"", 400),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", 400),
        (b"GET /ready HTTP/1.1\r\nh: " + b"a" * 7000, 400),
    ],
)
async def test_bad_requests(request_: bytes, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    async with server(State(), capsys) as port:
        try:
            assert (await ask(port, request_))[0] == status
        except ConnectionError:  # closed with half of the request unread: the system resets it
            assert len(request_) > 8192
        assert (await ask(port, "/live"))[0] == 200


@pytest.mark.parametrize(
    ("option", "expected"),
    [("0.0.0.0:8080", ("0.0.0.0", 8080)), ("[::1]:80", ("::1", 80)), ("localhost:0", ("localhost", 0))],  # noqa: S104
)
def test_addresses(option: str, expected: tuple[str, int]) -> None:
    assert address(option) == expected


@pytest.mark.parametrize("option", ["8080", ":8080", "host", "host:", "host:x", "host:99999", "host:-1", "host:\u0663"])
def test_addresses_that_are_none(option: str) -> None:
    with pytest.raises(ConfigError, match=r"--probe .*HOST:PORT"):
        address(option)


async def test_what_can_not_be_listened_at_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    async with server(State(), capsys) as port:
        for option in (f"127.0.0.1:{port}", "a..b:1"):
            with pytest.raises(ConfigError, match=f"--probe {option}: can't listen there: .+"):
                async with serving(option, State()):
                    pass


async def test_a_bus_is_ready_while_its_handlers_are_at_work_and_well(monkeypatch: pytest.MonkeyPatch) -> None:
    bus = make_bus()
    state = OfBus(bus)

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None: ...

    (why,) = await state.unready()
    assert "not at work" in why
    async with lab(bus) as it:
        await it.idle()
        assert await state.unready() == []
        bus._opened().intakes[0].trouble = "orders.dlq takes no messages"
        assert list(await state.unready()) == ["orders.dlq takes no messages"]
        bus._opened().intakes[0].trouble = None
        bus._opened().intakes[0].subscribed.clear()
        assert await state.unready() == ["queue 'orders': not subscribed yet"]
        bus._opened().intakes[0].subscribed.set()

        answers = asyncio.Event()

        async def hang() -> Any:
            await answers.wait()
            return await type(bus).health(bus)

        monkeypatch.setattr(probe, "PATIENCE", 0.01)
        monkeypatch.setattr(bus, "health", hang)
        for _ in range(2):
            (why,) = await state.unready()
            assert "has not answered" in why
        assert await state.unalive() == []
        answers.set()
        monkeypatch.setattr(probe, "PATIENCE", SOON)
        assert await state.unready() == []
    assert await state.unready()


async def test_workers_tell_how_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    bus, state = make_bus(), OfWorkers(2)

    @bus.consumer(ORDERS)
    async def handle(body: str) -> None: ...

    assert await state.unready() == ["worker 1: not up yet", "worker 2: not up yet"]
    assert await state.unalive() == []
    theirs, ours = os.pipe()
    listening = asyncio.create_task(state.listen(1, theirs))
    async with lab(bus):
        telling = asyncio.create_task(tell(bus, ours))
        await until(lambda: state._told[1] is not None and not state._told[1][1], "worker 1 is well")
        assert await state.unready() == ["worker 2: not up yet"]
        monkeypatch.setattr(probe, "SILENCE", -1.0)
        (why,) = await state.unalive()
        assert why.startswith("worker 1: its event loop is blocked")
        assert why in await state.unready()
        telling.cancel()
    os.write(ours, b'["cut')
    os.close(ours)
    await listening
    assert await state.unready() == ["worker 1: not up yet", "worker 2: not up yet"]


@pytest.mark.timeout(600)
def test_as_a_process(tmp_path: Path) -> None:
    """On memory: ready, then drained by SIGTERM. The other errors are those of the command line."""
    (tmp_path / "probed.py").write_text("\n".join(line.removeprefix("    ") for line in APP.splitlines()))
    (tmp_path / "probed.py").write_text((tmp_path / "probed.py").read_text().replace(", lifespan=lifespan", ""))
    command = [sys.executable, "-m", "unibus", "run", "probed:bus", "--url", "memory://", "--probe"]
    environ = {**{k: v for k, v in os.environ.items() if not k.startswith("UNIBUS_")}, "PYTHONPATH": str(tmp_path)}

    def run(option: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*command, option], cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True)

    with run("80") as wrong:
        assert wrong.stderr is not None
        assert wrong.stderr.read() == "unibus: --probe 80: write HOST:PORT, as in 0.0.0.0:8080 or [::1]:8080\n"
        assert wrong.wait(SOON) == 2
    with run("127.0.0.1:0") as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        url = said.split(" at ")[1].strip()
        with run(url.removeprefix("http://")) as second:
            assert second.stderr is not None
            assert "can't listen there" in second.stderr.read()
            assert second.wait(SOON) == 2
        deadline = time.monotonic() + SOON
        while (found := get(f"{url}/ready")) != (200, {"ready": True, "reasons": []}):
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        assert get(f"{url}/live") == (200, {"live": True, "reasons": []})
        process.send_signal(signal.SIGTERM)
        assert process.wait(SOON) == 0


def get(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, timeout=SOON) as answer:  # noqa: S310  # http, as it was said
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
