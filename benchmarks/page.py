"""The tables and plots of docs/performance.md, from what runs have written: `python -m benchmarks.page reports/bench.json [MORE.json]`.

The text around them is written by hand; what stands between `<!-- NAME -->` and `<!-- end -->` is replaced. Of a case that
several runs have, the last one counts. No ratio is made here: all are those of the run, whose rounds had both sides.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import growth
from benchmarks.cases import OURS, shown
from benchmarks.goals import BASES, GOALS, bottleneck, request

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
_BLOCK = re.compile(r"(?<=^<!-- )((?!end )[a-z-]+)( -->\n).*?(?=^<!-- end -->$)", re.MULTILINE | re.DOTALL)

Run = Mapping[str, Any]
Row = Sequence[str]


class Runs:
    """All cases of some runs, each with the number of its run."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.cases: dict[str, Mapping[str, Any]] = {}
        self._numbers: dict[str, int] = {}
        grown: dict[tuple[str, str], tuple[int, growth.Growth]] = {}
        for number, run in enumerate(runs, 1):
            for case in run["cases"]:
                self.cases[case["name"]], self._numbers[case["name"]] = case, number
            for own in run.get("growth", ()):
                grown[own["broker"], own["variable"]] = number, own
        self.grown = list(grown.values())

    def mark(self, number: int) -> str:
        """Of which run, where there is more than one."""
        return f" [{number}]" if len(self.runs) > 1 else ""

    def label(self, case: str) -> str:
        return case + self.mark(self._numbers[case])


def fill(text: str, runs: Runs) -> str:
    """The page with its blocks made anew. An unknown name raises KeyError."""
    return _BLOCK.sub(lambda found: f"{found[1]}{found[2]}{BLOCKS[found[1]](runs)}\n", text)


def about(runs: Runs) -> str:
    lines = []
    for number, run in enumerate(runs.runs, 1):
        versions = [f"{name} {own['version']}" for name, own in run.get("brokers", {}).items()]
        packages = [f"{name} {found}" for name, found in run["packages"].items() if name != "unibus"]
        load = ", ".join(map(str, run["load"] or ()))
        lines.append(
            f"-{runs.mark(number)} {run['date'][:16].replace('T', ' ')} UTC, commit {run['commit']}, {run.get('minutes', '?')} minutes;"
            f" {run['cores']} cores of {run['cpu']}, load when it began {load}. Brokers, on the same machine: {'; '.join(versions) or 'none'}."
            f" Python {run['python']}, {run.get('loop', 'asyncio')}; {', '.join(packages)}."
        )
    return "\n".join(lines)


def goals(runs: Runs) -> str:
    rows: list[Row] = []
    for goal in GOALS:
        found = goal.found(runs.cases)
        name = runs.label(goal.case) if found else goal.case
        who = "" if goal.who == OURS else f" ({goal.who})"
        what = f"{name}{who}" + ("" if goal.figure == "messages/s" else f", {goal.figure}")
        bound = f"{'≤' if goal.at_most else '≥'} {goal.bound:g}"
        if found is None:
            rows.append((what, goal.to or "", bound, "not measured", ""))
            continue
        measured = f"**{shown(found['median'])}** ({shown(found['lowest'])} - {shown(found['highest'])})"
        rows.append((what, goal.to or "", bound, measured, "yes" if goal.reached(found) else "no"))
    return _table(("case", "compared with", "goal", "measured", "reached"), rows)


def headline(runs: Runs) -> str:
    """The first flow, beside everybody: one table a broker."""
    parts = []
    for broker in BASES:
        cases = [f"{broker}: {direction}" for direction in ("send", "consume")]
        if not all(case in runs.cases for case in cases):
            parts.append(f"**{broker}**: not measured.")
            continue
        send, consume = (runs.cases[case]["contestants"] for case in cases)
        rows = [(name, *_compared(send, name), *_compared(consume, name)) for name in {**send, **consume}]
        head = ("", "send, messages/s", "CPU µs", "unibus to it", "consume, messages/s", "CPU µs", "unibus to it")
        limits = "\n".join(
            f"- {case.split(': ')[1]}, what limits it: {bottleneck(runs.cases[case])}." for case in cases
        )
        parts.append(
            f"**{runs.label(cases[0]).replace(': send', '')}**\n\n{_table((broker, *head[1:]), rows)}\n\n{limits}"
        )
    return "\n\n".join(parts)


def _compared(case: Mapping[str, Any], name: str) -> Row:
    if name not in case:
        return ("", "", "")
    own = case[name]
    ratio = case[OURS]["messages/s"]["to"].get(name)
    cpu = shown(own["CPU µs/message"]["median"]) if "CPU µs/message" in own else ""
    return (_spread(own["messages/s"]), cpu, _spread(ratio) if ratio else "")


def flows(runs: Runs) -> str:
    """The other flows: beside the raw client, or alone."""
    rows: list[Row] = []
    for broker, base in BASES.items():
        for name, case in runs.cases.items():
            contestants = case["contestants"]
            if not re.match(rf"{broker}: (send|consume), ", name) or OURS not in contestants:
                continue
            own = contestants[OURS]
            other = contestants.get(base)
            ratio = own["messages/s"]["to"].get(base)
            rows.append(
                (
                    runs.label(name),
                    _spread(own["messages/s"]),
                    shown(own["CPU µs/message"]["median"]),
                    shown(other["messages/s"]["median"]) if other else "",
                    _spread(ratio) if ratio else "",
                )
            )
    return _table(("", "unibus, messages/s", "CPU µs", "raw client, messages/s", "unibus to it"), rows)


