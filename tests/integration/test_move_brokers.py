"""`unibus move` between real brokers, in processes of its own: killed in the worst moment, run again, and everything counted."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from unibus import Bus, Message, Queue, Topic
from unibus.adapter import Outcome, Outgoing, Source
from unibus.channel import Group, dead_letter_queue
from unibus.delivery import Delivery
from unibus.memory_broker import MemoryBroker
from unibus.move import held, look, move
from unibus.tooling import attached, declare

FACTOR = float(os.environ.get("UNIBUS_TEST_TIMEOUT_FACTOR", "1"))
SOON = 240.0 * FACTOR
PAIRS = [("rabbitmq", "kafka"), ("redis", "sqs"), ("kafka", "rabbitmq"), ("sqs", "redis")]
# What can be taken before it is due; elsewhere it is waited for.
EARLY = {"kafka", "redis"}
HOUR = 3600.0

ORDERS: Queue[bytes] = Queue("orders", ordered=True)
PLAN: Queue[bytes] = Queue("plan", delayed=True)
CHARGED: Topic[bytes] = Topic("charged")
BILLING = Group(CHARGED, "billing")
PLACES = (ORDERS, PLAN, BILLING, dead_letter_queue(PLAN))

# The command, but it dies after a page was confirmed by the target and before it is settled at the source.
DYING = """
import os, signal
from unibus import move
from unibus.cli import main

move.PAGE = 50
calls = 0
settle = move._Mover._settle

async def dying(self, done):
    global calls
    calls += bool(done)
    if calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    await settle(self, done)

