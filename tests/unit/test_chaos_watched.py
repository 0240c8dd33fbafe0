"""The adapter that writes down what it is told: each confirmed and each lost settlement, each send that was not confirmed."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.memory_lab import EVENTS, ORDERS, A, Lab

from unibus.adapter import Adapter, Move, Outcome, Outgoing, Source
from unibus.capabilities import refused
from unibus.errors import ConnectionLost, LeaseLost, Throttled
from unibus.message import Message
from unibus_contracts.chaos.watched import watched
from unibus_contracts.history import History, Recorder


@dataclass
class Scene:
    lab: Lab
    adapter: Adapter
    recorder: Recorder
    folder: Path

    def told(self) -> list[tuple[str, str, str, str, str, str]]:
        """What was written down, without sends that went well."""
        return [(o.what, o.kind, o.value, o.place, o.group, o.detail) for o in History(self.folder)]

    async def send(self, *bodies: str, to: Any = ORDERS, origin: Any = None) -> Any:
        return await self.adapter.send([Outgoing(to, Message(b.encode(), id=b), None, origin) for b in bodies], 5)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    lab = await Lab().start()
    with Recorder(tmp_path, "p") as recorder:
        yield Scene(lab, watched(lab.adapter, recorder, bytes.decode), recorder, tmp_path)


async def test_what_is_settled_is_written_down_with_its_word(scene: Scene) -> None:
    await scene.send("a", "b", "c")
    assert scene.told() == []
    subscription = await scene.adapter.subscribe(Source(ORDERS))
    a, b, c = await subscription.receive(3, 1)
    assert await subscription.settle(Outcome.ACCEPTED, [a, b]) == [None, None]
    assert await subscription.settle(Outcome.RELEASED, [c]) == [None]
    assert scene.told() == [
        ("settled", "invoke", "a b", "orders", "", "accepted"),
        ("settled", "ok", "", "", "", ""),
        ("settled", "invoke", "c", "orders", "", "released"),
        ("settled", "ok", "", "", "", ""),
    ]


async def test_what_was_said_before_is_on_disk_when_anything_leaves_the_process(scene: Scene) -> None:
    """Else a kill could leave a message that was sent by nobody, or settled and never handled."""
    scene.recorder.by_tick = True
    inner: Any = scene.adapter._inner  # type: ignore[attr-defined]  # what is watched
    seen: list[tuple[str, str]] = []

    def looks(real: Any) -> Any:
        async def looking(*told: Any, **more: Any) -> Any:
            seen.append((scene.told()[-1][0], scene.told()[-1][1]))
            return await real(*told, **more)

        return looking

    inner.send = looks(inner.send)
    with scene.recorder.during("send", value="a", place="orders"):
        await scene.send("a", "b")
    subscription: Any = await scene.adapter.subscribe(Source(ORDERS))
    subscription._inner.settle = looks(subscription._inner.settle)
    subscription._inner.move = looks(subscription._inner.move)
    a, b = await subscription.receive(2, 1)
    await subscription.settle(Outcome.ACCEPTED, [a])
    await subscription.move([Move(b, [Outgoing(ORDERS, b.message, None, b)])], 5)
    assert seen == [("send", "invoke"), ("settled", "invoke"), ("settled", "invoke")]


async def test_what_could_not_be_settled_is_named(scene: Scene) -> None:
    await scene.send("a", "b")
    subscription = await scene.adapter.subscribe(Source(ORDERS))
    a, b = await subscription.receive(2, 1)
    await subscription.settle(Outcome.ACCEPTED, [a])
    results = await subscription.settle(Outcome.ACCEPTED, [b, a])
    assert results[0] is None
    assert isinstance(results[1], LeaseLost)
    assert scene.told()[-2:] == [
        ("settled", "invoke", "b a", "orders", "", "accepted"),
        ("settled", "unknown", "a", "", "", "LeaseLost"),
    ]


async def test_an_original_whose_copy_is_confirmed_is_moved(scene: Scene) -> None:
    await scene.send("a", to=EVENTS)
    subscription = await scene.adapter.subscribe(Source(A))
    (a,) = await subscription.receive(1, 1)
    await scene.send("a", to=A, origin=a)
    await subscription.settle(Outcome.ACCEPTED, [a])
    assert scene.told() == [
        ("copied", "ok", "a", "events", "a", ""),
        ("settled", "invoke", "a", "events", "a", "moved"),
        ("settled", "ok", "", "", "", ""),
    ]


async def test_a_move_in_one_step_is_one_settlement(scene: Scene) -> None:
    await scene.send("a")
    subscription = await scene.adapter.subscribe(Source(ORDERS))
    (a,) = await subscription.receive(1, 1)
    assert await subscription.move([Move(a, [Outgoing(ORDERS, a.message, None, a)])], 5) == [None]
    assert scene.told() == [
        ("settled", "invoke", "a", "orders", "", "moved"),
        ("settled", "ok", "", "", "", ""),
    ]


async def test_a_send_without_an_answer_is_a_try(scene: Scene) -> None:
    scene.lab.broker.refuse(ORDERS, Throttled("slow down"), times=1)
    (error,) = await scene.send("a")
    assert isinstance(error, Throttled)
    scene.lab.broker.cut(down=True)
    with pytest.raises(ConnectionLost):
        await scene.send("b", "c")
    assert scene.told() == [
        ("try", "unknown", "a", "orders", "", "Throttled"),
        ("try", "unknown", "b c", "orders", "", "ConnectionLost"),
    ]


async def test_a_broken_link_and_what_is_taken_away_are_losses(scene: Scene) -> None:
    await scene.send("a")
    given_up: list[str] = []

    async def losing(deliveries: Any, grace: float) -> None:
        given_up.extend(d.message.id for d in deliveries)

    subscription = await scene.adapter.subscribe(Source(ORDERS, losing=losing))
    await subscription.receive(1, 1)
    receiving = asyncio.ensure_future(subscription.receive(1, 1))
    await asyncio.sleep(0)
    scene.lab.broker.cut(down=True)
    with pytest.raises(ConnectionLost):
        await receiving
    await scene.adapter.close()
    assert given_up == ["a"]
    assert scene.told() == [
        ("lost", "ok", "a", "orders", "", "taken away"),
        ("lost", "ok", "", "", "", "the link broke"),
        ("lost", "ok", "", "", "", "the link was closed"),
    ]


async def test_what_kafka_could_not_commit_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = await Lab().start()
    unconfirmed = replace(lab.adapter.capabilities, settle_confirmed=refused("as on Kafka"))
    monkeypatch.setattr(type(lab.adapter), "capabilities", unconfirmed)
    with Recorder(tmp_path, "p") as recorder:
        scene = Scene(lab, watched(lab.adapter, recorder, bytes.decode), recorder, tmp_path)
        await scene.send("a", "b")
        subscription = await scene.adapter.subscribe(Source(ORDERS))
        found = await subscription.receive(2, 1)
        for number, delivery in enumerate(found):
            delivery.position = f"orders/0@{number}"
        await subscription.settle(Outcome.ACCEPTED, found)
        about = {"address": ORDERS, "positions": ["orders/0@1", "orders/0@7"]}
        logging.getLogger("unibus.kafka").warning("not committed", extra=about)
        assert scene.told()[-1] == ("uncommitted", "ok", "b", "orders", "", "")
        await scene.adapter.close()
        logging.getLogger("unibus.kafka").warning("not committed", extra=about)
        assert [told[0] for told in scene.told()].count("uncommitted") == 1
