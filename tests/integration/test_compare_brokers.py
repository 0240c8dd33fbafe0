"""`unibus compare` as its users call it, on two real brokers: what it measures is what is known of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from unibus_contracts.compare.contracts import QUICK

FACTOR = float(os.environ.get("UNIBUS_TEST_TIMEOUT_FACTOR", "1"))
UNIBUS = str(Path(sys.executable).with_name("unibus"))
LEASE = 3

pytestmark = pytest.mark.timeout(300 * FACTOR)


@pytest.fixture
def urls() -> tuple[str, str]:
    """RabbitMQ, and Redis with a lease that is shorter than by default: a target is a broker with its settings."""
    redis = os.environ["UNIBUS_TEST_REDIS_URL"]
    return os.environ["UNIBUS_TEST_RABBITMQ_URL"], f"{redis}{'&' if '?' in redis else '?'}lease={LEASE}"


def environ() -> Mapping[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("UNIBUS_") or name == "UNIBUS_TEST_TIMEOUT_FACTOR"
    } | {"COLUMNS": "200"}


def cells(document: Mapping[str, Any], row: str) -> list[dict[str, Any]]:
    [found] = [one["cells"] for one in document["rows"] if one["id"] == row]
    return list(found)


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [UNIBUS, "compare", *arguments, "--quick"],
        cwd=folder,
        env=environ(),
        capture_output=True,
        text=True,
        timeout=280 * FACTOR,
        check=False,
    )


def test_two_brokers(urls: tuple[str, str], tmp_path: Path) -> None:
    data, html = tmp_path / "data.json", tmp_path / "page.html"
    done = compare(tmp_path, *urls, "--only", "crash,limits,order", "--json", str(data), "--html", str(html))
    assert done.returncode == 0, done.stderr
    document = json.loads(data.read_text(encoding="utf-8"))
    assert document["finished"] is True
    assert [target["adapter"] for target in document["targets"]] == ["rabbitmq", "redis"]
    for secret in (url.partition("://")[2].partition("@")[0].partition(":")[2] for url in urls if "@" in url):
        assert secret not in done.stdout + done.stderr + html.read_text(encoding="utf-8") + json.dumps(document)

    # A killed consumer's messages come at once where its connection is what holds them, and after the lease where that does.
    rabbitmq, redis = cells(document, "failure.redelivery")
    assert rabbitmq["value"] < redis["value"]
    assert redis["value"] >= LEASE
    assert [cell["value"] for cell in cells(document, "failure.again")] == [0, 0]
    assert all(cell["text"].startswith("attempt 1; ") for cell in cells(document, "failure.count"))
    assert [cell["value"] for cell in cells(document, "order.competing")] == [0, 0]
    assert {cell["level"] for cell in cells(document, "order.competing")} == {"emulated"}
    assert [cell["state"] for cell in cells(document, "limits.body")] == ["measured", "measured"]
    assert html.read_text(encoding="utf-8").count('<tr role="row" id=') == len(document["rows"])
    assert "largest body" in done.stdout


def test_ctrl_c_keeps_what_there_is(urls: tuple[str, str], tmp_path: Path) -> None:
    endless = urls[1].replace(f"lease={LEASE}", "lease=300")  # the second probe waits for a lease to end
    data, html = tmp_path / "data.json", tmp_path / "page.html"
    child = subprocess.Popen(
        [UNIBUS, "compare", endless, "--quick", "--only", "batch,crash", "--json", str(data), "--html", str(html)],
        cwd=tmp_path,
        env=environ(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    try:
        first = child.stderr.readline()
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60 * FACTOR)
    finally:
        child.kill()
        child.wait()
    assert ": batch (" in first
    assert child.returncode == 130, said
    assert "marked as partial" in said
    document = json.loads(data.read_text(encoding="utf-8"))
    assert document["finished"] is False
    assert cells(document, "throughput.batch")[0]["state"] == "measured"
    assert cells(document, "failure.redelivery")[0]["state"] == "not run"
    assert "<strong>Partial:</strong>" in html.read_text(encoding="utf-8")


def test_the_contracts_are_rows(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    done = compare(tmp_path, "memory://", "--only", "contracts", "--json", str(data))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(data.read_text(encoding="utf-8"))["rows"]
    assert [row["id"].removeprefix("contracts.") for row in rows] == list(QUICK)
    assert "kept" in rows[0]["cells"][0]["text"]
    [settle] = cells({"rows": rows}, "contracts.settle")
    assert settle["value"] == 0  # broken
