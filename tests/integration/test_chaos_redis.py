"""Work under faults on a Redis of its own: nothing is lost, and what is repeated has a cause. One file, since its tests share that server."""

from pathlib import Path

import pytest
from tests.integration.chaos_kit import judged

from unibus_contracts.chaos.run import Plan, Run

pytestmark = pytest.mark.timeout(600)


async def test_ten_thousand_messages_under_three_faults(tmp_path: Path) -> None:
    await judged("redis", ["consumer-killed", "cut", "broker-killed"], tmp_path)


async def test_consumers_that_are_restarted_one_after_the_other_repeat_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    plan = Plan("redis", 7, 1500, ["rolling-restart", "scaled"], hold=1.0)
    result = await Run(plan, tmp_path / "history", said.append).run()
    assert result.passed, (result.verdict.findings, result.unclean, said)
    assert result.verdict.counts["confirmed"] == result.verdict.counts["sent"]
    assert result.verdict.counts["duplicates"] == 0


async def test_a_server_that_refuses_is_waited_for_and_a_consumer_may_die_at_any_point(tmp_path: Path) -> None:
    said: list[str] = []
    faults = ["redis-memory-full", "redis-demoted", "consumer-killed-handled"]
    plan = Plan("redis", 7, 2000, faults, hold=1.0)
    result = await Run(plan, tmp_path / "history", said.append).run()
    assert result.passed, (result.verdict.findings, result.unclean, said)
    assert [(fault.name, bool(fault.proof)) for fault in result.faults] == [(name, True) for name in faults]
