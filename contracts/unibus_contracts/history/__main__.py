"""`python -m unibus_contracts.history FOLDER [--ordered CHANNEL…] [--groups TOPIC=GROUP,GROUP…] [--unconfirmed] [--runs N]`: the verdict.

Exit status: 0 kept, 1 broken, 2 wrong usage, 3 inconclusive or invalid.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .check import Expected, Verdict, check
from .record import History

_SHOWN = 20  # findings of one kind; the history has them all


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m unibus_contracts.history", description="What a recorded run proves."
    )
    parser.add_argument("folder", type=Path, help="the files that the run's processes have written")
    parser.add_argument("--ordered", action="append", default=[], metavar="CHANNEL", help="a channel with order by key")
    parser.add_argument(
        "--groups", action="append", default=[], metavar="TOPIC=GROUP,GROUP", help="a topic's subscriptions"
    )
    parser.add_argument(
        "--unconfirmed", action="store_true", help="a settlement that returned may not be on the broker"
    )
    parser.add_argument(
        "--runs", type=int, default=1, help="that must have failed before a message is a dead letter; default 1"
    )
    given = parser.parse_args(arguments)
    groups = {topic: tuple(names.split(",")) for topic, _, names in (entry.partition("=") for entry in given.groups)}
    if not given.folder.is_dir():
        parser.error(f"{given.folder} is no folder")
    expected = Expected(groups, frozenset(given.ordered), settle_confirmed=not given.unconfirmed, runs=given.runs)
    try:
        verdict = check(History(given.folder), expected)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(lines(verdict)))
    return {"kept": 0, "broken": 1}.get(verdict.status, 3)


def lines(verdict: Verdict) -> list[str]:
    """The verdict for people: status, figures, and the first findings of each kind."""
    said = [verdict.status + (f": {verdict.why}" if verdict.why else "")]
    said += [f"  {name.replace('_', ' ')}: {count:,}" for name, count in verdict.counts.items()]
    kinds: dict[str, int] = {}
    for finding in verdict.findings:
        kinds[finding.check] = kinds.get(finding.check, 0) + 1
        if kinds[finding.check] <= _SHOWN:
            said.append(f"{finding.check}: {finding.value}: {finding.why}")
    said += [f"{kind}: {count - _SHOWN:,} more" for kind, count in kinds.items() if count > _SHOWN]
    return said


if __name__ == "__main__":
    sys.exit(main())
