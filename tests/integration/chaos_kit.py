"""A run of the chaos machinery, and what has to be true of it on every broker. A file for each, so that they run side by side."""

from pathlib import Path

from unibus_contracts.chaos.run import Plan, Run

MESSAGES = 10_000


async def judged(kind: str, faults: list[str], folder: Path) -> None:
    said: list[str] = []
    # On a busy machine a server that was killed takes minutes to come back.
    plan = Plan(kind, 7, MESSAGES, faults, hold=1.0, progress=180.0)
    result = await Run(plan, folder / "history", said.append).run()
    assert result.passed, (result.verdict.why, result.verdict.findings[:20], result.unclean, said)
    assert [fault.name for fault in result.faults] == faults
    assert all(fault.proof and fault.recovery is not None for fault in result.faults)
    counts = result.verdict.counts
    assert counts["sent"] == counts["confirmed"] + counts["unknown"] + counts["failed"] > MESSAGES
    assert counts["confirmed"] > MESSAGES / 2
    assert counts["dead_letters"] >= 10  # of 10,000 messages 15 fail each time; those of unknown sends may not be there
    assert (folder / "history" / "result.json").exists()
