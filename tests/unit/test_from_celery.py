"""docs/from-celery.md: each row of its table has a snippet, and each snippet does what its section says."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from tests.unit.core_lab import until
from tests.unit.snippets import Page, Play, captured, from_rabbitmq, in_an_empty_folder

from unibus import Bus, Message, UnknownChannel

PAGE = Page("docs/from-celery.md")
WIRE = "What is on the wire during the change"


@pytest.fixture(autouse=True)
def _in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_an_empty_folder(monkeypatch, tmp_path)


def test_each_row_has_a_section_with_snippets_and_each_section_a_check() -> None:
    assert len(PAGE.rows()) > 25
    PAGE.assert_complete(beside={WIRE})


@pytest.mark.parametrize("title", PAGE.sections)
async def test_the_snippets_do_what_the_page_says(
    title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await PAGE.play(title, tmp_path, capsys)


@PAGE.on_its_own("App")
async def _open(names: dict[str, Any]) -> None:
    await names["main"]()
    assert names["analytics"].name == "analytics"


@PAGE.check("Task")
async def _task(play: Play) -> None:
    assert play.printed() == ["charged o-1"]
    await play.bus.send(play.orders, Message(b"no order"))
    await play.lab.idle()
    assert [letter.body for letter in play.lab.invalid(play.orders)] == [b"no order"]


@PAGE.check("Call")
async def _call(play: Play) -> None:
    first, *others = play.lab.broker.waiting(play.orders)
    assert (first.id, dict(first.headers)) == (play.message_id, {"tenant": "north"})
    assert [other.id for other in others] == play.ids
    with pytest.raises(UnknownChannel):
        await play.bus.send("order", play.order("o-3"))


@PAGE.check("Call from synchronous code")
async def _call_blocking(play: Play) -> None:
    await asyncio.to_thread(play.start)
    ids = [await asyncio.to_thread(play.view, id) for id in ("o-1", "o-2")]
    assert [message.id for message in play.lab.broker.waiting(play.orders)] == ids


@PAGE.check("Results")
async def _results(play: Play) -> None:
    assert play.refusal == "ValueError"


@PAGE.check("Late and early acknowledgement")
async def _acknowledgement(play: Play) -> None:
    await play.send("o-1")
    await play.bus.send(play.counted, play.order("o-2"))
    await play.lab.idle()
    await play.lab.advance(1)
    assert play.bus.counts_of(play.orders)["retried"] == 2
    assert "retried" not in play.bus.counts_of(play.counted)
    assert not play.lab.dead_letters(play.counted)


@PAGE.check("Ignore and reject")
async def _ignore(play: Play) -> None:
    await play.send("o-1", total=0)
    await play.send("o-2", total=-1)
    assert play.bus.counts_of(play.orders)["discarded"] == 1
    assert [letter.body.id for letter in play.lab.dead_letters(play.orders)] == ["o-2"]


@PAGE.check("Settle by hand")
async def _by_hand(play: Play) -> None:
    await play.send("o-1", total=-1)
    await play.send("o-2")
    assert [letter.body.id for letter in play.lab.dead_letters(play.orders)] == ["o-1"]
    assert play.printed() == []
    await play.lab.advance(60)
    assert play.printed() == ["acknowledged, and still at work for o-2"]


@PAGE.check("Retries")
async def _retries(play: Play) -> None:
    await play.send("o-1")
    times = [len(play.printed())]
    for seconds in (2, 4, 8):
        await play.lab.advance(seconds - 0.5)
        assert play.printed() == []
        await play.lab.advance(0.5)
        times.append(len(play.printed()))
    assert times == [1, 1, 1, 1]
    assert [letter.headers["x-dlq-reason"] for letter in play.lab.dead_letters(play.orders)] == ["retries_exhausted"]
    assert play.policy.waits() == (2, 4, 8)


@PAGE.check("Retry by hand")
async def _retry_by_hand(play: Play) -> None:
    await play.send("o-1")
    await play.lab.advance(599)
    assert play.printed() == []
    await play.lab.advance(1)
    assert play.printed() == ["charged o-1 1"]


@PAGE.check("Dead letters")
async def _dead_letters(play: Play) -> None:
    [dead, charged] = play.printed()
    assert dead.startswith("dead o-1")
    assert "no such card" in dead
    assert charged == "charged o-1"
    assert not play.lab.dead_letters(play.orders)


@PAGE.check("Prefetch and concurrency")
async def _concurrency(play: Play) -> None:
    [station] = play.bus._opened()._stations
    assert (station.settings.concurrency, station.settings.prefetch) == (16, 8)  # the file, over the code
    await play.send("o-1")
    assert play.printed() == ["charged o-1"]


@PAGE.check("Time limits")
async def _time_limits(play: Play) -> None:
    await play.bus.send(play.orders, play.order("o-1"))
    await play.lab.advance(59)
    assert not play.lab.dead_letters(play.orders)
    await play.lab.advance(1)
    await play.lab.idle()
    [letter] = play.lab.dead_letters(play.orders)
    assert "longer than 60 s" in letter.headers["x-original-error"]


@PAGE.check("Signals")
async def _signals(play: Play) -> None:
    await play.send("o-1")
    assert play.printed() == ["begin o-1", "failed o-1 no such card", "end o-1"]
    assert play.bus.counts_of(play.orders)["retried"] == 1  # the layer didn't swallow the error


@PAGE.check("Start of the worker")
async def _lifespan(play: Play) -> None:
    await play.send("o-1")
    assert play.printed() == ["o-1 paid"]


@PAGE.check("Shared tasks")
async def _shared(play: Play) -> None:
    await play.send("o-1")
    assert play.printed() == ["charged o-1"]
    assert play.handlers.bus is play.bus


@PAGE.check("Queues and routes")
async def _queues(play: Play) -> None:
    assert play.printed() == ["mail o-1"]
    settings = play.bus.settings
    assert settings.physical(play.mails) == "MAILS_V2"


@PAGE.check("Topics")
async def _topics(play: Play) -> None:
    assert sorted(play.printed()) == ["bill o-1", "ship o-1"]


@PAGE.check("Broadcast")
async def _broadcast(play: Play) -> None:
    await play.bus.publish(play.charged, play.Charged(id="o-1"))
    await play.lab.idle()
    assert play.printed() == ["forget o-1"]


@PAGE.check("Batches")
async def _batches(play: Play) -> None:
    assert play.printed() == ["charged ['o-1', 'o-3']"]
    assert [letter.body.id for letter in play.lab.dead_letters(play.orders)] == ["o-2"]


@PAGE.check("Countdown and ETA")
async def _countdown(play: Play) -> None:
    assert play.printed() == []
    await play.lab.advance(3599)
    assert play.printed() == []
    await play.lab.advance(1)
    assert play.printed() == ["remind o-1"]
    await play.lab.advance(3600)
    assert play.printed() == ["remind o-2"]


@PAGE.check("Expires")
async def _expires(play: Play) -> None:
    assert play.bus.counts_of(play.orders)["received"] == 1
    await play.lab.advance(120)
    [letter] = play.lab.dead_letters(play.orders)
    assert letter.headers["x-dlq-reason"] == "expired"


@PAGE.check("Priority")
async def _priority(play: Play) -> None:
    assert play.printed() == ["alert o-2", "alert o-1", "alert o-0"]


@PAGE.check("Schedules")
async def _schedules(play: Play) -> None:
    await asyncio.to_thread(play.report_is_due)
    assert play.lab.sent(play.orders) == [play.order("daily")]


@PAGE.check("Chains")
async def _chains(play: Play) -> None:
    await play.send("o-1")
    assert play.printed() == ["ship o-1"]


@PAGE.check("Groups and chords")
async def _chords(play: Play) -> None:
    assert play.answers == [0, 100, 200]
    for number in (0, 1, 1):
        await play.bus.send(play.parts, play.Part(of="c-1", number=number, parts=3))
    await play.lab.idle()
    assert play.lab.sent(play.charged) == []
    await play.bus.send(play.parts, play.Part(of="c-1", number=2, parts=3))
    await play.lab.idle()
    assert play.lab.sent(play.charged) == [play.Charged(id="c-1")]


@PAGE.check("The request")
async def _the_request(play: Play) -> None:
    assert play.printed() == ["from-legacy-17 0 o-1 north"]


@PAGE.check("Correlation ids")
async def _correlation(play: Play) -> None:
    assert play.printed() == ["audit c-1 m-1"]


@PAGE.check("Serializers")
async def _serializers(play: Play) -> None:
    await play.bus.send(play.payments, play.Payment(id=uuid4(), amount="0.1", at="2026-11-22T03:00:00Z"))
    await play.lab.idle()
    assert play.printed() == ["1.1 2026"]


@PAGE.on_its_own("Test")
async def _test(names: dict[str, Any]) -> None:
    await names["test_charge"]()


@PAGE.check("Health and counts")
async def _health(play: Play) -> None:
    assert play.bus.counts_of("orders") == {"sent": 1}


@PAGE.on_its_own("Run")
async def _run(names: dict[str, Any]) -> None:
    running = asyncio.create_task(names["main"]())
    await until(lambda: names["bus"]._session is not None and names["bus"]._session.running)
    names["bus"].stop()
    await running


@PAGE.on_its_own("Settings")
async def _settings(names: dict[str, Any]) -> None:
    bus: Bus = names["bus"]
    async with bus:
        assert bus.settings.source("shutdown_timeout") == "unibus.toml"
        assert bus.settings.consumer(names["orders"], {}).prefetch == 10


@PAGE.check(WIRE)
async def _wire(play: Play) -> None:
    assert play.printed() == []
    # From Celery: the first is due, the second had `countdown=30, expires=60`.
    due, later = map(from_rabbitmq, captured("celery 5.7.0", "rabbitmq"))
    assert due.id == due.headers["id"]  # and so is the conversation's
    await play.arrives(play.from_celery, due)
    await play.lab.idle()
    assert play.printed() == ["charged o-1 5"]
    eta = datetime.fromisoformat(later.headers["eta"])
    play.names["datetime"] = SimpleNamespace(now=lambda _: eta - timedelta(seconds=20))
    await play.arrives(play.from_celery, later)
    await play.lab.idle()
    assert play.bus.counts_of(play.from_celery)["retried"] == 1
    play.names["datetime"] = SimpleNamespace(now=lambda _: eta)
    await play.lab.advance(20)
    assert play.printed() == ["charged o-2 0"]
    play.names["datetime"] = SimpleNamespace(now=lambda _: eta + timedelta(seconds=31))
    await play.arrives(play.from_celery, later)
    await play.arrives(play.from_celery, Message(later.body, id="t-9", headers={"task": "shop.other"}))
    await play.lab.idle()
    assert play.printed() == []
    assert play.bus.counts_of(play.from_celery)["discarded"] == 1
    assert [letter.id for letter in play.lab.dead_letters(play.from_celery)] == ["t-9"]
    # To Celery
    [message] = play.lab.broker.waiting(play.to_celery)
    assert (message.id, message.content_type, message.headers["task"]) == ("t-7", "application/json", "shop.charge")
    assert json.loads(message.body) == [[], {"id": "o-7", "total": 3}, {}]
    # Forwarded
    await asyncio.to_thread(play.forward, "o-10", total=4)
    assert play.lab.sent(play.orders) == [play.order("o-10", total=4)]