move._Mover._settle = dying
main()
"""

pytestmark = pytest.mark.timeout(600 * FACTOR)


class Lab:
    """A folder with a unibus.toml, names of its own, and a bus on each broker."""

    def __init__(self, folder: Path, source: str, target: str) -> None:
        self.urls = {
            end: os.environ[f"UNIBUS_TEST_{name.upper()}_URL"] for end, name in (("from", source), ("to", target))
        }
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("UNIBUS_")}
        self.folder = folder
        # Short leases: what the killed process held is to come again soon.
        (folder / "unibus.toml").write_text(
            f'service = "billing"\nprefix = "mv{secrets.token_hex(3)}."\n'
            "[queues.orders]\nordered = true\n[queues.plan]\ndelayed = true\n[topics.charged.groups]\nbilling = {}\n"
            "[redis]\nlease = 2\n[sqs]\nlease = 3\n[kafka]\nsession_timeout = 6\n",
            encoding="utf-8",
        )

    def bus(self, end: str) -> Bus:
        return attached(Bus(self.urls[end], config=self.folder / "unibus.toml", environ={}))

    async def unibus(self, *arguments: str) -> tuple[int, str, str]:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, *arguments),
            cwd=self.folder,
            env=self.environ,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await asyncio.wait_for(child.communicate(), SOON)
        except BaseException:
            child.kill()
            await child.wait()
            raise
        assert child.returncode is not None
        return child.returncode, out.decode(), err.decode()

    async def declare(self) -> None:
        for url in self.urls.values():
            code, _, err = await self.unibus("-m", "unibus", "declare", "--url", url)
            assert code == 0, err

    @property
    def ends(self) -> list[str]:
        return ["--from", self.urls["from"], "--to", self.urls["to"], "--wait", "20", "--json"]


def message(id: str, **more: Any) -> Message:
    return Message(b"\x00\xff" + id.encode(), id, headers={"tenant": "grün", "n": id}, timestamp=1.7e9, **more)


def outgoings() -> list[Outgoing]:
    """What is left in the old broker."""
    found = [Outgoing(ORDERS, message(f"o-{n}", key=f"k{n % 5}", correlation_id=f"c-{n}")) for n in range(200)]
    found += [Outgoing(PLAN, message(f"p-{n}", type="Plan", expires_at=time.time() + 9 * HOUR)) for n in range(300)]
    found += [Outgoing(BILLING, message(f"b-{n}", content_type="application/x")) for n in range(100)]
    story = {"x-retry-count": "3", "x-original-error": "boom", "x-dlq-reason": "retries_exhausted"}
    for n in range(40):
        letter = message(f"d-{n}")
        letter.headers = {**letter.headers, **story}
        found.append(Outgoing(dead_letter_queue(PLAN), letter))
    retried = message("r-1")
    retried.headers = {**retried.headers, "x-retry-count": "2"}
    return [*found, Outgoing(PLAN, retried)]


async def fill(bus: Bus, sent: list[Outgoing]) -> None:
    for error in await bus._opened().kit.publisher.send_all(sent, SOON):
        assert error is None, error


async def take_all(bus: Bus, place: Any, ids: set[str]) -> list[Delivery[Any]]:
    """Everything that waits there, in order, once all of `ids` have come."""
    found: list[Delivery[Any]] = []
    subscription = await bus.adapter.subscribe(Source(place, 1000, ordered=getattr(place, "ordered", False)))
    deadline = time.monotonic() + SOON
    try:
        while True:
            batch = await subscription.receive(100, 2.0)
            assert all(error is None for error in await subscription.settle(Outcome.ACCEPTED, batch))
            found += batch
            missing = ids - {delivery.message.id for delivery in found}
            if not batch and not missing:
                return found
            assert time.monotonic() < deadline, f"{place}: missing {sorted(missing)[:5]}, {len(found)} came"
    finally:
        await subscription.stop()
        await subscription.close()


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=[f"{a}-to-{b}" for a, b in PAIRS])
async def test_killed_in_the_middle_and_run_again(source: str, target: str, tmp_path: Path) -> None:
    lab = Lab(tmp_path, source, target)
    await lab.declare()
    sent = outgoings()
    late = [Outgoing(PLAN, message(f"l-{n}"), time.time() + (HOUR if source in EARLY else 3.0)) for n in range(7)]
    async with lab.bus("from") as bus:
        await fill(bus, [*sent, *late])

    code, out, err = await lab.unibus("-c", DYING, "move", *lab.ends)
    assert code == -signal.SIGKILL, (code, out, err)

    moved, code, deadline = 0, 1, time.monotonic() + SOON
    while code:  # what the killed process held comes again when its lease, or its session, is over
        code, out, err = await lab.unibus("-m", "unibus", "move", *lab.ends)
        assert code in {0, 1}, err
        moved += json.loads(out)["moved"]
        assert time.monotonic() < deadline, (out, err)

    here = sent if source in EARLY else [*sent, *late]
    wanted = {outgoing.message.id: outgoing.message for outgoing in here}
    async with lab.bus("to") as bus:
        found: list[Delivery[Any]] = []
        for place in PLACES:
            ids = {outgoing.message.id for outgoing in here if outgoing.to == place}
            came = await take_all(bus, place, ids)
            assert {delivery.message.id for delivery in came} == ids, place
            found += came
            if place == ORDERS:
                check_order(came)
        if source in EARLY:
            await check_late(bus, len(late))
    for delivery in found:
        before, after = wanted[delivery.message.id], delivery.message
        for name in ("body", "key", "type", "reply_to", "headers"):
            assert getattr(after, name) == getattr(before, name), (name, after.id)
        assert after.correlation_id in {before.correlation_id, before.id, None}
        assert after.timestamp == before.timestamp
        assert after.expires_at == pytest.approx(before.expires_at, abs=0.01)
    # Nothing is lost, and twice is only what was on its way: of each place a page at most. Kafka hears of what is settled with
    # the next commit, so there it may be all that the killed process had done.
    pages = len(PLACES) + (5 if source == "kafka" else 0)
    assert len(found) - len(wanted) <= 50 * pages
    assert moved >= len(sent) + len(late) - 50 * 5


def check_order(came: list[Delivery[Any]]) -> None:
    """Of each key, the first time that each came."""
    first = list(dict.fromkeys(delivery.message.id for delivery in came))
    numbers = [int(id.partition("-")[2]) for id in first]
    for key in range(5):
        of_key = [n for n in numbers if n % 5 == key]
        assert of_key == sorted(of_key)


async def check_late(bus: Bus, count: int) -> None:
    """They wait at the target, where it can say so."""
    backlog = await bus.adapter.backlog(PLAN)
    waiting = backlog.delayed if backlog.delayed is not None else sum(one.messages or 0 for one in await held(bus))
    assert waiting >= count
    assert Counter((backlog.exact and [backlog.ready]) or [0]) == Counter([0])


@pytest.mark.parametrize("source", sorted(EARLY))
async def test_a_delay_goes_on_where_it_was(source: str, tmp_path: Path) -> None:
    """To a broker in this process, which can be looked into. What could not be carried is where it was, and as late."""
    lab = Lab(tmp_path, source, source)
    await lab.declare()
    lab.urls["to"] = f"memory://{secrets.token_hex(4)}?max_body=20"
    due = {f"l-{n}": time.time() + 100 * n for n in range(1, 6)}
    async with lab.bus("from") as old, lab.bus("to") as new:
        await declare(new)
        await fill(old, [Outgoing(PLAN, message(id), at) for id, at in due.items()])
        await fill(old, [Outgoing(PLAN, Message(bytes(100), "large"), time.time() + HOUR)])
        await move(old, new, places := await look(old, ["plan"]))
        assert [(place.moved, [one.id for one in place.stayed]) for place in places if place.moved] == [(5, ["large"])]
        broker = new.adapter.native
        assert isinstance(broker, MemoryBroker)
        offset = time.time() - time.monotonic()
        there = {entry.fields[1]: at + offset for at, _, _, _, entry in broker._delayed}
        assert set(there) == set(due)
        assert all(
            at - 0.1 <= there[id] < at + 50 for id, at in due.items()
        )  # a floor, and as late as the machine is slow
        early = await old.adapter.subscribe(Source(PLAN, early=True))
        async with asyncio.timeout(SOON):
            while not (found := await early.receive(10, 1.0)):
                pass
        assert [delivery.message.id for delivery in found] == ["large"]
        assert found[0].message.delay == pytest.approx(HOUR, abs=SOON * 2)
        await early.stop()
        await early.close()
