"""The contract suite on a real broker leaves it as it was: what it has made is gone, and nothing else is."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.broker_lists import LISTS, variable

from unibus import Bus, Queue, Topic

# Contracts that make what others don't: groups, replies, delays, dead letters, priorities, private subscriptions.
SOME = "roundtrip or broadcast or group_headers or test_floor or test_priority"
SECONDS = 150  # a run takes about ten on an idle machine

pytestmark = pytest.mark.timeout(SECONDS + 30)


class Site:
    """One broker, and names that nobody else has. A bystander begins as they do, and must stay."""

    def __init__(self, broker: str, folder: Path) -> None:
        self.url = variable(f"UNIBUS_TEST_{broker}_URL")
        self.report = folder / "report.json"
        self._list = LISTS[broker]
        self._marker = os.urandom(4).hex()
        self._prefix = f"it-{self._marker}."

    def names(self) -> set[str]:
        return {name for name in asyncio.run(self._list()) if self._marker in name}

    def bystander(self) -> None:
        async def make() -> None:
            queue, topic = Queue("bystander", bytes), Topic("standing-by", bytes)
            bus = Bus(self.url, service="svc", prefix=self._prefix, channels=[queue, topic], config=False, environ={})
            async with bus:
                await bus.send(queue, b"stays")

        asyncio.run(make())

    def command(self, *arguments: str) -> list[str]:
        common = [f"--unibus-url={self.url}", f"--unibus-prefix={self._prefix}", f"--unibus-report={self.report}"]
        # Nothing of this repository's configuration, as with who has installed the package.
        return [
            *(sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "no:cacheprovider"),
            *("--rootdir", str(self.report.parent), "-o", "asyncio_default_fixture_loop_scope=function"),
            *("--pyargs", "unibus_contracts", *common, *arguments),
        ]


@pytest.mark.parametrize("broker", LISTS)
def test_what_a_run_has_made_is_gone(broker: str, tmp_path: Path) -> None:
    site = Site(broker, tmp_path)
    site.bystander()
    before = site.names()
    assert before
    done = subprocess.run(site.command("-q", "-k", SOME), capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stdout
    assert "deleted on the broker: " in done.stdout
    assert "not deleted" not in done.stdout
    assert site.names() == before


@pytest.mark.parametrize(("broker", "workers"), [("REDIS", []), ("RABBITMQ", ["-n", "2"])])
def test_what_was_made_before_ctrl_c_is_gone(broker: str, workers: list[str], tmp_path: Path) -> None:
    """The report says what was kept by then, and that it is a part."""
    site = Site(broker, tmp_path)
    site.bystander()
    before = site.names()
    command = site.command("-v", *workers)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stdout is not None
        said = []
        for line in run.stdout:
            said.append(line)
            if sum("PASSED" in one for one in said) == 10:
                os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all processes of the run
                break
        said.append(run.communicate(timeout=SECONDS)[0])
    text = "".join(said)
    assert run.returncode == pytest.ExitCode.INTERRUPTED, text
    assert "deleted on the broker: " in text
    assert "not deleted" not in text
    assert site.names() == before
    report = json.loads(site.report.read_text())
    assert not report["finished"]
    assert {entry["outcome"] for entry in report["contracts"]} >= {"passed", "not-run"}
