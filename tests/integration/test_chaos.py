"""A short run of the chaos machinery on a real broker: faults bite, nothing is lost, and the history says so."""

from pathlib import Path

import pytest

from unibus_contracts.chaos.run import Plan, Run

pytestmark = pytest.mark.timeout(300)


async def test_nothing_is_lost_when_links_are_cut_and_a_consumer_dies(tmp_path: Path) -> None:
    said: list[str] = []
    plan = Plan("redis", 7, 1500, ["cut", "consumer-killed"], hold=1.0)
    result = await Run(plan, tmp_path / "history", said.append).run()
    assert result.passed, (result.verdict.findings, result.unclean, said)
    assert [fault.name for fault in result.faults] == plan.faults
    assert all(fault.proof and fault.recovery is not None for fault in result.faults)
    counts = result.verdict.counts
    assert counts["sent"] == counts["confirmed"] + counts["unknown"] + counts["failed"]
    assert counts["confirmed"] >= 1400
    assert counts["dead_letters"] == 2  # numbers 7 and 510 fail each time
    assert (tmp_path / "history" / "result.json").exists()
