"""`python -m benchmarks`: measure, print one table. Nothing is asserted about times; a lost message ends the run."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks import apart, floor, growth, memory
from benchmarks.cases import Case, beside, circumstances, table
from benchmarks.flows import FLOWS, HEADLINE, NoBroker, Plan, find_broker
from benchmarks.growth import Growth
from benchmarks.load import Miscount
from benchmarks.watch import Profiles

PROFILE = Path("reports/profile.txt")
BROKERS = {"rabbitmq": 20_000, "kafka": 50_000, "redis": 50_000, "sqs": 4_000}  # messages a turn, at most
BACKLOG = {"rabbitmq": 1_000_000, "kafka": 1_000_000, "redis": 1_000_000, "sqs": 20_000}  # ministack is an emulator
PARTS = {
    "core": "the core path, on the memory adapter",
    "flows": "send and consume, beside the others",
    "fan-out": "1, 4 and 16 subscriptions",
    "requests": "request and reply",
    "cold": "a new process and its first message",
    "workers": "1, 2 and 4 of them",
    "growth": "one thing varied by a thousand",
    "backlog": "memory and CPU over a long backlog",
}
_USUAL = tuple(part for part in PARTS if part != "backlog")
_HEADLINE = ("core", "flows", "requests")


def main() -> int:
    options = _options()
    apart.prepare(options.uvloop)
    profiles = Profiles(on=options.profile is not None)
    about: dict[str, Any] = circumstances()
    begun = perf_counter()
    if options.uvloop:
        about["loop"] = f"uvloop {version('uvloop')}"
    try:
        cases, grown = _run(options, profiles, about)
    except Miscount as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if profiles:
        options.profile.parent.mkdir(parents=True, exist_ok=True)
        options.profile.write_text(profiles.text(), encoding="utf-8")
        print(profiles.text())
        print(f"written to {options.profile}; a profiled run has no times worth showing")
        return 0
    if not cases and not grown:
        return 1  # why was said
    about["minutes"] = round((perf_counter() - begun) / 60, 1)
    content = {**about, "cases": [case.as_json() for case in cases], "growth": grown}
    if options.json is not None:
        options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written to {options.json}")
    print(_heading(about))
    if cases:
        print(table(cases))
        print("the same figures, unibus to each of the others: median of the ratios of the rounds\n")
        print(beside(cases))
    for line in growth.lines(grown):
        print(line)
    for failure in about.get("failed", ()):
        print(f"error: no figures of {failure}", file=sys.stderr)
    if options.check is not None and not about.get("failed"):
        return _checked(content, floor.read(options.check))
    return bool(about.get("failed"))


def _checked(now: dict[str, Any], before: dict[str, Any]) -> int:
    for line in floor.differences(now, before):
        print(f"note: {line}", file=sys.stderr)
    lines, compared = floor.fallen(now, before)
    for line in lines:
        print(f"fell: {line}", file=sys.stderr)
    print(f"{compared} ratios compared with those of {before['date']}, {len(lines)} fell by more than their noise")
    if not compared:
        print("error: the floor has none of these cases; was no broker there?", file=sys.stderr)
    return bool(lines) or not compared


def _run(options: argparse.Namespace, profiles: Profiles, about: dict[str, Any]) -> tuple[list[Case], list[Growth]]:
    cases: list[Case] = []
    grown: list[Growth] = []
    short = options.quick or profiles
    rounds = options.rounds or (3 if options.quick else 5)
    parts = frozenset(options.parts or (_HEADLINE if short or options.headline else _USUAL))
    if "core" in parts and options.only in {None, "memory"}:
        cases += memory.run(rounds, 20_000 if options.quick else 100_000, profiles)
    if "growth" in parts and options.only in {None, "memory"}:
        grown += asyncio.run(growth.measure("memory", "memory", "memory://", None))
    for kind, messages in BROKERS.items():
        if options.only not in {None, kind} or parts <= {"core"}:
            continue
        try:
            url, source = find_broker(kind)
        except NoBroker as error:
            print(f"{kind}: not measured: {error}", file=sys.stderr)
            continue
        plan = Plan(
            rounds,
            messages // (5 if options.quick else 1),
            seconds=0.2 if options.quick else 1.0,
            requests=200 if short or kind == "sqs" else 500,
            flows=HEADLINE if short or options.headline else FLOWS,
            parts=parts,
            rivals=not options.quick,
            backlog=options.backlog or BACKLOG[kind],
        )
        found = apart.run(kind, url, plan, profiles, uvloop=options.uvloop)
        about.setdefault("brokers", {})[kind] = {"version": found.version, "source": source}
        about.setdefault("failed", []).extend(found.failed)
        cases += found.cases
        grown += found.grown
    return cases, grown


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
    parser.add_argument("--headline", action="store_true", help="what has a goal: the first flow, requests, the core")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help="; ".join(f"{part}: {text}" for part, text in PARTS.items()) + ". All but the backlog, if none is named",
    )
    parser.add_argument("--uvloop", action="store_true", help="on uvloop's event loop instead of asyncio's")
    parser.add_argument("--only", choices=("memory", *BROKERS))
    parser.add_argument("--backlog", type=int, metavar="MESSAGES", help="how long it is (1,000,000; SQS 20,000)")
    parser.add_argument("--rounds", type=int, help="of each case (5; quick: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there too")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="FILE",
        help="fail where a ratio fell below that of this floor, or --json, by more than its noise",
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
