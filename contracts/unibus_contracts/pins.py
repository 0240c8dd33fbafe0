"""Pinned answers: what an adapter is known to declare and to keep, in a file that is committed, so that a change is a diff.

    pytest --pyargs unibus_contracts --unibus-url URL --unibus-pin FOLDER    a run that differs fails, and says in what
    python -m unibus_contracts.pins --folder FOLDER reports/*.json           pins the answers of these runs

A folder has one file an adapter, `redis.json`. Where flags follow the version of the server it has one a version,
`rabbitmq-3.10.json` (`--by-version`), and these go first; a version of which nothing is pinned is not compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import supply
from .report import NOT_RUN, NOT_TRIED, PASSED, REFUSED, problems

ANSWERS = Path(__file__).parent / "answers"  # of the adapters in this repository
WORDS = {PASSED: "kept", REFUSED: "refused"}


def answers(report: Mapping[str, Any]) -> dict[str, Any]:
    """Of a report, what is pinned: no times, no URL. What was not tried is no answer."""
    entries = {entry["id"]: entry["outcome"] for entry in report["contracts"]}
    return {
        "adapter": report["adapter"],
        "version": report["version"],
        "features": report["features"],
        "numbers": report["numbers"],
        "contracts": {id: WORDS[outcome] for id, outcome in sorted(entries.items()) if outcome in WORDS},
    }


def _version(report: Mapping[str, Any]) -> str:
    """`8.2` of 8.2.1; empty where the server has no versions."""
    return ".".join(str(report["version"] or "").split(".")[:2])


def pin_of(folder: Path, report: Mapping[str, Any], *, by_version: bool = False) -> Path:
    """The file with the answers of this adapter: of its server's version, or else of any."""
    version = _version(report)
    exact = folder / f"{report['adapter']}-{version}.json"
    return exact if version and (by_version or exact.exists()) else folder / f"{report['adapter']}.json"


def other_versions(folder: Path, report: Mapping[str, Any]) -> list[str]:
    """The versions that are pinned where that of this report is not, so that nothing can be compared; else empty."""
    if report["adapter"] is None or not _version(report) or pin_of(folder, report).exists():
        return []
    return sorted(path.stem.partition("-")[2] for path in folder.glob(f"{report['adapter']}-*.json"))


def unpinned(folder: Path, report: Mapping[str, Any]) -> str | None:
    """A line where the run could not be compared, because only other versions of the server are pinned."""
    if not (others := other_versions(folder, report)):
        return None
    name = f"{report['adapter']} {_version(report)}"
    return f"nothing is pinned of {name}, so nothing was compared; pinned: {', '.join(others)}"


def server(pinned: Mapping[str, Any]) -> str:
    """What the answers of this repository were measured on, for people: the name of an emulator, or the server and its version."""
    name = pinned["adapter"]
    if (kind := supply.KINDS.get(name)) is None:
        return " ".join(filter(None, (name, pinned["version"])))
    # Where a client can't ask for the version it is the same in Docker and as a process.
    return supply.emulator(name) or f"{name} {pinned['version'] or kind.image.partition(':')[2]}"


def differences(folder: Path, report: Mapping[str, Any]) -> list[str]:
    """In what a run differs from what is pinned, a line each. Contracts that failed are told elsewhere."""
    if report["adapter"] is None:
        return []  # never reached: every contract says so
    if other_versions(folder, report):
        return []  # answers of another version are no measure; the summary says that nothing was compared
    path = pin_of(folder, report)
    how = f"python -m unibus_contracts.pins --folder {folder} REPORT"
    try:
        pinned = json.loads(path.read_text(encoding="utf-8"))
        silent = {NOT_RUN, NOT_TRIED} if report.get("declare") == "assume" else {NOT_RUN}
        lines = _compared(pinned, answers(report), {e["id"] for e in report["contracts"] if e["outcome"] in silent})
    except FileNotFoundError:
        return [f"nothing is pinned of {report['adapter']}: {path} is missing; {how}"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{path} holds no pinned answers: {type(error).__name__}: {error}; {how}"]
    if lines:
        lines.append(
            f"pinned in {path} on {pinned.get('version') or 'a server without a version'}; if this is meant: {how}"
        )
    return lines


def _compared(pinned: Mapping[str, Any], now: Mapping[str, Any], silent: set[str]) -> list[str]:
    lines = []
    for part in ("features", "numbers"):
        for name in sorted({*pinned[part], *now[part]}):
            before, after = pinned[part].get(name), now[part].get(name)
            if before != after:
                lines.append(f"{name}: pinned {_said(before)}, now {_said(after)}")
    for id, after in now["contracts"].items():
        if (before := pinned["contracts"].get(id)) != after:
            lines.append(f"{id}: pinned {before or 'not at all'}, now {after}")
    gone = sorted(set(pinned["contracts"]) - {*now["contracts"], *silent})
    return [*lines, *(f"{id}: pinned {pinned['contracts'][id]}, and did not pass now" for id in gone)]


def _said(answer: object) -> str:
    return json.dumps(answer, ensure_ascii=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Pin the answers of reports. Only of whole passes: what failed or was left out would be pinned as an answer."""
    parser = argparse.ArgumentParser(prog="python -m unibus_contracts.pins", description=main.__doc__)
    parser.add_argument("reports", metavar="REPORT", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, default=ANSWERS, help=f"default: {ANSWERS}")
    parser.add_argument("--by-version", action="store_true", help="a file of its own for this version of the server")
    options = parser.parse_args(arguments)
    status = 0
    for path in options.reports:
        try:
            report = {**json.loads(path.read_text(encoding="utf-8")), "differs": []}
            wrong = [
                *problems(report),
                *(f"{e['id']} was not run" for e in report["contracts"] if e["outcome"] == NOT_RUN),
                *(["it has left out what makes channels"] if report.get("declare") == "assume" else []),
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            wrong = [f"no report of the contract suite: {type(error).__name__}: {error}"]
        if wrong:
            print("\n".join([f"{path}: not pinned", *(f"  {problem}" for problem in wrong)]), file=sys.stderr)
            status = 1
            continue
        pin = pin_of(options.folder, report, by_version=options.by_version)
        options.folder.mkdir(parents=True, exist_ok=True)
        pin.write_text(json.dumps(answers(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path}: pinned in {pin}")
    return status


if __name__ == "__main__":
    sys.exit(main())
