"""Has a ratio fallen? Times of two days can't be compared; the ratios of one run to the raw client beside it can, nearly.

Each round gives one ratio, so a run has a range. One that lies below that of the committed run as a whole has fallen by
more than both runs scatter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FIGURE = "messages/s"


def fallen(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """A line for each ratio of unibus that fell. Both as `--json` writes them; what only one of them has is left out."""
    found = dict(_ratios(now))
    lines = []
    for (case, to), was in _ratios(before):
        ratio = found.get((case, to))
        if ratio is not None and ratio["highest"] < was["lowest"]:
            lines.append(
                f"{case}, to {to}: {ratio['median']} ({ratio['lowest']} - {ratio['highest']}),"
                f" it was {was['median']} ({was['lowest']} - {was['highest']})"
            )
    return lines


def _ratios(run: dict[str, Any]) -> Iterator[tuple[tuple[str, str], dict[str, float]]]:
    for case in run["cases"]:
        figure = case["contestants"].get("unibus", {}).get(FIGURE)
        for to, ratio in (figure or {}).get("to", {}).items():
            yield (case["name"], to), ratio
