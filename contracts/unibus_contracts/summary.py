"""`python -m unibus_contracts.summary reports/*.json`: one line a report; the status is 0 only if each is a pass."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .report import line, problems


def main(arguments: Sequence[str] | None = None) -> int:
    paths = [Path(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    if not paths:
        print("no report was given: no contract has been run", file=sys.stderr)
        return 1
    status = 0
    for path in paths:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            text, wrong, left = line(report), problems(report), report.get("left", [])
        except (OSError, ValueError, KeyError) as error:
            text, wrong, left = f"{path}: no report of the contract suite", [f"{type(error).__name__}: {error}"], []
        print("\n".join([text, *(f"  {problem}" for problem in [*wrong, *left])]))
        status |= bool(wrong)
    return status


if __name__ == "__main__":
    sys.exit(main())
