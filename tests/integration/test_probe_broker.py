"""`unibus run --probe` on a broker that goes away and comes back: not ready meanwhile, and live all the time."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.with_us import WITH_US

from unibus_contracts import supply
from unibus_contracts.supply import Broker

SOON = 90.0  # bounds a failure only

APP = """
from unibus import Bus, Queue

bus = Bus(service="probed")


@bus.consumer(Queue("orders"))
async def handle(body: bytes) -> None: ...
"""


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    found = supply.start("redis", instance="probe")
    yield found
    found.stop()


def get(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, timeout=SOON) as answer:  # noqa: S310  # http, as it was said
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def until_ready(url: str, *, ready: bool) -> list[str]:
    """The reasons once the answer is the wanted one; live all the time."""
    deadline = time.monotonic() + SOON
    while True:
        status, told = get(f"{url}/ready")
        assert get(f"{url}/live") == (200, {"live": True, "reasons": []})
        assert (status == 200) == told["ready"] == (not told["reasons"])
        if told["ready"] == ready:
            return list(told["reasons"])
        assert time.monotonic() < deadline, told
        time.sleep(0.05)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [1, 2])
def test_ready_as_long_as_the_broker_is_there(broker: Broker, workers: int, tmp_path: Path) -> None:
    (tmp_path / "probed.py").write_text(APP)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("UNIBUS_")}
    environ |= {"UNIBUS_URL": broker.url, "UNIBUS_PREFIX": f"pr{secrets.token_hex(3)}."}
    command = [
        *WITH_US,
        sys.executable,
        "-m",
        "unibus",
        "run",
        "probed:bus",
        "--probe",
        "127.0.0.1:0",
        "--workers",
        str(workers),
    ]
    log = tmp_path / "log"
    with log.open("w") as stderr, subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=stderr) as process:
        try:
            deadline = time.monotonic() + SOON
            while " at http" not in log.read_text():
                assert time.monotonic() < deadline
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            url = log.read_text().partition(" at ")[2].partition("\n")[0]
            until_ready(url, ready=True)
            broker.kill()
            reasons = until_ready(url, ready=False)
            assert all(reason.startswith("worker ") for reason in reasons) == (workers > 1)
            broker.restart()
            until_ready(url, ready=True)
        finally:
            process.terminate()
        assert process.wait(SOON) == 0, log.read_text()
    password = broker.url.rpartition("@")[0].rpartition(":")[2]
    assert password not in log.read_text() + str(reasons)
