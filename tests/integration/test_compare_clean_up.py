"""`unibus compare` leaves a broker as it was: what its probes and its contracts have made is gone, and nothing else is."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.integration.broker_lists import LISTS, variable

from unibus import Bus, Queue, Topic
from unibus_contracts.compare import contracts
from unibus_contracts.compare.model import QUICK
from unibus_contracts.compare.run import Run
from unibus_contracts.compare.targets import Target, resolve

FACTOR = float(os.environ.get("UNIBUS_TEST_TIMEOUT_FACTOR", "1"))
UNIBUS = str(Path(sys.executable).with_name("unibus"))
# Between them they make queues, topics, groups, dead letters, replies, and a delay.
CHEAP = "unroutable,risks,dead letter,requests,retry"

LIMIT = 400 * FACTOR  # of what takes seconds on an idle machine

pytestmark = pytest.mark.timeout(LIMIT + 60)


class Site:
    """One broker. What stands there beforehand must stay, what begins as a comparison does among it."""

    def __init__(self, broker: str) -> None:
        self.url = variable(f"UNIBUS_TEST_{broker}_URL")
        self._list = LISTS[broker]
        self._marker = os.urandom(4).hex()

    def bystander(self) -> None:
        async def make() -> None:
            queue, topic = Queue("bystander", bytes), Topic("standing-by", bytes)
            prefix = f"cmp-{self._marker}."
            bus = Bus(self.url, service="svc", prefix=prefix, channels=[queue, topic], config=False, environ={})
            async with bus:
                await bus.send(queue, b"stays")

        asyncio.run(make())

    def left_of(self, document: Mapping[str, Any]) -> set[str]:
        """What the run has left behind. By its prefix: other tests may be using the broker."""
        [target] = document["targets"]
        prefix = target["prefix"].rstrip(".")  # SQS knows no dots
        assert self._marker not in prefix
        names = asyncio.run(self._list())
        assert any(self._marker in name for name in names), "the bystander is gone"
        return {name for name in names if prefix in name}


def compare(*arguments: str) -> list[str]:
    return [UNIBUS, "compare", *arguments]


@pytest.mark.parametrize("broker", LISTS)
def test_what_the_probes_have_made_is_gone(broker: str, tmp_path: Path) -> None:
    site, data = Site(broker), tmp_path / "data.json"
    site.bystander()
    command = compare(site.url, "--quick", "--only", CHEAP, "--json", str(data))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode in (0, 1), done.stderr  # on a busy machine a probe may be late: no matter here
    document = json.loads(data.read_text(encoding="utf-8"))
    [target] = document["targets"]
    assert target["left"] is None
    assert target["deleted"] > 4
    assert f": deleted {target['deleted']} objects (" in done.stderr
    assert site.left_of(document) == set()


def test_what_was_made_before_ctrl_c_is_gone(tmp_path: Path) -> None:
    """The consumer that the probe has killed holds messages; the wait for them is broken off."""
    site, data = Site("REDIS"), tmp_path / "data.json"
    site.bystander()
    endless = f"{site.url}{'&' if '?' in site.url else '?'}lease=300"
    command = compare(endless, "--quick", "--only", "risks,crash", "--json", str(data))
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        first = run.stderr.readline()
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=LIMIT)
    assert ": risks (" in first
    assert run.returncode == 130, said
    assert "objects (" in said
    assert "not deleted" not in said
    document = json.loads(data.read_text(encoding="utf-8"))
    assert document["finished"] is False
    assert site.left_of(document) == set()


def test_what_the_contracts_made_is_gone_where_they_were_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where they don't end after Ctrl-C. On the broker that can't list what it has: their names have to be known."""
    site = Site("RABBITMQ")
    site.bystander()
    [target], _ = resolve([site.url])
    run = Run([target], QUICK, quick=True, only={contracts.CHAPTER})

    async def killed(child: asyncio.subprocess.Process) -> None:
        if child.returncode is None:
            child.kill()
            await child.wait()

    async def made() -> bool:
        prefix = run.document["targets"][0]["prefix"].rstrip(".")
        return any(prefix in name for name in await LISTS["RABBITMQ"]())

    async def broken_off() -> None:
        task = asyncio.ensure_future(run())
        deadline = time.monotonic() + LIMIT
        while not await made():
            assert time.monotonic() < deadline, "nothing was made"
            await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert any(made.names for made in run._labs[0].made[1:])
        await run.remove()

    monkeypatch.setattr(contracts, "_end", killed)
    asyncio.run(broken_off())
    assert run.document["targets"][0]["left"] is None
    assert site.left_of(run.document) == set()


def test_what_can_not_be_deleted_is_told() -> None:
    """The broker has gone in the meantime."""
    site = Site("REDIS")
    [target], _ = resolve([site.url])
    run = Run([target], QUICK, only={"risks"})

    async def lost() -> None:
        await run()
        [lab] = run._labs
        gone = resolve(["redis://127.0.0.1:1"])[0][0]
        there, lab.target = lab.target, gone
        await run.remove()
        left = run.document["targets"][0]["left"]
        assert left is not None
        assert lab.prefix in left
        assert "127.0.0.1:1" in left
        lab.target = there
        await run.remove()

    asyncio.run(lost())
    assert run.document["targets"][0]["left"] is None
    assert isinstance(run._labs[0].target, Target)
    assert run.document["targets"][0]["deleted"] > 0
