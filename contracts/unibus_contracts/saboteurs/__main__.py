"""`python -m unibus_contracts.saboteurs`: which contract catches which broken adapter, and that hardships are borne. Status 0 if nothing escapes."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .base import HEALTHY, Hardship, Saboteur
from .gang import HARDSHIPS, SABOTEURS
from .run import Trial, contracts, installed, trial
from .table import hardships_borne, verdicts

# Of these each saboteur leaves at least one alone, beside those that are meant to catch it: who breaks everything proves nothing.
BASICS = ("publish.returns_after_broker_accept", "settle.ack_consumes", "consume.roundtrip", "obs.health_is_ok")


def chosen(names: Sequence[str]) -> tuple[list[Saboteur], list[Hardship]]:
    unknown = [name for name in names if name not in SABOTEURS | HARDSHIPS]
    if unknown:
        raise SystemExit(f"no saboteur {', '.join(unknown)}; known: {', '.join(SABOTEURS | HARDSHIPS)}")
    return (
        [one for name, one in SABOTEURS.items() if name in names or not names],
        [one for name, one in HARDSHIPS.items() if name in names or not names],
    )


def trials(ids: Mapping[str, Sequence[str]], known: dict[str, str], workers: int) -> tuple[Trial, dict[str, Trial]]:
    """The control, of all that is tried, and one trial each. `ids`: the contracts for each saboteur or hardship."""
    nodes = [known[id] for id in dict.fromkeys(id for some in ids.values() for id in some)]
    with installed() as folder, ThreadPoolExecutor(workers) as pool:
        parts = pool.map(lambda n: trial(folder, HEALTHY, nodes[n::workers], part=n), range(workers))
        control = functools.reduce(Trial.__add__, parts)

        def one(name: str) -> Trial:
            result = trial(folder, name, [known[id] for id in ids[name]])
            print(
                f"{name}: caught by {len(result.caught_by)}, {result.seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )
            return result

        return control, dict(zip(ids, pool.map(one, ids), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unibus_contracts.saboteurs", description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help="these saboteurs only; default: all")
    parser.add_argument("-n", dest="workers", metavar="N", type=int, default=2, help="processes at once; default: 2")
    parser.add_argument("--all", dest="whole", action="store_true", help="each against the whole suite")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what caught which")
    parser.add_argument("-v", dest="verbose", action="store_true", help="show what pytest says of each")
    options = parser.parse_args(arguments)
    begun, known = time.monotonic(), contracts()
    saboteurs, hardships = chosen(options.names)
    ids = {s.name: list(known if options.whole else dict.fromkeys((*s.kills, *BASICS))) for s in saboteurs}
    ids |= {h.name: list(h.keeps) for h in hardships}
    control, results = trials(ids, known, options.workers)
    if options.verbose:
        for name, result in results.items():
            print(f"---- {name}\n{result.output}")
    lines, wrong = verdicts(saboteurs, list(known), control, results, BASICS, complete=not options.names)
    borne, broken = hardships_borne(hardships, results)
    print("\n".join(lines + borne))
    well = f"all {len(saboteurs)} are caught, {len(hardships)} hardships are borne; {time.monotonic() - begun:.0f} s"
    print("\n".join(wrong + broken) or well)
    if options.json:
        told = {
            name: {"caught_by": result.caught_by, "outcomes": dict(result.outcomes)} for name, result in results.items()
        }
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return bool(wrong or broken)


if __name__ == "__main__":
    sys.exit(main())
