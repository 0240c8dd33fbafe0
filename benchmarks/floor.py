"""Has a ratio fallen? Times of two days can't be compared; the ratios of one run to the client beside it can, nearly.

Each round gives one ratio, so a run has a range: that is its noise. A range that lies wholly on the wrong side of the
committed one (`floor.json`, whose brokers and versions it names) has fallen by more than both runs scatter.

    python -m benchmarks.floor reports/bench.json     makes floor.json of a run, on an idle machine
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS, TOOL

FLOOR = Path(__file__).with_name("floor.json")
FIGURES = {"messages/s": 1, "p50 ms": -1}  # more is better, or less
_ABOUT = ("date", "commit", "cpu", "cores", "load", "python", "loop", "packages", "brokers")

Run = Mapping[str, Any]


def of(run: Run) -> dict[str, Any]:
    """What is kept of a run as `--json` writes it."""
    about = {name: run[name] for name in _ABOUT if run.get(name) is not None}
    return {**about, "ratios": [{"case": c, "of": o, "to": t, "figure": f, **r} for (c, o, t, f), r in _ratios(run)]}


def read(path: Path) -> dict[str, Any]:
    """A floor, or a run."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if "ratios" in found else of(found)


def fallen(now: Run, before: Run) -> tuple[list[str], int]:
    """A line for each ratio that fell, and how many were compared: what only one of them has is left out."""
    found = dict(_ratios(now))
    lines = []
    compared = 0
    for was in before["ratios"]:
        ratio = found.get((was["case"], was["of"], was["to"], was["figure"]))
        if ratio is None:
            continue
        compared += 1
        more = FIGURES[was["figure"]] > 0
        if ratio["highest"] < was["lowest"] if more else ratio["lowest"] > was["highest"]:
            lines.append(
                f"{was['case']}, {was['figure']}, {was['of']} to {was['to']}: {_range(ratio)}; the floor is {_range(was)}"
            )
    return lines, compared


def differences(now: Run, before: Run) -> list[str]:
    """Other versions than the floor's: a ratio may have moved for their sake."""
    brokers = {kind: own["version"] for kind, own in before.get("brokers", {}).items()}
    ours = {kind: own["version"] for kind, own in now.get("brokers", {}).items()}
    packages, theirs = before.get("packages", {}), now.get("packages", {})
    pairs = [
        (name, was, found.get(name))
        for known, found in ((brokers, ours), (packages, theirs))
        for name, was in known.items()
    ]
    pairs += [(name, before.get(name), now.get(name)) for name in ("python", "cpu", "cores", "loop")]
    return [f"{name} is {new}, the floor was measured with {was}" for name, was, new in pairs if new and new != was]


def _range(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']} ({ratio['lowest']} - {ratio['highest']})"


def _ratios(run: Run) -> Iterator[tuple[tuple[str, str, str, str], dict[str, float]]]:
    for case in run["cases"]:
        for name, figures in case["contestants"].items():
            if not name.startswith(OURS):
                continue
            for figure in FIGURES.keys() & figures.keys():
                for to, ratio in figures[figure]["to"].items():
                    if not to.startswith((OURS, TOOL)):
                        yield (case["name"], name, to, figure), ratio


def main() -> None:
    run = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    FLOOR.write_text(json.dumps(of(run), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{FLOOR.name}: {len(of(run)['ratios'])} ratios")


if __name__ == "__main__":
    main()
