"""`python -m benchmarks`: measure, print one table. Nothing is asserted about times; a lost message ends the run."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

from benchmarks import brokers, floor, memory
from benchmarks.cases import Case, beside, circumstances, table
from benchmarks.flows import FLOWS, HEADLINE, NoBroker, Plan, find_broker
from benchmarks.load import Miscount
from benchmarks.watch import Profiles

PROFILE = Path("reports/profile.txt")
BROKERS = {"rabbitmq": 10_000, "kafka": 20_000, "redis": 20_000, "sqs": 2_000}  # messages a round


def main() -> int:
    options = _options()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    profiles = Profiles(on=options.profile is not None)
    about: dict[str, Any] = circumstances()
    try:
        cases = _run(options, profiles, about)
    except Miscount as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if profiles:
        options.profile.parent.mkdir(parents=True, exist_ok=True)
        options.profile.write_text(profiles.text(), encoding="utf-8")
        print(profiles.text())
        print(f"written to {options.profile}; a profiled run has no times worth showing")
        return 0
    if not cases:
        return 1  # why was said
    print(_heading(about))
    print(table(cases))
    print("the same figures, unibus to each of the others: median of the ratios of the rounds\n")
    print(beside(cases))
    content = {**about, "cases": [case.as_json() for case in cases]}
    if options.json is not None:
        options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written to {options.json}")
    if options.check is not None:
        fallen = floor.fallen(content, json.loads(options.check.read_text(encoding="utf-8")))
        for line in fallen:
            print(f"fell: {line}", file=sys.stderr)
        return bool(fallen)
    return 0


def _run(options: argparse.Namespace, profiles: Profiles, about: dict[str, Any]) -> list[Case]:
    cases: list[Case] = []
    rounds = options.rounds or (3 if options.quick else 5)
    if options.only in {None, "memory"} and not options.backlog:
        cases += memory.run(rounds, 20_000 if options.quick else 100_000, profiles)
    for kind, messages in BROKERS.items():
        if options.only not in {None, kind}:
            continue
        try:
            url, source = find_broker(kind)
        except NoBroker as error:
            print(f"{kind}: not measured: {error}", file=sys.stderr)
            continue
        short = options.quick or options.profile is not None
        plan = Plan(
            rounds,
            messages // (5 if options.quick else 1),
            requests=0 if options.headline else 200 if short else 1_000,
            flows=HEADLINE if short or options.headline else FLOWS,
            fan_out=not short and not options.headline,
            rivals=not options.quick,
            backlog=options.backlog,
        )
        found, version = asyncio.run(brokers.run(kind, url, plan, profiles))
        about.setdefault("brokers", {})[kind] = {"version": version, "source": source}
        cases += found
    return cases


def _heading(about: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    brokers = "".join(f"; {name} {found['version']}" for name, found in about.get("brokers", {}).items())
    return (
        f"{about['date']}, commit {about['commit']}; {about['cores']} cores of {about['cpu']}, load {about['load']}\n"
        f"Python {about['python']}, {packages}{brokers}\n"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: to see that it works")
    parser.add_argument("--headline", action="store_true", help="send in flight and consume only, beside all others")
    parser.add_argument("--only", choices=("memory", *BROKERS))
    parser.add_argument(
        "--backlog", type=int, default=0, metavar="MESSAGES", help="instead: memory over a backlog of so many"
    )
    parser.add_argument("--rounds", type=int, help="of each case (5; quick: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there too")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="FILE",
        help="fail where a ratio fell below that of this --json by more than its noise",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        nargs="?",
        const=PROFILE,
        metavar="FILE",
        help=f"instead of measuring, profile unibus alone ({PROFILE})",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
