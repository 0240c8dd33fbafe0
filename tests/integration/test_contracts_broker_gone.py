"""A broker that is killed in the middle of a run of the contract suite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.redis_kit import PASSWORD, Server

from unibus_contracts.report import FAILED, NOT_RUN, PASSED
from unibus_contracts.supply import KINDS
from unibus_contracts.supply.broker import LOOPBACK, free_ports

SECONDS = 600  # about twenty on an idle machine: what runs in that moment waits for its messages, then for the broker

pytestmark = pytest.mark.timeout(SECONDS + 60)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Of this test alone."""
    KINDS["redis"].install()
    made = Server(tmp_path, free_ports(["own"])["own"])
    yield made
    made.kill()
    made.raw.close()


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_the_run_ends_and_its_report_is_marked(workers: list[str], server: Server, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [
        *(sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "no:cacheprovider", "--rootdir", str(tmp_path)),
        *("-o", "asyncio_default_fixture_loop_scope=function", "-v", "--tb=line", *workers),
        *("--pyargs", "unibus_contracts", f"--unibus-report={path}"),
    ]
    environ = {**os.environ, "UNIBUS_CONTRACTS_URL": f"redis://:{PASSWORD}@{LOOPBACK}:{server.port}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ) as run:
        assert run.stdout is not None
        said = []
        for line in run.stdout:
            said.append(line)
            if sum("PASSED" in one for one in said) == 5:
                server.process.kill()
                break
        said.append(run.communicate(timeout=SECONDS)[0])
    text = "".join(said)
    assert run.returncode == pytest.ExitCode.INTERRUPTED, text
    assert "the broker has gone: ConnectionLost: " in text
    assert "the run was broken off: the broker has gone: ConnectionLost: " in text
    assert "not deleted: what begins with 'ctr-" in text
    assert PASSWORD not in text
    report = json.loads(path.read_text())
    assert not report["finished"]
    assert report["gone"].startswith("ConnectionLost: ")
    assert report["left"]
    outcomes = [entry["outcome"] for entry in report["contracts"]]
    assert outcomes.count(PASSED) >= 5
    assert 1 <= outcomes.count(FAILED) <= 10, "the run has gone on for long without its broker"
    assert outcomes.count(NOT_RUN) > 100
