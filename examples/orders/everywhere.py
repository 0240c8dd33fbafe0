"""The demo on several brokers, one after the other, and its numbers side by side.

    python -m examples.orders.everywhere memory:// amqp://localhost kafka://localhost

The exit status says whether they are the same on all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.orders.generate import DATA

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 600.0  # seconds for one broker; the demo itself gives up when nothing changes any more
WIDTH = 120  # where there is no terminal

# Rows that are declared to differ, and why.
AGAIN, SECONDS = "delivered more than once", "seconds"
DECLARED = {
    AGAIN: "delivery is at least once; how often it is more depends on what happens meanwhile",
    SECONDS: "how long it takes is the broker's and the machine's",
}


@dataclass(frozen=True)
class Numbers:
    """What the demo has counted on one broker: row -> number."""

    expected: Mapping[str, float]
    actual: Mapping[str, float]


def differences(found: Mapping[str, Numbers]) -> dict[str, set[str]]:
    """Row -> the brokers whose number is not the expected one. What is declared to differ is not looked at."""
    rows = {row for numbers in found.values() for row in (*numbers.expected, *numbers.actual)}
    wanted = next(iter(found.values())).expected if found else {}
    wrong = {
        row: {name for name, n in found.items() if not n.actual.get(row) == n.expected.get(row) == wanted.get(row)}
        for row in rows
        if row not in DECLARED
    }
    return {row: names for row, names in wrong.items() if names}


def run(url: str, file: Path) -> tuple[Numbers | None, int, str]:
    """The demo in a process of its own, since its service belongs to one broker: numbers, exit status, what it printed."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("UNIBUS_")}
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder, "numbers.json")
        child = subprocess.run(  # noqa: S603  # our own
            [sys.executable, "-m", "examples.orders", "--file", str(file), "--json", str(numbers)],
            cwd=ROOT,
            env={**environ, "ORDERS_URL": url},  # not an argument, which everybody on the machine could read
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=LONGEST,
        )
        found = Numbers(**json.loads(numbers.read_text(encoding="utf-8"))) if numbers.exists() else None
        return found, child.returncode, child.stdout


def table(found: Mapping[str, Numbers]) -> Table:
    """Rows are the demo's numbers, columns the brokers."""
    wrong = differences(found)
    first = next(iter(found.values()))
    made = Table(title="the orders demo, side by side", title_justify="left")
    made.add_column("")
    made.add_column("expected", justify="right")
    for name in found:
        made.add_column(name, justify="right")
    for row in first.actual:
        mark = "*" if row in DECLARED else ""
        cells = [_text(numbers.actual.get(row), wrong=name in wrong.get(row, ())) for name, numbers in found.items()]
        made.add_row(f"{row}{mark}", _text(first.expected.get(row)), *cells, style="dim" if mark else "")
    return made


def _text(number: float | None, *, wrong: bool = False) -> str:
    text = "" if number is None else f"{number:g}"
    return f"[bold red]{text or '?'} <-[/]" if wrong else text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.orders.everywhere",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("urls", nargs="+", help="the brokers")
    parser.add_argument("--file", type=Path, default=DATA, help="orders; what is expected of them stands beside it")
    options = parser.parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    found: dict[str, Numbers] = {}
    failed: list[str] = []
    for number, url in enumerate(options.urls, start=1):
        scheme = url.partition(":")[0]
        name = scheme if scheme not in {*found, *failed} else f"{scheme} {number}"
        try:
            numbers, status, printed = run(url, options.file)
        except subprocess.TimeoutExpired:
            numbers, status, printed = None, 1, f"not done within {LONGEST:g} s\n"
        if numbers is not None:
            found[name] = numbers
        if status:
            failed.append(name)
            console.print(printed, markup=False, highlight=False, end="")
        console.print(f"{name}: {'failed' if status else 'done'}", style="red" if status else "", highlight=False)
    if not found:
        return 1
    console.print(table(found))
    for row, why in DECLARED.items():
        console.print(f"* {row} may differ: {why}", highlight=False, style="dim")
    wrong = differences(found)
    for row, names in sorted(wrong.items()):
        console.print(f"{row}: differs on {', '.join(sorted(names))}", style="red", highlight=False)
    good = not wrong and not failed
    console.print(
        f"the numbers are the same on {len(found)} brokers" if good else "THE NUMBERS ARE NOT THE SAME EVERYWHERE",
        highlight=False,
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
