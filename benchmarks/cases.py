"""Cases, their samples, and what is said about them."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

_PACKAGES = (
    "unibus",
    "aio-pika",
    "aiormq",
    "pamqp",
    "aiokafka",
    "redis",
    "hiredis",
    "aiobotocore",
    "pydantic",
    "confluent-kafka",
    "uvloop",
    "faststream",
    "mq-bridge",
)

OURS = "unibus"  # so begin the names of contestants that are
TOOL = "the broker's own tool"

Figures = Mapping[str, float]


@dataclass
class Case:
    """One thing that is measured, for each contestant once a round. `base`: whom the others are compared with.

    `ratios` are taken round by round, so both sides saw the same machine; the median of these is what counts.
    """

    name: str
    base: str | None = None
    samples: dict[str, list[Figures]] = field(default_factory=dict)

    def add(self, contestant: str, figures: Figures) -> None:
        self.samples.setdefault(contestant, []).append(figures)

    def ratios(self, contestant: str, to: str | None, figure: str) -> list[float]:
        """Of one to the other, round by round; none to itself."""
        if to is None or contestant == to or figure == "busy %":
            return []
        pairs = zip(self.samples[contestant], self.samples.get(to, ()), strict=False)
        return [mine[figure] / base[figure] for mine, base in pairs if base.get(figure)]

    def as_json(self) -> dict[str, Any]:
        contestants = {}
        for name, rounds in self.samples.items():
            figures = {}
            for figure in rounds[0]:
                values = [sample[figure] for sample in rounds]
                figures[figure] = {**_summary(values), "rounds": [_short(value) for value in values]}
                ratios = {to: found for to in self.samples if (found := self.ratios(name, to, figure))}
                figures[figure]["to"] = {to: _summary(found) for to, found in ratios.items()}
            contestants[name] = figures
        return {"name": self.name, "base": self.base, "contestants": contestants}


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {"median": _short(median(values)), "lowest": _short(min(values)), "highest": _short(max(values))}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def table(cases: Sequence[Case]) -> str:
    """One table for people."""
    head = ("case", "contestant", "figure", "median", "lowest", "highest", "to base", "lowest - highest")
    rows: list[tuple[str, ...]] = [head]
    for case in cases:
        case_name = case.name
        for contestant, rounds in case.samples.items():
            who = contestant + (" (base)" if contestant == case.base else "")
            for figure in rounds[0]:
                values = [sample[figure] for sample in rounds]
                cells = [shown(value) for value in (median(values), min(values), max(values))]
                ratios = case.ratios(contestant, case.base, figure)
                ratio = (f"{median(ratios):.2f}", f"{min(ratios):.2f} - {max(ratios):.2f}") if ratios else ("", "")
                rows.append((case_name, who, figure, *cells, *ratio))
                case_name = who = ""
    return _aligned(rows, texts=3)


def beside(cases: Sequence[Case]) -> str:
    """What the first contestant reaches of each other one."""
    rows: list[tuple[str, ...]] = [("case", "figure", "to", "ratio", "lowest - highest")]
    for case in cases:
        first = next(iter(case.samples))
        for to in case.samples:
            for figure in case.samples[first][0]:
                if ratios := case.ratios(first, to, figure):
                    spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
                    rows.append((case.name, figure, to, f"{median(ratios):.2f}", spread))
    return _aligned(rows, texts=3)


def _aligned(rows: Sequence[tuple[str, ...]], texts: int) -> str:
    """The first so many columns to the left, the others to the right; a rule below the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (rows[0], tuple("-" * width for width in widths), *rows[1:])
    )


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def circumstances() -> dict[str, Any]:
    """When, where and with what: figures without these mean nothing."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": [round(load, 1) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],  # noqa: S607  # wherever git is
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or sys.platform
