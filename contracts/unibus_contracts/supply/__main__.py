"""The test brokers on the command line: `up` and `urls` print NAME=value lines (`export $(... up)`), `down` stops them; `restart` does
so with the data that they have.

`cluster-up` and `cluster-down` do the same with clusters of three.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence

from . import ASSEMBLIES, KINDS, STORES, Broker, Cluster, SupplyError, cluster, running, start, stop


def lines(brokers: Iterable[Broker | Cluster]) -> list[str]:
    """`eval "$(... up)"` sets these, so values are quoted where the shell would read something into them."""
    return [f"{name}={shlex.quote(value)}" for broker in brokers for name, value in broker.variables.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unibus_contracts.supply", description=__doc__)
    parser.add_argument("command", choices=["up", "down", "urls", "restart", "cluster-up", "cluster-down"])
    parser.add_argument(
        "--only", choices=sorted({**KINDS, **STORES}), action="append", help="this broker; may be repeated"
    )
    options = parser.parse_args(arguments)
    try:
        if options.command in {"down", "cluster-down"}:
            for name in stop(options.only, clusters=options.command == "cluster-down"):
                print(f"{name}: stopped", file=sys.stderr)
            return 0
        if options.command == "cluster-up":
            for name in options.only or ASSEMBLIES:
                made = cluster(name)
                count = len(made.nodes) + len(made.sentinels)
                print(f"{made.name}: {count} native processes", file=sys.stderr)
                print("\n".join(lines([made])))
            return 0
        names = options.only or [*KINDS, *STORES]
        if options.command == "restart":
            for broker in running(names):
                broker.restart()
                print(f"{broker.name}: restarted", file=sys.stderr)
            return 0
        brokers = [start(name) for name in names] if options.command == "up" else running(names)
    except SupplyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for broker in brokers:
        print(f"{broker.name}: {broker.source}", file=sys.stderr)
    print("\n".join(lines(brokers)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
