"""`python -m unibus_contracts.chaos BROKER [--cluster] [--seed N] [--messages N] [--faults N | --only FAULT…] [--minutes N] [--folder DIR]`.

Exit status: 0 all promises kept, 1 one was broken, 2 wrong usage, 3 the run proves nothing (inconclusive, invalid, broken off).
The same seed draws the same faults; what happens between them is the machine's doing, so the history of a failed run is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from unibus_contracts.chaos.faults import FAULTS, not_tried, possible, schedule
from unibus_contracts.chaos.run import Plan, Result, Run
from unibus_contracts.history.__main__ import lines
from unibus_contracts.supply import ASSEMBLIES, KINDS, SupplyError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unibus_contracts.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("broker", choices=sorted(KINDS), help="one of its own is started, broken, and thrown away")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()) % 10_000, help="draws the faults; default: the time"
    )
    parser.add_argument("--messages", type=int, default=10_000, help="default 10000")
    parser.add_argument("--faults", type=int, default=3, help="how many; default 3")
    parser.add_argument("--minutes", type=float, help="go on for so long, with messages / (faults + 1) for each fault")
    parser.add_argument("--only", action="append", choices=sorted(FAULTS), help="these, in this order; may be repeated")
    parser.add_argument("--hold", type=float, default=3.0, help="seconds that a fault lasts; default 3")
    parser.add_argument("--folder", type=Path, help="for the history; default: a new one, kept if the run is no pass")
    parser.add_argument("--cluster", action="store_true", help="three nodes that are one, and the faults of those")
    given = parser.parse_args(arguments)
    kind, cluster = given.broker, given.cluster
    if cluster and kind not in ASSEMBLIES:
        parser.error(f"no cluster of {kind}; there are: {', '.join(ASSEMBLIES)}")
    faults = given.only or schedule(kind, given.seed, given.faults, cluster)
    for name in faults:
        if name not in possible(kind, cluster):
            other = (
                "it is one of a single broker"
                if cluster
                else "it is a fault of another kind of broker, or of a cluster"
            )
            why = not_tried(kind, cluster).get(name, other)
            parser.error(f"{name} can't be made on {kind}{' with --cluster' if cluster else ''}: {why}")
    folder = given.folder or Path(tempfile.mkdtemp(prefix=f"chaos-{given.broker}-"))
    plan = Plan(kind, given.seed, given.messages, faults, given.hold, given.minutes, cluster=cluster)
    print(
        f"{kind}{', a cluster' if cluster else ''}, seed {given.seed}: {given.messages} messages, {', '.join(faults)}",
        flush=True,
    )
    began = time.monotonic()
    try:
        result = asyncio.run(
            Run(plan, folder, lambda line: print(f"{time.monotonic() - began:6.1f}  {line}", flush=True)).run()
        )
    except FileExistsError as error:
        parser.error(str(error))
    except (SupplyError, TimeoutError, RuntimeError) as error:
        print(f"broken off: {error}", file=sys.stderr)
        print(f"history: {folder}", file=sys.stderr)
        return 3
    print("\n".join(summary(result)))
    if not result.passed:
        print(f"history: {folder}")
    return 0 if result.passed else {"kept": 1, "broken": 1}.get(result.verdict.status, 3)


def summary(result: Result) -> list[str]:
    """What the run has shown, for people."""
    told = [f"{result.adapter} {result.version or ''}".strip() + f", {result.seconds} s"]
    told += [f"  {fault.name}: {fault.proof}; {fault.told()}" for fault in result.faults]
    told += [f"  not tried: {name}: {why}" for name, why in result.not_tried.items()]
    told += [f"  {complaint}" for complaint in result.unclean]
    return [*told, *lines(result.verdict)]


if __name__ == "__main__":
    sys.exit(main())