def requests(runs: Runs) -> str:
    rows: list[Row] = []
    for broker, base in BASES.items():
        if (case := runs.cases.get(request(broker))) is None:
            continue
        own, raw = case["contestants"][OURS], case["contestants"].get(base)
        cells = [
            cell
            for figure in ("p50 ms", "p99 ms")
            for cell in (
                shown(own[figure]["median"]),
                shown(raw[figure]["median"]) if raw else "",
                _spread(own[figure]["to"][base]) if raw else "",
            )
        ]
        rows.append((runs.label(request(broker)).replace(": request and reply, one at a time", ""), *cells))
    head = ("", "p50 ms", "raw client", "unibus to it", "p99 ms", "raw client", "unibus to it")
    return _table(head, rows)


def cold(runs: Runs) -> str:
    return _every(runs, ": cold start", shown_ratio="whole process ms")


def workers(runs: Runs) -> str:
    rows: list[Row] = []
    for name, case in _ending(runs, ": unibus run --workers"):
        cells = []
        for own in case["contestants"].values():
            ratio = own["messages/s"]["to"].get(case["base"])
            cells.append(shown(own["messages/s"]["median"]) + (f" ({shown(ratio['median'])}x)" if ratio else ""))
        rows.append((runs.label(name).replace(": unibus run --workers", ""), *cells))
    return _table(("messages/s", "1 worker", "2 workers", "4 workers"), rows)


def fan_out(runs: Runs) -> str:
    return _every(runs, ": publish to so many groups")


def core(runs: Runs) -> str:
    rows: list[Row] = []
    for name, case in runs.cases.items():
        if name.startswith("memory: "):
            for who, own in case["contestants"].items():
                cpu = own["CPU µs/message"]
                rows.append((runs.label(name), who, _spread(own["messages/s"]), _spread(cpu)))
    return _table(("", "", "messages/s", "CPU µs a message"), rows)


def backlog(runs: Runs) -> str:
    return _every(runs, ", default settings", after=": a backlog of ")


def grown(runs: Runs) -> str:
    rows: list[Row] = []
    for number, own in runs.grown:
        points = own["points"]
        if not points:
            rows.append((own["broker"] + runs.mark(number), own["variable"], "", "", "", "", own["limit"]))
            continue
        first, last = points[0], points[-1]
        costs = " → ".join(shown(point["CPU µs"]) for point in points)
        memory = " → ".join(shown(point["MB"]) for point in points)
        said = growth.verdict(own)
        rows.append(
            (
                own["broker"] + runs.mark(number),
                own["variable"],
                f"{first['n']:,} → {last['n']:,}",
                f"{costs} a {own['unit']}",
                shown(growth.faster(points)) + (f", **{said}**" if said else ""),
                memory,
                own["limit"],
            )
        )
    head = ("", "what varies", "from → to", "CPU µs, at each tenfold", "beyond log n", "MB grown", "no further, since")
    return _table(head, rows)


BLOCKS: dict[str, Callable[[Runs], str]] = {
    "about": about,
    "goals": goals,
    "headline": headline,
    "flows": flows,
    "requests": requests,
    "cold": cold,
    "workers": workers,
    "fan-out": fan_out,
    "core": core,
    "backlog": backlog,
    "growth": grown,
}


def _ending(runs: Runs, end: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((name, case) for name, case in runs.cases.items() if name.endswith(end))


def _every(runs: Runs, end: str, shown_ratio: str = "", after: str = "") -> str:
    """A row for each contestant, a column for each figure; the ratio of one of them to the base."""
    rows: list[Row] = []
    figures: list[str] = []
    for name, case in _ending(runs, end):
        if after not in name:
            continue
        for who, own in case["contestants"].items():
            figures = figures or list(own)
            place = (
                runs.label(name).replace(end, "")
                if len(case["contestants"]) == 1
                else f"{runs.label(name).replace(end, '')}, {who}"
            )
            ratio = own[shown_ratio]["to"].get(case["base"]) if shown_ratio else None
            cells = [shown(own[figure]["median"]) if figure in own else "" for figure in figures]
            rows.append((place, *cells, *([_spread(ratio) if ratio else ""] if shown_ratio else [])))
    more = [f"{shown_ratio}, to the raw client"] if shown_ratio else []
    return _table(("", *figures, *more), rows)


def _spread(found: Mapping[str, float]) -> str:
    return f"{shown(found['median'])} ({shown(found['lowest'])} - {shown(found['highest'])})"


def _table(head: Row, rows: Sequence[Row]) -> str:
    if not rows:
        return "Not measured."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    runs = Runs([json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]])
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), runs), encoding="utf-8")
    print(f"written: {PAGE.name}")
    try:
        from benchmarks import plots
    except ImportError as error:
        sys.exit(f"without plots: {error.name} is not installed: pip install 'unibus[bench]'")
    for path in plots.draw(runs):
        print(f"written: {path.name}")


if __name__ == "__main__":
    main()
